"""A model in training with its commits: everything that touches tensors, for one thread at a time."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sdl_explorer.data.sources import Source, stream
from sdl_explorer.models.methods import Method
from sdl_explorer.registry import member
from sdl_explorer.training.commits import Commit, CommitStore
from sdl_explorer.training.folder import read_json, settings_of, write_json
from sdl_explorer.training.history import History, Recorder
from sdl_explorer.training.interventions import Intervention
from sdl_explorer.training.loop import train
from sdl_explorer.training.optim import name_of, optimiser_for, ramped, ramps_of
from sdl_explorer.training.plan import Plan
from sdl_explorer.training.state import Step, TrainState

COMMIT_EVERY = 500
LONG_RUN = 100
CHOOSE_ROWS = 8_192
SCHEDULE = ("lr", "warmup_steps", "decay_steps", "decay")
SETTINGS = ("batch_size", *SCHEDULE, "optimiser", "clip_norm", "precision", "ramps", "dead_after")
LATER = {"decay": "linear", "optimiser": "adam", "clip_norm": None, "precision": "auto", "ramps": {}}  # older folders lack them


class Diverged(FloatingPointError):
    """The loss stopped being finite at `step`; `last_finite` is the commit to go back to."""

    def __init__(self, step: int, lr: float, last_finite: Commit):
        self.step, self.lr, self.last_finite = step, lr, last_finite
        super().__init__(
            f"Diverged at step {step} (lr {lr:g}): the loss is not finite. session.revert({last_finite.id!r}) goes back to step "
            f"{last_finite.step}, the last finite commit; then lower session.lr."
        )


class Run:
    """State, settings in force, and commits. `settings` is JSON: method, SETTINGS, order, threads.

    Every change is a commit; one that fails leaves the state as it was.
    """

    def __init__(self, source: Source, state: TrainState, settings: dict[str, Any], store: CommitStore):
        self.source, self.state, self.settings, self.store = source, state, settings, store
        self.head: Commit | None = None
        self.recorder = Recorder()
        self.ghosts: tuple[History, ...] = ()
        self.generation = 0  # grows with every change of the state
        self._method = method_of(settings)

    @property
    def moved(self) -> bool:
        return self.head is None or self.state.step != self.head.step

    def advance(self, n: int, only, stopped: Callable[[], bool], pulse: Callable[[], None], converge: bool) -> Iterator[None]:
        """Up to `n` steps, one for each `next()`, with the commits that a run writes.

        `pulse` is called after each step. Returns the step at which it converged, or None. Raises `Diverged`.
        """
        if only is not None and (self.moved or self._require_head().kind == "auto"):  # a replay of latents alone starts here
            self.commit("run", f"before training {len(only)} latents alone")
        first = self.state.step
        while self.state.step < first + n and not stopped():
            self.recorder.add(self.one_step(self.state, only))
            self.generation += 1
            if self.state.step % COMMIT_EVERY == 0 and self.state.step < first + n:
                self.check_finite()
                self.commit("auto", f"step {self.state.step}", latents=tuple(only or ()))
                if converge and self._has_converged():
                    return self.state.step
            pulse()
            yield
        self.check_finite()
        n_done = self.state.step - first
        if n_done >= LONG_RUN or (only is not None and n_done):
            rows = "" if only is None else f", only={list(only)}"
            self.commit("run", f"trained {n_done} steps", f"session.train({n_done}{rows})")
        return None

    def one_step(self, state: TrainState, only=None, order: int | None = None) -> Step:
        """One step of any state under the settings in force."""
        in_order: int = self.settings["order"] if order is None else order
        return next(train(state, self._method, self.source, batch_size=self.settings["batch_size"], order=in_order, only=only))

    def check_finite(self) -> None:
        diverged = self.recorder.flush()
        if diverged is not None:
            raise Diverged(diverged, self.state.schedule.rate(diverged), self._require_head())

    def commit(self, kind: str, message: str, python: str = "", latents: tuple[int, ...] = ()) -> Commit:
        self.recorder.flush()
        points = self.recorder.points
        metrics = {k: v for k, v in points[-1].items() if k != "step"} if points else {}
        parent = None if self.head is None else self.head.id
        fields = {"parent": parent, "message": message, "python": python, "kind": kind, "latents": latents, "metrics": metrics}
        commit = self.store.write(self.state, self.settings, **fields)
        try:
            self._check_in(commit, self.recorder)
        except OSError:
            self.store.forget(commit)
            raise
        self.store.thin()
        return commit

    def take_settings(self, changed: dict[str, Any]) -> None:
        """Put changed settings in force, as a commit of their own."""
        former, schedule, optimiser = self.settings, self.state.schedule, self.state.optimiser
        if changed == former:
            return
        method = method_of(changed)
        method.fits(self.state.dictionary)
        ramps_of(changed["ramps"], method, self.state.dictionary.n_latents)
        if self.moved:
            self.commit("run", f"step {self.state.step}, before a change of settings")
        self._adopt_settings(changed)
        lines = _differences(former, changed)
        message = "settings: " + ", ".join(f"{name} {old} to {new}" for name, old, new in lines)
        try:
            self.commit("settings", message, "; ".join(f"session.{name} = {new!r}" for name, _, new in lines))
        except Exception:
            self.state.optimiser = optimiser
            self._adopt_settings(former)
            self.state.schedule = schedule
            raise

    def plan(self, intervention: Intervention) -> Plan:
        step, seed = self.state.step, self.state.seed
        choose = self.source.sample(intervention.choose_rows or CHOOSE_ROWS, stream(seed, "choose", step), "choose")
        dictionary = self.state.dictionary
        state = replace(self.state, dictionary=dictionary.core)
        return intervention.plan(state, dictionary.normalised(choose), stream(seed, "plan", step))

    def apply(self, change: Plan | Intervention) -> Commit:
        plan = change if isinstance(change, Plan) else self.plan(change)
        if len(plan.latents) == 0:
            raise ValueError(
                f"apply: every latent was dropped from this {plan.intervention} plan; nothing is left to do. Make another plan."
            )
        if self.moved:
            self.commit("run", f"step {self.state.step}, before {plan.intervention}")
        before = self._require_head()
        plan.apply(self.state)
        self.generation += 1
        try:
            latents = tuple(int(i) for i in plan.latents)
            return self.commit(plan.intervention, f"step {self.state.step}: {plan.reading}", plan.python, latents)
        except Exception:
            self.adopt(*self.state_of(before))
            raise

    def revert(self, target: Commit) -> None:
        """Check out a commit; what was not committed is committed first, unless it is not finite."""
        if self.moved and all(bool(torch.isfinite(p).all()) for p in self.state.dictionary.parameters()):
            self.commit("run", f"step {self.state.step}, before going back")
        state, settings = self.state_of(target)
        left, recorder = self.recorder.history(), self.recorder.truncated(target.step)
        self._check_in(target, recorder)
        if len(left) > len(recorder.points):
            self.ghosts = (*self.ghosts, left)[-8:]
        self.recorder = recorder
        self.adopt(state, settings)

    def adopt(self, state: TrainState, settings: dict[str, Any]) -> None:
        self.state = state
        self._adopt_settings(settings)
        self.generation += 1

    def state_of(self, commit: Commit) -> tuple[TrainState, dict[str, Any]]:
        """The state at a commit; one without moments is replayed from the nearest ancestor that has them."""
        device, settings = self.state.dictionary.device, completed(self.store.settings(commit))
        if self.store.has_moments(commit):
            return self.store.load(commit, device), settings
        base = next(c for c in self.store.lineage(commit) if self.store.has_moments(c))
        state = self.store.load(base, device)
        only, settings_of_batch = commit.latents or None, {"batch_size": settings["batch_size"], "order": settings["order"]}
        steps = train(state, method_of(settings), self.source, **settings_of_batch, only=only)
        while state.step < commit.step:
            next(steps)
        state.dictionary.load_state_dict(self.store.load_dictionary(commit).state_dict())  # exact on any device
        return state, settings

    def view(self) -> dict[str, Any]:
        """Copies of what findings read, with the key under which they are cached."""
        exact = not self.moved
        return {
            "dictionary": copy.deepcopy(self.state.dictionary).eval().requires_grad_(False),
            "samples_since_fired": self.state.samples_since_fired.cpu().clone(),
            "dead_after": self.state.dead_after,
            "pins": self.state.pins,
            "key": (self._require_head().id, 0 if exact else self.generation),
        }

    def check_out(self, folder: Path, exact: bool) -> None:
        """The head commit of a run folder; with `exact`, also where that needs a replay."""
        self.store.refresh()
        head = self.store[read_json(folder / "head.json", "commit")["commit"]]
        if exact or self.store.has_moments(head):
            state, settings = self.state_of(head)
        else:
            weights, settings = self.store.load_dictionary(head).to(self.state.dictionary.device), completed(self.store.settings(head))
            state = replace(TrainState.start(weights, seed=self.state.seed), step=head.step)
        self.adopt(state, settings)
        self.head = head
        self.recorder = Recorder(read_json(folder / "history.json", "points")["points"]).truncated(head.step)

    def _adopt_settings(self, settings: dict[str, Any]) -> None:
        state, method = self.state, method_of(settings)
        ramps, optimiser = ramps_of(settings["ramps"], method), state.optimiser
        if settings["optimiser"] != name_of(optimiser):
            optimiser = optimiser_for(settings["optimiser"], state.dictionary, settings["lr"])
        self.settings, self._method, state.optimiser = settings, method, optimiser
        state.schedule = replace(state.schedule, **{k: settings[k] for k in SCHEDULE}, ramps=ramps)
        state.dead_after, state.clip_norm, state.precision = (settings[name] for name in ("dead_after", "clip_norm", "precision"))
        ramped(self._method, ramps, max(state.step - 1, 0)).retune(state.dictionary.nonlinearity)  # as in the step before

    def _check_in(self, commit: Commit, recorder: Recorder) -> None:
        """Make a commit the head, on disk first."""
        root = self.store.folder.parent
        write_json(root / "history.json", {"points": recorder.points}, indent=None)
        write_json(root / "head.json", {"commit": commit.id})
        self.head = commit
        self.generation += 1

    def _require_head(self) -> Commit:
        if self.head is None:
            raise RuntimeError("this run has no commit yet; commit first.")
        return self.head

    def _has_converged(self) -> bool:
        """The mean loss of the last 500 steps differs by less than 0.01 % from that of the 500 before."""
        history = self.recorder.history()
        ago, total = self.state.step - history.steps, history.losses["total"]
        recent, former = total[ago <= COMMIT_EVERY], total[(ago > COMMIT_EVERY) & (ago <= 2 * COMMIT_EVERY)]
        return len(former) > 0 and bool(abs(recent.mean() - former.mean()) < 1e-4 * abs(former.mean()))


def method_of(settings: dict[str, Any]) -> Method:
    """The method that JSON settings name, among those registered."""
    return member(Method, settings["method"]["class"])(**settings["method"]["settings"])


def completed(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an older folder with those that came later at their defaults."""
    values = {name: value for name, value in settings.items() if name != "method"}
    return settings_from(method_of(settings), LATER | values)


def settings_from(method: Method, values: dict[str, Any]) -> dict[str, Any]:
    """The JSON settings of a method and of the training values."""
    return {"method": {"class": type(method).__name__, "settings": settings_of(method)}, **values}


def _differences(former: dict[str, Any], changed: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    flat = lambda s: {k: s[k] for k in SETTINGS} | {f"method.{k}": v for k, v in s["method"]["settings"].items()}
    before, after = flat(former), flat(changed)
    return [(k, before[k], after[k]) for k in after if before[k] != after[k]]
