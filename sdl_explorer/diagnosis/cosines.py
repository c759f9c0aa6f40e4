"""Cosines of rows with directions, searched in blocks of latents: nothing of size n_latents x n_features is kept."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CELLS = 2**22  # cosines in a block: 16 MB of float32


class Best(NamedTuple):
    """Each direction's best latent, arrays (n_features,). The strict ones leave the held latents out of the maximum."""

    cosine: np.ndarray
    latent: np.ndarray
    strict: np.ndarray
    absolute: np.ndarray
    absolute_strict: np.ndarray

    def scores(self, strict: bool, signed: bool) -> np.ndarray:
        if signed:
            return self.strict if strict else self.cosine
        return self.absolute_strict if strict else self.absolute


class RunningBest:
    """The maximum over the latents seen so far; held latents come last (`latent_blocks`)."""

    def __init__(self, n_features: int, device):
        self.cosine = self.strict = torch.full((n_features,), -torch.inf, device=device)
        self.latent = torch.full((n_features,), -1, dtype=torch.int64, device=device)
        self.absolute = self.absolute_strict = torch.zeros(n_features, device=device)

    def add(self, cosines: Tensor, absolute: Tensor, latents: Tensor, held: bool) -> None:
        """`cosines` (n_features, b) of the given latents, and the largest absolute ones of this block (n_features,)."""
        top, at = cosines.max(dim=1)
        better = top > self.cosine
        self.cosine, self.latent = torch.where(better, top, self.cosine), torch.where(better, latents[at], self.latent)
        self.absolute = torch.maximum(self.absolute, absolute)
        if not held:
            self.strict, self.absolute_strict = self.cosine, self.absolute

    def best(self) -> Best:
        """As numpy; where no latent was left to search, the score is -1 signed and 0 absolute."""
        parts = (self.cosine.clamp_min(-1), self.latent, self.strict.clamp_min(-1), self.absolute, self.absolute_strict)
        return Best(*(part.cpu().numpy() for part in parts))


def latent_blocks(n_features: int, held: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """Ids of the latents in blocks of at most CELLS cosines, free ones first, as (latents, are they held)."""
    size = max(1, CELLS // n_features)
    for is_held in (False, True):
        for latents in (held == is_held).nonzero()[:, 0].split(size):
            if len(latents):
                yield latents, is_held


def cosines_of(rows: Tensor, directions: Tensor) -> Tensor:
    """(n_features, b) cosines with directions of unit norm; a zero row scores 0."""
    return (directions @ unit(rows).T).clamp_(-1, 1)


def largest(cosines: Tensor) -> Tensor:
    """The largest absolute value of each row, without an absolute copy."""
    return torch.maximum(cosines.amax(dim=1), -cosines.amin(dim=1))


def unit(rows: Tensor) -> Tensor:
    """Rows at norm 1 in float32; zero rows stay zero."""
    rows = rows.float()
    return rows / _not_zero(rows.norm(dim=1, keepdim=True))


def row_cosines(rows: Tensor, others: Tensor, chosen: Tensor | None = None, block: int = 16384) -> np.ndarray:
    """cos(rows_i, others_i), or cos(rows_i, others_chosen[i]), in blocks; 0 where either is zero."""
    parts = []
    for start in range(0, len(rows), block):
        stop = start + block
        a, b = rows[start:stop].float(), (others[start:stop] if chosen is None else others[chosen[start:stop]]).float()
        cosines = (a * b).sum(dim=1) / _not_zero(a.norm(dim=1)) / _not_zero(b.norm(dim=1))
        parts.append(cosines.clamp(-1, 1).cpu())
    return torch.cat(parts).numpy()


def _not_zero(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, norms, 1.0)
