"""The family of checkpoint formats."""

from abc import ABC, abstractmethod
from pathlib import Path

from sdl_explorer.models.dictionary import SparseDictionary


class Format(ABC):
    """How dictionaries lie on disk. A member says its name and what it looks for, and reads and writes."""

    name: str
    looks_for: str  # what `recognises` goes by, for the error that lists it

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Whether an existing path looks like this format. Cheap, and raises nothing."""

    @abstractmethod
    def read(self, path: Path) -> SparseDictionary:
        """The dictionary with its `provenance` set."""

    @abstractmethod
    def write(self, dictionary: SparseDictionary, path: Path) -> None:
        """Whole or not at all; what the format cannot hold is refused with the reason."""


def provenance(format: str, library: str, version: str | None, **known) -> dict:
    """Where a dictionary comes from, in JSON values.

    `kind` is "sae", "transcoder" or "crosscoder" where it is known. `metadata` is what the file says beyond
    the weights, kept as it was. `assumptions` says in sentences what the file left open, and what was folded.
    """
    empty = {"kind": None, "model_name": None, "hook_name": None, "hook_name_out": None, "metadata": {}, "assumptions": []}
    return {"format": format, "library": library, "version": version} | empty | known


def kind_of(dictionary: SparseDictionary) -> str:
    """What the weights serve as: as their provenance says, or else by their widths."""
    return dictionary.provenance.get("kind") or ("sae" if dictionary.d_in == dictionary.d_out else "transcoder")
