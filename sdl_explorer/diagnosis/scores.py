"""What a detector that sees no truth is worth: its precision on benches where the truth is known, in the regime at hand."""

import csv
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.cosines import CELLS, unit

TABLE = "assets/detector_scores.csv"  # written by benchmarks/detectors.py
CONFIDENT = 0.5  # precision below which nothing is claimed
MOST_ROWS = 4096
KINDS = ("linear", "hierarchy")  # of benches, by whether they have one
WORDS = {"all": "", "linear": " without a hierarchy", "hierarchy": " with a hierarchy"}
ENOUGH = 20  # claims, and true cases, behind a precision that is worth showing


@dataclass(frozen=True)
class DetectorScore:
    """One detector on every trained dictionary of some benches whose mean coherence is in [low, high).

    n, positives, claimed   units judged (latents, or pairs); those where the truth says yes; those that the detector named
    precision, recall       of what it named, at its own threshold; 0 where there is nothing to divide by
    average_precision       of its score over all thresholds;  chance = positives / n, the average precision of a coin
    precision_low, precision_high     95 % interval of the precision (bootstrap over dictionaries); 0 and 1 where it is not known
    benches                 "all", those that are "linear" (independent features), or those with a "hierarchy"
    parts                   of "all": the same for each kind of benches
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
    precision_low: float = 0.0
    precision_high: float = 1.0
    benches: str = "all"
    parts: tuple["DetectorScore", ...] = ()

    @property
    def measured(self) -> bool:
        """Whether enough was seen to speak of a precision."""
        return min(self.positives, self.claimed) >= ENOUGH

    @property
    def confident(self) -> bool:
        """Whether a finding may claim: precision of at least one half where it was measured, and on each kind of benches."""
        return self.measured and self.precision >= CONFIDENT and all(part.confident for part in self.parts if part.measured)

    def __str__(self) -> str:
        if not self.measured:
            return self.brief
        kinds = "".join(f"; {part._precision}{WORDS[part.benches]}" for part in self.parts if part.measured)
        return f"precision {self._precision}, recall {self.recall:.2f} on {self._where} (chance {self.chance:.2f}){kinds}"

    @property
    def brief(self) -> str:
        """The precision alone, for a title."""
        if self.measured:
            return f"precision {self._precision} on {self._where}"
        if self.claimed and not self.positives:
            return f"all {self.claimed} claims were wrong on {self._where}, which have no case"
        return f"precision not known: too few cases on {self._where}"

    @property
    def _where(self) -> str:
        regime = f"mean coherence {self.low:g} to {self.high:g}" if self.low > 0 else f"mean coherence below {self.high:g}"
        return f"benches{WORDS[self.benches]} at {regime}"

    @property
    def _precision(self) -> str:
        known = (self.precision_low, self.precision_high) != (0, 1)
        return f"{self.precision:.2f}" + (f" ({self.precision_low:.2f} to {self.precision_high:.2f})" if known else "")


def detector_scores(name: str, coherence: float, hierarchy: bool | None = None) -> DetectorScore:
    """The score of a detector in the regime of a mean coherence, as `benchmarks/detectors.py` measured it.

    `coherence` is the mean |cos| over pairs of live decoder rows (`mean_coherence`). `hierarchy`: whether features imply each other;
    None, as in most data, is not known: the score on all benches, with the kinds as its parts. Raises ValueError for a name without
    scores.
    """
    table = _table()
    if name not in table:
        raise ValueError(f"detector_scores: {name!r} has no scores; there are {', '.join(table)}.")
    regimes = {kind: _regime(own, coherence) for kind in WORDS if (own := [score for score in table[name] if score.benches == kind])}
    if hierarchy is not None and KINDS[hierarchy] in regimes:
        return regimes[KINDS[hierarchy]]
    return replace(regimes["all"], parts=tuple(regimes[kind] for kind in KINDS if kind in regimes))


def _regime(scores: list[DetectorScore], coherence: float) -> DetectorScore:
    return next((score for score in scores if score.low <= coherence < score.high), scores[-1])


def known_hierarchy(activations: Activations) -> bool | None:
    """Whether features of these rows imply each other; None where that is not known. It decides which benches are like them, and is never
    read by a detector."""
    truth = activations.truth
    return any(parent is not None for parent in truth.parents) if truth is not None and truth.complete else None


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
        score = DetectorScore(**{name: kind(line[name]) for name, kind in DetectorScore.__annotations__.items() if name in line})
        table[score.detector] = (*table.get(score.detector, ()), score)
    return table
