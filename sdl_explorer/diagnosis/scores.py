"""What a detector that sees no truth is worth: its precision on benches where the truth is known, in the regime at hand."""

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from sdl_explorer.diagnosis.cosines import CELLS, unit

TABLE = "assets/detector_scores.csv"  # written by benchmarks/detectors.py
CONFIDENT = 0.5  # precision below which nothing is claimed
MOST_ROWS = 4096
ENOUGH = 20  # claims, and true cases, behind a precision that is worth showing


@dataclass(frozen=True)
class DetectorScore:
    """One detector on every trained dictionary of the benches whose mean coherence is in [low, high).

    n, positives, claimed   units judged (latents, or pairs); those where the truth says yes; those that the detector named
    precision, recall       of what it named, at its own threshold; 0 where there is nothing to divide by
    average_precision       of its score over all thresholds;  chance = positives / n, the average precision of a coin
    """

    detector: str
    low: float
    high: float
    n: int
    positives: int
    claimed: int
    precision: float
    recall: float
    average_precision: float
    chance: float

    @property
    def measured(self) -> bool:
        """Whether enough was seen to speak of a precision."""
        return min(self.positives, self.claimed) >= ENOUGH

    @property
    def confident(self) -> bool:
        """Whether a finding may claim: precision of at least one half where it was measured."""
        return self.measured and self.precision >= CONFIDENT

    def __str__(self) -> str:
        regime = f"mean coherence {self.low:g} to {self.high:g}" if self.low > 0 else f"mean coherence below {self.high:g}"
        if not self.measured:
            return f"precision not known: too few cases on benches at {regime}"
        return f"precision {self.precision:.2f}, recall {self.recall:.2f} on benches at {regime} (chance {self.chance:.2f})"


def detector_scores(name: str, coherence: float) -> DetectorScore:
    """The score of a detector in the regime of a mean coherence, as `benchmarks/detectors.py` measured it.

    `coherence` is the mean |cos| over pairs of live decoder rows (`mean_coherence`). Raises ValueError for a name without scores.
    """
    table = _table()
    if name not in table:
        raise ValueError(f"detector_scores: {name!r} has no scores; there are {', '.join(table)}.")
    regimes = table[name]
    return next((score for score in regimes if score.low <= coherence < score.high), regimes[-1])


def mean_coherence(rows: Tensor) -> float:
    """mean |cos| over pairs of different rows, 0 where there are fewer than two; of more than MOST_ROWS, over pairs of that many, drawn at
    random. Independent random rows of width d have sqrt(2 / (pi d)).
    """
    if len(rows) > MOST_ROWS:
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:MOST_ROWS].to(rows.device)]
    n, rows = len(rows), unit(rows.detach())
    if n < 2:
        return 0.0
    total = sum(float((block @ rows.T).abs_().sum(dtype=torch.float64)) for block in rows.split(max(1, CELLS // n)))
    own = float(rows.square().sum(dtype=torch.float64))
    return max(0.0, total - own) / (n * (n - 1))


@cache
def _table() -> dict[str, tuple[DetectorScore, ...]]:
    lines = csv.DictReader((files("sdl_explorer") / TABLE).read_text().splitlines())
    table: dict[str, tuple[DetectorScore, ...]] = {}
    for line in lines:
        kinds = DetectorScore.__annotations__
        score = DetectorScore(**{name: kind(line[name]) for name, kind in kinds.items()})
        table[score.detector] = (*table.get(score.detector, ()), score)
    return table
