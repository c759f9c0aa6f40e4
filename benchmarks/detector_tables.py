"""The tables of benchmarks/detectors.py: figures pooled over dictionaries, with intervals, by regime and kind of benches."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import average_precision_score

from sdl_explorer.diagnosis.proportions import wilson
from sdl_explorer.diagnosis.scores import KINDS, DetectorScore
from sdl_explorer.experiments.outcome import markdown_table

OUT, RUNS = Path("benchmarks/results/detectors"), Path("runs/detectors")
TABLE = Path("sdl_explorer/assets/detector_scores.csv")
QUOTED = ("polysemantic", "duplicate", "dead", "absorption")  # by the findings
REGIMES = ((0.0, 0.1), (0.1, 0.2), (0.2, 1.0))  # of mean coherence
SPARSITIES = ((0.0, 2.0), (2.0, 5.0), (5.0, np.inf))  # of L0
FIGURES = ("precision", "recall", "average_precision")
DRAWS = 1_000  # of the bootstrap


class Units(NamedTuple):
    """What was judged, latents as a rule: the detector's score, whether it names the unit at its own threshold, and the hidden truth."""

    score: np.ndarray
    claimed: np.ndarray
    truth: np.ndarray

    def of(self, some: np.ndarray) -> "Units":
        return Units(*(part[some] for part in self))


def scores(units: Units) -> dict[str, float]:
    """Zeros where there is nothing to divide by."""
    truth, claimed = units.truth.astype(bool), units.claimed.astype(bool)
    hits = int((truth & claimed).sum())
    return {
        "n": len(truth),
        "positives": int(truth.sum()),
        "claimed": int(claimed.sum()),
        "precision": hits / max(int(claimed.sum()), 1),
        "recall": hits / max(int(truth.sum()), 1),
        "average_precision": float(average_precision_score(truth, units.score)) if truth.any() else 0.0,
        "chance": float(truth.mean()) if len(truth) else 0.0,
    }


def pooled(runs: pd.DataFrame) -> dict[str, float]:
    """All units of these runs together, and 95 % intervals: dictionaries, not units, are drawn anew."""
    kept = [np.load(RUNS / row.cell / f"{row.detector}.npz") for row in runs.itertuples()]
    units = Units(*(np.concatenate([units[name] for units in kept]) for name in Units._fields))
    return scores(units) | intervals(units, np.repeat(np.arange(len(kept)), [len(units["truth"]) for units in kept]))


def intervals(units: Units, which: np.ndarray) -> dict[str, float]:
    """2.5 and 97.5 % quantiles over draws of as many dictionaries, `which` of them each unit is of; of a proportion no narrower than
    Wilson's. 0 and 1 where nothing can be said."""
    n = int(which.max()) + 1
    times = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(float)
    per = lambda mask: times @ np.bincount(which, weights=mask, minlength=n)
    truth, claimed = units.truth.astype(bool), units.claimed.astype(bool)
    hits = per(truth & claimed)
    order = np.argsort(-units.score, kind="stable")
    last = np.flatnonzero(np.append(np.diff(units.score[order]) != 0, True))  # of units that tie
    curves = [_areas(draws[:, which[order]], truth[order], last) for draws in np.array_split(times, 1 + DRAWS * len(order) // 2**22)]
    ends = {"average_precision": _quantiles(np.concatenate(curves), (0.0, 1.0))}
    for name, of in (("precision", claimed), ("recall", truth)):  # where all are right, or none, draws do not differ
        least = wilson(int((truth & claimed).sum()), int(of.sum()))
        low, high = _quantiles(_ratios(hits, per(of)), least)
        ends[name] = min(low, least.low), max(high, least.high)
    return {f"{name}_{side}": float(end) for name, both in ends.items() for side, end in zip(("low", "high"), both, strict=True)}


def _quantiles(draws: np.ndarray, otherwise: tuple[float, float]) -> tuple[float, float]:
    low, high = np.quantile(draws, [0.025, 0.975]) if len(draws) else otherwise
    return low, high


def _areas(weights: np.ndarray, truth: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Average precision for each row of weights, of units in the order of their scores; those without positives are left out."""
    hits, seen = (np.cumsum(part, axis=1)[:, last] for part in (weights * truth, weights))
    some = hits[:, -1] > 0
    hits, seen = hits[some], seen[some]
    precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
    return (precision * np.diff(hits, axis=1, prepend=0)).sum(axis=1) / hits[:, -1]


def _ratios(hits: np.ndarray, of: np.ndarray) -> np.ndarray:
    return hits[of > 0] / of[of > 0]


def kinds(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {"all": runs} | {kind: runs[runs["bench"].str.startswith(kind)] for kind in KINDS}


def by_regime(runs: pd.DataFrame, bins: tuple, column: str) -> pd.DataFrame:
    found = []
    for name in runs["detector"].unique():
        for benches, part in kinds(runs).items():
            for low, high in bins:
                some = part[(part["detector"] == name) & (part[column] >= low) & (part[column] < high)]
                if len(some):
                    found.append({"detector": name, "benches": benches, "low": low, "high": high, "runs": len(some), **pooled(some)})
    return pd.DataFrame(found)


def shown(table: pd.DataFrame) -> str:
    """Figures with their intervals in one column."""
    text = table.map(lambda value: f"{value:.3g}" if isinstance(value, float) else value)
    for name in FIGURES:
        text[name] = [f"{row[name]} ({row[f'{name}_low']} to {row[f'{name}_high']})" for _, row in text.iterrows()]
    text.loc[table["claimed"] == 0, ["precision", "recall"]] = ""
    text.loc[table["positives"] == 0, ["recall", "average_precision"]] = ""
    return markdown_table(text.drop(columns=[name for name in text if str(name).endswith(("_low", "_high"))]))


def report(runs: pd.DataFrame, told: Mapping[str, Callable], setting: str) -> None:
    """`told`: each detector, for its docstring, in the order of the tables; `setting`: what was run."""
    runs = pd.concat([runs[runs["detector"] == name] for name in told])
    coherence, l0 = by_regime(runs, REGIMES, "coherence"), by_regime(runs, SPARSITIES, "L0")
    regimes = pd.concat([coherence.assign(regime="mean coherence"), l0.assign(regime="L0")])
    regimes.to_csv(OUT / "regimes.csv", index=False, float_format="%.4g")
    own = [field.name for field in fields(DetectorScore) if field.name != "parts"]
    coherence[coherence["detector"].isin(QUOTED)][own].to_csv(TABLE, index=False, float_format="%.4g")
    low, seeds = runs[runs["coherence"] < REGIMES[1][1]], sorted(runs["seed"].unique().tolist())
    groups = [({"detector": name, "benches": kind}, part[part["detector"] == name]) for name in told for kind, part in kinds(low).items()]
    aims = pd.DataFrame([labels | pooled(some) for labels, some in groups if len(some)])
    short = (0.9 - aims["average_precision"]).clip(lower=0)
    apart = [
        {"detector": name, "seed": seed, **pooled(low[(low["detector"] == name) & (low["seed"] == seed)])}
        for name in told
        for seed in seeds
    ]
    machine = f"on one CPU core ({platform.machine()}, torch {torch.__version__})"
    text = [
        "# Detectors without truth, against hidden truth",
        f"`python benchmarks/detectors.py`: {runs['cell'].nunique()} dictionaries, seeds {seeds}, {setting}, {machine}.",
        WORDS,
        "\n".join(f"- **{name}**: {' '.join((judge.__doc__ or '').split())}" for name, judge in told.items()),
        "## Aim: average precision of 0.9 at mean coherence below 0.2",
        shown(aims.assign(**{"short of 0.9": short})[aims["positives"] > 0]),
        "## The same, seeds apart",
        shown(pd.DataFrame(apart)),
        "## By mean coherence",
        shown(coherence),
        "## By L0",
        shown(l0[l0["benches"] == "all"]),
    ]
    (OUT / "README.md").write_text("\n\n".join(text) + "\n")


WORDS = """Precision and recall are those of a detector's own threshold, average precision that of its score; chance is the share of true
cases, the average precision of a coin. Units of all dictionaries in a regime are pooled; the intervals (95 %) are those of
drawing dictionaries, not units, anew, and no narrower than those of as many independent units (Wilson). Thresholds were chosen
on bench seeds other than 0, and absorption's on trees of seeds 0 to 3 (candidates.py), which are not all other seeds than
these. The tail that dead latents are scored by (the 32 largest margins), what counts as dead and what counts as a duplicate
were chosen on seed 0, before the other seeds were judged: they stand apart below.

**Dead** once meant *silent on 100,000 fresh rows*. Near a rate of 1 / 100,000 that is a coin, so that even a score that knows
the rate does not reach 1 (*silent later, by the rate on 1,000,000 rows*). Now it is what the tool itself means by it, a rate
below 3 / 100,000, measured on 1,000,000 further rows; the lines *silent later* keep the old meaning. The first score divided
each silence by the longest of its dictionary, which put dictionaries that cannot be compared on one scale.

**Duplicate** once meant that two latents write one feature. Two copies of a mixture, as of a parent and the child that absorbed
it, then counted as wrong; now they write the same two features. *Duplicate, of one feature* keeps the old meaning."""
