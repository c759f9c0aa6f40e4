"""Logistic regressions behind `score_absorption`: a probe of each concept, and the few latents that tell it best."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

L1 = 0.01  # of the L1 regression that ranks latents, on the mean loss (Chanin et al. 2024)
STRENGTH = 10.0  # inverse L2 penalty of a probe, on rows of mean square norm 1
_KNOWN = WeakTensorKeyDictionary()  # probes of rows that were seen: training moves the weights, not the rows


@dataclass(frozen=True, eq=False)
class Probes:
    """A probe for each concept and fold, fitted on the other folds.

    direction  (n_folds, n_concepts, d_out) unit;  positive (n, n_concepts): what the probe of the row's fold says of it
    f1         (n_concepts,) on all rows, each judged by a probe that was not fitted to it
    """

    direction: Tensor
    positive: np.ndarray
    f1: np.ndarray

    @classmethod
    def known(cls, directions: Tensor, member: np.ndarray, folds: int) -> "Probes":
        """Directions that are told, and rows that are known to be of the concept."""
        return cls(directions.detach().float().cpu().expand(folds, -1, -1), member, np.ones(member.shape[1]))


def fit_probes(source: Tensor, targets: Tensor, member: np.ndarray, fold: np.ndarray, pulse: Callable[[], None]) -> Probes:
    """L2 logistic regressions of membership on the targets, once for the same rows of the same `source` tensor."""
    key = (len(targets), member.tobytes(), fold.tobytes())
    known = _KNOWN.get(source)
    if known is None or known[0] != key:
        known = _KNOWN[source] = key, _fit(targets, member, fold, pulse)
    return known[1]


def _fit(targets: Tensor, member: np.ndarray, fold: np.ndarray, pulse: Callable[[], None]) -> Probes:
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    rows = targets.double().numpy()
    mean = rows.mean(axis=0)
    rows = rows - mean
    rows = rows / max(np.sqrt(np.square(rows).sum(axis=1).mean()), np.finfo(float).tiny)
    n_folds, (n, n_concepts) = int(fold.max()) + 1, member.shape
    direction = torch.zeros(n_folds, n_concepts, rows.shape[1])
    positive = np.zeros((n, n_concepts), dtype=bool)
    with threadpool_limits(1, user_api="blas"):  # problems this small run up to a hundred times slower on threads that others use
        for k, c in product(range(n_folds), range(n_concepts)):
            pulse()
            test = fold == k
            if member[~test, c].all() or not member[~test, c].any():
                continue  # no probe, no positives
            probe = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=1_000, tol=1e-3).fit(rows[~test], member[~test, c])
            direction[k, c] = torch.from_numpy(probe.coef_[0] / np.linalg.norm(probe.coef_[0]))
            positive[test, c] = probe.predict(rows[test])
    return Probes(direction, positive, np.array([f1_score(member[:, c], positive[:, c]) for c in range(n_concepts)]))


@dataclass(frozen=True, eq=False)
class MainLatents:
    """The few latents that tell a concept best, and a logistic regression on their codes: z . weights + bias > 0."""

    latents: tuple[int, ...]
    weights: np.ndarray
    bias: float

    @classmethod
    def choose(cls, codes: sparse.csr_array, mine: np.ndarray, most: int, jump: float) -> "MainLatents":
        """k-sparse probing: the k latents with the largest weights in an L1 regression, k as long as F1 grows by `jump`."""
        from sklearn.linear_model import LogisticRegression

        if mine.all() or not mine.any():
            return cls((), np.zeros(0), 0.0)
        order, scale = rank_latents(codes, mine)[:most], _scale(codes)
        best, before = cls((), np.zeros(0), 0.0), -np.inf
        for k in range(1, len(order) + 1):
            some = codes[:, order[:k]].toarray()
            model = LogisticRegression(solver="liblinear", class_weight="balanced").fit(some / scale, mine)
            more = cls(tuple(int(i) for i in order[:k]), model.coef_[0] / scale, float(model.intercept_[0]))
            f1 = f1_score(mine, more.predict(codes))
            if f1 - before < jump:
                break
            best, before = more, f1
        return best

    def predict(self, codes: sparse.csr_array) -> np.ndarray:
        return np.asarray(self._mine(codes) @ self.weights > -self.bias)

    def fire(self, codes: sparse.csr_array) -> np.ndarray:
        """On which rows one of them fires."""
        return np.asarray((self._mine(codes) > 0).any(axis=1))

    def _mine(self, codes: sparse.csr_array) -> np.ndarray:
        return codes[:, list(self.latents)].toarray()


def rank_latents(codes: sparse.csr_array, mine: np.ndarray) -> np.ndarray:
    """Latents with a positive weight in an L1 logistic regression, the largest first; where there is none, the one whose mean code
    is most above its mean elsewhere."""
    from sklearn.linear_model import LogisticRegression

    scaled = sparse.csr_array(codes / _scale(codes))
    lasso = LogisticRegression(
        C=1 / (L1 * len(mine)), solver="liblinear", class_weight="balanced", tol=1e-4, max_iter=1_000, random_state=0
    )
    lasso.set_params(**_l1_penalty(LogisticRegression))
    weights = lasso.fit(scaled, mine).coef_[0]
    above = mine @ scaled / max(mine.sum(), 1) - ~mine @ scaled / max((~mine).sum(), 1)
    order = np.lexsort((-above, -weights))
    return order[weights[order] > 0] if weights.max() > 0 else np.array([int(above.argmax())])


def f1_score(true: np.ndarray, said: np.ndarray) -> float:
    """2 tp / (2 tp + fp + fn); 0 where nothing is positive."""
    both = int((true & said).sum())
    return 2 * both / max(int(true.sum()) + int(said.sum()), 1)


def _scale(codes: sparse.csr_array) -> float:
    """Root mean square of the codes that fire: penalties then mean the same in any unit; 1 where none fires."""
    return float(np.sqrt(np.square(codes.data).mean())) if codes.nnz else 1.0


def _l1_penalty(regression: type) -> dict:
    """scikit-learn 1.8 renamed it."""
    penalty = inspect.signature(regression).parameters.get("penalty")
    return {"penalty": "l1"} if penalty is not None and penalty.default == "l2" else {"l1_ratio": 1.0}
