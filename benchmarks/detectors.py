"""Detectors that see no truth, scored against the truth that benches hide.

    python benchmarks/detectors.py              some ten minutes of one core a seed; goes on where it was interrupted
    python benchmarks/detectors.py --report     the tables, from the dictionaries that are judged so far
    python benchmarks/detectors.py --anew       detectors have changed: judges the trained dictionaries again
                                                (--anew absorption: with that detector alone)

Trains small dictionaries on LinearBench and HierarchyBench over a grid of sparsity, interference (n_features / d_in), width and method.
Each detector reads 10,000 judge rows without truth; the truth comes from 100,000 fresh rows, a latent's rate from 1,000,000. A new
detector is one entry of DETECTORS.

Writes runs.csv (each dictionary and detector), regimes.csv and README.md to benchmarks/results/detectors, and the table that findings
quote to sdl_explorer/assets/detector_scores.csv.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from detector_tables import OUT, RUNS, Units, report, scores  # the file beside this one
from torch.nn.functional import normalize

from sdl_explorer import BatchTopK, HierarchyBench, JumpReLU, LinearBench, Matryoshka, ReLU, Session, SparseDictionary, TopK
from sdl_explorer.data.sources import Source, stream
from sdl_explorer.diagnosis.absorption import find_absorption
from sdl_explorer.diagnosis.candidates import score_candidates, suspect_absorption
from sdl_explorer.diagnosis.meanings import suspect_polysemantic
from sdl_explorer.diagnosis.observe import encoded, evaluating
from sdl_explorer.diagnosis.patterns import trace_patterns
from sdl_explorer.diagnosis.recovery import score_recovery
from sdl_explorer.diagnosis.redundancy import Redundancy, find_redundant
from sdl_explorer.experiments.cells import Cell, run_cell

JUDGE_ROWS, TRUTH_ROWS = 10_000, 100_000
MORE, RARE = 1_000_000, 3e-5  # further rows for the rate of a latent; the rate that silence on TRUTH_ROWS excludes at 95 %
SAME = 0.9  # cosine from which a decoder row writes a feature
STEPS = 1_500


class Truths:
    """What is known of a dictionary with truth and fresh rows, each when it is asked for; the source gives the same rows each time."""

    def __init__(self, dictionary: SparseDictionary, source: Source, seed: int):
        self.dictionary, self.draw = dictionary, lambda *key: source.sample(TRUTH_ROWS, stream(seed, *key), "judge")

    rows = cached_property(lambda self: self.draw("truth"))
    patterns = cached_property(lambda self: trace_patterns(self.dictionary, self.rows))
    recovery = cached_property(lambda self: score_recovery(self.dictionary, self.rows, match=False))
    absorption = cached_property(lambda self: find_absorption(self.dictionary, self.rows))

    @cached_property
    def rate(self) -> np.ndarray:
        """Share of MORE further rows on which each latent fires."""
        count = torch.zeros(self.dictionary.n_latents, dtype=torch.int64)
        with evaluating(self.dictionary):
            for at in range(MORE // TRUTH_ROWS):
                count += torch.stack([rows.count for rows in encoded(self.dictionary, self.draw("further", at))]).sum(dim=0)
        return count.numpy() / MORE

    @cached_property
    def written(self) -> np.ndarray:
        """(n_latents, 2) ids of the feature, or of the two, that a decoder row is a positive combination of, at a cosine of SAME; -1, -1
        where it is of none."""
        features = normalize(self.rows.truth.target_features, dim=1).double().numpy()
        cosines = normalize(self.dictionary.W_dec.detach(), dim=1).double().numpy() @ features.T
        first, alone = cosines.argmax(axis=1), cosines.max(axis=1, keepdims=True)
        between = (features @ features.T)[first]
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = np.stack([alone - between * cosines, cosines - between * alone]) / (1 - between**2)
        fit = np.where((parts > 0).all(axis=0), parts[0] * alone + parts[1] * cosines, 0)  # squared cosine with the best combination
        second = np.where(alone[:, 0] >= SAME, first, fit.argmax(axis=1))
        found = np.sort(np.stack([first, second], axis=1), axis=1)
        return np.where((alone >= SAME) | (fit.max(axis=1, keepdims=True) >= SAME**2), found, -1)


Judge = Callable[[Session, Truths], Units]


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
    """Live latents; true: another live latent writes the same: one feature, or two in a positive combination, at a cosine of 0.9."""
    found = session.find(find_redundant, n=JUDGE_ROWS)
    written = np.where(found.live[:, None], truth.written, -1)
    _, at, writers = np.unique(written, axis=0, return_inverse=True, return_counts=True)
    return Units(found.twin_cosine, found.duplicate, (written[:, 0] >= 0) & (writers[at.reshape(-1)] > 1)).of(found.live)


def same_feature(session: Session, truth: Truths) -> Units:
    """The same; true: another live latent writes the same single feature at a cosine of 0.9, so that copies of a mixture are none."""
    found, recovery = session.find(find_redundant, n=JUDGE_ROWS), truth.recovery
    feature = np.where(found.live & (recovery.cosine >= SAME), recovery.feature, -1)
    writers = np.bincount(feature + 1, minlength=len(recovery.names) + 1)
    return Units(found.twin_cosine, found.duplicate, (feature >= 0) & (writers[feature + 1] > 1)).of(found.live)


def dead(session: Session, truth: Truths) -> Units:
    """All latents; true: the rate on 1,000,000 further rows is below 3 / 100,000, what 100,000 silent samples show at 95 %; named: silent
    for 100,000 samples; score: less the rate that `find_redundant` expects."""
    found = session.find(find_redundant, n=JUDGE_ROWS)
    return Units(-found.expected_rate, found.dead & ~found.live, truth.rate < RARE)


def expected(session: Session, truth: Truths) -> Units:
    """The same truth and score; named: expected to fire less often than that."""
    rate = session.find(find_redundant, n=JUDGE_ROWS).expected_rate
    return Units(-rate, rate < RARE, truth.rate < RARE)


def dead_for(score: Callable[[Redundancy, Truths], np.ndarray], words: str) -> Judge:
    """The first definition, whose positives are a coin at rates near 1 / 100,000."""

    def judge(session: Session, truth: Truths) -> Units:
        found = session.find(find_redundant, n=JUDGE_ROWS)
        return Units(score(found, truth), found.dead & ~found.live, truth.recovery.silent)

    judge.__doc__ = f"All latents; true: silent on the 100,000 fresh rows; score: {words}."
    return judge


def since_fired(found: Redundancy) -> np.ndarray:
    return np.where(found.live, 0, found.samples_since_fired)


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


DETECTORS: dict[str, Judge] = {
    "polysemantic": polysemantic,
    "duplicate": duplicate,
    "dead": dead,
    "absorption": absorption,
    "dead, by the expected rate": expected,
    "duplicate, of one feature": same_feature,
    "silent later": dead_for(lambda found, _: -found.expected_rate, "less the rate that `find_redundant` expects"),
    "silent later, by samples since it fired": dead_for(lambda found, _: since_fired(found), "samples since it fired, in training"),
    "silent later, by the share of the longest silence": dead_for(
        lambda found, _: since_fired(found) / (1 + since_fired(found).max()),
        "the same over the dictionary's largest, as it was scored first",
    ),
    "silent later, by the rate on 1,000,000 rows": dead_for(lambda _, truth: -truth.rate, "less the true rate: the most that can be had"),
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
        truth = Truths(session.dictionary, cell.source, cell.seed)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--anew", nargs="*", choices=DETECTORS, default=None)
    parser.add_argument("--seeds", type=int, default=3)
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
        report(
            runs,
            DETECTORS,
            f"{STEPS:,} steps of 256 rows each, {JUDGE_ROWS:,} judge rows without truth to detect, {TRUTH_ROWS:,} fresh rows for the truth",
        )


if __name__ == "__main__":
    main()
