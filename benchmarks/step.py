"""Samples a second of one training step, ours beside others': `make bench`, or

    python benchmarks/step.py [--device cuda] [--quick] [--methods topk relu] [--latents 4096] [--repetitions 7] [--threads 2]

All contenders train the same weights on the same rows with the same threads, each in a process of its own. They take
turns, two steps at a time, and the medians of all steps are compared: what slows the machine slows them all. The
floor is the encoder product alone, measured between them. Writes benchmarks/results/step-DEVICE.{json,md}.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
METHODS = {"topk": "TopK", "batchtopk": "BatchTopK", "relu": "ReLU", "jumprelu": "JumpReLU"}
CONTENDERS = {
    "ours": "sdl_explorer",
    "ours_float32": "sdl_explorer, candidates in float32",
    "bare": "a bare dense loop",
    "sae_lens": "sae-lens",
    "dictionary_learning": "dictionary-learning",
    "sparsify": "eai-sparsify",
    "overcomplete": "overcomplete",
}
NOT_PEERS = {"floor", "ours", "ours_float32", "bare"}
STEPS = 2  # of a turn
SIZES = {"d": 768, "n": 2048, "k": 32, "l0": 64}


class Contender:
    """A process that steps when it is asked to; `missing` says why it does not."""

    def __init__(self, name: str, job: dict, threads: int, packages: Path):
        self.name, self.seconds, self.megabytes = name, [], float("nan")
        environment = os.environ | {"PYTHONPATH": str(packages / name), "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, str(HERE / "peers"), name, json.dumps(job), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.facts = self._answer()
        self.missing = self.facts.get("missing")

    def take(self, steps: int) -> None:
        print(steps, file=self._process.stdin, flush=True)
        answer = self._answer()
        if "seconds" not in answer:
            self.missing = answer["missing"]
            return
        self.seconds += answer["seconds"]
        self.megabytes = answer["megabytes"]

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        said = [line for line in self._process.stderr.read().splitlines() if line.strip()]
        reason = next((line for line in reversed(said) if "Error" in line), said[-1] if said else f"exit {self._process.wait()}")
        return {"missing": f"stopped: {reason[:120]}"}

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.stderr.close()
        self._process.wait()


def compare(job: dict, names: list[str], repetitions: int, threads: int, packages: Path) -> dict:
    """{contender: figures} of one method at one size."""
    contenders = []
    try:
        for name in ["floor", *names]:
            contenders.append(Contender(name, job, threads, packages))
        here = [c for c in contenders if not c.missing]
        turns = random.Random(0)
        for _ in range(repetitions):  # in another order each time: a step after a heavy neighbour's finds its caches cold
            for contender in turns.sample(here, len(here)):
                if not contender.missing:
                    contender.take(STEPS)
    finally:
        for contender in contenders:
            contender.close()
    rows = {}
    for c in contenders:
        facts = {"missing": c.missing} if c.missing else {"seconds": c.seconds, "megabytes": c.megabytes}
        rows[c.name] = c.facts | facts
    return rows


def figures(job: dict, rows: dict) -> dict:
    """{contender: samples a second, fraction of the floor, ratio to the best peer and megabytes}, of those that ran."""
    speed = {name: job["n"] / statistics.median(row["seconds"]) for name, row in rows.items() if not row.get("missing")}
    best = max((speed[name] for name in speed if name not in NOT_PEERS), default=float("nan"))
    return {
        name: {
            "samples_a_second": s,
            "of_the_floor": s / speed["floor"],
            "to_the_best_peer": s / best,
            "megabytes": rows[name]["megabytes"],
            "l0": rows[name]["l0"],
        }
        for name, s in speed.items()
    }


def table(job: dict, rows: dict) -> str:
    """One method at one size, as markdown."""
    found = figures(job, rows)
    head = f"### {METHODS[job['method']]}, n_latents = {job['m']:,}\n\n"
    state = f"k = {job['k']}" if "topk" in job["method"] else ("dense: as at the start" if job["l0"] == 0 else f"L0 near {job['l0']}")
    head += f"{state}; floor (encoder product alone) {found['floor']['samples_a_second']:,.0f} samples/s\n\n"
    lines = ["| | version | samples/s | of the floor | to the best peer | peak memory |", "|---|---|---:|---:|---:|---:|"]
    for name, label in CONTENDERS.items():
        if name not in rows:
            continue
        if name not in found:
            lines.append(f"| {label} | | {rows[name]['missing']} | | | |")
            continue
        f = found[name]
        lines.append(
            f"| {label} | {rows[name]['version']} | {f['samples_a_second']:,.0f} | {f['of_the_floor']:.2f} | "
            f"{f['to_the_best_peer']:.2f} | {f['megabytes']:,.0f} MB |"
        )
    return head + "\n".join(lines) + "\n"


def summary(runs: list[dict]) -> str:
    """The README's table: ours beside the best other library, a line for each method and size."""
    lines = ["| | n_latents | samples/s | of the encoder product alone | best other library | sae-lens |", "|---|---:|---:|---:|---:|---:|"]
    for run in runs:
        job, found = run["job"], run["figures"]
        ours = found["ours"]["samples_a_second"]
        times = lambda name, ours=ours, found=found: f"{ours / found[name]['samples_a_second']:.1f}x" if name in found else "-"
        best = max(found.keys() - NOT_PEERS, key=lambda name: found[name]["samples_a_second"], default="")
        label = METHODS[job["method"]] + ("" if "topk" in job["method"] else f", L0 near {job['l0']}" if job["l0"] else ", dense")
        lines.append(
            f"| {label} | {job['m']:,} | {ours:,.0f} | {found['ours']['of_the_floor']:.2f} | "
            f"{times(best)}{f' ({CONTENDERS[best]})' if best else ''} | {times('sae_lens')} |"
        )
    return "\n".join(lines) + "\n"


def machine(device: str, threads: int) -> dict:
    import torch

    facts = {
        "date": date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": torch.cpu.get_capabilities().get("cpu_name", "") if hasattr(torch.cpu, "get_capabilities") else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "amx_bf16": bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)),
        "cores": os.cpu_count(),
        "threads": threads,
        "load at the start": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return facts | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="n_latents 4096 alone, 2 repetitions")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--latents", nargs="+", type=int)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--toy", action="store_true", help="d = 64, n_latents = 256, k = 4 instead")
    parser.add_argument("--dense", action="store_true", help="ReLU and JumpReLU as at the start of a run, half of all latents active")
    parser.add_argument("--packages", type=Path, default=Path(sys.prefix) / "peers", help="a folder with one of packages for each peer")
    parser.add_argument("--output", type=Path, help="written as OUTPUT.json and OUTPUT.md")
    args = parser.parse_args()
    latents = args.latents or ([256] if args.toy else [4096] if args.quick else [4096, 16384, 65536])
    sizes = SIZES | ({"d": 64, "k": 4} if args.toy else {}) | ({"l0": 0} if args.dense else {})
    output = args.output or HERE / "results" / f"step-{'toy-' if args.toy else ''}{'dense-' if args.dense else ''}{args.device}"

    facts, runs, tables = machine(args.device, args.threads), [], []
    about = ", ".join(f"{key} {value}" for key, value in facts.items())
    print(about + "\n")
    for m in latents:
        for method in args.methods:
            job = {"method": method, "m": m, "device": args.device} | sizes
            repetitions = args.repetitions or (100 if args.toy else 2 if args.quick or m > 20_000 else 4)
            rows = compare(job, args.contenders, repetitions, args.threads, args.packages)
            runs.append({"job": job, "repetitions": repetitions, "contenders": rows, "figures": figures(job, rows)})
            tables.append(table(job, rows))
            print(tables[-1], flush=True)
            output.parent.mkdir(parents=True, exist_ok=True)
            output.with_suffix(".json").write_text(json.dumps({"machine": facts, "runs": runs}, indent=1) + "\n")
            title = f"# One training step, d = {sizes['d']}, batch {sizes['n']:,}, float32"
            steps = " or ".join(str(n) for n in sorted({STEPS * run["repetitions"] for run in runs}))
            about_run = f"{about}. Medians of {steps} steps, taken in turns."
            output.with_suffix(".md").write_text(f"{title}\n\n{about_run}\n\n{summary(runs)}\n" + "\n".join(tables))


if __name__ == "__main__":
    main()
