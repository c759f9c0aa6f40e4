"""What has happened: health over time, the timeline of commits, the log."""

from typing import NamedTuple

import holoviews as hv
import numpy as np
import pandas as pd
from holoviews.core import Dimensioned

from sdl_explorer.training.commits import Commit
from sdl_explorer.training.history import History
from sdl_explorer.views.frame import drawable, empty_table, frame, limits, log_limits, log_ticks
from sdl_explorer.views.look import Look
from sdl_explorer.views.theme import EDGE, LINES, MUTED, TEXT, commit_mark
from sdl_explorer.views.view import Commits, view
from sdl_explorer.views.words import NEVER_TRAINED, NO_LOG, count, plural

Ghosts = tuple[History, ...]  # in `of`: the curves of branches that were left
PLANNED = 500  # steps on the axis of a run that has not begun
PANELS = ("dead", "loss", "L0")
SAID = {"auto": "kept by itself while training", "manual": "kept by hand"}  # of commits without words of their own
QUIET = ("start", "run", "auto", "manual")  # commits that change nothing


class LogLine(NamedTuple):
    """One sentence of the log, and the Python that did it."""

    commit: str
    step: int
    kind: str
    shape: str
    sentence: str
    python: str
    on_branch: bool


def lineage(commits: Commits, head: str | None) -> tuple[Commit, ...]:
    """The checked-out commit (None: the newest) and its ancestors, oldest first."""
    by_id = {c.id: c for c in commits}
    line, at = [], by_id.get(head, commits[-1] if commits else None)
    while at is not None:
        line.append(at)
        at = by_id.get(at.parent)
    return tuple(reversed(line))


def log_lines(commits: Commits | None, look: Look = Look()) -> tuple[LogLine, ...]:  # noqa: B008 - Look is frozen
    """C5: one sentence per commit, newest first. Where there are none, show `words.NO_LOG`."""
    own = {c.id for c in lineage(commits or (), look.head)}
    return tuple(
        LogLine(c.id, c.step, c.kind, commit_mark(c.kind).shape, sentence(c), c.python, c.id in own) for c in reversed(commits or ())
    )


def log_reading(commits: Commits | None) -> str:
    return f"{plural(len(commits), 'commit')}. The newest: {sentence(commits[-1])}." if commits else NO_LOG


def sentence(commit: Commit) -> str:
    """'step 1 240: resampled 8 latents', as read aloud."""
    return f"step {count(commit.step)}: {_said(commit)}"


def _said(commit: Commit) -> str:
    """Its message without the step, which stands beside it; words for its kind where nothing is left."""
    step, _, rest = commit.message.partition(", ")
    message = rest if step == f"step {commit.step}" else commit.message
    return message or SAID.get(commit.kind) or commit_mark(commit.kind).word


# R2 ------------------------------------------------------------------------------------------------------------------


@view("How healthy has training been, and what changed it?", id="R2", of=(History, Ghosts, Commits), page="overview", cost="live")
def health_over_time(history, ghosts, commits, look):
    """Dead share, loss and L0 over steps, one above the other; interventions are ticks, branches that were left are faint."""
    commits, runs = commits or (), (history, *(ghosts or ()))
    top = max([1, *(int(h.steps[-1]) for h in runs if len(h.steps)), *(c.step for c in commits)], default=1)
    xlim = (0.0, 1.02 * (top if top > 1 else PLANNED))
    curves = {name: [_curve(h, name, look) for h in runs] for name in PANELS}
    return hv.Layout([_panel(name, curves[name], xlim, commits, look) for name in PANELS]).cols(1).opts(shared_axes=True, toolbar=None)


@health_over_time.reading
def _(history, ghosts, commits, look):
    if history is None or not len(history.steps):
        return NEVER_TRAINED
    dead, label = _dead(history, look)
    changes = [c for c in commits or () if c.kind not in QUIET]
    total = _total(history)
    return (
        f"Step {count(history.steps[-1])}: {label} {dead[-1]:.3g}, loss {total[-1]:.4g}, L0 {history.l0[-1]:.3g}; "
        f"{plural(len(changes), 'change')} of the model so far."
    )


@health_over_time.table
def _(history, ghosts, commits, look):
    if history is None:
        return empty_table("step", "loss", "L0", "dead latents")
    total = _total(history)
    return pd.DataFrame({"step": history.steps, "loss": total, "L0": history.l0, _dead(history, look)[1]: _dead(history, look)[0]})


@health_over_time.empty
def _(history, ghosts, commits, look):
    return NEVER_TRAINED if history is None else None


def _curve(history: History, name: str, look: Look) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one panel; what a logarithmic axis cannot show is left out."""
    if name == "dead":
        return history.steps, drawable(_dead(history, look)[0])
    if name == "L0":
        return history.steps, drawable(history.l0)
    total = drawable(_total(history))
    return history.steps, np.where(total > 0, total, np.nan)


def _total(history: History) -> np.ndarray:
    return history.losses.get("total", np.full(len(history.steps), np.nan))


def _dead(history: History, look: Look) -> tuple[np.ndarray, str]:
    return (history.dead, "dead latents") if not look.n_latents else (100 * history.dead / look.n_latents, "dead %")


def _panel(name: str, curves: list, xlim, commits: Commits, look: Look) -> Dimensioned:
    first, last, theme = name == PANELS[0], name == PANELS[-1], look.theme
    values = np.concatenate([v for _, v in curves])
    ylim = log_limits(values) if name == "loss" else (0.0, max(1.0, limits(values)[1] * (1.15 if first else 1.0)))
    colour = {"dead": MUTED, "loss": LINES["decoder"], "L0": LINES["response"]}[name][theme]
    layers = [hv.Curve(curve, "step", name).opts(color=colour, line_width=1.5, alpha=0.35) for curve in curves[1:]]
    layers.append(hv.Curve(curves[0], "step", name).opts(color=colour, line_width=2, tools=["hover"]))
    changes = [c for c in commits if c.kind not in QUIET]
    if changes:
        layers.append(hv.VLines([c.step for c in changes], "step").opts(color=EDGE[theme], line_width=1, alpha=0.6))
    if changes and first:
        layers.append(_ticks(changes, commits, ylim, look))
    if look.step is not None:
        layers.append(hv.VLine(look.step).opts(color=TEXT[theme], line_width=1.5, line_dash="dashed"))
    marks = (commit_mark(kind) for kind in dict.fromkeys(c.kind for c in changes))
    return frame(
        hv.Overlay(layers),
        look,
        xlim=xlim,
        ylim=ylim,
        xlabel="step" if last else "",
        ylabel={"dead": "dead %" if look.n_latents else "dead latents", "loss": "loss (log)", "L0": "L0"}[name],
        title="   ".join(f"{m.shape} {m.word}" for m in marks) if first else "",
        height=175 if last else 160 if first else 135,
        legend=None,
        logy=name == "loss",
        **({"yticks": log_ticks(ylim)} if name == "loss" else {}),
        **({} if last else {"xaxis": None}),
    )


def _ticks(changes: list, commits: Commits, ylim, look: Look) -> hv.Points:
    """Interventions as marks along the top; those of other branches are faint."""
    own = {c.id for c in lineage(commits, look.head)}
    rows = {
        "step": [c.step for c in changes],
        "at": np.full(len(changes), 0.92 * ylim[1]),
        "marker": [commit_mark(c.kind).marker for c in changes],
        "alpha": [1.0 if c.id in own else 0.35 for c in changes],
        "commit": [c.id for c in changes],
        "what": [sentence(c) for c in changes],
    }
    points = hv.Points(rows, ["step", "at"], ["marker", "alpha", "commit", "what"])
    tips = [("", "@what"), ("commit", "@commit")]
    return points.opts(marker="marker", alpha="alpha", color=TEXT[look.theme], size=11, tools=["hover", "tap"], hover_tooltips=tips)


# timeline ------------------------------------------------------------------------------------------------------------


@view("Where in the history of the model are we?", id="timeline", of=(Commits,), page="run bar", cost="live")
def timeline(commits, look):
    """Commits as marks over steps; the way to the checked-out commit in front, other branches as ghost lines below it."""
    rows = _lanes(commits, look.head)
    theme, top = look.theme, max([*rows["step"], 1])
    layers = []
    for own, colour, width in ((False, MUTED[theme], 1), (True, TEXT[theme], 2)):
        ways = _ways(rows[rows["on_branch"] == own], rows)
        layers.append(hv.Path(ways, ["step", "lane"]).opts(color=colour, line_width=width, alpha=1.0 if own else 0.5))
    marks = [commit_mark(kind) for kind in rows["kind"]]
    style = {"marker": [m.marker for m in marks], "size": [m.size for m in marks], "alpha": np.where(rows["on_branch"], 1.0, 0.5)}
    points = hv.Points(rows.assign(**style), ["step", "lane"], [*rows.columns[2:], *style])
    tips = [("step", "@step"), ("commit", "@commit"), ("what", "@message")]
    layers.append(points.opts(marker="marker", alpha="alpha", size="size", color=TEXT[theme], tools=["hover", "tap"], hover_tooltips=tips))
    head = rows[rows["head"]]
    ring = hv.Points(head, ["step", "lane"], label="here").opts(color=TEXT[theme], fill_alpha=0, line_width=2, size=20)
    layers.append(ring)
    lowest = rows["lane"].min() if len(rows) else 0
    return frame(
        hv.Overlay(layers),
        look,
        xlim=(-0.02 * top, 1.02 * top),
        ylim=(lowest - 0.7, 0.7),
        xlabel="step",
        ylabel="",
        height=90 + 18 * int(-lowest),
        legend=None,
        yaxis=None,
        toolbar=None,
        default_tools=[],
        show_grid=False,
    )


@timeline.reading
def _(commits, look):
    rows = _lanes(commits, look.head)
    head = rows[rows["head"]].iloc[0]
    others = int((rows["lane"].unique() < 0).sum())
    where = f"At step {count(head['step'])}, commit {head['commit']} ({head['message']})"
    return f"{where}; {plural(len(rows), 'commit')}, {plural(others, 'other branch', 'other branches')}."


@timeline.table
def _(commits, look):
    return _lanes(commits or (), look.head)


@timeline.empty
def _(commits, look):
    return None if commits else NO_LOG


def _lanes(commits: Commits, head: str | None) -> pd.DataFrame:
    """Lane 0 is the way to the head; every other line of descent gets the next lane below."""
    line = lineage(commits, head)
    own, lanes, last = {c.id for c in line}, {c.id: 0 for c in line}, {}
    for c in commits:
        if c.id not in lanes:
            lane = lanes.get(c.parent, 0)
            free = lane < 0 and last.get(lane) == c.parent
            lanes[c.id] = lane if free else min([0, *last]) - 1
            last[lanes[c.id]] = c.id
    here = line[-1].id if line else None
    return pd.DataFrame(
        {
            "step": [c.step for c in commits],
            "lane": [lanes[c.id] for c in commits],
            "commit": [c.id for c in commits],
            "parent": [c.parent or "" for c in commits],
            "kind": [c.kind for c in commits],
            "message": [_said(c) for c in commits],
            "on_branch": [c.id in own for c in commits],
            "head": [c.id == here for c in commits],
        }
    )


def _ways(some: pd.DataFrame, rows: pd.DataFrame) -> list[np.ndarray]:
    """From each commit's parent to it."""
    place = {r.commit: (r.step, r.lane) for r in rows.itertuples()}
    return [np.array([place[r.parent], place[r.commit]], dtype=float) for r in some.itertuples() if r.parent in place]
