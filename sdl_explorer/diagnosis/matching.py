"""One latent per feature: maximum-weight one-to-one matching on cosines that arrive in blocks of latents."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

DENSE_CELLS = 20_000_000
CANDIDATES = 64


class Matcher:
    """Collects cosines (n_features, b) and solves for the assignment with the largest sum.

    Up to DENSE_CELLS cells on the whole matrix (Hungarian method, Kuhn 1955); above on each feature's CANDIDATES
    best latents and one dummy per feature, so that a solution always exists; `note` says which. A feature on its
    dummy, or one of more features than latents, is matched to -1. `signs`: for signed cosines, absolute ones, or both.
    """

    def __init__(
        self,
        n_features: int,
        n_latents: int,
        device,
        candidates: int = CANDIDATES,
        dense_cells: int = DENSE_CELLS,
        signs: tuple[bool, ...] = (True, False),
    ):
        self.shape, self.candidates = (n_features, n_latents), candidates
        self.note, self.whole, self.kept = "", None, {}
        if n_features * n_latents <= dense_cells:
            self.whole = np.empty(self.shape, dtype=np.float32)
            return
        self.note = (
            f"matching ran on each feature's {candidates} best latents: {n_features:,} x {n_latents:,} cells are more than {dense_cells:,}"
        )
        empty = torch.zeros(n_features, 0, device=device)
        self.kept = {signed: (empty, empty.long()) for signed in signs}

    def add(self, cosines: Tensor, latents: Tensor) -> None:
        if self.whole is not None:
            self.whole[:, latents.cpu().numpy()] = cosines.cpu().numpy()
            return
        for signed, (values, ids) in self.kept.items():
            new = cosines if signed else cosines.abs()
            top, at = new.topk(min(self.candidates, new.shape[1]), dim=1)
            values, ids = torch.cat([values, top], dim=1), torch.cat([ids, latents[at]], dim=1)
            values, at = values.topk(min(self.candidates, values.shape[1]), dim=1)
            self.kept[signed] = (values, ids.gather(1, at))

    def solve(self, signed: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Each feature's latent (int, -1 for none) and the cosine of the pair (0 for none)."""
        return self._sparse(signed) if self.whole is None else self._dense(self.whole, signed)

    def _dense(self, scores: np.ndarray, signed: bool):
        costs = scores.astype(np.float64)  # the solver's own type, signs turned here: it makes no further copy
        np.negative(costs if signed else np.abs(costs, out=costs), out=costs)
        rows, columns = linear_sum_assignment(costs)
        return self._result(rows, columns, -costs[rows, columns])

    def _sparse(self, signed: bool):
        values, ids = (part.cpu().numpy() for part in self.kept[signed])
        n_features, k = values.shape
        used, columns = np.unique(ids, return_inverse=True)
        dummies = len(used) + np.arange(n_features)
        # the solver minimises over non-zero weights: a pair costs 2 - cos, in [1, 3], and a dummy more than any pair
        # (indices of 32 bits: older versions of scipy solve on no others)
        costs = np.concatenate([2.0 - values, np.full((n_features, 1), 4.0)], axis=1)
        places = np.concatenate([columns.reshape(n_features, k), dummies[:, None]], axis=1).astype(np.int32)
        offsets = np.arange(n_features + 1, dtype=np.int32) * (k + 1)
        graph = csr_array((costs.ravel(), places.ravel(), offsets), shape=(n_features, len(used) + n_features))
        rows, chosen = min_weight_full_bipartite_matching(graph)
        real = chosen < len(used)
        rows, chosen = rows[real], chosen[real]
        return self._result(rows, used[chosen], 2.0 - np.asarray(graph[rows, chosen]).ravel())

    def _result(self, rows, latents, cosines):
        latent, cosine = np.full(self.shape[0], -1, dtype=np.int64), np.zeros(self.shape[0], dtype=np.float32)
        latent[rows], cosine[rows] = latents, cosines
        return latent, cosine
