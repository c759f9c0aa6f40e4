"""Does `session.repair` help where something is broken, leave alone what is not, and keep no sham?

    OMP_NUM_THREADS=1 python benchmarks/repair.py            ten minutes of one core; --shams 20 --seeds 0 for a quick look

Five damaged sessions, each planted in a dictionary of the true features and then trained on until it has settled:

    dead        half of the latents never fire
    trapped     pairs of features share a latent (Example 3.5 of arXiv 2512.05534), and their second latents are silent
    absorbed    children's latents write their parents, whose own latents are silent there
    copies      latents that copy others stand where features have none
    encoder     TopK on overlapping features: decoder rows and responses find them, encoder rows do not

For each, `session.repair` proposes; what it proposes is applied, and trained on in pairs (same seed, same data order, orders that repair
has not used) beside the untouched session and beside a sham of every plan (the same rows, random directions). Scored on fresh judge rows:
features recovered at tau = 0.9, heldout_strict, in encoder rows for "encoder" and in decoder rows for the others. Five healthy sessions
are repaired too. The false-keep rate is that of *sham repairs*: each damaged session's own advice with random directions instead of
its own, handed to `session.repair` as a verdict.

Writes sessions.csv, shams.csv and README.md to benchmarks/results/repair, and goes on where it was ended.
"""

import argparse
import platform
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import param
import torch
from scipy.stats import binomtest
from torch.nn.functional import normalize

from sdl_explorer import HierarchyBench, LinearBench, Session, SparseDictionary, TopK, align, explain
from sdl_explorer.data.sources import stream
from sdl_explorer.diagnosis.compare import paired
from sdl_explorer.training.interventions import Intervention
from sdl_explorer.training.loop import train
from sdl_explorer.training.run import method_of

TAU, K, PAIRS = 0.9, 6, 5
SETTLE, STEPS, AFTER = 200, 80, 200  # before the repair, in each arm of a try, and in each arm of the final comparison
ROWS, BUDGET = 1_000, 3 * 15 * STEPS
FLAT = {"parents": 0, "independent": 24, "d_in": 24, "independent_probability": 0.08, "magnitude_std": 0.3}
TREE = {"parents": 4, "children": 2, "independent": 12, "d_in": 24, "parent_probability": 0.25, "child_probability": 0.3}
FACE = {"n_features": 32, "d_in": 24, "sparsity": 0.95, "max_interference": 0.3}
SETTINGS = {"batch_size": 64, "dead_after": 4_000, "lr": 3e-3, "warmup_steps": 0}
NUMBERS = ("before", "plain", "sham", "repaired", *(f"vs {arm} {end}" for arm in ("plain", "sham") for end in ("low", "high")))
DAMAGES = ("dead", "trapped", "absorbed", "copies", "encoder")


class Sham(Intervention):
    """Another intervention's plan in random directions."""

    of = param.ClassSelector(class_=Intervention, doc="Whose plan.")

    def plan(self, state, choose, generator):
        return self.of.plan(state, choose, generator).sham(generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--shams", type=int, default=80, help="sham repairs in all")
    parser.add_argument("--part", choices=["all", "sessions", "shams"], default="all", help="to run both halves side by side")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/repair"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Preflight")  # the cases begin broken
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part != "shams":
        cases = [(study, name, seed) for seed in options.seeds for name in DAMAGES] + [
            (study_healthy, "healthy", seed) for seed in range(5)
        ]
        collect(cases, options.out / "sessions.csv")
    if options.part != "sessions":
        cases = [(study_sham, DAMAGES[at % len(DAMAGES)], 100 + at // len(DAMAGES)) for at in range(options.shams)]
        collect(cases, options.out / "shams.csv")
    tables = [options.out / f"{name}.csv" for name in ("sessions", "shams")]
    if all(path.exists() for path in tables):
        (options.out / "README.md").write_text(report(*(pd.read_csv(path, keep_default_na=False) for path in tables), options))


def collect(cases: list, path: Path) -> None:
    """A row for each case, written as it comes; those that the file has already are not run again."""
    rows = pd.read_csv(path, keep_default_na=False).to_dict("records") if path.exists() else []
    done = {(row["session"], row["seed"]) for row in rows}
    for run, name, seed in (case for case in cases if case[1:] not in done):
        began, cpu = time.perf_counter(), time.process_time()
        row = run(name, seed)
        rows.append(row | {"cpu seconds": time.process_time() - cpu, "seconds": time.perf_counter() - began})
        print({k: v for k, v in rows[-1].items() if k not in ("reading", "why")}, flush=True)
        pd.DataFrame(rows).to_csv(path, index=False, float_format="%.5g")


# the sessions --------------------------------------------------------------------------------------------------------


def source_of(name: str, seed: int):
    if name == "encoder":
        return LinearBench(**FACE, seed=seed)
    return HierarchyBench(**(TREE if name == "absorbed" else FLAT), seed=seed)


def damaged(name: str, seed: int) -> Session:
    """A session that is broken and has settled."""
    source = source_of(name, seed)
    if name == "encoder":
        return Session(source, TopK(k=4), source.n_features, seed=seed, **SETTINGS).train(4 * SETTLE)
    truth = source.sample(1, torch.Generator()).truth
    W = truth.input_features
    W_enc, W_dec, n = W.clone(), W.clone(), len(W)
    bias = torch.zeros(n)
    half = n // 2
    if name == "dead":
        W_enc[:half] = W_dec[:half] = normalize(torch.randn(half, n, generator=stream(seed, "dead")), dim=1)
        bias[:half] = -100.0
    elif name == "trapped":
        W_enc[:half] = W_dec[:half] = normalize(W[:half] + W[half:], dim=1)
        W_enc[half:] = 0.0
        W_dec[half:] = normalize(torch.randn(n - half, n, generator=stream(seed, "silent")), dim=1)
    elif name == "copies":
        W_enc[: half // 2], W_dec[: half // 2] = W[half : half + half // 2], W[half : half + half // 2]
        W_enc[: half // 2] *= 0.5
        W_enc[half : half + half // 2] *= 0.5
    elif name == "absorbed":
        for child, parent in enumerate(truth.parents):
            if parent is not None:
                W_dec[child], W_enc[child] = normalize(W[parent] + W[child], dim=0), 2**0.5 * W[child]
                W_enc[parent] -= W[child]
    dictionary = SparseDictionary(W_enc, W_dec, bias, nonlinearity=TopK(k=K).nonlinearity(n))
    slowly = {"lr": 1e-3} if name == "copies" else {}  # at the full rate, copies part by themselves
    return Session(source, TopK(k=K), dictionary=dictionary, seed=seed, **(SETTINGS | slowly)).train(SETTLE)


def healthy(seed: int) -> Session:
    """From random weights, with room to spare, until every feature is found."""
    source = HierarchyBench(**FLAT, seed=seed)
    return Session(source, TopK(k=K), 2 * source.n_features, seed=seed, **SETTINGS).train(4 * SETTLE)


# what is measured ----------------------------------------------------------------------------------------------------


def recovered(state, rows, side: str) -> float:
    found = align(state.dictionary, rows, pins=state.pins, match=False)
    return found.recovery(TAU, side, "heldout_strict")


def trained(session: Session, plans, pair: int, steps: int):
    """The session's state with plans applied, after `steps` on a data order of the pair's own."""
    state, settings = session._run.state_of(session.head)
    for plan in plans:
        plan.apply(state)
    going = train(state, method_of(settings), session.source, batch_size=settings["batch_size"], order=1_000 + pair)
    for _ in range(steps):
        next(going)
    return state


def study(name: str, seed: int) -> dict:
    side = "encoder" if name == "encoder" else "decoder"
    with damaged(name, seed) as session:
        session.commit("settled")
        rows = session.source.sample(4 * ROWS, stream(seed, "fresh"), "judge")
        found = session.repair(BUDGET, n_steps=STEPS, n=ROWS, apply=False)
        shams = [[plan.sham(stream(seed, "sham", pair, i)) for i, plan in enumerate(found.kept)] for pair in range(PAIRS)]
        arms = {
            arm: np.array([recovered(trained(session, plans(pair), pair, AFTER), rows, side) for pair in range(PAIRS)])
            for arm, plans in (("plain", lambda _: ()), ("repaired", lambda _: found.kept), ("sham", lambda pair: shams[pair]))
        }
        against = {arm: paired(arms["repaired"], arms[arm]) for arm in ("plain", "sham")}
        before = recovered(session._run.state_of(session.head)[0], rows, side)
        verdicts = session.find(explain, n=ROWS)
    return {
        "session": name,
        "seed": seed,
        "side": side,
        "verdicts": ", ".join(v.id for v in verdicts),
        "kept": ", ".join(type(one.verdict.advice).__name__ for one in found.tried if one.kept),
        "before": before,
        **{arm: float(values.mean()) for arm, values in arms.items()},
        **{f"vs {arm} {end}": getattr(gap, end) for arm, gap in against.items() for end in ("low", "high")},
        "more than both": all(gap.low > 0 for gap in against.values()),
        "reading": found.reading,
    }


def study_healthy(name: str, seed: int) -> dict:
    with healthy(seed) as session:
        rows = session.source.sample(4 * ROWS, stream(seed, "fresh"), "judge")
        found = session.repair(BUDGET, n_steps=STEPS, n=ROWS, apply=False)
        before = recovered(session._run.state_of(session.commit("settled"))[0], rows, "decoder")
        return {
            "session": name,
            "seed": seed,
            "side": "decoder",
            "verdicts": ", ".join(one.verdict.id for one in found.tried),
            "kept": ", ".join(type(one.verdict.advice).__name__ for one in found.tried if one.kept),
            "before": before,
            "reading": found.reading,
        }


def study_sham(name: str, seed: int) -> dict:
    """The damage's own advice, its directions replaced by random ones, handed in as a verdict."""
    with damaged(name, seed) as session:
        verdicts = session.find(explain, n=ROWS)
        if not verdicts:
            return {"session": name, "seed": seed, "verdict": "", "kept": False, "why": "no verdict"}
        verdict = replace(verdicts[0], advice=Sham(of=verdicts[0].advice))
        found = session.repair(15 * STEPS, n_steps=STEPS, n=ROWS, verdicts=[verdict], apply=False)
        (one,) = found.tried
        return {"session": name, "seed": seed, "verdict": verdict.id, "kept": one.kept, "why": one.why}


# what is said --------------------------------------------------------------------------------------------------------


def report(table: pd.DataFrame, shams: pd.DataFrame, options) -> str:
    healthy, sessions = table[table["session"] == "healthy"], table[table["session"] != "healthy"]
    sessions = sessions.astype(dict.fromkeys(NUMBERS, float)).sort_values("seed", kind="stable")
    judged = shams[shams["verdict"] != ""]
    minutes = (table["cpu seconds"].sum() + shams["cpu seconds"].sum()) / 60
    kept, n = int((judged["kept"].astype(str) == "True").sum()), len(judged)
    low, high = binomtest(kept, n).proportion_ci(0.95, method="exact")
    by = ", ".join(
        f"{name} {int((group['kept'].astype(str) == 'True').sum())} of {len(group)}" for name, group in judged.groupby("session")
    )
    better = (sessions["more than both"].astype(str) == "True").groupby(sessions["seed"]).agg(["sum", "size"])
    early = " The run was ended early; the same command goes on with it." if (better["size"] < len(DAMAGES)).any() else ""
    parts = [
        "# Repair",
        f"`OMP_NUM_THREADS=1 python benchmarks/repair.py --seeds {' '.join(map(str, better.index))} --shams {len(shams)}`: {minutes:.0f} "
        f"minutes of one CPU core ({platform.machine()}, torch {torch.__version__}).{early}",
        f"Damaged sessions are trained for {SETTLE} steps of 64 rows, *encoder* and healthy ones for {4 * SETTLE}. A try has {PAIRS} pairs "
        f"of three arms of {STEPS} steps, judged on {ROWS:,} judge rows. What `session.repair` proposed is applied and compared on {PAIRS} "
        f"other data orders after {AFTER} steps, on {4 * ROWS:,} other judge rows: features recovered at tau = {TAU}, heldout_strict. Its "
        "intervals are paired ones, and say how the proposal stands against the mean of shams, not against one more.",
        _sessions(sessions),
        "More features than the plain pairs and than the sham, both 95 % intervals above zero: "
        + ", ".join(f"{one.sum} of {one.size} (seed {one.Index})" for one in better.itertuples())
        + ". Repair was tuned on the sessions of seed 0; those of seed 1 are the clean check.",
        f"Healthy sessions, {len(healthy)} seeds: "
        + ("; ".join(f"recovered {float(row.before):.0%}, kept {row.kept or 'nothing'}" for row in healthy.itertuples()) or "not run yet")
        + ".",
        f"Sham repairs kept: {kept} of {n}, {kept / n:.1%} (95 % Clopper-Pearson interval {low:.1%} to {high:.1%}). By damage: {by}.",
        "## In its own words",
        *(f"**{row.session} {row.seed}** {row.reading}" for row in sessions.itertuples()),
    ]
    return "\n\n".join(parts) + "\n"


def _sessions(sessions: pd.DataFrame) -> str:
    lines = [
        "| session | verdicts | kept | before | plain steps | sham | repaired | minus plain | minus sham |",
        "|---|---|---|" + "---:|" * 6,
    ]
    for row in sessions.to_dict("records"):
        gap = lambda arm, row=row: f"{row['repaired'] - row[arm]:+.3f} ({row[f'vs {arm} low']:+.3f} to {row[f'vs {arm} high']:+.3f})"
        shares = " | ".join(f"{row[arm]:.1%}" for arm in ("before", "plain", "sham", "repaired"))
        named = f"{row['session']} {row['seed']} ({row['side']}) | {row['verdicts']} | {row['kept'] or 'nothing'}"
        lines.append(f"| {named} | {shares} | {gap('plain')} | {gap('sham')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
