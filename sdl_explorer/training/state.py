"""All that training reads and writes, and all that an intervention may change."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import Parameter

from sdl_explorer.data.anchors import Pins, Pulls
from sdl_explorer.models.dictionary import SparseDictionary


class Step(NamedTuple):
    """One step of training: detached 0-d tensors on the device; whoever reads converts."""

    index: int
    losses: dict[str, Tensor]
    l0: Tensor
    dead: Tensor
    seconds: float


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the absolute step and of settings alone.

    rate(s) = 0 before `hold_steps` (optimiser moments fill, weights stay), then lr times a linear warm-up
    over `warmup_steps`; with `decay_steps` it falls linearly over the last fifth before that step to lr / 10
    and stays there.
    """

    lr: float = 1e-3
    warmup_steps: int = 0
    decay_steps: int | None = None
    hold_steps: int = 0

    def rate(self, step: int) -> float:
        since = step - self.hold_steps
        if since < 0:
            return 0.0
        warm = min(1.0, (since + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.decay_steps is None:
            return self.lr * warm
        begin = 0.8 * self.decay_steps
        fallen = min(max((step - begin) / max(self.decay_steps - begin, 1), 0.0), 1.0)
        return self.lr * warm * (1 - 0.9 * fallen)


@dataclass
class TrainState:
    """A dictionary in training. `samples_since_fired` counts z_i > 0; dead is silence of `dead_after` samples."""

    dictionary: SparseDictionary
    optimiser: torch.optim.Optimizer
    schedule: Schedule
    step: int
    samples_since_fired: Int[Tensor, " n_latents"]
    pins: Pins | None
    seed: int
    dead_after: int = 100_000
    pulls: Pulls | None = None

    @classmethod
    def start(cls, dictionary: SparseDictionary, schedule: Schedule = Schedule(), seed: int = 0, dead_after: int = 100_000):
        """Step 0: no moments, nobody has been silent yet."""
        silent = torch.zeros(dictionary.n_latents, dtype=torch.int64, device=dictionary.device)
        return cls(dictionary, adam(dictionary, schedule.lr), schedule, 0, silent, None, seed, dead_after)

    @property
    def dead(self) -> Bool[Tensor, " n_latents"]:
        return self.samples_since_fired >= self.dead_after

    def row_parameters(self) -> list[Parameter]:
        """The parameters whose row i belongs to latent i."""
        dictionary = self.dictionary
        sigma = [p for p in dictionary.per_latent().values() if isinstance(p, Parameter)]
        return list({id(p): p for p in [dictionary.W_enc, dictionary.b_enc, dictionary.W_dec, *sigma]}.values())

    def moments(self, parameter: Parameter) -> list[Tensor]:
        """The optimiser's running tensors of the parameter's own shape; empty before the first step."""
        stored = self.optimiser.state.get(parameter, {})
        return [t for t in stored.values() if isinstance(t, Tensor) and t.shape == parameter.shape and t.ndim > 0]

    @torch.no_grad()
    def clear_moments(self, latents: Tensor) -> None:
        """Zero the optimiser moments of exactly these latents' rows."""
        for parameter in self.row_parameters():
            for moment in self.moments(parameter):
                moment[latents] = 0


def adam(dictionary: SparseDictionary, lr: float) -> torch.optim.Adam:
    """Adam with the fused kernels; one pass over weights and moments a step."""
    return torch.optim.Adam(dictionary.parameters(), lr=lr, fused=True)


def threads_for(d_in: int, n_latents: int, batch_size: int, available: int) -> int:
    """Intra-op threads, a fixed function of the problem's size: one below 5e7 multiply-adds an encoder
    product, where starting more costs more than they earn."""
    return 1 if d_in * n_latents * batch_size < 5e7 else max(1, available)
