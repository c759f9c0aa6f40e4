"""Detectors that see no truth, scored against the truth that benches hide.

    python benchmarks/detectors.py              some ten minutes of one core; goes on where it was interrupted
    python benchmarks/detectors.py --report     the tables, from the dictionaries that are judged so far
    python benchmarks/detectors.py --anew       detectors have changed: judges the trained dictionaries again
                                                (--anew absorption: with that detector alone)

Trains small dictionaries on LinearBench and HierarchyBench over a grid of sparsity, interference (n_features / d_in), width and method.
Each detector reads 10,000 judge rows without truth; the truth comes from 100,000 fresh rows. A new detector is one entry of DETECTORS.

Writes runs.csv (each dictionary and detector), regimes.csv and README.md to benchmarks/results/detectors, and the table that findings
quote to sdl_explorer/assets/detector_scores.csv.
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import average_precision_score

from sdl_explorer import BatchTopK, HierarchyBench, JumpReLU, LinearBench, Matryoshka, ReLU, Session, SparseDictionary, TopK
from sdl_explorer.data.activations import Activations
from sdl_explorer.data.sources import Source, stream
from sdl_explorer.diagnosis.absorption import find_absorption
from sdl_explorer.diagnosis.candidates import score_candidates, suspect_absorption
from sdl_explorer.diagnosis.meanings import suspect_polysemantic
from sdl_explorer.diagnosis.patterns import trace_patterns
from sdl_explorer.diagnosis.recovery import score_recovery
from sdl_explorer.diagnosis.redundancy import find_redundant
from sdl_explorer.diagnosis.scores import DetectorScore
from sdl_explorer.experiments.cells import Cell, run_cell
from sdl_explorer.experiments.outcome import markdown_table

OUT, RUNS = Path("benchmarks/results/detectors"), Path("runs/detectors")
TABLE = Path("sdl_explorer/assets/detector_scores.csv")
REGIMES = ((0.0, 0.1), (0.1, 0.2), (0.2, 1.0))  # of mean coherence
SPARSITIES = ((0.0, 2.0), (2.0, 5.0), (5.0, np.inf))  # of L0
JUDGE_ROWS, TRUTH_ROWS = 10_000, 100_000
SAME = 0.9  # cosine from which a decoder row writes a feature
STEPS = 1_500


class Truths:
    """What findings with truth say of fresh rows, each when it is asked for."""

    def __init__(self, dictionary: SparseDictionary, rows: Activations):
        self.dictionary, self.rows = dictionary, rows

    patterns = cached_property(lambda self: trace_patterns(self.dictionary, self.rows))
    recovery = cached_property(lambda self: score_recovery(self.dictionary, self.rows, match=False))
    absorption = cached_property(lambda self: find_absorption(self.dictionary, self.rows))


class Units(NamedTuple):
    """What was judged, latents as a rule: the detector's score, whether it names the unit at its own threshold, and the hidden truth."""

    score: np.ndarray
    claimed: np.ndarray
    truth: np.ndarray

    def of(self, some: np.ndarray) -> "Units":
        return Units(*(part[some] for part in self))


# detectors: (session, truths) -> units ------------------------------------------------------------------------------


def polysemantic(session: Session, truth: Truths) -> Units:
    """Latents that fire on ten rows or more; true: 1.5 effective features or more (`trace_patterns`)."""
    found = session.find(suspect_polysemantic, n=JUDGE_ROWS)
    return Units(found.score, found.candidate, truth.patterns.status == "poly").of(found.judged)


def writes_otherwise(session: Session, truth: Truths) -> Units:
    """The same latents and truth; score: 1 - cos(W_enc, W_dec)."""
    return rescored(session, truth, 1 - session.find(suspect_polysemantic, n=JUDGE_ROWS).encoder_decoder)


def fires_otherwise(session: Session, truth: Truths) -> Units:
    """The same latents and truth; score: 1 - cos(W_dec, response)."""
    return rescored(session, truth, 1 - session.find(suspect_polysemantic, n=JUDGE_ROWS).decoder_response)


def rescored(session: Session, truth: Truths, score: np.ndarray) -> Units:
    judged = session.find(suspect_polysemantic, n=JUDGE_ROWS).judged
    return polysemantic(session, truth)._replace(score=score[judged], claimed=np.zeros(judged.sum(), dtype=bool))


def duplicate(session: Session, truth: Truths) -> Units:
    """Live latents; true: another live latent writes the same feature, both at a cosine of 0.9."""
    found, recovery = session.find(find_redundant, n=JUDGE_ROWS), truth.recovery
    feature = np.where(found.live & (recovery.cosine >= SAME), recovery.feature, -1)
    writers = np.bincount(feature + 1, minlength=len(recovery.names) + 1)
    return Units(found.twin_cosine, found.duplicate, (feature >= 0) & (writers[feature + 1] > 1)).of(found.live)


def dead(session: Session, truth: Truths) -> Units:
    """All latents; true: silent on all fresh rows; score: samples since it fired, as training and the judge rows counted them."""
    found = session.find(find_redundant, n=JUDGE_ROWS)
    since = np.where(found.live, 0, found.samples_since_fired)
    return Units(since / (1 + since.max()), found.dead & ~found.live, truth.recovery.silent)


def silent(session: Session, truth: Truths) -> Units:
    """All latents, the same truth; named: silent on 100,000 judge rows; score: less the rate on them."""
    rate = session.find(find_redundant, n=TRUTH_ROWS).firing_rate
    return Units(-rate, rate == 0, truth.recovery.silent)


def absorption(session: Session, truth: Truths) -> Units:
    """Pairs of latents with decoder cosines of 0.2 to 0.9; true: see `score_candidates`, on the fresh rows. Candidates are no claims
    where `suspect_absorption` itself says that latents crowd each other (`reliable`)."""
    found = session.find(suspect_absorption, n=JUDGE_ROWS)
    score, truth = score_candidates(found, truth.absorption)
    named = {(c.parent, c.child) for c in found.candidates} if found.reliable else set()
    claimed = [pair in named for pair in zip(found.examined.parent.tolist(), found.examined.child.tolist(), strict=True)]
    return Units(score, np.array(claimed + [False] * (len(score) - len(claimed)), dtype=bool), truth.astype(bool))


Judge = Callable[[Session, Truths], Units]
DETECTORS: dict[str, Judge] = {
    "polysemantic": polysemantic,
    "duplicate": duplicate,
    "dead": dead,
    "absorption": absorption,
    "silent on 100,000 rows": silent,
    "cos(encoder, decoder)": writes_otherwise,
    "cos(decoder, response)": fires_otherwise,
}


# the grid ----------------------------------------------------------------------------------------------------------------------


def grid(seed: int) -> Iterator[Cell]:
    """Sparsity, interference (n_features / d_in), width and method."""
    for n_features, d_in, bound in ((32, 64, 0.1), (64, 64, 0.1), (64, 32, 0.3), (128, 64, 0.3), (64, 16, 0.6)):
        for sparsity in (0.95, 0.98):
            bench = LinearBench(n_features=n_features, d_in=d_in, sparsity=sparsity, max_interference=bound, seed=seed)
            k = max(1, round(n_features * (1 - sparsity)))
            methods = ((TopK(k=k), 0.5), (TopK(k=k), 1), (TopK(k=k), 2), (Matryoshka(k=k), 1), (JumpReLU(l0=k), 1), (ReLU(l1=0.3), 2))
            yield from cells(f"linear {n_features}/{d_in} S{sparsity:g}", bench, methods, seed)
    small = {"parents": 3, "children": 3, "independent": 8}
    large = {"parents": 6, "children": 3, "independent": 20, "parent_probability": 0.08, "independent_probability": 0.04}
    for settings, d_in, spread in ((small, 20, 0.0), (small, 40, 0.2), (small, 16, 0.1), (large, 64, 0.1)):
        bench = HierarchyBench(**settings, d_in=d_in, magnitude_std=spread, seed=seed)
        methods = ((TopK(k=2), 0.6), (TopK(k=2), 1), (BatchTopK(k=2), 2), (Matryoshka(k=2), 1), (ReLU(l1=0.05), 1), (ReLU(l1=0.05), 2))
        yield from cells(f"hierarchy {bench.n_features}/{d_in} spread {spread:g}", bench, methods, seed)


def cells(name: str, bench: Source, methods: tuple, seed: int) -> Iterator[Cell]:
    for method, width in methods:
        labels = {"bench": name, "method": str(method), "width": width}
        settings = {"batch_size": 256, "lr": 3e-3, "decay_steps": STEPS}
        yield Cell(labels, bench, method, int(width * bench.n_features), STEPS, seed, settings=settings)


def run(cell: Cell) -> list[dict]:
    """One row a detector; they and the units stay beside the run, so that a second call judges with new detectors alone."""
    folder = RUNS / cell.name
    judged = folder / "detectors.json"
    rows = json.loads(judged.read_text()) if judged.exists() else []
    missing = [name for name in DETECTORS if name not in {row["detector"] for row in rows}]
    if not missing:
        return rows
    run_cell(cell, folder, device="cpu")
    with Session.open(folder / "run", source=cell.source, device="cpu") as session:
        truth = Truths(session.dictionary, cell.source.sample(TRUTH_ROWS, stream(cell.seed, "truth"), "judge"))
        spare = session.find(find_redundant, n=JUDGE_ROWS)
        regime = {"coherence": spare.coherence, "L0": float(spare.firing_rate.sum())}
        for name in missing:
            units = DETECTORS[name](session, truth)
            np.savez(folder / f"{name}.npz", **units._asdict())
            rows.append({**cell.labels, "seed": cell.seed, **regime, "detector": name, "cell": cell.name, **scores(units)})
    judged.write_text(json.dumps(rows))
    return rows


def forget(cell: Cell, names: Iterable[str]) -> None:
    """So that these detectors judge again."""
    judged = RUNS / cell.name / "detectors.json"
    if judged.exists():
        judged.write_text(json.dumps([row for row in json.loads(judged.read_text()) if row["detector"] not in names]))


# scores ------------------------------------------------------------------------------------------------------------------------


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
    """All units of these runs together."""
    kept = [np.load(RUNS / row.cell / f"{row.detector}.npz") for row in runs.itertuples()]
    return scores(Units(*(np.concatenate([units[name] for units in kept]) for name in Units._fields)))


def by_regime(runs: pd.DataFrame, bins: tuple, column: str) -> pd.DataFrame:
    found = []
    for name in DETECTORS:
        for low, high in bins:
            some = runs[(runs["detector"] == name) & (runs[column] >= low) & (runs[column] < high)]
            if len(some):
                found.append({"detector": name, "low": low, "high": high, "runs": len(some), **pooled(some)})
    return pd.DataFrame(found)


def report(runs: pd.DataFrame) -> None:
    coherence, l0 = by_regime(runs, REGIMES, "coherence"), by_regime(runs, SPARSITIES, "L0")
    regimes = pd.concat([coherence.assign(regime="mean coherence"), l0.assign(regime="L0")])
    regimes.to_csv(OUT / "regimes.csv", index=False, float_format="%.4g")
    own = [field.name for field in fields(DetectorScore)]
    claims = coherence.groupby("detector")["claimed"].transform("sum") > 0
    coherence[claims][own].to_csv(TABLE, index=False, float_format="%.4g")
    head = (
        f"`python benchmarks/detectors.py`: {runs['cell'].nunique()} dictionaries, seeds {sorted(runs['seed'].unique().tolist())}, "
        f"{STEPS:,} steps of 256 rows each, on one CPU core ({platform.machine()}, torch {torch.__version__}).\n\n"
        f"Detectors read {JUDGE_ROWS:,} judge rows without truth; the truth is that of {TRUTH_ROWS:,} fresh rows. Precision and recall are "
        "those of a detector's own threshold, average precision that of its score; chance is the share of true cases, the average "
        "precision of a coin. Units of all dictionaries in a regime are pooled. Thresholds were chosen on other bench seeds."
    )
    truths = [f"- **{name}**: {' '.join(judge.__doc__.split())}" for name, judge in DETECTORS.items()]
    low = runs[runs["coherence"] < 0.2]
    kinds = [("all", low), *((kind, low[low["bench"].str.startswith(kind)]) for kind in ("linear", "hierarchy"))]
    aims = [
        {"detector": n, "benches": k, **pooled(part[part["detector"] == n])}
        for n in DETECTORS
        for k, part in kinds
        if (part["detector"] == n).any()
    ]
    aims = pd.DataFrame([aim | {"short of 0.9": max(0.0, 0.9 - aim["average_precision"])} for aim in aims if aim["positives"]])
    sections = {
        "Aim: average precision of 0.9 at mean coherence below 0.2": aims,
        "By mean coherence": coherence,
        "By L0": l0,
    }
    text = ["# Detectors without truth, against hidden truth", head, "\n".join(truths)]
    for title, table in sections.items():
        text += [f"## {title}", markdown_table(table.map(lambda v: f"{v:.3g}" if isinstance(v, float) else v))]
    (OUT / "README.md").write_text("\n\n".join(text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--anew", nargs="*", choices=DETECTORS, default=None)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="train and judge the benches of these names alone, and leave the tables as they are"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    wanted = [cell for seed in range(options.seeds) for cell in grid(seed) if cell.name.startswith(tuple(options.only))]
    if options.report:
        wanted = [cell for cell in wanted if (RUNS / cell.name / "detectors.json").exists()]
    rows = []
    for at, cell in enumerate(wanted, 1):
        print(f"{at}/{len(wanted)} {cell.name}", flush=True)
        if options.anew is not None:
            forget(cell, options.anew or DETECTORS)
        rows += json.loads((RUNS / cell.name / "detectors.json").read_text()) if options.report else run(cell)
    if options.only == [""]:
        runs = pd.DataFrame(rows)
        runs.to_csv(OUT / "runs.csv", index=False, float_format="%.4g")
        report(runs)


if __name__ == "__main__":
    main()
