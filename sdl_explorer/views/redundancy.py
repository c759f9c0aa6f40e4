"""Which latents could the dictionary do without? What each adds, how often it fires, and clusters of near-identical ones; without truth."""

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.diagnosis.redundancy import Redundancy, find_redundant
from sdl_explorer.views.alignment import count_image, rings
from sdl_explorer.views.frame import MAX_POINTS, drawable, finite, frame
from sdl_explorer.views.latent_points import RateAxis, drawn_rows, pixels_said, token_counts, token_legend, token_marks
from sdl_explorer.views.look import Look
from sdl_explorer.views.theme import EDGE, GRID, SPARES, TEXT
from sdl_explorer.views.view import view
from sdl_explorer.views.words import NOT_COMPUTED, count, plural

DEEPEST = 6.0  # decades below the largest contribution that are drawn; what adds less stands with what adds nothing
NAMED = 6  # members of a cluster that are named
COLUMNS = (
    "latent",
    "status",
    "cluster",
    "with latents",
    "twin",
    "twin cosine",
    "twin encoder cosine",
    "twin overlap",
    "firing rate",
    "expected rate",
    "explained",
    "explained alone",
    "loss of removing",
    "dead",
    "unseen",
    "dense",
    "weak",
    "silent for",
)


@view("Which latents could it do without?", id="P6", of=(find_redundant,), page="latents", cost="job", columns=COLUMNS)
def spares(found, look):
    """One point per latent: how often it fires (x, logarithmic; silent ones in a gutter on the left) and the share of the variance that is
    lost where it alone is removed and the other codes stay (y, logarithmic; in the gutter below: none, or less error without it). Dotted
    lines: dense from here to the right, weak from here down; both are conventions, without scores.

    Near-identical decoder rows make a duplicate candidate; two that share a code both look needed. Lines join the primary latent with its
    cluster, and the table lists the clusters first, the largest on top (-1: none). Its expected rate is that of further rows: where a
    latent was silent, from how near it came to firing and for how long it has not.

    Row k of the first `Points` is latent `spares.ids(found, look)[k]`.
    """
    points, theme, rates = spare_points(found), look.theme, RateAxis(found.n_samples)
    drawn = points.iloc[_drawn(points, look)]
    low, high = _decades(found)
    ylim = (low - 0.85, high + 0.25)
    tips = [
        ("firing rate", "@rate{0.0000}"),
        ("variance explained", "@explained{0.000000}"),
        ("nearest other", "@twin, cosine @cosine{0.00}"),
    ]
    layers: list = [token_marks(drawn, SPARES, theme, tips)]
    if len(drawn) < len(points):
        layers.insert(0, count_image(points, rates.limits, ylim, theme))
    guide = {"color": EDGE[theme], "line_width": 1, "line_dash": "dotted"}
    layers.append(hv.VLine(float(np.log10(found.dense_rate))).opts(**guide))
    layers += [hv.HLine(float(np.log10(weak))).opts(**guide) for weak in [_weak_below(found)] if weak > 0]
    layers += [rates.border(theme), hv.HLine(low - 0.25).opts(color=GRID[theme], line_width=2), _cluster_lines(found, points, look)]
    layers += [*rings(points, look), *token_legend(points["status"], SPARES, theme)]
    return frame(
        hv.Overlay(layers),
        look,
        xlim=rates.limits,
        ylim=ylim,
        xlabel=rates.label,
        ylabel="variance lost without it",
        title=_title(found, points) + pixels_said(points, drawn),
        height=440,
        brush=True,
        xticks=rates.ticks,
        yticks=[(low - 0.55, "none"), *((float(k), f"{10.0**k * 100:g} %") for k in range(int(np.ceil(low)), int(np.floor(high)) + 1))],
    )


@spares.reading
def _(found, look):
    said = [f"{_counted(found, spare_points(found))}, on {plural(found.n_samples, 'row')}."]
    for members in found.clusters[:1]:
        near = f"each at {found.cosine:g} or nearer to another (by chance {_few(found.chance_pairs)} so near)"
        said.append(f"Largest cluster: latents {_named(members[:NAMED], len(members))}, decoder rows {near}.")
    if found.live.any() and finite(found.explained).size:
        most = int(np.nanargmax(np.where(np.isfinite(found.explained), found.explained, np.nan)))
        said.append(f"Removing latent {most} would cost most: {found.explained[most]:.1%} of the variance.")
    said += [f'Detector "{name}": {found.worth(name)}.' for name in ("duplicate", "dead")]
    return " ".join(said if found.on_spikes is None else [*said, f"Duplicates: {found.on_spikes}."])


@spares.table
def _(found, look):
    others = [""] * found.n_latents
    for members in found.clusters:
        for i in members:
            others[i] = _named([j for j in members[: NAMED + 1] if j != i][:NAMED], len(members) - 1)
    columns = (
        np.arange(found.n_latents),
        [SPARES[status].word for status in _status(found)],
        found.cluster,
        others,
        found.twin,
        found.twin_cosine,
        found.twin_encoder,
        found.twin_overlap,
        found.firing_rate,
        found.expected_rate,
        found.explained,
        found.alone,
        found.loss,
        found.dead,
        found.unseen,
        found.dense,
        found.weak,
        found.samples_since_fired,
    )
    table = pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))
    clustered = [i for members in found.clusters for i in members]
    return table.iloc[[*clustered, *np.flatnonzero(found.cluster < 0)]].reset_index(drop=True)


@spares.empty
def _(found, look):
    return NOT_COMPUTED if found is None else None


@spares.ids
def _(found, look):
    points = spare_points(found)
    return points["latent"].to_numpy()[_drawn(points, look)]


def spare_points(found: Redundancy) -> pd.DataFrame:
    """One row per latent, in order: status, numbers, and its place (x, y)."""
    low, _ = _decades(found)
    adds = np.nan_to_num(found.explained, nan=0.0, posinf=0.0, neginf=0.0)
    adds = np.where(found.live, adds, 0.0)
    y = np.log10(np.maximum(adds, 10.0 ** (low - 1)))
    return pd.DataFrame(
        {
            "latent": np.arange(found.n_latents),
            "status": _status(found),
            "rate": found.firing_rate,
            "explained": found.explained,
            "twin": found.twin,
            "cosine": found.twin_cosine,
            "x": drawable(RateAxis(found.n_samples).places(found.firing_rate)),
            "y": np.where(y < low, low - 0.55, y),
        }
    )


def _status(found: Redundancy) -> np.ndarray:
    """The first of SPARES that applies."""
    flags = {"dead": found.dead & ~found.live, "unseen": ~found.live}
    flags |= {"duplicate": found.duplicate, "dense": found.dense, "weak": found.weak}
    return np.select(list(flags.values()), list(flags), default="used")


def _decades(found: Redundancy) -> tuple[float, float]:
    """log10 of the smallest and the largest contribution that is drawn."""
    adds = finite(found.explained[found.live])
    adds = adds[adds > 0]
    if not adds.size:
        return -DEEPEST, 0.0
    high = float(np.log10(adds.max()))
    return max(float(np.log10(adds.min())), high - DEEPEST), high


def _weak_below(found: Redundancy) -> float:
    """Contribution from which a live latent is weak, 0 where nothing can be said."""
    adds = finite(found.explained[found.live])
    low, _ = _decades(found)
    weak = found.weak_share * float(adds.mean()) if adds.size else 0.0
    return weak if weak > 10.0**low else 0.0


def _drawn(points: pd.DataFrame, look: Look) -> np.ndarray:
    """Rows that become points: all, or those selected and those with something to say, as many as fit."""
    spare = np.flatnonzero(~points["status"].isin(["used", "dead"]))
    return drawn_rows(len(points), look, spare[:MAX_POINTS])


def _cluster_lines(found: Redundancy, points: pd.DataFrame, look: Look) -> hv.Segments:
    """From the primary latent to the others of its cluster."""
    at = look.primary_latent
    mine = at is not None and at < found.n_latents and found.cluster[at] >= 0
    others = np.flatnonzero((found.cluster == found.cluster[at]) & (np.arange(found.n_latents) != at)) if mine else []
    place = points[["x", "y"]].to_numpy()
    ends = [(*place[at], *place[i]) for i in others]
    return hv.Segments(ends, ["x0", "y0", "x1", "y1"]).opts(color=TEXT[look.theme], line_width=1.5)


def _title(found: Redundancy, points: pd.DataFrame) -> str:
    worth = found.worth("duplicate")
    no_claim = f"\nNo claim about duplicates here: {worth.brief}" if found.duplicate.any() and not worth.confident else ""
    return f"{_counted(found, points)}{no_claim}"


def _counted(found: Redundancy, points: pd.DataFrame) -> str:
    clusters = f"; {plural(len(found.clusters), 'cluster')}" if found.clusters else ""
    return f"{token_counts(points['status'], SPARES)}{clusters}"


def _named(some, n: int) -> str:
    """The first of n latents."""
    return ", ".join(map(str, some)) + (f" and {count(n - len(some))} more" if n > len(some) else "")


def _few(pairs: float) -> str:
    return "fewer than 0.01 pairs" if pairs < 0.01 else f"{pairs:.2g} pairs"
