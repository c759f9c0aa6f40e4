"""The tables of benchmarks/absorption.py: what was expected of each toy, and what came out."""

import math

import pandas as pd

from sdl_explorer.diagnosis.edges import KINDS

BATCH = 256
TAKEN, MIXED = ("absorbed", "partly absorbed"), ("hedged", "merged")
TREE_MCC = (11 + 9 / math.sqrt(2)) / 20  # every child's row is (parent + child) / sqrt 2
SHOWN = {
    "fires_with": "P(parent fires, both)",
    "parent_with": "parent written, both",
    "child_writes_parent": "cos(child dec, parent)",
    "parent_reads_child": "cos(parent enc, child)",
    "encoder_decoder_parents": "cos(enc, dec) parents",
    "fraction": "fraction",
    "explained": "explained",
    "mcc": "MCC",
    "l0": "L0",
    "dead": "dead",
}


def toy_table(runs: pd.DataFrame) -> str:
    text = [
        "## Four and twelve features, one inside another (Chanin et al. 2024)",
        f"f0 (parent) and f1 (child), orthogonal in 50 dimensions; P(f0) = 0.25, P(f1 | f0) = 0.2, f2 and f3 0.05; batches of {BATCH}. The "
        "twelve have P(f0) = 0.4, P(f1 | f0) = 0.6 (or f1 with 0.24 by itself) and ten others with 0.15, and twelve latents. "
        f"Medians of seeds 0 to {runs['seed'].max()}; the last column counts seeds.",
        summary(runs, "median"),
        "Published: clean where independent, absorbed where f1 is inside f0, partly where magnitudes vary (the parent at .22 to .12 with "
        "the child), the parent at .67 where f1 is alone in 5 % of its rows, clean with tied weights, absorbed by BatchTopK too. Tied "
        "weights are clean in the median seed, not in every one. Where they are independent, truth "
        "calls f1 a child only so that the question can be put; a spare latent that takes the rows of both counts as partly absorbed.",
    ]
    return "\n\n".join(text)


def tree_table(runs: pd.DataFrame) -> str:
    text = [
        "## The tree (Nabeshima 2024; Bussmann et al. 2025)",
        f"20 latents, true L0 1.12. Means of seeds 0 to {runs['seed'].max()}; the last column counts edges, nine a seed.",
        summary(runs, "mean"),
        f"Fully absorbed, MCC is (11 + 9/sqrt 2)/20 = {TREE_MCC:.3f}, L0 0.85 (1.12 - 0.27), a child's decoder at .707 to the parent, and "
        "a parent's encoder at 1/2 to its decoder; explained variance sees nothing of it. Published: nested prefixes cure it, and their "
        f"inner levels hedge (Chanin et al. 2025). {leftovers(runs[runs['setting'] == 'random prefixes, l1 0.1'])}",
    ]
    return "\n\n".join(text)


def leftovers(runs: pd.DataFrame) -> str:
    """What the edges are that prefixes did not cure."""
    n = int(runs[[*TAKEN]].to_numpy().sum())
    return (
        f"The {n} edges that are absorbed with prefixes and l1 0.1 belong to parents that no latent stands for: their nearest decoder row "
        f"has a cosine of at most {runs['nearest_taken'].max():.2f} with the parent, and of all other parents' at least "
        f"{runs['nearest_kept'].min():.2f}; {runs['taken_mixed'].sum():.0f} of the {n} have a sibling that is hedged or merged with the "
        f"same parent. They are no artefact of a threshold, and the parent's latent is not dead; {runs['dead'].mean():.1f} of the 20 "
        f"latents are, in a run."
    )


def expectations(toys: pd.DataFrame, trees: pd.DataFrame) -> str:
    """What was published or follows from a closed form, and what came out."""
    counts = toys.groupby("setting")[list(KINDS)].sum()
    seeds = toys.groupby("setting")["seed"].count()
    tree, edges = trees.groupby("setting")[list(KINDS)].sum(), 9 * trees.groupby("setting")["seed"].count()
    means = trees.groupby("setting")[["mcc", "explained"]].mean()
    lines = []

    def expect(words: str, figure: str, met: bool) -> None:
        lines.append([words, figure, "yes" if met else "no"])

    for name in ("f1 inside f0, 8 latents", "f1 inside f0, 4 latents", "f1 inside f0, 4 latents, l1 0.003"):
        n = counts.loc[name, "absorbed"]
        expect(f"{name}: absorbed in most seeds", f"{n} of {seeds[name]}", n > seeds[name] / 2)
    for name in ("independent, 8 latents", "independent, 4 latents"):
        expect(f"{name}: in none", f"{counts.loc[name, 'absorbed']} of {seeds[name]}", counts.loc[name, "absorbed"] == 0)
    n = counts.loc["magnitudes 1 +- 0.1", "partly absorbed"]
    expect("magnitudes vary: partly in most", f"{n} of {seeds['magnitudes 1 +- 0.1']}", n > seeds["magnitudes 1 +- 0.1"] / 2)
    written = toys[toys["setting"] == "f1 alone in 5 % of its rows"]["parent_with"].median()
    expect("f1 alone in 5 % of its rows: the parent at .67 with the child, within .1", f"{written:.2f}", abs(written - 0.67) < 0.1)
    tied = toys[toys["setting"] == "tied weights"]
    n = counts.loc["tied weights", [*TAKEN]].sum()
    expect("tied weights: clean, as published", f"{n} of {seeds['tied weights']} absorbed", n == 0)
    fires, written = tied["fires_with"].median(), tied["parent_with"].median()
    met = fires > 0.9 and written > 0.9
    expect("tied weights: clean in the median seed", f"the parent fires on {fires:.0%} of the child's rows, at {written:.2f}", met)
    n, several = counts.loc["12 features, BatchTopK(k=2)", [*TAKEN]].sum(), seeds["12 features, BatchTopK(k=2)"]
    expect("12 features, BatchTopK(k=2): absorbed too, in most seeds", f"{n} of {several}", n > several / 2)
    n = counts.loc["12 independent, BatchTopK(k=2)", "absorbed"]
    expect("12 independent, BatchTopK(k=2): in none", f"{n} of {several}", n == 0)
    for name in ("ReLU, l1 0.02", "ReLU, l1 0.1"):
        absorbed = tree.loc[name, [*TAKEN]].sum()
        mcc, explained = means.loc[name]
        expect(f"tree, {name}: absorbed, in full or part", f"{absorbed} of {edges[name]} edges", absorbed > 0.9 * edges[name])
        met = abs(mcc - TREE_MCC) < 0.01 and explained > 0.99
        expect(f"tree, {name}: MCC {TREE_MCC:.3f}, explained 1", f"{mcc:.3f}, {explained:.3f}", met)
    for name in ("random prefixes, l1 0.02", "random prefixes, l1 0.1", "Matryoshka(k=2)"):
        absorbed = tree.loc[name, [*TAKEN]].sum()
        expect(f"tree, {name}: cured (at most a tenth absorbed)", f"{absorbed} of {edges[name]} edges", absorbed <= 0.1 * edges[name])
    return "\n\n".join(["## Expected, and what came out", table(["expected", "came out", "met"], lines)])


def summary(runs: pd.DataFrame, of: str) -> str:
    lines = []
    for name, rows in runs.groupby("setting", sort=False):
        kinds = ", ".join(f"{n} {kind}" for kind, n in rows[list(KINDS)].sum().items() if n)
        lines.append([str(name), *(f"{value:.3f}" for value in rows[list(SHOWN)].agg(of)), kinds])
    return table(["", *SHOWN.values(), "kinds"], lines)


def table(names: list[str], lines: list[list[str]]) -> str:
    head = f"| {' | '.join(names)} |\n|---|" + "---:|" * (len(names) - 1)
    return "\n".join([head, *(f"| {' | '.join(line)} |" for line in lines)])
