"""Did it help? Pairs with and without the last intervention, beside a sham arm."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Anchors
from sdl_explorer.data.sources import stream
from sdl_explorer.diagnosis.compare import Control, score
from sdl_explorer.training.commits import Commit
from sdl_explorer.training.loop import train
from sdl_explorer.training.plan import Plan
from sdl_explorer.training.run import Run, method_of
from sdl_explorer.training.state import TrainState

INTERVENTIONS = ("resample", "anchor", "realign", "release", "prune", "split", "unabsorb")
ARMS = ("untreated", "treated", "sham")


def last_intervention(run: Run) -> Commit | None:
    """The newest intervention on the way to the run's head."""
    line = [] if run.head is None else run.store.lineage(run.head)
    return next((c for c in line if c.kind in INTERVENTIONS and c.parent), None)


def arms_of(after: Commit) -> tuple[str, ...]:
    """Which arms its pairs have: a release resets nothing, so it has no sham."""
    return ARMS[:2] if after.kind == "release" else ARMS


class Stopped(RuntimeError):
    """Somebody asked for the end before the result."""


def trained_arm(run: Run, after: Commit, arm: str, n_steps: int, pair: int, stopped: Callable[[], bool]) -> Iterator[None]:
    """One arm of one pair, a step for each `next()`; returns its `TrainState`.

    Arms start from the commits before and after the intervention and train on data order `pair` + 1, with the
    settings of that time. The sham resets the same latents in random directions.
    """
    before = run.store[after.parent]
    state, _ = run.state_of(after if arm == "treated" else before)
    if arm == "sham":
        sham_plan(run.state_of(after)[0], after).sham(stream(state.seed, "sham", after.id, pair)).apply(state)
    settings = run.store.settings(after)
    order = settings["order"] + pair + 1
    steps = train(state, method_of(settings), run.source, batch_size=settings["batch_size"], order=order)
    for _ in range(n_steps):
        if stopped():
            raise Stopped(f"control: stopped in pair {pair + 1}; what was finished is in session.last_control.")
        next(steps)
        yield
    return state


def paired(
    run: Run,
    after: Commit,
    rows: Activations,
    anchors: Anchors | None,
    n_steps: int,
    runs: int,
    drain: Callable,
    stopped: Callable[[], bool],
) -> Iterator[tuple[float, Control | None]]:
    """(share done, the pairs so far) after each arm, and once at the start.

    `drain` runs an iterator of steps in the lane and gives what it returns; scoring happens in the caller's thread.
    """
    arms = arms_of(after)
    pins = run.state_of(after)[0].pins

    def measure(state: TrainState) -> dict[str, float]:
        return score(state.dictionary, rows, state.samples_since_fired.cpu(), state.dead_after, pins=pins, anchors=anchors)

    start, scores = measure(run.state_of(run.store[after.parent])[0]), {arm: [] for arm in arms}
    control = None
    for done in range(runs * len(arms)):
        yield done / (runs * len(arms)), control
        pair, arm = divmod(done, len(arms))
        scores[arms[arm]].append(measure(drain(trained_arm(run, after, arms[arm], n_steps, pair, stopped))))
        if arm == len(arms) - 1:
            control = compared(after, n_steps, start, scores)
    yield 1.0, control


def compared(after: Commit, n_steps: int, start: dict[str, float], scores: dict[str, list[dict[str, float]]]) -> Control:
    """The finished pairs as a `Control`."""
    n_pairs = min(map(len, scores.values()))
    arms = {arm: {k: np.array([s[k] for s in done[:n_pairs]]) for k in start} for arm, done in scores.items()}
    named = "recovery_encoder" if after.kind == "realign" else "recovery_decoder"  # the side that the repair names
    primary = named if named in start else "unexplained_variance"
    return Control(intervention=after.kind, n_steps=n_steps, before=start, primary=primary, **arms)


def sham_plan(treated: TrainState, commit: Commit) -> Plan:
    """The intervention of a commit as a plan, read off the state right after it."""
    dictionary = treated.dictionary
    latents = torch.tensor(commit.latents, dtype=torch.long, device=dictionary.device)
    moved = commit.kind != "release"
    row = lambda tensor: tensor.detach()[latents] if moved else None
    others = set(range(dictionary.n_latents)) - set(commit.latents)
    own = treated.pins.without(others) if commit.kind == "anchor" and treated.pins is not None else None
    return Plan(
        commit.kind,
        latents,
        row(dictionary.W_enc),
        row(dictionary.b_enc),
        None if commit.kind == "realign" else row(dictionary.W_dec),
        {name: tensor.detach()[latents] for name, tensor in dictionary.per_latent().items()} if moved else {},
        treated.pins,
        latents if moved else latents[:0],
        {},
        "",
        changed_pins=own,
        changed_pulls=treated.pulls.without(others) if commit.kind == "realign" and treated.pulls is not None else None,
    )
