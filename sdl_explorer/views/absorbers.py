"""What an absorber writes, and whether the parent vanishes without it."""

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.diagnosis.absorption import Absorption, find_absorption
from sdl_explorer.diagnosis.edges import Absorber, Edge
from sdl_explorer.views.absorption import MAX_EDGES, chosen, edge_name, kinds_title, nothing, worst_first
from sdl_explorer.views.frame import TYPE, bars, frame, limits, row_ticks, same_when_selected
from sdl_explorer.views.theme import EDGE, EDGES, STATUSES, TEXT
from sdl_explorer.views.view import view
from sdl_explorer.views.words import NO_ABSORBERS

WRITERS = ("latent", "child", "parent", "kind", "takes", "parent part", "child part", "rest")
CHECKS = ("latent", "child", "parent", "kind", "with it", "without it", "no child")


# H3 ------------------------------------------------------------------------------------------------------------------


@view("What does the absorber write?", id="H3", of=(find_absorption,), page="absorption", cost="select", columns=WRITERS)
def decomposition(absorption, look):
    """The decoder rows of the latents that take a parent over, as parent + child + rest with coefficients of at least 0. A part of the
    parent clearly above 0 is the signature of absorption. Shows the edge of the selected feature, or the worst one."""
    edge = chosen(absorption, look, _taken_over(absorption))
    theme, parts = look.theme, ("parent", "child", "rest")
    rows = pd.DataFrame(
        [
            {"label": f"latent {a.latent}: {part}", "length": length, "latent": a.latent}
            for a in edge.evidence.absorbers
            for part, length in zip(parts, (a.parent_part, a.child_part, a.residual), strict=True)
        ]
    )
    tokens = (EDGES["absorbed"], STATUSES["matched"], STATUSES["dead"])
    drawn = bars(rows, "length", [t.colour(theme) for t in tokens] * len(edge.evidence.absorbers), look)
    numbers = hv.Labels(
        (rows["length"] + 0.015, -rows.index.to_numpy(dtype=float), [f"{v:.2f}" for v in rows["length"]]), ["x", "y"], "text"
    )
    return frame(
        drawn * numbers.opts(text_color=TEXT[theme], text_align="left", **TYPE),
        look,
        xlim=(0, max(1.0, float(rows["length"].max())) + 0.14),
        ylim=(0.3 - len(rows), 0.7),
        xlabel="coefficient in the latent's unit decoder row; rest: norm of what neither explains",
        ylabel="",
        title=f"{edge_name(absorption, edge)}: {edge.kind}",
        height=110 + 28 * len(rows),
        legend=None,
        yticks=row_ticks(rows["label"]),
    )


@decomposition.reading
def _(absorption, look):
    edge = chosen(absorption, look, _taken_over(absorption))
    first, hole = edge.evidence.absorbers[0], edge.evidence.hole
    avoids = "avoids" if hole is not None and hole < 0 else "does not avoid"
    reads = "" if hole is None else f" The encoder of the parent's latent {edge.latent} {avoids} the child: cosine {hole:.2f}."
    return (
        f"{edge_name(absorption, edge)}: latent {first.latent} writes {first.child_part:.2f} of the child and {first.parent_part:.2f} of "
        f"the parent; {first.residual:.2f} is neither.{reads}"
    )


@decomposition.table
def _(absorption, look):
    names = absorption.names
    return pd.DataFrame(
        [
            (a.latent, names[e.child], names[e.parent], e.kind, a.takes, a.parent_part, a.child_part, a.residual)
            for e, a in _takers(absorption)
        ],
        columns=WRITERS,
    )


@decomposition.empty
def _(absorption, look):
    return nothing(absorption) or (None if _taken_over(absorption) else NO_ABSORBERS)


# H4 ------------------------------------------------------------------------------------------------------------------


@view("Does the parent vanish without the absorber?", id="H4", of=(find_absorption,), page="absorption", cost="job", columns=CHECKS)
def causal_check(absorption, look):
    """On rows with parent and child: how much of the parent is reconstructed by all latents (filled), and with the absorber's code set
    to zero (hollow). Dash: what is reconstructed without the child. 1 is all of the parent. Without this, absorption is a correlation.

    Row k of the first `Points` is latent `causal_check.ids(absorption, look)[k]`.
    """
    takers = _takers(absorption)[:MAX_EDGES]
    theme, place = look.theme, -np.arange(len(takers), dtype=float)
    whole, left, off = (np.array(part) for part in zip(*(_check(e, a) for e, a in takers), strict=True))
    layers: list = [hv.Segments((left, place, whole, place), ["x0", "y0", "x1", "y1"]).opts(color=EDGE[theme], line_width=2)]
    for values, label, marker, fill in (
        (whole, "all latents", "circle", 1.0),
        (left, "absorber's code at zero", "circle", 0.0),
        (off, "rows without the child", "dash", 1.0),
    ):
        data = {"written": values, "row": place, "latent": [a.latent for _, a in takers]}
        points = hv.Points(data, ["written", "row"], "latent", label=label)
        style = {"angle": 90} if marker == "dash" else {"tools": ["hover", "tap"], "hooks": [same_when_selected]}
        layers.append(points.opts(color=TEXT[theme], marker=marker, size=11, fill_alpha=fill, line_width=2, **style))
    return frame(
        hv.Overlay(layers),
        look,
        xlim=limits([0, 1, *whole, *left, *off]),
        ylim=(0.3 - len(takers), 0.7),
        xlabel="written along the parent, of its activation",
        ylabel="",
        title=kinds_title(absorption, len(takers), len(_takers(absorption)), "absorber"),
        height=130 + 34 * max(len(takers), 2),
        yticks=row_ticks(f"{edge_name(absorption, e)}: latent {a.latent} {EDGES[e.kind].shape}" for e, a in takers),
    )


@causal_check.reading
def _(absorption, look):
    edge = chosen(absorption, look, _taken_over(absorption))
    absorber = edge.evidence.absorbers[0]
    whole, left, off = _check(edge, absorber)
    return (
        f"{edge_name(absorption, edge)}: with latent {absorber.latent}'s code at zero, {left:.2f} of the parent is written instead of "
        f"{whole:.2f}; without the child it is {off:.2f}."
    )


@causal_check.table
def _(absorption, look):
    names = absorption.names
    rows = [(a.latent, names[e.child], names[e.parent], e.kind, *_check(e, a)) for e, a in _takers(absorption)]
    return pd.DataFrame(rows, columns=CHECKS)


@causal_check.empty
def _(absorption, look):
    return decomposition.empty(absorption, look)


@causal_check.ids
def _(absorption, look):
    return np.array([a.latent for _, a in _takers(absorption)[:MAX_EDGES]])


# what they share -----------------------------------------------------------------------------------------------------


def _taken_over(absorption: Absorption) -> list[Edge]:
    """Judged edges with a latent that writes more of the parent when the child is active, worst first."""
    return [e for e in worst_first(absorption.eligible) if e.evidence.absorbers and e.evidence.contrast]


def _takers(absorption: Absorption) -> list[tuple[Edge, Absorber]]:
    return [(e, a) for e in _taken_over(absorption) for a in e.evidence.absorbers]


def _check(edge: Edge, absorber: Absorber) -> tuple[float, float, float]:
    """Of the parent's activation, what is written along it: with the absorber, with its code at zero, and without the child."""
    rows = edge.evidence.contrast
    if rows is None:
        raise ValueError(f"edge {edge.parent} - {edge.child}: its parent has no latent, so that nothing can be compared.")
    return rows.written_on, absorber.left, rows.written_off
