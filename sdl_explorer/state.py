"""What one viewer looks at: selection, filters, page, thresholds. No GUI import; a cell and a button set the same object."""

from collections import deque
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pandas as pd
import param

PAGES = ("Overview", "Alignment", "Latents", "Intervene", "Absorption", "Landscape", "Compare")
SIDES = ("decoder", "encoder", "response")
VERSION = 1
HISTORY = 100
OPERATORS = {
    "==": lambda column, value: column == value,
    "!=": lambda column, value: column != value,
    ">": lambda column, value: column > value,
    "<": lambda column, value: column < value,
    ">=": lambda column, value: column >= value,
    "<=": lambda column, value: column <= value,
}


class Filter(NamedTuple):
    """Keep the latents whose `column` of the latent table compares so with `value`."""

    column: str
    operator: str
    value: str | float | bool

    @property
    def label(self) -> str:
        return f"{self.column} {self.operator} {self.value}"

    def keeps(self, table: pd.DataFrame) -> np.ndarray:
        """(n_latents,) bool. A column that the table lacks keeps everything: its finding is not there yet."""
        if self.column not in table:
            return np.ones(len(table), dtype=bool)
        return np.asarray(OPERATORS[self.operator](table[self.column], self.value), dtype=bool)


def keep(filters, table: pd.DataFrame) -> np.ndarray:
    """Rows of the latent table that pass every filter."""
    kept = np.ones(len(table), dtype=bool)
    for one in filters:
        kept &= one.keeps(table)
    return kept


def strictest(filters, table: pd.DataFrame) -> tuple[Filter, int]:
    """The filter that removes most rows by itself, and how many."""
    removed = {one: int((~one.keeps(table)).sum()) for one in filters}
    worst = max(removed, key=removed.get)
    return worst, removed[worst]


class _Converted(param.Parameter):
    """A parameter whose values pass through `convert(value, state)`: lists from JSON become immutable tuples, and nothing
    is kept that does not fit."""

    __slots__ = ["convert"]

    def __init__(self, default=(), *, convert=lambda value, state: tuple(value), **params):
        self.convert = convert
        super().__init__(default=default, **params)

    def __set__(self, obj, value):
        super().__set__(obj, self.convert(value, obj))


def _id_of(kind: str):
    def convert(value, state) -> int | None:
        if value is None:
            return None
        if isinstance(value, bool) or int(value) != value or value < 0:
            raise ValueError(f"ExplorerState: {value!r} is not a {kind}; {kind}s are counted 0, 1, 2, ...")
        limit = getattr(state, f"n_{kind}s", None)
        if limit is not None and value >= limit:
            raise ValueError(f"ExplorerState: {kind} {value} does not exist; there are {limit} ({kind}s 0 to {limit - 1}).")
        return int(value)

    return convert


def _ids_of(kind: str):
    one = _id_of(kind)
    return lambda value, state: tuple(dict.fromkeys(one(i, state) for i in value))


def _filters(value, state) -> tuple[Filter, ...]:
    filters = tuple(Filter(*one) for one in value)
    for one in filters:
        if one.operator not in OPERATORS:
            raise ValueError(f"ExplorerState: filter {one.label!r} compares with {one.operator!r}; choose one of {', '.join(OPERATORS)}.")
    return tuple(dict.fromkeys(filters))


def _pair(value, state) -> tuple[str, str] | None:
    if value is None:
        return None
    pair = tuple(str(one) for one in value)
    if len(pair) != 2:
        raise ValueError(f"ExplorerState: compare holds two commits, before and after; {len(pair)} given ({pair}).")
    return pair


class ExplorerState(param.Parameterized):
    """One viewer's looking. Values are immutable; one assignment, or one `param.update`, is one user action and one undo.

    `n_latents` and `n_features` bound the ids when they are known.
    """

    page = param.Selector(default="Overview", objects=list(PAGES), doc="The page in front.")
    selected_latents = _Converted((), convert=_ids_of("latent"), doc="The selected latents, as a tuple of ids.")
    primary_latent = _Converted(None, convert=_id_of("latent"), doc="The one latent that the inspector follows, or None.")
    selected_features = _Converted((), convert=_ids_of("feature"), doc="The selected true features, as a tuple of ids.")
    primary_feature = _Converted(None, convert=_id_of("feature"), doc="The one true feature in front, or None.")
    filters = _Converted((), convert=_filters, doc="Filters on the latent table: (column, operator, value).")
    tau = param.Number(default=0.95, bounds=(0, 1), doc="Cosine from which a true feature counts as recovered.")
    side = param.Selector(default="decoder", objects=list(SIDES), doc="The direction of a latent that is compared with the truth.")
    compare = _Converted(None, convert=_pair, doc="Two commits, before and after; None follows the last intervention.")
    twins = _Converted((), convert=lambda value, state: tuple(dict.fromkeys(map(str, value))), doc="Cards that show their table.")
    theme = param.Selector(default="light", objects=["light", "dark"], doc="Colours of the page and of every plot.")
    keyboard = param.Boolean(default=True, doc="Single-key shortcuts.")
    n_latents = param.Integer(default=None, allow_None=True, bounds=(1, None), doc="Latents that exist; None is not known.")
    n_features = param.Integer(default=None, allow_None=True, bounds=(0, None), doc="True features that exist; None is not known.")

    VIEW = (
        "page",
        "selected_latents",
        "primary_latent",
        "selected_features",
        "primary_feature",
        "filters",
        "tau",
        "side",
        "compare",
        "twins",
    )
    KEPT = (*VIEW, "theme", "keyboard")

    def __init__(self, n_latents=None, n_features=None, **params):
        self._undo, self._redo = deque(maxlen=HISTORY), deque(maxlen=HISTORY)
        self._recording = False
        super().__init__(n_latents=n_latents, n_features=n_features, **params)
        self._last, self._recording = self._view(), True

    @param.depends(*VIEW, watch=True)
    def _record(self):
        """param batches one `update` into one call: that is one user action."""
        now = self._view()
        if self._recording and now != self._last:
            self._undo.append(self._last)
            self._redo.clear()
        self._last = now

    def _view(self) -> dict:
        return {name: getattr(self, name) for name in self.VIEW}

    @contextmanager
    def unrecorded(self):
        """Changes inside are nobody's action and cannot be undone."""
        self._recording, before = False, self._recording
        try:
            yield
        finally:
            self._recording = before
            self._last = self._view()

    # undo of what you see ------------------------------------------------------------------------------------------

    @property
    def can_undo(self) -> bool:
        return bool(self._undo)

    @property
    def can_redo(self) -> bool:
        return bool(self._redo)

    def undo(self) -> None:
        """One user action back. The model is not touched: its history is the session's commits."""
        self._step(self._undo, self._redo)

    def redo(self) -> None:
        self._step(self._redo, self._undo)

    def _step(self, source: deque, target: deque) -> None:
        if source:
            target.append(self._view())
            with self.unrecorded():
                self.param.update(**source.pop())

    # sharing -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict:
        """Every setting, always, as JSON: a default that changes later does not change what this opens."""
        return {"v": VERSION, **{name: _plain(getattr(self, name)) for name in self.KEPT}}

    def restore(self, saved: dict) -> tuple[str, ...]:
        """Open what `to_dict` wrote. Returns what was dropped: names that are not known here, values that do not fit."""
        dropped, good = [], {}
        for name, value in saved.items():
            if name == "v":
                continue
            if name not in self.KEPT:
                dropped.append(name)
                continue
            try:
                ExplorerState(n_latents=self.n_latents, n_features=self.n_features, **{name: value})
            except (ValueError, TypeError):
                dropped.append(name)
            else:
                good[name] = value
        self.param.update(**good)
        return tuple(dropped)


def _plain(value):
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def matched_feature(latent: int | None, alignment) -> int | None:
    """The true feature that this latent's decoder row points at best; None where there is no truth."""
    if latent is None or alignment is None or latent >= len(alignment.per_latent.decoder_feature):
        return None
    feature = int(alignment.per_latent.decoder_feature[latent])
    return feature if feature >= 0 else None


def matched_latent(feature: int | None, alignment) -> int | None:
    """The latent whose decoder row points best at this true feature."""
    if feature is None or alignment is None or feature >= len(alignment.decoder_latent):
        return None
    latent = int(alignment.decoder_latent[feature])
    return latent if latent >= 0 else None


def worst_pair(alignment) -> tuple[int | None, int | None]:
    """The true feature with the lowest best decoder match and the latent nearest to it: what to look at first."""
    if alignment is None or len(alignment.decoder) == 0:
        return None, None
    feature = int(np.argmin(alignment.decoder))
    return feature, matched_latent(feature, alignment)
