"""How alike two dictionaries' latents are: cosines of decoder rows, or correlations of codes, a block of latents at a time."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csc_array, csr_array
from torch import Tensor

from sdl_explorer.diagnosis.cosines import CELLS, cosines_of, unit
from sdl_explorer.diagnosis.observe import Rows
from sdl_explorer.diagnosis.sparse import Csr
from sdl_explorer.models.dictionary import SparseDictionary

MOST_ENTRIES = 2**23  # codes of a dictionary that are kept to be correlated: with all that is made of them 0.7 GB at most
DENSE = 2_000  # a product of dense codes takes that much less for a pair of codes than one of sparse codes
CHANCE = 1_024  # latents whose best similarity on other rows is looked at


class Codes:
    """The codes of one dictionary as rows go by, and how often each latent fires, on the first `n` rows."""

    def __init__(self, n_latents: int, keep: bool):
        self.n_latents, self.keep = n_latents, keep
        self.count = np.zeros(n_latents, dtype=np.int64)
        self.n, self.room, self.full = 0, MOST_ENTRIES, False
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, rows: Rows) -> None:
        if self.full:
            return
        if not self.keep:
            self.count += rows.count.cpu().numpy()
            self.n += rows.n
            return
        latent, row, value = (part.cpu().numpy() for part in rows.entries)
        fits = int((np.bincount(row, minlength=rows.n).cumsum() <= self.room).sum())
        if fits < rows.n:
            kept, self.full = row < fits, True
            latent, row, value = latent[kept], row[kept], value[kept]
        self.parts.append((latent.astype(np.int32), (row + self.n).astype(np.int32), value))
        self.n, self.room = self.n + fits, self.room - len(latent)

    def standardised(self, n: int) -> "Standard":
        """Of the first n rows; counts are of these then."""
        latent, row, value = (np.concatenate(parts) for parts in zip(*self.parts, strict=True))
        self.parts = []
        if n < self.n:
            latent, row, value = (part[row < n] for part in (latent, row, value))
        codes = csc_array((value.astype(np.float64), (row, latent)), shape=(n, self.n_latents))
        del latent, row, value
        self.n, self.count = n, np.diff(codes.indptr).astype(np.int64)
        mean = np.asarray(codes.sum(axis=0)).ravel() / n
        spread = np.sqrt(np.maximum(np.asarray(codes.power(2).sum(axis=0)).ravel() - n * mean**2, 0))
        scale = np.divide(1.0, spread, out=np.zeros(self.n_latents), where=spread > 1e-6 * np.sqrt(n) * mean)
        codes.data *= np.repeat(scale, self.count)
        return Standard(codes, mean * scale, n)


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
        together = (self.codes.T @ other.codes).toarray()
        together -= (self.n * self.mean)[:, None] * other.mean
        return np.clip(together, -1, 1, out=together)

    def meets(self, other: "Standard") -> int:
        """Pairs of codes on one row: the sums in `with_`."""
        mine, theirs = (np.bincount(side.codes.indices, minlength=self.n) for side in (self, other))
        return int(mine @ theirs)


class Dense:
    """The same correlations where most latents fire: products of dense codes, some rows at a time."""

    def __init__(self, of: Standard):
        self.codes: Csr = csr_array(of.codes.astype(np.float32))
        self.mean, self.n = of.mean.astype(np.float32), of.n

    def with_(self, other: Standard) -> np.ndarray:
        there, size = Dense(other), max(1, 4 * CELLS // max(len(self.mean), len(other.mean)))
        together = torch.zeros(len(self.mean), len(other.mean), dtype=torch.float64)
        for start in range(0, self.n, size):
            together += self._centred(slice(start, start + size)).T @ there._centred(slice(start, start + size))
        return together.clamp_(-1, 1).numpy()

    def _centred(self, rows: slice) -> Tensor:
        return torch.from_numpy(self.codes[rows].toarray() - self.mean)


class Similarity:
    """Similarities of the latents here with those there, a block of the latter at a time; silent latents have 0 with all."""

    def __init__(self, here: SparseDictionary, there: SparseDictionary, codes: tuple[Codes, Codes], n: int, by: str):
        self.by, self.shape = by, (here.n_latents, there.n_latents)
        if by == "activations":
            self.codes = [side.standardised(n) for side in codes]
        self.alive = tuple(torch.as_tensor(side.count > 0) for side in codes)
        if by == "decoder":
            rows = (unit(d.W_dec.detach()).to(here.device) for d in (here, there))
            self.rows = [row * alive[:, None].to(row) for row, alive in zip(rows, self.alive, strict=True)]
        else:
            self.dense = DENSE * self.codes[0].meets(self.codes[1]) > n * here.n_latents * there.n_latents

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(similarities (n_here, b), latents there (b,))."""
        split = torch.arange(self.shape[1]).split(max(1, CELLS // self.shape[0]))
        if self.by == "decoder":
            for latents in split:
                yield cosines_of(self.rows[1][latents.to(self.rows[1].device)], self.rows[0]).cpu(), latents
            return
        yield from zip(self._correlations(self.codes[0], self.codes[1], split), split, strict=True)

    def on_other_rows(self) -> Iterator[Tensor]:
        """Of at most CHANCE latents here that fire, evenly spaced, the correlations with codes half of the rows later, in blocks."""
        alive = self.alive[0].nonzero()[:, 0].numpy()
        some = alive[np.unique(np.linspace(0, len(alive) - 1, min(len(alive), CHANCE)).round().astype(np.int64))]
        split = torch.arange(self.shape[1]).split(max(1, CELLS // max(1, len(some))))
        yield from self._correlations(self.codes[0].take(some), self.codes[1].rolled(), split)

    def _correlations(self, here: Standard, there: Standard, split: Sequence[Tensor]) -> Iterator[Tensor]:
        side = Dense(here) if self.dense else here
        for latents in split:
            yield torch.as_tensor(side.with_(there.take(latents.numpy())), dtype=torch.float32)

    def among(self, latents: np.ndarray, side: int) -> np.ndarray:
        """Similarities of a few latents of one side with each other."""
        if self.by == "decoder":
            rows = self.rows[side][torch.as_tensor(latents, device=self.rows[side].device)].double()
            return (rows @ rows.T).cpu().numpy()
        some = self.codes[side].take(latents)
        return some.with_(some)
