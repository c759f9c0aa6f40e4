"""The four tiles of the overview: recovered, dead, unseen, unexplained variance. Data alone; a widget draws them."""

from typing import NamedTuple

import numpy as np

from sdl_explorer.diagnosis.alignment import Alignment
from sdl_explorer.diagnosis.health import Health
from sdl_explorer.training.history import History
from sdl_explorer.views.alignment import recovered
from sdl_explorer.views.look import Look
from sdl_explorer.views.view import Commits
from sdl_explorer.views.words import NO_TRUTH, NOT_COMPUTED, count, not_finite


class Tile(NamedTuple):
    """One number. `status` names the token it shows ("" for none); `latents` is what a click selects."""

    title: str
    number: str
    share: str
    status: str = ""
    sparkline: tuple[float, ...] = ()
    latents: tuple[int, ...] = ()
    features: tuple[int, ...] = ()


def tiles(
    alignment: Alignment | None,
    health: Health | None,
    look: Look,
    history: History | None = None,
    commits: Commits = (),
    against: str = "",
    diverged: int | None = None,
) -> tuple[Tile, Tile, Tile, Tile]:
    """Recovered, dead, unseen, unexplained variance. A finding that is None leaves its tile without a number.

    Without truth `alignment` compares with anchors (`alignment.of == "anchors"`) and the first tile counts the anchored
    and aligned ones. While `alignment` is None, `against` says what there is to compare with ("truth", "anchors" or "");
    `diverged` is the step from which there are no numbers. Sparklines follow the steps: dead latents from the history,
    the rest from the metrics of the commits.
    """
    why = NOT_COMPUTED if diverged is None else not_finite(diverged)
    first = _missing(against, why) if alignment is None else _recovered(alignment, look, commits)
    if health is None:
        waiting = [
            Tile(title, "—", why, status) for title, status in (("Dead", "dead"), ("Unseen", "unseen"), ("Unexplained variance", ""))
        ]
        return first, *waiting
    window = f"silent in {count(health.dead_after or health.n_samples)} samples: rate below 3/N at 95 %"
    dead_line = () if history is None else tuple(history.dead[np.isfinite(history.dead)].tolist())
    return (
        first,
        Tile("Dead", count(health.n_dead), f"{_share(health.n_dead, health.n_latents)}, {window}", "dead", dead_line, _ids(health.dead)),
        Tile(
            "Unseen",
            count(health.n_unseen),
            f"{_share(health.n_unseen, health.n_latents)}, silent for less",
            "unseen",
            (),
            _ids(health.unseen),
        ),
        Tile(
            "Unexplained variance",
            _number(health.unexplained_variance),
            f"mean squared error {health.mse:.4g}, L0 {health.l0:.3g}, on {count(health.n_samples)} samples",
            "",
            _trend(commits, "unexplained_variance"),
        ),
    )


def tiles_reading(all_four: tuple[Tile, ...]) -> str:
    """All four, read aloud."""
    return " ".join(f"{t.title}: {t.number} ({t.share.rstrip('.')})." for t in all_four)


def _missing(against: str, why: str) -> Tile:
    if against == "truth":
        return Tile("Recovered", "—", why, "matched")
    return Tile("Anchored and aligned", "—", why if against else NO_TRUTH, "anchored")


def _recovered(alignment: Alignment, look: Look, commits: Commits) -> Tile:
    if alignment.of == "anchors":
        aligned = alignment.best[look.side].cosine > look.tau
        share = f"{_share(int(aligned.sum()), alignment.n_features, 'anchors')} at τ {look.tau:.2f} ({look.side})"
        return Tile("Anchored and aligned", count(aligned.sum()), share, "anchored", (), (), _ids(aligned))
    found = recovered(alignment, look)
    free = int((~alignment.anchored_features).sum())
    anchored = alignment.n_features - free
    beside = f"; with {count(anchored)} anchored {alignment.recovery(look.tau, look.side, 'all'):.0%}" if anchored else ""
    share = f"{_share(int(found.sum()), free, 'features')} at τ {look.tau:.2f} ({look.side}){beside}"
    return Tile("Recovered", count(found.sum()), share, "matched", _trend(commits, f"recovery_{look.side}"), (), _ids(found))


def _trend(commits: Commits, metric: str) -> tuple[float, ...]:
    values = [c.metrics[metric] for c in commits if metric in c.metrics]
    return tuple(float(v) for v in values if np.isfinite(v))


def _share(part: int, whole: int, what: str = "latents") -> str:
    return f"{part / whole:.1%} of {count(whole)} {what}" if whole else f"of 0 {what}"


def _ids(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(np.flatnonzero(mask).tolist())


def _number(value: float) -> str:
    return "not a number" if not np.isfinite(value) else f"{value:.3f}"
