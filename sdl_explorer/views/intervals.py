"""Differences with their intervals, one row each: what controls, repairs and trials draw alike."""

from typing import NamedTuple

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.views.frame import TYPE, drawable
from sdl_explorer.views.look import Look
from sdl_explorer.views.theme import LINES, MUTED, TEXT


class Arm(NamedTuple):
    """What one mark of every row is: a column of the table, whose interval is in "... low" and "... high", and how it is drawn."""

    column: str
    word: str
    line: str
    marker: str
    shift: float


def whiskers(rows: pd.DataFrame, arm: Arm, scale, look: Look) -> list:
    """A mark and its interval for each row of a table with the columns of the arm, `label` and `verdict`; endless ones have no bar."""
    colour, place = LINES[arm.line][look.theme], arm.shift - np.arange(len(rows), dtype=float)
    names = (arm.column, f"{arm.column} low", f"{arm.column} high")
    centre, low, high = (drawable(rows[name] / scale) for name in names)
    bounded = np.isfinite(low) & np.isfinite(high)
    ends = (low[bounded], place[bounded], high[bounded], place[bounded])
    data = {"place": centre, "row": place, "metric": rows["label"], "difference": rows[arm.column], "verdict": rows["verdict"]}
    points = hv.Points(data, ["place", "row"], ["metric", "difference", "verdict"], label=arm.word)
    tips = [("", "@metric"), ("difference", "@difference"), ("", "@verdict")]
    return [
        hv.Segments(ends, ["x0", "y0", "x1", "y1"]).opts(color=colour, line_width=2),
        points.opts(color=colour, marker=arm.marker, size=10, tools=["hover"], hover_tooltips=tips),
    ]


def under(texts: list[str], told, left: float, look: Look) -> hv.Labels:
    """Words under each row, from the left; grey where nothing can be told."""
    data = {
        "x": np.full(len(texts), left),
        "y": -np.arange(len(texts), dtype=float) - 0.47,
        "text": texts,
        "colour": np.where(told, TEXT[look.theme], MUTED[look.theme]),
    }
    return hv.Labels(data, ["x", "y"], ["text", "colour"]).opts(text_color="colour", text_align="left", **TYPE)


def own_scale(rows: pd.DataFrame, columns: list[str]) -> np.ndarray:
    """Each row's largest finite extent, 1 where there is none."""
    extents = rows[columns].abs().replace(np.inf, np.nan).max(axis=1)
    return extents.where(extents > 0, 1.0).to_numpy(dtype=float)
