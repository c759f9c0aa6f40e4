"""Two meanings that a list of top examples hides: how strongly a latent fires for each cause."""

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.diagnosis.causes import Causes, trace_causes
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.views.frame import frame, row_ticks, same_when_selected
from sdl_explorer.views.theme import EDGE, EDGES, LINES, TEXT
from sdl_explorer.views.view import Chosen, view
from sdl_explorer.views.words import NO_SELECTION, NOT_COMPUTED, count, never_fired, plural

COLUMNS = ("cause", "name", "from", "to", "rows")
UNKNOWN = "causes unknown"


@view(
    "Does it fire with different strengths for different things?",
    id="P3",
    of=(check_health, Chosen(trace_causes, "latent", "primary_latent")),
    page="latents",
    cost="select",
    columns=COLUMNS,
)
def ridges(health, causes, look):
    """Histograms of the primary latent's codes, one ridge for each feature that is behind most of a row's drive, with shared bins.
    Heights are logarithmic in the rows of a bin. Two humps at different strengths are two meanings that the strongest examples hide.
    A mark stands at the median code of each cause. Without truth there is one ridge: causes unknown."""
    theme, found = look.theme, causes.ridges()
    top = np.log1p(max(found.counts.max(initial=0), 1))
    place, bin_ = np.nonzero(found.counts)
    low, high = found.edges[bin_], found.edges[bin_ + 1]
    rows, height = found.counts[place, bin_], 0.86 * np.log1p(found.counts[place, bin_]) / top
    named = _names(causes, found.features)
    data = {"x0": low, "y0": -place - 0.4, "x1": high, "y1": -place - 0.4 + height, "rows": rows, "cause": [named[k] for k in place]}
    colours = [_colour(found.features[k], theme) for k in place]
    blocks = hv.Rectangles(data | {"colour": colours}, ["x0", "y0", "x1", "y1"], ["rows", "cause", "colour"])
    tips = [("cause", "@cause"), ("code", "@x0{0.000} to @x1{0.000}"), ("rows", "@rows")]
    style = {"fill_color": "colour", "fill_alpha": 0.6, "line_color": EDGE[theme], "line_width": 0.5}
    layers: list = [blocks.opts(**style, tools=["hover"], hover_tooltips=tips, hooks=[same_when_selected])]
    real = np.flatnonzero(found.features >= 0)
    if len(real):
        features = found.features[real]
        medians = [float(np.median(causes.values_of(int(k)))) for k in features]
        marks = hv.Points({"code": medians, "row": -real - 0.4, "feature": features}, ["code", "row"], "feature", label="median")
        layers.append(marks.opts(color=TEXT[theme], marker="triangle", size=11, tools=["tap"], hooks=[same_when_selected]))
        chosen = real[features == look.primary_feature]
        if len(chosen):
            ring = hv.Points(([medians[list(real).index(chosen[0])]], -chosen - 0.4), ["code", "row"], label="Selected")
            layers.append(ring.opts(color=TEXT[theme], fill_alpha=0, line_width=2, size=21))
    return frame(
        hv.Overlay(layers),
        look,
        xlim=(-0.02 * found.edges[-1], 1.04 * found.edges[-1]),
        ylim=(-len(named) + 0.35, 0.65),
        xlabel=f"code of latent {causes.latent}; heights: logarithm of the rows in a bin",
        ylabel="",
        title=_title(causes),
        height=140 + 48 * len(named),
        yticks=row_ticks(named),
    )


@ridges.reading
def _(health, causes, look):
    fired = f"Latent {causes.latent} fires on {count(len(causes.row))} of {plural(causes.n_samples, 'row')}"
    if not causes.names:
        return f"{fired}, median code {np.median(causes.value):.3g}; {UNKNOWN}: there are no true features."
    found = causes.ridges()
    parts = []
    for k in found.features[found.features >= 0][:3]:
        values = causes.values_of(int(k))
        parts.append(f"{causes.names[k]} is behind {len(values) / len(causes.row):.0%} (median code {np.median(values):.3g})")
    return f"{fired}: {'; '.join(parts) or 'no known feature is behind any of them'}."


@ridges.table
def _(health, causes, look):
    found = causes.ridges()
    place, bin_ = np.nonzero(found.counts)
    names = _names(causes, found.features)
    columns = found.features[place], [names[k] for k in place], found.edges[bin_], found.edges[bin_ + 1], found.counts[place, bin_]
    return pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))


@ridges.empty
def _(health, causes, look):
    if look.primary_latent is None:
        return NO_SELECTION
    if causes is None:
        return NOT_COMPUTED
    return None if len(causes.row) else never_fired(causes.n_samples)


def _names(causes: Causes, features: np.ndarray) -> list[str]:
    others = len(np.unique(causes.feature[causes.feature >= 0])) - int((features >= 0).sum())
    known = {-2: plural(others, "other feature"), -1: "no known feature" if causes.names else UNKNOWN}
    return [known[k] if k < 0 else causes.names[k] for k in features.tolist()]


def _colour(feature: int, theme: str) -> str:
    return LINES["response"][theme] if feature >= 0 else EDGES["not eligible"].colour(theme)


def _title(causes: Causes) -> str:
    if not causes.names:
        return f"Latent {causes.latent}: {UNKNOWN}"
    real = len(np.unique(causes.feature[causes.feature >= 0]))
    return f"Latent {causes.latent}: {plural(real, 'cause')} on {plural(len(causes.row), 'row')}"
