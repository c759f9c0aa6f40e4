"""Without truth: which latents may have taken another one's place, and what a pair does on the same rows. Never more than candidates."""

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.diagnosis.candidates import Candidate, Suspects, suspect_absorption
from sdl_explorer.diagnosis.candidates_pairs import Contained
from sdl_explorer.labels import Labels
from sdl_explorer.views.frame import TYPE, empty_table, frame, limits, same_when_selected, sample
from sdl_explorer.views.look import Look
from sdl_explorer.views.theme import EDGE, EDGES, MUTED, TEXT
from sdl_explorer.views.view import view
from sdl_explorer.views.words import NO_CANDIDATES, NOT_COMPUTED, count, crowded, plural

MAX_EDGES, MAX_CONTAINED = 20, 8  # drawn; the table has all that were kept
WORDS_AT = 0.34  # where the words beside a tree start
INDENT = 0.05
COLUMNS = (
    "latent",
    "parent",
    "kind",
    "label",
    "score",
    "cosine",
    "attenuation",
    "completion",
    "absorbed",
    "P(parent | child)",
    "P(child | parent)",
    "rows of child",
    "rows of parent",
    "rows of both",
    "holes",
    "similarity on child's rows",
    "similarity on parent's rows",
)
POINTS = ("rows of", "child", "parent")


# H5 ------------------------------------------------------------------------------------------------------------------


@view("Which latents may have taken another one's place?", id="H5", of=(suspect_absorption, Labels), page="absorption", cost="job")
def candidate_forest(found, labels, look):
    """Candidates, without truth: a dashed line joins a parent's latent to one that may have absorbed it, best score first. Where the
    child fires, the parent is silent or weak, and what the child writes along the parent makes up for it. {parent, child} and the
    exclusive pair {parent, parent + child} give the same data, so that this is never more than a candidate; what a person said of it
    stands behind. Grey: latents that fire only
    inside another one's rows; absorption breaks exactly these, so they are no candidates.

    Row k of the first `Points` is latent `candidate_forest.ids(found, look)[k]`.
    """
    theme, rows = look.theme, _rows(found, _said(labels))
    nodes = pd.DataFrame(
        {
            "x": [INDENT * row.depth for row in rows],
            "row": [-float(k) for k in range(len(rows))],
            "latent": [row.latent for row in rows],
            "says": [row.words for row in rows],
            "marker": [row.marker for row in rows],
            "colour": [MUTED[theme] if row.grey else EDGES["partly absorbed"].colour(theme) if row.depth else TEXT[theme] for row in rows],
            "fill": [0.0 if row.depth and not row.grey else 1.0 for row in rows],
        }
    )
    tips = [("latent", "@latent"), ("", "@says")]
    style = {"marker": "marker", "color": "colour", "fill_alpha": "fill", "size": 11, "line_width": 1.5}
    marks = hv.Points(nodes, ["x", "row"], ["latent", "says", "marker", "colour", "fill"])
    layers: list = [marks.opts(**style, tools=["hover", "tap"], hooks=[same_when_selected], hover_tooltips=tips)]
    for grey, dash, colour in ((False, "dashed", EDGES["partly absorbed"].colour(theme)), (True, "solid", EDGE[theme])):
        lines = [_elbow(rows, k) for k, row in enumerate(rows) if row.depth and row.grey == grey]
        layers.append(hv.Path(lines, ["x", "row"]).opts(color=colour, line_dash=dash, line_width=1.5))
    mine = nodes[nodes["latent"] == look.primary_latent]
    layers.append(hv.Points(mine, ["x", "row"]).opts(color=TEXT[theme], fill_alpha=0, line_width=2, size=19))
    for grey in (False, True):
        words = [(WORDS_AT, -float(k), row.words) for k, row in enumerate(rows) if row.grey == grey]
        names = [(INDENT * row.depth + 0.02, -float(k), f"latent {row.latent}") for k, row in enumerate(rows) if row.grey == grey]
        colour = MUTED[theme] if grey else TEXT[theme]
        layers += [hv.Labels(part, ["x", "y"], "text").opts(text_color=colour, text_align="left", **TYPE) for part in (names, words)]
    layers += [sample("candidate: a child that may hold its parent", "diamond", EDGES["partly absorbed"].colour(theme), 0.0)]
    if found.contained:
        layers += [sample("fires only inside the one above: no candidate", "circle", MUTED[theme])]
    return frame(
        hv.Overlay(layers),
        look,
        xlim=(-0.03, 1.3),
        ylim=(0.4 - len(rows), 0.8),
        xlabel="",
        ylabel="",
        title=_title(found, rows),
        height=130 + 24 * len(rows),
        columns=2,
        xaxis=None,
        yaxis=None,
        show_grid=False,
    )


@candidate_forest.reading
def _(found, labels, look):
    warned = _warned(found)
    if not found.candidates:
        return f"{NO_CANDIDATES} {_examined(found)}{warned}"
    warned += _judged(found, labels)
    if not found.confident:
        return f"No claim. {_counted(found)}{warned}"
    return f"{_counted(found)} Best: {_told(found.candidates[0])}.{warned}"


@candidate_forest.table
def _(found, labels, look):
    if found is None:
        return empty_table(*COLUMNS)
    said = _said(labels)
    rows = [_line(edge, said) for edge in found.candidates]
    rows += [_contained_line(edge, said) for edge in found.contained]
    return pd.DataFrame(rows, columns=COLUMNS)


@candidate_forest.empty
def _(found, labels, look):
    if found is None:
        return NOT_COMPUTED
    return None if found.candidates or found.contained else f"{NO_CANDIDATES} {_examined(found)}"


@candidate_forest.ids
def _(found, labels, look):
    return np.array([row.latent for row in _rows(found, {})])


# H6 ------------------------------------------------------------------------------------------------------------------


@view(
    "What does such a pair do on the same rows?", id="H6", of=(suspect_absorption, Labels), page="absorption", cost="select", columns=POINTS
)
def candidate_pair(found, labels, look):
    """The codes of one candidate pair: rows on which the child fires (filled), and rows of the parent without it (hollow). On the dashed
    line parent and child together write as much along the parent as its latent does without the child. Filled marks along the line are
    what absorption looks like; a cloud over the whole plot is not. Shows the pair of the selected latent, or the best."""
    at = chosen_candidate(found, look)
    edge, points, theme = found.candidates[at], found.points[at], look.theme
    layers: list = []
    for with_child, word in ((True, "the child fires"), (False, "the parent without it")):
        some = points[(points[:, 1] > 0) == with_child]
        colour = EDGES["partly absorbed"].colour(theme) if with_child else TEXT[theme]
        marks = hv.Points(pd.DataFrame({"child": some[:, 1], "parent": some[:, 0]}), ["child", "parent"], label=word)
        layers.append(marks.opts(color=colour, marker="circle", size=6, fill_alpha=0.7 if with_child else 0.0, line_width=1.2))
    right = max(float(points[:, 1].max()), edge.reference / edge.cosine)
    ends = [(0.0, edge.reference), (edge.reference / edge.cosine, 0.0)]
    line = hv.Curve(ends, "child", "parent", label="together as much as the parent alone")
    layers.append(line.opts(color=EDGE[theme], line_dash="dashed", line_width=2))
    return frame(
        hv.Overlay(layers),
        look,
        xlim=limits([0, right]),
        ylim=limits([0, float(points[:, 0].max()), edge.reference]),
        xlabel=f"code of latent {edge.child}, the child, times its norm",
        ylabel=f"code of latent {edge.parent}, the parent",
        title=f"{'Candidate' if found.confident else 'No claim'}: latent {edge.child} instead of latent {edge.parent}\n"
        f"left {edge.attenuation:.2f} · together {edge.completion:.2f} · cosine {edge.cosine:.2f}",
        height=380,
    )


@candidate_pair.reading
def _(found, labels, look):
    edge = found.candidates[chosen_candidate(found, look)]
    warned, claim = _warned(found) + _label_of(edge, labels), f"Candidate: {_told(edge)}."
    if not found.confident:
        claim = f"No claim about latents {edge.child} and {edge.parent}, only what their codes are."
    return (
        f"{claim} Latent {edge.parent} fires on {edge.given_child:.0%} of latent {edge.child}'s "
        f"{plural(edge.n_child, 'row')}, latent {edge.child} on {edge.given_parent:.0%} of latent {edge.parent}'s {count(edge.n_parent)}. "
        f"A hole in {edge.holes:.0%} of {plural(edge.n_looked, 'row')} looked at: the row has the parent's direction, its latent gives "
        f"little.{warned}"
    )


@candidate_pair.table
def _(found, labels, look):
    points = found.points[chosen_candidate(found, look)]
    which = np.where(points[:, 1] > 0, "the child", "the parent alone")
    return pd.DataFrame({"rows of": which, "child": points[:, 1], "parent": points[:, 0]})


@candidate_pair.empty
def _(found, labels, look):
    if found is None:
        return NOT_COMPUTED
    return None if found.candidates else f"{NO_CANDIDATES} {_examined(found)}"


# what they share -----------------------------------------------------------------------------------------------------


class _Row:
    """One line of the forest: a latent, how deep it stands, and what is said of it."""

    def __init__(self, latent: int, depth: int, words: str, above: int = -1, grey: bool = False):
        self.latent, self.depth, self.words, self.above, self.grey = latent, depth, words, above, grey
        self.marker = "diamond" if depth and not grey else "circle"


def _rows(found: Suspects, said: dict) -> list[_Row]:
    """The best candidates as trees, then the containment layer."""
    forest = found.forest
    kept = [edge for edge in found.candidates if forest[edge.child] == edge.parent][:MAX_EDGES]
    below: dict[int, list[Candidate]] = {}
    for edge in kept:
        below.setdefault(edge.parent, []).append(edge)
    rows: list[_Row] = []

    def walk(latent: int, depth: int, words: str, above: int) -> None:
        rows.append(_Row(latent, depth, words, above))
        here = len(rows) - 1
        for edge in below.get(latent, ()):
            walk(edge.child, depth + 1, _beside(edge, said), here)

    children = {edge.child for edge in kept}
    for parent in below:
        if parent not in children:
            walk(parent, 0, "", -1)
    inside: dict[int, list[Contained]] = {}
    for pair in found.contained[:MAX_CONTAINED]:
        inside.setdefault(pair.outer, []).append(pair)
    for outer, pairs in inside.items():
        rows.append(_Row(outer, 0, "", grey=True))
        here = len(rows) - 1
        rows += [_Row(pair.inner, 1, f"fires inside it: {_shares(pair)}", here, grey=True) for pair in pairs]
    return rows


def _elbow(rows: list[_Row], k: int) -> list[tuple[float, float]]:
    """From under the row above to the left of row k."""
    x = INDENT * rows[rows[k].above].depth
    return [(x, -rows[k].above - 0.3), (x, -float(k)), (INDENT * rows[k].depth - 0.012, -float(k))]


def chosen_candidate(found: Suspects, look: Look) -> int:
    """Place of the candidate whose child, or else whose parent, is the primary latent; else the best."""
    mine = [k for k, edge in enumerate(found.candidates) if edge.child == look.primary_latent]
    mine += [k for k, edge in enumerate(found.candidates) if edge.parent == look.primary_latent]
    return mine[0] if mine else 0


def _beside(edge: Candidate, said: dict) -> str:
    label = said.get((edge.parent, edge.child))
    return (
        f"candidate: takes {edge.absorbed:.0%} of latent {edge.parent}, leaves {edge.attenuation:.2f}, together {edge.completion:.2f}; "
        f"score {edge.score:.2f}{f'; {label}' if label else ''}"
    )


def _told(edge: Candidate) -> str:
    return (
        f"latent {edge.child} may have taken latent {edge.parent}'s place. Where it fires, latent {edge.parent} keeps "
        f"{edge.attenuation:.2f} of its usual {edge.reference:.3g}, and both write {edge.completion:.2f} of it (cosine {edge.cosine:.2f})"
    )


def _warned(found: Suspects) -> str:
    """How far to trust it: the detector's precision on benches, what spike-ins say, and whether latents crowd each other."""
    worth = f' Detector "absorption": {found.worth}.'
    spikes = "" if found.on_spikes is None else f" {str(found.on_spikes).capitalize()}."
    return f"{worth}{spikes}" if found.reliable else f"{worth}{spikes} {crowded(found.crosstalk, found.coherence)}"


def _judged(found: Suspects, labels: Labels | None) -> str:
    said = _said(labels)
    words = [said.get((edge.parent, edge.child)) for edge in found.candidates]
    counts = [f"{count(words.count(word))} {word}" for word in dict.fromkeys(word for word in words if word)]
    return f" Labelled: {', '.join(counts)}." if counts else ""


def _label_of(edge: Candidate, labels: Labels | None) -> str:
    mine = [label for label in labels or () if label.about == (edge.parent, edge.child)]
    return "".join(f" Labelled {label.says} at step {count(label.step)}." for label in mine)


def _shares(pair: Contained) -> str:
    return f"on {pair.given_inner:.0%} of its rows; the other way {pair.given_outer:.0%}"


def _counted(found: Suspects) -> str:
    more = f" {count(found.n_unlooked)} more pairs pass the test and were not looked at." if found.n_unlooked else ""
    return f"{plural(len(found.candidates), 'candidate')}. {_examined(found)}{more}"


def _examined(found: Suspects) -> str:
    left = f", {count(found.n_left_out)} left out" if found.n_left_out else ""
    return f"{plural(len(found.examined.score), 'pair')} of near latents examined on {plural(found.n_samples, 'row')}{left}."


def _title(found: Suspects, rows: list[_Row]) -> str:
    drawn = sum(1 for row in rows if row.depth and not row.grey)
    grey = sum(1 for row in rows if row.depth and row.grey)
    said = f"{plural(len(found.candidates), 'candidate')}, {plural(found.n_contained, 'latent')} inside another"
    if drawn < len(found.candidates) or grey < found.n_contained:
        said += f"; {count(drawn)} and {count(grey)} drawn, one parent a latent, best first"
    if not found.reliable:
        return f"{said}\nNo claim here: latents crowd each other"
    return said if found.confident else f"{said}\nNo claim here: {found.worth.brief}"


def _said(labels: Labels | None) -> dict[tuple[int, ...], str]:
    """What a person said of each pair."""
    return {label.about: label.says for label in labels or ()}


def _line(edge: Candidate, said: dict) -> tuple:
    shares = (edge.given_child, edge.given_parent, edge.n_child, edge.n_parent, edge.n_both)
    return (
        edge.child,
        edge.parent,
        "candidate",
        said.get((edge.parent, edge.child), ""),
        edge.score,
        edge.cosine,
        edge.attenuation,
        edge.completion,
        edge.absorbed,
        *shares,
        edge.holes,
        edge.similarity_child,
        edge.similarity_parent,
    )


def _contained_line(pair: Contained, said: dict) -> tuple:
    shares = (pair.given_inner, pair.given_outer, pair.n_inner, pair.n_outer, pair.n_both)
    return (pair.inner, pair.outer, "fires inside it", said.get((pair.outer, pair.inner), ""), *[np.nan] * 5, *shares, *[np.nan] * 3)
