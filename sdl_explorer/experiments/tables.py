"""The tables of arXiv 2512.05534 as grids of cells. What the paper does not print is set here, at three sizes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from sdl_explorer.data.bench import LinearBench
from sdl_explorer.experiments import published
from sdl_explorer.experiments.cells import SIDES, Cell, run_cells
from sdl_explorer.experiments.outcome import Outcome, markdown_table
from sdl_explorer.experiments.published import METHODS, Published, verdict
from sdl_explorer.models.methods import BatchTopK, JumpReLU, Matryoshka, Method, ReLU, TopK
from sdl_explorer.views.reproduced import reproduced

UNPRINTED = "optimiser, learning rate, batch, steps, initialisation, decoder constraint, penalties, k and seeds are not in the paper"


PULL = 0.1  # of the rows "+ realign"
REALIGNED = [
    f'"+ realign": encoder rows are turned to what fires their latents after two thirds of the steps and pulled there with weight {PULL:g}',
    "in the last third, without any truth. That encoder and response agree is then no evidence; recovery and unexplained variance are.",
    "",
]


class Size(NamedTuple):
    """How large the bench and the dictionary are, and how long it is trained."""

    n_features: int
    d_in: int
    active: float  # features in a row, on average; the paper's sparsity is 1 - active / n_features
    n_latents: int
    steps: int
    batch_size: int
    lr: float
    anchors: int  # of table 1; the tables of one factor say 100 of 1,000

    @property
    def share(self) -> float:
        """Of the paper's number of features."""
        return self.n_features / 1000


SIZES = {
    "small": Size(100, 77, 3.0, 200, 600, 256, 4e-3, 3),
    "laptop": Size(1000, 768, 10.0, 2_000, 1_500, 512, 1e-3, 30),
    "paper": Size(1000, 768, 10.0, 16_000, 5_000, 512, 1e-3, 30),
}


class Table(NamedTuple):
    """A published table: its cells at a size, and the printed numbers by (row, anchored)."""

    title: str
    cells: Callable[[Size], list[Cell]]
    printed: dict[tuple, Published]


def recipe(name: str, active: float) -> Method:
    """Unit decoder rows throughout, and as many active latents as there are active features."""
    k = max(1, round(active))
    if name in ("TopK", "BatchTopK", "Matryoshka"):
        return {"TopK": TopK, "BatchTopK": BatchTopK, "Matryoshka": Matryoshka}[name](k=k)
    if name == "ReLU":
        return ReLU(l1=0.3, unit_norm=True)
    return JumpReLU(l0_target=float(k), l0=1.0, threshold=0.3, bandwidth=0.1, unit_norm=True)  # found at the small size


def bench(size: Size, **changed) -> LinearBench:
    settings = {"n_features": size.n_features, "d_in": size.d_in, "sparsity": 1 - size.active / size.n_features}
    return LinearBench(**settings | changed)


def _both(size: Size, row, source: LinearBench, method: Method, anchors: int, seed: int) -> list[Cell]:
    settings: dict[str, object] = {"batch_size": size.batch_size, "lr": size.lr}
    common = {"n_latents": size.n_latents, "steps": size.steps, "seed": seed, "settings": settings}
    return [Cell({"row": row, "anchored": bool(n)}, source, method, n_anchors=n, **common) for n in (0, anchors)]


def _table1(size: Size, seed: int = 0) -> list[Cell]:
    cells = []
    for row in published.TABLE1:
        name, anchored = row
        if anchored:
            continue
        kind = name.lower() if name in ("Transcoder", "Crosscoder") else "sae"
        method = recipe("TopK" if kind != "sae" else name, size.active)
        cells += _both(size, name, bench(size, kind=kind), method, size.anchors, seed)
        alone = cells[-2]
        cells.append(replace(alone, labels={"row": f"{name} + realign", "anchored": False}, pull=PULL))
    return cells


def _table_v2(size: Size, seed: int = 0) -> list[Cell]:
    cells = []
    for mode, interference in (("bounded", "bounded"), ("negative", "simplex")):
        cells += _both(size, mode, bench(size, interference=interference), recipe("ReLU", size.active), _hundred(size), seed)
    return cells


def _table4(size: Size, seed: int = 0) -> list[Cell]:
    cells = []
    for n in range(800, 1500, 100):
        features = round(n * size.share)
        source = bench(size, n_features=features, sparsity=1 - size.active / size.n_features)
        cells += _both(size, n, source, recipe("ReLU", size.active), _hundred(size), seed)
    return cells


def _table5(size: Size, seed: int = 0) -> list[Cell]:
    cells = []
    for method in METHODS:
        for bound in (0.05, 0.2, 0.5):
            cells += _both(size, (method, bound), bench(size, max_interference=bound), recipe(method, size.active), _hundred(size), seed)
    return cells


def _table6(size: Size, seed: int = 0) -> list[Cell]:
    cells = []
    for method in METHODS:
        for share in (0.005, 0.01, 0.1):
            active = size.active * share / 0.01
            source = bench(size, sparsity=1 - active / size.n_features)
            cells += _both(size, (method, share), source, recipe(method, active), _hundred(size), seed)
    return cells


def _table7(size: Size, seed: int = 0) -> list[Cell]:
    cells = []
    for k in (32, 64, 128):
        cells += _both(size, k, bench(size), TopK(k=max(1, round(k * size.n_latents / 16_000))), _hundred(size), seed)
    return cells


def _hundred(size: Size) -> int:
    return round(100 * size.share)


TABLES = {
    "table1": Table("Seven models, with and without anchored features", _table1, published.TABLE1),
    "table-v2": Table("Bounded and negative interference, first version of the paper", _table_v2, published.TABLE_V2),
    "table4": Table("ReLU SAE by number of features", _table4, published.TABLE4),
    "table5": Table("By interference", _table5, published.TABLE5),
    "table6": Table("By the probability that a feature is active", _table6, published.TABLE6),
    "table7": Table("TopK by k", _table7, published.TABLE7),
}


def run_table(name: str, size: str, folder: Path, device: str, say: Callable[[str], None]) -> Outcome:
    """A published table again: its cells, judged alike, with a verdict beside each published number."""
    experiment, setting = TABLES[name], SIZES[size]
    cells = experiment.cells(setting)
    table = beside(run_cells(cells, folder / "runs", device, say), experiment.printed)
    settings = {"size": size, "setting": setting._asdict(), "not specified": UNPRINTED, "cells": [cell.record for cell in cells]}
    return Outcome(table, page(name, size, experiment, cells, table), reproduced(table, f"{experiment.title} ({size})"), settings)


def beside(table: pd.DataFrame, printed: dict[tuple, Published]) -> pd.DataFrame:
    """The table with the published numbers, a verdict on each, and why a number contradicts itself."""
    numbers = [printed.get((row, anchored), Published(None, None)) for row, anchored in zip(table["row"], table["anchored"], strict=True)]
    table = table.copy()
    for kind in ("M_GT", "M_IP"):
        ours = table.get(f"{kind} as published", pd.Series(float("nan"), index=table.index))
        table[f"{kind} published"] = [getattr(one, kind) for one in numbers]
        pairs = zip(numbers, ours, strict=True)
        table[f"{kind} verdict"] = [verdict(getattr(one, kind), value, kind, one.contradicted) for one, value in pairs]
    table["note"] = [one.contradicted for one in numbers]
    return table


def page(name: str, size: str, experiment: Table, cells: list[Cell], table: pd.DataFrame) -> str:
    """The settings, then encoder, decoder and response side by side with what each cost."""
    setting = SIZES[size]
    head = [
        f"# {name}: {experiment.title}",
        "",
        f"Size `{size}`: {setting.n_features} features in {setting.d_in} dimensions, {setting.active:g} active, "
        f"{setting.n_latents} latents, {setting.steps} steps of {setting.batch_size}, rate {setting.lr:g}, one seed. "
        f"Published: 1000 features in 768 dimensions, 10 active, 16000 latents; {UNPRINTED}. A verdict compares the encoder (absolute "
        f"cosines, tau 0.95, features that were not anchored){'' if size == 'paper' else '; this is not the published size'}.",
        "",
    ]
    shown = table.assign(
        row=[", ".join(map(str, r)) if isinstance(r, tuple) else r for r in table["row"]], anchors=[c.n_anchors for c in cells]
    )
    columns = ["row", "anchors", "M_GT published", "M_GT as published", *(f"M_GT {side}" for side in SIDES)]
    columns += ["M_IP published", "M_IP as published", *(f"M_IP {side}" for side in SIDES)]
    columns += ["unexplained variance", "L0", "dead", "M_GT verdict", "M_IP verdict", "failed"]
    notes = sorted({note for note in table["note"] if note})
    methods = "Methods: " + "; ".join(sorted({repr(cell.method) for cell in cells})) + "."
    body = markdown_table(shown[[c for c in columns if c in shown]])
    return "\n".join(
        [
            *head,
            body,
            "",
            *(REALIGNED if any(cell.pull for cell in cells) else []),
            *(f"Contradicts itself: {note}." for note in notes),
            "",
            methods,
            "",
        ]
    )
