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
LOSS, TURN = "loss of that row", "cosine so far"  # what a row is chosen by, and how near it is to where it goes
LABELS = {
    LOSS: "squared error of the row it restarts from",
    TURN: "cosine of the encoder row to its own response so far",
    "cosine": "cosine to the nearest other latent",
}
SET = "Right after, each of these rows is its response as measured now, at cosine 1, because this sets it: that is no evidence."


@view("Where would they go, and what would it change?", id="R3", of=(Plan,), page="intervene", cost="job")
def plan_preview(plan, look):
    """One bar a unit, worst first: the loss of the row it restarts from, the cosine to its own response where rows are turned;
    for anchors the cosine to the nearest latent."""
    rows = plan_table(plan)
    value = _measured(plan)
    losses, near = value == LOSS, value == "cosine"
    shown = rows.head(MAX_BARS)
    theme = look.theme
    usual = LINES["encoder" if value == TURN else "decoder"][theme]
    colours = [WARNING[theme] if warning else usual for warning in shown["warning"]]
    layers = [bars(shown, value, colours, look).opts(tools=["hover"])]
    top = limits([0, *shown[value]])[1] if losses else 1.25
    layers.append(_labels(shown, value, top, look))
    if near:
        layers.append(hv.VLine(DUPLICATE).opts(color=TEXT[theme], line_dash="dashed", line_width=1))
    return frame(
        hv.Overlay(layers),
        look,
        xlim=(0 if losses else min(0, limits(shown[value])[0]), top * 1.12 if losses else top),
        ylim=(0.6 - len(shown), 0.6),
        xlabel=LABELS[value],
        ylabel="unit → direction",
        title=_title(plan, rows),
        height=110 + 24 * max(len(shown), 2),
        legend=None,
        yticks=row_ticks(f"{r.unit} → {r.direction}" for r in shown.itertuples()),
    )


@plan_preview.reading
def _(plan, look):
    rows = plan_table(plan)
    duplicates = int((rows["warning"] != "").sum())
    warned = f" {plural(duplicates, 'unit')} would be a duplicate (cosine ≥ {DUPLICATE})." if duplicates else ""
    return f"{plan.reading}{warned} {SET + ' ' if _measured(plan) == TURN else ''}{prediction(plan)}"


@plan_preview.table
def _(plan, look):
    return empty_table(*COLUMNS) if plan is None else plan_table(plan)


@plan_preview.empty
def _(plan, look):
    if plan is None:
        return NO_PREVIEW
    return None if plan.rows else plan.reading


def plan_table(plan: Plan) -> pd.DataFrame:
    """One row per unit, worst first: where it goes, what is near, and what happens to its optimiser moments.

    Where rows are turned, the column "cosine so far" stands in place of "loss of that row".
    """
    cleared, turned = {int(i) for i in plan.clears}, _measured(plan) == TURN
    rows = [
        (
            r.latent,
            r.origin,
            _known(r.turned if turned else r.loss),
            r.nearest_latent,
            r.nearest_cosine,
            "duplicate" if r.nearest_cosine >= DUPLICATE else "",
            r.encoder_scale,
            r.bias,
            "will be zeroed" if r.latent in cleared else "kept",
        )
        for r in plan.rows
    ]
    by = TURN if turned else LOSS
    table = pd.DataFrame(rows, columns=[by if name == LOSS else name for name in COLUMNS])
    return table.sort_values(by, ascending=turned, kind="stable", ignore_index=True)


def _measured(plan: Plan) -> str:
    """The column that the bars show."""
    given = lambda name: any(not np.isnan(_known(getattr(row, name))) for row in plan.rows)
    return TURN if given("turned") else LOSS if given("loss") else "cosine"


def _known(value: float | None) -> float:
    return np.nan if value is None else value


def prediction(plan: Plan) -> str:
    """The error before and right after, as an estimate."""
    before, after = plan.expected.get("error before"), plan.expected.get("error after")
    if before is None or after is None:
        return "No prediction for this selection of rows."
    return f"Estimated error {before:.4g} → {after:.4g} ({after - before:+.2g}; on choose rows, before training)."


def _title(plan: Plan, rows: pd.DataFrame) -> str:
    which = "that turn furthest" if TURN in rows else "worst"
    shown = f"the {MAX_BARS} {which} of {count(len(rows))} units; " if len(rows) > MAX_BARS else ""
    return shown + prediction(plan)


def _labels(shown: pd.DataFrame, value: str, top: float, look: Look) -> hv.Labels:
    """Words beside the bars that carry a warning: colour alone says nothing."""
    warned = shown[shown["warning"] != ""]
    text = [f"▲ {r.warning}: {r.cosine:.2f} to latent {r._4}" for r in warned.itertuples()]
    data = {"x": np.full(len(warned), 0.01 * top), "y": -warned.index.to_numpy(dtype=float), "text": text}
    style = {"text_color": "#FFFFFF" if look.theme == "light" else "#121212", "text_align": "left", **TYPE}
    return hv.Labels(data, ["x", "y"], "text").opts(**style)
