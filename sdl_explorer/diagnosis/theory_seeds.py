"""The spread of what training finds over seeds, with anchors and without: the half of T7 that no count of equations gives."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from sdl_explorer.data.anchors import Anchors, Pins
from sdl_explorer.data.sources import Source, stream
from sdl_explorer.diagnosis.cosines import cosines_of, unit
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import Method
from sdl_explorer.training.loop import train
from sdl_explorer.training.state import TrainState

NEEDED = 5  # seeds below which no spread is read
SAME = 0.9  # cosine from which a feature is the one that an anchor is about


@dataclass(frozen=True, repr=False)
class Seeds:
    """Dictionaries of one setting from several seeds: `anchored[r]` and `free[r]` share start, data and their order.

    anchors  the directions that the first were held to;  n_steps  of training
    """

    anchored: tuple[SparseDictionary, ...]
    free: tuple[SparseDictionary, ...]
    anchors: Anchors
    n_steps: int

    def __post_init__(self):
        if len(self.anchored) != len(self.free):
            raise ValueError(f"Seeds: {len(self.anchored)} dictionaries with anchors and {len(self.free)} without; give them in pairs.")

    def __repr__(self) -> str:
        return f"Seeds({len(self.free)} pairs with and without {len(self.anchors)} anchors, {self.n_steps} steps)"


class Spread(NamedTuple):
    """1 - mean cosine between the decoder rows that two seeds have for a feature, over pairs of seeds, of features that no anchor is about.

    difference = anchored - free, with its 95 % interval by the jackknife over seeds; unknown below two seeds, the interval below three
    """

    n: int
    n_features: int
    anchored: float
    free: float
    difference: float
    low: float
    high: float


def train_seeds(*args, **settings) -> Seeds:
    """`seed_steps` with the same arguments, drained."""
    steps = seed_steps(*args, **settings)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


def seed_steps(
    source: Source,
    method: Method,
    n_latents: int,
    anchors: Anchors,
    *,
    n_steps: int,
    runs: int = NEEDED,
    weight: float | int = 0.1,
    batch_size: int = 512,
    seed: int = 0,
    begin: Callable[[SparseDictionary, int], TrainState] = lambda weights, seed: TrainState.start(weights, seed=seed),
    tell: Callable[[float], None] = lambda done: None,
) -> Generator[None, None, Seeds]:
    """Train `runs` pairs from seeds seed + 1, seed + 2, ..., a step for each `next()`; returns `Seeds`.

    The first latents of one of each pair start at the anchors and are pulled to them. `begin(weights, seed)` makes a state of new
    weights. Pair r reads data order r. `tell` hears the share done after each step; an exception in it cancels.
    """
    if not 1 <= len(anchors) <= n_latents:
        raise ValueError(f"train_seeds: {len(anchors)} anchors and {n_latents} latents; give at least one anchor and a latent for each.")
    if n_steps < 1 or runs < 1:
        raise ValueError(f"train_seeds: n_steps is {n_steps} and runs {runs}; both are at least 1.")
    arms: dict[bool, list[SparseDictionary]] = {True: [], False: []}
    for r in range(1, runs + 1):
        for held in arms:
            weights = method.build(source.width_in, source.width_out, n_latents, stream(seed + r, "weights"))
            latents = torch.arange(len(anchors))
            if held:  # before `begin`, which may set biases by the rows
                with torch.no_grad():
                    weights.W_enc[latents], weights.W_dec[latents] = anchors.inputs.to(weights.W_enc), anchors.targets.to(weights.W_dec)
            state = begin(weights, seed + r)
            if held:
                pull = torch.full((len(latents),), float(weight))
                state.pins = Pins(anchors, latents, pull, torch.zeros(len(latents), dtype=torch.bool)).to(state.dictionary.device)
            steps = train(state, method, source, batch_size=batch_size, order=r)
            for step in range(n_steps):
                next(steps)
                tell((sum(map(len, arms.values())) + (step + 1) / n_steps) / (2 * runs))
                yield
            arms[held].append(state.dictionary.eval().requires_grad_(False))
    return Seeds(tuple(arms[True]), tuple(arms[False]), anchors, n_steps)


def measure_spread(seeds: Seeds, target_features: Tensor) -> Spread:
    """The spread over the features (n_features, d_out) that no anchor is about."""
    features = unit(target_features.cpu())
    about = cosines_of(seeds.anchors.targets.cpu(), features).amax(dim=1) >= SAME
    kept = features[~about]
    if not len(kept) or len(seeds.free) < 2:
        return Spread(len(seeds.free), len(kept), *[float("nan")] * 5)
    apart = {"anchored": _distances(seeds.anchored, kept), "free": _distances(seeds.free, kept)}
    mean = lambda table, seeds: float(np.mean([table[a, b] for a, b in combinations(seeds, 2)]))
    n = len(seeds.free)
    change = lambda some: mean(apart["anchored"], some) - mean(apart["free"], some)
    difference, low, high = change(range(n)), float("nan"), float("nan")
    if n > 2:
        left_out = np.array([change([s for s in range(n) if s != r]) for r in range(n)])
        error = float(np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())) * float(student.ppf(0.975, n - 1))
        low, high = difference - error, difference + error
    return Spread(n, len(kept), mean(apart["anchored"], range(n)), mean(apart["free"], range(n)), difference, low, high)


def _distances(dictionaries: tuple[SparseDictionary, ...], features: Tensor) -> np.ndarray:
    """(runs, runs) 1 - mean over features of the cosine between the rows that either run has for it, those nearest to it."""
    rows = []
    for dictionary in dictionaries:
        W_dec = unit(dictionary.W_dec.detach().cpu())
        rows.append(W_dec[cosines_of(W_dec, features).argmax(dim=1)].double())
    return np.array([[1 - float((one * other).sum(dim=1).mean()) for other in rows] for one in rows])
