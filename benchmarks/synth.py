"""SynthSAEBench: our training against that of sae-lens on data whose features are known.

    python benchmarks/synth.py                                      the scaled protocol: 1,024 features in 128 dimensions, three seeds
    python benchmarks/synth.py --seeds 0 --steps 300 --k 4 6        a short look
    python benchmarks/synth.py --lr 1e-3 3e-3                       each method of each library at its best rate
    python benchmarks/synth.py --size full --device cuda            SynthSAEBench-16k-v2 as published, ours alone (--peer adds theirs)

Both libraries train on the same rows in the same order: at the scaled size from one recorded file a seed, at the full size from the
same generator. sae-lens runs in an environment of its own (`make oracle` makes it). Every dictionary is then scored by one function on
the same judge rows, as it is used at inference, and compared at matched L0: each curve over k is read off there by linear
interpolation. Of several learning rates, the first seed trains all, and each method of each library goes on at the one where its
mean of F1 + MCC over k is largest. Cells are kept under runs/synth and are not trained again; tables go to benchmarks/results/synth.

sae-lens trains with its own defaults; ours with RECIPE, which has the same ingredients (free rows that start small, a subtracted
decoder bias, a gradient of norm at most 1, an auxiliary loss, latents that compete by what they write) and RAMPS. Both
were chosen on the first seed.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # sae-lens lives where sdl_explorer is not installed

from synth_tables import OURS, PAIRS, THEIRS, best_rates, report  # noqa: E402  the file beside this one

from sdl_explorer.data.activations import Activations  # noqa: E402
from sdl_explorer.data.sources import stream  # noqa: E402
from sdl_explorer.data.synth import SynthBench  # noqa: E402

ORACLE = ROOT / ".venv-oracle"
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # widths of the inner prefixes in both libraries; then all
BLOCK = 2_000
RECIPE = {"unit_norm": False, "init_norm": 0.1, "by": "contribution", "aux": 4.0}
CLIP_NORM = 1.0
RAMPS = {"Matryoshka": 4}  # k starts at so many times its value, and falls to it over the first third


@dataclass(frozen=True)
class Protocol:
    """What one size means. `record`: write the training rows of a seed to a file once, instead of drawing them for each cell."""

    size: str
    n_latents: int
    steps: int
    lr: tuple[float, ...]
    k: tuple[int, ...]
    seeds: tuple[int, ...]
    judge_rows: int
    record: bool
    batch_size: int = 1024
    dead_after: int = 100_000

    def bench(self, device: str = "cpu") -> SynthBench:
        return SynthBench.full(device=device) if self.size == "full" else SynthBench(device=device)


SCALED = Protocol(
    "scaled", n_latents=256, steps=1_500, lr=(3e-3, 6e-3, 12e-3), k=(3, 5, 8), seeds=(0, 1, 2), judge_rows=50_000, record=True
)
FULL = Protocol(
    "full",
    n_latents=4096,
    steps=195_312,
    lr=(3e-4,),
    k=(20, 25),
    seeds=(0, 1, 2, 3, 4),
    judge_rows=500_000,
    record=False,
    dead_after=1_000_000,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["scaled", "full"], default="scaled")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--steps", type=int, help="steps of 1,024 rows")
    parser.add_argument("--k", type=int, nargs="+")
    parser.add_argument("--lr", type=float, nargs="+", help="of both libraries; of several, each method is compared at its best")
    parser.add_argument("--judge-rows", type=int, help="rows that dictionaries are scored on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, help="train sae-lens too (default: at the scaled size)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "synth")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "synth")
    parser.add_argument("--train-theirs", type=Path, help=argparse.SUPPRESS)  # this script in the other environment
    given = parser.parse_args()
    if given.train_theirs is not None:
        return train_theirs(given.train_theirs)
    asked = {"seeds": given.seeds, "steps": given.steps, "k": given.k, "lr": given.lr, "judge_rows": given.judge_rows}
    base = SCALED if given.size == "scaled" else FULL
    protocol = replace(base, **{name: tuple(v) if isinstance(v, list) else v for name, v in asked.items() if v is not None})
    peer = given.size == "scaled" if given.peer is None else given.peer
    bench = protocol.bench(given.device)
    cells = run(protocol, bench, peer, given.runs / f"{protocol.size}-{protocol.steps}")
    report(protocol, bench, cells, given.out)


# training ------------------------------------------------------------------------------------------------------------


def run(protocol: Protocol, bench: SynthBench, peer: bool, folder: Path) -> list[dict]:
    """One record a cell, trained where it is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    device = bench.device
    bench.save(folder / "model")
    methods = {OURS: sorted({ours for ours, _ in PAIRS}), THEIRS: sorted({theirs for _, theirs in PAIRS}) if peer else []}
    cells = []
    for seed in protocol.seeds:
        rates = best_rates(cells) if cells else {}
        wanted = [
            (library, method, k, lr, seed)
            for library in methods
            for method in methods[library]
            for k in protocol.k
            for lr in ([rates[library, method]] if rates else protocol.lr)
        ]
        missing = [cell for cell in wanted if not record_of(folder, cell).is_file()]
        rows = recorded(protocol, bench, seed, folder) if protocol.record and missing else None
        theirs = [cell for cell in missing if cell[0] == THEIRS]
        if theirs:
            jobs = [{"method": m, "k": k, "lr": lr, "out": str(folder / name_of(cell))} for cell in theirs for _, m, k, lr, _ in [cell]]
            plan = {"protocol": asdict(protocol), "seed": seed, "device": device, "rows": str(rows) if rows else None, "jobs": jobs}
            (folder / "theirs.json").write_text(json.dumps(plan | {"model": str(folder / "model")}))
            python = ORACLE / ("Scripts" if sys.platform == "win32" else "bin") / "python"
            if not python.exists():
                raise FileNotFoundError(
                    f"{python} is not there, and sae-lens trains in it. Run make oracle, or leave it out with --no-peer."
                )
            subprocess.run([python, __file__, "--train-theirs", folder / "theirs.json"], check=True)
        for cell in missing:
            library, method, k, lr, seed = cell
            if library == OURS:
                dictionary, seconds = train_ours(protocol, method, k, lr, seed, bench, rows, device)
            else:
                dictionary, seconds = read_theirs(folder / name_of(cell))
            found = score(dictionary.to(device), bench, protocol.judge_rows)
            found = {"library": library, "method": method, "k": k, "lr": lr, "seed": seed, **found, "seconds": round(seconds, 1)}
            record_of(folder, cell).write_text(json.dumps(found))
            print(
                f"{library:12} {method:12} k={k:<3} lr={lr:<6g} seed={seed}  "
                + "  ".join(f"{m} {found[m]:.3f}" for m in ("l0", "f1", "mcc")),
                flush=True,
            )
        cells += [json.loads(record_of(folder, cell).read_text()) for cell in wanted]
        if rows is not None:
            rows.unlink()
    return cells


def name_of(cell: tuple) -> str:
    return "-".join(map(str, cell))


def record_of(folder: Path, cell: tuple) -> Path:
    return folder / f"{name_of(cell)}.json"


def recorded(protocol: Protocol, bench: SynthBench, seed: int, folder: Path) -> Path:
    """The training rows of a seed, in order: rows of step i are [i * batch_size, (i + 1) * batch_size)."""
    path, size = folder / f"rows-{seed}.npy", protocol.batch_size
    rows = np.lib.format.open_memmap(path, "w+", dtype=np.float32, shape=(protocol.steps * size, bench.width_in))
    for step in range(protocol.steps):
        rows[step * size : (step + 1) * size] = bench.batch(step, size, order=seed).inputs.cpu().numpy()
    rows.flush()
    return path


class Rows:
    """Training batches: of the recorded file, or drawn."""

    def __init__(self, bench: SynthBench, path: Path | None, seed: int):
        self.bench, self.seed = bench, seed
        self.stored = None if path is None else np.load(path, mmap_mode="r")

    def batch(self, index: int, size: int, order: int = 0) -> Activations:
        if self.stored is None:
            return self.bench.batch(index, size, order=self.seed)
        inputs = torch.from_numpy(self.stored[index * size : (index + 1) * size].copy())
        return Activations(inputs, inputs)


def train_ours(protocol: Protocol, method: str, k: int, lr: float, seed: int, bench: SynthBench, path: Path | None, device: str):
    """The dictionary in eval mode, and the seconds of its training."""
    from sdl_explorer.models import methods
    from sdl_explorer.training.loop import train
    from sdl_explorer.training.state import Schedule, TrainState

    settings = {"k": k, **RECIPE} | ({"prefixes": list(SHARES)} if method == "Matryoshka" else {})
    recipe = getattr(methods, method)(**settings)
    dictionary = recipe.build(bench.width_in, bench.width_out, protocol.n_latents, stream(seed, "weights")).to(device)
    dictionary.subtract_b_dec = True
    ramps = [("k", RAMPS[method] * k, protocol.steps // 3)] if method in RAMPS else []
    schedule = Schedule(lr, decay_steps=protocol.steps, ramps=ramps)
    state = TrainState.start(dictionary, schedule, seed, protocol.dead_after)
    state.clip_norm = CLIP_NORM
    began = time.perf_counter()
    loop = train(state, recipe, Rows(bench, path, seed), batch_size=protocol.batch_size)
    for _ in range(protocol.steps):
        next(loop)
    return dictionary.eval(), time.perf_counter() - began


def train_theirs(plan_path: Path) -> None:
    """Runs in the environment of sae-lens: its trainer with its defaults, and our rate, decay and window of dead latents."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    kinds = {
        "BatchTopK": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
        "Matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
    }
    plan = json.loads(plan_path.read_text())
    protocol = Protocol(**{k: tuple(v) if isinstance(v, list) else v for k, v in plan["protocol"].items()})
    bench = SynthBench(plan["model"], device=plan["device"])
    source = Rows(bench, None if plan["rows"] is None else Path(plan["rows"]), plan["seed"])
    widths = [round(share * protocol.n_latents) for share in (*SHARES, 1)]
    for job in plan["jobs"]:
        if (Path(job["out"]) / "seconds.json").exists():  # of a run that was interrupted
            continue
        torch.manual_seed(plan["seed"])
        kind, config = kinds[job["method"]]
        nested = {"matryoshka_widths": widths} if job["method"] == "Matryoshka" else {}
        sae = kind(config(d_in=bench.width_in, d_sae=protocol.n_latents, k=job["k"], device=plan["device"], **nested))
        batches = (source.batch(i, protocol.batch_size).inputs.to(plan["device"]) for i in range(protocol.steps))
        trainer = SAETrainerConfig(
            total_training_samples=protocol.steps * protocol.batch_size,
            train_batch_size_samples=protocol.batch_size,
            lr=job["lr"],
            lr_end=job["lr"] / 10,
            lr_decay_steps=protocol.steps // 5,
            device=plan["device"],
            dead_feature_window=max(1, protocol.dead_after // protocol.batch_size),
            logger=LoggingConfig(log_to_wandb=False),
        )
        began = time.perf_counter()
        SAETrainer(trainer, sae, batches).fit()
        seconds = time.perf_counter() - began
        sae.save_inference_model(job["out"])
        (Path(job["out"]) / "seconds.json").write_text(json.dumps(seconds))


def read_theirs(folder: Path):
    from sdl_explorer.models.dictionary import SparseDictionary

    return SparseDictionary.load(folder, format="saelens"), json.loads((folder / "seconds.json").read_text())


# scoring -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score(dictionary, source, n: int) -> dict[str, float]:
    """The metrics of SynthSAEBench, a block of rows at a time.

    Each latent is a classifier of the feature with the largest |cosine| to its decoder row: precision, recall and F1 of
    z != 0, undefined ones 0, averaged over all latents, dead ones included. mcc: mean |cosine| of the one-to-one matching of
    decoder rows. uniqueness: share of distinct best features. Explained variance is pooled over all rows and columns.
    """
    from sdl_explorer.diagnosis.alignment import align

    dictionary = dictionary.eval()
    cosines = (normalize(dictionary.W_dec, dim=1) @ source.features.T).abs()
    best = cosines.argmax(dim=1)
    hits, fired, active = torch.zeros(3, dictionary.n_latents, dtype=torch.float64, device=best.device)
    error = l0 = 0.0
    total, squares = torch.zeros(dictionary.d_in, dtype=torch.float64, device=best.device), 0.0
    generator = stream("synth", "judge")
    for start in range(0, n, BLOCK):
        block = source.sample(min(BLOCK, n - start), generator)
        encoding = dictionary(block.inputs)
        fires = dense(encoding.latents) != 0
        truly = block.truth.codes[:, best] > 0
        hits += (fires & truly).sum(dim=0)
        fired += fires.sum(dim=0)
        active += truly.sum(dim=0)
        l0 += float(fires.sum())
        error += float((block.inputs - encoding.reconstruction).double().square().sum())
        total += block.inputs.double().sum(dim=0)
        squares += float(block.inputs.double().square().sum())
    precision, recall = hits / fired.clamp_min(1), hits / active.clamp_min(1)
    return {
        "l0": l0 / n,
        "f1": (2 * hits / (fired + active).clamp_min(1)).mean().item(),
        "mcc": align(dictionary, source.sample(BLOCK, generator)).mcc,
        "uniqueness": len(best.unique()) / len(best),
        "precision": precision.mean().item(),
        "recall": recall.mean().item(),
        "explained_variance": 1 - error / (squares - float(total.square().sum()) / n),
        "dead": (fired == 0).double().mean().item(),
    }


def dense(latents) -> torch.Tensor:
    return latents.dense() if latents.is_sparse else latents.values


if __name__ == "__main__":
    main()
