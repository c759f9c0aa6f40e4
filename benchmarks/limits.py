"""What one pass can know: SAEs beside dictionaries that are given the truth, and beside classical dictionary learning.

    python benchmarks/limits.py         a few minutes of one core

Data: 64 features in 32 dimensions with inner products of at most 0.2, each active with probability 0.02, exponential magnitudes.

oracle      the true features as encoder and decoder rows: OMP of k atoms, and one pass of a tied ReLU at the threshold that is best
            for F1 on other rows. What lies between the two is the amortisation gap (arXiv 2411.13117), whatever the training
classical   scikit-learn's MiniBatchDictionaryLearning with non-negative codes
trained     SAEs, as `Session` trains them by default

One table; every row of it is scored on the same judge rows. Writes limits.csv and README.md to benchmarks/results/limits.
"""

import argparse
import platform
import time
from pathlib import Path

import pandas as pd
import torch

from sdl_explorer import (
    BatchTopK,
    LinearBench,
    Matryoshka,
    ReLU,
    Session,
    SparseDictionary,
    TopK,
    align,
    learn_classically,
    score_recovery,
    with_pursuit,
)
from sdl_explorer.data.sources import stream
from sdl_explorer.diagnosis.observe import observe
from sdl_explorer.models.methods.relu import Rectified

STEPS, BATCH, LR = 3_000, 256, 3e-3
JUDGE_ROWS, CHOOSE_ROWS, CLASSICAL_ROWS = 20_000, 10_000, 20_000
N_FEATURES = 64
BENCH = LinearBench(n_features=N_FEATURES, d_in=32, sparsity=0.98, interference="bounded", max_interference=0.2, minimum=0.0)
THRESHOLDS = torch.arange(0.1, 1.5, 0.1)
TRAINED = {
    "ReLU, l1 0.3": lambda: ReLU(l1=0.3),
    "TopK, k=2": lambda: TopK(k=2),
    "TopK, k=2, tied": lambda: TopK(k=2, tie="tied"),
    "BatchTopK, k=2": lambda: BatchTopK(k=2),
    "Matryoshka, k=2": lambda: Matryoshka(k=2),
}
WIDTHS = (64, 128)
COLUMNS = ("mcc", "recovered_90", "recovered_95", "explained_variance", "f1", "l0", "dead")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/limits"))
    given = parser.parse_args()
    judge = BENCH.sample(JUDGE_ROWS, stream("limits", "judge"))
    rows = []

    def told(kind: str, name: str, n_latents: int, seed: int, dictionary: SparseDictionary, seconds: float) -> None:
        rows.append({"kind": kind, "name": name, "n_latents": n_latents, "seed": seed, **scores(dictionary, judge), "seconds": seconds})
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else str(v) for k, v in rows[-1].items()), flush=True)

    for k in (1, 2, 3):
        told("oracle", f"OMP, k={k}", N_FEATURES, 0, with_pursuit(oracle(0.0), k), 0.0)
    told("oracle", "one pass, tied ReLU", N_FEATURES, 0, oracle(best_threshold()), 0.0)
    for seed in given.seeds:
        for n_latents in WIDTHS:
            data, began = BENCH.sample(CLASSICAL_ROWS, stream("limits", "classical", seed)), time.perf_counter()
            dictionary = learn_classically(data, n_latents, alpha=0.3, centre=False, seed=seed)
            told("classical", "scikit-learn, alpha 0.3", n_latents, seed, dictionary, time.perf_counter() - began)
            for name, method in TRAINED.items():
                began = time.perf_counter()
                told("trained", name, n_latents, seed, trained(method(), n_latents, seed), time.perf_counter() - began)
    report(pd.DataFrame(rows), judge, given.out)


def oracle(threshold: float) -> SparseDictionary:
    """z = ReLU(D x - threshold), recon = z D, of the true rows D."""
    features = BENCH.directions[0]
    return SparseDictionary(
        features, features.clone(), torch.full((N_FEATURES,), -threshold), torch.zeros(BENCH.width_in), Rectified()
    ).eval()


def best_threshold() -> float:
    """The one with the largest F1 on rows that nothing is judged on."""
    choose = BENCH.sample(CHOOSE_ROWS, stream("limits", "choose"))
    return max(THRESHOLDS.tolist(), key=lambda threshold: score_recovery(oracle(threshold), choose).mean_f1)


def trained(method, n_latents: int, seed: int) -> SparseDictionary:
    with Session(BENCH, method, n_latents=n_latents, batch_size=BATCH, lr=LR, decay_steps=STEPS, seed=seed) as session:
        return session.train(STEPS).dictionary


def scores(dictionary: SparseDictionary, judge) -> dict[str, float]:
    found, recovery = observe(dictionary, judge, [align, score_recovery])
    return {
        "mcc": recovery.mcc,
        "recovered_90": found.recovery(0.9, side="decoder", scoring="all"),
        "recovered_95": found.recovery(0.95, side="decoder", scoring="all"),
        "explained_variance": recovery.explained_variance,
        "f1": recovery.mean_f1,
        "l0": recovery.l0,
        "dead": float(recovery.silent.mean()),
    }


def report(table: pd.DataFrame, judge, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    table.round(5).to_csv(out / "limits.csv", index=False)
    seeds = sorted(table["seed"].unique())
    lines = [
        "# What one pass can know",
        "",
        f"`{BENCH}`; true L0 {float((judge.truth.codes > 0).sum(dim=1).float().mean()):.3f}. `python benchmarks/limits.py`.",
        f"Trained: {STEPS:,} steps of {BATCH} rows, Adam at {LR:g} with a decay over the last fifth.",
        f"scikit-learn: {CLASSICAL_ROWS:,} rows, 10 passes. Means over seeds {', '.join(map(str, seeds))}; {JUDGE_ROWS:,} judge rows.",
        "MCC, recovery (at 0.9 and 0.95) and F1 are of decoder rows. F1 is the mean over latents, dead ones 0, each as a classifier of",
        "its best feature, so spare latents (128 for 64 features) lower it.",
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads.",
        "",
        "| | | latents | MCC | recovered 0.9 | recovered 0.95 | explained variance | F1 | L0 | dead |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (kind, name, n_latents), group in table.groupby(["kind", "name", "n_latents"], sort=False):
        mean = group[list(COLUMNS)].mean()
        lines.append(f"| {kind} | {name} | {n_latents} | " + " | ".join(f"{mean[c]:.3f}" for c in COLUMNS) + " |")
    (out / "README.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
