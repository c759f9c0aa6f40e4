"""Optimisers, and what of training is a function of the absolute step: the learning rate and ramped settings.

`adam` is the default. `ScheduleFreeSignSGD` needs the package schedulefree (`pip install 'sdl-explorer[optim]'`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import param
import torch

from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import Method

OPTIMISERS = ("adam", "signsgd")
DECAYS = ("linear", "cosine")
LOWEST = 0.1  # share of lr that a decay falls to


class Ramp(NamedTuple):
    """A number of the method that goes linearly from `start` to its own value over the first `n_steps` steps.

    value(s) = start + (final - start) * min(1, s / n_steps); `ramped` rounds it where the setting is a whole number.
    """

    setting: str
    start: float | int
    n_steps: int

    def value(self, step: int, final: float | int) -> float:
        return self.start + (final - self.start) * min(1.0, step / self.n_steps)


@dataclass(frozen=True)
class Schedule:
    """The learning rate and the ramps, as functions of the absolute step and of settings alone.

    rate(s) = 0 before `hold_steps` (optimiser moments fill, weights stay), then lr times a linear warm-up over
    `warmup_steps`. With `decay_steps` it falls to lr / 10 at that step and stays there:

        "linear"   over the last fifth before that step
        "cosine"   lr (0.1 + 0.9 (1 + cos(pi s / decay_steps)) / 2), from the first step on
    """

    lr: float | int = 1e-3
    warmup_steps: int = 0
    decay_steps: int | None = None
    hold_steps: int = 0
    decay: str = "linear"
    ramps: Sequence = ()  # of Ramp

    def __post_init__(self):
        if self.decay not in DECAYS:
            raise ValueError(f"Schedule: decay is {self.decay!r}; it is one of {', '.join(DECAYS)}.")
        object.__setattr__(self, "ramps", tuple(Ramp(*ramp) for ramp in self.ramps))  # JSON makes lists of them

    def rate(self, step: int) -> float:
        since = step - self.hold_steps
        if since < 0:
            return 0.0
        warm = min(1.0, (since + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.lr * warm * (1 - (1 - LOWEST) * self._fallen(step))

    def _fallen(self, step: int) -> float:
        """The share of the fall that lies behind, from 0 to 1."""
        if self.decay_steps is None:
            return 0.0
        if self.decay == "cosine":
            return (1 - math.cos(math.pi * min(step / self.decay_steps, 1.0))) / 2
        begin = 0.8 * self.decay_steps
        return min(max((step - begin) / max(self.decay_steps - begin, 1), 0.0), 1.0)


def ramped(method: Method, ramps: Sequence, step: int) -> Method:
    """The method as it is at this step: itself, or a copy while a ramp is under way."""
    under_way = [ramp for ramp in ramps if step < ramp.n_steps]
    if not under_way:
        return method
    settings = {name: value for name, value in method.param.values().items() if name != "name"}
    for setting, value in [(ramp.setting, ramp.value(step, settings[ramp.setting])) for ramp in under_way]:
        settings[setting] = round(value) if isinstance(method.param[setting], param.Integer) else value
    return type(method)(**settings)


def ramps_of(settings: dict, method: Method, n_latents: int | None = None) -> tuple[Ramp, ...]:
    """Ramps from {"k": [256, 1000]}, checked against the method (and the size of the dictionary that it trains)."""
    ramps = []
    for name, pair in settings.items():
        setting = method.param.objects("existing").get(name)
        if not isinstance(setting, param.Number) or getattr(method, name) is None or setting.constant:
            known = [n for n, p in method.param.objects("existing").items() if isinstance(p, param.Number) and not p.constant]
            raise ValueError(f"ramps: {name!r} is no number that {method} holds; there are {', '.join(known)}.")
        numbers = isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], int | float) and isinstance(pair[1], int)
        if not numbers or pair[1] < 1:
            raise ValueError(f"ramps: {name!r} has {pair!r}; give [start, number of steps], for instance {{{name!r}: [1, 1000]}}.")
        ramps.append(Ramp(name, *pair))
    first = ramped(method, tuple(ramps), 0)
    if n_latents is not None:
        first.check(n_latents)
    return tuple(ramps)


def adam(dictionary: SparseDictionary, lr: float | int) -> torch.optim.Adam:
    """Adam with the fused kernels; one pass over weights and moments a step."""
    return torch.optim.Adam(dictionary.parameters(), lr=lr, fused=True)


def optimiser_for(name: str, dictionary: SparseDictionary, lr: float | int) -> torch.optim.Optimizer:
    """A fresh optimiser by the name that settings have."""
    if name not in OPTIMISERS:
        raise ValueError(f"optimiser is {name!r}; it is one of {', '.join(OPTIMISERS)}.")
    return adam(dictionary, lr) if name == "adam" else ScheduleFreeSignSGD(dictionary.parameters(), lr)


def name_of(optimiser: torch.optim.Optimizer) -> str:
    return "signsgd" if isinstance(optimiser, ScheduleFreeSignSGD) else "adam"


def progress(optimiser: torch.optim.Optimizer) -> dict[str, float | int]:
    """The numbers by which an optimiser's group itself moves on, beside its slots."""
    group = optimiser.param_groups[0]
    return {name: group[name] for name in ("k", "weight_sum", "lr_max") if name in group}


class ScheduleFreeSignSGD(torch.optim.Optimizer):
    """Sign descent made schedule-free by the package schedulefree (Defazio et al. 2024, arXiv 2405.15682).

        y = (1 - momentum) z + momentum x                  where the gradient is taken
        z <- z - lr sign(gradient at y)                    the fast weights, slot "z"
        x <- (1 - c) x + c z,  c = lr^2 / sum of lr^2      the average (c by the largest lr so far)

    Between two steps the parameters *are* the average x, which findings, interventions, commits and files see;
    `look_ahead` moves them to y for the gradient and `settle` back. So x, z and three numbers of the group are the
    whole state, and a run goes on bit for bit. A step at lr 0 changes nothing. A constraint of the method, such
    as unit rows, is put on x; z is free.
    """

    momentum = 0.95

    def __init__(self, params, lr: float | int):
        _library()
        super().__init__(params, {"lr": lr, "ahead": False})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["z"] = parameter.detach().clone()

    def look_ahead(self) -> None:
        if not self.param_groups[0]["ahead"]:
            self._free(train_mode=False).train()
            self.param_groups[0]["ahead"] = True

    def settle(self) -> None:
        if self.param_groups[0]["ahead"]:
            self._free(train_mode=True).eval()
            self.param_groups[0]["ahead"] = False

    @torch.no_grad()
    def step(self, closure=None) -> None:
        if closure is not None:
            raise TypeError("ScheduleFreeSignSGD: step takes no closure; look_ahead, take the gradient, step, settle.")
        if self.param_groups[0]["lr"] > 0:
            self._free(train_mode=True).step()

    def _free(self, train_mode: bool):
        """The library's algorithm on our state, which alone is copied and stored."""
        base: Any = SimpleNamespace(param_groups=self.param_groups, state=self.state, step=self._descend)
        free = _library().ScheduleFreeWrapper(base, momentum=self.momentum)
        free.train_mode = train_mode
        return free

    def _descend(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"])


def look_ahead(optimiser: torch.optim.Optimizer) -> None:
    """Put the parameters where the optimiser wants the gradient."""
    if isinstance(optimiser, ScheduleFreeSignSGD):
        optimiser.look_ahead()


def settle(optimiser: torch.optim.Optimizer) -> None:
    """Put the parameters back to what everybody else reads."""
    if isinstance(optimiser, ScheduleFreeSignSGD):
        optimiser.settle()


def _library():
    try:
        import schedulefree
    except ImportError as error:
        raise ImportError(
            "optimiser 'signsgd' needs the package schedulefree, which is not here. pip install 'sdl-explorer[optim]', or use 'adam'."
        ) from error
    return schedulefree
