"""Which feature is behind each firing of a latent, and how strongly the latent fires for it."""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array, vstack

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.candidates_pairs import Codes
from sdl_explorer.diagnosis.cofiring import true_codes, true_directions
from sdl_explorer.diagnosis.cosines import CELLS
from sdl_explorer.diagnosis.observe import MOST_ROWS, Accumulator, Rows, Stream, finding, observe
from sdl_explorer.diagnosis.sparse import Csr
from sdl_explorer.models.dictionary import SparseDictionary

TERMS = 2**19  # features of rows that are weighed together
LAST = 2**31 - 1  # id of a feature


class Ridges(NamedTuple):
    """Histograms of a latent's codes by cause, with shared bins, most rows first.

    edges (n_bins + 1,);  features (k,), -1 where no feature adds, and -2 for all further ones together;  counts (k, n_bins) rows
    """

    edges: np.ndarray
    features: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Causes:
    """The m rows on which a latent fires: their place in the activations, its code, the feature that adds most to its
    pre-activation there (-1: none adds), and that feature's share of what all add. Without truth, `names` is empty and every
    feature is -1: the causes are unknown. Where the truth is not complete the rest of the row is one more feature, and its number -1.
    """

    latent: int
    n_samples: int
    names: tuple[str, ...]
    row: Int[np.ndarray, " m"]
    value: Float[np.ndarray, " m"]
    feature: Int[np.ndarray, " m"]
    share: Float[np.ndarray, " m"]

    def values_of(self, feature: int) -> Float[np.ndarray, " n_rows"]:
        """The codes on the rows that this feature is behind: two features with two humps are two meanings."""
        return self.value[self.feature == feature]

    def ridges(self, n_bins: int = 24, most: int = 6) -> Ridges:
        """How strongly it fires for each cause; equal bins from 0 to the largest code. The `most` commonest features stand alone."""
        edges = np.linspace(0, float(self.value.max(initial=0.0)) or 1.0, n_bins + 1)
        real, rows = np.unique(self.feature[self.feature >= 0], return_counts=True)
        alone = real[np.lexsort((real, -rows))][:most]
        cause = np.where((self.feature < 0) | np.isin(self.feature, alone), self.feature, -2)
        features = np.array([*alone, *(c for c in (-2, -1) if (cause == c).any())], dtype=np.int64)
        counts = np.array([np.histogram(self.value[cause == c], edges)[0] for c in features], dtype=np.int64)
        return Ridges(edges, features, counts.reshape(len(features), n_bins))


@dataclass(frozen=True, repr=False)
class AllCauses:
    """`Causes` of every latent: latent i owns entries offsets[i]:offsets[i + 1] of the other arrays. Rows are read until 2**23 codes
    have fired; `n_samples` says how many that were."""

    n_samples: int
    names: tuple[str, ...]
    offsets: Int[np.ndarray, " n_offsets"]
    row: Int[np.ndarray, " n_codes"]
    value: Float[np.ndarray, " n_codes"]
    feature: Int[np.ndarray, " n_codes"]
    share: Float[np.ndarray, " n_codes"]

    n_latents = property(lambda self: len(self.offsets) - 1, doc="Latents traced.")

    def of(self, latent: int) -> Causes:
        """What `trace_causes` says of one latent."""
        _check(latent, self.n_latents)
        span = slice(self.offsets[latent], self.offsets[latent + 1])
        return Causes(latent, self.n_samples, self.names, self.row[span], self.value[span], self.feature[span], self.share[span])

    def __repr__(self) -> str:
        return f"AllCauses({len(self.row):,} codes of {self.n_latents:,} latents on {self.n_samples:,} rows)"


class _Tracer(Accumulator):
    def __init__(self, stream: Stream, *, latent=None):
        super().__init__(stream)
        n_latents, truth = stream.dictionary.n_latents, stream.activations.truth
        self.features = None if truth is None else true_directions(stream.activations, stream.dictionary, "trace_causes")
        self.latent, self.n = latent, 0
        if latent is None:
            self.codes = stream.share(Codes)
        else:
            _check(latent, n_latents)
            self.parts: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, rows: Rows) -> None:
        if self.latent is None:
            return
        first = int(rows.count[: self.latent].sum())
        row, value = (part[first : first + int(rows.count[self.latent])] for part in rows.entries[1:])
        self.parts.append(((row + rows.start).int().cpu().numpy(), value.cpu().numpy()))
        self.n += rows.n

    def result(self) -> "Causes | AllCauses":
        names = () if self.features is None else self.features.names
        if self.latent is None:
            codes = self.codes.raw()
            behind = self._behind(np.arange(codes.shape[0]), codes.indptr, codes.indices)
            return AllCauses(self.codes.n, names, codes.indptr, codes.indices, codes.data, *behind)
        row, value = (np.concatenate(parts) for parts in zip(*self.parts, strict=True))
        return Causes(self.latent, self.n, names, row, value, *self._behind(np.array([self.latent]), np.array([0, len(row)]), row))

    def _behind(self, latents: np.ndarray, offsets: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Feature and share of every entry; latents[i] fires on the rows row[offsets[i]:offsets[i + 1]]."""
        feature, share = np.full(len(row), -1, dtype=np.int32), np.zeros(len(row), dtype=np.float32)
        if self.features is None or len(row) == 0:
            return feature, share
        activations, directions, rest = self.stream.activations, self.features.inputs, self._rest()
        active, place = _active(true_codes(activations), row)
        size = 1 if rest is None else activations.inputs.shape[1]
        terms = np.concatenate([[0], np.cumsum(np.diff(active.indptr)[place[row]] + size)])
        for some in np.array_split(np.arange(len(latents)), -(-len(latents) * len(directions) // CELLS)):
            reads = self.stream.dictionary.W_enc[torch.as_tensor(latents[some])].detach().float()
            overlap = (reads @ directions.T).cpu().numpy()
            ends = offsets[some[0] : some[-1] + 2]
            own = np.repeat(np.arange(len(some)), np.diff(ends))
            steps = np.arange(int(terms[ends[0]]), int(terms[ends[-1]]), TERMS)
            for a, b in pairwise(np.unique([ends[0], *np.searchsorted(terms, steps), ends[-1]])):
                lines, rows = own[a - ends[0] : b - ends[0]], row[a:b]
                left = 0.0 if rest is None else ((activations.inputs[rows].cpu().float() + rest) * reads.cpu()[lines]).sum(dim=1).numpy()
                feature[a:b], share[a:b] = _largest(active, place[rows], overlap, lines, left, whole=rest is None)
            self.stream.pulse()
        return feature, share

    def _rest(self) -> torch.Tensor | None:
        """What to add to a row so that its features on average leave nothing of it; None where they are all there is."""
        truth = self.stream.activations.truth
        if truth is None or truth.complete:
            return None
        return truth.codes.mean(dim=0).cpu().float() @ truth.input_features.cpu().float() - self.stream.input_mean.cpu()


@finding(_Tracer)
def trace_causes(dictionary: SparseDictionary, activations: Activations, latent: int | None = None) -> Causes | AllCauses:
    """The feature behind each row on which a latent fires, argmax_k relu(codes_k <W_enc_latent, w_p^k>); None: of every latent.

    Without true features the rows and codes are there, and every cause is -1. Raises ValueError for a latent that does not
    exist, and for what `observe` refuses.
    """
    return observe(dictionary, activations, [(trace_causes, {"latent": latent})])[0]


def _active(codes: torch.Tensor, row: np.ndarray) -> tuple[Csr, np.ndarray]:
    """The true codes of the rows that occur, (m, n_features), and each row's place among them."""
    seen = np.zeros(len(codes), dtype=bool)
    seen[row] = True
    parts = torch.as_tensor(np.flatnonzero(seen)).to(codes.device).split(MOST_ROWS)
    return vstack([csr_array(codes[part].float().cpu().numpy()) for part in parts], format="csr"), seen.cumsum() - 1


def _largest(
    active: Csr, row: np.ndarray, overlap: np.ndarray, line: np.ndarray, left: np.ndarray | float, whole: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The feature that adds most to each pre-activation, -1 where none does or the rest of the row adds more, and its share of all that
    adds. Entries are (row, line of `overlap`); `left` is the whole row's part, of which the features' is taken, unless they are `whole`.
    """
    count = np.diff(active.indptr)[row]
    first, some = count.cumsum() - count, np.flatnonzero(count)
    place = np.arange(count.sum()) + np.repeat(active.indptr[row] - first, count)
    feature = active.indices[place]
    added = active.data[place] * overlap[np.repeat(line, count), feature]
    drive = np.maximum(added, np.float32(0))
    largest, total, all_of_it = np.zeros((3, len(row)), dtype=np.float32)
    cause = np.full(len(row), -1, dtype=np.int32)
    if len(some):
        # floats from 0 up are in the order of their bits: one maximum gives the drive and the first feature that has it
        best = np.maximum.reduceat((drive.view(np.int32).astype(np.int64) << 32) | (LAST - feature), first[some])
        largest[some], cause[some] = (best >> 32).astype(np.int32).view(np.float32), LAST - (best & LAST)
        total[some], all_of_it[some] = np.add.reduceat(drive, first[some]), np.add.reduceat(added, first[some])
    rest = 0 if whole else np.maximum(left - all_of_it, 0)
    return np.where(largest > rest, cause, -1), largest / np.where(largest > 0, total + rest, 1)


def _check(latent: int, n_latents: int) -> None:
    if not 0 <= latent < n_latents:
        raise ValueError(f"trace_causes: latent {latent} does not exist; there are {n_latents}.")
