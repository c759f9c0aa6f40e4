"""Figures of experiments: what was published beside what was measured, and curves by arm."""

from itertools import cycle
from pathlib import Path

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.views.frame import frame, limits
from sdl_explorer.views.look import Look
from sdl_explorer.views.theme import LINES, TEXT

MARKS = {"encoder": "circle", "decoder": "square", "response": "triangle"}
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
WIDE = Look(width=900)


def reproduced(table: pd.DataFrame, title: str, look: Look = WIDE) -> hv.Overlay:
    """Shares of the features above tau, one row a cell, the first on top: encoder, decoder, response, and the published share."""
    done = table[table["failed"] == ""].reset_index(drop=True)
    place = [-float(i) for i in range(len(done))]
    layers = []
    for side, marker in MARKS.items():
        points = hv.Points((done.get(f"M_GT {side}", pd.Series(dtype=float)), place), ["share", "row"], label=side)
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


def lines(table: pd.DataFrame, x: str, y: str, by: str, title: str, look: Look = WIDE) -> hv.Overlay:
    """One curve for each value of `by`; rows whose column `dashed` is true are the dashed ones."""
    layers, colours = [], cycle(OKABE_ITO)
    for name, group in table.groupby(by, sort=False):
        dash = "dashed" if "dashed" in group and bool(group["dashed"].iloc[0]) else "solid"
        curve = hv.Curve((group[x], group[y]), x, y, label=str(name))
        layers.append(curve.opts(color=next(colours), line_width=2, line_dash=dash, tools=["hover"]))
    return frame(
        hv.Overlay(layers), look, xlim=limits(table[x]), ylim=limits(table[y]), xlabel=x, ylabel=y, title=title, legend="right", columns=1
    )


def arrows(sides: dict, title: str) -> hv.Overlay:
    """Directions in the plane, unit length, from the origin: {label: rows (n, 2)}."""
    layers = []
    for (label, rows), colour, dash in zip(sides.items(), (TEXT["light"], *OKABE_ITO), ("solid", "dashed", "dotted"), strict=False):
        ends = np.asarray(rows.detach()) / np.linalg.norm(rows.detach(), axis=1, keepdims=True)
        paths = [np.stack([np.zeros(2), end]) for end in ends]
        layers.append(hv.Path(paths, label=label).opts(color=colour, line_dash=dash, line_width=3))
    square = (-1.15, 1.15)
    return frame(hv.Overlay(layers), Look(width=420), xlim=square, ylim=square, xlabel="", ylabel="", title=title, height=440)


def stacked(plots: list, columns: int = 1) -> hv.Layout:
    """Several figures on one page, each with axes of its own."""
    return hv.Layout(plots).cols(columns).opts(shared_axes=False)


def save_figure(figure, path: Path) -> Path:
    """One HTML file with its scripts inside: it opens without a network."""
    hv.renderer("bokeh").save(figure, str(path), fmt="html", resources="inline")
    return path.with_suffix(".html")


def _name(row) -> str:
    return ", ".join(map(str, row)) if isinstance(row, tuple) else str(row)
