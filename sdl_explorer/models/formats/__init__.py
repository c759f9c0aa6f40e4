"""Checkpoint formats, one file each. A new file here with a `Format` subclass is all that a new format needs."""

import importlib
import pkgutil
from pathlib import Path

from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.formats.base import Format
from sdl_explorer.models.formats.files import check_tensor

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def formats() -> dict[str, Format]:
    """Every format by name."""
    return {member.name: member() for member in Format.__subclasses__()}


def read_dictionary(path: Path, format: str = "auto") -> SparseDictionary:
    """The dictionary stored at `path`: eval mode, float32, CPU, with `.provenance` saying where it comes from.

    `format="auto"` goes by what the path holds.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"load: there is nothing at {path}. Check the path.")
    chosen = _recognised(path) if format == "auto" else _named(format)
    return chosen.read(path).float().eval()


def write_dictionary(dictionary: SparseDictionary, path: Path, format: str = "native") -> Path:
    """Store the dictionary at `path`, whole or not at all; returns the path."""
    chosen, path = _named(format), Path(path).expanduser()
    for name, value in dictionary.state_dict().items():
        check_tensor(path, name, value, tuple(value.shape))
    chosen.write(dictionary, path)
    return path


def _named(format: str) -> Format:
    known = formats()
    if format not in known:
        raise ValueError(f"format is {format!r}; it is one of {', '.join(sorted(known))}.")
    return known[format]


def _recognised(path: Path) -> Format:
    found = [member for member in formats().values() if member.recognises(path)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"load: {path} could be {' or '.join(f.name for f in found)}. Say which with format=.")
    looked = "; ".join(f"{member.name}: {member.looks_for}" for member in formats().values())
    raise ValueError(f"load: {path} is no checkpoint that is known here. Looked for {looked}. Pickled files (.pt, .pkl) are never opened.")


__all__ = ["Format", "formats", "read_dictionary", "write_dictionary"]
