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
from sdl_explorer.diagnosis.sparse import Csr, like, only, row_of

MOST_CODES = 2**23  # codes that are kept; rows beyond are not read
MOST_EVENTS, EVENTS = 2**28, 2**20  # pairs of codes on one row, that are counted at most, and in a block
CACHED = 2**18  # numbers of gathered rows that stay near the processor
MOST = 1000  # pairs that pass the test, best first, whose rows are looked at; and contained pairs that are kept
CONTAINED = 0.95  # P(k | j) from which j fires inside k
LOOSE = 0.5  # P(j | k) up to which k fires on its own as well
LOOKED = 8  # rows beyond what decides whether a pair can be contained, so that fewer others look as if
LIFT = 2.0  # P(k | j) / P(k) from which that says something: a latent that always fires contains all others
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
            total += float(torch.linalg.vector_norm(cosines, 1, dim=1).double().sum())
            line, place = (cosines >= min_cosine).nonzero(as_tuple=True)
            cosine = cosines[line, place]
            kept = cosine < TWIN
            close += int(kept.sum())
            kept &= _rank(line, torch.where(kept, cosine, -1)) < near
            line, place, cosine = line[kept], place[kept], cosine[kept]
            found.append(tuple(part.cpu().numpy() for part in (live[block[line]], live[place], cosine)))
        i, j, cosine = (np.concatenate(parts) for parts in zip(*found, strict=True)) if found else (np.empty(0, int),) * 3
        keys = np.concatenate([i, j]) * len(W_dec) + np.concatenate([j, i])
        keys, first = np.unique(keys, return_index=True)
        cosine = np.tile(cosine, 2)[first].astype(np.float64)
        return cls(keys // len(W_dec), keys % len(W_dec), cosine, close - len(keys), total / (n * (n - 1)) if n > 1 else 0.0)


def _rank(line: Tensor, value: Tensor) -> Tensor:
    """The place of each value among those of its line, 0 for the largest; lines come in order."""
    order = value.argsort(descending=True, stable=True)
    by_line = order[line[order].argsort(stable=True)]
    count = torch.bincount(line)
    rank = torch.arange(len(line), device=line.device) - (count.cumsum(0) - count)[line]
    return torch.empty_like(rank).scatter_(0, by_line, rank)


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
        self.made: Csr | None = None
        self.other = self.square = 0.0

    def add(self, rows: Rows) -> None:
        if self.full:
            return
        latent, row, value = rows.entries
        held = self.held + torch.bincount(row, minlength=rows.n).cumsum(0)
        n = int((held <= MOST_CODES).sum())
        self.full = n < rows.n
        kept = row < n
        latent, row, value = latent[kept], row[kept], value[kept]
        self.held, self.n = self.held + len(row), self.n + n
        self.parts.append((latent.int().cpu().numpy(), (row + rows.start).int().cpu().numpy(), value.cpu().numpy()))
        value = value * self.norms[latent]
        self.square += float(value.double().square().sum())
        self.other += self._crosstalk(rows, latent, row, value)

    def _crosstalk(self, rows: Rows, latent: Tensor, row: Tensor, value: Tensor) -> float:
        dictionary = self.stream.dictionary
        written = rows.reconstruction * dictionary.target_scale - dictionary.b_dec.float()
        if not rows.sparse:
            along = (written @ self.unit.T)[row, latent]
            return float((value * (along - value).abs()).double().sum())
        total = 0.0
        for some in torch.arange(len(row), device=row.device).split(max(1, CACHED // written.shape[1])):
            along = (written[row[some]] * self.unit[latent[some]]).sum(dim=1)
            total += float((value[some] * (along - value[some]).abs()).double().sum())
        return total

    @property
    def crosstalk(self) -> float:
        return self.other / self.square if self.square > 0 else 0.0

    def matrix(self) -> Csr:
        """z_i |W_dec_i|, (n_latents, n), each latent's rows in order."""
        raw = self.raw()
        return like(raw, raw.data * self.norms.cpu().numpy()[row_of(raw)])

    def raw(self) -> Csr:
        """The same of z_i."""
        if self.made is None:
            latent, row, value = (np.concatenate(parts) for parts in zip(*self.parts, strict=True))
            self.parts = []
            self.made = csr_array((value, (latent, row)), shape=(len(self.norms), self.n))
            self.made.sort_indices()
        return self.made


def sums_of(codes: Csr, near: Near) -> Together:
    """The sums at the pairs, in double precision, a block of pairs at a time; a pair and its reverse are counted once."""
    back, half = np.lexsort((near.i, near.j)), np.flatnonzero(near.i < near.j)
    fired = np.diff(codes.indptr).astype(np.int64)
    entry = np.arange(1, codes.nnz + 1, dtype=np.int32)
    entries, ones = like(codes, entry), like(codes, np.ones_like(entry))
    sums = np.zeros((4, len(near.i)))
    blocks = (np.cumsum(fired[near.i[half]] + fired[near.j[half]]) - 1) // EVENTS
    for pairs in np.split(half, np.flatnonzero(np.diff(blocks)) + 1):
        i, j = near.i[pairs], near.j[pairs]
        mine, theirs = csr_array(entries[i].multiply(ones[j])), csr_array(ones[i].multiply(entries[j]))  # where both fire
        z_i, z_j = (codes.data[side.data - 1].astype(np.float64) for side in (mine, theirs))
        of = row_of(mine)
        both, product, of_i, of_j, square_i, square_j = (
            np.bincount(of, values, len(pairs)) for values in (np.ones(len(of)), z_i * z_j, z_i, z_j, z_i**2, z_j**2)
        )
        sums[:, pairs] = both, product, of_i, square_j
        sums[:, back[pairs]] = both, product, of_j, square_i
    return Together(*sums)


def together(codes: Csr) -> Csr:
    """Which latents fire on which rows, (n_latents, n) ones: of as many rows as give MOST_EVENTS pairs of codes, from the first on."""
    per_row = np.bincount(codes.indices, minlength=codes.shape[1]).astype(np.int64)
    n = int(np.searchsorted(np.cumsum(per_row**2), MOST_EVENTS, side="right"))
    if n == codes.shape[1]:
        return like(codes, np.ones_like(codes.data))
    return csr_array(codes[:, :n].astype(bool).astype(np.float32))


def _possible(fires: Csr, enough: np.ndarray, least: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (inner, outer) that may be on `enough` of the inner one's rows together, a block of latents at a time.

    If an outer latent may be missing on m rows, it is there on all but m of any 2 m + LOOKED: those are counted, the pairs are few then.
    """
    fired = np.diff(fires.indptr)
    missing = fired - enough
    looked = np.where(fired >= least, np.minimum(fired, 2 * missing + LOOKED), 0)
    some = only(fires, np.arange(fires.nnz) - np.repeat(fires.indptr[:-1], fired) < np.repeat(looked, fired))
    by_row = csr_array(fires.T)
    block = ((some @ np.diff(by_row.indptr)).cumsum() - 1) // EVENTS
    for latents in np.split(np.arange(len(fired)), np.flatnonzero(np.diff(block)) + 1):
        both = csr_array(some[latents] @ by_row)
        inner, outer = latents[row_of(both)], both.indices
        kept = (both.data >= (looked - missing)[inner]) & (enough[inner] <= LOOSE * fired[outer])
        yield inner[kept], outer[kept]


class Contained(NamedTuple):
    """Latent `inner` fires on rows of `outer` alone, or nearly. Absorption breaks exactly these edges, so they are no candidates."""

    inner: int
    outer: int
    n_inner: int
    n_outer: int
    n_both: int

    @property
    def given_inner(self) -> float:
        """P(outer fires | inner fires)."""
        return self.n_both / self.n_inner

    @property
    def given_outer(self) -> float:
        """P(inner fires | outer fires)."""
        return self.n_both / self.n_outer


class Containment:
    """Pairs (inner, outer) with P(outer | inner) >= 0.95, P(inner | outer) <= 0.5, and at least twice P(outer)."""

    def __init__(self, codes: Csr, least: int, pulse: Callable[[], None]):
        fires = together(codes)
        self.n_samples, self.fired = fires.shape[1], np.diff(fires.indptr).astype(np.int64)
        self.n, self.kept = 0, np.empty((0, 3), dtype=np.int64)
        enough = np.ceil(CONTAINED * self.fired).astype(np.int64)  # counts are whole numbers
        for inner, outer in _possible(fires, enough, least):
            pulse()
            blocks = np.cumsum(self.fired[inner] + self.fired[outer]) // EVENTS
            for some in np.split(np.arange(len(inner)), np.flatnonzero(np.diff(blocks)) + 1):
                n_both = fires[inner[some]].multiply(fires[outer[some]]).sum(axis=1).astype(np.int64)
                self._add(inner[some], outer[some], n_both, enough[inner[some]])

    def _add(self, inner: np.ndarray, outer: np.ndarray, n_both: np.ndarray, enough: np.ndarray) -> None:
        inside = (n_both >= enough) & (n_both <= LOOSE * self.fired[outer])
        inside &= LIFT * self.fired[inner] * self.fired[outer] <= n_both * self.n_samples
        found = np.stack([inner, outer, n_both], axis=1)[inside]
        self.n += len(found)
        self.kept = np.concatenate([self.kept, found])
        self.kept = self.kept[np.lexsort((self.kept[:, 1], self.kept[:, 0], -self.kept[:, 2]))][:MOST]

    def best(self) -> tuple[Contained, ...]:
        return tuple(Contained(int(j), int(k), int(self.fired[j]), int(self.fired[k]), int(n)) for j, k, n in self.kept)
