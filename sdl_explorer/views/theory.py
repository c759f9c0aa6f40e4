"""What each theorem says here: its two sides, and its card with assumptions, slack, witness and verdict."""

from html import escape

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.diagnosis.theory import check_theory
from sdl_explorer.diagnosis.theory_cards import TheoryCard
from sdl_explorer.views.frame import EDGE, TYPE, drawable, finite, frame, row_ticks, sample
from sdl_explorer.views.look import Look
from sdl_explorer.views.theme import MUTED, TEXT, Token
from sdl_explorer.views.view import view
from sdl_explorer.views.words import NOT_COMPUTED, count, plural

_TOKENS = (
    Token("holds", "Holds", "every assumption is met, and the statement is true here", "#0072B2", "#56B4E9", "●", "circle"),
    Token("violated", "Violated", "every assumption is met, and the statement is false here", "#D55E00", "#D55E00", "▲", "triangle"),
    Token("assumption not met", "Assumption not met", "it says nothing about this model", "#663300", "#E69F00", "□", "square", True),
    Token("not checkable", "Not checkable", "something that it needs cannot be told", "#6E6E6E", "#707070", "○", "circle", True),
)
VERDICTS = {token.name: token for token in _TOKENS}
MET = {True: ("✓", "met"), False: ("✗", "not met"), None: ("?", "cannot be told")}
COLUMNS = ("theorem", "statement", "verdict", "reason", "relation", "left", "right", "slack", "assumptions", "witness", "rows", "source")
FLOOR = 1e-12  # smaller sides are drawn there


@view("Which theorems apply here, and what do they say?", id="T", of=(check_theory,), page="landscape", cost="job", columns=COLUMNS)
def theorem_sides(cards, look):
    """One row a theorem: the left side of its statement (filled) and the right side (hollow), with the slack between them, on a log
    axis. Shape, colour and the word on the right are the verdict. A statement whose assumptions fail says nothing about this model,
    however its two sides stand; rows without marks could not be computed. The cards below have the assumptions, each with its value."""
    theme, rows = look.theme, -np.arange(len(cards), dtype=float)
    left, right = (np.maximum(drawable([side(card) for card in cards]), FLOOR) for side in (lambda c: c.left, lambda c: c.right))
    slack = hv.Segments((left, rows, right, rows), ["x0", "y0", "x1", "y1"]).opts(color=MUTED[theme], line_width=2)
    layers: list = [slack]
    for verdict, token in VERDICTS.items():
        here = np.array([card.verdict == verdict for card in cards])
        if here.any():
            style = {"marker": token.marker, "color": token.colour(theme), "size": 11, "line_width": 1.5}
            for side, fill in ((right, 0.0), (left, 0.35 if token.hollow else 1.0)):
                layers.append(hv.Points((side[here], rows[here]), ["side", "row"]).opts(fill_alpha=fill, **style))
    known = finite([left, right])
    low, high = (known.min(), known.max()) if known.size else (1e-3, 1.0)
    end = high * (high / low if high > low else 10.0) ** 0.05
    words = hv.Labels(([end] * len(cards), rows, [f"{VERDICTS[c.verdict].shape} {c.verdict}" for c in cards]), ["x", "y"], "text")
    layers.append(words.opts(text_color=TEXT[theme], text_align="left", **TYPE))
    layers += [sample("left side", "circle", EDGE[theme]), sample("right side", "circle", EDGE[theme], 0.0)]
    return frame(
        hv.Overlay(layers),
        look,
        xlim=(low / (high / low if high > low else 10.0) ** 0.05, end * (high / low if high > low else 10.0) ** 0.4),
        ylim=(0.4 - len(cards), 0.6),
        xlabel=f"left and right side of each statement (log; below {FLOOR:g} drawn there)",
        ylabel="",
        title=_counted(cards),
        height=120 + 34 * len(cards),
        logx=True,
        yticks=row_ticks(card.id for card in cards),
    )


@theorem_sides.reading
def _(cards, look):
    said = " ".join(f"{card.id} {card.title}: {card.verdict}." for card in cards)
    return f"{_counted(cards)}. {said}"


@theorem_sides.table
def _(cards, look):
    rows = [
        (
            card.id,
            card.title,
            card.verdict,
            card.reason,
            card.relation,
            card.left,
            card.right,
            card.slack,
            "; ".join(f"{MET[a.met][1]}: {a.asks} ({a.value})" for a in card.assumptions),
            card.witness.text,
            card.n_samples,
            card.source,
        )
        for card in cards
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


@theorem_sides.empty
def _(cards, look):
    return None if cards else NOT_COMPUTED


# the cards -----------------------------------------------------------------------------------------------------------


def theory_html(cards: list[TheoryCard], look: Look) -> str:
    """All cards as markup; every text that comes from data is escaped. `data-pick` of a witness is "T5 features", or "T5 latents"."""
    return f"{_style(look.theme)}<div class='theory'>{''.join(_card(card, look.theme) for card in cards)}</div>"


def _card(card: TheoryCard, theme: str) -> str:
    token = VERDICTS[card.verdict]
    shape = f"<span aria-hidden='true' style='color:{token.colour(theme)}'>{token.shape}</span>"
    numbers = "".join(f"<dt>{escape(name)}</dt><dd>{escape(_number(value))}</dd>" for name, value in card.numbers.items())
    more = f"<details><summary>{plural(len(card.numbers), 'more number')}</summary><dl>{numbers}</dl></details>" if numbers else ""
    return (
        f"<article aria-label='{escape(card.id)}: {escape(card.title, quote=True)}'>"
        f"<h3>{escape(card.id)} {escape(card.title)}</h3>"
        f"<p class='verdict'>{shape} <b>{token.word}</b>{': ' + escape(card.reason) if card.reason else ''}</p>"
        f"<p>{escape(card.statement)}</p>"
        f"<ul>{''.join(_assumption(a) for a in card.assumptions)}</ul>"
        f"{_sides(card, theme)}{_witness(card)}{more}"
        f"<p class='quiet'>{escape(card.source)}. {plural(card.n_samples, 'row')}, tolerance {card.tolerance:g}.</p></article>"
    )


def _assumption(assumption) -> str:
    sign, word = MET[assumption.met]
    live = f"<span class='live'>{escape(assumption.value)}</span>"
    return f"<li><span aria-hidden='true'>{sign}</span> <b>{word}</b>: {escape(assumption.asks)}: {live}</li>"


def _sides(card: TheoryCard, theme: str) -> str:
    if not (np.isfinite(card.left) and np.isfinite(card.right)):
        return ""
    said = f"left {_number(card.left)}, right {_number(card.right)}, slack {_number(card.slack)}"
    return f"<p class='sides'>{escape(card.relation)}: {said}</p>{_bar(card, theme)}"


def _bar(card: TheoryCard, theme: str) -> str:
    """Both sides on a log scale of twelve decades at most, up to the larger one."""
    largest = max(card.left, card.right)
    if largest <= 0:
        return ""
    decades = [float(np.clip(12 + np.log10(max(side, 1e-300) / largest), 0, 12)) for side in (card.left, card.right)]
    span = max(1.0, 12 - min(decades))
    at = [100 * (1 - (12 - d) / (span * 1.05)) for d in decades]
    colour = VERDICTS[card.verdict].colour(theme)
    return (
        "<svg aria-hidden='true' viewBox='0 0 100 12' preserveAspectRatio='none'>"
        f"<rect x='0' y='1' width='{at[0]:.1f}' height='4' fill='{colour}'/>"
        f"<rect x='0' y='7' width='{at[1]:.1f}' height='4' fill='{MUTED[theme]}'/></svg>"
        f"<p class='quiet'>Bars, log: left above, right below, over {span:.0f} decades.</p>"
    )


def _witness(card: TheoryCard) -> str:
    witness = card.witness
    if not witness.text:
        return ""
    buttons = "".join(
        f"<button type='button' data-pick='{card.id} {kind}'>Select {plural(len(ids), kind[:-1])}</button>"
        for kind, ids in (("features", witness.features), ("latents", witness.latents))
        if ids
    )
    return f"<p>Witness: {escape(witness.text)} {buttons}</p>"


def _number(value) -> str:
    if isinstance(value, str):
        return value
    if value == int(value) if np.isfinite(value) else False:
        return count(value) if abs(value) < 1e15 else f"{value:.3g}"
    return f"{value:.4g}" if np.isfinite(value) else "unknown"


def _counted(cards: list[TheoryCard]) -> str:
    verdicts = [card.verdict for card in cards]
    return ", ".join(f"{verdicts.count(name)} {token.word.lower()}" for name, token in VERDICTS.items() if name in verdicts)


def _style(theme: str) -> str:
    return f"""<style>
.theory {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 12px; font-size: 14px; line-height: 1.45 }}
.theory article {{ border: 1px solid {EDGE[theme]}; border-radius: 8px; padding: 10px 12px; overflow-wrap: anywhere }}
.theory h3 {{ margin: 0 0 4px; font-size: 15px }} .theory p {{ margin: 4px 0 }}
.theory ul {{ margin: 4px 0; padding-left: 0; list-style: none }} .theory li {{ margin: 2px 0 }}
.theory .live, .theory .quiet, .theory dl {{ font-size: 12.5px; color: {MUTED[theme]} }}
.theory .sides {{ font-variant-numeric: tabular-nums }}
.theory svg {{ width: 100%; height: 12px; display: block }}
.theory dl {{ display: grid; grid-template-columns: 3fr 2fr; gap: 0 8px; margin: 4px 0 }} .theory dd {{ margin: 0 }}
.theory button {{ font: inherit; font-size: 13px; min-height: 26px; padding: 1px 10px; border-radius: 6px; cursor: pointer; color: inherit;
  background: transparent; border: 1px solid {EDGE[theme]} }}
.theory button:focus-visible, .theory summary:focus-visible {{ outline: 2px solid currentColor; outline-offset: 2px }}
.theory summary {{ cursor: pointer; font-size: 13px; min-height: 24px }}
</style>"""
