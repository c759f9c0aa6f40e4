"""Does an intervention help a latent? Candidates assigned at random to it, to a sham or to nothing, within one run."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sdl_explorer.control import Stopped
from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Anchors
from sdl_explorer.data.sources import stream
from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.diagnosis.observe import Accumulator, Rows, Stream, finding, observe
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.training.interventions import Intervention, named_latents
from sdl_explorer.training.loop import train
from sdl_explorer.training.plan import Plan
from sdl_explorer.training.run import Run, method_of
from sdl_explorer.training.state import TrainState

ARMS = ("treated", "sham", "nothing")
N_PERMUTATIONS = 2_000
LEVEL = 0.05
LEAST = 2  # candidates in each arm


class Effect(NamedTuple):
    """Difference of two arms' means, the interval of shifts that a permutation test does not reject, and its p-value."""

    mean: float
    low: float
    high: float
    p: float
    n: int

    @property
    def sign(self) -> int:
        return int(self.low > 0) - int(self.high < 0)


class Spill(NamedTuple):
    """Slope of an untouched latent's change on its largest decoder cosine with a treated latent's new row, with a permutation p."""

    slope: float
    p: float
    n: int


@dataclass(frozen=True, repr=False)
class Trial:
    """One run in which chance said who is treated.

    latents, arm     the candidates and their arms, 0 treated, 1 sham, 2 nothing
    before, after    per outcome, a number of every latent of the dictionary at the start and after `n_steps`
    primary          the outcome that the intervention is for
    spill            of the untouched latents; None where fewer than three are untouched, or none is near
    step, python     where the session stood, and the call that does the same again
    """

    intervention: str
    n_steps: int
    latents: np.ndarray
    arm: np.ndarray
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    primary: str
    spill: Spill | None
    seed: int = 0
    step: int = 0
    python: str = ""
    n_permutations: int = N_PERMUTATIONS
    _effects: dict = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        return f"Trial({self.intervention}, {self.n_units} latents, {self.n_steps} steps: {self.reading})"

    n_units = property(lambda self: len(self.latents), doc="Candidates.")
    outcomes = property(lambda self: tuple(self.after), doc="What was measured of each latent.")

    def of(self, arm: str, outcome: str | None = None) -> np.ndarray:
        """Changes of one arm's latents, after - before."""
        change = self._change(outcome)
        return change[self.arm == ARMS.index(arm)]

    def effect(self, outcome: str | None = None, against: str = "sham", arm: str = "treated") -> Effect:
        """Mean change of one arm less another's."""
        if arm not in ARMS or against not in ARMS or arm == against:
            raise ValueError(f"effect: {arm!r} against {against!r}; give two of {', '.join(ARMS)}.")
        key = (outcome or self.primary, arm, against)
        if key not in self._effects:
            generator = np.random.default_rng([self.seed, ARMS.index(arm), ARMS.index(against)])
            self._effects[key] = permuted(self.of(arm, outcome), self.of(against, outcome), generator, self.n_permutations)
        return self._effects[key]

    @property
    def reading(self) -> str:
        """What it did to the primary outcome, in a sentence or two."""
        sham, nothing = self.effect(), self.effect(against="nothing")
        words = {1: "raised", -1: "lowered", 0: "left"}
        said = f"{words[sham.sign]} {self.primary.replace('_', ' ')} {'by ' if sham.sign else 'where it was: '}"
        near = ""
        if self.spill is not None and self.spill.p < LEVEL:
            near = f" Untouched neighbours moved too: {self.spill.slope:+.3g} per unit of cosine (p = {self.spill.p:.2g})."
        return f"It {said}{_shown(sham)} against the sham, {_shown(nothing)} against nothing.{near}"

    def table(self) -> pd.DataFrame:
        """A row for each outcome and comparison."""
        rows = []
        for outcome in self.outcomes:
            for arm, against in (("treated", "sham"), ("treated", "nothing"), ("sham", "nothing")):
                rows.append({"outcome": outcome, "arm": arm, "against": against, **self.effect(outcome, against, arm)._asdict()})
        return pd.DataFrame(rows)

    def _change(self, outcome: str | None) -> np.ndarray:
        name = outcome or self.primary
        if name not in self.after:
            raise ValueError(f"effect: {name!r} was not measured; there are {', '.join(self.outcomes)}.")
        return (self.after[name] - self.before[name])[self.latents]


def permuted(one: np.ndarray, other: np.ndarray, generator: np.random.Generator, n: int = N_PERMUTATIONS) -> Effect:
    """mean(one) - mean(other), with the p-value of a two-sided permutation test and the interval that it inverts to.

    If a shift of d turns `other` into `one`, then one - d and other can be exchanged. For a permutation that moves the share m of `one`
    to the other side the difference is A - d B with B = 1 - m / n_one - m / n_other, so that one set of permutations serves every d. p
    counts the data as they are as one of the permutations; the interval holds the d with p > 0.05.
    """
    pooled, size = np.concatenate([one, other]).astype(float), len(one)
    shifted = np.arange(len(pooled)) < size
    order = np.argsort(generator.random((n, len(pooled))), axis=1)
    mean = lambda values: values[..., :size].mean(axis=-1) - values[..., size:].mean(axis=-1)
    drawn, share, seen = mean(pooled[order]), mean(shifted[order].astype(float)), float(mean(pooled))

    def p_at(d: float) -> float:
        size_now = abs(seen - d)
        return float((1 + (np.abs(drawn - d * share) >= size_now * (1 - 1e-12)).sum()) / (n + 1))

    width = float(np.ptp(pooled)) or 1.0
    low, high = (_edge(lambda d: p_at(d) > LEVEL, seen, seen + side * 4 * width) for side in (-1, 1))
    return Effect(seen, low, high, p_at(0.0), len(pooled))


def _edge(inside: Callable[[float], bool], start: float, end: float) -> float:
    """Where `inside` ends between start (inside) and end, by bisection; infinite where it does not."""
    if inside(end):
        return float(np.copysign(np.inf, end - start))
    for _ in range(40):
        middle = (start + end) / 2
        start, end = (middle, end) if inside(middle) else (start, middle)
    return start


class _Contributions(Accumulator):
    """What the error grows by when a latent's code is zeroed, over the variance: E[2 z (e w) + z^2 |w|^2] / E|x_r - mean|^2."""

    def __init__(self, stream: Stream):
        super().__init__(stream)
        self.W_dec = stream.dictionary.W_dec / stream.dictionary.target_scale
        self.grows, self.fires = torch.zeros(2, len(self.W_dec), dtype=torch.float64)
        self.variance, self.n = 0.0, 0

    def add(self, rows: Rows) -> None:
        latent, row, value = rows.entries
        error = rows.targets - rows.reconstruction
        along = (error[row] * self.W_dec[latent]).sum(dim=1)
        terms = 2 * value * along + value.square() * self.W_dec[latent].square().sum(dim=1)
        self.grows += torch.bincount(latent, weights=terms.double(), minlength=len(self.W_dec)).cpu()
        self.fires += rows.count.cpu()
        self.variance += float((rows.targets - self.stream.target_mean).square().sum())
        self.n += rows.n

    def result(self) -> dict[str, np.ndarray]:
        share = (self.grows / max(self.variance, np.finfo(float).tiny)).numpy()
        return {"contribution": share, "firing_rate": (self.fires / self.n).numpy()}


@finding(_Contributions)
def measure_contributions(dictionary: SparseDictionary, activations: Activations) -> dict[str, np.ndarray]:
    """Per latent: the share of the variance that is lost when its code is zeroed, and its firing rate."""
    return observe(dictionary, activations, [measure_contributions])[0]


def measured(dictionary: SparseDictionary, rows: Activations, anchors: Anchors | None) -> dict[str, np.ndarray]:
    """Outcomes of every latent: with truth or anchors the best cosine of its decoder and encoder row; contribution and firing rate."""
    if rows.truth is None and anchors is None:
        return observe(dictionary, rows, [measure_contributions])[0]
    behaves, found = observe(dictionary, rows, [measure_contributions, (align, {"anchors": anchors, "match": False})])
    return {"decoder_cosine": found.per_latent.decoder_cosine, "encoder_cosine": found.per_latent.encoder_cosine} | behaves


def assigned(n: int, seed: int) -> np.ndarray:
    """Arms of n candidates, as equal in number as can be, in random order."""
    return np.random.default_rng([seed, n]).permutation(np.arange(n) % len(ARMS))


def planned(run: Run, intervention: Intervention, candidates) -> Plan:
    """The plan for all candidates: who is treated is drawn after it, so that it cannot depend on that."""
    if "latents" not in intervention.param:
        raise ValueError(f"trial: {type(intervention).__name__} names no latents, so that candidates cannot be assigned to it.")
    n_latents = run.state.dictionary.n_latents
    asked = named_latents("trial", candidates, n_latents)
    settings = {k: v for k, v in intervention.param.values().items() if k not in ("name", "latents")}
    plan = run.plan(type(intervention)(**settings, latents=asked.tolist()))
    outside = sorted(set(plan.latents.tolist()) - set(asked.tolist()))
    if outside:
        raise ValueError(
            f"trial: {plan.intervention} changes latent {outside[0]}, which is no candidate, so that one latent is not one unit. Try an "
            "intervention of single latents, such as Resample, Realign, Anchor or Prune; judge this one by session.control."
        )
    if len(plan.latents) < LEAST * len(ARMS):
        raise ValueError(f"trial: {len(plan.latents)} candidates can be changed; {LEAST} are needed in each of {len(ARMS)} arms.")
    return plan


def steps_of(state: TrainState, run: Run, settings: dict[str, Any], n_steps: int, stopped: Callable, progress: Callable) -> Iterator[None]:
    """A step of the copied state for each `next()`, on the batches that the session itself would see."""
    steps = train(state, method_of(settings), run.source, batch_size=settings["batch_size"], order=settings["order"])
    for done in range(n_steps):
        if stopped():
            raise Stopped(f"trial: stopped after {done} of {n_steps} steps; the session is as it was.")
        next(steps)
        if done % max(1, n_steps // 20) == 0:
            progress(done / n_steps)
        yield


def conduct(
    run: Run,
    settings: dict[str, Any],
    intervention: Intervention,
    candidates,
    n_steps: int,
    seed: int,
    rows: Activations,
    anchors: Anchors | None,
    call: Callable,
    drain: Callable,
    stopped: Callable[[], bool],
    progress: Callable[[float], None],
) -> Trial:
    """Plan for all, draw the arms, apply to a copy of the state, train the copy, measure.

    `call` runs a command in the lane, `drain` an iterator of steps; measuring happens in the caller's thread.
    """
    plan, state = call(lambda: (planned(run, intervention, candidates), copy.deepcopy(run.state)))
    start, step, arm = copy.deepcopy(state.dictionary), state.step, assigned(len(plan.latents), seed)
    before = measured(state.dictionary, rows, anchors)
    out = [plan.latents[torch.as_tensor(arm != i, device=plan.latents.device)].tolist() for i in range(len(ARMS))]
    plan.drop(out[0]).apply(state)
    plan.drop(out[1]).sham(stream(state.seed, "trial sham", seed)).apply(state)
    drain(steps_of(state, run, settings, n_steps, stopped, progress))
    after = measured(state.dictionary, rows, anchors)
    named = "encoder_cosine" if plan.W_dec is None and plan.W_enc is not None else "decoder_cosine"  # the side that it changes
    primary = named if named in after else "contribution"
    spill = spilled(start, plan, arm, after[primary] - before[primary], seed)
    python = f"session.trial({_call(intervention)}, {plan.latents.tolist()}, {n_steps}, seed={seed}, n={rows.n})"
    return Trial(plan.intervention, n_steps, plan.latents.cpu().numpy(), arm, before, after, primary, spill, seed, step, python)


def _call(intervention: Intervention) -> str:
    """An intervention as it is made, but for its latents; directions of anchors, which are too long, by name."""
    changed = {k: v for k, v in intervention.param.values(onlychanged=True).items() if k not in ("name", "latents")}
    said = (f"{name}={name if isinstance(value, Anchors) else repr(value)}" for name, value in changed.items())
    return f"{type(intervention).__name__}({', '.join(said)})"


def spilled(dictionary: SparseDictionary, plan: Plan, arm: np.ndarray, change: np.ndarray, seed: int) -> Spill | None:
    """Do untouched latents near a treated one change more? Treated and sham are exchanged among the touched, all else fixed.

    exposure_i = max over treated j of cos(W_dec_i, new W_dec_j), at least 0; slope: least squares of the changes on it. A test of
    focal units under interference (Athey, Eckles and Imbens 2018), whose null is that it does not matter which were treated.
    """
    latents = plan.latents.cpu().numpy()
    touched = arm < 2
    focal = np.setdiff1d(np.arange(dictionary.n_latents), latents[touched])
    new = (dictionary.W_dec[plan.latents] if plan.W_dec is None else plan.W_dec)[torch.as_tensor(touched, device=plan.latents.device)]
    if len(focal) < 3:
        return None
    writes: Tensor = normalize(dictionary.W_dec[torch.as_tensor(focal, device=dictionary.device)], dim=1)
    near = (writes @ normalize(new, dim=1).T).clamp_min(0).detach().cpu().numpy()
    treated, generator = arm[touched] == 0, np.random.default_rng([seed, 7])

    def slope(chosen: np.ndarray) -> float:
        exposure = near[:, chosen].max(axis=1)
        centred = exposure - exposure.mean()
        return float(centred @ change[focal] / max(float(centred @ centred), np.finfo(float).tiny))

    if np.ptp(near[:, treated].max(axis=1)) == 0:
        return None
    seen = slope(treated)
    drawn = np.array([slope(generator.permutation(treated)) for _ in range(N_PERMUTATIONS // 4)])
    middle = float(drawn.mean())
    p = (1 + int((np.abs(drawn - middle) >= abs(seen - middle) * (1 - 1e-12)).sum())) / (len(drawn) + 1)
    return Spill(seen, float(p), len(focal))


def _shown(effect: Effect) -> str:
    return f"{effect.mean:+.3g} ({effect.low:+.3g} to {effect.high:+.3g}, p = {effect.p:.2g})"
