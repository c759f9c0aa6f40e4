"""The four tiles of the overview. A tile is a filter: a click selects what it counts."""

from collections.abc import Sequence
from html import escape

import numpy as np
import panel as pn

from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.views.theme import EDGE, LINES, token
from sdl_explorer.views.tiles import Tile, tiles, tiles_reading
from sdl_explorer.widgets.kit import Html, Text

COLUMNS = 100  # of a sparkline; more values are drawn as the lowest and the highest of each column
STYLE = """<style>
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 10px }
.tile { font: inherit; color: inherit; background: transparent; text-align: left; padding: 10px 12px; border-radius: 8px;
  min-height: 92px; display: flex; flex-direction: column; justify-content: flex-start }
button.tile { cursor: pointer }
button.tile:hover { background: color-mix(in srgb, currentColor 7%, transparent) }
.tile:focus-visible { outline: 2px solid currentColor; outline-offset: 2px }
.tile b { display: block; font-size: 27px; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.3 }
.tile .name { font-size: 14px } .tile .share { font-size: 12.5px; line-height: 1.35; display: block }
</style>"""


class Tiles(pn.viewable.Viewer):
    def __init__(self, host):
        super().__init__()
        self.host, self._drawn, self._tiles = host, None, ()
        self._html = Html("", on_pick=self._pick, css_classes=["sdlx-tiles"])
        self._reading = Text("", role="status", tone="quiet", css_classes=["sdlx-tiles-reading"])
        self._view = pn.Column(self._html, self._reading, sizing_mode="stretch_width", margin=(4, 0))

    def __panel__(self):
        return self._view

    def needs(self):
        return [f for f in (align, check_health) if self.host.knows(f)], []

    def refresh(self) -> None:
        look = self.host.look()
        alignment, health = self.host.value(align), self.host.value(check_health)
        diverged = self.host.snapshot.diverged
        key = (id(alignment), id(health), look, self.host.snapshot.version, diverged)
        if key == self._drawn:
            return
        self._drawn = key
        records, step = (self.host.session.history, self.host.session.commits), diverged and diverged.step
        self._tiles = tiles(alignment, health, look, *records, against=self.host.against, diverged=step)
        self._html.html = f"{STYLE}<div class='tiles'>{''.join(_tile(i, t, look.theme) for i, t in enumerate(self._tiles))}</div>"
        self._reading.text = tiles_reading(self._tiles)

    def _pick(self, pick: str) -> None:
        tile = self._tiles[int(pick)] if pick.isdigit() and int(pick) < len(self._tiles) else None
        if tile is not None and tile.status in ("dead", "unseen"):
            self.host.filter(("status", "==", tile.status))
        elif tile is not None and tile.features:
            self.host.select(features=tile.features)


def _tile(place: int, tile: Tile, theme: str) -> str:
    """One tile; the shape and the word carry the status, the colour only the shape."""
    shape = (
        f"<span aria-hidden='true' style='color:{token(tile.status).colour(theme)}'>{token(tile.status).shape}</span> "
        if tile.status
        else ""
    )
    body = (
        f"<span class='name'>{shape}{escape(tile.title)}</span><b>{escape(tile.number)}</b><span class='share'>{escape(tile.share)}</span>"
    )
    body += _sparkline(tile.sparkline, theme)
    border = f"border:1px solid {EDGE[theme]}"
    if not tile.latents and not tile.features:
        return f"<div class='tile' style='{border}'>{body}</div>"
    label = escape(f"{tile.title}: {tile.number}. Select them.", quote=True)
    return f"<button type='button' class='tile' style='{border}' data-pick='{place}' aria-label='{label}'>{body}</button>"


def _sparkline(values: Sequence[float], theme: str) -> str:
    if len(values) < 2:
        return ""
    if len(values) > 2 * COLUMNS:
        values = [end for part in np.array_split(values, COLUMNS) for end in (part.min(), part.max())]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    points = " ".join(f"{100 * i / (len(values) - 1):.1f},{22 - 20 * (v - low) / span:.1f}" for i, v in enumerate(values))
    stroke = f"stroke='{LINES['decoder'][theme]}' stroke-width='1.5' vector-effect='non-scaling-stroke'"
    line = f"<polyline points='{points}' fill='none' {stroke}/>"
    return (
        f"<svg aria-hidden='true' viewBox='0 0 100 24' preserveAspectRatio='none' style='width:100%;height:24px;display:block'>{line}</svg>"
    )
