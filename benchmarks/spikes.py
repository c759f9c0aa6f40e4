"""Spike-ins on real activations: what two dictionaries find of them, and how often detectors without truth are right there.

    python benchmarks/spikes.py             trains six dictionaries, about a minute of one core for each TopK
    python benchmarks/spikes.py --report    the table again, from the runs.csv that is there

The rows are those of `benchmarks/real.py --only sae`: all-MiniLM-L6-v2 after layer 4, reading the language reference inside Python.
64 directions with the rows' covariance are put in: 32 on their own, and 8 parents with 3 children each; half of either as large as 0.3,
half as 0.6 of a row's median distance from the mean. Trained dictionaries stay in real/spikes, so that a second call only looks at them.

Then seeds and methods are compared with each other (`find_twins`), on the same rows without spikes.

Writes runs.csv, twins.csv and README.md to benchmarks/results/spikes.
"""

import argparse
import platform
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from sdl_explorer import (
    Matryoshka,
    Session,
    SparseDictionary,
    SpikeIn,
    TopK,
    align,
    check_health,
    find_absorption,
    find_twins,
    score_recovery,
    trace_patterns,
)
from sdl_explorer.data.sources import stream
from sdl_explorer.diagnosis.candidates import suspect_absorption
from sdl_explorer.diagnosis.edges import KINDS
from sdl_explorer.diagnosis.meanings import suspect_polysemantic
from sdl_explorer.diagnosis.observe import observe
from sdl_explorer.diagnosis.redundancy import find_redundant
from sdl_explorer.diagnosis.spiked import CLAIMS, OnSpikes
from sdl_explorer.diagnosis.twins import KINDS as TWINS
from sdl_explorer.experiments.minilm import minilm_rows

OUT = Path("benchmarks/results/spikes")
ROWS, RUNS = Path("real/activations/sae"), Path("real/spikes")
LATENTS, BATCH, STEPS = 1_024, 1_024, 800
METHODS = {"TopK": TopK(k=16), "Matryoshka": Matryoshka(k=16), "untrained": TopK(k=16)}
ALONE, PARENTS, CHILDREN = 32, 8, 3
SMALL, LARGE = 0.3, 0.6
JUDGE_ROWS, TAU = 20_000, 0.9
FOUND = {
    f"{number}_{size}": f"{words}, {size}"
    for number, words in (("recovered", "recovered"), ("cosine", "best cosine"), ("f1", "F1"))
    for size in ("small", "large")
}
DETECTORS = {"polysemantic": "suspect_polysemantic", "redundant": "find_redundant (duplicates)", "absorbed": "suspect_absorption"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    if not options.report:
        pd.DataFrame(list(measured(options.seeds))).to_csv(OUT / "runs.csv", index=False, float_format="%.6g")
        pd.DataFrame(list(compared(options.seeds))).to_csv(OUT / "twins.csv", index=False, float_format="%.6g")
    write_report(pd.read_csv(OUT / "runs.csv"), pd.read_csv(OUT / "twins.csv"))


def spiked(seed: int) -> SpikeIn:
    """Spikes alone, then parents, then children; every other one is large."""
    parents = [None] * (ALONE + PARENTS) + [ALONE + c // CHILDREN for c in range(PARENTS * CHILDREN)]
    large = [k % 2 == 1 if parent is None else parent % 2 == 1 for k, parent in enumerate(parents)]
    rates = [0.01] * ALONE + [0.03] * PARENTS + [0.3] * (PARENTS * CHILDREN)
    return SpikeIn(minilm_rows(ROWS), len(parents), rates, [LARGE if big else SMALL for big in large], parents, seed=seed)


def trained(source: SpikeIn, name: str, seed: int) -> SparseDictionary:
    folder = RUNS / f"{name}-{seed}"
    if not folder.exists():
        session = Session(source, METHODS[name], n_latents=LATENTS, batch_size=BATCH, seed=seed)
        if name != "untrained":
            session.train(STEPS)
        session.dictionary.save(folder)
        session.close()
    return SparseDictionary.load(folder)


def measured(seeds: int) -> Iterator[dict]:
    for seed in range(seeds):
        source = spiked(seed)
        for name in METHODS:
            began = time.perf_counter()
            dictionary = trained(source, name, seed)
            print(name, seed, f"{time.perf_counter() - began:.0f} s", flush=True)
            yield {"method": name, "seed": seed} | measure(dictionary, source, seed)


def measure(dictionary: SparseDictionary, source: SpikeIn, seed: int) -> dict:
    """Truth and detectors on the judge rows, which training never saw."""
    rows = source.sample(JUDGE_ROWS, stream(seed, "judge"), "judge")
    truths = [check_health, (score_recovery, {"tau": TAU}), align, find_absorption, trace_patterns]
    health, recovery, aligned, absorption, patterns = observe(dictionary, rows, truths)
    detectors = [suspect_polysemantic, find_redundant, suspect_absorption]
    found = {
        "rows": rows.n,
        "unexplained": health.unexplained_variance,
        "l0": health.l0,
        "chance_cosine": aligned.chance.mean_best(),
        "coherence_of_spikes": source.interference.largest,
        **{f"latents_{status}": int((patterns.status == status).sum()) for status in ("mono", "poly", "alive", "dead")},
        **{f"edges_{kind}": n for kind, n in absorption.kinds.items()},
    }
    large = np.isin(np.arange(source.n_features), np.flatnonzero(np.array(source.magnitude) == LARGE))
    for size, some in (("small", ~large), ("large", large)):
        found |= {
            f"recovered_{size}": float((recovery.best_cosine[some] >= TAU).mean()),
            f"cosine_{size}": float(recovery.best_cosine[some].mean()),
            f"f1_{size}": float(recovery.classifier_f1[some].mean()),
        }
    polysemantic, redundant, suspects = observe(dictionary, rows, detectors)
    found |= {"crosstalk": suspects.crosstalk, "coherence": suspects.coherence, "reliable": suspects.reliable}
    for spikes in (polysemantic.on_spikes, redundant.on_spikes, suspects.on_spikes):
        for name in ("hits", "n", "n_unknown", "n_true", "n_able"):
            found[f"{spikes.claim}_{name}"] = getattr(spikes, name)
        print(f"    {spikes.claim}: {spikes}", flush=True)
    return found


def compared(seeds: int) -> Iterator[dict]:
    """Pairs of seeds of each method, and the two methods at each seed."""
    rows = minilm_rows(ROWS).sample(JUDGE_ROWS, stream(0, "judge"), "judge")
    pairs = [(name, name, a, b) for name in METHODS for a, b in combinations(range(seeds), 2)]
    pairs += [("TopK", "Matryoshka", seed, seed) for seed in range(seeds)]
    for one, two, a, b in pairs:
        here, there = (SparseDictionary.load(RUNS / f"{name}-{seed}") for name, seed in ((one, a), (two, b)))
        for by in ("decoder", "activations"):
            found = find_twins(here, rows, there, by=by)
            yield {"here": one, "there": two, "seeds": f"{a} {b}", "by": by, "chance": found.chance, **found.here.kinds}


# the report ---------------------------------------------------------------------------------------------------------------


def write_report(runs: pd.DataFrame, twins: pd.DataFrame) -> None:
    seeds, rows = runs["seed"].nunique(), int(runs["rows"].iloc[0])
    head = (
        f"`python benchmarks/spikes.py` on one CPU core, shared with other work and so not timed ({platform.machine()}, "
        f"torch {torch.__version__}), seeds 0 to "
        f"{seeds - 1}: directions and weights differ. {LATENTS:,} latents, k = 16, {STEPS} steps of {BATCH:,} rows at the default learning "
        f"rate; judged on {rows:,} rows that training never saw."
    )
    data = (
        "Rows: the residual stream of all-MiniLM-L6-v2 after layer 4 on the language reference inside Python. "
        f"{ALONE + PARENTS * (1 + CHILDREN)} spikes with the rows' covariance: {ALONE} on their own in 1 % of the rows each, {PARENTS} "
        f"parents in 3 %, each with {CHILDREN} children in 30 % of its rows. Half are {SMALL} of a row's median distance "
        f"from the mean in size, half {LARGE}. They are linear and independent of the rows: what is measured is this regime, not this "
        "data's own features."
    )
    sections = [
        "# Spike-ins on MiniLM activations",
        head,
        data,
        "## What was found of them",
        table(["", "explained", "L0", *FOUND.values()], [found_line(name, some) for name, some in groups(runs)]),
        f"Means over seeds, lowest to highest in brackets. Recovered: a decoder row with cosine {TAU} or more. A random row's best cosine "
        f"is {runs['chance_cosine'].mean():.2f} on average. F1: of the latent that detects the spike best, whatever its direction.",
        "## Absorption in the spikes' hierarchy",
        table(["", *KINDS], [[name, *(str(int(some[f"edges_{kind}"].sum())) for kind in KINDS)] for name, some in groups(runs)]),
        f"Edges of all seeds, {PARENTS * CHILDREN} a seed, as `find_absorption` calls them. An untrained dictionary absorbs nothing, as it "
        "has no latents for parents.",
        "## Detectors without truth",
        table(
            ["detector", "dictionary", "precision on spikes", "of", "95 %", "a guess", "recall", "of", "not judged"], detector_lines(runs)
        ),
        "Candidates that name a latent which stands for a spike, pooled over seeds; the others cannot be judged here. A guess: the "
        "share of true cases among all that could be named. No precision where nothing was named.",
        *(reliability(name, some) for name, some in groups(runs) if name != "untrained"),
        "Both were trained for as many steps, not to the same distance from their best.",
        "## Two seeds, two methods",
        table(
            ["here", "there", "by", *TWINS, "chance"],
            [twins_line(*key, some) for key, some in twins.groupby(["here", "there", "by"], sort=False)],
        ),
        "`find_twins` at 0.7 on the rows without spikes: latents here, of 1,024, means over pairs of seeds (whose spikes differ too), or "
        "over seeds where methods differ. Chance: the mean best similarity of random decoder rows, or of codes of other rows.",
    ]
    (OUT / "README.md").write_text("\n\n".join(sections) + "\n")


def groups(runs: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(name, runs[runs["method"] == name]) for name in METHODS]


def found_line(name: str, some: pd.DataFrame) -> list[str]:
    spread = lambda values, form: f"{values.mean():{form}} ({values.min():{form}} to {values.max():{form}})"
    cells = [spread(some[column], ".0%" if column.startswith("recovered") else ".2f") for column in FOUND]
    return [name, f"{1 - some['unexplained'].mean():.3f}", f"{some['l0'].mean():.1f}", *cells]


def detector_lines(runs: pd.DataFrame) -> list[list[str]]:
    lines = []
    for claim in CLAIMS:
        for name, some in groups(runs):
            spikes = OnSpikes(claim, *(int(some[f"{claim}_{of}"].sum()) for of in ("hits", "n", "n_unknown", "n_true", "n_able")))
            show = lambda value, form=".2f": "-" if value is None else format(value, form)
            interval = f"{spikes.interval.low:.2f} to {spikes.interval.high:.2f}" if spikes.n else "-"
            cells = [show(spikes.precision), str(spikes.n), interval, show(spikes.chance, ".3g"), show(spikes.recall), str(spikes.n_true)]
            lines.append([DETECTORS[claim], name, *cells, str(spikes.n_unknown)])
    return lines


def twins_line(here: str, there: str, by: str, some: pd.DataFrame) -> list[str]:
    return [here, there, by, *(f"{some[kind].mean():.0f}" for kind in TWINS), f"{some['chance'].mean():.2f}"]


def reliability(name: str, some: pd.DataFrame) -> str:
    said = f"`suspect_absorption` calls itself reliable for {int(some['reliable'].sum())} of {len(some)} {name} dictionaries"
    return f"{said} (crosstalk {some['crosstalk'].min():.2f} to {some['crosstalk'].max():.2f})."


def table(names: list[str], lines: list[list[str]]) -> str:
    head = f"| {' | '.join(names)} |\n|{'---|' * len(names)}"
    return "\n".join([head, *(f"| {' | '.join(line)} |" for line in lines)])


if __name__ == "__main__":
    main()
