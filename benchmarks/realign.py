"""What Realign buys and what it costs, against equally long controls and against a tied encoder.

    python benchmarks/realign.py --size small                        200 features, one seed, minutes on two cores
    python benchmarks/realign.py --size paper --seeds 0 1 2          1,000 features in 768 dimensions, 2,000 latents (--device cuda)

For an SAE, a transcoder and a crosscoder on LinearBench, TopK is trained; then, from that one state and on the same batches, it
trains on (a) without a change, the control, (b) realigned once, with pulls of several strengths. Scored on judge rows that neither
training nor the choice of directions saw: recovery of the true features at tau = 0.95 in encoder, decoder and response, mean best
cosines, unexplained variance, L0, dead latents. Where inputs are their own targets, a tied encoder trained as long from the start
stands beside. The agreement of encoder and response is not shown: Realign sets it.

Writes SIZE.csv (every arm, seed and moment) and SIZE.md (means over seeds) to benchmarks/results/realign.
"""

import argparse
import copy
import itertools
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from scipy.stats import t as student

from sdl_explorer import LinearBench, Realign, TopK, align, check_health
from sdl_explorer.data.activations import Activations
from sdl_explorer.data.sources import stream
from sdl_explorer.diagnosis.observe import observe
from sdl_explorer.models.methods import Method
from sdl_explorer.training.loop import train
from sdl_explorer.training.plan import Plan
from sdl_explorer.training.state import Schedule, TrainState

KINDS = ("sae", "transcoder", "crosscoder")
PULLS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
TAU = 0.95
COLUMNS = {
    "encoder": f"encoder > {TAU}",
    "decoder": f"decoder > {TAU}",
    "response": f"response > {TAU}",
    "mean_encoder": "mean cos, encoder",
    "mean_decoder": "mean cos, decoder",
    "unexplained": "unexplained variance",
    "l0": "L0",
    "dead": "dead",
}


@dataclass(frozen=True)
class Size:
    """Data, dictionary and budget. `steps` before the intervention, `after` it."""

    n_features: int
    d_in: int
    sparsity: float
    max_interference: float
    n_latents: int
    k: int = 10
    steps: int = 800
    after: int = 400
    batch_size: int = 512
    lr: float = 1e-3
    warmup_steps: int = 50
    choose_rows: int = 65_536
    judge_rows: int = 10_000

    def source(self, kind: str, seed: int) -> LinearBench:
        return LinearBench(
            n_features=self.n_features,
            d_in=self.d_in,
            sparsity=self.sparsity,
            max_interference=self.max_interference,
            kind=kind,
            seed=seed,
        )


SIZES = {
    "small": Size(200, 154, 0.95, 0.2, n_latents=400, choose_rows=32_768),
    "paper": Size(1_000, 768, 0.99, 0.1, n_latents=2_000, judge_rows=50_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--pulls", type=float, nargs="+", default=list(PULLS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/realign"))
    options = parser.parse_args()
    size, rows, began = SIZES[options.size], [], time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    for kind, seed in itertools.product(options.kinds, options.seeds):
        for row in study(size, kind, seed, options.device, tuple(options.pulls)):
            rows.append({"kind": kind, "seed": seed, **row})
            print(f"{time.perf_counter() - began:6.0f} s  {kind} {seed}  {row['arm']}, +{row['after']}: " + _line(row), flush=True)
        pd.DataFrame(rows).to_csv(options.out / f"{options.size}.csv", index=False, float_format="%.6g")
    text = report(pd.DataFrame(rows), options.size, options.seeds, options.device, time.perf_counter() - began)
    (options.out / f"{options.size}.md").write_text(text)


def study(size: Size, kind: str, seed: int, device: str, strengths: tuple[float, ...] = PULLS) -> Iterator[dict]:
    """Every arm of one kind and seed, as rows of the table."""
    source, method = size.source(kind, seed), TopK(k=size.k)
    judge = source.sample(size.judge_rows, stream(seed, "judge"), "judge").to(device)
    choose = source.sample(size.choose_rows, stream(seed, "choose"), "choose").to(device)

    start = begun(size, source, method, seed, device)
    advance(start, method, source, size, size.steps)
    yield {"arm": "before", "pull": None, "after": 0} | measure(start, judge)

    control = copy.deepcopy(start)
    yield from onwards(control, "control: trained on", None, method, source, size, judge)

    for refit, pulls in (("norm", (0.1,)), ("size", strengths)):
        plan = Realign(refit=refit, pull=1.0, choose_rows=size.choose_rows).plan(start, choose, stream(seed, "plan"))
        print(f"          {plan.reading}")
        for pull in pulls:
            state = copy.deepcopy(start)
            pulled_by(plan, pull).apply(state)
            name = "+ realign" if refit == "size" else "+ realign, norm kept"
            if pull == pulls[0]:
                yield {"arm": f"{name}, at once", "pull": None, "after": 0} | measure(state, judge)
            yield from onwards(state, f"{name}, pull {pull:g}", pull, method, source, size, judge)

    if kind != "transcoder":
        tied = TopK(k=size.k, tie="tied")
        state = begun(size, source, tied, seed, device)
        advance(state, tied, source, size, size.steps)
        yield {"arm": "tied encoder", "pull": None, "after": 0} | measure(state, judge)
        yield from onwards(state, "tied encoder", None, tied, source, size, judge)


def pulled_by(plan: Plan, pull: float) -> Plan:
    """The same plan with another strength."""
    pulls = plan.changed_pulls
    return replace(plan, changed_pulls=replace(pulls, weight=torch.full_like(pulls.weight, pull)) if pull else None)


def onwards(state: TrainState, arm: str, pull: float | None, method: Method, source, size: Size, judge: Activations) -> Iterator[dict]:
    """Rows after half and after all of the steps that follow."""
    for part in (size.after // 2, size.after - size.after // 2):
        advance(state, method, source, size, part)
        yield {"arm": arm, "pull": pull, "after": state.step - size.steps} | measure(state, judge)


def begun(size: Size, source: LinearBench, method: Method, seed: int, device: str) -> TrainState:
    dictionary = method.build(source.width_in, source.width_out, size.n_latents, stream(seed, "weights")).to(device)
    return TrainState.start(dictionary, Schedule(size.lr, size.warmup_steps), seed, source.dead_after)


def advance(state: TrainState, method: Method, source: LinearBench, size: Size, n: int) -> None:
    for _ in itertools.islice(train(state, method, source, batch_size=size.batch_size), n):
        pass


def measure(state: TrainState, judge: Activations) -> dict[str, float]:
    since = {"samples_since_fired": state.samples_since_fired.cpu(), "dead_after": state.dead_after}
    health, found = observe(state.dictionary, judge, [(check_health, since), (align, {"match": False})])
    recovered = {side: found.recovery(TAU, side, "all") for side in ("encoder", "decoder", "response")}
    means = {f"mean_{side}": found.mean_best(side, "all") for side in ("encoder", "decoder")}
    rest = {"unexplained": health.unexplained_variance, "l0": health.l0, "dead": health.n_dead / health.n_latents}
    return recovered | means | rest


def report(rows: pd.DataFrame, name: str, seeds: list[int], device: str, seconds: float) -> str:
    size = SIZES[name]
    place = (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} of {os.cpu_count()} CPU threads"
    )
    parts = [
        f"# Realign, {name}",
        f"`python benchmarks/realign.py --size {name} --seeds {' '.join(map(str, seeds))}`, {seconds / 60:.0f} minutes on {place} "
        f"({platform.machine()}, torch {torch.__version__}).",
        f"LinearBench: {size.n_features:,} features in {size.d_in} dimensions (a source, in a crosscoder), sparsity {size.sparsity:g}, "
        f"interference at most {size.max_interference:g}. TopK(k={size.k}), {size.n_latents:,} latents, {size.steps} steps of "
        f"{size.batch_size}, then the intervention on {size.choose_rows:,} choose rows, then {size.after} more; Adam at {size.lr:g}, "
        f"{size.warmup_steps} steps of warm-up. Judged on {size.judge_rows:,} other rows. "
        f"{'One seed' if len(seeds) == 1 else f'Means over seeds {seeds}'}.",
        "*After*: steps since the intervention; the control and the tied encoder have trained as long. *At once*: nothing trained since.",
    ]
    for kind in rows["kind"].unique():
        parts += [f"## {kind}", _table(rows[rows["kind"] == kind])]
        if len(seeds) > 1:
            parts += [
                "Minus the control of the same seed, at the end: mean and half the width of its 95 % interval.",
                _paired(rows, kind, size.after),
            ]
    return "\n\n".join(parts) + "\n"


def _table(rows: pd.DataFrame) -> str:
    means = rows.groupby(["arm", "after"], sort=False)[list(COLUMNS)].mean().reset_index()
    lines = [f"| | after | {' | '.join(COLUMNS.values())} |", "|---|" + "---:|" * (len(COLUMNS) + 1)]
    for row in means.to_dict("records"):
        lines.append(f"| {row['arm']} | {row['after']} | {' | '.join(_shown(name, row[name]) for name in COLUMNS)} |")
    return "\n".join(lines)


def _paired(rows: pd.DataFrame, kind: str, after: int) -> str:
    """Every arm at its end against the control, by seed."""
    ends = rows[(rows["kind"] == kind) & (rows["after"] == after)].set_index("seed")
    control = ends[ends["arm"].str.startswith("control")]
    lines = [f"| | {' | '.join(COLUMNS.values())} |", "|---|" + "---:|" * len(COLUMNS)]
    for arm, group in ends[ends["arm"] != control["arm"].iloc[0]].groupby("arm", sort=False):
        shown = []
        for name in COLUMNS:
            values = group[name] - control[name]
            half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
            shown.append(f"{_shown(name, values.mean(), '+')} ± {_shown(name, half)}")
        lines.append(f"| {arm} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _line(row: dict) -> str:
    return ", ".join(f"{label} {_shown(name, row[name])}" for name, label in COLUMNS.items())


def _shown(name: str, value: float, sign: str = "") -> str:
    forms = {"unexplained": ".4f", "l0": ".2f", "mean_encoder": ".3f", "mean_decoder": ".3f"}
    return format(value, sign + forms.get(name, ".1%"))


if __name__ == "__main__":
    main()
