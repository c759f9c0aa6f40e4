"""A planned change of rows, pins and moments: what the preview shows is what gets applied."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

from sdl_explorer.data.anchors import Anchors, Pins, Pulls
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
    turned: float | None = None  # cosine of the new encoder row to the former one, where the plan turns rows


@dataclass(frozen=True)
class Plan:
    """New rows for `latents` (None: rows stay), the pins it adds, and whose moments are cleared.

    Former pins and pulls of `latents` end. `held` are the pins it was planned on and `pins` those that follow, so that
    others may be added in between. `expected` estimates the mean squared error on the choose rows before and
    right after.
    """

    intervention: str
    latents: Tensor
    W_enc: Tensor | None
    b_enc: Tensor | None
    W_dec: Tensor | None
    sigma: dict[str, Tensor]
    held: Pins | None
    clears: Tensor
    expected: dict[str, float]
    reading: str
    rows: tuple[PlanRow, ...] = ()
    python: str = ""
    changed_pins: Pins | None = None  # the pins this plan itself adds, in the order of `latents`
    changed_pulls: Pulls | None = None  # and the pulls

    @property
    def pins(self) -> Pins | None:
        return self._pins_after(self.held)

    @torch.no_grad()
    def apply(self, state: TrainState) -> None:
        """Weights *and* optimiser moments of exactly those rows, in place. Where the encoder is tied, W_dec wins."""
        dictionary = state.dictionary
        rows = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec}  # in this order: the last write stays
        tensors = {name: getattr(dictionary, name) for name in rows} | dictionary.per_latent()
        for name, new in (rows | self.sigma).items():
            if new is not None:
                tensors[name][self.latents] = new
        if self.W_enc is not None:
            state.samples_since_fired[self.latents] = 0
        state.clear_moments(self.clears)
        state.pins = self._pins_after(state.pins)
        state.pulls = _after(state.pulls, self.latents, self.changed_pulls)

    def _pins_after(self, pins: Pins | None) -> Pins | None:
        return _after(pins, self.latents, self.changed_pins)

    def drop(self, latents) -> "Plan":
        """The same plan without some latents."""
        out = {int(i) for i in latents} & set(self.latents.tolist())
        keep = torch.tensor([int(i) not in out for i in self.latents], dtype=torch.bool, device=self.latents.device)
        kept = lambda t: None if t is None else t[keep]
        clears = torch.tensor([int(i) for i in self.clears if int(i) not in out], dtype=torch.long, device=self.clears.device)
        return replace(
            self,
            latents=self.latents[keep],
            W_enc=kept(self.W_enc),
            b_enc=kept(self.b_enc),
            W_dec=kept(self.W_dec),
            sigma={name: rows[keep] for name, rows in self.sigma.items()},
            clears=clears,
            changed_pins=None if self.changed_pins is None else self.changed_pins.without(out),
            changed_pulls=None if self.changed_pulls is None else self.changed_pulls.without(out),
            rows=tuple(row for row in self.rows if row.latent not in out),
            reading=f"{self.reading} {len(out)} of them dropped by hand.",
            expected={},
        )

    def sham(self, generator: Generator) -> "Plan":
        """The same reset, or the same anchors, in random directions: tells a repair apart from any reset."""
        reading, pins, pulls = "Sham: " + self.reading, self.changed_pins, self.changed_pulls
        if self.W_enc is None:
            return replace(self, reading=reading)
        if self.W_dec is None:
            W_enc = random_like(self.W_enc, generator)
            pulled = None if pulls is None else replace(pulls, directions=normalize(W_enc, dim=1))
            return replace(self, W_enc=W_enc, changed_pulls=pulled, reading=reading)
        if pins is None:
            W_enc, W_dec = _random_pair(self.W_enc, self.W_dec, generator)
            return replace(self, W_enc=W_enc, W_dec=W_dec, reading=reading)
        told = pins.anchors
        drawn = Anchors(*_random_pair(told.inputs, told.targets, generator), told.names)
        at_anchor = torch.cosine_similarity(self.W_dec, told.targets)[:, None] > 1 - 1e-5  # the others stay, and are pulled
        W_enc = torch.where(at_anchor, drawn.inputs * self.W_enc.norm(dim=1, keepdim=True), self.W_enc)
        W_dec = torch.where(at_anchor, drawn.targets * self.W_dec.norm(dim=1, keepdim=True), self.W_dec)
        return replace(self, W_enc=W_enc, W_dec=W_dec, changed_pins=replace(pins, anchors=drawn), reading=reading)


def _after(held, latents: Tensor, added):
    """Pins or pulls: those of `latents` end, and the added ones follow."""
    others = None if held is None else held.without(latents.tolist())
    return others.merged(added) if others is not None and added is not None else others or added


def random_like(rows: Tensor, generator: Generator) -> Tensor:
    """Random directions with the norms of `rows`."""
    drawn = torch.randn(rows.shape, generator=generator).to(rows.device)
    return normalize(drawn, dim=1) * rows.norm(dim=1, keepdim=True)


def _random_pair(reads: Tensor, writes: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Random directions with the norms of both; one direction for both sides where they shared one."""
    shared = reads.shape == writes.shape and torch.allclose(normalize(reads, dim=1), normalize(writes, dim=1))
    drawn = random_like(reads, generator)
    return drawn, normalize(drawn, dim=1) * writes.norm(dim=1, keepdim=True) if shared else random_like(writes, generator)
