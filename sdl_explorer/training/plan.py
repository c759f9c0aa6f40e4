"""A planned change of rows, pins and moments: what the preview shows is what gets applied."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

from sdl_explorer.data.anchors import Anchors, Pins
from sdl_explorer.training.state import TrainState


class PlanRow(NamedTuple):
    """One line of the preview."""

    latent: int
    origin: str
    source_row: int | None
    loss: float | None
    nearest_latent: int
    nearest_cosine: float
    encoder_scale: float
    bias: float


@dataclass(frozen=True)
class Plan:
    """New rows for `latents` (None: rows stay), the pins from then on, and whose moments are cleared.

    `expected` estimates the mean squared error on the choose rows before and right after.
    """

    intervention: str
    latents: Tensor
    W_enc: Tensor | None
    b_enc: Tensor | None
    W_dec: Tensor | None
    sigma: dict[str, Tensor]
    pins: Pins | None
    clears: Tensor
    expected: dict[str, float]
    reading: str
    rows: tuple[PlanRow, ...] = ()
    python: str = ""
    changed_pins: Pins | None = None  # the pins this plan itself adds

    @torch.no_grad()
    def apply(self, state: TrainState) -> None:
        """Weights *and* optimiser moments of exactly those rows, in place."""
        dictionary = state.dictionary
        if self.W_enc is not None:
            dictionary.W_enc[self.latents] = self.W_enc
            dictionary.b_enc[self.latents] = self.b_enc
            dictionary.W_dec[self.latents] = self.W_dec
            for name, rows in self.sigma.items():
                dictionary.per_latent()[name][self.latents] = rows
            state.samples_since_fired[self.latents] = 0
        state.clear_moments(self.clears)
        state.pins = self.pins

    def drop(self, latents) -> "Plan":
        """The same plan without some latents."""
        out = {int(i) for i in latents}
        keep = torch.tensor([int(i) not in out for i in self.latents], dtype=torch.bool, device=self.latents.device)
        kept = lambda t: None if t is None else t[keep]
        pins = self.pins
        if self.changed_pins is not None and pins is not None:
            pins = pins.without(out & set(self.changed_pins.latents.tolist()))
        clears = torch.tensor([int(i) for i in self.clears if int(i) not in out], dtype=torch.long, device=self.clears.device)
        return replace(
            self,
            latents=self.latents[keep],
            W_enc=kept(self.W_enc),
            b_enc=kept(self.b_enc),
            W_dec=kept(self.W_dec),
            sigma={name: rows[keep] for name, rows in self.sigma.items()},
            pins=pins,
            clears=clears,
            changed_pins=None if self.changed_pins is None else self.changed_pins.without(out),
            rows=tuple(row for row in self.rows if row.latent not in out),
            reading=f"{self.reading} {len(out)} of them dropped by hand.",
            expected={},
        )

    def sham(self, generator: Generator) -> "Plan":
        """The same reset in random directions: tells a repair apart from any reset."""
        W_enc, W_dec = self.W_enc, self.W_dec
        if W_enc is not None and W_dec is not None:
            W_enc, W_dec = _random_pair(W_enc, W_dec, generator)
        pins = self.pins
        if self.changed_pins is not None:
            told = self.changed_pins.anchors
            anchors = Anchors(*_random_pair(told.inputs, told.targets, generator), told.names)
            random_pins = replace(self.changed_pins, anchors=anchors)
            others = self.pins.without(self.changed_pins.latents.tolist()) if self.pins else None
            pins = others.merged(random_pins) if others else random_pins
        return replace(self, W_enc=W_enc, W_dec=W_dec, pins=pins, reading="Sham: " + self.reading)


def random_like(rows: Tensor, generator: Generator) -> Tensor:
    """Random directions with the norms of `rows`."""
    drawn = torch.randn(rows.shape, generator=generator).to(rows.device)
    return normalize(drawn, dim=1) * rows.norm(dim=1, keepdim=True)


def _random_pair(reads: Tensor, writes: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Random directions with the norms of both; one direction for both sides where they shared one."""
    shared = reads.shape == writes.shape and torch.allclose(normalize(reads, dim=1), normalize(writes, dim=1))
    drawn = random_like(reads, generator)
    return drawn, normalize(drawn, dim=1) * writes.norm(dim=1, keepdim=True) if shared else random_like(writes, generator)
