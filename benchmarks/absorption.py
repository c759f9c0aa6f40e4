"""Absorption where the answer is known: what `find_absorption` says of it, beside what was published.

    python benchmarks/absorption.py             some ten minutes of one core; goes on where it was interrupted
    python benchmarks/absorption.py --report    the tables again, from the runs.csv that is there

delta     planted partial absorption, enc = f0 - delta f1 and dec = f1 + delta f0 (Chanin et al. 2024, appendix A.2): no training
toy       their four features in 50 dimensions, one inside another, or not, with ReLU and an L1 penalty; twelve with BatchTopK
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
from absorption_tables import BATCH, MIXED, TAKEN, expectations, table, toy_table, tree_table  # the file beside this one

from sdl_explorer import BatchTopK, HierarchyBench, Matryoshka, ReLU, SparseDictionary, align, check_health, find_absorption
from sdl_explorer.data.bench import linear_activations, random_rotation
from sdl_explorer.data.sources import Generated, Source, stream
from sdl_explorer.diagnosis.absorption import Absorption
from sdl_explorer.diagnosis.observe import observe
from sdl_explorer.models.methods import Method
from sdl_explorer.models.methods.matryoshka import nested_reconstructions
from sdl_explorer.models.methods.relu import Rectified
from sdl_explorer.models.terms import weighted_l1
from sdl_explorer.training.loop import train
from sdl_explorer.training.state import Schedule, TrainState

OUT = Path("benchmarks/results/absorption")
JUDGE_ROWS = 20_000
DELTAS = (0.0, 0.3, 0.4, 0.5, 0.8, 1.0)
HEDGES = ((0.2, 0.05, 0.9732, 0.2298), (0.3, 0.1, 0.9571, 0.2898), (0.1, 0.3, 0.7630, 0.6464))  # p10, p11, cosines as published


class Features(Generated):
    """Chanin's toys: f0 with `parent`, f1 with `inside` where f0 is active and `outside` elsewhere, `others` more with `other`."""

    parent = param.Number(0.25, bounds=(0, 1), constant=True, doc="P(f0).")
    inside = param.Number(0.2, bounds=(0, 1), constant=True, doc="P(f1 | f0).")
    outside = param.Number(0.0, bounds=(0, 1), constant=True, doc="P(f1 | not f0).")
    others = param.Integer(2, bounds=(0, None), constant=True, doc="Further features.")
    other = param.Number(0.05, bounds=(0, 1), constant=True, doc="P of each of these.")
    magnitude_std = param.Number(0.0, bounds=(0, None), constant=True, doc="Spread of the activations around 1.")
    d_in = param.Integer(50, bounds=(4, None), constant=True, doc="Width of the inputs.")

    @property
    def width_in(self) -> int:
        return self.d_in

    def draw(self, n: int, generator: torch.Generator):
        n_features = 2 + self.others
        chance = torch.rand(n, n_features, generator=generator)
        first = chance[:, 0] < self.parent
        second = chance[:, 1] < torch.where(first, self.inside, self.outside)
        active = torch.cat([first[:, None], second[:, None], chance[:, 2:] < self.other], dim=1)
        codes = active * (1 + self.magnitude_std * torch.randn(n, n_features, generator=generator)).clamp(min=0)
        features = random_rotation(self.d_in, stream(self.seed, "directions"))[:n_features].float()
        return linear_activations(codes, features, features, parents=(None, 0, *[None] * self.others))


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
TWELVE = {"parent": 0.4, "others": 10, "other": 0.15}
TOYS = {
    "independent, 8 latents": (ONCE, ReLU(l1=0.03), 8, 3e-3, 5_000),
    "f1 inside f0, 8 latents": ({}, ReLU(l1=0.03), 8, 1e-2, 2_500),
    "independent, 4 latents": (ONCE, ReLU(l1=0.03), 4, 1e-2, 2_500),
    "f1 inside f0, 4 latents": ({}, ReLU(l1=0.03), 4, 1e-2, 2_500),
    "f1 inside f0, 4 latents, l1 0.003": ({}, ReLU(l1=0.003), 4, 1e-2, 2_500),
    "magnitudes 1 +- 0.1": ({"magnitude_std": 0.1}, ReLU(l1=0.03), 4, 1e-2, 2_500),
    "f1 alone in 5 % of its rows": (HALF, ReLU(l1=0.03), 4, 1e-2, 2_500),
    "tied weights": ({}, ReLU(l1=0.03, tie="tied"), 4, 1e-2, 2_500),
    "12 features, BatchTopK(k=2)": (TWELVE | {"inside": 0.6}, BatchTopK(k=2), 12, 1e-2, 2_500),
    "12 independent, BatchTopK(k=2)": (TWELVE | {"inside": 0.24, "outside": 0.24}, BatchTopK(k=2), 12, 1e-2, 2_500),
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
    order = {name: at for at, name in enumerate([*TOYS, *TREES])}
    runs = pd.read_csv(path).to_dict("records") if path.exists() else []
    done = {(run["setting"], run["seed"]) for run in runs}
    for run in () if options.report else itertools.chain(train_toys(options.toy_seeds, done), train_trees(options.tree_seeds, done)):
        runs.append(run)
        pd.DataFrame(sorted(runs, key=lambda run: (order[run["setting"]], run["seed"]))).to_csv(path, index=False, float_format="%.5g")
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
    taken = {edge.parent for edge in found.edges if edge.kind in TAKEN}
    near = {which: [e.evidence.cosine or 0.0 for e in found.edges if (e.parent in taken) is which] for which in (True, False)}
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
        "taken_mixed": sum(
            any(other.kind in MIXED for other in found.of(parent=edge.parent)) for edge in found.edges if edge.kind in TAKEN
        ),
        "nearest_taken": max(near[True], default=None),
        "nearest_kept": min(near[False], default=None),
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


def train_toys(seeds: int, done: set) -> Iterator[dict]:
    for name, (settings, method, n_latents, lr, steps) in TOYS.items():
        for seed in (seed for seed in range(seeds) if (name, seed) not in done):
            source = Features(seed=seed, **settings)
            found, row = measure(trained(source, method, n_latents, lr, steps, seed), source, seed)
            yield {"part": "toy", "setting": name, "seed": seed, **row}
            print(name, seed, found.edges[0].kind, found.edges[0].why, flush=True)


def train_trees(seeds: int, done: set) -> Iterator[dict]:
    for name, (method, lr, steps) in TREES.items():
        for seed in (seed for seed in range(seeds) if (name, seed) not in done):
            source = HierarchyBench(seed=seed)
            found, row = measure(trained(source, method, 20, lr, steps, seed), source, seed)
            yield {"part": "tree", "setting": name, "seed": seed, **row}
            print(name, seed, found, flush=True)


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


if __name__ == "__main__":
    main()
