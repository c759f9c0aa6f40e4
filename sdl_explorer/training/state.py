"""All that training reads and writes, and all that an intervention may change."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import Parameter

from sdl_explorer.data.anchors import Pins, Pulls
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.training.optim import Schedule, adam, optimiser_for

__all__ = ["Schedule", "Step", "TrainState", "adam", "threads_for"]


class Step(NamedTuple):
    """One step of training: detached 0-d tensors on the device; whoever reads converts."""

    index: int
    losses: dict[str, Tensor]
    l0: Tensor
    dead: Tensor
    seconds: float


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
    clip_norm: float | int | None = None  # of the whole gradient
    precision: str = "auto"  # of the matrix products: "float32", "bfloat16", or "auto"

    @classmethod
    def start(
        cls,
        dictionary: SparseDictionary,
        schedule: Schedule | None = None,
        seed: int = 0,
        dead_after: int = 100_000,
        optimiser: str = "adam",
        **settings,
    ):
        """Step 0: no moments, nobody has been silent yet. `settings`: `clip_norm` and `precision`."""
        silent = torch.zeros(dictionary.n_latents, dtype=torch.int64, device=dictionary.device)
        schedule = schedule or Schedule()
        return cls(dictionary, optimiser_for(optimiser, dictionary, schedule.lr), schedule, 0, silent, None, seed, dead_after, **settings)

    @property
    def dead(self) -> Bool[Tensor, " n_latents"]:
        return self.samples_since_fired >= self.dead_after

    @property
    def mixed(self) -> bool:
        """Are matrix products taken in bfloat16? Weights, moments and all other arithmetic stay in float32."""
        return self.precision == "bfloat16" or (self.precision == "auto" and self.dictionary.device.type == "cuda")

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
        """Zero the optimiser moments of exactly these latents' rows; fast weights ("z") start at the rows as they are."""
        for parameter in self.row_parameters():
            for moment in self.moments(parameter):
                fast = moment is self.optimiser.state[parameter].get("z")
                moment[latents] = parameter[latents] if fast else 0


def threads_for(d_in: int, n_latents: int, batch_size: int, available: int) -> int:
    """Intra-op threads, a fixed function of the problem's size: one below 5e7 multiply-adds an encoder
    product, where starting more costs more than they earn."""
    return 1 if d_in * n_latents * batch_size < 5e7 else max(1, available)
