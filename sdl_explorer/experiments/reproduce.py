"""`sdl-explorer reproduce NAME`: the data, the figure, a manifest of every setting, and a verdict beside each published number."""

import json
import platform
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from sdl_explorer.experiments.cells import SIDES, Cell, run_cells
from sdl_explorer.experiments.published import Published, verdict
from sdl_explorer.experiments.tables import SIZES, TABLES, Table
from sdl_explorer.models.atomic import write_file

UNPRINTED = "optimiser, learning rate, batch, steps, initialisation, decoder constraint, penalties, k and seeds are not in the paper"


def reproduce(name: str, size: str, folder, device: str = "auto", say: Callable[[str], None] = lambda text: None) -> pd.DataFrame:
    """Run one published table and write `NAME.csv`, `NAME.md`, `NAME.html` and `NAME.json` into `folder`, and the runs below it.

    Run it again to go on where it was interrupted.
    """
    if name not in TABLES or size not in SIZES:
        raise ValueError(f"reproduce: {name!r} at {size!r} is unknown. Tables: {', '.join(TABLES)}; sizes: {', '.join(SIZES)}.")
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    experiment, setting = TABLES[name], SIZES[size]
    cells = experiment.cells(setting)
    table = beside(run_cells(cells, folder / "runs", device, say), experiment.printed)
    write_file(folder / f"{name}.json", json.dumps(manifest(name, size, cells), indent=1, default=str).encode())
    write_file(folder / f"{name}.csv", table.to_csv(index=False).encode())
    write_file(folder / f"{name}.md", markdown(name, size, experiment, cells, table).encode())
    from sdl_explorer.views.reproduced import save_figure

    save_figure(table, f"{experiment.title} ({size})", folder / f"{name}.html")
    return table


def beside(table: pd.DataFrame, printed: dict[tuple, Published]) -> pd.DataFrame:
    """The table with the published numbers, a verdict on each, and why a number contradicts itself."""
    numbers = [printed.get((row, anchored), Published(None, None)) for row, anchored in zip(table["row"], table["anchored"], strict=True)]
    table = table.copy()
    for kind in ("M_GT", "M_IP"):
        ours = table.get(f"{kind} as published", pd.Series(float("nan"), index=table.index))
        table[f"{kind} published"] = [getattr(one, kind) for one in numbers]
        table[f"{kind} verdict"] = [
            verdict(getattr(one, kind), value, kind, one.contradicted) for one, value in zip(numbers, ours, strict=True)
        ]
    table["note"] = [one.contradicted for one in numbers]
    return table


def manifest(name: str, size: str, cells: list[Cell]) -> dict:
    """Every setting of every cell, and the machine."""
    return {
        "experiment": name,
        "size": size,
        "setting": SIZES[size]._asdict(),
        "not specified": UNPRINTED,
        "machine": {"processor": platform.processor() or platform.machine(), "system": platform.system()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "cells": [cell.record for cell in cells],
    }


def markdown(name: str, size: str, experiment: Table, cells: list[Cell], table: pd.DataFrame) -> str:
    """The table as a page: settings, then encoder, decoder and response side by side with what each cost."""
    setting = SIZES[size]
    lines = [
        f"# {name}: {experiment.title}",
        "",
        f"Size `{size}`: {setting.n_features} features in {setting.d_in} dimensions, {setting.active:g} active, "
        f"{setting.n_latents} latents, "
        f"{setting.steps} steps of {setting.batch_size}, one seed; what a row changes stands in its name. Published: 1000 features in 768 "
        f"dimensions, 10 active, 16000 latents; {UNPRINTED}. A verdict compares the encoder (absolute cosines, tau 0.95, features that "
        f"were not anchored){'' if size == 'paper' else '; this is not the published size'}.",
        "",
        "| row | anchors | published M_GT | ours, encoder | decoder | response | published M_IP | ours, encoder | decoder | response "
        "| unexplained variance | L0 | dead | M_GT | M_IP |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    anchors = [cell.n_anchors for cell in cells]
    for n_anchors, (_, row) in zip(anchors, table.iterrows(), strict=True):
        label = ", ".join(map(str, row["row"])) if isinstance(row["row"], tuple) else row["row"]
        if row["failed"]:
            lines.append(f"| {label} | {n_anchors} | failed: {row['failed']} |" + " |" * 12)
            continue
        shown = [
            _percent(row["M_GT published"]),
            _percent(row["M_GT as published"]),
            *(_percent(row[f"M_GT {side}"]) for side in SIDES[1:]),
        ]
        shown += [_number(row["M_IP published"]), _number(row["M_IP as published"]), *(_number(row[f"M_IP {side}"]) for side in SIDES[1:])]
        shown += [_number(row["unexplained variance"]), f"{row['L0']:.1f}", _percent(row["dead"]), row["M_GT verdict"], row["M_IP verdict"]]
        lines.append(f"| {label} | {n_anchors} | " + " | ".join(shown) + " |")
    notes = sorted({note for note in table["note"] if note})
    return "\n".join(
        [
            *lines,
            "",
            *(f"Contradicts itself: {note}." for note in notes),
            "",
            "Methods: " + "; ".join(sorted({repr(c.method) for c in cells})) + ".",
            "",
        ]
    )


def _percent(value) -> str:
    return "–" if value is None or pd.isna(value) else f"{value:.1%}"


def _number(value) -> str:
    return "–" if value is None or pd.isna(value) else f"{value:.3f}"
