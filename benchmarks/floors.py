"""What dictionaries that know nothing score: mean max cosine (MMCS) and matched cosine (MCC) of random rows with random features.

    python benchmarks/floors.py     seconds

Compares simulation with the closed form that `align` shows beside its scores (`diagnosis.chance.Chance`). MMCS is the mean over features
of the best cosine with any latent, MCC that of a one-to-one matching on absolute cosines. Writes benchmarks/results/floors.md.
"""

import argparse
import platform
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize

from sdl_explorer.data.sources import stream
from sdl_explorer.diagnosis.chance import Chance
from sdl_explorer.experiments.outcome import markdown_table

OUT = Path("benchmarks/results/floors.md")
SIZES = (
    (50, 4, 4, 400),
    (64, 256, 256, 8),
    (64, 1024, 1024, 2),
    (128, 512, 512, 4),
    (768, 4096, 1000, 1),
    (768, 16000, 1000, 1),
)  # d, m, n, runs
MATCHED = 5e6  # cells of a matching that takes a second


def floors(d: int, m: int, n: int, runs: int) -> dict[str, object]:
    """Mean over runs; a matching of more than 5 million cells is left out."""
    signed, absolute, matched = [], [], []
    for run in range(runs):
        generator = stream("floors", d, m, n, run)
        features, rows = (normalize(torch.randn(k, d, generator=generator), dim=1) for k in (n, m))
        cosines = features @ rows.T
        sizes = cosines.abs()
        signed.append(cosines.max(dim=1).values.mean().item())
        absolute.append(sizes.max(dim=1).values.mean().item())
        if n * m <= MATCHED:
            matched.append(sizes.numpy()[linear_sum_assignment(sizes.numpy(), maximize=True)].mean())
    chance = Chance(m, n, d, d)
    return {
        "d": d,
        "latents": m,
        "features": n,
        "runs": runs,
        "MMCS": float(np.mean(signed)),
        "closed form": chance.mean_best(),
        "MMCS, absolute": float(np.mean(absolute)),
        "closed form, absolute": chance.mean_best(signed=False),
        "sqrt(2 ln(2m) / d)": float(np.sqrt(2 * np.log(2 * m) / d)),
        "MCC": float(np.mean(matched)) if matched else None,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    table = pd.DataFrame([floors(*size) for size in SIZES])
    head = (
        f"`python benchmarks/floors.py`, some seconds of one CPU core ({platform.machine()}, torch {torch.__version__}); each size has "
        "seeds of its own. The last line has the size of arXiv 2512.05534, table 1, where a ReLU SAE is printed with 0.205 (encoder, "
        f"absolute cosines): {table['MMCS, absolute'].iloc[-1]:.3f} is what rows that know nothing score."
    )
    OUT.write_text("\n\n".join(["# Floors: what random dictionaries score", head, markdown_table(table)]) + "\n")
    print(table.to_string())


if __name__ == "__main__":
    main()
