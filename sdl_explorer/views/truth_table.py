"""What became of every true feature: recovered, split, merged, missed or anchored."""

import holoviews as hv
import numpy as np
import pandas as pd

from sdl_explorer.diagnosis.alignment import Alignment, align
from sdl_explorer.diagnosis.health import Health, check_health
from sdl_explorer.diagnosis.recovery import Recovery, score_recovery
from sdl_explorer.views.alignment import recovered_words, recovery_words
from sdl_explorer.views.frame import BRUSH, MAX_POINTS, drawable, empty_table, frame, limits
from sdl_explorer.views.look import Look
from sdl_explorer.views.theme import EDGE, LINES, TEXT
from sdl_explorer.views.view import Chosen, view
from sdl_explorer.views.words import NO_TRUTH, count

PARTIAL = 0.5  # cosine from which a latent carries a part of a feature
COLUMNS = ("feature", "name", "verdict", "best latent", "cos encoder", "cos decoder", "cos response", "latent status")
SCORED = ("residual", "best classifier", "its F1")  # with truth alone
MARKERS = {"encoder": "triangle", "decoder": "circle", "response": "square"}


@view(
    "What became of every true feature?",
    id="A4",
    of=(align, check_health, Chosen(score_recovery, "tau", "tau")),
    page="alignment",
    cost="select",
)
def feature_table(alignment, health, scored, look):
    """Best cosines of every feature, worst first, one mark per side; the table is what this card shows.

    Row k of the first `Points` is feature `feature_table.ids(alignment, health, scored, look)[k]`.
    """
    rows = truth_table(alignment, health, look, scored)
    theme, layers = look.theme, []
    order = np.arange(len(rows))
    shown = order if len(rows) <= MAX_POINTS else np.linspace(0, len(rows) - 1, MAX_POINTS).astype(int)
    for side in sorted(MARKERS, key=lambda side: side != look.side):
        data = {"rank": shown, "cosine": drawable(rows[f"cos {side}"])[shown], "feature": rows["feature"].to_numpy()[shown]}
        points = hv.Points(data, ["rank", "cosine"], "feature", label=side)
        tools = ["hover", *BRUSH] if side == look.side else []
        layers.append(points.opts(color=LINES[side][theme], marker=MARKERS[side], size=7, fill_alpha=0.6, tools=tools))
    layers.append(hv.HLine(look.tau).opts(color=EDGE[theme], line_dash="dashed", line_width=1))
    chosen = rows["feature"].isin([*look.selected_features, look.primary_feature]).to_numpy()
    if chosen.any():
        ring = hv.Points((order[chosen], drawable(rows[f"cos {look.side}"])[chosen]), ["rank", "cosine"], label="Selected")
        layers.append(ring.opts(color=TEXT[theme], fill_alpha=0, line_width=2, size=17))
    title = recovered_words(alignment, look)
    if len(shown) < len(rows):
        title += f"\n{count(len(shown))} of {count(len(rows))} drawn, evenly spaced; the table has all."
    return frame(
        hv.Overlay(layers),
        look,
        xlim=(-0.03 * len(rows) - 0.5, 1.03 * len(rows)),
        ylim=(min(0.0, limits(rows[[f"cos {s}" for s in MARKERS]])[0]), 1.05),
        xlabel=f"features, worst {look.side} cosine first",
        ylabel="best cosine",
        title=title,
        height=300,
        brush=True,
    )


@feature_table.reading
def _(alignment, health, scored, look):
    rows = truth_table(alignment, health, look, scored)
    verdicts = rows["verdict"].str.replace(r" \d+$", "", regex=True)
    above = (rows[f"cos {look.side}"] > look.tau) & (verdicts != "anchored")
    found = _numbers(verdicts[above], {"recovered": "by one latent", "split into": "by several"})
    rest = _numbers(verdicts[~above], {"split into": "split over several", "merged with": "merged with others"})
    sentences = [f"{name}: {words}." for name, words in (("Recovered", found), ("Others", rest)) if words]
    return " ".join([recovery_words(alignment, look), *sentences])


@feature_table.table
def _(alignment, health, scored, look):
    return empty_table(*COLUMNS) if alignment is None else truth_table(alignment, health, look, scored)


@feature_table.empty
def _(alignment, health, scored, look):
    return NO_TRUTH if alignment is None else None


@feature_table.ids
def _(alignment, health, scored, look):
    features = truth_table(alignment, health, look, scored)["feature"].to_numpy()
    return features if len(features) <= MAX_POINTS else features[np.linspace(0, len(features) - 1, MAX_POINTS).astype(int)]


def truth_table(alignment: Alignment, health: Health | None, look: Look, scored: Recovery | None = None) -> pd.DataFrame:
    """One row per feature, worst first: verdict, best latent, and the best cosine on each side.

    On the decoder side, with truth, the verdict is that of `score_recovery`: recovered; split into k latents above tau; merged
    with k others that its best latent writes too; missed. Beside it: what is left of the feature shown alone, and the latent that
    tells best whether it is active. For anchors and the other sides, the look's, by the best cosines alone:

    recovered: best cosine above tau. split into k: above it, k latents are; or below it, k latents that share this best
    feature reach 0.5. merged with k: below it, its best latent (cosine from 0.5) is also the best of k other features.
    missed: the rest. anchored: told, so it proves nothing.
    """
    best = alignment.best[look.side]
    told = scored is not None and look.side == "decoder" and scored.tau == look.tau
    status = np.full(alignment.n_latents, "") if health is None else np.select([health.dead, health.unseen], ["dead", "unseen"], "alive")
    columns = (
        np.arange(alignment.n_features),
        alignment.names,
        _scored_verdicts(alignment, scored) if told else _verdicts(alignment, look),
        best.latent,
        alignment.encoder,
        alignment.decoder,
        alignment.response,
        status[best.latent],
    )
    rows = pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))
    if scored is not None:
        rows = rows.assign(**dict(zip(SCORED, (scored.residual, scored.classifier, scored.classifier_f1), strict=True)))
    return rows.sort_values(f"cos {look.side}", kind="stable", na_position="first", ignore_index=True)


def _scored_verdicts(alignment: Alignment, scored: Recovery) -> np.ndarray:
    return np.where(alignment.anchored_features, "anchored", scored.verdicts)


def _verdicts(alignment: Alignment, look: Look) -> list[str]:
    """By the best cosines of one side."""
    best, per_latent = alignment.best[look.side], alignment.per_latent
    feature, carried = getattr(per_latent, f"{look.side}_feature"), getattr(per_latent, f"{look.side}_cosine")
    n = alignment.n_features
    full = np.bincount(feature[carried > look.tau], minlength=n)
    partial = np.bincount(feature[carried >= PARTIAL], minlength=n)
    reached = np.nan_to_num(best.cosine, nan=-1.0) >= PARTIAL
    sharing = np.bincount(best.latent[reached], minlength=alignment.n_latents)[best.latent] - 1
    facts = (alignment.anchored_features, best.cosine, full, partial, np.where(reached, sharing, 0))
    return [_verdict(*row, tau=look.tau) for row in zip(*(fact.tolist() for fact in facts), strict=True)]


def _verdict(anchored: bool, cosine: float, full: int, partial: int, sharing: int, tau: float) -> str:
    if anchored:
        return "anchored"
    if cosine > tau:
        return f"split into {full}" if full > 1 else "recovered"
    if sharing > 0:
        return f"merged with {sharing}"
    return f"split into {partial}" if partial > 1 else "missed"


def _numbers(verdicts: pd.Series, words: dict[str, str]) -> str:
    return ", ".join(f"{count(n)} {words.get(verdict, verdict)}" for verdict, n in verdicts.value_counts().items())
