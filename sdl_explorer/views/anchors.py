"""The anchor bench: which latents are held to what, and whether they stay there."""

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.diagnosis.drift import Drift, measure_drift
from sdl_explorer.diagnosis.health import Health, check_health
from sdl_explorer.views.frame import TYPE, empty_table, finite, frame, row_ticks
from sdl_explorer.views.theme import EDGE, LINES, WARNING
from sdl_explorer.views.view import view
from sdl_explorer.views.words import NO_ANCHORS, cosine, count, plural

OVERLAP = 0.9  # cosine from which two anchors say nearly the same
MAX_ROWS = 40
COLUMNS = ("anchor", "slot", "weight", "mode", "cos encoder", "cos decoder", "nearest anchor", "overlap", "warning")


@view("What is held, and does it stay there?", id="N1", of=(measure_drift, check_health), page="intervene", cost="live")
def anchor_bench(drift, health, look):
    """One row per anchor: how close its slot's encoder row (▲) and decoder row (●) are to it."""
    rows = bench_table(drift, health)
    shown = rows.head(MAX_ROWS)
    theme, place = look.theme, -np.arange(len(shown), dtype=float)
    spans = hv.Segments((shown["cos encoder"], place, shown["cos decoder"], place), ["x0", "y0", "x1", "y1"])
    layers = [spans.opts(color=EDGE[theme], line_width=2)]
    for side, marker in (("encoder", "triangle"), ("decoder", "circle")):
        data = {"cosine": shown[f"cos {side}"], "row": place, "anchor": shown["anchor"], "slot": shown["slot"]}
        points = hv.Points(data, ["cosine", "row"], ["anchor", "slot"], label=side)
        layers.append(points.opts(color=LINES[side][theme], marker=marker, size=11, tools=["hover", "tap"]))
    known = finite(shown[["cos encoder", "cos decoder"]])
    low = min(0.0, float(known.min())) if known.size else 0.0
    if (shown["warning"] != "").any():
        layers.append(_warnings(shown, low, theme))
    more = f"; the first {MAX_ROWS} of {count(len(rows))}" if len(rows) > MAX_ROWS else ""
    return frame(
        hv.Overlay(layers),
        look,
        xlim=(low - 0.04, 1.04),
        ylim=(0.5 - len(shown), 0.75),
        xlabel="cosine of the slot's rows to its anchor",
        ylabel="",
        title=f"{plural(len(rows), 'anchor')}{more}",
        height=130 + 36 * max(len(shown), 2),
        yticks=row_ticks(f"{r.anchor} → latent {r.slot} ({r.mode})" for r in shown.itertuples()),
    )


@anchor_bench.reading
def _(drift, health, look):
    rows = bench_table(drift, health)
    worst = rows.loc[rows["cos decoder"].fillna(-np.inf).idxmin()]
    warned = rows[rows["warning"] != ""]
    also = f" Warning: {warned.iloc[0]['anchor']}: {warned.iloc[0]['warning']}." if len(warned) else ""
    return (
        f"{plural(len(rows), 'anchor')}; the furthest is {worst['anchor']} in latent {worst['slot']} "
        f"(decoder {cosine(worst['cos decoder'])}, encoder {cosine(worst['cos encoder'])}).{also}"
    )


@anchor_bench.table
def _(drift, health, look):
    return empty_table(*COLUMNS) if drift is None else bench_table(drift, health)


@anchor_bench.empty
def _(drift, health, look):
    return None if drift is not None and len(drift) else NO_ANCHORS


@anchor_bench.ids
def _(drift, health, look):
    return drift.latents[:MAX_ROWS]


def bench_table(drift: Drift, health: Health | None) -> pd.DataFrame:
    """One row per anchor, in the order in which they were given."""
    nearest = [drift.names[j] if j >= 0 else "" for j in drift.nearest]
    mode = ["hard" if hard else "soft" for hard in drift.hard]
    warnings = [_warning(j, drift, health) for j in range(len(drift))]
    overlap = np.where(drift.nearest >= 0, drift.overlap, np.nan)
    columns = (drift.names, drift.latents, drift.weight, mode, drift.encoder, drift.decoder, nearest, overlap, warnings)
    return pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))


def _warning(j: int, drift: Drift, health: Health | None) -> str:
    said = []
    if drift.nearest[j] >= 0 and drift.overlap[j] >= OVERLAP:
        said.append(f"overlaps {drift.names[drift.nearest[j]]} at cosine {drift.overlap[j]:.2f}")
    if health is not None and health.dead[drift.latents[j]]:
        said.append("its slot is dead")
    return "; ".join(said)


def _warnings(shown: pd.DataFrame, low: float, theme: str) -> hv.Labels:
    warned = shown[shown["warning"] != ""]
    data = {
        "cosine": np.full(len(warned), low),
        "row": -warned.index.to_numpy(dtype=float) + 0.36,
        "text": [f"▲ {w}" for w in warned["warning"]],
    }
    return hv.Labels(data, ["cosine", "row"], "text").opts(text_color=WARNING[theme], text_align="left", **TYPE)
