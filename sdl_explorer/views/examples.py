"""What a latent fires on, as cards: tokens in context, images, or the true features of generated data.

`example_cards` returns data, `cards_html` the page fragment. Every text that comes from data is escaped, colours and
numbers are ours.
"""

import base64
import struct
import zlib
from html import escape
from typing import NamedTuple

import numpy as np
from holoviews.plotting.util import process_cmap

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.examples import KINDS, ExampleSet
from sdl_explorer.views.look import Look
from sdl_explorer.views.theme import BACKGROUND, EDGE, FONT, GRID, LINES, MUTED, SEQUENTIAL, TEXT
from sdl_explorer.views.words import NO_SELECTION, NOT_COMPUTED, count, never_fired

KIND_WORDS = {"random": "Random positives", "top": "Strongest", "quantile": "From weak to strong"}
CONTEXT = 12  # tokens on either side
MOST_BARS = 6
RAMP = process_cmap(SEQUENTIAL, 32)


class Card(NamedTuple):
    """One example. Exactly one of `pieces`, `bars` says what the row is; `thumbnail` may stand beside.

    `strengths` tints each piece, 0 to 1 of the latent's strongest; `focus` is the piece of this row. `bars` are the active
    true features (name, value), strongest first.
    """

    kind: str
    row: int
    value: float
    label: str = ""
    pieces: tuple[str, ...] = ()
    strengths: tuple[float, ...] = ()
    focus: int = -1
    thumbnail: np.ndarray | None = None
    bars: tuple[tuple[str, float], ...] = ()


def context_rows(found: ExampleSet, activations: Activations, latent: int, width: int = CONTEXT) -> np.ndarray:
    """Rows of the tokens around the latent's examples, sorted: give their activations to `example_cards` as `around`."""
    where = _places(activations)
    wanted = {e.row for e in found.of(latent)}
    if activations.examples is not None:
        for row in list(wanted):
            document, passage = int(activations.examples.document[row]), activations.examples.context(row, width)
            wanted |= {where[document, p] for p in passage.positions if (document, p) in where}
    return np.array(sorted(wanted), dtype=np.int64)


def example_cards(
    found: ExampleSet, activations: Activations, latent: int, around: dict[int, float] | None = None, width: int = CONTEXT
) -> tuple[Card, ...]:
    """The latent's examples, random positives first. `around`: row -> activation of this latent, to tint the context."""
    around = {**(around or {}), **{e.row: e.value for e in found.of(latent)}}
    where = _places(activations) if activations.examples is not None else {}
    highest = max(float(found.highest[latent]), 1e-12)
    return tuple(_card(e, activations, around, where, highest, width) for kind in KINDS for e in found.of(latent, kind))


def examples_reading(found: ExampleSet | None, look: Look) -> str:
    """How often the latent of the look fires, in one sentence."""
    why = examples_empty(found, look)
    if why is not None:
        return why
    latent = look.primary_latent
    return (
        f"Latent {latent} fired on {count(found.n_fires[latent])} of {count(found.n_samples)} samples; "
        f"strongest activation {found.highest[latent]:.3g}."
    )


def examples_empty(found: ExampleSet | None, look: Look) -> str | None:
    """Why there is no card, or None."""
    if look.primary_latent is None:
        return NO_SELECTION
    if found is None:
        return NOT_COMPUTED
    return never_fired(found.n_samples) if found.n_fires[look.primary_latent] == 0 else None


def cards_html(cards: tuple[Card, ...], look: Look) -> str:
    """The cards as a safe fragment of HTML, grouped by kind."""
    theme = look.theme
    groups = []
    for kind in dict.fromkeys(c.kind for c in cards):
        of_kind = [c for c in cards if c.kind == kind]
        words = f"{escape(KIND_WORDS.get(kind, kind))} ({len(of_kind)})"
        heading = f'<h4 style="margin:12px 0 4px;font:600 13px {escape(FONT)};color:{TEXT[theme]}">{words}</h4>'
        groups.append(heading + "".join(_card_html(card, theme) for card in of_kind))
    style = f"font:13px/1.6 {escape(FONT)};color:{TEXT[theme]};background:{BACKGROUND[theme]};overflow-wrap:anywhere"
    return f'<div class="sdlx-examples" style="{style}">{"".join(groups)}</div>'


def data_uri(image: np.ndarray) -> str:
    """An (height, width, 3) uint8 image as a PNG in a data: address."""
    height, width, _ = image.shape
    raw = np.zeros((height, 1 + 3 * width), dtype=np.uint8)  # each line begins with filter type 0
    raw[:, 1:] = np.ascontiguousarray(image, dtype=np.uint8).reshape(height, 3 * width)
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw.tobytes())) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _places(activations: Activations) -> dict[tuple[int, int], int]:
    """(document, position) -> row."""
    if activations.examples is None:
        return {}
    examples = activations.examples
    return {place: row for row, place in enumerate(zip(examples.document.tolist(), examples.position.tolist(), strict=True))}


def _card(example, activations: Activations, around, where, highest: float, width: int) -> Card:
    row, label = example.row, _label(activations, example.row)
    if activations.examples is not None:
        examples = activations.examples
        passage, document = examples.context(row, width), int(examples.document[row])
        strengths = tuple(float(np.clip(around.get(where.get((document, p), -1), 0.0) / highest, 0, 1)) for p in passage.positions)
        return Card(example.kind, row, example.value, label, passage.pieces, strengths, passage.focus, examples.thumbnail(row))
    if activations.truth is not None:
        codes = activations.truth.codes[row]
        order = codes.argsort(descending=True)[:MOST_BARS].tolist()
        bars = tuple((activations.truth.name(i), float(codes[i])) for i in order if codes[i] > 0)
        return Card(example.kind, row, example.value, label, bars=bars)
    return Card(example.kind, row, example.value, label)


def _label(activations: Activations, row: int) -> str:
    if activations.labels is None:
        return ""
    label = int(activations.labels[row])
    return activations.label_names[label] if 0 <= label < len(activations.label_names) else f"label {label}"


def _card_html(card: Card, theme: str) -> str:
    label = f" · {escape(card.label)}" if card.label else ""
    foot = f'<div style="font-size:12px;color:{MUTED[theme]}">activation {card.value:.3g} · row {count(card.row)}{label}</div>'
    image = (
        f'<img alt="" src="{data_uri(card.thumbnail)}" style="height:64px;image-rendering:pixelated;margin-right:8px">'
        if card.thumbnail is not None
        else ""
    )
    if card.pieces:
        body = "".join(_piece(p, s, i == card.focus, theme) for i, (p, s) in enumerate(zip(card.pieces, card.strengths, strict=True)))
        body = f'<div style="white-space:pre-wrap">{body}</div>'
    elif card.bars:
        top = max(value for _, value in card.bars)
        body = "".join(_bar(name, value, value / top, theme) for name, value in card.bars)
    else:
        body = ""
    return f'<div style="border-top:1px solid {GRID[theme]};padding:6px 0">{image}{body}{foot}</div>'


def _piece(piece: str, strength: float, focus: bool, theme: str) -> str:
    """A token on the colour of its strength, in whichever text colour can be read on it; the focus is bold and underlined."""
    style = "border-radius:3px;padding:1px 0"
    if strength > 0:
        tint = _tint(strength, theme)
        style += f";background:{tint};color:{_readable(tint)}"
    if focus:
        style += ";font-weight:700;text-decoration:underline;text-underline-offset:3px"
    return f'<span style="{style}">{escape(piece)}</span>'


def _tint(strength: float, theme: str) -> str:
    """Cividis towards the colour furthest from the background, the weaker the closer to the background."""
    ramp = RAMP[round((strength if theme == "dark" else 1 - strength) * (len(RAMP) - 1))]
    mixed = (1 - strength**0.5) * _rgb(BACKGROUND[theme]) + strength**0.5 * _rgb(ramp)
    return "#" + "".join(f"{round(255 * c):02X}" for c in mixed)


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def _readable(background: str) -> str:
    """Black or white, whichever has the larger WCAG contrast."""
    srgb = _rgb(background)
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ [0.2126, 0.7152, 0.0722])
    return "#000000" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "#FFFFFF"


def _bar(name: str, value: float, share: float, theme: str) -> str:
    style = f"display:inline-block;height:10px;width:{100 * share:.0f}%;background:{LINES['decoder'][theme]};border:1px solid {EDGE[theme]}"
    bar = f'<span style="{style}"></span>'
    return (
        '<div style="display:grid;grid-template-columns:minmax(80px,40%) 1fr 48px;gap:6px;align-items:center">'
        f"<span>{escape(name)}</span><span>{bar}</span><span>{value:.2f}</span></div>"
    )
