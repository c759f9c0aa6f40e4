"""The members of an open family: our own, and those that other packages bring by entry point.

    [project.entry-points."sdl_explorer.methods"]
    my_method = "my_package.my_module"

A family is an abstract class (`Source`, `Method`, `Intervention`). Its members are its concrete descendants, so
a new file in the family's package, or an entry point, is all that a new member needs.
"""

import importlib
import pkgutil
import warnings
from importlib.metadata import entry_points
from typing import TypeVar

import param

Family = TypeVar("Family", bound=param.Parameterized)

_loaded: set[str] = set()


def members(family: type[Family]) -> dict[str, type[Family]]:
    """Concrete classes of a family by name, in alphabetical order.

    Loads every module beside the family's own, then the entry points `sdl_explorer.<family>s`.
    """
    home = family.__module__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(home).__path__):
        importlib.import_module(f"{home}.{module.name}")
    load_entry_points(f"{family.__name__.lower()}s")
    return {cls.__name__: cls for cls in sorted(param.descendents(family, concrete=True), key=lambda cls: cls.__name__)}


def member(family: type[Family], name: str) -> type[Family]:
    """One member by name; ValueError lists the known ones."""
    known = members(family)
    if name not in known:
        raise ValueError(f"{name!r} is no {family.__name__.lower()}. There are: {', '.join(known)}.")
    return known[name]


def load_entry_points(kind: str) -> None:
    """Import once what other packages offer as "sources", "methods" or "interventions".

    A package that does not import is left out with a warning: it must not keep the rest from starting.
    """
    if kind in _loaded:
        return
    _loaded.add(kind)
    for entry in entry_points(group=f"sdl_explorer.{kind}"):
        try:
            entry.load()
        except Exception as error:
            warnings.warn(
                f"{entry.value}, entry point sdl_explorer.{kind} of {entry.dist and entry.dist.name}, does not load "
                f"({type(error).__name__}: {error}). It is left out; update or remove that package.",
                RuntimeWarning,
                stacklevel=3,
            )
