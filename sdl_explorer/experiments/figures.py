"""Figures 4, 6 and 7 of arXiv 2512.05534: zero loss without recovery, recovery at every threshold, resampling on and off."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from sdl_explorer.data.activations import Activations, Truth
from sdl_explorer.data.sources import stream
from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.diagnosis.compare import paired, score
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.experiments.cells import ROWS, SIDES, run_cell
from sdl_explorer.experiments.minilm import minilm_rows
from sdl_explorer.experiments.outcome import Outcome, markdown_table
from sdl_explorer.experiments.tables import SIZES, TABLES, Size, bench, recipe
from sdl_explorer.models.atomic import write_file
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.session import Session
from sdl_explorer.views.reproduced import arrows, lines, stacked

SEEDS = (0, 1, 2)
HALF_TURN = 2**-0.5
MIXINGS = {"rotation by 45°": ((HALF_TURN, HALF_TURN), (-HALF_TURN, HALF_TURN)), "near the printed figure": ((-1.0, 1.0), (-1.5, -0.5))}


# figure 4 -------------------------------------------------------------------------------------------------------------


def fig4(size: str, folder: Path, device: str, say: Callable[[str], None]) -> Outcome:
    """Zero loss, no recovery (Theorem 3.4): for any invertible A, W_enc = [A; -A] and W_dec^T = [A^-1, -A^-1] reconstruct every x
    through a ReLU, whatever the features are. Here they are +-e_1 and +-e_2. A closed form: nothing is trained, `size` is not read.
    """
    truth = torch.cat([torch.eye(2), -torch.eye(2)])
    codes = torch.zeros(4_000, 4).scatter_(1, torch.arange(4_000)[:, None] % 4, torch.rand(4_000, 1, generator=stream(0, "fig4")))
    inputs = codes @ truth
    rows, pictures = [], []
    for name, mixing in MIXINGS.items():
        dictionary = antipodal(torch.tensor(mixing))
        activations = Activations(inputs, inputs, Truth(codes, truth, truth))
        found, health = align(dictionary, activations), check_health(dictionary, activations)
        residual = (dictionary(truth).reconstruction.detach() - truth).norm(dim=1).max()
        sides = {f"M_IP {side}": found.mean_best(side) for side in SIDES[:2]} | {
            f"M_GT {side}": found.recovery(side=side) for side in SIDES[:2]
        }
        rows.append({"A": name, "loss": health.mse, "largest residual of a feature": float(residual), **sides})
        pictures.append(arrows({"truth": truth, "encoder": dictionary.W_enc, "decoder": dictionary.W_dec}, name))
    table = pd.DataFrame(rows)
    page = "\n".join(["# fig4: zero loss, no recovery", "", str(fig4.__doc__).split("\n\n")[0].strip(), "", markdown_table(table), ""])
    return Outcome(table, page, stacked(pictures, columns=2), {"A": MIXINGS, "features": "+-e_1, +-e_2", "samples": len(inputs)})


def antipodal(mixing: torch.Tensor) -> SparseDictionary:
    """The ReLU dictionary of twice as many latents as dimensions that reconstructs everything."""
    inverse = torch.linalg.inv(mixing.double()).float().T
    return SparseDictionary(torch.cat([mixing, -mixing]), torch.cat([inverse, -inverse])).eval()


# figure 6 -------------------------------------------------------------------------------------------------------------


def fig6(size: str, folder: Path, device: str, say: Callable[[str], None]) -> Outcome:
    """Recovery against the threshold, for the runs of table 1: the published figure has a shape and no numbers."""
    curves = []
    for cell in TABLES["table1"].cells(SIZES[size]):
        say(cell.name)
        run_cell(cell, folder / "runs" / cell.name, device)
        with Session.open(folder / "runs" / cell.name / "run", source=cell.source, device=device) as session:
            found = session.find(align, n=ROWS)
        name = f"{cell.labels['row']}{' + anchors' if cell.n_anchors else ''}"
        for side in SIDES:
            for scoring in ("heldout", "heldout_strict", "all"):
                taus, shares = found.curve(side, scoring)
                curves.append(
                    pd.DataFrame(
                        {"model": name, "side": side, "scoring": scoring, "tau": taus, "share": shares, "dashed": not cell.n_anchors}
                    )
                )
    table = pd.concat(curves, ignore_index=True)
    shown = [table[(table["side"] == side) & (table["scoring"] == "heldout")] for side in SIDES]
    plots = [
        lines(one, "tau", "share", "model", f"{side}, features that were not anchored") for side, one in zip(SIDES, shown, strict=True)
    ]
    at = table[(table["tau"] - 0.95).abs() < 1e-9].pivot_table(index="model", columns=["scoring", "side"], values="share", sort=False)
    at.columns = [f"{scoring} {side}" for scoring, side in at.columns]
    page = "\n".join(
        [
            "# fig6: share of the features recovered at every threshold",
            "",
            f"Size `{size}`, one seed; here at tau 0.95.",
            "",
            markdown_table(at.reset_index()),
            "",
        ]
    )
    return Outcome(table, page, stacked(plots), {"size": size, "setting": SIZES[size]._asdict()})


# figure 7 -------------------------------------------------------------------------------------------------------------


def fig7(size: str, folder: Path, device: str, say: Callable[[str], None]) -> Outcome:
    """Resampling on and off from one branch point: same seed, same data order, loss and dead latents of both, three seeds."""
    setting, frames, ends = SIZES[size], [], []
    for data in ("bench", "MiniLM"):
        for seed in SEEDS:
            say(f"{data}, seed {seed}")
            kept = folder / "runs" / f"{data}-{seed}.json"
            if not kept.exists():
                write_file(kept, json.dumps(_resampled(_start(data, setting, folder, seed, device), setting.steps)).encode())
            one = json.loads(kept.read_text())
            frames += [pd.DataFrame(curve).assign(data=data, seed=seed, arm=arm) for arm, curve in one["curves"].items()]
            ends += [{"data": data, "seed": seed, "arm": arm, **numbers} for arm, numbers in one["ends"].items()]
    table, last = pd.concat(frames, ignore_index=True), pd.DataFrame(ends)
    wide = last.pivot(index=["data", "seed"], columns="arm")
    verdicts = [
        _difference(data, measure, wide[measure].loc[data]) for data in ("bench", "MiniLM") for measure in ("unexplained_variance", "dead")
    ]
    words = (
        f"Size `{size}`, seeds {SEEDS}; the branch is after half of the steps. Differences are on minus off, paired, with 95 % intervals."
    )
    page = "\n".join(["# fig7: resampling on and off", "", words, "", markdown_table(last), "", markdown_table(pd.DataFrame(verdicts)), ""])
    curves = table.assign(run=table["arm"] + ", seed " + table["seed"].astype(str), dashed=table["arm"] == "off")
    plots = [lines(curves[curves["data"] == d], "step", y, "run", f"{d}: {y}") for d in ("bench", "MiniLM") for y in ("loss", "dead")]
    return Outcome(table, page, stacked(plots), {"size": size, "setting": setting._asdict(), "seeds": SEEDS})


def _start(data: str, size: Size, folder: Path, seed: int, device: str) -> Session:
    """An untrained session whose latents die: many of them, and a high learning rate."""
    real = data == "MiniLM"
    source = minilm_rows(folder / "activations", rows=None if size.share == 1 else 4_000) if real else bench(size)
    dead_after = size.batch_size * size.steps // 8
    settings = {"lr": 1e-2, "batch_size": size.batch_size, "dead_after": dead_after, "seed": seed, "device": device}
    return Session(source, recipe("TopK", 16 if real else size.active), (8 if real else 1) * size.n_latents, **settings)


def _resampled(session: Session, steps: int) -> dict:
    """Curves and judged numbers of both arms, from the same state on."""
    with session:
        session.train(steps // 2)
        curves, ends = {}, {}
        for arm in ("off", "on"):
            with session.branch() as twin:
                n_dead = int(twin.find(check_health).n_dead)
                if arm == "on" and n_dead:
                    twin.resample(scale=1.0)  # at 0.2 times the mean norm they seldom win one of k places, and die again
                twin.train(steps - steps // 2)
                history = twin.history
                curves[arm] = {"step": history.steps.tolist(), "loss": history.losses["total"].tolist(), "dead": history.dead.tolist()}
                rows = twin.source.sample(10_000, stream(twin.seed, "judge"))
                silent = twin.snapshot.samples_since_fired
                numbers = score(twin.dictionary, rows, torch.as_tensor(silent), twin.dead_after)
                ends[arm] = {"resampled": n_dead if arm == "on" else 0, **{k: numbers[k] for k in ("unexplained_variance", "l0", "dead")}}
    return {"curves": curves, "ends": ends}


def _difference(data: str, measure: str, pair: pd.DataFrame) -> dict:
    found = paired(pair["on"].to_numpy(), pair["off"].to_numpy())
    words = {1: "higher with resampling", -1: "lower with resampling", 0: "not distinguishable"}[found.sign]
    return {"data": data, "measure": measure, "on - off": found.mean, "low": found.low, "high": found.high, "verdict": words}
