"""What all plots share: canvas instead of WebGL, explicit ranges, readable type, a legend, words on the tools."""

import textwrap
from collections.abc import Callable
from typing import SupportsFloat

import holoviews as hv
import holoviews.plotting.bokeh
import numpy as np
import pandas as pd
from holoviews.core import Dimensioned

from sdl_explorer.views.look import Look
from sdl_explorer.views.theme import BACKGROUND, EDGE, FONT, FONT_SIZE, GRID, MUTED, TEXT

Range = tuple[SupportsFloat, SupportsFloat]
HEIGHT = 400
MAX_POINTS = 16_384  # drawn one by one; more become a count image
TYPE = {"text_font": {"value": FONT}, "text_font_size": "12px"}  # of text inside a plot
BRUSH = ("tap", "box_select", "lasso_select")
TOOL_WORDS = {
    "PanTool": "Move the plot (drag)",
    "BoxZoomTool": "Zoom to a box (drag)",
    "WheelZoomTool": "Zoom (wheel)",
    "ResetTool": "Reset the zoom",
    "SaveTool": "Save as PNG",
    "TapTool": "Select one (click)",
    "BoxSelectTool": "Select a box (drag)",
    "LassoSelectTool": "Select with a lasso (drag)",
    "HoverTool": "Values under the pointer",
}


def configure() -> None:
    """Plain canvases: browsers drop the oldest of 8 to 16 WebGL contexts, and some machines have none."""
    hv.renderer("bokeh").webgl = False


def frame(
    element: Dimensioned,
    look: Look,
    *,
    xlim: Range,
    ylim: Range,
    xlabel: str,
    ylabel: str,
    title: str = "",
    height: int = HEIGHT,
    legend: str | None = "bottom",
    columns: int = 3,
    brush: bool = False,
    **extra,
) -> Dimensioned:
    """The element with explicit ranges and everything that the plots share.

    `legend` is the side where it stands ("bottom", "right", ...) or None, `columns` its width in entries.
    `brush` makes dragging a box the first gesture.
    A `DynamicMap` of such elements follows their ranges, and keeps a zoom as long as they stay the same.
    """
    options = {
        **_size(look, height),
        "xlim": xlim,
        "ylim": ylim,
        "xlabel": xlabel,
        "ylabel": ylabel,
        "title": title,
        "framewise": True,
        "toolbar": "right",
        "default_tools": ["pan", "box_zoom", "reset", "save"],
        "active_tools": ["box_select", "tap"] if brush else [],
        "show_legend": legend is not None,
        "hooks": [_dress(look.theme, xlim, ylim)],
        **extra,
    }
    if isinstance(element, hv.Overlay) and legend is not None:
        options |= {"legend_position": legend, "legend_cols": columns}
    return element.opts(**options)


def blank(words: str, look: Look, height: int = HEIGHT) -> hv.Text:
    """Words in the middle instead of an empty canvas."""
    text = hv.Text(0.5, 0.5, textwrap.fill(words, 60)).opts(color=TEXT[look.theme], **TYPE | {"text_font_size": "14px"})
    return frame(
        text,
        look,
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel="",
        ylabel="",
        height=height,
        legend=None,
        xaxis=None,
        yaxis=None,
        toolbar=None,
        show_grid=False,
    )


def sample(word: str, marker: str, colour: str, fill: float = 1.0) -> hv.Points:
    """A legend entry: one mark that lies nowhere."""
    nowhere = hv.Points([(np.nan, np.nan)], ["x", "y"], label=word)
    return nowhere.opts(marker=marker, color=colour, size=9, fill_alpha=fill, line_width=1.5)


def bars(rows: pd.DataFrame, value: str, colours: list[str], look: Look, thickness: float = 0.7) -> hv.Rectangles:
    """Horizontal bars from 0, the first row on top; pair it with `row_ticks`. Every column of `rows` is in the data."""
    place = -np.arange(len(rows), dtype=float)
    lengths = rows[value].to_numpy(dtype=float)
    data = rows.assign(x0=0.0, y0=place - thickness / 2, x1=lengths, y1=place + thickness / 2, colour=colours)
    kept = [str(c) for c in rows.columns]
    return hv.Rectangles(data, ["x0", "y0", "x1", "y1"], [*kept, "colour"]).opts(
        fill_color="colour", line_color=EDGE[look.theme], line_width=0.5
    )


def row_ticks(labels) -> list[tuple[float, str]]:
    """Names of horizontal rows, the first on top."""
    return [(-float(i), str(label)) for i, label in enumerate(labels)]


def limits(values, margin: float = 0.05, within: Range | None = None) -> Range:
    """A range that holds every finite value with a margin; (0, 1) where there is none."""
    known = finite(values)
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    if low == high:
        low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    pad = margin * (high - low)
    low, high = low - pad, high + pad
    return (low, high) if within is None else (max(low, within[0]), min(high, within[1]))


def log_limits(values, margin: float = 0.05) -> Range:
    """A range for a logarithmic axis: positive, and holding every positive finite value."""
    known = finite(values)
    positive = known[known > 0]
    low, high = np.log10([positive.min(), positive.max()]) if positive.size else (0.0, 1.0)
    pad = max(margin * (high - low), 0.05)
    return float(10 ** (low - pad)), float(10 ** (high + pad))


def log_ticks(within: Range) -> list[float]:
    """A few round numbers: decades, and where a logarithmic axis covers less than one, steps between them."""
    low, high = within
    if high >= 10 * low:
        first, last = int(np.ceil(np.log10(low))), int(np.floor(np.log10(high)))
        return [float(f"1e{power}") for power in range(first, last + 1, 1 + (last - first) // 5)]
    decade = 10 ** np.floor(np.log10(high - low))
    step = next(size for size in (5 * decade, 2 * decade, decade, decade / 2) if np.floor(high / size) > np.ceil(low / size))
    return [float(f"{tick:.9g}") for tick in step * np.arange(np.ceil(low / step), np.floor(high / step) + 1)]


def finite(values) -> np.ndarray:
    """The finite ones among the values, flat."""
    flat = np.asarray(values, dtype=float).ravel()
    return flat[np.isfinite(flat)]


def drawable(values) -> np.ndarray:
    """The values with not-a-number for whatever is not finite: marks that are left out."""
    values = np.asarray(values, dtype=float)
    return np.where(np.isfinite(values), values, np.nan)


def empty_table(*columns: str) -> pd.DataFrame:
    """No rows, and the columns that there would be."""
    return pd.DataFrame({name: [] for name in columns})


def _size(look: Look, height: int) -> dict:
    size = {"height": look.height or height}
    return size | ({"responsive": True, "min_width": 240} if look.width is None else {"width": look.width})


def _dress(theme: str, xlim, ylim) -> Callable:
    """A hook: ranges (an overlay in a DynamicMap keeps its first ones), the theme's colours, and type."""

    def hook(plot, element) -> None:
        figure = plot.state
        if plot.handles.get("ranges") != (xlim, ylim):
            plot.handles["ranges"] = (xlim, ylim)
            figure.x_range.update(start=xlim[0], end=xlim[1], reset_start=xlim[0], reset_end=xlim[1])
            figure.y_range.update(start=ylim[0], end=ylim[1], reset_start=ylim[0], reset_end=ylim[1])
        figure.update(
            output_backend="canvas",
            background_fill_color=BACKGROUND[theme],
            border_fill_color=BACKGROUND[theme],
            outline_line_color=GRID[theme],
        )
        figure.title.update(text_color=TEXT[theme], text_font_size=FONT_SIZE["title"], text_font_style="normal")
        for axis in figure.axis:
            axis.update(**_axis_style(theme))
        for grid in figure.grid:
            grid.grid_line_color = None if plot.show_grid is False else GRID[theme]
        for legend in figure.legend:
            legend.update(**_legend_style(theme))
        figure.toolbar.logo = None
        for tool in figure.toolbar.tools:
            tool.description = TOOL_WORDS.get(type(tool).__name__, tool.description)

    return hook


def _axis_style(theme: str) -> dict:
    return {
        "axis_label_text_color": TEXT[theme],
        "axis_label_text_font": FONT,
        "axis_label_text_font_size": FONT_SIZE["label"],
        "axis_label_text_font_style": "normal",
        "major_label_text_color": MUTED[theme],
        "major_label_text_font": FONT,
        "major_label_text_font_size": FONT_SIZE["tick"],
        "axis_line_color": EDGE[theme],
        "major_tick_line_color": EDGE[theme],
        "minor_tick_line_color": None,
    }


def colorbar_style(theme: str) -> dict:
    """`colorbar_opts` of an image: Bokeh's own are black on white."""
    return {
        "background_fill_color": BACKGROUND[theme],
        "title_text_color": TEXT[theme],
        "title_text_font_size": FONT_SIZE["label"],
        "title_text_font_style": "normal",
        "major_label_text_color": MUTED[theme],
        "major_label_text_font_size": FONT_SIZE["tick"],
    }


def _legend_style(theme: str) -> dict:
    return {
        "background_fill_color": BACKGROUND[theme],
        "background_fill_alpha": 0.9,
        "border_line_color": None,
        "label_text_color": TEXT[theme],
        "label_text_font": FONT,
        "label_text_font_size": FONT_SIZE["legend"],
        "click_policy": "none",
        "glyph_height": 18,
        "glyph_width": 22,
        "padding": 2,
        "margin": 0,
        "spacing": 6,
    }


def same_when_selected(plot, element) -> None:
    """Rings mark the selection; Bokeh's own fading would hide what is hollow."""
    plot.handles["glyph_renderer"].update(selection_glyph=None, nonselection_glyph=None, muted_glyph=None)
