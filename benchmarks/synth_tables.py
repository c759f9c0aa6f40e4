"""The tables of benchmarks/synth.py: every cell, both curves at matched L0, and the published numbers."""

import platform
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student

OURS, THEIRS = "sdl_explorer", "sae-lens"
PAIRS = [("BatchTopKAux", "BatchTopK"), ("Matryoshka", "Matryoshka")]  # ours, theirs: theirs has the auxiliary loss by default
METRICS = ("f1", "mcc", "uniqueness", "precision", "recall", "explained_variance", "dead")
# at L0 = 25 and 20, mean of five seeds (Chanin et al. 2026): F1, MCC
PUBLISHED = {
    "Matryoshka": ((25, 0.8793, 0.7927), (20, 0.8601, 0.7455)),
    "BatchTopK": ((25, 0.7316, 0.7574), (20, 0.8183, 0.7526)),
}


def matched(protocol, cells: list[dict]) -> list[dict]:
    """Both curves of a pair, by linear interpolation, at each k of the sweep and between two of them where both curves reach, a
    seed at a time."""
    found, rates = [], best_rates(cells)
    targets = sorted({*protocol.k, *((a + b) / 2 for a, b in pairwise(sorted(protocol.k)))})
    for ours, theirs in PAIRS:
        for seed in protocol.seeds:
            curves = [curve(cells, side, rates.get(side), seed) for side in ((OURS, ours), (THEIRS, theirs))]
            if not all(curves):
                continue
            low, high = max(c["l0"][0] for c in curves), min(c["l0"][-1] for c in curves)
            for l0 in (target for target in targets if low <= target <= high):
                values = {
                    f"{m}_{side}": float(np.interp(l0, c["l0"], c[m]))
                    for m in METRICS
                    for side, c in zip(("ours", "theirs"), curves, strict=True)
                }
                found.append({"ours": ours, "theirs": theirs, "l0": l0, "seed": seed, **values})
    return found


def best_rates(cells: list[dict]) -> dict[tuple[str, str], float]:
    """Of each method of each library, the learning rate with the largest mean of F1 + MCC over k, on the first seed there is."""
    table = pd.DataFrame(cells)
    table = table[table["seed"] == cells[0]["seed"]]
    score = (table["f1"] + table["mcc"]).groupby([table[c] for c in ("library", "method", "lr")]).mean().reset_index(name="score")
    best = score.loc[score.groupby(["library", "method"])["score"].idxmax()]
    return best.set_index(["library", "method"])["lr"].to_dict()


def curve(cells: list[dict], side: tuple[str, str], lr: float | None, seed: int) -> dict[str, list[float]]:
    own = [c for c in cells if (c["library"], c["method"], c["lr"], c["seed"]) == (*side, lr, seed)]
    own.sort(key=lambda c: c["l0"])
    return {name: [c[name] for c in own] for name in ("l0", *METRICS)} if own else {}


def difference(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and the half width of its 95 % interval; NaN from one seed."""
    n = len(values)
    return float(np.mean(values)), float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5) if n > 1 else float("nan")


def report(protocol, bench, cells: list[dict], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    table, pairs = pd.DataFrame(cells), pd.DataFrame(matched(protocol, cells))
    table.round(5).to_csv(out / f"{protocol.size}.csv", index=False)
    pairs.round(5).to_csv(out / f"{protocol.size}-matched.csv", index=False)
    text = [*introduction(protocol, bench), *swept(table)]
    if len(pairs):
        text += comparison(pairs, best_rates(cells))
    if protocol.size == "full":
        text += published()
    (out / f"{protocol.size}.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


def introduction(protocol, bench) -> list[str]:
    device, rows = bench.device, protocol.steps * protocol.batch_size / 1e6
    place = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{platform.machine()}, {torch.get_num_threads()} threads"
    return [
        f"# SynthSAEBench, {protocol.size}",
        "",
        f"`{bench}`; {protocol.n_latents:,} latents, {protocol.steps:,} steps of {protocol.batch_size:,} rows ({rows:.1f} M),",
        f"Adam at {' or '.join(f'{lr:g}' for lr in protocol.lr)} (chosen on the first seed) falling to a tenth over the last fifth,",
        f"seeds {', '.join(map(str, protocol.seeds))}. Scored at inference on {protocol.judge_rows:,} judge rows.",
        f"torch {torch.__version__}, {place}.",
        "Metrics as SynthSAEBench defines them; F1 counts every latent, dead ones as 0.",
        "",
    ]


def swept(table) -> list[str]:
    lines = [
        "| library | method | rate | k | L0 | F1 | MCC | uniqueness | explained variance | dead |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (library, method, lr, k), group in table.groupby(["library", "method", "lr", "k"]):
        mean = group.mean(numeric_only=True)
        values = " | ".join(f"{mean[m]:.4f}" for m in ("f1", "mcc", "uniqueness", "explained_variance", "dead"))
        lines.append(f"| {library} | {method} | {lr:g} | {k} | {mean.l0:.2f} | {values} |")
    return [*lines, ""]


def comparison(pairs, rates: dict[tuple[str, str], float]) -> list[str]:
    lines = ["## At matched L0", "", "Ours minus theirs, paired by seed: mean, and its 95 % interval where there are several.", ""]
    lines += ["Each at its best rate: " + ", ".join(f"{library} {method} {lr:g}" for (library, method), lr in rates.items()) + ".", ""]
    lines += [
        "| ours | theirs | L0 | F1 ours | F1 theirs | difference | MCC ours | MCC theirs | difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (ours, theirs), pair in pairs.groupby(["ours", "theirs"]):
        mean = pair.groupby("seed").mean(numeric_only=True).assign(l0="mean")
        for l0, group in [*pair.groupby("l0"), ("mean", mean)]:
            cells = []
            for metric in ("f1", "mcc"):
                ours_values, their_values = group[f"{metric}_ours"], group[f"{metric}_theirs"]
                centre, half = difference(list(ours_values - their_values))
                cells += [
                    f"{ours_values.mean():.4f}",
                    f"{their_values.mean():.4f}",
                    f"{centre:+.4f}" + (f" ± {half:.4f}" if half == half else ""),
                ]
            lines.append(f"| {ours} | {theirs} | {l0 if l0 == 'mean' else f'{l0:g}'} | {' | '.join(cells)} |")
    return [*lines, ""]


def published() -> list[str]:
    lines = ["## Published (Chanin et al. 2026, five seeds)", "", "| method | L0 | F1 | MCC |", "|---|---|---|---|"]
    return [*lines, *(f"| {method} | {l0} | {f1} | {mcc} |" for method, rows in PUBLISHED.items() for l0, f1, mcc in rows), ""]
