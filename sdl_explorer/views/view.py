"""A view answers one question with a HoloViews element, a sentence, a table, and words for when there is nothing to draw.

    @view("Which true features did it find?", id="A2", of=(align, check_health), page="alignment")
    def best_match(alignment, health, look): ...          # -> element

    @best_match.reading                                   # the sentence that reads it aloud, where something is drawn
    def _(alignment, health, look): ...                   # -> str

    @best_match.table                                     # the same numbers as a table
    def _(alignment, health, look): ...                   # -> DataFrame

    @best_match.empty                                     # why there is nothing to draw, or None
    def _(alignment, health, look): ...                   # -> str | None

    @best_match.title                                     # optional: the question, where what is found changes it
    def _(alignment, health, look): ...                   # -> str

    @best_match.ids                                       # optional: what row k of the first Points stands for
    def _(alignment, health, look): ...                   # -> int array

Called with findings instead of a function the same names answer: `best_match(alignment, health, look)`,
`best_match.reading(alignment, health, look)` and so on; without a look the default one is meant. A finding that is not
available is None. A view knows findings, records and its look; never a session.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, update_wrapper
from importlib.metadata import entry_points
from types import FunctionType

from holoviews.core import Dimensioned

from sdl_explorer.training.commits import Commit
from sdl_explorer.views.frame import blank, empty_table
from sdl_explorer.views.look import Look

Commits = tuple[Commit, ...]  # in `of`: every commit of the run


@dataclass(frozen=True)
class Before:
    """In `of`: the same finding at the commit that is compared with; None where nothing is compared."""

    finding: Callable


@dataclass(frozen=True)
class Chosen:
    """In `of`: a finding about what is looked at. Its `setting` is this `field` of the look; None where that is None or empty."""

    finding: Callable
    setting: str
    field: str


class _Part:
    """Given one function it registers it (a decorator); given findings it answers with the registered function."""

    def __init__(self, owner: "View", name: str, function: Callable | None = None, when_empty: Callable | None = None):
        self._owner, self._name, self.function, self._when_empty = owner, name, function, when_empty

    def __call__(self, *given):
        if len(given) == 1 and isinstance(given[0], FunctionType):
            self.function = given[0]
            return self.function
        if self.function is None:
            raise AttributeError(f"view {self._owner.id}: has no {self._name}; register one with @{self._owner.__name__}.{self._name}.")
        found = self._owner.arguments(given)
        why = None if self._when_empty is None else self._owner.empty(*found)
        return self.function(*found) if why is None else self._when_empty(why)


class View:
    """A drawing function with its question and its parts; `@view` makes one."""

    def __init__(self, draw: Callable, question: str, id: str, of: tuple, page: str, cost: str, columns: tuple[str, ...]):
        update_wrapper(self, draw)
        self.draw, self.question, self.id, self.of, self.page, self.cost = draw, question, id, of, page, cost
        self.reading = _Part(self, "reading", when_empty=str)
        self.table = _Part(self, "table", when_empty=(lambda why: empty_table(*columns)) if columns else None)
        self.empty, self.ids = _Part(self, "empty"), _Part(self, "ids")
        self.title = _Part(self, "title", lambda *found: question)

    def __repr__(self) -> str:
        return f"<view {self.id}: {self.question}>"

    def arguments(self, given: tuple) -> tuple:
        """The findings and the look, checked: one finding per entry of `of`, and the default look where none is given."""
        found, look = (given[:-1], given[-1]) if given and isinstance(given[-1], Look) else (given, Look())
        if len(found) != len(self.of):
            names = ", ".join(_name(one) for one in self.of)
            raise TypeError(
                f"view {self.id}: {len(found)} findings given and {len(self.of)} needed ({names}); pass None for a missing one."
            )
        return *found, look

    def __call__(self, *given) -> Dimensioned:
        """The element. Where there is nothing to draw it holds the words that say so."""
        *found, look = self.arguments(given)
        why = self.empty(*found, look)
        return self.draw(*found, look) if why is None else blank(why, look)


_REGISTRY: dict[str, View] = {}


def view(
    question: str, *, id: str, of: tuple, page: str, cost: str = "select", columns: tuple[str, ...] = ()
) -> Callable[[Callable], View]:
    """Register a drawing function `(found..., look) -> element`.

    `of` names what it reads: finding functions, record types (`History`, `Plan`, `Pins`, `Control`), `Commits`,
    `Before(finding)`, or `Chosen(finding, setting, field)`. `page` is where its card stands; `cost` is "live" (at every
    poll), "select" (when the selection changes) or "job" (in the background). With `columns` the table has no rows where
    there is nothing to draw; without, the table function is asked there too.
    """

    def register(draw: Callable) -> View:
        other = _REGISTRY.get(id)
        if other is not None and (other.__module__, other.__qualname__) != (draw.__module__, draw.__qualname__):
            raise ValueError(f"view {id!r} exists already ({other.__module__}.{other.__qualname__}); choose another id.")
        _REGISTRY[id] = View(draw, question, id, of, page, cost, columns)
        return _REGISTRY[id]

    return register


def views(page: str | None = None) -> tuple[View, ...]:
    """Every view (of one page): the modules of this package, and entry points of the group `sdl_explorer.views`."""
    _load()
    return tuple(v for v in _REGISTRY.values() if page is None or v.page == page)


def find_view(id: str) -> View:
    """The view with this id."""
    _load()
    if id not in _REGISTRY:
        raise KeyError(f"view {id!r} does not exist; there are {', '.join(_REGISTRY)}.")
    return _REGISTRY[id]


@cache
def _load() -> None:
    package = importlib.import_module("sdl_explorer.views")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    for entry in entry_points(group="sdl_explorer.views"):
        entry.load()


def _name(one) -> str:
    if isinstance(one, Before | Chosen):
        return f"{type(one).__name__}({_name(one.finding)})"
    return getattr(one, "__name__", str(one))
