"""Which latents does another dictionary have too? Shared, split, merged and novel ones, with the pairs."""

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.diagnosis.compared import Compared
from sdl_explorer.diagnosis.twins import Side, Twins
from sdl_explorer.views.alignment import count_image, rings
from sdl_explorer.views.frame import MAX_POINTS, drawable, finite, frame
from sdl_explorer.views.latent_points import RateAxis, drawn_rows, pixels_said, token_legend, token_marks
from sdl_explorer.views.look import Look
from sdl_explorer.views.theme import EDGE, TWINS
from sdl_explorer.views.view import view
from sdl_explorer.views.words import NOT_COMPARED, count, plural

MEASURES = {"decoder": "cosine of decoder rows", "activations": "correlation of activations"}
COLUMNS = ("latent", "kind", "there", "similarity", "similarity of all its parts", "firing rate", "firing rate there")
ONLY_THERE = "only there"


@view("Which latents does another dictionary have too?", id="C6", of=(Compared,), page="compare", cost="job", columns=COLUMNS)
def shared_latents(compared, look):
    """One point per latent of this dictionary: how often it fires (x, logarithmic) and the similarity with the most similar latent of the
    other (y). Dashed: the threshold; dotted: what latents get that have nothing in common. Shared: one to one, at the threshold. Split
    there: several latents of the other stand for it, perhaps only together. Merged there: one of several that are one there. Novel: nothing
    there reaches the threshold. Novel latents of the other stand at their own rate, and at the similarity with the nearest one here.

    Row k of the first `Points` is latent `shared_latents.ids(compared, look)[k]`.
    """
    twins, theme = compared.twins, look.theme
    points, there, rates = twin_points(twins), _only_there(twins), RateAxis(twins.n_samples)
    drawn = points.iloc[_drawn(points, look)]
    ylim = (min([0.0, *finite(points["y"]), *finite(there["y"])]) - 0.05, 1.06)
    layers: list = [token_marks(drawn, TWINS, theme, [("there", "@there"), ("similarity", "@similarity{0.000}")])]
    if len(drawn) < len(points):
        layers.insert(0, count_image(points, rates.limits, ylim, theme))
    layers.append(_marks_there(there.head(MAX_POINTS), theme))
    layers.append(hv.HLine(twins.tau).opts(color=EDGE[theme], line_width=1, line_dash="dashed"))
    layers.append(hv.HLine(twins.chance).opts(color=EDGE[theme], line_width=2, line_dash="dotted"))
    status = pd.concat([points["status"], there["status"]])
    cut = f"\n{count(MAX_POINTS)} of {count(len(there))} novel ones there are drawn" if len(there) > MAX_POINTS else ""
    layers += [rates.border(theme), *rings(points, look), *token_legend(status, TWINS, theme)]
    return frame(
        hv.Overlay(layers),
        look,
        xlim=rates.limits,
        ylim=ylim,
        xlabel=rates.label,
        ylabel=f"{MEASURES[twins.by]}, the best there",
        title=f"Here {_counted(twins.here, 'there')}\nThere {_counted(twins.there, 'here')}{pixels_said(points, drawn)}{cut}",
        height=440,
        brush=True,
        xticks=rates.ticks,
    )


@shared_latents.reading
def _(compared, look):
    twins = compared.twins
    share = twins.here.shared_fraction
    said = [
        f"Compared with {compared.name}, by {MEASURES[twins.by]} at {twins.tau:g} or more, on {plural(twins.n_samples, 'row')}.",
        f"Here {_counted(twins.here, 'there')}; there {_counted(twins.there, 'here')}.",
        "No latent fires here." if share is None else f"Of those that fire here {share:.0%} are shared, one to one.",
        f"Latents with nothing in common have {twins.chance:.2f}.",
    ]
    if twins.chance >= twins.tau:
        said.append("That reaches the threshold: nothing follows from these numbers.")
    return " ".join([*said, f"{twins.note[0].upper()}{twins.note[1:]}."] if twins.note else said)


@shared_latents.table
def _(compared, look):
    twins = compared.twins
    here, there = twins.here, twins.there
    rate = there.firing_rate
    rows = []
    for i, (kind, partner) in enumerate(zip(here.kind, counterparts(twins), strict=True)):
        rate_there = max((float(rate[j]) for j in partner), default=0.0)
        names = ", ".join(map(str, partner))
        rows.append((i, TWINS[kind].word, names, here.similarity[i], here.joint[i], here.firing_rate[i], rate_there))
    for j in there.of("novel"):
        nearest = int(there.best[j])
        if nearest >= 0:  # none, where every latent here is silent
            own = here.firing_rate[nearest]
            rows.append((nearest, TWINS[ONLY_THERE].word, str(j), there.similarity[j], there.joint[j], own, rate[j]))
    return pd.DataFrame(rows, columns=COLUMNS)


@shared_latents.empty
def _(compared, look):
    return NOT_COMPARED if compared is None else None


@shared_latents.ids
def _(compared, look):
    points = twin_points(compared.twins)
    return points["latent"].to_numpy()[_drawn(points, look)]


def counterparts(twins: Twins) -> list[list[int]]:
    """For each latent here those there: its partner, its parts, what it is a part of, or the nearest one where it is novel."""
    here = twins.here
    parts: dict[int, list[int]] = {}
    for j in np.flatnonzero(twins.there.whole >= 0):
        parts.setdefault(int(twins.there.whole[j]), []).append(int(j))
    one = np.select([here.partner >= 0, here.whole >= 0], [here.partner, here.whole], here.best)
    return [parts.get(i, []) if here.kind[i] == "split" else [int(one[i])] if one[i] >= 0 else [] for i in range(len(one))]


def twin_points(twins: Twins) -> pd.DataFrame:
    """One row per latent here, in order: kind, counterparts there, and its place (x, y)."""
    here = twins.here
    return pd.DataFrame(
        {
            "latent": np.arange(len(here.kind)),
            "status": here.kind,
            "there": [", ".join(map(str, some)) for some in counterparts(twins)],
            "similarity": here.similarity,
            "x": drawable(RateAxis(twins.n_samples).places(here.firing_rate)),
            "y": drawable(here.similarity),
        }
    )


def _only_there(twins: Twins) -> pd.DataFrame:
    """One row per latent there that is novel, those that fire most first."""
    there, some = twins.there, twins.there.of("novel")
    some = some[np.argsort(-there.firing_rate[some], kind="stable")]
    place = {"x": drawable(RateAxis(twins.n_samples).places(there.firing_rate[some])), "y": drawable(there.similarity[some])}
    return pd.DataFrame({"there": some, "nearest": there.best[some], "status": ONLY_THERE, **place})


def _marks_there(there: pd.DataFrame, theme: str) -> hv.Points:
    token = TWINS[ONLY_THERE]
    tips = [("there", "latent @there"), ("nearest here", "@nearest"), ("similarity", "@y{0.000}")]
    style = {"color": token.colour(theme), "marker": token.marker, "fill_alpha": 0.0, "size": 9, "line_width": 1.5}
    return hv.Points(there, ["x", "y"], ["there", "nearest"]).opts(**style, tools=["hover"], hover_tooltips=tips)


def _drawn(points: pd.DataFrame, look: Look) -> np.ndarray:
    """Rows that become points: all, or those selected and those that are not shared, as many as fit."""
    return drawn_rows(len(points), look, np.flatnonzero(points["status"] != "shared")[:MAX_POINTS])


def _counted(side: Side, elsewhere: str) -> str:
    """How many of each kind; what is one here and several there is split there."""
    words = {"split": f"split {elsewhere}", "part": f"merged {elsewhere}"}
    kinds = ", ".join(f"{count(n)} {words.get(kind, kind)}" for kind, n in side.kinds.items() if n)
    return f"{plural(len(side.kind), 'latent')}: {kinds}"
