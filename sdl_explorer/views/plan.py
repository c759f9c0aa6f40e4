"""What an intervention would change, before it is applied: the plan itself."""

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.training.plan import Plan
from sdl_explorer.views.frame import TYPE, bars, empty_table, frame, limits, row_ticks
from sdl_explorer.views.look import Look
from sdl_explorer.views.theme import LINES, TEXT, WARNING
from sdl_explorer.views.view import view
from sdl_explorer.views.words import NO_PREVIEW, count, plural

DUPLICATE = 0.9  # decoder cosine from which two latents say the same
MAX_BARS = 30
COLUMNS = ("unit", "direction", "loss of that row", "nearest latent", "cosine", "warning", "encoder scale", "bias", "Adam moments")


@view("Where would they go, and what would it change?", id="R3", of=(Plan,), page="intervene", cost="job")
def plan_preview(plan, look):
    """One bar a unit: the loss of the row it restarts from, worst first; for anchors the cosine to the nearest latent."""
    rows = plan_table(plan)
    losses = rows["loss of that row"].notna().any()
    value, label = (
        ("loss of that row", "squared error of the row it restarts from") if losses else ("cosine", "cosine to the nearest other latent")
    )
    shown = rows.head(MAX_BARS)
    theme = look.theme
    colours = [WARNING[theme] if warning else LINES["decoder"][theme] for warning in shown["warning"]]
    layers = [bars(shown, value, colours, look).opts(tools=["hover"])]
    top = limits([0, *shown[value]])[1] if losses else 1.25
    layers.append(_labels(shown, value, top, look))
    if not losses:
        layers.append(hv.VLine(DUPLICATE).opts(color=TEXT[theme], line_dash="dashed", line_width=1))
    return frame(
        hv.Overlay(layers),
        look,
        xlim=(0 if losses else min(0, limits(shown[value])[0]), top * 1.12 if losses else top),
        ylim=(0.6 - len(shown), 0.6),
        xlabel=label,
        ylabel="unit → direction",
        title=_title(plan, rows),
        height=110 + 24 * max(len(shown), 2),
        legend=None,
        yticks=row_ticks(f"{r.unit} → {r.direction}" for r in shown.itertuples()),
    )


@plan_preview.reading
def _(plan, look):
    if plan is None:
        return NO_PREVIEW
    rows = plan_table(plan)
    duplicates = int((rows["warning"] != "").sum())
    warned = f" {plural(duplicates, 'unit')} would be a duplicate (cosine ≥ {DUPLICATE})." if duplicates else ""
    return f"{plan.reading}{warned} {prediction(plan)}"


@plan_preview.table
def _(plan, look):
    return empty_table(*COLUMNS) if plan is None else plan_table(plan)


@plan_preview.empty
def _(plan, look):
    if plan is None:
        return NO_PREVIEW
    return None if plan.rows else plan.reading


def plan_table(plan: Plan) -> pd.DataFrame:
    """One row per unit, worst first: where it goes, what is near, and what happens to its optimiser moments."""
    cleared = {int(i) for i in plan.clears}
    rows = [
        (
            r.latent,
            r.origin,
            np.nan if r.loss is None else r.loss,
            r.nearest_latent,
            r.nearest_cosine,
            "duplicate" if r.nearest_cosine >= DUPLICATE else "",
            r.encoder_scale,
            r.bias,
            "will be zeroed" if r.latent in cleared else "kept",
        )
        for r in plan.rows
    ]
    return pd.DataFrame(rows, columns=COLUMNS).sort_values("loss of that row", ascending=False, kind="stable", ignore_index=True)


def prediction(plan: Plan) -> str:
    """The error before and right after, as an estimate."""
    before, after = plan.expected.get("error before"), plan.expected.get("error after")
    if before is None or after is None:
        return "No prediction for this selection of rows."
    return f"Estimated error {before:.4g} → {after:.4g} ({after - before:+.2g}; on choose rows, before training)."


def _title(plan: Plan, rows: pd.DataFrame) -> str:
    shown = f"the {MAX_BARS} worst of {count(len(rows))} units; " if len(rows) > MAX_BARS else ""
    return shown + prediction(plan)


def _labels(shown: pd.DataFrame, value: str, top: float, look: Look) -> hv.Labels:
    """Words beside the bars that carry a warning: colour alone says nothing."""
    warned = shown[shown["warning"] != ""]
    text = [f"▲ {r.warning}: {r.cosine:.2f} to latent {r._4}" for r in warned.itertuples()]
    data = {"x": np.full(len(warned), 0.01 * top), "y": -warned.index.to_numpy(dtype=float), "text": text}
    style = {"text_color": "#FFFFFF" if look.theme == "light" else "#121212", "text_align": "left", **TYPE}
    return hv.Labels(data, ["x", "y"], "text").opts(**style)
