"""Did it help, and more than simply training on? Dumbbells per feature, and the scoreboard with its controls."""

from dataclasses import replace

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.diagnosis.alignment import Alignment, align
from sdl_explorer.diagnosis.compare import ENOUGH, Change, Control, change_per_feature
from sdl_explorer.views.frame import drawable, empty_table, finite, frame, limits, row_ticks, sample
from sdl_explorer.views.intervals import Arm, own_scale, under, whiskers
from sdl_explorer.views.look import Look
from sdl_explorer.views.theme import EDGE, LINES, MUTED, TEXT
from sdl_explorer.views.view import Before, view
from sdl_explorer.views.words import NO_COMMITS, NO_TRUTH, count, plural, too_few_pairs

MOST_ROWS = 60  # features drawn one by one; more become a histogram and the 20 best and worst
ENDS = 20
ARMS = (
    Arm("vs untreated", "against training on alone", "decoder", "circle", 0.12),
    Arm("vs sham", "against resetting at random (sham)", "encoder", "diamond", -0.12),
)
LOST = {"light": "#B85C00", "dark": "#E69F00"}
CHANGES = ("feature", "name", "before", "after", "change")


# C1 ------------------------------------------------------------------------------------------------------------------


@view("Which features moved, and which way?", id="C1", of=(Before(align), align), page="compare", cost="select")
def dumbbells(before, after, look):
    """One row a feature, hollow before and filled after; above 60 features a histogram beside the 20 best and worst.

    Row k of the `Points` labelled "after" is feature `dumbbells.ids(before, after, look)[k]`.
    """
    change = _change(before, after, look)
    shown = _ends(len(change.change))
    rows = _dumbbells(change, shown, look)
    if len(shown) == len(change.change):
        return rows
    return hv.Layout([_histogram(change, look), rows]).cols(1).opts(shared_axes=False, toolbar=None)


@dumbbells.reading
def _(before, after, look):
    change = _change(before, after, look)
    up, down = int((change.change > 0).sum()), int((change.change < 0).sum())
    mean = np.mean(finite(change.change)) if finite(change.change).size else np.nan
    moved = f"{count(up)} of {plural(len(change.change), 'feature')} gained and {count(down)} lost, mean change {mean:+.3f}"
    ends = f"most gained: {change.names[0]} ({change.change[0]:+.2f}), most lost: {change.names[-1]} ({change.change[-1]:+.2f})"
    return f"{look.side}: {moved}; {ends}."


@dumbbells.table
def _(before, after, look):
    if _not_comparable(before, after):
        return empty_table(*CHANGES)
    change = _change(before, after, look)
    return pd.DataFrame(dict(zip(CHANGES, (change.feature, change.names, change.before, change.after, change.change), strict=True)))


@dumbbells.empty
def _(before, after, look):
    return _not_comparable(before, after)


@dumbbells.ids
def _(before, after, look):
    change = _change(before, after, look)
    return change.feature[_ends(len(change.change))]


def _not_comparable(before: Alignment | None, after: Alignment | None) -> str | None:
    if after is None:
        return NO_TRUTH
    return NO_COMMITS if before is None or before.names != after.names else None


def _change(before: Alignment, after: Alignment, look: Look) -> Change:
    with np.errstate(invalid="ignore"):
        change = change_per_feature(before, after, look.side)
    return replace(change, before=drawable(change.before), after=drawable(change.after))


def _ends(n: int) -> np.ndarray:
    return np.arange(n) if n <= MOST_ROWS else np.r_[:ENDS, n - ENDS : n]


def _dumbbells(change: Change, shown: np.ndarray, look: Look) -> hv.Overlay:
    theme, place = look.theme, -np.arange(len(shown), dtype=float)
    before, after = change.before[shown], change.after[shown]
    names = [change.names[i] for i in shown]
    gained = np.where(after > before, "gained", np.where(after < before, "lost", "unchanged"))
    colours = {"gained": LINES["decoder"][theme], "lost": LOST[theme], "unchanged": EDGE[theme]}
    markers = {"gained": "triangle", "lost": "inverted_triangle", "unchanged": "circle"}
    bars = hv.Segments((before, place, after, place, gained), ["x0", "y0", "x1", "y1"], "change")
    hollow = hv.Points((before, place), ["cosine", "row"], label="before").opts(color=TEXT[theme], fill_alpha=0, size=8, line_width=1.5)
    data = {
        "cosine": after,
        "row": place,
        "feature": change.feature[shown],
        "name": names,
        "change": gained,
        "marker": [markers[g] for g in gained],
    }
    filled = hv.Points(data, ["cosine", "row"], ["feature", "name", "change", "marker"])
    entries = [sample(f"after: {g}", markers[g], colours[g]) for g in markers if (gained == g).any()]
    layers = [
        bars.opts(color="change", cmap=colours, line_width=3, show_legend=False),
        hollow,
        filled.opts(color="change", cmap=colours, marker="marker", size=10, tools=["hover", "tap", "box_select"], show_legend=False),
        hv.VLine(look.tau).opts(color=EDGE[theme], line_dash="dashed", line_width=1),
        *entries,
    ]
    low = min(0.0, limits([*before, *after])[0])
    all_of = (
        ""
        if len(shown) == len(change.change)
        else f"The {ENDS} that gained most and the {ENDS} that lost most of {count(len(change.change))}"
    )
    return frame(
        hv.Overlay(layers),
        look,
        xlim=(low, 1.04),
        ylim=(0.7 - len(shown), 0.7),
        xlabel=f"best {change.side} cosine",
        ylabel="",
        title=all_of,
        height=110 + 17 * max(len(shown), 3),
        yticks=row_ticks(names),
    )


def _histogram(change: Change, look: Look) -> hv.Overlay:
    theme, (low, high) = look.theme, limits(change.change, within=(-2.0, 2.0))
    top = max(abs(low), abs(high))
    heights, edges = np.histogram(finite(change.change), bins=41, range=(-top, top))
    bars = hv.Histogram((edges, heights), kdims="change", vdims="features").opts(color=LINES["decoder"][theme], line_color=EDGE[theme])
    zero = hv.VLine(0).opts(color=TEXT[theme], line_width=1)
    return frame(
        hv.Overlay([bars, zero]),
        look,
        xlim=(-top, top),
        ylim=(0, 1.08 * max(heights.max(), 1)),
        xlabel=f"change of the best {change.side} cosine",
        ylabel="features",
        title=f"All {count(len(change.change))} features, counted by change",
        height=220,
        legend=None,
    )


# C3 ------------------------------------------------------------------------------------------------------------------


@view("Did it help more than simply training on?", id="C3", of=(Control,), page="compare", cost="job")
def scoreboard(control, look):
    """Paired differences with 95 % intervals, each row on its own scale, over the band in which control runs differ anyway."""
    rows = control_table(control)
    theme, place = look.theme, -np.arange(len(rows), dtype=float)
    scale = own_scale(rows, [c for c in rows.columns if c.startswith("vs ")] + ["noise"])
    band = (rows["noise"] / scale).fillna(0.0)
    layers = [
        hv.Rectangles((-band, place - 0.27, band, place + 0.27), ["x0", "y0", "x1", "y1"]).opts(
            color=MUTED[theme], alpha=0.25, line_width=0
        ),
        sample("noise band of the controls", "square", MUTED[theme], 0.3),
    ]
    for arm in ARMS[: 2 if control.sham else 1]:
        layers += whiskers(rows, arm, scale, look)
    words = [f"{r['vs untreated']:+.3g}: {r.verdict}" for _, r in rows.iterrows()]
    layers += [
        hv.VLine(0).opts(color=TEXT[theme], line_width=1),
        under(words, ~rows["verdict"].str.startswith(("not ", "n = ")), -1.12, look),
    ]
    few = f"{too_few_pairs(control.n, ENOUGH)} " if control.n < ENOUGH else ""
    return frame(
        hv.Overlay(layers),
        look,
        xlim=(-1.15, 1.15),
        ylim=(0.3 - len(rows), 0.6),
        xlabel="← lower   difference, each row on its own scale   higher →",
        ylabel="",
        title=f"{few}{control.intervention}: {control.verdict()} ({plural(control.n, 'pair')}, {count(control.n_steps)} steps each)",
        height=170 + 54 * len(rows),
        columns=1,
        yticks=row_ticks(f"{'▸ ' if r.primary else ''}{r.label}" for r in rows.itertuples()),
        xticks=[(0, "0")],
    )


@scoreboard.reading
def _(control, look):
    gap = control.difference(control.primary)
    name = control.table().loc[control.primary, "label"]
    interval = f"95 % from {gap.low:+.4g} to {gap.high:+.4g}, {plural(control.n, 'pair')}"
    said = f"{name}: {gap.mean:+.4g} against training on alone ({interval}): {control.verdict()}."
    return said if control.n >= ENOUGH else f"{said} {too_few_pairs(control.n, ENOUGH)}"


@scoreboard.table
def _(control, look):
    return (
        empty_table("label", "before", "treated", "untreated", "vs untreated", "noise", "verdict")
        if control is None
        else control_table(control)
    )


@scoreboard.empty
def _(control, look):
    return NO_COMMITS if control is None else None


def control_table(control: Control) -> pd.DataFrame:
    """The control's own table and the noise band: two standard deviations of the untreated runs."""
    rows = control.table().reset_index()
    spread = [2 * np.std(control.untreated[m], ddof=1) if control.n > 1 else np.nan for m in rows["metric"]]
    return rows.assign(noise=spread)
