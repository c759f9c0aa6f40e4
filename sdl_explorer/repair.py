"""Which advice helps? Each verdict's intervention is judged by pairs with and without it, beside a sham, and kept only if it passes.

Of 80 verdicts whose advice was given random directions instead of its own, none was kept: 0.0 %, 95 % interval 0.0 % to 4.5 %
(Clopper-Pearson; `OMP_NUM_THREADS=1 python benchmarks/repair.py`, planted damage in benches of 24 or 32 features).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sdl_explorer.control import ARMS, Stopped, paired
from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Anchors
from sdl_explorer.diagnosis.compare import BETTER, ENOUGH, MEASURES, Control, Paired
from sdl_explorer.diagnosis.verdict import Verdict
from sdl_explorer.training.commits import Commit
from sdl_explorer.training.plan import Plan
from sdl_explorer.training.run import Run

LEVEL = 0.05  # of all tries together
SINGLE = ("resample", "realign")  # what changes each latent on its own, so that some can be left out
KEEPING = ("run", "auto", "manual")  # kinds of commits that keep a state and change nothing


@dataclass(frozen=True, repr=False)
class Tried:
    """One verdict's advice, and what became of it. `plan` and `control` are None where it could not be tried."""

    verdict: Verdict
    why: str
    plan: Plan | None = None
    control: Control | None = None
    gains: tuple[Paired, ...] = ()  # against as many plain steps, and against the sham
    kept: bool = False

    def __repr__(self) -> str:
        return f"Tried({self.verdict.id}: {type(self.verdict.advice).__name__}, {'kept' if self.kept else 'not kept'}: {self.why})"


@dataclass(frozen=True, repr=False)
class Repair:
    """What `session.repair` tried and kept. Where it was told not to apply that, the session is as it was, and `apply(session)` does.

    tried    every verdict that was looked at, in order;   n_verdicts  how many there were;   n_tries   how many the level is shared by
    step, head    of the session that was judged, and its commit;   applied  the commits of what was kept
    n, given  judge rows;   whether the verdicts were given, and not those of `explain`
    """

    tried: tuple[Tried, ...]
    n_verdicts: int
    n_tries: int
    n_steps: int
    runs: int
    step: int
    stopped: bool = False
    applied: tuple[Commit, ...] = ()
    head: str = ""
    n: int = 0
    given: bool = False

    def __repr__(self) -> str:
        return f"Repair({self.reading})"

    @property
    def kept(self) -> tuple[Plan, ...]:
        """The plans that passed, in the order in which they are to be applied."""
        return tuple(one.plan for one in self.tried if one.kept and one.plan is not None)

    def apply(self, session) -> tuple[Commit, ...]:
        """Apply what was kept, in turn, to the session that was judged, as it was then."""
        if self.applied:
            raise ValueError("Repair.apply: what was kept is applied already; session.revert takes it back.")
        if not self.fits(session):
            other = "" if session.step != self.step else f", on commit {session.head.id} in place of {self.head}"
            raise ValueError(
                f"Repair.apply: the plans were judged at step {self.step} and the session is at step {session.step}{other}; revert to that "
                "state, or call session.repair again."
            )
        applied = tuple(session.apply(plan) for plan in self.kept)
        if session.last_repair is self:
            session.last_repair = replace(self, applied=applied)
        return applied

    def fits(self, session) -> bool:
        """Is the session as it was when it was judged? Commits since then may have kept that state, and changed nothing."""
        commits, at = {commit.id: commit for commit in session.commits}, session.head
        while at.id != self.head and at.kind in KEEPING and at.step == self.step and at.parent in commits:
            at = commits[at.parent]
        return (session.step, at.id) == (self.step, self.head)

    @property
    def python(self) -> str:
        """The call that tries the same again, and applies nothing."""
        given = ", verdicts=verdicts" if self.given else ""
        budget = self.n_tries * self.n_steps * self.runs * len(ARMS)
        return f"session.repair({budget}, n_steps={self.n_steps}, runs={self.runs}, n={self.n}{given}, apply=False)"

    @property
    def reading(self) -> str:
        """What was tried, what passed and why the rest did not, in plain words."""
        return " ".join(self.lines)

    @property
    def lines(self) -> tuple[str, ...]:
        """The same, a line for each verdict."""
        if not self.n_verdicts:
            return ("Nothing to repair: explain has no verdict here.",)
        judged = sum(one.control is not None for one in self.tried)
        how = (
            f"Tried {judged} of {self.n_verdicts} verdict{'' if self.n_verdicts == 1 else 's'}, each on {self.runs} pairs of "
            f"{self.n_steps} steps, against as many plain steps and against a sham ({100 * (1 - LEVEL / self.n_tries):.3g} % intervals)."
        )
        told = [f"{'Kept' if one.kept else 'Not kept'}: {one.verdict.claim} {one.why}" for one in self.tried]
        stopped = ["Stopped before the rest."] if self.stopped else []
        if self.applied:
            end = f"Applied: {', '.join(commit.kind for commit in self.applied)}."
        elif self.kept:
            end = "Nothing was applied yet: repair.apply(session) does it."
        else:
            end = "Nothing passed, so nothing is proposed."
        return (how, *told, *stopped, end)

    def table(self) -> pd.DataFrame:
        """A row for each verdict that was looked at."""
        rows = []
        for one in self.tried:
            row: dict[str, Any] = {"verdict": one.verdict.id, "advice": type(one.verdict.advice).__name__, "harm": one.verdict.harm}
            for against, gain in zip(("untreated", "sham"), one.gains, strict=False):
                row |= {f"vs {against}": gain.mean, f"vs {against} low": gain.low, f"vs {against} high": gain.high}
            rows.append(row | {"kept": one.kept, "why": one.why})
        return pd.DataFrame(rows)


def gains_of(control: Control, level: float, step: float = 0.0) -> tuple[Paired, Paired]:
    """`Control.difference` of the primary to untreated and to sham at 1 - level, in the direction that is better.

    `step` is the smallest difference that the score can show, such as one feature: one that comes or goes by chance has a standard
    deviation of at most half of it, and five pairs that agree do not prove less.
    """
    untreated, sham = (control.difference(control.primary, against, level, least=step / 2) for against in ("untreated", "sham"))
    return (untreated, sham) if BETTER[control.primary] > 0 else (-untreated, -sham)


def judged(control: Control, level: float, step: float) -> tuple[bool, str, tuple[Paired, ...]]:
    """Better than as many plain steps and than the sham; without recovery on the scoreboard it has to be harmless as well."""
    gains = gains_of(control, level, step)
    trained, sham = gains
    label = MEASURES[control.primary].label
    gained = label if BETTER[control.primary] > 0 else f"{label}, lowered by"
    numbers = f"{gained}: {_said(trained)} against plain steps, {_said(sham)} against the sham."
    if not np.isfinite(trained.mean):
        return False, f"{label} is not defined here.", gains
    if trained.low <= 0:
        return False, f"It is not better than {control.n_steps} plain steps. {numbers}", gains
    if sham.low <= 0:
        return False, f"It is not better than resetting the same latents at random. {numbers}", gains
    if "recovery_decoder" not in control.treated and not control.harmless():
        return False, f"It costs unexplained variance or L0. {numbers}", gains
    return True, numbers, gains


class Bench(NamedTuple):
    """Where repairs are tried: a run that may be changed, rows to judge on, and how its work is done."""

    run: Run
    rows: Activations
    anchors: Anchors | None
    call: Callable  # a command, in the lane
    drain: Callable  # an iterator of steps, in the lane
    stopped: Callable[[], bool]
    progress: Callable[[float], None]

    @property
    def step(self) -> float:
        """One feature, as a share of them; 0 where nothing is counted."""
        truth = self.rows.truth
        n = truth.n_features if truth is not None else len(self.anchors or ())
        return 1 / n if n else 0.0


def try_repairs(bench: Bench, verdicts: Sequence[Verdict], budget: int, n_steps: int, runs: int) -> Repair:
    """Each verdict in turn, on top of those that were kept; as many as the budget of training steps holds."""
    cost, step = n_steps * runs * len(ARMS), bench.run.state.step
    if runs < ENOUGH:
        raise ValueError(f"repair: {runs} pairs; at least {ENOUGH} are needed to judge.")
    if budget < cost:
        raise ValueError(
            f"repair: budget is {budget:,} steps, and one try takes {cost:,} ({runs} pairs of {len(ARMS)} arms of {n_steps} steps); "
            "raise the budget or lower n_steps."
        )
    n_tries = max(1, min(len(verdicts), budget // cost))
    tried: list[Tried] = []
    try:
        for one in _tries(bench, verdicts, n_tries, n_steps, runs):
            tried.append(one)
    except Stopped:
        return Repair(tuple(tried), len(verdicts), n_tries, n_steps, runs, step, stopped=True)
    return Repair(tuple(tried), len(verdicts), n_tries, n_steps, runs, step)


def _tries(bench: Bench, verdicts: Sequence[Verdict], n_tries: int, n_steps: int, runs: int) -> Iterator[Tried]:
    """One `Tried` a verdict, until the tries are used up."""
    run, changed, left = bench.run, set(), n_tries
    for verdict in verdicts:
        if left == 0:
            return
        try:
            plan = _without(bench.call(lambda: run.plan(verdict.advice)), changed)  # noqa: B023 - the call is over before the next verdict
        except ValueError as error:
            yield Tried(verdict, f"It could not be planned: {error}")
            continue
        after = bench.call(lambda: run.apply(plan))  # noqa: B023
        share = lambda done: bench.progress((n_tries - left + done) / n_tries)  # noqa: B023
        control = _control(bench, after, n_steps, runs, share)
        left -= 1
        kept, why, gains = judged(control, LEVEL / n_tries, bench.step)
        if kept:
            changed |= set(after.latents)
        else:
            bench.call(lambda: run.revert(run.store[after.parent]))  # noqa: B023
        yield Tried(verdict, why, plan, control, gains, kept)


def _control(bench: Bench, after: Commit, n_steps: int, runs: int, progress: Callable[[float], None]) -> Control:
    """The pairs with and without an intervention that was just applied to the bench's run."""
    control = None
    for done, latest in paired(bench.run, after, bench.rows, bench.anchors, n_steps, runs, bench.drain, bench.stopped):
        progress(done)
        control = latest
    if control is None:
        raise Stopped("repair: ended before its first pair.")
    return control


def _without(plan: Plan, changed: set[int]) -> Plan:
    """The plan without latents that an earlier repair has just changed; ValueError where they belong together."""
    again = changed & set(plan.latents.tolist())
    if not again:
        return plan
    if plan.intervention not in SINGLE or len(again) == len(plan.latents):
        raise ValueError(f"latent {min(again)} was changed by an earlier repair; train on and call repair again.")
    return plan.drop(again)


def _said(gain: Paired) -> str:
    return f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
