"""Did it help? Pairs with and without the last intervention, beside a sham arm."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.sources import stream
from sdl_explorer.diagnosis.compare import Control, score
from sdl_explorer.training.commits import Commit
from sdl_explorer.training.plan import Plan
from sdl_explorer.training.run import Run
from sdl_explorer.training.state import TrainState

INTERVENTIONS = ("resample", "anchor", "release")
ARMS = ("untreated", "treated", "sham")


def last_intervention(run: Run) -> Commit | None:
    """The newest intervention on the way to the run's head."""
    line = [] if run.head is None else run.store.lineage(run.head)
    return next((c for c in line if c.kind in INTERVENTIONS and c.parent), None)


def controlled(run: Run, rows: Activations, n_steps: int, runs: int, progress: Callable[[float], None]) -> Iterator[None]:
    """One step for each `next()`; returns the `Control`.

    The arms start from the commits before and after the intervention; pair r trains `n_steps` on data order
    r + 1 and is scored on `rows`. The sham resets the same latents in random directions.
    """
    after = last_intervention(run)
    if after is None:
        raise ValueError("control: no intervention on this branch yet; resample or anchor first.")
    before = run.store[after.parent]
    pins = run.state_of(after)[0].pins

    def measure(state: TrainState) -> dict[str, float]:
        return score(state.dictionary.eval(), rows, state.samples_since_fired.cpu(), state.dead_after, pins)

    start = measure(run.state_of(before)[0])
    scores: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for pair in range(runs):
        for number, arm in enumerate(ARMS):
            state, _ = run.state_of(after if arm == "treated" else before)
            if arm == "sham":
                sham_plan(run.state_of(after)[0], after).sham(stream(state.seed, "sham", after.id, pair)).apply(state)
            for _ in range(n_steps):
                run.one_step(state, order=run.settings["order"] + pair + 1)
                yield
            scores[arm].append(measure(state))
            progress((pair * len(ARMS) + number + 1) / (runs * len(ARMS)))
    arms = {arm: {k: np.array([s[k] for s in done]) for k in start} for arm, done in scores.items()}
    return Control(intervention=after.kind, n_steps=n_steps, before=start, primary=_primary(start), **arms)


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
        row(dictionary.W_dec),
        {name: tensor.detach()[latents] for name, tensor in dictionary.per_latent().items()} if moved else {},
        treated.pins,
        latents if moved else latents[:0],
        {},
        "",
        changed_pins=own,
    )


def _primary(scores: dict[str, float]) -> str:
    return "recovery_decoder" if "recovery_decoder" in scores else "unexplained_variance"
