"""What does a latent fire on? Random, top and quantile-stratified rows for every latent, from one pass."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.observe import Accumulator, Rows, Stream, encoded, evaluating, finding, observe
from sdl_explorer.models.dictionary import SparseDictionary

KINDS = ("random", "top", "quantile")
POOL = 4  # quantile examples are picked from a random pool of POOL * n_each firing rows
WAITING = 2**20  # entries that wait before they are cut down


class Example(NamedTuple):
    """One row on which a latent fires; `row` indexes the activations that were given."""

    kind: str
    row: int
    value: float


@dataclass(frozen=True, repr=False)
class ExampleSet:
    """Examples of all latents: latent i owns entries offsets[i]:offsets[i + 1] of `rows`, `values` and `kinds`.

    `kinds` indexes KINDS. Random rows come first: top rows alone make a latent look purer than it is. A row can appear
    under several kinds. `n_fires` counts the firing rows; `highest` is the largest activation (0 where none).
    """

    n_samples: int
    offsets: Int[np.ndarray, " n_offsets"]
    rows: Int[np.ndarray, " n_examples"]
    values: Float[np.ndarray, " n_examples"]
    kinds: Int[np.ndarray, " n_examples"]
    n_fires: Int[np.ndarray, " n_latents"]
    highest: Float[np.ndarray, " n_latents"]

    def __repr__(self) -> str:
        return f"ExampleSet({len(self.rows):,} examples of {self.n_latents:,} latents on {self.n_samples:,} rows)"

    @property
    def n_latents(self) -> int:
        return len(self.n_fires)

    def of(self, latent: int, kind: str | None = None) -> tuple[Example, ...]:
        """The examples of one latent: random in random order, top and quantile from the largest value down."""
        if not 0 <= latent < self.n_latents:
            raise ValueError(f"examples: latent {latent} does not exist; there are {self.n_latents}.")
        if kind is not None and kind not in KINDS:
            raise ValueError(f"examples: kind is {kind!r}; it is one of {', '.join(KINDS)}.")
        span = slice(self.offsets[latent], self.offsets[latent + 1])
        found = (Example(KINDS[k], int(r), float(v)) for k, r, v in zip(self.kinds[span], self.rows[span], self.values[span], strict=True))
        return tuple(e for e in found if kind in (None, e.kind))


class Reservoir:
    """For every latent the entries with the largest keys so far, at most `size`; of equal keys those that came first.

    Entries that cannot be among them any more are left out as they come; the others wait, and are cut down together.
    """

    def __init__(self, size: int, n_latents: int, device):
        self.size = size
        self.floor = torch.full((n_latents,), -torch.inf, device=device)  # the smallest key of a latent that has `size`
        nothing = torch.zeros(0, device=device)
        self.parts = [(nothing.int(), nothing, nothing.int(), nothing)]  # latent, key, row, value
        self.waiting = 0

    def add(self, latents: Tensor, keys: Tensor, rows: Tensor, values: Tensor) -> None:
        kept = (keys > self.floor[latents]).nonzero()[:, 0]
        self.parts.append((latents[kept].int(), keys[kept], rows[kept].int(), values[kept]))
        self.waiting += len(kept)
        if self.waiting > max(WAITING, len(self.parts[0][0])):
            self.settle()

    def settle(self) -> None:
        """Cut down to `size` entries each, by latent and then from the largest key down."""
        latent, key, row, value = (torch.cat(side) for side in zip(*self.parts, strict=True))
        order = key.argsort(descending=True, stable=True)
        latent, by_latent = latent[order].sort(stable=True)
        rank = _ranks(latent, len(self.floor))
        kept = (rank < self.size).nonzero()[:, 0]
        latent, rank, order = latent[kept], rank[kept], order[by_latent[kept]]
        self.parts, self.waiting = [(latent, key[order], row[order], value[order])], 0
        last = (rank == self.size - 1).nonzero()[:, 0]
        self.floor[latent[last].long()] = key[order[last]]

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """rows and values (n_latents, size), -1 and 0 where the latent fired less often."""
        self.settle()
        latent, _, row, value = (side.cpu().numpy() for side in self.parts[0])
        place = latent, _ranks(self.parts[0][0], len(self.floor)).cpu().numpy()
        rows, values = np.full((len(self.floor), self.size), -1, dtype=np.int32), np.zeros((len(self.floor), self.size), dtype=np.float32)
        rows[place], values[place] = row, value
        return rows, values


def _ranks(latent: Tensor, n_latents: int) -> Tensor:
    """The place of each entry among those of its latent, where they come by latent."""
    count = torch.bincount(latent, minlength=n_latents)
    return torch.arange(len(latent), device=latent.device) - (count.cumsum(0) - count)[latent]


class _Collector(Accumulator):
    def __init__(self, stream: Stream, *, n_each=8, seed=0):
        super().__init__(stream)
        if n_each < 1:
            raise ValueError(f"find_examples: n_each is {n_each}; it must be at least 1.")
        n_latents, device = stream.dictionary.n_latents, stream.dictionary.device
        self.n_each = n_each
        self.top = Reservoir(n_each, n_latents, device)
        self.pool = Reservoir(POOL * n_each, n_latents, device)
        # one random order of all rows: the first firing rows in it are a uniform sample for every latent
        self.order = torch.randperm(stream.activations.n, generator=torch.Generator().manual_seed(seed)).float().to(device)
        self.count = torch.zeros(n_latents, dtype=torch.int64, device=device)

    def add(self, rows: Rows) -> None:
        self.count += rows.count
        order = self.order[rows.start : rows.start + rows.n]
        if rows.sparse:
            latent, row, value = rows.entries
            self.top.add(latent, value, row + rows.start, value)
            self.pool.add(latent, order[row], row + rows.start, value)
            return
        for reservoir, keys in ((self.top, rows.codes), (self.pool, order[:, None].expand_as(rows.codes))):
            row, latent = (rows.fired & (keys > reservoir.floor)).nonzero(as_tuple=True)
            reservoir.add(latent, keys[row, latent], row + rows.start, rows.codes[row, latent])

    def result(self) -> ExampleSet:
        top_rows, top_values = self.top.arrays()
        pool_rows, pool_values = self.pool.arrays()
        random = pool_rows[:, : self.n_each], pool_values[:, : self.n_each]
        parts = (random, (top_rows, top_values), _strata(pool_rows, pool_values, self.n_each))
        rows, values = (np.concatenate(side, axis=1) for side in zip(*parts, strict=True))
        kinds = np.broadcast_to(np.repeat(np.arange(3, dtype=np.int8), [part[0].shape[1] for part in parts]), rows.shape)
        there = rows >= 0
        return ExampleSet(
            n_samples=self.stream.activations.n,
            offsets=np.concatenate([[0], there.sum(axis=1).cumsum()]),
            rows=rows[there],
            values=values[there],
            kinds=kinds[there],
            n_fires=self.count.cpu().numpy(),
            highest=top_values[:, 0],
        )


@finding(_Collector)
def find_examples(dictionary: SparseDictionary, activations: Activations, n_each: int = 8, seed: int = 0) -> ExampleSet:
    """Up to `n_each` random, top and quantile-stratified firing rows for every latent.

    random: uniform over the rows on which the latent fires (1e-6 |W_enc_i| |x| or more), the fair picture;
    top: the largest activations; quantile: one row from each of n_each equal shares of the activations, taken from
    a random pool of 4 n_each firing rows. Rows index `activations`; values are raw codes z_i. A latent that fires
    on fewer rows has fewer examples. Memory is n_latents * 5 n_each while it runs. Deterministic in `seed`.

    Raises ValueError for n_each < 1 and for what `observe` refuses. The three kinds follow Bills et al. 2023 and
    Gao et al. 2024 (arXiv 2406.04093, feature viewer).
    """
    return observe(dictionary, activations, [(find_examples, {"n_each": n_each, "seed": seed})])[0]


def activations_of(dictionary: SparseDictionary, activations: Activations, latent: int, rows) -> Float[np.ndarray, " n_rows"]:
    """z of one latent on the given rows, 0 where it does not fire: what tints the tokens around an example."""
    if not 0 <= latent < dictionary.n_latents:
        raise ValueError(f"activations_of: latent {latent} does not exist; there are {dictionary.n_latents}.")
    chosen = activations.take(np.asarray(rows, dtype=np.int64))
    with evaluating(dictionary):
        which = torch.tensor([latent], device=dictionary.device)
        parts = [block.codes_of(which)[:, 0].cpu() for block in encoded(dictionary, chosen)]
    return torch.cat(parts).numpy() if parts else np.zeros(0, dtype=np.float32)


def _strata(rows: np.ndarray, values: np.ndarray, n_each: int) -> tuple[np.ndarray, np.ndarray]:
    """The middle row of each of n_each equal shares of a latent's pool, from the largest value down."""
    order = np.argsort(np.where(rows >= 0, -values, np.inf), axis=1, kind="stable")
    filled = (rows >= 0).sum(axis=1, keepdims=True)
    picks = np.minimum(n_each, filled)  # fewer firing rows than shares: each row once
    share = np.arange(min(n_each, rows.shape[1]))
    place = np.minimum(((share + 0.5) * filled / np.maximum(picks, 1)).astype(int), np.maximum(filled - 1, 0))
    chosen = np.take_along_axis(order, place, axis=1)
    picked = np.take_along_axis(rows, chosen, axis=1)
    return np.where(share < picks, picked, -1), np.take_along_axis(values, chosen, axis=1)
