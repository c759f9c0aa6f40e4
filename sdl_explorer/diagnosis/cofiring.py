"""Which true features are active when a latent fires: sparse counts, so that a million features fit."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array, hstack, vstack
from torch import Tensor

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.directions import Directions, directions_of
from sdl_explorer.diagnosis.observe import Accumulator, Rows, Stream
from sdl_explorer.diagnosis.sparse import Csr, like
from sdl_explorer.models.dictionary import SparseDictionary

PAIRS = 2**23  # latent-feature pairs that wait before they are added up
STRIPS = 32
DENSE = 1_000  # a pair in a sparse product takes that much longer than one of latent, feature and row in a dense one
MOST_CELLS = 2**26  # n_latents * n_features up to which there are dense products


class Together(NamedTuple):
    """Counts over n rows. CSR matrices are (n_latents, n_features) and hold the pairs that occurred.

    count[i, k]  rows on which latent i fires and feature k is active
    total[i, k]  sum of codes_k over those rows
    fired (n_latents,), active (n_features,)  rows of each alone;  strength (n_features,)  sum of codes_k over all rows
    """

    n: int
    count: Csr
    total: Csr
    fired: Int[np.ndarray, " n_latents"]
    active: Int[np.ndarray, " n_features"]
    strength: Float[np.ndarray, " n_features"]


def strips(n: int) -> list[slice]:
    """Rows of a large sparse matrix, a few at a time."""
    return [slice(a, b) for a, b in pairwise(np.unique(np.linspace(0, n, STRIPS + 1).astype(int)).tolist())]


class CoFiring(Accumulator):
    """Collects `Together`, and the activations of each feature. Needs the true codes.

    Held: the pairs that occurred, and one number for each activation of a feature.
    """

    def __init__(self, stream: Stream):
        super().__init__(stream)
        self.codes, self.n_latents = true_codes(stream.activations), stream.dictionary.n_latents
        self.n_features = self.codes.shape[1]
        self.n, self.fired = 0, np.zeros(self.n_latents, dtype=np.int64)
        # in strips of latents, so that adding to one takes little room
        self.strips = strips(self.n_latents)
        self.both: list[Csr] = [csr_array((s.stop - s.start, self.n_features), dtype=np.complex64) for s in self.strips]
        self.entries: list[tuple[np.ndarray, np.ndarray]] = []  # (feature, value) of every active code
        self.waiting: list[tuple[Csr, Csr]] = []
        self.pairs = 0
        self.dense: tuple[Tensor, Tensor] | None = None  # total and count of the blocks in which most latents fire
        self.done: Together | None = None

    def add(self, rows: Rows) -> None:
        codes = self.codes[rows.start : rows.start + rows.n]
        where = codes > 0
        line, feature = (part.cpu().numpy() for part in where.nonzero(as_tuple=True))
        value = codes[where].float().cpu().numpy()
        self.n += rows.n
        self.fired += rows.count.cpu().numpy()
        self.entries.append((feature.astype(np.int32), value))
        n_active = np.bincount(line, minlength=rows.n)
        if not rows.sparse and self._many(int((rows.fired.sum(dim=1).cpu().numpy() * n_active).sum()), rows.n):
            self._add_dense(rows, codes)
            return
        latent, row, _ = (part.cpu().numpy() for part in rows.entries)
        # one product gives both sums: the code in the real part, the count in the imaginary one
        fires = csr_array((np.ones(len(row), dtype=np.complex64), (latent, row)), shape=(self.n_latents, rows.n))
        active = csr_array((value + np.complex64(1j), (line, feature)), shape=(rows.n, self.n_features))
        self.waiting.append((fires, active))
        self.pairs += int(np.bincount(row, minlength=rows.n) @ n_active)
        if self.pairs >= PAIRS:
            self._flush()

    def _many(self, pairs: int, n: int) -> bool:
        cells = self.n_latents * self.n_features
        return cells <= MOST_CELLS and DENSE * pairs > n * cells

    def _add_dense(self, rows: Rows, codes: Tensor) -> None:
        fires, codes = rows.fired.float(), codes.to(rows.fired.device).float().relu()
        if self.dense is None:
            self.dense = fires.new_zeros(self.n_latents, self.n_features), fires.new_zeros(self.n_latents, self.n_features)
        for sums, values in zip(self.dense, (codes, (codes > 0).float()), strict=True):
            sums.addmm_(fires.T, values)

    def result(self) -> Together:
        if self.done is None:
            self._flush()
            self._gather()
            feature, value = self._active()
            count, total = self._matrices()
            self.done = Together(
                n=self.n,
                count=count,
                total=total,
                fired=self.fired,
                active=np.bincount(feature, minlength=self.n_features),
                strength=np.bincount(feature, weights=value, minlength=self.n_features),
            )
        return self.done

    def _matrices(self) -> tuple[Csr, Csr]:
        """Count and total, which share their index arrays; the strips make room for them."""
        ends = np.concatenate([[0], np.cumsum([strip.nnz for strip in self.both])])
        indices = np.empty(ends[-1], dtype=np.int32)
        counts, totals = np.empty((2, ends[-1]), dtype=np.float32)
        indptr = [np.zeros(1, dtype=np.int64)]
        for start, stop in pairwise(ends):
            strip = self.both.pop(0)
            strip.sort_indices()
            indptr.append(strip.indptr[1:] + start)
            indices[start:stop], counts[start:stop], totals[start:stop] = strip.indices, strip.data.imag, strip.data.real
        places = np.concatenate(indptr)
        places = places.astype(np.int32) if ends[-1] < 2**31 else places
        count: Csr = csr_array((counts, indices, places), shape=(self.n_latents, self.n_features))
        return count, like(count, totals)

    def magnitudes(self, n_levels: int) -> Float[np.ndarray, "n_levels n_features"]:
        """The middles of n_levels equal shares of each feature's activations, from the smallest up; 1 where it was never active."""
        feature, value = self._active()
        value = value[np.lexsort((value, feature))]
        active = np.bincount(feature, minlength=self.n_features)
        first = active.cumsum() - active
        share = (np.arange(n_levels)[:, None] + 0.5) / n_levels
        place = np.minimum(first + (share * active).astype(np.int64), max(len(value) - 1, 0))
        return np.where(active > 0, value[place] if len(value) else np.ones(place.shape), 1.0).astype(np.float32)

    def _active(self) -> tuple[np.ndarray, np.ndarray]:
        features, values = zip(*self.entries, strict=True)
        self.entries = [(np.concatenate(features), np.concatenate(values))]
        return self.entries[0]

    def _flush(self) -> None:
        if self.waiting:
            fires: Csr = csr_array(hstack([fires for fires, _ in self.waiting], format="csr"))
            active: Csr = csr_array(vstack([active for _, active in self.waiting], format="csr"))
            for i, strip in enumerate(self.strips):
                self.both[i] = self.both[i] + fires[strip] @ active
        self.waiting, self.pairs = [], 0

    def _gather(self) -> None:
        """What is in dense sums, to the rest."""
        if self.dense is not None:
            for i, strip in enumerate(self.strips):
                total, count = (side[strip].cpu().numpy() for side in self.dense)
                self.both[i] = self.both[i] + csr_array(total + np.complex64(1j) * count)
            self.dense = None


def true_codes(activations: Activations) -> Float[Tensor, "n n_features"]:
    """The features' activations in every row."""
    if activations.truth is None:
        raise ValueError("true_codes: these activations have none (truth=None). Use LinearBench or HierarchyBench.")
    return activations.truth.codes


def true_directions(activations: Activations, dictionary: SparseDictionary, finding: str) -> Directions:
    """The true features, or an error that says what to do without them."""
    if activations.truth is None:
        raise ValueError(
            f"{finding} compares with true features, and these activations have none (truth=None). Use LinearBench or "
            "HierarchyBench, or call check_health, which needs no truth."
        )
    return directions_of(activations, dictionary)
