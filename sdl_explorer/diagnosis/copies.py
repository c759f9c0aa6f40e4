"""The nearest other row of each row, and clusters of near-identical ones, in blocks: no matrix of all cosines."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from sdl_explorer.diagnosis.cosines import CELLS, unit

ROUNDING = 1e-6  # a cosine that equals the threshold counts, whatever its rounding


class Nearest(NamedTuple):
    """One entry per row; rows that were left out have twin -1, cosine 0, cluster -1.

    twin, cosine  the nearest other row and the signed cosine with it
    cluster       rows joined by cosines of at least the threshold, numbered by their first row; -1 for a row by itself
    coherence     mean |cos| over pairs of rows
    """

    twin: Int[np.ndarray, " n"]
    cosine: Float[np.ndarray, " n"]
    cluster: Int[np.ndarray, " n"]
    coherence: float


def nearest_others(rows: Tensor, chosen: Tensor, threshold: float) -> Nearest:
    """Among the chosen rows, given by id."""
    n, m, directions = len(rows), len(chosen), unit(rows[chosen])
    if m < 2:
        return Nearest(np.full(n, -1), np.zeros(n), np.full(n, -1), 0.0)
    nearest, cosine, group = np.full(m, -1), np.zeros(m), np.arange(m)
    total = 0.0
    for block in torch.arange(m, device=rows.device).split(max(1, CELLS // m)):
        cosines = directions[block] @ directions.T
        own = torch.arange(len(block), device=rows.device), block
        total += float(torch.linalg.vector_norm(cosines, 1, dim=1).double().sum() - cosines[own].double().sum())
        cosines[own] = -torch.inf
        top, at = cosines.max(dim=1)
        where = block.cpu().numpy()
        nearest[where], cosine[where] = at.cpu().numpy(), top.clamp(-1, 1).cpu().numpy()
        if float(top.max()) >= threshold - ROUNDING:
            line, other = (part.cpu().numpy() for part in (cosines >= threshold - ROUNDING).nonzero(as_tuple=True))
            group = _joined(group, where[line], other)
    found = Nearest(np.full(n, -1), np.zeros(n), np.full(n, -1), max(total, 0.0) / (m * (m - 1)))
    ids = chosen.cpu().numpy()
    found.twin[ids], found.cosine[ids], found.cluster[ids] = ids[nearest], cosine, _numbered(group)
    return found


def _joined(group: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The groups after joining those of each pair (left, right)."""
    m = len(group)
    _, first, inverse = np.unique(group, return_index=True, return_inverse=True)
    edges = np.concatenate([np.arange(m), left]), np.concatenate([first[inverse], right])
    return connected_components(coo_array((np.ones(len(edges[0]), dtype=bool), edges), shape=(m, m)), directed=False)[1]


def _numbered(group: np.ndarray) -> np.ndarray:
    """Groups of two or more as 0, 1, ... in the order of their first member, others -1."""
    _, first, inverse, count = np.unique(group, return_index=True, return_inverse=True, return_counts=True)
    several = count > 1
    order = np.full(len(first), -1)
    order[np.flatnonzero(several)[np.argsort(first[several])]] = np.arange(several.sum())
    return order[inverse]
