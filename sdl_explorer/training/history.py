"""What a run has recorded: a ring of at most 2,000 points, decimated by min and max."""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from sdl_explorer.training.state import Step

LIMIT = 2_000


@dataclass(frozen=True)
class History:
    """Curves of a run as numpy; `dead` counts latents, `losses["total"]` is the sum of the terms."""

    steps: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    losses: dict[str, np.ndarray] = field(default_factory=dict)
    l0: np.ndarray = field(default_factory=lambda: np.zeros(0))
    dead: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __len__(self) -> int:
        return len(self.steps)


class Recorder:
    """Takes `Step`s without waiting for the device; `flush` converts them, a few times a second."""

    def __init__(self, points: list[dict[str, float | int]] | None = None):
        self._points = list(points or [])
        self._pending: list[Step] = []

    def add(self, step: Step) -> None:
        self._pending.append(step)

    def flush(self) -> int | None:
        """Convert what is pending; the index of the first step whose loss is not finite, or None."""
        diverged = None
        for step in self._pending:
            losses = {name: _number(value) for name, value in step.losses.items()}
            total = sum(losses.values())
            if diverged is None and not np.isfinite(total):
                diverged = step.index
            self._points.append({"step": step.index, "l0": _number(step.l0), "dead": _number(step.dead), "total": total, **losses})
        self._pending.clear()
        while len(self._points) > LIMIT:
            self._points = _decimated(self._points)
        return diverged

    @property
    def points(self) -> list[dict[str, float | int]]:
        return self._points

    def history(self) -> History:
        points = list(self._points)  # the lane may add to it meanwhile
        names = dict.fromkeys(name for p in points for name in p if name not in ("step", "l0", "dead"))
        column = lambda name: np.array([p.get(name, np.nan) for p in points], dtype=np.float64)
        return History(column("step").astype(np.int64), {n: column(n) for n in names}, column("l0"), column("dead"))

    def truncated(self, step: int) -> "Recorder":
        """The record of the steps before `step`."""
        self.flush()
        return Recorder([p for p in self._points if p["step"] < step])


def _decimated(points: list[dict[str, float | int]]) -> list[dict[str, float | int]]:
    """Of every four neighbours keep the lowest and the highest total loss, in order."""
    kept = []
    for start in range(0, len(points), 4):
        group = range(start, min(start + 4, len(points)))
        total = np.nan_to_num([points[i]["total"] for i in group], nan=np.inf)
        low, high = start + int(np.argmin(total)), start + int(np.argmax(total))
        kept += [points[i] for i in sorted({low, high})]
    return kept


def _number(value: Tensor) -> float:
    return float(value.item())
