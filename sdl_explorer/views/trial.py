"""What an intervention did to the latents that chance gave it, beside a sham and beside nothing."""

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.trial import ARMS as GROUPS
from sdl_explorer.trial import LEVEL, Effect, Trial
from sdl_explorer.views.frame import frame, row_ticks
from sdl_explorer.views.intervals import Arm, own_scale, under, whiskers
from sdl_explorer.views.theme import TEXT
from sdl_explorer.views.view import view
from sdl_explorer.views.words import NO_TRIAL, count, plural

ARMS = (
    Arm("vs sham", "treated against the sham", "decoder", "circle", 0.16),
    Arm("vs nothing", "treated against nothing", "response", "square", 0.0),
    Arm("sham vs nothing", "sham against nothing", "encoder", "diamond", -0.16),
)
COMPARED = {"vs sham": ("treated", "sham"), "vs nothing": ("treated", "nothing"), "sham vs nothing": ("sham", "nothing")}
ENDS = [f"{arm.column}{end}" for arm in ARMS for end in ("", " low", " high", " p")]
COLUMNS = ("outcome", *ENDS, "treated", "sham", "nothing", "verdict")
WORDS = {1: "raised", -1: "lowered", 0: "not distinguishable from the sham"}


@view("What does it do to a latent, and more than a sham?", id="R6", of=(Trial,), page="intervene", cost="job", columns=COLUMNS)
def trial_effects(found, look):
    """One row for each thing that was measured of every latent, on its own scale: how much more it changed in the treated latents than
    in the sham ones (circle) and in the untouched ones (square), and in the sham than in the untouched ones (diamond), with the 95 %
    intervals of a permutation test. Chance said who is treated. The last row says whether untouched latents near a treated one moved."""
    rows = trial_table(found)
    drawn = rows.assign(label=[_named(found, outcome) for outcome in rows["outcome"]])
    scale = own_scale(rows, [name for name in ENDS if not name.endswith(" p")])
    layers = [layer for arm in ARMS for layer in whiskers(drawn, arm, scale, look)]
    words = [f"{r['vs sham']:+.3g} against the sham (p = {r['vs sham p']:.2g}): {r['verdict']}" for _, r in rows.iterrows()]
    told = [*(verdict != WORDS[0] for verdict in rows["verdict"]), found.spill is not None and found.spill.p < LEVEL]
    layers += [hv.VLine(0).opts(color=TEXT[look.theme], line_width=1), under([*words, spill_of(found)], told, -1.12, look)]
    return frame(
        hv.Overlay(layers),
        look,
        xlim=(-1.15, 1.15),
        ylim=(-0.7 - len(rows), 0.6),
        xlabel="← lowered   difference of the changes, each row on its own scale   raised →",
        ylabel="",
        title=f"{found.intervention}, {plural(found.n_steps, 'step')}: {units(found)}",
        height=230 + 54 * len(rows),
        columns=1,
        yticks=row_ticks([*drawn["label"], "neighbours"]),
        xticks=[(0, "0")],
    )


@trial_effects.reading
def _(found, look):
    with np.errstate(invalid="ignore"):
        said = f"{found.intervention}, {plural(found.n_steps, 'step')}: {units(found)}"
        return f"{said.capitalize()}. {found.reading} {spill_of(found)}."


@trial_effects.table
def _(found, look):
    return trial_table(found)


@trial_effects.empty
def _(found, look):
    return NO_TRIAL if found is None else None


def trial_table(found: Trial) -> pd.DataFrame:
    """A row for each outcome, the primary first: each comparison with its interval and p-value, and how many latents are in each arm."""
    numbers = {arm: int((found.arm == place).sum()) for place, arm in enumerate(GROUPS)}
    rows = []
    for outcome in sorted(found.outcomes, key=lambda one: one != found.primary):
        with np.errstate(invalid="ignore"):
            effects: dict[str, Effect] = {name: found.effect(outcome, against, arm) for name, (arm, against) in COMPARED.items()}
        row = {"outcome": outcome.replace("_", " ")}
        for name, effect in effects.items():
            row |= {name: effect.mean, f"{name} low": effect.low, f"{name} high": effect.high, f"{name} p": effect.p}
        rows.append(row | numbers | {"verdict": WORDS[effects["vs sham"].sign]})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def units(found: Trial) -> str:
    """'8 treated, 8 sham, 7 untouched'"""
    treated, sham, nothing = (int((found.arm == place).sum()) for place in range(len(GROUPS)))
    return f"{count(treated)} treated, {count(sham)} sham, {count(nothing)} untouched"


def spill_of(found: Trial) -> str:
    """Whether untouched neighbours of treated latents moved too."""
    spill, outcome = found.spill, found.primary.replace("_", " ")
    if spill is None:
        return "Spill-over cannot be told: no untouched latent is near a treated one"
    moved = "Untouched neighbours moved too" if spill.p < LEVEL else "No spill-over seen"
    return f"{moved}: {outcome} {spill.slope:+.3g} per unit of cosine over {count(spill.n)} untouched latents (p = {spill.p:.2g})"


def _named(found: Trial, outcome: str) -> str:
    return f"▸ {outcome}" if outcome == found.primary.replace("_", " ") else outcome
