"""Which children took their parent's latent's place: the tree of concepts, and the recalls behind it."""

from collections.abc import Sequence

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.diagnosis.absorption import Absorption, find_absorption
from sdl_explorer.diagnosis.edges import KINDS, Edge
from sdl_explorer.views.frame import TYPE, empty_table, frame, row_ticks, same_when_selected, sample
from sdl_explorer.views.look import Look
from sdl_explorer.views.theme import EDGE, EDGES, TEXT
from sdl_explorer.views.view import view
from sdl_explorer.views.words import NO_FAMILIES, NO_FAMILY_TRUTH, count, none_eligible, plural

MAX_EDGES = 30  # drawn; the table has all
NAME = 24  # letters of a name that stand in the tree
COLUMNS = (
    "feature",
    "child",
    "parent",
    "kind",
    "parent's latent",
    "recall with child",
    "recall without child",
    "gap",
    "gap low",
    "gap high",
    "rows with",
    "rows without",
    "absorber",
    "why",
)


# H1 ------------------------------------------------------------------------------------------------------------------


@view("Which children took their parent's place?", id="H1", of=(find_absorption,), page="absorption", cost="job")
def holes(absorption, look):
    """The tree of concepts, worst first. Bar: the share of a child's rows, with its parent active, on which the parent's latent fires.

    Its colour, the mark at its end and the words beside it say what kind of edge this is. Row k of the first `Points` is
    feature `holes.ids(absorption, look)[k]`.
    """
    theme, edges = look.theme, worst_first(absorption.edges)[:MAX_EDGES]
    rows = tree(edges)
    table = _bars_of(rows, absorption, theme)
    recall = hv.Rectangles(table, ["x0", "low", "recall", "high"], ["colour", "alpha"])
    layers: list = [recall.opts(fill_color="colour", fill_alpha="alpha", line_color="colour", line_width=1)]
    marks = hv.Points(table, ["recall", "row"], ["feature", "child", "kind", "latent_id", "marker", "colour", "fill"])
    tips = [("child", "@child"), ("kind", "@kind"), ("recall of the parent's latent", "@recall{0.00}"), ("parent's latent", "@latent_id")]
    style = {"marker": "marker", "color": "colour", "fill_alpha": "fill", "size": 12, "line_width": 1.5}
    layers.append(marks.opts(**style, tools=["hover", "tap"], hooks=[same_when_selected], hover_tooltips=tips))
    layers += _ring(table, look)
    layers += [*_names(rows, absorption, theme), *_legend(absorption, theme)]
    return frame(
        hv.Overlay(layers),
        look,
        xlim=(-0.62, 1.72),
        ylim=(0.4 - len(rows), 0.8),
        xlabel="share of the rows with parent and child on which the parent's latent fires",
        ylabel="",
        title=kinds_title(absorption, len(edges), len(absorption.edges)),
        height=140 + 26 * len(rows),
        columns=4,
        yaxis=None,
        xticks=[0, 0.25, 0.5, 0.75, 1],
    )


@holes.reading
def _(absorption, look):
    edge = worst_first(absorption.edges)[0]
    gap = absorption.mean_gap
    mean = "" if gap is None else f" Mean gap of the {plural(len(absorption.eligible), 'edge')} that can be judged: {gap:.2f}."
    return f"{_counted(absorption)}. Worst: {_told(absorption, edge)}.{mean}"


@holes.table
def _(absorption, look):
    return empty_table(*COLUMNS) if nothing(absorption) else edge_table(absorption)


@holes.empty
def _(absorption, look):
    return nothing(absorption)


@holes.ids
def _(absorption, look):
    return np.array([edge.child for _, _, edge in tree(worst_first(absorption.edges)[:MAX_EDGES]) if edge is not None])


# H2 ------------------------------------------------------------------------------------------------------------------


@view("Does the parent's latent go silent when a child is active?", id="H2", of=(find_absorption,), page="absorption", cost="job")
def recalls(absorption, look):
    """Per edge that can be judged: how often the parent's latent fires with the child (filled) and without it (hollow), with 95 %
    intervals. A hole is a filled mark far left of a hollow one."""
    edges = _judged(absorption)[:MAX_EDGES]
    theme, place = look.theme, -np.arange(len(edges), dtype=float)
    layers: list = []
    for with_child, shift in ((False, 0.16), (True, -0.16)):
        bounds = [e.evidence.recall_with_interval if with_child else e.evidence.recall_without_interval for e in edges]
        values = [e.recall_with if with_child else e.recall_without for e in edges]
        colour = TEXT[theme] if with_child else EDGE[theme]
        spans = hv.Segments(([b.low for b in bounds], place + shift, [b.high for b in bounds], place + shift), ["x0", "y0", "x1", "y1"])
        data = {"recall": values, "row": place + shift, "feature": [e.child for e in edges], "kind": [e.kind for e in edges]}
        points = hv.Points(data, ["recall", "row"], ["feature", "kind"], label="with the child" if with_child else "without the child")
        fill = 1.0 if with_child else 0.0
        layers += [
            spans.opts(color=colour, line_width=2),
            points.opts(
                color=colour, marker="circle", size=10, fill_alpha=fill, line_width=2, tools=["hover", "tap"], hooks=[same_when_selected]
            ),
        ]
    return frame(
        hv.Overlay(layers),
        look,
        xlim=(-0.04, 1.04),
        ylim=(0.3 - len(edges), 0.7),
        xlabel="share of the parent's rows on which its latent fires (95 % interval)",
        ylabel="",
        title=kinds_title(absorption, len(edges), len(absorption.eligible)),
        height=130 + 34 * max(len(edges), 2),
        yticks=row_ticks(f"{edge_name(absorption, e)} {EDGES[e.kind].shape}" for e in edges),
    )


@recalls.reading
def _(absorption, look):
    edge = chosen(absorption, look, _judged(absorption))
    gap, contrast = edge.evidence.gap_interval, edge.evidence.contrast
    alone = "" if contrast is None or contrast.siblings else " These last shares leave rows with a sibling out."
    return (
        f"{edge_name(absorption, edge)}: latent {edge.latent} fires on {edge.recall_with:.0%} of {plural(edge.n_with, 'row')} with the "
        f"child and on {edge.recall_without:.0%} of {count(edge.n_without)} without; gap {edge.gap:.2f} ({gap.low:.2f} to {gap.high:.2f}). "
        f"{EDGES[edge.kind].word}: {edge.why}.{alone}"
    )


@recalls.table
def _(absorption, look):
    table = empty_table(*COLUMNS) if nothing(absorption) else edge_table(absorption)
    return table[table["kind"] != "not eligible"].reset_index(drop=True)


@recalls.empty
def _(absorption, look):
    return nothing(absorption)


# what they share -----------------------------------------------------------------------------------------------------


def worst_first(edges: Sequence[Edge]) -> list[Edge]:
    """By kind, in the order of KINDS, then by gap, the largest first."""
    return sorted(edges, key=lambda e: (KINDS.index(e.kind), e.gap is None, -(e.gap or 0.0), e.child))


def tree(edges: Sequence[Edge]) -> list[tuple[int, int, Edge | None]]:
    """(feature, depth, its edge or None at a root), each parent right above its children, else in the order given."""
    below: dict[int, list[Edge]] = {}
    for edge in edges:
        below.setdefault(edge.parent, []).append(edge)
    rows: list[tuple[int, int, Edge | None]] = []

    def walk(feature: int, depth: int, edge: Edge | None) -> None:
        rows.append((feature, depth, edge))
        for child in below.get(feature, ()):
            walk(child.child, depth + 1, child)

    children = {edge.child for edge in edges}
    for parent in below:
        if parent not in children:
            walk(parent, 0, None)
    return rows


def chosen(absorption: Absorption, look: Look, among: Sequence[Edge]) -> Edge:
    """Of these, worst first: the edge whose child, or else whose parent, is the primary feature; else the worst."""
    feature = look.primary_feature
    return next((e for e in among if e.child == feature), next((e for e in among if e.parent == feature), among[0]))


def edge_table(absorption: Absorption) -> pd.DataFrame:
    """One row per edge, worst first; not-a-number where nothing is known."""
    names = absorption.names
    rows = [
        (
            e.child,
            names[e.child],
            names[e.parent],
            e.kind,
            e.latent,
            *(np.nan if x is None else x for x in (e.recall_with, e.recall_without, e.gap)),
            *e.evidence.gap_interval,
            e.n_with,
            e.n_without,
            e.absorber,
            e.why,
        )
        for e in worst_first(absorption.edges)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def nothing(absorption: Absorption | None) -> str | None:
    """Why no edge can be shown, and what to do about it."""
    if absorption is None:
        return NO_FAMILY_TRUTH
    if not absorption.edges:
        return NO_FAMILIES
    if not absorption.eligible:
        return none_eligible(len(absorption.edges), _told(absorption, worst_first(absorption.edges)[0]))
    return None


def _judged(absorption: Absorption) -> list[Edge]:
    return worst_first([e for e in absorption.eligible if e.gap is not None])


def edge_name(absorption: Absorption, edge: Edge) -> str:
    return f"{absorption.names[edge.child]} under {absorption.names[edge.parent]}"


def _told(absorption: Absorption, edge: Edge) -> str:
    return f"{edge_name(absorption, edge)} ({edge.kind}): {edge.why}"


def _counted(absorption: Absorption) -> str:
    kinds = ", ".join(f"{count(n)} {EDGES[kind].word.lower()}" for kind, n in absorption.kinds.items() if n)
    return f"{plural(len(absorption.edges), 'parent-child edge')}: {kinds}"


def kinds_title(absorption: Absorption, drawn: int, n: int, noun: str = "edge") -> str:
    return _counted(absorption) + (f"\n{count(drawn)} of {plural(n, noun)} drawn, worst first; the table has all." if drawn < n else "")


def _bars_of(rows, absorption: Absorption, theme: str) -> pd.DataFrame:
    """What is drawn of each edge of a tree."""
    edges = [(-float(k), e) for k, (_, _, e) in enumerate(rows) if e is not None]
    tokens = [EDGES[e.kind] for _, e in edges]
    return pd.DataFrame(
        {
            "x0": 0.0,
            "low": [k - 0.32 for k, _ in edges],
            "high": [k + 0.32 for k, _ in edges],
            "row": [k for k, _ in edges],
            "recall": [np.nan if e.recall_with is None else e.recall_with for _, e in edges],
            "feature": [e.child for _, e in edges],
            "child": [absorption.names[e.child] for _, e in edges],
            "kind": [e.kind for _, e in edges],
            "latent_id": [e.latent for _, e in edges],
            "marker": [t.marker for t in tokens],
            "colour": [t.colour(theme) for t in tokens],
            "fill": [0.0 if t.hollow else 1.0 for t in tokens],
            "alpha": [0.1 if t.hollow else 0.55 for t in tokens],
        }
    )


def _ring(table: pd.DataFrame, look: Look) -> list[hv.Points]:
    mine = table[table["feature"] == look.primary_feature]
    if mine.empty:
        return []
    return [hv.Points(mine, ["recall", "row"], label="Selected").opts(color=TEXT[look.theme], fill_alpha=0, line_width=2, size=20)]


def _names(rows, absorption: Absorption, theme: str) -> list[hv.Labels]:
    """Names on the left, indented; kinds in words on the right."""
    left = [(-0.6 + 0.05 * depth, -float(k), _short(absorption.names[feature])) for k, (feature, depth, _) in enumerate(rows)]
    right = [(1.05, -float(k), _beside(edge)) for k, (_, _, edge) in enumerate(rows) if edge is not None]
    style = {"text_color": TEXT[theme], "text_align": "left", **TYPE}
    return [hv.Labels(part, ["x", "y"], "text").opts(**style) for part in (left, right)]


def _short(name: str) -> str:
    return name if len(name) <= NAME else name[: NAME - 1] + "…"


def _beside(edge: Edge) -> str:
    token = EDGES[edge.kind]
    instead = f": latent {edge.absorber}" if edge.absorber >= 0 else ""
    return f"{token.shape} {token.word.lower()}{instead}"


def _legend(absorption: Absorption, theme: str) -> list[hv.Points]:
    tokens = [(EDGES[kind], n) for kind, n in absorption.kinds.items() if n]
    return [sample(f"{t.word} ({count(n)})", t.marker, t.colour(theme), 0.0 if t.hollow else 1.0) for t, n in tokens]
