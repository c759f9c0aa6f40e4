"""What plots with one point per latent share: an axis of firing rates, tokens as marks, and a legend that counts them."""

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.views.frame import BRUSH, MAX_POINTS, same_when_selected, sample
from sdl_explorer.views.look import Look
from sdl_explorer.views.theme import GRID, Token
from sdl_explorer.views.words import PIXELS, count, plural

Tokens = dict[str, Token]


class RateAxis:
    """log10 of how often a latent fires, over n_samples rows; silent ones stand side by side in a gutter at the left."""

    label = "share of the rows on which it fires"

    def __init__(self, n_samples: int):
        self.n_samples = n_samples
        self.gutter = float(np.log10(1 / n_samples)) - 0.5  # half a decade left of a single firing
        self.limits = (self.gutter - 0.25, 0.15)

    def places(self, rate: np.ndarray) -> np.ndarray:
        x = np.log10(np.maximum(rate, 1 / self.n_samples))
        silent = np.flatnonzero(rate == 0)
        x[silent] = self.gutter + np.linspace(-0.2, 0.2, len(silent) + 2)[1:-1]
        return x

    @property
    def ticks(self) -> list[tuple[float, str]]:
        decades = range(int(np.ceil(self.gutter + 0.3)), 1)
        return [(self.gutter, "silent"), *((float(k), f"{10.0**k * 100:g} %") for k in decades)]

    def border(self, theme: str) -> hv.VLine:
        """The line between the gutter and the axis."""
        return hv.VLine(self.gutter + 0.25).opts(color=GRID[theme], line_width=2)


def drawn_rows(n_latents: int, look: Look, first: np.ndarray) -> np.ndarray:
    """Latents that become points: all, or, beyond MAX_POINTS, those selected and those named `first`."""
    if n_latents <= MAX_POINTS:
        return np.arange(n_latents)
    chosen = [i for i in (*look.selected_latents, look.primary_latent) if i is not None and i < n_latents]
    return np.unique(np.concatenate([np.array(chosen, dtype=int), first]))


def pixels_said(points: pd.DataFrame, drawn: pd.DataFrame) -> str:
    """A line for the title where not every latent is a point."""
    return "" if len(drawn) == len(points) else f"\n{PIXELS} On top: {count(len(drawn))} of them as points."


def token_marks(
    drawn: pd.DataFrame,
    tokens: Tokens,
    theme: str,
    tips: list[tuple[str, str]],
    size: np.ndarray | float = 9.0,
    hollow: np.ndarray | None = None,
) -> hv.Points:
    """A point per row of `drawn` at (x, y), as its status has it (`hollow` where that is not enough); every column is in the data, and
    `tips` may name it."""
    chosen = [tokens[s] for s in drawn["status"]]
    hollow = np.array([t.hollow for t in chosen], dtype=bool) if hollow is None else hollow
    style = {
        "marker": [t.marker for t in chosen],
        "size": np.full(len(drawn), size),
        "fill": np.where(hollow, 0.0, 0.75),
        "word": [t.word for t in chosen],
    }
    points = hv.Points(drawn.assign(**style), ["x", "y"], [*(c for c in drawn.columns if c not in ("x", "y")), *style])
    return points.opts(
        color="status",
        cmap={name: t.colour(theme) for name, t in tokens.items()},
        marker="marker",
        size="size",
        fill_alpha="fill",
        line_width=1.5,
        tools=["hover", *BRUSH],
        show_legend=False,
        colorbar=False,
        hooks=[same_when_selected],
        hover_tooltips=[("latent", "@latent"), ("status", "@word"), *tips],
    )


def token_legend(status: pd.Series, tokens: Tokens, theme: str) -> list[hv.Points]:
    """An entry for each status that occurs, with its number."""
    numbers = status.value_counts()
    return [
        sample(f"{t.word} ({count(numbers[name])})", t.marker, t.colour(theme), 0.0 if t.hollow else 0.75)
        for name, t in tokens.items()
        if name in numbers
    ]


def token_counts(status: pd.Series, tokens: Tokens) -> str:
    """ "5 latents: 1 dead, 4 in use"; of candidates in the plural."""
    numbers = status.value_counts()
    some = [(numbers[name], t.word.lower()) for name, t in tokens.items() if name in numbers]
    words = ", ".join(plural(n, word) if word.endswith("candidate") else f"{count(n)} {word}" for n, word in some)
    return f"{plural(len(status), 'latent')}: {words}"
