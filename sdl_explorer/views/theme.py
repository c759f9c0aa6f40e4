"""Colours, shapes and words, in one place: a status is always colour + shape + word.

Tokens keep a WCAG contrast of 3:1 to both backgrounds and a CIEDE2000 distance of 10 to each other under simulated
protanopia, deuteranopia and tritanopia (Machado, Oliveira & Fernandes 2009); the tests measure both. They start from the
palette of Okabe & Ito (2008). Sequential maps are cividis, diverging ones PuOr, centred at 0, the same in both themes.
"""

from dataclasses import dataclass

import numpy as np

THEMES = ("light", "dark")
BACKGROUND = {"light": "#FFFFFF", "dark": "#121212"}
TEXT = {"light": "#1A1A1A", "dark": "#F0F0F0"}
MUTED = {"light": "#595959", "dark": "#A8A8A8"}
GRID = {"light": "#E4E4E4", "dark": "#2C2C2C"}
EDGE = {"light": "#767676", "dark": "#8A8A8A"}
WARNING = {"light": "#B3261E", "dark": "#FF7A6E"}
LINES = {  # the three directions of a latent, and what is computed from them
    "encoder": {"light": "#B85C00", "dark": "#E69F00"},
    "decoder": {"light": "#0072B2", "dark": "#56B4E9"},
    "response": {"light": "#007A5A", "dark": "#2FBF94"},
    "minimum": {"light": "#333333", "dark": "#E6E6E6"},
}
DASHES = {"encoder": "dashed", "decoder": "solid", "response": "dotdash", "minimum": "solid"}
SEQUENTIAL = "cividis"
DIVERGING = "PuOr"
FONT = "Inter, Roboto, 'Segoe UI', 'Helvetica Neue', 'Noto Sans', sans-serif"
FONT_SIZE = {"title": "14px", "label": "13px", "tick": "12px", "legend": "12px"}


@dataclass(frozen=True)
class Token:
    """How one status looks in both themes, and what it is called. `hollow` is drawn without filling."""

    name: str
    word: str
    meaning: str
    light: str
    dark: str
    shape: str
    marker: str
    hollow: bool = False
    light_edge: str = ""

    def meant(self, compared: bool = True) -> str:
        """Its meaning; `compared`: there is truth, or an anchor, to match."""
        return self.meaning if compared or self.name != "unmatched" else "alive; nothing to match it with"

    def colour(self, theme: str) -> str:
        return self.light if theme == "light" else self.dark

    def edge(self, theme: str) -> str:
        return (self.light_edge or self.light) if theme == "light" else self.dark


_TOKENS = (  # one colour per latent: the first that applies wins
    Token("dead", "Dead", "silent for a whole window of samples", "#6E6E6E", "#707070", "✕", "x"),
    Token("unseen", "Unseen", "silent so far, for less than a window", "#4F008C", "#9641D9", "▽", "inverted_triangle", hollow=True),
    Token("anchored", "Anchored", "held to a direction that we are told", "#009E73", "#009E73", "★", "star"),
    Token("matched", "Matched", "monosemantic: best decoder cosine reaches τ", "#0072B2", "#56B4E9", "●", "circle"),
    Token("unmatched", "Unmatched", "alive, and no match reaches τ", "#333333", "#E6E6E6", "+", "cross"),
)
STATUSES: dict[str, Token] = {t.name: t for t in _TOKENS}

_EDGES = (  # of a parent and its child; two of one colour differ in shape or filling
    Token("absorbed", "Absorbed", "another latent writes the parent when the child is active", "#CC79A7", "#CC79A7", "◆", "diamond"),
    Token("partly absorbed", "Partly absorbed", "another latent writes a part of it then", "#CC79A7", "#CC79A7", "◇", "diamond", True),
    Token("split", "Split", "several latents share the parent's rows out", "#663300", "#E69F00", "■", "square"),
    Token("hedged", "Hedged", "the parent's latent reads and writes the child too", "#D55E00", "#D55E00", "△", "triangle", True),
    Token("merged", "Merged", "one latent is the nearest to both", "#D55E00", "#D55E00", "▲", "triangle"),
    Token("lost", "Lost", "no latent writes the parent when the child is active", "#333333", "#E6E6E6", "+", "cross"),
    Token("none", "Fine", "the parent's latents write it with the child too", "#0072B2", "#56B4E9", "●", "circle"),
    Token("not eligible", "Not eligible", "too few rows, or no latent detects the parent", "#6E6E6E", "#707070", "○", "circle", True),
)
EDGES: dict[str, Token] = {t.name: t for t in _EDGES}

_PATTERNS = (  # of a latent by what fires it
    STATUSES["dead"],
    STATUSES["unseen"],
    Token("poly", "Polysemantic", "1.5 features in effect, or more, drive it", "#D55E00", "#D55E00", "▲", "triangle"),
    Token("mono", "Monosemantic", "fewer than 1.5 features in effect drive it", "#0072B2", "#56B4E9", "●", "circle"),
    Token(
        "candidate",
        "Polysemantic candidate",
        "its rows look like two kinds; no truth was seen",
        "#D55E00",
        "#D55E00",
        "△",
        "triangle",
        hollow=True,
    ),
    Token("alive", "Alive", "it fires; nobody knows for how many features", "#333333", "#E6E6E6", "+", "cross"),
)
PATTERNS: dict[str, Token] = {t.name: t for t in _PATTERNS}

_SPARES = (  # of a latent by whether the dictionary needs it; the first that applies wins
    STATUSES["dead"],
    STATUSES["unseen"],
    Token(
        "duplicate", "Duplicate candidate", "its decoder row is nearly that of another", "#663300", "#E69F00", "□", "square", hollow=True
    ),
    Token("dense", "Dense", "fires on more than a tenth of the rows", "#D55E00", "#D55E00", "◆", "diamond"),
    Token("weak", "Weak", "removing it costs under 1 % of what removing another does", "#0072B2", "#56B4E9", "○", "circle", hollow=True),
    Token("used", "In use", "it fires, and is none of these", "#333333", "#E6E6E6", "+", "cross"),
)
SPARES: dict[str, Token] = {t.name: t for t in _SPARES}

_TWINS = (  # of a latent beside another dictionary's
    Token("shared", "Shared", "one there is the same, one to one", "#0072B2", "#56B4E9", "●", "circle"),
    Token("split", "Split there", "several there stand for it", "#663300", "#E69F00", "■", "square"),
    Token("part", "Merged there", "one of several that are one there", "#D55E00", "#D55E00", "▲", "triangle"),
    Token("novel", "Novel", "nothing there reaches the threshold", "#333333", "#E6E6E6", "+", "cross"),
    Token("silent", "Silent", "it did not fire on these rows", "#6E6E6E", "#707070", "✕", "x"),
    Token("only there", "Novel there", "nothing here reaches the threshold", "#4F008C", "#9641D9", "▽", "inverted_triangle", hollow=True),
)
TWINS: dict[str, Token] = {t.name: t for t in _TWINS}


@dataclass(frozen=True)
class Mark:
    """How a kind of commit is drawn."""

    word: str
    shape: str
    marker: str
    size: int = 11


COMMIT_MARKS = {
    "start": Mark("start", "◆", "diamond"),
    "resample": Mark("resample", "▼", "inverted_triangle"),
    "anchor": Mark("anchor", "★", "star"),
    "realign": Mark("realign", "▲", "triangle"),
    "release": Mark("release", "☆", "star_dot"),
    "settings": Mark("settings", "⚙", "hex"),
    "run": Mark("end of a run", "■", "square"),
    "auto": Mark("automatic", "·", "circle", 6),
    "manual": Mark("manual", "●", "circle"),
}


def token(status: str) -> Token:
    return STATUSES[status]


def commit_mark(kind: str) -> Mark:
    """A kind that a plug-in brought is drawn like a manual commit, under its own name."""
    return COMMIT_MARKS.get(kind, Mark(kind, "●", "circle"))


def classify_statuses(dead, unseen, anchored, best_cosine, tau: float) -> np.ndarray:
    """One status name per latent, first match wins: dead, unseen, anchored, matched (best_cosine >= tau), unmatched.

    `dead`, `unseen`, `anchored` are (n_latents,) bool, `best_cosine` (n_latents,) or None where nothing is known about
    matches; not-a-number matches nothing.
    """
    dead, unseen, anchored = (np.asarray(x, dtype=bool) for x in (dead, unseen, anchored))
    matched = np.zeros_like(dead) if best_cosine is None else np.nan_to_num(np.asarray(best_cosine, dtype=float), nan=-np.inf) >= tau
    return np.select([dead, unseen, anchored, matched], ["dead", "unseen", "anchored", "matched"], default="unmatched")


def classify(health, alignment=None, pins=None, tau: float = 0.95) -> np.ndarray:
    """One status name per latent from findings (`Health`, `Alignment`) and `Pins`; each may be None, not all."""
    n = next(len(x) for x in (health and health.dead, alignment and alignment.anchored_latents) if x is not None)
    anchored = np.zeros(n, dtype=bool) if alignment is None else alignment.anchored_latents.copy()
    if pins is not None:
        anchored[[int(i) for i in pins.latents]] = True
    never = np.zeros(n, dtype=bool)
    dead, unseen = (never, never) if health is None else (health.dead, health.unseen)
    return classify_statuses(dead, unseen, anchored, alignment and alignment.per_latent.decoder_cosine, tau)


def diverging_limits(values) -> tuple[float, float]:
    """Symmetric colour limits around 0 that hold every finite value."""
    finite = np.abs(np.asarray(values, dtype=float))
    finite = finite[np.isfinite(finite)]
    top = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    return -top, top
