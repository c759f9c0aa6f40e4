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


class Example(NamedTuple):
    """One row on which a latent fires; `row` indexes the activations that were given."""

    kind: str
    row: int
    value: float


@dataclass(frozen=True)
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


class _Reservoir:
    """For every latent the rows with the largest keys so far, at most `size`: (size, n_latents), key -inf where empty."""

    def __init__(self, size: int, n_latents: int, device):
        self.size = size
        self.keys = torch.empty(0, n_latents, device=device)
        self.rows = torch.empty(0, n_latents, dtype=torch.int32, device=device)
        self.values = torch.empty(0, n_latents, device=device)

    def add(self, keys: Tensor, codes: Tensor, start: int) -> None:
        keys, at = keys.topk(min(self.size, len(keys)), dim=0)
        rows, values = (at + start).int(), codes.gather(0, at)
        keys = torch.cat([self.keys, keys])
        self.keys, at = keys.topk(min(self.size, len(keys)), dim=0)
        self.rows = torch.cat([self.rows, rows]).gather(0, at)
        self.values = torch.cat([self.values, values]).gather(0, at)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """rows and values (n_latents, size), -1 and 0 where the latent fired less often."""
        empty = self.keys == -torch.inf
        rows, values = self.rows.masked_fill(empty, -1), self.values.masked_fill(empty, 0)
        return rows.T.cpu().numpy(), values.T.cpu().numpy()


class _Collector(Accumulator):
    def __init__(self, stream: Stream, *, n_each=8, seed=0):
        super().__init__(stream)
        if n_each < 1:
            raise ValueError(f"find_examples: n_each is {n_each}; it must be at least 1.")
        n_latents, device = stream.dictionary.n_latents, stream.dictionary.device
        self.n_each = n_each
        self.top = _Reservoir(n_each, n_latents, device)
        self.pool = _Reservoir(POOL * n_each, n_latents, device)
        # one random order of all rows: the first firing rows in it are a uniform sample for every latent
        self.order = torch.randperm(stream.activations.n, generator=torch.Generator().manual_seed(seed)).float().to(device)
        self.count = torch.zeros(n_latents, dtype=torch.int64, device=device)

    def add(self, rows: Rows) -> None:
        order = self.order[rows.start : rows.start + rows.n, None]
        self.count += rows.count
        self.top.add(torch.where(rows.fired, rows.codes, -torch.inf), rows.codes, rows.start)
        self.pool.add(torch.where(rows.fired, order, -torch.inf), rows.codes, rows.start)

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
        parts = [block.codes[:, latent].cpu() for block in encoded(dictionary, chosen)]
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
