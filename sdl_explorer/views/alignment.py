"""Which true features were learned, by which latent, and how well: the best-match scatter and the recovery curve."""

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.diagnosis.alignment import SIDES, Alignment, align
from sdl_explorer.diagnosis.health import Health, check_health
from sdl_explorer.views.frame import MAX_POINTS, colorbar_style, empty_table, finite, frame, sample
from sdl_explorer.views.latent_points import token_marks
from sdl_explorer.views.look import Look
from sdl_explorer.views.theme import DASHES, EDGE, LINES, MUTED, SEQUENTIAL, STATUSES, TEXT, classify
from sdl_explorer.views.view import Before, view
from sdl_explorer.views.words import NO_TRUTH, NOT_COMPUTED, PIXELS, cosine, count, plural

BINS = 160  # of the count image, each way
POINTS = ("x", "y", "latent", "status", "feature", "encoder_feature", "firing_rate", "hollow")


# A2 ------------------------------------------------------------------------------------------------------------------


@view("Which true features did it find?", id="A2", of=(align, check_health), page="alignment", cost="select")
def best_match(alignment, health, look):
    """One point per latent: how well its decoder row (x) and its encoder row (y) match the decoder's best feature.

    Without truth or anchors: how well each row matches what fires the latent. Row k of the first `Points` is latent
    `best_match.ids(alignment, health, look)[k]`; all marks are one glyph, so that one selection holds all statuses. Up
    to 16,384 latents that is latent k itself; beyond, pixels count latents and only flagged and selected ones are points.
    """
    points = match_points(alignment, health, look)
    drawn, theme = points.iloc[_drawn(points, look)], look.theme
    xlim, ylim = (_cosine_limits(points[axis]) for axis in "xy")
    low = max(xlim[0], ylim[0])
    layers = [_marks(drawn, look)]
    if len(drawn) < len(points):
        layers.insert(0, count_image(points, xlim, ylim, theme))
    layers.append(hv.Curve([(low, low), (1, 1)], "x", "y").opts(color=EDGE[theme], line_width=1))
    if alignment is not None:  # what fires a latent is no match: it has no threshold
        guides = hv.VLine(look.tau), hv.HLine(look.tau)
        layers += [guide.opts(color=EDGE[theme], line_width=1, line_dash="dashed") for guide in guides]
    layers += [*rings(points, look), *_legend(points, theme)]
    xlabel, ylabel = _axes(alignment)
    return frame(
        hv.Overlay(layers),
        look,
        xlim=xlim,
        ylim=ylim,
        xlabel=xlabel,
        ylabel=ylabel,
        title=_match_title(alignment, points, drawn, look),
        height=480,
        brush=True,
    )


@best_match.title
def _(alignment, health, look):
    return best_match.question if alignment is not None else "How well does each row match what fires its latent?"


@best_match.reading
def _(alignment, health, look):
    points = match_points(alignment, health, look)
    status = ", ".join(
        f"{count(n)} {STATUSES[s].word.lower()}" for s, n in points["status"].value_counts().reindex(STATUSES).dropna().items()
    )
    if alignment is None:
        x, y = finite(points["x"]), finite(points["y"])
        medians = f"median cosine to what fires it: decoder {np.median(x):.2f}, encoder {np.median(y):.2f}" if len(x) and len(y) else ""
        return f"{plural(len(points), 'latent')} ({status}); {medians}. {NO_TRUTH}"
    right_low = int(((points["x"] > look.tau) & (points["y"] <= look.tau)).sum())
    seen = f"Of {plural(len(points), 'latent')}: {status}; {count(right_low)} right but low (decoder right, encoder not)."
    return f"{recovery_words(alignment, look)} {seen}"


@best_match.table
def _(alignment, health, look):
    return empty_table(*POINTS) if alignment is None and health is None else match_points(alignment, health, look)


@best_match.empty
def _(alignment, health, look):
    return NOT_COMPUTED if alignment is None and health is None else None


@best_match.ids
def _(alignment, health, look):
    points = match_points(alignment, health, look)
    return points["latent"].to_numpy()[_drawn(points, look)]


def latents_inside(bounds, alignment: Alignment | None, health: Health | None, look: Look) -> np.ndarray:
    """Latents inside a box (left, bottom, right, top) of the best-match scatter: from the data, never from pixels."""
    left, bottom, right, top = bounds
    points = match_points(alignment, health, look)
    return points["latent"].to_numpy()[points["x"].between(left, right) & points["y"].between(bottom, top)]


def match_points(alignment: Alignment | None, health: Health | None, look: Look) -> pd.DataFrame:
    """One row per latent, in order: place, status, best features (-1: none), rate, and whether the encoder's best differs."""
    if alignment is None:
        x, y = health.decoder_response, health.encoder_response
        feature = encoder_feature = np.full(len(x), -1)
    else:
        x, y = _per_latent_cosines(alignment, look)
        feature, encoder_feature = alignment.per_latent.decoder_feature, alignment.per_latent.encoder_feature
    rate = np.full(len(x), np.nan) if health is None else health.firing_rate
    status = classify(health, alignment, None, look.tau)
    columns = (x, y, np.arange(len(x)), status, feature, encoder_feature, rate, feature != encoder_feature)
    return pd.DataFrame(dict(zip(POINTS, columns, strict=True)))


def _per_latent_cosines(alignment: Alignment, look: Look) -> tuple[np.ndarray, np.ndarray]:
    """Decoder and encoder cosine at the decoder's best feature; of one source of a crosscoder, or of its worst."""
    found = alignment.per_latent
    if not alignment.block_names:
        return found.decoder_cosine, found.encoder_at_decoder
    if look.block is not None:
        source = alignment.block_names.index(look.block)
        return found.block_decoder[source], found.block_encoder[source]
    return found.block_decoder.min(axis=0), found.block_encoder.min(axis=0)


def _drawn(points: pd.DataFrame, look: Look) -> np.ndarray:
    """Rows that become points: all, or the selected and the flagged ones (as many as fit, anchored first)."""
    if len(points) <= MAX_POINTS:
        return np.arange(len(points))
    status = points["status"].to_numpy()
    chosen = [i for i in (*look.selected_latents, look.primary_latent) if i is not None and i < len(points)]
    flagged = [np.flatnonzero(status == name) for name in ("anchored", "unseen", "dead")]
    return np.unique(np.concatenate([chosen, *flagged]).astype(int)[:MAX_POINTS])


def _marks(drawn: pd.DataFrame, look: Look) -> hv.Points:
    """One glyph with a marker, a colour and a size per point; hollow where the encoder's own best feature differs."""
    rate = np.sqrt(np.nan_to_num(drawn["firing_rate"].to_numpy(dtype=float)))
    hollow = drawn["hollow"].to_numpy() | drawn["status"].map(lambda s: STATUSES[s].hollow).to_numpy(dtype=bool)
    tips = [
        ("decoder", "@x{0.000}"),
        ("encoder", "@y{0.000}"),
        ("feature", "@feature"),
        ("firing rate", "@firing_rate{0.0000}"),
    ]
    return token_marks(drawn, STATUSES, look.theme, tips, size=7 + 11 * rate / max(rate.max(initial=0.0), 1e-9), hollow=hollow)


def count_image(points: pd.DataFrame, xlim, ylim, theme: str) -> hv.Image:
    """Latents per pixel; empty pixels stay clear."""
    known = points[np.isfinite(points["x"]) & np.isfinite(points["y"])]
    cells, _, _ = np.histogram2d(known["y"], known["x"], bins=BINS, range=(ylim, xlim))
    image = hv.Image(
        np.where(cells > 0, cells, np.nan)[::-1], bounds=(xlim[0], ylim[0], xlim[1], ylim[1]), kdims=["x", "y"], vdims="latents"
    )
    return image.opts(
        cmap=SEQUENTIAL, logz=True, colorbar=True, clabel="latents", clim=(1, max(2.0, cells.max())), colorbar_opts=colorbar_style(theme)
    )


def rings(points: pd.DataFrame, look: Look) -> list[hv.Points]:
    """A ring around each selected latent, and a halo around the primary."""
    colour, layers = TEXT[look.theme], []
    if look.primary_latent is not None and look.primary_latent < len(points):
        halo = points.iloc[[look.primary_latent]]
        layers.append(hv.Points(halo, ["x", "y"], label="Primary").opts(color=colour, fill_alpha=0.15, line_width=1, size=30))
    chosen = [i for i in look.selected_latents if i < len(points)]
    if chosen:
        rings = hv.Points(points.iloc[chosen], ["x", "y"], label=f"Selected ({count(len(chosen))})")
        layers.append(rings.opts(color=colour, fill_alpha=0, line_width=2, size=19))
    return layers


def _legend(points: pd.DataFrame, theme: str) -> list[hv.Points]:
    """One entry per status that occurs, with its number."""
    numbers = points["status"].value_counts()
    entries = [
        sample(f"{t.word} ({count(numbers[name])})", t.marker, t.colour(theme), 0.0 if t.hollow else 0.75)
        for name, t in STATUSES.items()
        if name in numbers
    ]
    hollow = sample("Hollow: encoder's best is another", "circle", EDGE[theme], 0.0)
    return [*entries, hollow] if (points["hollow"] & (points["feature"] >= 0)).any() else entries


def _cosine_limits(values) -> tuple[float, float]:
    known = finite(values)
    low = min(0.0, float(known.min())) if known.size else 0.0
    return np.floor(low * 10) / 10 - 0.05, 1.05


def _axes(alignment: Alignment | None) -> tuple[str, str]:
    if alignment is None:
        return "cosine of the decoder row to its target response", "cosine of the encoder row to its input response"
    of = "anchor" if alignment.of == "anchors" else "feature"
    return f"decoder cosine to its best {of}", f"encoder cosine to that same {of}"


def _match_title(alignment: Alignment | None, points: pd.DataFrame, drawn: pd.DataFrame, look: Look) -> str:
    without = "No truth: how well each row matches what fires its latent"
    title = without if alignment is None else recovered_words(alignment, look)
    if alignment is not None and alignment.block_names:
        title += f"; source: {look.block or 'the worst of ' + str(len(alignment.block_names))}"
    return title if len(drawn) == len(points) else f"{title}\n{PIXELS} On top: {count(len(drawn))} selected and flagged ones."


# A3 ------------------------------------------------------------------------------------------------------------------


@view("How much of the truth was recovered, at every threshold?", id="A3", of=(align, Before(align)), page="alignment", cost="live")
def recovery_curve(alignment, before, look):
    """Share of the features whose best cosine exceeds tau, per side; dotted: random unit rows; faint: the commit before."""
    theme, layers = look.theme, []
    for side in ("minimum", "encoder", "decoder", "response"):  # the minimum often lies under the encoder
        curve = hv.Curve(alignment.curve(side), "tau", "share", label=side)
        layers.append(
            curve.opts(
                color=LINES[side][theme], line_dash=DASHES[side], line_width=3 if side == look.side else 2, interpolation="steps-post"
            )
        )
    if before is not None:
        ghost = hv.Curve(before.curve(look.side), "tau", "share", label=f"{look.side} before")
        layers.append(ghost.opts(color=LINES[look.side][theme], line_width=5, alpha=0.3, interpolation="steps-post"))
    taus = np.linspace(0, 1, 201)
    chance = hv.Curve((taus, alignment.chance.recovery(taus, look.side)), "tau", "share", label="chance (random rows)")
    layers.append(chance.opts(color=MUTED[theme], line_dash=[2, 4], line_width=2))
    layers.append(hv.VLine(look.tau).opts(color=TEXT[theme], line_width=1, line_dash="dashed"))
    return frame(
        hv.Overlay(layers),
        look,
        xlim=(0, 1.01),
        ylim=(-0.02, 1.04),
        xlabel="threshold τ on the best cosine",
        ylabel=f"share of the {_noun(alignment)}",
        title=f"{_metrics(alignment, look.side, look)}",
    )


@recovery_curve.reading
def _(alignment, before, look):
    sides = "; ".join(_metrics(alignment, side, look) for side in SIDES)
    anchored = int(alignment.anchored_features.sum())
    held = (
        f" {plural(anchored, 'anchored feature')} left out; with them {alignment.recovery(look.tau, look.side, 'all'):.1%} ({look.side})."
        if anchored
        else ""
    )
    was = f" Before: {_metrics(before, look.side, look)}." if before is not None else ""
    return f"{sides}. By chance {alignment.chance.recovery(look.tau, look.side):.1%} ({look.side}).{held}{was}"


@recovery_curve.table
def _(alignment, before, look):
    if alignment is None:
        return empty_table("tau", *SIDES, "chance")
    taus, _ = alignment.curve()
    columns = {side: alignment.curve(side)[1] for side in SIDES}
    ghost = {} if before is None else {f"{look.side} before": before.curve(look.side)[1]}
    return pd.DataFrame({"tau": taus, **columns, **ghost, "chance": alignment.chance.recovery(taus, look.side)})


@recovery_curve.empty
def _(alignment, before, look):
    return NO_TRUTH if alignment is None else None


def recovered(alignment: Alignment, look: Look) -> np.ndarray:
    """(n_features,) bool: not anchored, and the best cosine on the side of the look exceeds its tau."""
    return (alignment.best[look.side].cosine > look.tau) & ~alignment.anchored_features


def recovered_words(alignment: Alignment, look: Look) -> str:
    """How many of the features that are not anchored are recovered."""
    free = int((~alignment.anchored_features).sum())
    one = "anchor" if alignment.of == "anchors" else "feature"
    return f"{count(recovered(alignment, look).sum())} of {plural(free, one)} recovered at τ {look.tau:.2f} ({look.side})"


def recovery_words(alignment: Alignment, look: Look) -> str:
    """How many are recovered and which is the worst, in one sentence."""
    best, free, counted = alignment.best[look.side].cosine, ~alignment.anchored_features, recovered_words(alignment, look)
    if not free.any() or np.isnan(best[free]).all():
        return f"{counted}."
    worst = int(np.nanargmin(np.where(free, best, np.nan)))
    return f"{counted}; worst: {alignment.names[worst]}, cosine {cosine(best[worst])}."


def _noun(alignment: Alignment) -> str:
    return "anchors" if alignment.of == "anchors" else "features"


def _metrics(alignment: Alignment, side: str, look: Look) -> str:
    return f"{side}: M_GT({look.tau:.2f}) {alignment.recovery(look.tau, side):.1%}, M_IP {alignment.mean_best(side):.3f}"
