"""Labelled concepts: how much of each other latents write, and which latents took a concept's children."""

import textwrap

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.diagnosis.concept_scores import LEAST_F1, ConceptAbsorption, ConceptScore
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.diagnosis.probes import score_absorption
from sdl_explorer.views.frame import TYPE, bars, empty_table, frame, row_ticks, same_when_selected
from sdl_explorer.views.theme import EDGES, TEXT
from sdl_explorer.views.view import view
from sdl_explorer.views.words import count, plural

MAX_ROWS = 24  # drawn; the table has all
GLOSS = 84  # letters of an example that stand beside a row
NO_LABELS = (
    "These activations have no labels, so that no concept is known. Give Stored or capture labels=; a tree of concepts is named "
    "“animal > bird”."
)
CONCEPTS = ("concept", "rows", "probe F1", "main F1", "recall", "full", "fraction", "main latents", "absorbers")
CHILDREN = ("latent", "child", "rows", "recall", "fraction", "rows taken", "share", "examples")


# H7 ------------------------------------------------------------------------------------------------------------------


@view(
    "How much of each labelled concept do other latents write?",
    id="H7",
    of=(score_absorption, check_health),
    page="concepts",
    cost="job",
)
def concepts(found, health, look):
    """SAEBench's absorption fraction of each concept with a probe of F1 above 0.6, the largest first (bars), beside the share of its rows
    on which one of its main latents fires (circles). A small fraction with a small recall is no merit: nothing was learned that could be
    absorbed. Only rows of the concept that its probe finds are counted."""
    shown = _worst(found)[:MAX_ROWS]
    theme = look.theme
    place = -np.arange(len(shown), dtype=float)
    rows = pd.DataFrame({"concept": [one.path for one in shown], "fraction": [one.fraction for one in shown]})
    drawn = bars(rows, "fraction", [EDGES["partly absorbed"].colour(theme)] * len(shown), look).opts(fill_alpha=0.55)
    recall = hv.Points(([one.recall for one in shown], place), ["recall", "row"], label="recall of its main latents")
    circles = recall.opts(color=TEXT[theme], fill_alpha=0, line_width=2, size=10, tools=["hover"], hooks=[same_when_selected])
    left_out = (
        f"\n{count(len(shown))} of {plural(found.n_concepts, 'concept')} drawn; the table has all." if len(shown) < found.n_concepts else ""
    )
    return frame(
        drawn * circles,
        look,
        xlim=(-0.02, 1.04),
        ylim=(0.4 - len(shown), 0.7),
        xlabel="bar: absorption fraction; circle: share of the concept's rows on which a main latent fires",
        ylabel="",
        title=f"{_means(found)}{_explained(health)}{left_out}",
        height=130 + 24 * len(shown),
        legend=None,
        yticks=row_ticks(f"{one.name} ({count(one.n)})" for one in shown),
    )


@concepts.reading
def _(found, health, look):
    worst = _worst(found)[0]
    absorbers = ", ".join(f"{latent}" for latent, _ in worst.absorbers[:3])
    by = f", by latents {absorbers}" if absorbers else ""
    return f"{_means(found)}{_explained(health)}. Most absorbed: {worst.name}, fraction {worst.fraction:.2f}{by}."


@concepts.table
def _(found, health, look):
    return empty_table(*CONCEPTS) if found is None else found.table()


@concepts.empty
def _(found, health, look):
    return nothing(found)


# H8 ------------------------------------------------------------------------------------------------------------------


@view("Which latents took a concept's children?", id="H8", of=(score_absorption,), page="concepts", cost="job", columns=CHILDREN)
def children(found, look):
    """The concepts below one, those that lose the most first. Bar: absorption fraction of the concept above on the rows of the one below;
    circle: the share of them on which a main latent of the concept above fires. Beside it the latent that writes the concept instead on
    most of these rows, and one of them. A click on the diamond selects that latent.

    Row k of the first `Points` is latent `children.ids(found, look)[k]`.
    """
    one, theme = opened(found), look.theme
    below = one.below[:MAX_ROWS]
    place = -np.arange(len(below), dtype=float)
    colour = EDGES["partly absorbed"].colour(theme)
    rows = pd.DataFrame({"fraction": [t.fraction for t in below], "row": place, "child": [t.name for t in below]})
    drawn = bars(rows, "fraction", [colour] * len(below), look).opts(fill_alpha=0.55)
    taken = [(t, y) for t, y in zip(below, place, strict=True) if t.latent >= 0]
    marks = pd.DataFrame(
        {
            "fraction": [t.fraction for t, _ in taken],
            "row": [y for _, y in taken],
            "latent": [t.latent for t, _ in taken],
            "child": [t.name for t, _ in taken],
            "share": [t.share for t, _ in taken],
            "example": [t.texts[0] if t.texts else "" for t, _ in taken],
        }
    )
    points = hv.Points(marks, ["fraction", "row"], ["latent", "child", "share", "example"])
    tips = [("child", "@child"), ("latent", "@latent"), ("its share", "@share{0.00}"), ("for example", "@example")]
    points = points.opts(color=colour, marker="diamond", size=13, tools=["hover", "tap"], hooks=[same_when_selected], hover_tooltips=tips)
    ring = marks[marks["latent"] == look.primary_latent]
    circles = hv.Points(([t.recall for t in below], place), ["recall", "row"])
    says = [(1.06, y, _says(t)) for t, y in taken]
    layers = [
        drawn,
        points,
        circles.opts(color=TEXT[theme], fill_alpha=0, line_width=2, size=10, hooks=[same_when_selected]),
        hv.Points(ring, ["fraction", "row"]).opts(color=TEXT[theme], fill_alpha=0, line_width=2, size=20),
        hv.Labels(says, ["x", "y"], "text").opts(text_color=TEXT[theme], text_align="left", **TYPE),
    ]
    drops = f"\n{count(len(below))} of {plural(len(one.below), 'concept')} drawn; the table has all." if len(below) < len(one.below) else ""
    return frame(
        hv.Overlay(layers),
        look,
        xlim=(-0.02, 3.4),
        ylim=(0.4 - len(below), 0.7),
        xlabel=f"bar: fraction of “{one.name}” that other latents write there; circle: recall of its main latents",
        ylabel="",
        title=f"{one.path}: {plural(one.n, 'row')}, main latents {_list(one.main)}{drops}",
        height=130 + 26 * max(len(below), 2),
        legend=None,
        yticks=row_ticks(f"{t.name} ({count(t.n)})" for t in below),
        xticks=[0, 0.25, 0.5, 0.75, 1],
    )


@children.reading
def _(found, look):
    one = opened(found)
    said = f"{one.name}: its main latents {_list(one.main)} fire on {one.recall:.0%} of its rows; fraction {one.fraction:.2f}."
    first = one.below[0]
    if first.latent < 0:
        return f"{said} No other latent takes its children."
    example = f" For example “{textwrap.shorten(first.texts[0], GLOSS, placeholder=' …')}”." if first.texts else ""
    return (
        f"{said} On {first.name}, latent {first.latent} writes {first.share:.0%} of it instead in {first.n_taken} of "
        f"{plural(first.n, 'row')}.{example}"
    )


@children.table
def _(found, look):
    return found.children(opened(found).concept)[list(CHILDREN)]


@children.empty
def _(found, look):
    why = nothing(found)
    if why is not None:
        return why
    one = opened(found)
    return (
        None
        if one.below
        else f"No concept below “{one.name}” has enough rows to be looked at; labels such as “{one.name} > ...” make them."
    )


@children.ids
def _(found, look):
    return np.array([t.latent for t in opened(found).below[:MAX_ROWS] if t.latent >= 0])


# what they share -----------------------------------------------------------------------------------------------------


def openable(found: ConceptAbsorption) -> list[ConceptScore]:
    """Judged concepts that have others below them, by path; all that are judged where none has."""
    return [one for one in found.judged if one.below] or list(found.judged)


def opened(found: ConceptAbsorption) -> ConceptScore:
    """The concept that was opened, else the one whose rows lose the most in all."""
    among = openable(found)
    return next((one for one in among if one.concept == found.opened), max(among, key=lambda one: (one.fraction or 0.0) * one.n_tested))


def nothing(found: ConceptAbsorption | None) -> str | None:
    """Why no concept can be shown."""
    if found is None:
        return NO_LABELS
    if not found.n_concepts:
        few = f" {plural(found.n_left_out, 'label')} with too few rows." if found.n_left_out else ""
        many = plural(len(found.concepts), "labelled concept")
        return f"None of {many} has a probe with F1 above {LEAST_F1}: no direction to be absorbed.{few}"
    return None


def _worst(found: ConceptAbsorption) -> list[ConceptScore]:
    return sorted(found.judged, key=lambda one: (-(one.fraction or 0.0), one.path))


def _means(found: ConceptAbsorption) -> str:
    return (
        f"{plural(found.n_concepts, 'concept')}: mean fraction {found.mean_fraction:.2f}, full {found.mean_full:.2f}, recall of the main "
        f"latents {found.mean_recall:.2f}"
    )


def _explained(health) -> str:
    return "" if health is None else f"; explained variance {1 - health.unexplained_variance:.2f}"


def _says(taken) -> str:
    example = textwrap.shorten(taken.texts[0], GLOSS, placeholder=" …") if taken.texts else ""
    return f"latent {taken.latent} ({taken.n_taken}): {example}"


def _list(latents) -> str:
    return ", ".join(map(str, latents)) or "none"
