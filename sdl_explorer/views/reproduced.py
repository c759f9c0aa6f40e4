"""The figure of a reproduced table: what was published beside what was measured on each side, as a page that needs no network."""

from pathlib import Path

import holoviews as hv
import pandas as pd

from sdl_explorer.views.frame import frame
from sdl_explorer.views.look import Look
from sdl_explorer.views.theme import LINES, TEXT

MARKS = {"encoder": "circle", "decoder": "square", "response": "triangle"}


def reproduced(table: pd.DataFrame, title: str, look: Look) -> hv.Overlay:
    """Shares of the features above tau, one row a cell, the first on top: encoder, decoder, response, and the published share."""
    done = table[table["failed"] == ""].reset_index(drop=True)
    place = [-float(i) for i in range(len(done))]
    layers = []
    for side, marker in MARKS.items():
        points = hv.Points((done[f"M_GT {side}"], place), ["share", "row"], label=side)
        layers.append(points.opts(marker=marker, size=9, color=LINES[side][look.theme], tools=["hover"]))
    printed = pd.to_numeric(done["M_GT published"], errors="coerce")
    layers.append(
        hv.Points((printed, place), ["share", "row"], label="published (encoder)").opts(marker="x", size=11, color=TEXT[look.theme])
    )
    names = [f"{_name(row)}{' + anchors' if anchored else ''}" for row, anchored in zip(done["row"], done["anchored"], strict=True)]
    return frame(
        hv.Overlay(layers),
        look,
        xlim=(-0.03, 1.03),
        ylim=(0.7 - len(done), 0.7),
        xlabel="share of the features recovered at τ 0.95 (held out)",
        ylabel="",
        title=title,
        height=120 + 26 * len(done),
        yticks=[(-float(i), name) for i, name in enumerate(names)],
    )


def save_figure(table: pd.DataFrame, title: str, path: Path) -> Path:
    """Write `reproduced` as one HTML file with its scripts inside."""
    hv.renderer("bokeh").save(reproduced(table, title, Look(width=900)), str(Path(path).with_suffix("")), fmt="html", resources="inline")
    return path


def _name(row) -> str:
    return ", ".join(map(str, row)) if isinstance(row, tuple) else str(row)
