"""How long one survey takes: every streaming finding from one pass, at the size of a real dictionary.

    python benchmarks/survey.py                       this machine's device, a minute or two
    python benchmarks/survey.py --quick               n_latents 2048 on 10,000 rows
    python benchmarks/survey.py --methods half --rows 10000      ReLU without a bias, of which half of the latents fire on a row
    python benchmarks/survey.py --methods TopK --twins           two seeds as well, compared by the correlation of their codes

n_features = 1,000, d = 256, k = 32, 100,000 rows; n_latents = 16,384, and 131,072 on CUDA as well. The dictionary is as built, and its
threshold or bias is set so that 32 latents fire on a row; "half" is ReLU without one. The floor is the encoder's product alone,
x W_enc^T + b_enc in float32.
CPU time is that of all threads of the survey: what a loaded machine leaves of the figure. Memory is the peak of the pass beyond
the model and the rows, which both exist before it.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from sdl_explorer.data.bench import LinearBench
from sdl_explorer.data.sources import stream
from sdl_explorer.diagnosis.cached import CachedFindings
from sdl_explorer.diagnosis.observe import Kept, encoded, evaluating, observe
from sdl_explorer.diagnosis.twins import find_twins
from sdl_explorer.models.methods import BatchTopK, JumpReLU, ReLU, TopK
from sdl_explorer.survey import codes_of, findings_for, take_survey

HERE = Path(__file__).parent
KNOWN = {"samples_since_fired": None, "dead_after": None, "pins": None, "anchors": None}
METHODS = {"TopK": TopK, "BatchTopK": BatchTopK, "JumpReLU": JumpReLU, "ReLU": ReLU, "half": ReLU}
K, D, N_FEATURES = 32, 256, 1000


def built(name: str, n_latents: int, rows, device: str, seed: int = 0):
    """A dictionary of which about K latents fire on a row, or half of them."""
    method = METHODS[name](k=K) if "TopK" in name else METHODS[name]()
    dictionary = method.build(D, D, n_latents, stream(seed, "weights")).eval()
    if name not in ("TopK", "half"):
        with torch.no_grad():
            bound = dictionary.pre(rows.inputs[:512]).flatten().topk(512 * K).values.min()
            dictionary.b_enc.sub_(bound) if name == "ReLU" else dictionary.nonlinearity.threshold.fill_(bound)
    return dictionary.to(device)


class Memory:
    """The peak beyond what there was at the start, in MB: of the GPU's, or of the process's where the system tells."""

    def __init__(self, device: str):
        self.device = device

    def __enter__(self):
        gc.collect()
        if trim := getattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "malloc_trim", None):
            trim(0)  # what earlier work has freed and the process still holds
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 1e6
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self._resident("VmRSS")
        return self

    def __exit__(self, *_):
        if self.device == "cuda":
            self.peak = torch.cuda.max_memory_allocated() / 1e6 - self.before
        else:
            self.peak = self._resident("VmHWM") - self.before if hasattr(self, "before") else float("nan")

    def _resident(self, name: str) -> float:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[name].split()[0]) / 1e3


def timed(device: str, work) -> float:
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def floor(dictionary, rows) -> None:
    size = 512 if dictionary.device.type == "cpu" else 4096
    out = torch.empty(size, dictionary.n_latents, device=dictionary.device)
    with torch.no_grad():
        for x in rows.inputs.split(size):
            torch.addmm(dictionary.b_enc, x, dictionary.W_enc.T, out=out[: len(x)])


def encode(dictionary, rows, kept: Kept | None = None) -> None:
    with evaluating(dictionary):
        for _ in encoded(dictionary, rows, kept=kept):
            pass


def compared(name: str, n_latents: int, rows, device: str) -> dict:
    """Two seeds, by the correlation of their codes."""
    here, there = (built(name, n_latents, rows, device, seed) for seed in (0, 1))
    found = {}
    with Memory(device) as memory:
        spent = time.process_time()
        seconds = timed(device, lambda: found.update(twins=find_twins(here, rows.to(device), there, by="activations")))
        spent = time.process_time() - spent
    return {"seconds": seconds, "cpu": spent, "megabytes": memory.peak, "said": repr(found["twins"])}


def measure(name: str, n_latents: int, rows, device: str, alone: bool, twins: bool) -> dict:
    dictionary, source = built(name, n_latents, rows, device), LinearBench(n_features=N_FEATURES, d_in=D, max_interference=0.3)
    here = rows.to(device)
    floor(dictionary, here.take(slice(0, 4096)))
    encode(dictionary, here.take(slice(0, 4096)))
    row = {"method": name, "n_latents": n_latents, "rows": rows.n, "floor": timed(device, lambda: floor(dictionary, here))}
    row["encode"] = timed(device, lambda: encode(dictionary, here))
    with tempfile.TemporaryDirectory() as folder:
        view = {"dictionary": dictionary, "key": 0}
        survey = lambda: take_survey(
            CachedFindings(), view, here, KNOWN, lambda done: None, codes_of(Path(folder), dictionary, source, 0, rows.n, writes=True)
        )
        with Memory(device) as memory:
            spent = time.process_time()
            row["survey"] = timed(device, lambda: row.update(l0=survey()["check_health"].l0))
            row["survey_cpu"] = time.process_time() - spent
        row["megabytes"] = memory.peak
        row["codes_megabytes"] = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors")) / 1e6
        kept = codes_of(Path(folder), dictionary, source, 0, rows.n)
        row["decode"] = timed(device, lambda: encode(dictionary, here, kept))
        row["again"] = timed(device, survey)
        if alone:
            findings = findings_for(here, None)[0]
            row["alone"] = {f.__name__: timed(device, lambda f=f: observe(dictionary, here, [f], kept=kept)) for f in findings}
    if twins:
        row["twins"] = compared(name, n_latents, rows, device)
    return row


def table(rows: list[dict]) -> str:
    head = [
        "",
        "n_latents",
        "rows",
        "L0",
        "floor, s",
        "encode, s",
        "**survey, s**",
        "CPU time, s",
        "peak MB",
        "codes on disk, MB",
        "survey again, s",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for r in rows:
        lines.append(
            f"| {r['method']} | {r['n_latents']:,} | {r['rows']:,} | {r['l0']:.1f} | {r['floor']:.1f} | {r['encode']:.1f} | "
            f"**{r['survey']:.1f}** | {r['survey_cpu']:.1f} | {r['megabytes']:,.0f} | {r['codes_megabytes']:.0f} | {r['again']:.1f} |"
        )
    text = "\n".join(lines) + "\n"
    for r in rows:
        if "alone" in r:
            said = f"one finding from kept codes, of which reading and decoding take {r['decode']:.1f} s"
            text += f"\n{r['method']}, {r['n_latents']:,}: {said}\n\n"
            text += "| | s |\n|---|---:|\n" + "".join(f"| {name} | {seconds:.1f} |\n" for name, seconds in r["alone"].items())
        if "twins" in r:
            t = r["twins"]
            text += f"\n`find_twins` of two seeds by activations, {r['method']}, {r['n_latents']:,} latents each, {r['rows']:,} rows: "
            text += f"{t['seconds']:.1f} s ({t['cpu']:.1f} s of CPU), {t['megabytes']:,.0f} MB. It says: {t['said']}\n"
    return text


def machine(device: str) -> dict:
    facts = {
        "date": date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": torch.cpu.get_capabilities().get("cpu_name", "") if hasattr(torch.cpu, "get_capabilities") else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load at the start": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return facts | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[name for name in METHODS if name != "half"])
    parser.add_argument("--latents", nargs="+", type=int)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--alone", action="store_true", help="each finding by itself, too")
    parser.add_argument("--twins", action="store_true", help="find_twins of two seeds, too")
    parser.add_argument("--output", type=Path, help="a folder for DEVICE.json and DEVICE.md; none: printed alone")
    args = parser.parse_args()
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    latents = args.latents or ([2048] if args.quick else [16_384] if device == "cpu" else [16_384, 131_072])
    torch.set_num_threads(args.threads)
    facts = machine(device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()) + "\n", flush=True)
    source = LinearBench(n_features=N_FEATURES, d_in=D, max_interference=0.3)
    rows = source.sample(args.rows or (10_000 if args.quick else 100_000), stream(0, "survey"))
    runs = []
    for n_latents in latents:
        for name in args.methods:
            runs.append(measure(name, n_latents, rows, device, args.alone, args.twins))
            print(json.dumps(runs[-1]), flush=True)
            if args.output:
                write(args.output / f"{device}.json", facts, runs)
    print("\n" + table(runs))


def write(path: Path, facts: dict, runs: list[dict]) -> None:
    """The figures of this call; those of earlier ones for other methods and sizes stay."""
    same = lambda a, b: all(a[k] == b[k] for k in ("method", "n_latents", "rows"))
    before = json.loads(path.read_text())["runs"] if path.exists() else []
    command = " ".join(["python", "benchmarks/survey.py", *sys.argv[1:]])
    runs = [r | {"command": command, "load": facts["load at the start"]} for r in runs]
    runs = [r for r in before if not any(same(r, new) for new in runs)] + runs
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": facts, "runs": runs}, indent=1) + "\n")
    about = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "load at the start")
    commands = "\n".join(
        f"    {told}    # load {load} at the start" for told, load in dict.fromkeys((r["command"], r["load"]) for r in runs)
    )
    title = f"# One survey: d = {D}, n_features = {N_FEATURES:,}, k = {K}"
    said = (__doc__ or "").split("\n\n")[2].strip()
    path.with_suffix(".md").write_text(f"{title}\n\n{said}\n\n{about}. Seed 0, one run each:\n\n{commands}\n\n{table(runs)}")


if __name__ == "__main__":
    main()
