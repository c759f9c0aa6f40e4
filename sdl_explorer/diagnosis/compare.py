"""Did the intervention help? A scoreboard, and paired control runs beside it."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Anchors, Pins
from sdl_explorer.diagnosis.alignment import TAU, Alignment, align
from sdl_explorer.diagnosis.health import Health, check_health
from sdl_explorer.diagnosis.observe import observe
from sdl_explorer.models.dictionary import SparseDictionary

ENOUGH = 5  # pairs
NOT_WORSE = 0.002  # of unexplained variance
MATCHED_L0 = 0.05  # relative


class Measure(NamedTuple):
    """How a number of the scoreboard is shown and read: `better` is +1 (higher), -1 (lower) or 0 (neither)."""

    label: str
    better: int
    form: str = ".3f"

    def show(self, value: float) -> str:
        return format(value, self.form)


MEASURES: dict[str, Measure] = {
    "mse": Measure("Error (mean squared)", -1, ".4g"),
    "unexplained_variance": Measure("Unexplained variance", -1),
    "l0": Measure("L0", 0, ".2f"),
    "dead": Measure("Dead", -1, ".1%"),
    "recovery_decoder": Measure("Recovered, decoder (held out)", +1, ".1%"),
    "recovery_encoder": Measure("Recovered, encoder (held out)", +1, ".1%"),
    "recovery_response": Measure("Recovered, response (held out)", +1, ".1%"),
    "mean_best_decoder": Measure("Mean best cosine, decoder (held out)", +1),
    "recovery_all": Measure("Recovered, decoder (anchors included)", +1, ".1%"),
}
BETTER: dict[str, int] = {name: measure.better for name, measure in MEASURES.items()}


def scoreboard(health: Health, alignment: Alignment | None = None) -> dict[str, float]:
    """The numbers of MEASURES from findings that exist already; recovery only where there was something to compare with."""
    numbers = {
        "mse": health.mse,
        "unexplained_variance": health.unexplained_variance,
        "l0": health.l0,
        "dead": health.n_dead / health.n_latents,
    }
    if alignment is None:
        return numbers
    return numbers | {
        "recovery_decoder": alignment.recovery(TAU, "decoder", "heldout_strict"),
        "recovery_encoder": alignment.recovery(TAU, "encoder", "heldout_strict"),
        "recovery_response": alignment.recovery(TAU, "response", "heldout_strict"),
        "mean_best_decoder": alignment.mean_best("decoder", "heldout_strict"),
        "recovery_all": alignment.recovery(TAU, "decoder", "all"),
    }


def score(
    dictionary: SparseDictionary,
    activations: Activations,
    samples_since_fired=None,
    dead_after: int | None = None,
    pins: Pins | None = None,
    anchors: Anchors | None = None,
) -> dict[str, float]:
    """The scoreboard of a dictionary in one pass over the rows, without the one-to-one matching.

    mse (squared units of the targets), unexplained_variance, l0, dead (share of the latents); with truth or anchors
    also recovery at tau = 0.95 (`heldout_strict`, per side), the mean best decoder cosine, and recovery over all
    features. Keys and labels: `MEASURES`. Arguments and errors as in `check_health` and `align`.
    """
    requests: list = [(check_health, {"samples_since_fired": samples_since_fired, "dead_after": dead_after})]
    if activations.truth is not None or anchors is not None:
        requests.append((align, {"anchors": anchors, "pins": pins, "match": False}))
    return scoreboard(*observe(dictionary, activations, requests))


class Paired(NamedTuple):
    """Mean of paired differences with its interval, 95 % unless told; endless for fewer than two pairs."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def sign(self) -> int:
        """+1 or -1 where the interval leaves out zero, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    def __neg__(self) -> "Paired":
        return Paired(-self.mean, -self.high, -self.low, self.n)


def paired(treated: np.ndarray, other: np.ndarray, level: float = 0.05, *, redrawn: bool = False, least: float = 0.0) -> Paired:
    """Treated less the other, pair by pair, at 1 - level (Student 1908).

        mean(d) +- t(1 - level / 2, n - 1) max(sd(d), least) sqrt(1 / n)        d = treated - other
        mean(d) +- t(1 - level / 2, n - 1) max(sd(d), least) sqrt(1 + 1 / n)    with `redrawn`

    `redrawn`: chance draws the other arm anew in every pair, while the treatment is one draw that all pairs share. Whether it is better
    than what chance would have given is a question of one more draw; the first interval would call every lucky draw an improvement.
    """
    differences = np.asarray(treated, dtype=float) - np.asarray(other, dtype=float)
    n, mean = len(differences), float(np.mean(differences))
    if n < 2:
        return Paired(mean, -np.inf, np.inf, n)
    half = float(stats.t.ppf(1 - level / 2, n - 1) * np.maximum(differences.std(ddof=1), least) * np.sqrt(redrawn + 1 / n))
    return Paired(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class Control:
    """Pairs of runs from the commit before an intervention; run r of each arm shares seed and data order.

    treated      with the intervention
    untreated    without it, trained equally long
    sham         the same rows reset in random directions, new ones in each pair; empty where the intervention has no sham
    before       the scoreboard at the commit before
    primary      the number that the repair names

    Each arm holds, per name of MEASURES, an array (runs,).
    """

    intervention: str
    n_steps: int
    before: dict[str, float]
    treated: dict[str, np.ndarray]
    untreated: dict[str, np.ndarray]
    sham: dict[str, np.ndarray] = field(default_factory=dict)
    primary: str = "unexplained_variance"

    def __post_init__(self):
        arms = {"treated": self.treated, "untreated": self.untreated} | ({"sham": self.sham} if self.sham else {})
        if self.primary not in self.treated:
            raise ValueError(f"Control: primary is {self.primary!r}, which was not measured; it is one of {', '.join(self.treated)}.")
        for name, arm in arms.items():
            counts = {metric: len(np.atleast_1d(arm[metric])) if metric in arm else 0 for metric in self.treated}
            if set(counts.values()) != {self.n} or self.n == 0:
                raise ValueError(f"Control: the {name} arm has runs {counts}; each arm needs {self.n or 'at least one'} of every number.")

    @property
    def n(self) -> int:
        """Pairs."""
        return len(np.atleast_1d(self.treated[self.primary]))

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self.treated)

    def difference(self, metric: str, against: str = "untreated", level: float = 0.05, least: float = 0.0) -> Paired:
        """Treated minus the other arm, as in `paired`; the sham has new directions in every pair (`redrawn`)."""
        if against not in ("untreated", "sham"):
            raise ValueError(f"difference: against is {against!r}; it is untreated or sham.")
        other = self.untreated if against == "untreated" else self.sham
        if metric not in other:
            raise ValueError(f"difference: {metric!r} was not measured in the {against} arm; it holds {', '.join(other) or 'nothing'}.")
        return paired(self.treated[metric], other[metric], level, redrawn=against == "sham", least=least)

    def verdict(self, metric: str | None = None) -> str:
        """One number (None: the primary) in words: improved or worse against both arms, or indistinguishable from one."""
        metric = metric or self.primary
        if self.n < ENOUGH:
            return f"n = {self.n}: at least {ENOUGH} seeds are needed to read this."
        trained = self.difference(metric)
        if np.isnan(trained.mean):
            return "not defined here"
        if trained.sign == 0:
            return f"not distinguishable from {self.n_steps} more steps"
        if self.sham:
            reset = self.difference(metric, "sham")
            if reset.sign == 0:
                return "not distinguishable from resetting the same latents at random"
            if reset.sign != trained.sign:
                return f"{_word(metric, trained.sign)}, but {_word(metric, reset.sign)} than resetting the same latents at random"
        return _word(metric, trained.sign)

    def better(self) -> bool:
        """Did the repair help: the primary improved over at least five pairs, against both arms.

        Without recovery on the scoreboard it has to be `harmless` as well.
        """
        return self.verdict() == "improved" and ("recovery_decoder" in self.treated or self.harmless())

    def harmless(self) -> bool:
        """Unexplained variance not worse by more than 0.002 (upper end of the interval) at an L0 at most 5 % higher."""
        l0, untreated = np.mean(self.treated["l0"]), np.mean(self.untreated["l0"])
        return bool(self.difference("unexplained_variance").high <= NOT_WORSE and l0 <= (1 + MATCHED_L0) * untreated)

    def table(self) -> pd.DataFrame:
        """One row per number: label, before, mean of each arm, both differences with intervals, verdict."""
        return pd.DataFrame([self._row(metric) for metric in self.metrics]).set_index("metric")

    def _row(self, metric: str) -> dict:
        row = {"metric": metric, "label": MEASURES[metric].label if metric in MEASURES else metric}
        row |= {"before": self.before.get(metric, np.nan), "treated": float(np.mean(self.treated[metric]))}
        for against in ("untreated", "sham") if self.sham else ("untreated",):
            arm, gap = getattr(self, against), self.difference(metric, against)
            row |= {
                against: float(np.mean(arm[metric])),
                f"vs {against}": gap.mean,
                f"vs {against} low": gap.low,
                f"vs {against} high": gap.high,
            }
        return row | {"primary": metric == self.primary, "verdict": self.verdict(metric)}


@dataclass(frozen=True)
class Change:
    """Each feature's best cosine before and after, the largest gain first; arrays (n_features,)."""

    side: str
    feature: np.ndarray
    names: tuple[str, ...]
    before: np.ndarray
    after: np.ndarray

    @property
    def change(self) -> np.ndarray:
        return self.after - self.before


def change_per_feature(before: Alignment, after: Alignment, side: str = "decoder") -> Change:
    """What the dumbbell plot shows: signed best cosine of every feature, before and after, sorted by change."""
    if before.names != after.names:
        raise ValueError(
            f"change_per_feature: {before.n_features} and {after.n_features} features are not the same ones; "
            "align both dictionaries with the same truth or anchors."
        )
    old, new = before.scores(side, "all"), after.scores(side, "all")
    order = np.argsort(old - new, kind="stable")
    return Change(side, order, tuple(before.names[i] for i in order), old[order], new[order])


def _word(metric: str, sign: int) -> str:
    better = BETTER.get(metric, 0)
    if better == 0:
        return "higher" if sign > 0 else "lower"
    return "improved" if sign == better else "worse"
