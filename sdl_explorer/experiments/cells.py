"""A cell is one training run of an experiment: made once, resumed where it was interrupted, judged on its judge rows."""

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats

from sdl_explorer.data.anchors import Anchors
from sdl_explorer.data.sources import Source, stream
from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.models.atomic import write_file
from sdl_explorer.models.methods import Method
from sdl_explorer.session import Session

log = logging.getLogger(__name__)
SIDES = ("encoder", "decoder", "response")
ROWS = 50_000  # judge rows: the response direction of a latent that fires on 1 % of them needs some hundreds of firings


@dataclass(frozen=True)
class Cell:
    """One run. `labels` tell it apart from its neighbours and become columns of the table; with `n_anchors`, that many true
    features, drawn by the seed, are pulled at (arXiv 2512.05534, eq. 25-26) from the first step on, by the first latents. With
    `pull`, encoder rows are turned to their responses after two thirds of the steps, and pulled there with that weight in the last.
    """

    labels: dict[str, object]
    source: Source
    method: Method
    n_latents: int
    steps: int
    seed: int = 0
    n_anchors: int = 0
    anchor_weight: float = 0.1
    pull: float = 0.0
    settings: dict[str, object] = field(default_factory=dict)  # of the session: batch_size, lr, ...

    @property
    def name(self) -> str:
        """Also the name of its folder."""
        words = [str(value) for value in self.labels.values()] + [f"seed {self.seed}"]
        return "_".join("".join(c if c.isalnum() or c in ".+-" else "-" for c in word) for word in words)

    @property
    def record(self) -> dict:
        """Everything that decides what comes out."""
        record = {
            "labels": {k: str(v) for k, v in self.labels.items()},
            "source": self.source.fingerprint(),
            "describes": repr(self.source),
            "method": repr(self.method),
            "n_latents": self.n_latents,
            "steps": self.steps,
            "seed": self.seed,
            "n_anchors": self.n_anchors,
            "anchor_weight": self.anchor_weight,
            "settings": self.settings,
        }
        return record | ({"pull": self.pull} if self.pull else {})


def run_cells(cells: Iterable[Cell], folder: Path, device: str = "auto", say: Callable[[str], None] = lambda text: None) -> pd.DataFrame:
    """One row a cell, in order. A cell that is done is read; one that was interrupted goes on; one that fails is named in the
    column `failed` and the others go on.
    """
    rows, cells = [], list(cells)
    for at, cell in enumerate(cells, 1):
        say(f"{at}/{len(cells)} {cell.name}")
        row: dict[str, object] = {**cell.labels, "seed": cell.seed, "failed": ""}
        try:
            row |= run_cell(cell, folder / cell.name, device)
        except Exception as error:  # the table names it
            log.info("cell %s", cell.name, exc_info=True)
            row["failed"] = f"{type(error).__name__}: {error}"
            say(f"  failed: {row['failed']}")
        rows.append(row)
    return pd.DataFrame(rows)


def run_cell(cell: Cell, folder: Path, device: str = "auto") -> dict[str, float]:
    """Train what is left to train and judge; the numbers are kept in `result.json` beside the run."""
    result = folder / "result.json"
    if result.exists():
        kept = json.loads(result.read_text())
        if kept["cell"] != cell.record:
            raise ValueError(f"{folder}: holds a cell of other settings. Name another folder, or remove this one.")
        return kept["numbers"]
    with _session(cell, folder / "run", device) as session:
        if cell.pull and session.pulls is None:
            _train_to(session, 2 * cell.steps // 3)
            session.realign(pull=cell.pull)
        _train_to(session, cell.steps)
        numbers = measure(session)
    write_file(result, json.dumps({"cell": cell.record, "numbers": numbers}, indent=1).encode())
    return numbers


def _train_to(session: Session, step: int) -> None:
    if session.step < step:
        session.train(step - session.step)
        session.save(session.folder)


def _session(cell: Cell, folder: Path, device: str) -> Session:
    if (folder / "run.json").exists():
        session = Session.open(folder, source=cell.source, device=device)
    else:
        method = type(cell.method)(**{k: v for k, v in cell.method.param.values().items() if k != "name"})
        session = Session(cell.source, method, cell.n_latents, seed=cell.seed, device=device, **cell.settings)
        session.save(folder)
    if cell.n_anchors and session.pins is None:
        session.anchor(draw_anchors(cell), latents=range(cell.n_anchors), weight=cell.anchor_weight)
    return session


def draw_anchors(cell: Cell) -> Anchors:
    """The true directions of `n_anchors` features, drawn without replacement by the cell's seed."""
    truth = cell.source.sample(1, stream(cell.seed, "anchors")).truth
    if truth is None:
        raise ValueError(f"{cell.name}: anchors are drawn from true features, and {type(cell.source).__name__} has none.")
    chosen = torch.randperm(truth.n_features, generator=stream(cell.seed, "anchored features"))[: cell.n_anchors]
    return Anchors.from_truth(truth, chosen.tolist())


def measure(session: Session) -> dict[str, float]:
    """Numbers on judge rows: health, and with truth M_GT at tau = 0.95 and M_IP on the features that no latent is pinned to.

    `M_GT` and `M_IP` of a side are signed; "as published" is the encoder with absolute cosines (arXiv 2512.05534, section 6).
    """
    if session.source.sample(1, stream("measure")).truth is None:
        return _health(session.find(check_health, n=ROWS))
    found, health = session.find([align, check_health], n=ROWS)
    numbers = {
        "M_GT as published": found.recovery(side="encoder", signed=False),
        "M_IP as published": found.mean_best("encoder", signed=False),
    }
    for side in SIDES:
        numbers |= {f"M_GT {side}": found.recovery(side=side), f"M_IP {side}": found.mean_best(side)}
    return {name: float(value) for name, value in numbers.items()} | _health(health)


def _health(health) -> dict[str, float]:
    return {"unexplained variance": float(health.unexplained_variance), "L0": float(health.l0), "dead": health.n_dead / health.n_latents}


def summarise(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Mean over seeds of every number, with the half width of its 95 % interval (Student's t; empty for one seed)."""
    numbers = [c for c in table.columns if c not in (*by, "seed", "failed")]
    done = table[table["failed"] == ""]
    if done.empty:
        return pd.DataFrame(columns=[*by, "seeds"])
    groups = done.groupby(by, sort=False, dropna=False)
    means = groups[numbers].mean()
    count = groups.size()
    half = groups[numbers].std(ddof=1).mul(stats.t.ppf(0.975, (count - 1).clip(lower=1)) / np.sqrt(count), axis=0)
    return means.join(half.add_suffix(" ±")).assign(seeds=count).reset_index()


def readable(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary with mean and interval in one column: "0.749 ± 0.031"."""
    shown = summary.copy()
    for name in [c for c in summary.columns if f"{c} ±" in summary.columns]:
        pairs = zip(summary[name], summary[f"{name} ±"], strict=True)
        shown[name] = [f"{mean:.3g}" + ("" if pd.isna(half) else f" ± {half:.2g}") for mean, half in pairs]
    return shown[[c for c in shown.columns if not c.endswith(" ±")]]
