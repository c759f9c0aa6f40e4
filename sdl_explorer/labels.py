"""Labels: what a person says of a latent, or of a pair of them. A file beside the run, of which lines are only ever added."""

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

FORMAT_VERSION = 1
CONFIRMED, REJECTED = "confirmed", "rejected"


@dataclass(frozen=True)
class Label:
    """What was said of something.

    about       the latent, or the parent and the child of an edge
    says        a word, "confirmed" or "rejected" of a candidate; empty takes the former label back
    step, commit    of the model that was looked at: what was said of it may be wrong of a later one
    """

    about: tuple[int, ...]
    says: str
    note: str = ""
    step: int = 0
    commit: str = ""


Labels = tuple[Label, ...]  # in a view's `of`: the labels of the run


class LabelStore(Mapping[tuple[int, ...], Label]):
    """The labels in force by what they are about, in the order in which they were given; `history` has all that was ever said, and
    `in_force` what still holds.

    In memory, or in a file of JSON lines. A line is there whole or not at all: what a kill leaves in the middle of a write is not read, and
    is cut off before the next one. Another process that reads the file sees new lines. Raises ValueError for a line that is damaged.
    """

    def __init__(self, path: Path | None = None, history: Labels = ()):
        self.path = path
        self._history: list[Label] = []
        self._in_force: dict[tuple[int, ...], Label] = {}
        self._end = 0  # bytes of the file that are read
        self._lock = threading.RLock()
        self._take(history)
        self._read()

    def add(self, label: Label) -> Label:
        """Durable when it returns, where there is a file."""
        with self._lock:
            self._read()
            if self.path is not None:
                self._write(self.path, (label,))
            self._take((label,))
            return label

    def save(self, path: Path) -> None:
        """From now on in this file, with all that is here."""
        with self._lock:
            self._read()
            self.path, self._end = path, 0
            if self._history:
                self._write(path, self._history)

    def copy(self) -> "LabelStore":
        """The same labels, in memory."""
        return LabelStore(history=self.history)

    @property
    def history(self) -> Labels:
        with self._lock:
            self._read()
            return tuple(self._history)

    @property
    def in_force(self) -> Labels:
        with self._lock:
            self._read()
            return tuple(self._in_force.values())

    def __getitem__(self, about: tuple[int, ...]) -> Label:
        with self._lock:
            self._read()
            return self._in_force[about]

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter([label.about for label in self.in_force])

    def __len__(self) -> int:
        return len(self.in_force)

    def __repr__(self) -> str:
        return f"LabelStore({len(self)} labels{'' if self.path is None else f' in {self.path}'})"

    def _take(self, labels: Iterable[Label]) -> None:
        for label in labels:
            self._history.append(label)
            self._in_force.pop(label.about, None)
            if label.says:
                self._in_force[label.about] = label

    def _write(self, path: Path, labels: Iterable[Label]) -> None:
        lines = "".join(json.dumps({"format_version": FORMAT_VERSION, **vars(label)}, ensure_ascii=False) + "\n" for label in labels)
        with open(path, "ab") as file:
            file.truncate(self._end)
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
            self._end = file.tell()

    def _read(self) -> None:
        """Take in the whole lines that the file has beyond what was read."""
        if self.path is None or not self.path.exists() or self.path.stat().st_size == self._end:
            return
        with open(self.path, "rb") as file:
            file.seek(self._end)
            fresh = file.read()
        fresh = fresh[: fresh.rfind(b"\n") + 1]
        known = len(self._history)
        self._take([_parsed(line, f"{self.path}, line {known + n}") for n, line in enumerate(fresh.splitlines(), 1)])
        self._end += len(fresh)


def _parsed(line: bytes, place: str) -> Label:
    try:
        record = json.loads(line)
        version = record.pop("format_version")
        if version > FORMAT_VERSION:
            raise ValueError(f"{place}: format_version is {version}, this sdl_explorer reads up to {FORMAT_VERSION}; upgrade it.")
        about, says = record["about"], record["says"]
        if not isinstance(says, str) or not isinstance(about, list) or not all(isinstance(latent, int) for latent in about):
            raise TypeError("about holds latents, and says a word")
        return Label(**record | {"about": tuple(about)})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if "upgrade it" in str(error):
            raise
        raise ValueError(f"{place}: {line[:60]!r} is no label ({error}); mend the line or remove it.") from error
