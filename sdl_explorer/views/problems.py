"""The top problems: what `explain` says is wrong, the most harmful first, with its evidence and what could be done."""

from html import escape

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.diagnosis.explain import explain
from sdl_explorer.diagnosis.verdict import Verdict
from sdl_explorer.views.frame import bars, drawable, frame, row_ticks
from sdl_explorer.views.look import Look
from sdl_explorer.views.theme import EDGE, EDGES, MUTED, PATTERNS, STATUSES, Token
from sdl_explorer.views.view import view
from sdl_explorer.views.words import NO_PROBLEM, NOT_COMPUTED, plural

_COPY = ("writes what another latent writes", "#663300", "#E69F00")
_READS = ("reads something else than what fires it", "#333333", "#E6E6E6")
KNOWN: dict[str, Token] = {  # by the id of a verdict
    "dead": STATUSES["dead"],
    "merged": PATTERNS["poly"],
    "absorbed": EDGES["absorbed"],
    "copies": Token("copies", "Copy", *_COPY, "■", "square"),
    "encoder": Token("encoder", "Wrong encoder", *_READS, "✱", "asterisk"),
}
GUESSED: dict[str, Token] = {  # where no truth was seen
    "merged": PATTERNS["candidate"],
    "absorbed": Token(
        "absorbed candidate", "Absorption candidate", "may have taken another one's place", "#CC79A7", "#CC79A7", "◇", "diamond", True
    ),
    "copies": Token("copies candidate", "Copy candidate", *_COPY, "□", "square", hollow=True),
    "encoder": Token("encoder candidate", "Wrong encoder candidate", *_READS, "✲", "asterisk", hollow=True),
}
SHOWN_ON = {"dead": "Latents", "merged": "Latents", "copies": "Latents", "absorbed": "Absorption", "encoder": "Alignment"}
JUDGED = "Whether any of this helps, Try repairs on the page Intervene can judge."
COLUMNS = ("problem", "claim", "harm", "of", "evidence", "theorem", "advice", "latents", "features")


@view("Top problems: what is wrong, and what could help?", id="O2", of=(explain,), page="overview", cost="job", columns=COLUMNS)
def problems(verdicts, look):
    """What explain finds wrong, at most five, the most harmful first. With the truth, harm is the share of the features that a cause
    costs; one feature may count for two causes. Without it harm is the share of the latents concerned, and a hollow shape is a
    candidate: no truth was seen. The first button shows the latents concerned, the second opens the form of what could help, filled in;
    nothing is applied before you press Apply there."""
    table = problems.table(verdicts, look).assign(harm=drawable([v.harm for v in verdicts]))
    harm = bars(table, "harm", [token_of(v).colour(look.theme) for v in verdicts], look).opts(tools=["hover"])
    return frame(
        hv.Overlay([harm]),
        look,
        xlim=(0, 1),
        ylim=(0.6 - len(verdicts), 0.6),
        xlabel=f"share of the {table['of'].iloc[0]}",
        ylabel="",
        height=120 + 34 * len(verdicts),
        legend=None,
        yticks=row_ticks(f"{token_of(v).shape} {token_of(v).word}" for v in verdicts),
    )


@problems.reading
def _(verdicts, look):
    said = ", ".join(f"{token_of(v).word.lower()} ({harm_of(v)})" for v in verdicts)
    return f"{plural(len(verdicts), 'problem')}, the most harmful first: {said}."


@problems.table
def _(verdicts, look):
    rows = [
        (
            token_of(v).word,
            v.claim,
            v.harm,
            "features that it costs" if v.features else "latents concerned",
            "; ".join(v.evidence),
            v.theorem,
            type(v.advice).__name__,
            len(v.latents),
            len(v.features),
        )
        for v in verdicts
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


@problems.empty
def _(verdicts, look):
    if verdicts is None:
        return NOT_COMPUTED
    return None if verdicts else NO_PROBLEM


def token_of(verdict: Verdict) -> Token:
    """Colour, shape and word of a verdict."""
    return (GUESSED if verdict.candidate else KNOWN).get(verdict.id, STATUSES["unmatched"])


def harm_of(verdict: Verdict) -> str:
    """'costs up to 12 % of the features', 'concerns 31 % of the latents'"""
    share = f"{verdict.harm:.0%}" if np.isfinite(verdict.harm) else "an unknown share"
    return f"costs up to {share} of the features" if verdict.features else f"concerns {share} of the latents"


def problems_html(verdicts: list[Verdict], look: Look) -> str:
    """The verdicts as a list; every text that may come from data is escaped. `data-pick` is "0 show" or "0 help"."""
    items = "".join(_item(place, verdict, look.theme) for place, verdict in enumerate(verdicts))
    return f"{_style(look.theme)}<ol class='problems'>{items}</ol><p class='problems quiet'>{JUDGED}</p>"


def _item(place: int, verdict: Verdict, theme: str) -> str:
    token, advice = token_of(verdict), type(verdict.advice).__name__
    evidence = "".join(f"<li>{escape(text)}</li>" for text in verdict.evidence if text)
    theorem = f"<p class='quiet'>{escape(verdict.theorem)}.</p>" if verdict.theorem else ""
    show = f"Show {plural(len(verdict.latents), 'latent')} on {SHOWN_ON.get(verdict.id, 'Latents')}"
    return (
        f"<li><p><span aria-hidden='true' style='color:{token.colour(theme)}'>{token.shape}</span> <b>{escape(token.word)}</b> "
        f"<span class='quiet'>{harm_of(verdict)}</span></p><p>{escape(verdict.claim)}</p><ul>{evidence}</ul>{theorem}"
        f"<p><button type='button' data-pick='{place} show'>{show}</button> "
        f"<button type='button' data-pick='{place} help'>Open {advice}, filled in</button></p></li>"
    )


def _style(theme: str) -> str:
    return f"""<style>
.problems {{ margin: 0; padding: 0; list-style: none; font-size: 14px; line-height: 1.45; overflow-wrap: anywhere }}
.problems > li {{ padding: 6px 0 }} .problems > li + li {{ border-top: 1px solid {EDGE[theme]} }}
.problems p {{ margin: 2px 0 }} .problems ul {{ margin: 2px 0; padding-left: 18px }}
.problems .quiet, .problems.quiet, .problems ul {{ font-size: 12.5px; color: {MUTED[theme]} }}
.problems button {{ font: inherit; font-size: 13px; min-height: 26px; padding: 1px 10px; border-radius: 6px; cursor: pointer;
  color: inherit; background: transparent; border: 1px solid {EDGE[theme]} }}
.problems button:hover {{ background: color-mix(in srgb, currentColor 9%, transparent) }}
.problems button:focus-visible {{ outline: 2px solid currentColor; outline-offset: 2px }}
</style>"""
