"""Which of the selected latents fire together."""

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.diagnosis.pairs import Pairs, count_pairs
from sdl_explorer.views.frame import colorbar_style, empty_table, frame, same_when_selected
from sdl_explorer.views.theme import BACKGROUND, SEQUENTIAL
from sdl_explorer.views.view import Chosen, view
from sdl_explorer.views.words import NO_PAIRS, NOT_COMPUTED, count, plural

COLUMNS = ("given", "also", "share", "rows with both", "rows of the given")
NUMBERS = 8  # latents up to which the shares stand in the cells


@view(
    "Which of the selected latents fire together?",
    id="P4",
    of=(check_health, Chosen(count_pairs, "latents", "selected_latents")),
    page="latents",
    cost="select",
)
def cofiring(health, pairs, look):
    """Row j, column k: the share of the rows on which latent j fires that latent k fires on too. Asymmetric on purpose: a latent that
    fires only within another one's rows has 1 one way and less the other. Ordered so that those that fire together stand together."""
    m, theme, conditional = len(pairs.latents), look.theme, pairs.conditional
    row, column = (part.ravel() for part in np.mgrid[:m, :m])
    data = {
        "x0": column - 0.5,
        "y0": -row - 0.5,
        "x1": column + 0.5,
        "y1": -row + 0.5,
        "share": conditional[row, column],
        "given": pairs.latents[row],
        "also": pairs.latents[column],
        "both": pairs.both[row, column],
    }
    cells = hv.Rectangles(data, ["x0", "y0", "x1", "y1"], ["share", "given", "also", "both"])
    tips = [("when", "latent @given fires"), ("so does", "latent @also"), ("share", "@share{0.00}"), ("rows", "@both")]
    style = {"fill_color": "share", "cmap": SEQUENTIAL, "clim": (0, 1), "colorbar": True, "line_color": BACKGROUND[theme]}
    style |= {"line_width": 0.5, "clabel": "share of its rows", "colorbar_opts": colorbar_style(theme)}
    layers: list = [cells.opts(**style, tools=["hover"], hover_tooltips=tips, hooks=[same_when_selected])]
    if m <= NUMBERS:
        for pale, colour in ((False, "#FFFFFF"), (True, "#000000")):  # on the cells, which are the same in both themes
            some = (conditional[row, column] >= 0.5) == pale
            text = [f"{v:.2f}" for v in conditional[row, column][some]]
            layers.append(hv.Labels((column[some], -row[some], text), ["x", "y"], "text").opts(text_color=colour, text_font_size="12px"))
    ticks = [str(i) for i in pairs.latents]
    return frame(
        hv.Overlay(layers),
        look,
        xlim=(-0.5, m - 0.5),
        ylim=(0.5 - m, 0.5),
        xlabel="latent k: fires too",
        ylabel="latent j: when it fires",
        title=_title(pairs),
        height=int(np.clip(140 + 26 * m, 240, 760)),
        legend=None,
        xticks=[(float(k), word) for k, word in enumerate(ticks)],
        yticks=[(-float(k), word) for k, word in enumerate(ticks)],
        xrotation=90 if m > 12 else 0,
        show_grid=False,
    )


@cofiring.reading
def _(health, pairs, look):
    table = _rows(pairs)
    if not table["rows with both"].any():
        return f"{_title(pairs)}. No two of them fire on the same row."
    given, also, share, _, fired = next(table.itertuples(index=False))
    _, _, back, _, others = next(table[(table["given"] == also) & (table["also"] == given)].itertuples(index=False))
    return (
        f"{_title(pairs)}. Most together: when latent {given} fires, latent {also} does on {share:.0%} of {plural(fired, 'row')}; "
        f"the other way {back:.0%} of {count(others)}."
    )


@cofiring.table
def _(health, pairs, look):
    return empty_table(*COLUMNS) if cofiring.empty(health, pairs, look) else _rows(pairs)


@cofiring.empty
def _(health, pairs, look):
    if len(look.selected_latents) < 2:
        return NO_PAIRS
    return NOT_COMPUTED if pairs is None or len(pairs.latents) < 2 else None


def _rows(pairs: Pairs) -> pd.DataFrame:
    """Every ordered pair of two latents, the largest share first."""
    j, k = np.nonzero(~np.eye(len(pairs.latents), dtype=bool))
    columns = pairs.latents[j], pairs.latents[k], pairs.conditional[j, k], pairs.both[j, k], pairs.fired[j]
    rows = pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))
    return rows.sort_values(["share", "rows with both", "given", "also"], ascending=[False, False, True, True], ignore_index=True)


def _title(pairs: Pairs) -> str:
    if pairs.n_given > len(pairs.latents):
        return f"The {len(pairs.latents)} strongest of {count(pairs.n_given)} selected latents"
    return f"{plural(len(pairs.latents), 'selected latent')} on {plural(pairs.n_samples, 'row')}"
