"""Where two latents end after a kick: back, at a lower loss, or elsewhere."""

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.diagnosis.landscape_kick import FATES, Arm
from sdl_explorer.views.frame import empty_table, finite, frame, log_limits, row_ticks, sample
from sdl_explorer.views.landscape import OF, nothing
from sdl_explorer.views.theme import EDGE, TEXT, Token
from sdl_explorer.views.view import view
from sdl_explorer.views.words import plural

_TOKENS = (
    Token("comes back", "Comes back", "the loss and what is written are those without a kick", "#0072B2", "#56B4E9", "●", "circle"),
    Token("finds lower", "Finds lower", "the loss ends below that without a kick", "#D55E00", "#D55E00", "▼", "inverted_triangle"),
    Token("drifts", "Drifts", "it ends elsewhere, at the same loss or a higher one", "#663300", "#E69F00", "□", "square", hollow=True),
)
FATE_TOKENS = {token.name: token for token in _TOKENS}
SEVERAL = {"comes back": "back", "finds lower": "lower", "drifts": "elsewhere"}
COLUMNS = ("kick", "loss right after", "loss at the end", "moved right after", "moved at the end", "fate")
FLOOR = 1e-4  # of the largest loss: lower ones are drawn there


@view("Does a kick come back?", id="L3", of=OF, page="landscape", cost="job")
def kick_test(health, landscape, look):
    """Two latents are moved at random and then trained alone for a while, all others held. Small rings: the loss right after the kick.
    Large marks: the loss at the end, and its fate in shape, colour and word. The dashed line is the same training without a kick. The
    last row is the null: the same latents restarted in random directions. A size of 1 is noise as large as the entries of a row."""
    kicks, theme = landscape.kicks, look.theme
    arms = (*kicks.arms, kicks.random)
    largest = max([*finite([arm.after for arm in arms]), *finite([arm.end for arm in arms]), kicks.unkicked], default=1.0)
    floor = FLOOR * (largest if np.isfinite(largest) and largest > 0 else 1.0)
    raised = lambda losses: np.where(np.isfinite(losses), np.maximum(losses, floor), np.nan)
    plain = hv.VLine(max(kicks.unkicked, floor)).opts(color=TEXT[theme], line_dash="dashed", line_width=1.5)
    layers: list = [plain] if np.isfinite(kicks.unkicked) else []
    rows = [-place + _spread(arm) for place, arm in enumerate(arms)]
    after = hv.Points((np.concatenate([raised(arm.after) for arm in arms]), np.concatenate(rows)), ["loss", "row"])
    layers.append(after.opts(marker="circle", size=5, fill_alpha=0, color=EDGE[theme], tools=[]))
    ends, fates = np.concatenate([raised(arm.end) for arm in arms]), np.concatenate([arm.fate for arm in arms])
    for index, fate in enumerate(FATES):
        token, here = FATE_TOKENS[fate], fates == index
        if here.any():
            marks = hv.Points((ends[here], np.concatenate(rows)[here]), ["loss", "row"])
            style = {"marker": token.marker, "color": token.colour(theme), "fill_alpha": 0.0 if token.hollow else 1.0}
            layers.append(marks.opts(size=10, line_width=1.5, tools=["hover"], **style))
    layers += [
        sample(f"{t.word} ({sum(arm.count(t.name) for arm in kicks.arms)})", t.marker, t.colour(theme), 0.0 if t.hollow else 1.0)
        for t in _TOKENS
    ]
    layers.append(sample("right after the kick", "circle", EDGE[theme], 0.0))
    return frame(
        hv.Overlay(layers),
        look,
        xlim=log_limits([raised(kicks.unkicked), *ends, *np.concatenate([raised(arm.after) for arm in arms])]),
        ylim=(0.4 - len(arms), 0.6),
        xlabel=f"loss (log; {floor:.1g} and below drawn there); dashed: without a kick",
        ylabel="",
        title=f"Latents {landscape.latents[0]} and {landscape.latents[1]}: a kick {landscape.verdict}",
        height=150 + 56 * len(arms),
        columns=4,
        logx=True,
        yticks=row_ticks([*(f"size {arm.sigma:g}" for arm in kicks.arms), "random"]),
    )


@kick_test.reading
def _(health, landscape, look):
    kicks = landscape.kicks
    each = "; ".join(f"size {arm.sigma:g}: {_told(arm)}" for arm in kicks.arms)
    return (
        f"A kick {landscape.verdict}: {kicks.reason}. {plural(kicks.n_steps, 'step')} without a kick take the loss from "
        f"{kicks.start:.4g} to {kicks.unkicked:.4g}; the lowest end is {kicks.lowest:.4g}. {each}."
    )


@kick_test.table
def _(health, landscape, look):
    if nothing(landscape):
        return empty_table(*COLUMNS)
    kicks = landscape.kicks
    parts = [
        pd.DataFrame(
            {
                "kick": "random directions" if arm.sigma is None else f"size {arm.sigma:g}",
                "loss right after": arm.after,
                "loss at the end": arm.end,
                "moved right after": arm.moved_after,
                "moved at the end": arm.moved_end,
                "fate": [FATES[i] for i in arm.fate],
            }
        )
        for arm in (*kicks.arms, kicks.random)
    ]
    return pd.concat(parts, ignore_index=True)


@kick_test.empty
def _(health, landscape, look):
    return nothing(landscape)


def _told(arm: Arm) -> str:
    return ", ".join(f"{n} {SEVERAL[fate]}" for fate in FATES if (n := arm.count(fate)))


def _spread(arm: Arm) -> np.ndarray:
    """Marks of one strip beside each other, so that equal losses are seen."""
    return np.linspace(-0.3, 0.3, len(arm.end)) if len(arm.end) > 1 else np.zeros(1)
