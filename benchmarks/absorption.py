"""Absorption where the answer is known: what `find_absorption` says of it, beside what was published.

    python benchmarks/absorption.py             some ten minutes of one core
    python benchmarks/absorption.py --report    the tables again, from the runs.csv that is there

delta     planted partial absorption, enc = f0 - delta f1 and dec = f1 + delta f0 (Chanin et al. 2024, appendix A.2): no training
toy       their four features in 50 dimensions, one inside another, or not; ReLU with an L1 penalty
tree      Nabeshima's tree: 3 parents of 3 exclusive children and 8 features of their own in 20 dimensions; ReLU, and nested prefixes
hedging   one tied unit latent for two features, tan 2a = 2 p11 / p10 (Chanin et al. 2025, "Feature Hedging"), trained and in closed form

Writes runs.csv (every trained dictionary) and README.md (tables, and each expectation with what came out) to
benchmarks/results/absorption.
"""

import argparse
import itertools
import math
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import param
import torch

from sdl_explorer import BatchTopK, HierarchyBench, Matryoshka, ReLU, SparseDictionary, align, check_health, find_absorption
from sdl_explorer.data.bench import linear_activations, random_rotation
from sdl_explorer.data.sources import Generated, Source, stream
from sdl_explorer.diagnosis.absorption import Absorption
from sdl_explorer.diagnosis.edges import KINDS
from sdl_explorer.diagnosis.observe import observe
from sdl_explorer.models.methods import Method
from sdl_explorer.models.methods.matryoshka import nested_reconstructions
from sdl_explorer.models.methods.relu import Rectified
from sdl_explorer.models.terms import weighted_l1
from sdl_explorer.training.loop import train
from sdl_explorer.training.state import Schedule, TrainState

OUT = Path("benchmarks/results/absorption")
JUDGE_ROWS = 20_000
BATCH = 256
DELTAS = (0.0, 0.3, 0.4, 0.5, 0.8, 1.0)
HEDGES = ((0.2, 0.05, 0.9732, 0.2298), (0.3, 0.1, 0.9571, 0.2898), (0.1, 0.3, 0.7630, 0.6464))  # p10, p11, cosines as published
TREE_MCC = (11 + 9 / math.sqrt(2)) / 20  # every child's row is (parent + child) / sqrt 2


class FourFeatures(Generated):
    """Chanin's toy: f0 with probability 0.25, f2 and f3 with 0.05, f1 with `inside` where f0 is active and `outside` elsewhere."""

    inside = param.Number(0.2, bounds=(0, 1), constant=True, doc="P(f1 | f0).")
    outside = param.Number(0.0, bounds=(0, 1), constant=True, doc="P(f1 | not f0).")
    magnitude_std = param.Number(0.0, bounds=(0, None), constant=True, doc="Spread of the activations around 1.")
    d_in = param.Integer(50, bounds=(4, None), constant=True, doc="Width of the inputs.")

    @property
    def width_in(self) -> int:
        return self.d_in

    def draw(self, n: int, generator: torch.Generator):
        chance = torch.rand(n, 4, generator=generator)
        first = chance[:, 0] < 0.25
        inside = torch.where(first, self.inside, self.outside)
        active = torch.stack([first, chance[:, 1] < inside, chance[:, 2] < 0.05, chance[:, 3] < 0.05], dim=1)
        codes = active * (1 + self.magnitude_std * torch.randn(n, 4, generator=generator)).clamp(min=0)
        features = random_rotation(self.d_in, stream(self.seed, "directions"))[:4].float()
        return linear_activations(codes, features, features, parents=(None, 0, None, None))


class RandomPrefixes(Method):
    """ReLU with an L1 penalty, its error averaged over nested prefixes drawn anew each step (Nabeshima 2024)."""

    l1 = param.Number(0.02, bounds=(0, None), doc="Weight of sum_i z_i |W_dec_i|.")
    n_prefixes = param.Integer(5, bounds=(0, None), doc="Inner prefixes a step.")

    def nonlinearity(self, n_latents):
        return Rectified()

    def objective(self, dictionary, encoding, batch, context):
        drawn = torch.randint(1, dictionary.n_latents, (self.n_prefixes,), generator=context.generator).tolist()
        levels = nested_reconstructions(dictionary, encoding.latents, sorted({*drawn, dictionary.n_latents}))
        error = (levels - batch.targets).square().sum(dim=2).mean()
        return {"error": error, "l1": self.l1 * weighted_l1(encoding.latents, dictionary)}


# name -> source settings, method, n_latents, lr, steps
ONCE, HALF = {"inside": 0.05, "outside": 0.05}, {"inside": 0.19, "outside": 0.0025 / 0.75}
TOYS = {
    "independent, 8 latents": (ONCE, ReLU(l1=0.03), 8, 3e-3, 5_000),
    "f1 inside f0, 8 latents": ({}, ReLU(l1=0.03), 8, 1e-2, 2_500),
    "independent, 4 latents": (ONCE, ReLU(l1=0.03), 4, 1e-2, 2_500),
    "f1 inside f0, 4 latents": ({}, ReLU(l1=0.03), 4, 1e-2, 2_500),
    "f1 inside f0, 4 latents, l1 0.003": ({}, ReLU(l1=0.003), 4, 1e-2, 2_500),
    "magnitudes 1 +- 0.1": ({"magnitude_std": 0.1}, ReLU(l1=0.03), 4, 1e-2, 2_500),
    "f1 alone in 5 % of its rows": (HALF, ReLU(l1=0.03), 4, 1e-2, 2_500),
    "tied weights": ({}, ReLU(l1=0.03, tie="tied"), 4, 1e-2, 2_500),
}
TREES = {
    "ReLU, l1 0.02": (ReLU(l1=0.02), 3e-3, 4_000),
    "ReLU, l1 0.1": (ReLU(l1=0.1), 3e-3, 4_000),
    "random prefixes, l1 0.02": (RandomPrefixes(l1=0.02), 3e-3, 4_000),
    "random prefixes, l1 0.1": (RandomPrefixes(l1=0.1), 3e-3, 4_000),
    "BatchTopK(k=2)": (BatchTopK(k=2), 3e-3, 4_000),
    "Matryoshka(k=2)": (Matryoshka(k=2), 3e-3, 4_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--toy-seeds", type=int, default=8)
    parser.add_argument("--tree-seeds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "runs.csv"
    if not options.report:
        runs = [*train_toys(options.toy_seeds), *train_trees(options.tree_seeds)]
        pd.DataFrame(runs).to_csv(path, index=False, float_format="%.5g")
    runs = pd.read_csv(path)
    head = (
        f"`python benchmarks/absorption.py`, some ten minutes of one CPU core ({platform.machine()}, torch {torch.__version__}). "
        f"Every trained dictionary is in runs.csv, judged on {JUDGE_ROWS:,} fresh rows."
    )
    toys, trees = (runs[runs["part"] == part] for part in ("toy", "tree"))
    sections = [expectations(toys, trees), delta_table(), toy_table(toys), tree_table(trees), hedging_table()]
    (options.out / "README.md").write_text("\n\n".join(["# Absorption with known answers", head, *sections]) + "\n")


# training and measuring ---------------------------------------------------------------------------------------------------


def trained(source: Source, method: Method, n_latents: int, lr: float, steps: int, seed: int) -> SparseDictionary:
    """From decoder rows of norm 0.1, the encoder their transpose; Adam, falling to a tenth over the last fifth."""
    dictionary = method.build(source.width_in, source.width_out, n_latents, stream(seed, "weights"))
    if not method.unit_norm:
        with torch.no_grad():
            for matrix in {dictionary.W_enc, dictionary.W_dec}:
                matrix.mul_(0.1)
    state = TrainState.start(dictionary, Schedule(lr, decay_steps=steps), seed, source.dead_after)
    for _ in itertools.islice(train(state, method, source, batch_size=BATCH), steps):
        pass
    return state.dictionary


def measure(dictionary: SparseDictionary, source: Source, seed: int) -> tuple[Absorption, dict]:
    judge = source.sample(JUDGE_ROWS, stream(seed, "judge"), "judge")
    found, health, aligned = observe(dictionary, judge, [find_absorption, check_health, align])
    seen = [edge.evidence for edge in found.edges]
    mean = lambda values: float(np.mean([v for v in values if v is not None] or [np.nan]))
    cosine = torch.cosine_similarity(dictionary.W_enc, dictionary.W_dec).detach().numpy()
    return found, {
        **found.kinds,
        "fires_with": mean(edge.recall_with for edge in found.edges),
        "fires_without": mean(edge.recall_without for edge in found.edges),
        "parent_with": mean(s.contrast and s.contrast.own_on for s in seen),
        "child_writes_parent": mean(s.leak for s in seen),
        "parent_reads_child": mean(s.hole for s in seen),
        "fraction": mean(s.contrast and s.contrast.fraction for s in seen),
        "explained": 1 - health.unexplained_variance,
        "mcc": aligned.mcc,
        "l0": health.l0,
        "dead": health.n_dead + health.n_unseen,
        "encoder_decoder_parents": mean(cosine[edge.latent] for edge in found.edges if edge.latent >= 0),
    }


# the parts ----------------------------------------------------------------------------------------------------------------


def delta_table() -> str:
    """Planted absorption, against its closed form."""
    source = HierarchyBench(parents=1, children=1, independent=0, d_in=2, parent_probability=0.5, child_probability=0.5)
    judge = source.sample(2_000, stream(0, "judge"))
    features, lines, worst = source.features, [], 0.0
    for delta in DELTAS:
        W_enc, W_dec = features.clone(), features.clone()
        W_enc[0] -= delta * features[1]
        W_dec[1] += delta * features[0]
        edge = find_absorption(SparseDictionary(W_enc, W_dec), judge).edges[0]
        cosines = torch.cosine_similarity(W_enc, W_dec).tolist()
        among = float(torch.cosine_similarity(W_dec[0], W_dec[1], dim=0))
        measured = [*cosines, among, edge.evidence.contrast.own_on, edge.evidence.contrast.fraction, edge.evidence.contrast.full]
        expected = [1 / math.hypot(1, delta)] * 2 + [delta / math.hypot(1, delta), 1 - delta, delta * (delta >= 0.4), float(delta == 1)]
        worst = max(worst, *(abs(a - b) for a, b in zip(measured, expected, strict=True)))
        lines.append([f"{delta:g}", *(f"{value:.4f}" for value in measured), edge.kind])
    names = ["delta", "cos(enc, dec) parent", "child", "cos(dec, dec)", "parent, both active", "fraction", "full", "kind"]
    closed = "Closed form: 1/sqrt(1 + delta^2) twice, delta/sqrt(1 + delta^2), 1 - delta, delta from 0.4 on, [delta = 1]."
    text = ["## Planted, partial (Chanin et al. 2024, A.2)", table(names, lines), f"{closed} Largest difference: {worst:.1e}."]
    return "\n\n".join(text)


def train_toys(seeds: int) -> Iterator[dict]:
    for name, (settings, method, n_latents, lr, steps) in TOYS.items():
        for seed in range(seeds):
            source = FourFeatures(seed=seed, **settings)
            found, row = measure(trained(source, method, n_latents, lr, steps, seed), source, seed)
            yield {"part": "toy", "setting": name, "seed": seed, **row}
            print(name, seed, found.edges[0].kind, found.edges[0].why, flush=True)


def train_trees(seeds: int) -> Iterator[dict]:
    for name, (method, lr, steps) in TREES.items():
        for seed in range(seeds):
            source = HierarchyBench(seed=seed)
            found, row = measure(trained(source, method, 20, lr, steps, seed), source, seed)
            yield {"part": "tree", "setting": name, "seed": seed, **row}
            print(name, seed, found, flush=True)


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
        "## Four features, one inside another (Chanin et al. 2024)",
        f"f0 (parent) and f1 (child), orthogonal in 50 dimensions; P(f0) = 0.25, P(f1 | f0) = 0.2, f2 and f3 0.05; batches of {BATCH}. "
        f"Medians of seeds 0 to {runs['seed'].max()}; the last column counts seeds.",
        summary(runs, "median"),
        "Published: clean where independent, absorbed where f1 is inside f0, partly where magnitudes vary (the parent at .22 to .12 with "
        "the child), the parent at .67 where f1 is alone in 5 % of its rows, clean with tied weights. Where they are independent, truth "
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
        "inner levels hedge (Chanin et al. 2025).",
    ]
    return "\n\n".join(text)


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
    n = counts.loc["tied weights", ["absorbed", "partly absorbed"]].sum()
    expect("tied weights: clean", f"{n} of {seeds['tied weights']} absorbed", n == 0)
    for name in ("ReLU, l1 0.02", "ReLU, l1 0.1"):
        absorbed = tree.loc[name, ["absorbed", "partly absorbed"]].sum()
        mcc, explained = means.loc[name]
        expect(f"tree, {name}: absorbed, in full or part", f"{absorbed} of {edges[name]} edges", absorbed > 0.9 * edges[name])
        met = abs(mcc - TREE_MCC) < 0.01 and explained > 0.99
        expect(f"tree, {name}: MCC {TREE_MCC:.3f}, explained 1", f"{mcc:.3f}, {explained:.3f}", met)
    for name in ("random prefixes, l1 0.02", "random prefixes, l1 0.1", "Matryoshka(k=2)"):
        absorbed = tree.loc[name, ["absorbed", "partly absorbed"]].sum()
        expect(f"tree, {name}: cured (at most a tenth absorbed)", f"{absorbed} of {edges[name]} edges", absorbed <= 0.1 * edges[name])
    return "\n\n".join(["## Expected, and what came out", table(["expected", "came out", "met"], lines)])


def hedging_table() -> str:
    lines = []
    for p10, p11, parent, child in HEDGES:
        active = p10 + p11
        source = HierarchyBench(parents=1, children=1, independent=0, d_in=2, parent_probability=active, child_probability=p11 / active)
        angle = 0.5 * math.atan2(2 * p11, p10)
        rows = {
            "closed form": torch.tensor([[math.cos(angle), math.sin(angle)]]) @ source.features,
            "trained": single_latent(source),
        }
        for name, row in rows.items():
            edge = find_absorption(SparseDictionary(row, row), source.sample(JUDGE_ROWS, stream(0, "judge"))).edges[0]
            seen = edge.evidence
            measured = [f"{value:.4f}" for value in (seen.cosine, seen.hole, seen.encoder_child, seen.decoder_child)]
            lines.append([f"{p10:g}, {p11:g}", name, f"{parent:.4f} / {child:.4f}", *measured, f"{edge.gap:+.2f}", edge.kind])
    names = ["p10, p11", "row", "published cosines", "dec, parent", "enc, child", "child per parent, enc", "dec", "gap", "kind"]
    text = [
        "## Hedging is not absorption (Chanin et al. 2025)",
        table(names, lines),
        "A hedge has the child with a plus in both rows of the parent's latent and no gap; absorption has it with a minus in the encoder. "
        "A hedge that holds the child as much as the parent (at least half, and no other latent is nearer to the child) is called merged.",
    ]
    return "\n\n".join(text)


def single_latent(source: Source, steps: int = 1_500) -> torch.Tensor:
    """min |x - relu(x . w) w|^2 over unit w, without biases."""
    w = torch.nn.Parameter(torch.randn(1, source.width_in, generator=stream(0, "weights")).abs() @ source.features)
    optimiser = torch.optim.Adam([w], 1e-2)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        x, unit = source.batch(step, 1024).inputs, w / w.norm()
        loss = (x - (x @ unit.T).relu() @ unit).square().sum(dim=1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return (w / w.norm()).detach()


def summary(runs: pd.DataFrame, of: str) -> str:
    lines = []
    for name, rows in runs.groupby("setting", sort=False):
        kinds = ", ".join(f"{n} {kind}" for kind, n in rows[list(KINDS)].sum().items() if n)
        lines.append([str(name), *(f"{value:.3f}" for value in rows[list(SHOWN)].agg(of)), kinds])
    return table(["", *SHOWN.values(), "kinds"], lines)


def table(names: list[str], lines: list[list[str]]) -> str:
    head = f"| {' | '.join(names)} |\n|---|" + "---:|" * (len(names) - 1)
    return "\n".join([head, *(f"| {' | '.join(line)} |" for line in lines)])


if __name__ == "__main__":
    main()
