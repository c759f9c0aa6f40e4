"""Pairs of latents whose decoder rows are near, and what their codes do together: sums over rows, a block of latents at a time."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from sdl_explorer.diagnosis.cosines import CELLS, unit
from sdl_explorer.diagnosis.observe import Accumulator, Rows, Stream
from sdl_explorer.diagnosis.sparse import Csr, like

MOST_CODES = 2**24  # codes that are kept; rows beyond are not read
EVENTS = 2**22  # pairs of codes on one row, in a block
TWIN = 0.9  # cosine from which two rows are one feature's: duplicates, not parent and child


class Near(NamedTuple):
    """Ordered pairs (i, j) of live latents with min_cosine <= cos(W_dec_i, W_dec_j) < 0.9, both orders of each, by i and then j.

    left_out   pairs, in both orders, that are as near and were not kept: each latent keeps its nearest
    coherence  mean |cos| over pairs of live latents; 0 where there are fewer than two
    """

    i: Int[np.ndarray, " n_pairs"]
    j: Int[np.ndarray, " n_pairs"]
    cosine: Float[np.ndarray, " n_pairs"]
    left_out: int
    coherence: float

    @classmethod
    def of(cls, W_dec: Tensor, live: Tensor, min_cosine: float, near: int) -> "Near":
        """The `near` nearest of each live latent, and the latents that it is among the nearest of."""
        rows, n, close, total = unit(W_dec[live]), len(live), 0, 0.0
        found: list[tuple[np.ndarray, ...]] = []
        for block in torch.arange(n, device=rows.device).split(max(1, CELLS // max(n, 1))):
            cosines = rows[block] @ rows.T
            cosines[torch.arange(len(block), device=rows.device), block] = 0
            total += float(cosines.abs().sum(dtype=torch.float64))
            cosines = torch.where(cosines < TWIN, cosines, 0)
            close += int((cosines >= min_cosine).sum())
            top, at = cosines.topk(min(near, n), dim=1)
            line, place = (top >= min_cosine).nonzero(as_tuple=True)
            found.append(tuple(part.cpu().numpy() for part in (live[block[line]], live[at[line, place]], top[line, place])))
        i, j, cosine = (np.concatenate(parts) for parts in zip(*found, strict=True)) if found else (np.empty(0, int),) * 3
        keys = np.concatenate([i, j]) * len(W_dec) + np.concatenate([j, i])
        keys, first = np.unique(keys, return_index=True)
        cosine = np.tile(cosine, 2)[first].astype(np.float64)
        return cls(keys // len(W_dec), keys % len(W_dec), cosine, close - len(keys), total / (n * (n - 1)) if n > 1 else 0.0)


class Together(NamedTuple):
    """Sums over rows, at the pairs (i, j) of `Near`.

    both     sum [i and j fire];                 product   sum z_i z_j
    of_i     sum z_i [j fires]
    square_j sum z_j^2 [i fires]
    """

    both: np.ndarray
    product: np.ndarray
    of_i: np.ndarray
    square_j: np.ndarray


class Codes(Accumulator):
    """Every code that fires, z_i |W_dec_i|, of as many rows as MOST_CODES allows, and how much latents write along each other.

        crosstalk = sum z_i |(recon - b_dec) . w_i - z_i| / sum z_i^2,   over every code that fires

    is 0 where latents that fire together are orthogonal. w_i is the unit decoder row; codes and reconstruction in units of the weights.
    """

    def __init__(self, stream: Stream):
        super().__init__(stream)
        dictionary = stream.dictionary
        self.norms = dictionary.W_dec.float().norm(dim=1)
        self.unit = unit(dictionary.W_dec)
        self.n, self.full, self.held = 0, False, 0
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.other = self.square = 0.0

    def add(self, rows: Rows) -> None:
        if self.full:
            return
        latent, row, value = rows.entries
        held = self.held + torch.bincount(row, minlength=rows.n).cumsum(0)
        n = int((held <= MOST_CODES).sum())
        self.full = n < rows.n
        kept = row < n
        latent, row, value = latent[kept], row[kept], value[kept] * self.norms[latent[kept]]
        self.held, self.n = self.held + len(row), self.n + n
        self.parts.append((latent.int().cpu().numpy(), (row + rows.start).int().cpu().numpy(), value.cpu().numpy()))
        self.square += float(value.double().square().sum())
        self.other += self._crosstalk(rows, latent, row, value)

    def _crosstalk(self, rows: Rows, latent: Tensor, row: Tensor, value: Tensor) -> float:
        dictionary = self.stream.dictionary
        written = rows.reconstruction * dictionary.target_scale - dictionary.b_dec.float()
        if not rows.sparse:
            along = (written @ self.unit.T)[row, latent]
            return float((value * (along - value).abs()).double().sum())
        total = 0.0
        for some in torch.arange(len(row), device=row.device).split(max(1, CELLS // written.shape[1])):
            along = (written[row[some]] * self.unit[latent[some]]).sum(dim=1)
            total += float((value[some] * (along - value[some]).abs()).double().sum())
        return total

    @property
    def crosstalk(self) -> float:
        return self.other / self.square if self.square > 0 else 0.0

    def matrix(self) -> Csr:
        """(n_latents, n), in double precision; each latent's rows in order."""
        latent, row, value = (np.concatenate(parts) for parts in zip(*self.parts, strict=True))
        self.parts = [(latent, row, value)]
        return _ordered(csr_array((value.astype(np.float64), (latent, row)), shape=(len(self.norms), self.n)))


def sums_of(codes: Csr, near: Near, seen: Callable[[np.ndarray, Csr], None]) -> Together:
    """The sums at the pairs. `seen(latents, both)` is shown each block's counts, a CSR matrix (b, n_latents), before they are let go."""
    parts = [np.zeros(len(near.i)) for _ in range(4)]
    for latents, first, second in _products(codes):
        span = slice(*np.searchsorted(near.i, [latents[0], latents[-1] + 1]))
        place = near.i[span] - latents[0], near.j[span]
        one, two = _at(first, *place), _at(second, *place)
        for sums, values in zip(parts, (np.real(one), np.imag(two), np.real(two), np.imag(one)), strict=True):
            sums[span] = values
        seen(latents, like(first, first.data.real))
    return Together(*parts)


def _products(codes: Csr) -> Iterator[tuple[np.ndarray, Csr, Csr]]:
    """Two sums in one product: counts and z_j^2 beside each other for the codes that fire, z_i and z_i z_j for their values."""
    by_row = _ordered(codes.T)
    events = codes.astype(bool) @ np.diff(by_row.indptr)
    squares, values = like(by_row, 1 + 1j * by_row.data**2), like(by_row, 1 + 1j * by_row.data)
    for latents in np.split(np.arange(codes.shape[0]), np.flatnonzero(np.diff((events.cumsum() - 1) // EVENTS)) + 1):
        mine = csr_array(codes[latents])
        yield latents, _ordered(like(mine, np.ones_like(mine.data)) @ squares), _ordered(mine @ values)


def _ordered(matrix) -> Csr:
    matrix = csr_array(matrix)
    matrix.sort_indices()
    return matrix


def _at(matrix: Csr, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Entries of a matrix with sorted indices, 0 where none is stored."""
    keys = np.repeat(np.arange(matrix.shape[0], dtype=np.int64), np.diff(matrix.indptr)) * matrix.shape[1] + matrix.indices
    wanted = rows.astype(np.int64) * matrix.shape[1] + columns
    place = np.searchsorted(keys, wanted)
    found = place < len(keys)
    found[found] = keys[place[found]] == wanted[found]
    values = np.zeros(len(wanted), dtype=matrix.data.dtype)
    values[found] = matrix.data[place[found]]
    return values
