"""How alike two dictionaries' latents are: cosines of decoder rows, or correlations of codes, a block of latents at a time."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csc_array, csr_array
from torch import Tensor

from sdl_explorer.diagnosis.cosines import CELLS, cosines_of, unit
from sdl_explorer.diagnosis.observe import Rows
from sdl_explorer.diagnosis.sparse import Csr
from sdl_explorer.models.dictionary import SparseDictionary

MOST_ENTRIES = 2**27  # codes of a dictionary that are kept to be correlated


class Codes:
    """The codes of one dictionary as rows go by, and how often each latent fires."""

    def __init__(self, n_latents: int, keep: bool):
        self.n_latents, self.keep = n_latents, keep
        self.count = np.zeros(n_latents, dtype=np.int64)
        self.n_entries = 0
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, rows: Rows, start: int) -> None:
        self.count += rows.count.cpu().numpy()
        if not self.keep:
            return
        latent, row, value = (part.cpu().numpy() for part in rows.entries)
        self.n_entries += len(latent)
        if self.n_entries > MOST_ENTRIES:
            raise ValueError(
                f"find_twins: more than {MOST_ENTRIES:,} codes after {start + rows.n:,} rows; so many are kept to be correlated. "
                "Give fewer rows, or compare decoder rows (by='decoder')."
            )
        self.parts.append((latent.astype(np.int32), (row + start).astype(np.int32), value))

    def standardised(self, n: int) -> "Standard":
        latent, row, value = (np.concatenate(parts) for parts in zip(*self.parts, strict=True))
        codes = csc_array((value.astype(np.float64), (row, latent)), shape=(n, self.n_latents))
        mean = np.asarray(codes.sum(axis=0)).ravel() / n
        spread = np.sqrt(np.maximum(np.asarray(codes.power(2).sum(axis=0)).ravel() - n * mean**2, 0))
        scale = np.divide(1.0, spread, out=np.zeros(self.n_latents), where=spread > 1e-6 * np.sqrt(n) * mean)
        return Standard(csc_array(codes * scale[None, :]), mean * scale, n)


class Standard(NamedTuple):
    """Codes (n, n_latents) whose columns less `mean` have norm 1: products are correlations. A constant column is zero."""

    codes: Csr
    mean: np.ndarray
    n: int

    def take(self, latents) -> "Standard":
        return Standard(self.codes[:, latents], self.mean[latents], self.n)

    def rolled(self) -> "Standard":
        """The same codes half of the rows later."""
        codes = csr_array(self.codes)
        return self._replace(codes=csc_array(codes[np.roll(np.arange(self.n), self.n // 2)]))

    def with_(self, other: "Standard") -> np.ndarray:
        """Correlations, (n_latents, other's n_latents)."""
        return np.clip((self.codes.T @ other.codes).toarray() - self.n * np.outer(self.mean, other.mean), -1, 1)


class Similarity:
    """Similarities of the latents here with those there, a block of the latter at a time; silent latents have 0 with all."""

    def __init__(self, here: SparseDictionary, there: SparseDictionary, codes: tuple[Codes, Codes], n: int, by: str):
        self.alive = tuple(torch.as_tensor(side.count > 0) for side in codes)
        self.by, self.shape = by, (here.n_latents, there.n_latents)
        if by == "decoder":
            rows = (unit(d.W_dec.detach()).to(here.device) for d in (here, there))
            self.rows = [row * alive[:, None].to(row) for row, alive in zip(rows, self.alive, strict=True)]
        else:
            self.codes = [side.standardised(n) for side in codes]

    def blocks(self, rolled: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """(similarities (n_here, b), latents there (b,))."""
        last = self.codes[1].rolled() if rolled else None
        for latents in torch.arange(self.shape[1]).split(max(1, CELLS // self.shape[0])):
            yield self._of(latents, last), latents

    def _of(self, latents: Tensor, rolled) -> Tensor:
        if self.by == "decoder":
            return cosines_of(self.rows[1][latents.to(self.rows[1].device)], self.rows[0]).cpu()
        other = self.codes[1] if rolled is None else rolled
        return torch.as_tensor(self.codes[0].with_(other.take(latents.numpy())), dtype=torch.float32)

    def among(self, latents: np.ndarray, side: int) -> np.ndarray:
        """Similarities of a few latents of one side with each other."""
        if self.by == "decoder":
            rows = self.rows[side][torch.as_tensor(latents, device=self.rows[side].device)].double()
            return (rows @ rows.T).cpu().numpy()
        some = self.codes[side].take(latents)
        return some.with_(some)
