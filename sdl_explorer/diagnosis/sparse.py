"""CSR matrices (n_latents, n_features) of what was seen: small tools that share index arrays."""

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor

CELLS = 2**22  # overlaps in a block

if TYPE_CHECKING:
    Csr: TypeAlias = Any  # scipy has no types, and those that pyright guesses are wrong
else:
    Csr = csr_array


def like(pattern: Csr, data: np.ndarray) -> Csr:
    """A matrix with other values at the same places; the index arrays are shared."""
    return csr_array((data, pattern.indices, pattern.indptr), shape=pattern.shape)


def only(matrix: Csr, kept: np.ndarray) -> Csr:
    """The entries under a mask, as a matrix of its own."""
    ends = np.concatenate([[0], np.cumsum(_by_row(matrix, np.add, kept, np.int64))])
    return csr_array((matrix.data[kept], matrix.indices[kept], ends.astype(matrix.indptr.dtype)), shape=matrix.shape)


def row_of(matrix: Csr) -> Int[np.ndarray, " n_entries"]:
    """The row of each stored entry."""
    return np.repeat(np.arange(matrix.shape[0], dtype=np.int32), np.diff(matrix.indptr))


def row_sums(matrix: Csr) -> Float[np.ndarray, " n_rows"]:
    """Sums of the stored values of each row, in double precision."""
    return _by_row(matrix, np.add, matrix.data, np.float64)


def row_maxima(matrix: Csr) -> Float[np.ndarray, " n_rows"]:
    """The largest stored value of each row, 0 where there is none; values are >= 0."""
    return _by_row(matrix, np.maximum, matrix.data, np.float64)


def _by_row(matrix: Csr, reduce: np.ufunc, values: np.ndarray, dtype) -> np.ndarray:
    """The values of each row's entries, reduced to one; 0 where there are none."""
    some, out = np.flatnonzero(np.diff(matrix.indptr)), np.zeros(matrix.shape[0], dtype=dtype)
    if len(some):
        out[some] = reduce.reduceat(values, matrix.indptr[some], dtype=dtype)
    return out


def overlaps(rows: Float[Tensor, "n_latents d"], directions: Float[Tensor, "n_features d"], pattern: Csr) -> np.ndarray:
    """<rows_i, directions_k> at the entries of a matrix, a block of latents at a time."""
    data = np.empty(pattern.nnz, dtype=np.float32)
    place = np.zeros(pattern.shape[1], dtype=np.int64)
    n, start = pattern.shape[0], 0
    while start < n:
        # the features that occur among these latents alone: few rows of data touch few of a million
        stop = max(start + 1, min(n, start + max(1, CELLS // pattern.shape[1])))
        span = slice(pattern.indptr[start], pattern.indptr[stop])
        columns = pattern.indices[span]
        there = np.zeros(pattern.shape[1], dtype=bool)
        there[columns] = True
        used = np.flatnonzero(there)
        place[used] = np.arange(len(used))
        block = (rows[start:stop].float() @ directions[torch.as_tensor(used, device=directions.device)].T).cpu().numpy()
        lines = np.repeat(np.arange(stop - start), np.diff(pattern.indptr[start : stop + 1]))
        data[span] = block[lines, place[columns]]
        start = stop
    return data
