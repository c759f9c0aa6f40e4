"""Does a latent mean one thing? The selectivity scatter of all latents, and the response profile of one."""

from typing import NamedTuple

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.diagnosis.groups import Groups, trace_groups
from sdl_explorer.diagnosis.health import Health, check_health
from sdl_explorer.diagnosis.meanings import Polysemanticity, suspect_polysemantic
from sdl_explorer.diagnosis.patterns import POLY, Patterns, trace_patterns
from sdl_explorer.views.alignment import count_image, rings
from sdl_explorer.views.frame import MAX_POINTS, TYPE, drawable, empty_table, finite, frame, limits, row_ticks, same_when_selected, sample
from sdl_explorer.views.latent_points import RateAxis, drawn_rows, pixels_said, token_counts, token_legend, token_marks
from sdl_explorer.views.look import Look
from sdl_explorer.views.theme import EDGE, LINES, PATTERNS, TEXT
from sdl_explorer.views.view import view
from sdl_explorer.views.words import NO_SELECTION, NOT_COMPUTED, count, never_fired, plural

STRONGEST = 12  # rows of a profile that are drawn; the table has all
OFTEN = 0.5  # P(fires | feature) above which it fires in context too
NO_TRUE = "No true features: groups of rows instead, and a group is not a meaning."


# P2 ------------------------------------------------------------------------------------------------------------------


@view(
    "How many things does each latent mean?",
    id="P2",
    of=(trace_patterns, trace_groups, check_health, suspect_polysemantic),
    page="latents",
    cost="live",
)
def selectivity(patterns, groups, health, suspects, look):
    """One point per latent: how often it fires (x, logarithmic; silent ones in a gutter on the left) and the effective number of
    features behind its activation (y): 1 / sum of squared shares. Lines at 1 and 2.

    Without truth: groups of rows (anchors, labels or clusters) in place of features; the dotted line is a latent that fires alike
    everywhere; candidates are those of `suspect_polysemantic`, shown where that is right more often than not on benches of this
    coherence. Row k of the first `Points` is latent `selectivity.ids(patterns, groups, health, suspects, look)[k]`.
    """
    points, theme = selectivity_points(patterns, groups, health, suspects), look.theme
    drawn = points.iloc[_drawn(points, look)]
    rates = RateAxis((patterns if patterns is not None else groups).n_samples)
    top = max(2.2, limits([0, *finite(points["y"])], margin=0.1)[1])
    ylim = (-0.04 * top, top)
    tips = [("in effect", "@effective{0.00}"), ("firing rate", "@firing_rate{0.0000}")]
    layers: list = [token_marks(drawn[["x", "y", "latent", "status", "firing_rate", "effective"]], PATTERNS, theme, tips)]
    if len(drawn) < len(points):
        layers.insert(0, count_image(points, rates.limits, ylim, theme))
    layers += [hv.HLine(y).opts(color=EDGE[theme], line_width=1, line_dash="dashed") for y in (1, 2)]
    if patterns is None:
        layers.append(hv.HLine(groups.chance).opts(color=EDGE[theme], line_width=2, line_dash="dotted"))
    layers += [rates.border(theme), *rings(points, look), *token_legend(points["status"], PATTERNS, theme)]
    return frame(
        hv.Overlay(layers),
        look,
        xlim=rates.limits,
        ylim=ylim,
        xlabel=rates.label,
        ylabel="features in effect" if patterns is not None else f"{_noun(groups)}s in effect",
        title=token_counts(points["status"], PATTERNS) + pixels_said(points, drawn),
        height=420,
        brush=True,
        xticks=rates.ticks,
    )


@selectivity.title
def _(patterns, groups, health, suspects, look):
    return selectivity.question if patterns is not None or groups is None else f"Over how many {_noun(groups)}s does each latent spread?"


@selectivity.reading
def _(patterns, groups, health, suspects, look):
    points = selectivity_points(patterns, groups, health, suspects)
    counted = token_counts(points["status"], PATTERNS)
    firing = points[(points["firing_rate"] > 0) & np.isfinite(points["effective"])]
    if patterns is None:
        some = (
            f"median {firing['effective'].median():.2f}; a latent that fires alike everywhere has {groups.chance:.2f}"
            if len(firing)
            else ""
        )
        where = f"Activation over {plural(groups.n_groups, _noun(groups))}"
        suspected = "" if suspects is None else f" Detector: {suspects.reading}."
        return f"{counted}. {where}: {some or 'no latent fires'}. {NO_TRUE}{suspected}"
    if firing.empty:
        return f"{counted}. No latent fires."
    worst = firing.loc[firing["effective"].idxmax()]
    means = f"Most meanings: latent {worst['latent']}, {worst['effective']:.2f} features in effect"
    return f"{counted}. {means}; median {firing['effective'].median():.2f}."


@selectivity.table
def _(patterns, groups, health, suspects, look):
    if patterns is None and groups is None:
        return empty_table("latent", "status", "firing_rate", "effective")
    return selectivity_points(patterns, groups, health, suspects).drop(columns=["x", "y"])


@selectivity.empty
def _(patterns, groups, health, suspects, look):
    return NOT_COMPUTED if patterns is None and groups is None else None


@selectivity.ids
def _(patterns, groups, health, suspects, look):
    points = selectivity_points(patterns, groups, health, suspects)
    return points["latent"].to_numpy()[_drawn(points, look)]


def selectivity_points(
    patterns: Patterns | None, groups: Groups | None, health: Health | None, suspects: Polysemanticity | None
) -> pd.DataFrame:
    """One row per latent, in order: status, rate, effective number of features or groups, and its place (x, y)."""
    found = patterns if patterns is not None else groups
    rate = found.firing_rate
    effective = patterns.effective_features if patterns is not None else groups.effective_groups
    silent = np.where(True if health is None else health.dead, "dead", "unseen")
    status = patterns.status if patterns is not None else np.where(rate > 0, np.where(_suspected(suspects), "candidate", "alive"), silent)
    table = {
        "latent": np.arange(len(rate)),
        "status": status,
        "firing_rate": rate,
        "effective": effective,
        "x": drawable(RateAxis(found.n_samples).places(rate)),
        "y": drawable(effective),
    }
    if patterns is not None:
        own = {"selectivity": patterns.selectivity, "participation": patterns.participation}
        table |= own | {"features_alone": np.diff(patterns.fires.indptr), "capacity": patterns.latent_capacity}
    elif suspects is not None:
        table |= {"score": suspects.score, "judged": suspects.judged}
    return pd.DataFrame(table)


def _suspected(suspects: Polysemanticity | None) -> np.ndarray:
    """A detector that is wrong more often than right, or was never measured, names nobody."""
    return np.array(False) if suspects is None or not suspects.worth.confident else suspects.candidate


def _drawn(points: pd.DataFrame, look: Look) -> np.ndarray:
    """Rows that become points: all, or those selected and the most polysemantic, as many as fit."""
    widest = np.argsort(-np.nan_to_num(points["effective"].to_numpy(dtype=float)), kind="stable")
    return drawn_rows(len(points), look, widest[: MAX_POINTS // 16])


def _noun(groups: Groups) -> str:
    return {"anchors": "anchor group", "labels": "label", "clusters": "cluster"}[groups.of]


# P1 ------------------------------------------------------------------------------------------------------------------


class Bars(NamedTuple):
    """What fires one latent: a table, strongest first, its status (with truth alone), and how many there are in effect."""

    rows: pd.DataFrame
    status: str
    effective: float


@view("What fires this latent?", id="P1", of=(trace_patterns, trace_groups), page="latents", cost="select")
def response_profile(patterns, groups, look):
    """The primary latent's code for each true feature shown alone, as the data have it: the mean over magnitudes. Filled: it
    fires on most of the rows that hold the feature. Hollow: on fewer, for there other features and other latents compete. At the right, the
    feature's share of what drives the latent in real rows. Without truth: groups of rows, each shown as its mean row."""
    bars, theme = profile_rows(patterns, groups, look.primary_latent), look.theme
    rows = bars.rows.head(STRONGEST)
    place, alone = -np.arange(len(rows), dtype=float), rows["alone"].to_numpy(dtype=float)
    stems = hv.Segments((np.zeros(len(rows)), place, alone, place), ["x0", "y0", "x1", "y1"])
    layers: list = [stems.opts(color=LINES["response"][theme], line_width=2)]
    data = rows.assign(response=alone, row=place, fill=np.where(rows["context"] > OFTEN, 1.0, 0.0))
    marks = hv.Points(data, ["response", "row"], [*rows.columns, "fill"])
    style = {"color": LINES["response"][theme], "marker": "circle", "size": 12, "fill_alpha": "fill", "line_width": 2}
    tips = [("name", "@name"), ("alone", "@alone{0.000}"), ("fires in context", "@context{0.00}"), ("share of its drive", "@share{0.00}")]
    layers.append(marks.opts(**style, tools=["hover", "tap"], hooks=[same_when_selected], hover_tooltips=tips, show_legend=False))
    mine = data[rows.iloc[:, 0] == look.primary_feature] if patterns is not None else data.iloc[:0]
    if len(mine):
        ring = hv.Points(mine, ["response", "row"], label="Selected")
        layers.append(ring.opts(color=TEXT[theme], fill_alpha=0, line_width=2, size=20))
    top = float(finite(alone).max(initial=0.0)) or 1.0
    shares = hv.Labels((np.full(len(rows), 1.06 * top), place, [f"{s:.0%}" for s in rows["share"].fillna(0)]), ["x", "y"], "text")
    layers.append(shares.opts(text_color=TEXT[theme], text_align="left", **TYPE))
    layers += [sample("fires in most rows with it", "circle", LINES["response"][theme])]
    layers += [sample("in fewer", "circle", LINES["response"][theme], 0.0)]
    return frame(
        hv.Overlay(layers),
        look,
        xlim=(-0.03 * top, 1.28 * top),
        ylim=(0.3 - max(len(rows), 1), 0.7),
        xlabel=f"code when shown alone; right: share of latent {look.primary_latent}'s {'drive' if patterns is not None else 'activation'}",
        ylabel="",
        title=_profile_title(bars, patterns, groups, look),
        height=130 + 26 * max(len(rows), 2),
        yticks=row_ticks(_short(name) for name in rows["name"]),
    )


@response_profile.reading
def _(patterns, groups, look):
    bars = profile_rows(patterns, groups, look.primary_latent)
    first = bars.rows.sort_values("share", ascending=False, kind="stable").iloc[0]
    many, share = int((bars.rows["alone"] > 0).sum()), f"{first['share']:.0%}"
    if patterns is None:
        fires = f"the mean rows of {many} of {plural(groups.n_groups, _noun(groups))} fire it"
        said = f"{share} of its activation is on {first['name']}; {bars.effective:.2f} in effect"
        return f"Latent {look.primary_latent}: {fires}; {said}. {NO_TRUE}"
    fires = f"{plural(many, 'true feature')} {'fires' if many == 1 else 'fire'} it alone"
    return f"Latent {look.primary_latent}: {fires}; {first['name']} has {share} of what drives it in rows; {bars.effective:.2f} in effect."


@response_profile.table
def _(patterns, groups, look):
    if response_profile.empty(patterns, groups, look):
        return empty_table("feature", "name", "alone", "fires alone", "context", "share")
    return profile_rows(patterns, groups, look.primary_latent).rows


@response_profile.empty
def _(patterns, groups, look):
    found = patterns if patterns is not None else groups
    if look.primary_latent is None:
        return NO_SELECTION
    if found is None or look.primary_latent >= found.n_latents:
        return NOT_COMPUTED
    if len(profile_rows(patterns, groups, look.primary_latent).rows):
        return None
    if found.firing_rate[look.primary_latent] > 0:
        return f"Nothing that we know fires latent {look.primary_latent}, alone or in rows."
    return never_fired(found.n_samples)


def profile_rows(patterns: Patterns | None, groups: Groups | None, latent: int) -> Bars:
    """Every feature (or group) that fires the latent, the strongest alone first."""
    if patterns is not None:
        found = patterns.profile(latent)
        table = {"feature": found.features, "name": found.names, "alone": found.responses.mean(axis=0), "fires alone": found.alone}
        table |= {"context": found.context, "without": found.without, "share": found.share}
        return Bars(pd.DataFrame(table), found.status, found.effective_features)
    grouped = groups.profile(latent)
    table = {"group": grouped.groups, "name": grouped.names, "alone": grouped.responses}
    rows = pd.DataFrame(table | {"context": grouped.context, "share": grouped.share})
    rows = rows.sort_values(["alone", "share"], ascending=False, kind="stable", ignore_index=True)
    return Bars(rows, "", grouped.effective_groups)


def _profile_title(bars: Bars, patterns: Patterns | None, groups: Groups | None, look: Look) -> str:
    many = f"\n{STRONGEST} of {count(len(bars.rows))} drawn; the table has all." if len(bars.rows) > STRONGEST else ""
    if patterns is None:
        found = f"{bars.effective:.2f} {_noun(groups)}s in effect (alike everywhere: {groups.chance:.2f})"
    else:
        token = PATTERNS[bars.status]
        found = f"{token.shape} {token.word.lower()}, {bars.effective:.2f} features in effect (polysemantic from {POLY:g})"
    return f"Latent {look.primary_latent}: {found}{many}"


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"
