"""Is there an encoder with exactly these sets F_i? A linear programme, its witness, or a proof that there is none."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import linprog
from scipy.sparse import csr_array, issparse
from torch import Tensor

from sdl_explorer.diagnosis.alone import respond_alone
from sdl_explorer.diagnosis.sparse import Csr
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.methods.relu import Rectified
from sdl_explorer.models.methods.topk import TopKSelection

SLACK = 1e-6  # a margin below it is zero: the solver's own tolerance is 1e-7
PROOF = 1e-6  # largest residual of a certificate that proves anything
LARGEST = 20_000_000  # stored numbers of one programme


@dataclass(frozen=True, repr=False)
class Realisation:
    """What `realise` found.

    verdict      "realisable": `W_enc`, `b_enc` have exactly these sets, which running them has shown; "not realisable": `certificate`
                 proves it; "too close to call": the margin is below what single precision tells apart
    margin       smallest distance of a pre-activation from where it would change the sets, over the longest encoder row. Zero where a
                 silent pair has to sit exactly on the border
    border       whether it takes such pairs
    impossible   mask of the latents whose own set has no encoder row (all of them where Top-k's competition is what fails)
    certificate  weights y >= 0 (n_latents, n_features), one a requirement: firing pairs (+) and silent ones (-). For each of its latents
                 the features weighted by y over the firing ones sum to what y over the silent ones gives
    residual     how far the certificate is from exact; reason   the verdict in a sentence
    """

    verdict: str
    reason: str
    margin: float
    border: bool
    impossible: Bool[np.ndarray, " n_latents"]
    W_enc: Float[np.ndarray, "n_latents d_in"]
    b_enc: Float[np.ndarray, " n_latents"]
    certificate: Csr
    residual: float
    threshold: float
    k: int | None

    realisable = property(lambda self: self.verdict == "realisable", doc="Whether a witness was found and verified.")

    def __repr__(self) -> str:
        n_latents, n_features = self.certificate.shape
        return f"Realisation({self.verdict}: {n_latents} sets among {n_features} features, margin {self.margin:.3g}; {self.reason})"

    def dictionary(self, W_dec: Float[Tensor, "n_latents d_out"] | None = None) -> SparseDictionary:
        """The witness as a dictionary; its decoder rows are those given, or its own encoder rows."""
        return _dictionary(torch.as_tensor(self.W_enc), torch.as_tensor(self.b_enc), W_dec, self.k, self.threshold)


@dataclass(frozen=True)
class _Solved:
    t: float
    rows: np.ndarray  # (n, d)
    shift: np.ndarray  # (n,): pre-activations are compared with it
    multipliers: np.ndarray  # (n, n_features), >= 0
    residual: float


def realise(pattern, features, *, k: int | None = None, threshold: float = 0.0, bias: bool = False) -> Realisation:
    """Whether some encoder has F_i = {d : z_i > 0 on feature d alone at unit strength} for every latent, with the widest margin.

        firing:  <W_enc_i, w_d> + b_i > threshold        silent:  <W_enc_i, w_d> + b_i <= threshold

    ReLU with threshold=0, JumpReLU above; `bias` lets b differ from zero. Latents then do not meet, and each has a programme of its
    own. With `k` (Top-k, then ReLU) they compete: a feature that fires k latents may leave the others positive below them, one that
    fires fewer may leave none positive, and none fires more than k. The margin is maximised by HiGHS over |W_enc| <= 1; where it is
    zero, silent pairs are let onto the border; where it is zero still, the multipliers are the proof (Motzkin 1936): a
    non-negative combination of firing features equals one of silent features.

    `pattern`: the sets, as a boolean matrix (n_latents, n_features), dense or sparse, or a sequence of sets of ids. `features`
    (n_features, d_in). The witness is run before it is reported. It says nothing about losses or about where training goes.
    Raises ValueError for shapes and settings that do not fit. Patterns: arXiv 2512.05534, equations 13 and 20.
    """
    features = torch.as_tensor(features).detach().cpu().double().numpy()
    wanted = _wanted(pattern, len(features))
    threshold = float(threshold)
    _check(wanted, features, k, threshold)
    span = _span(features)
    reduced = features @ span.T  # what an encoder row does outside their span changes nothing
    free = (bias, threshold > 0)
    if k is not None and wanted.sum(axis=0).max(initial=0) > k:
        crowded = int(wanted.sum(axis=0).argmax())
        reason = f"feature {crowded} fires {int(wanted[:, crowded].sum())} latents and k is {k}"
        return _refused(wanted, features, reason, csr_array(wanted.shape, dtype=np.float64), 0.0, np.ones(len(wanted), bool), k, threshold)
    groups = [np.arange(len(wanted))] if k is not None else [np.array([i]) for i in range(len(wanted))]
    parts, border = [], False
    for latents in groups:
        solved, on_border = _widest(wanted[latents], reduced, free, k)
        parts.append(solved)
        border |= on_border
    rows, shift = np.concatenate([p.rows for p in parts]) @ span, np.concatenate([p.shift for p in parts])
    failed = np.concatenate([np.full(len(p.rows), p.t <= SLACK) for p in parts])
    if failed.any():
        multipliers = np.concatenate([p.multipliers * (p.t <= SLACK) for p in parts])
        residual = max(p.residual for p in parts if p.t <= SLACK)
        who = "Top-k's competition" if k is not None else f"{int(failed.sum())} of {len(wanted)} sets"
        reason = f"{who} has no encoder: firing features weigh up to the same as silent ones"
        certificate = csr_array(np.where(wanted, multipliers, -multipliers))
        return _refused(wanted, features, reason, certificate, residual, failed, k, threshold)
    rows, b_enc = _scaled(rows, shift, threshold, bias, k)
    return _witness(wanted, features, rows, b_enc, border, k, threshold)


def absorbed(pattern, latent: int, feature: int) -> Bool[np.ndarray, "n_latents_and_1 n_features"]:
    """The pattern in which a new last latent has taken `feature` out of F_latent: parent without child, and child alone.

    If the sets before are realisable with a threshold above zero, then for some child these are (arXiv 2512.05534, Theorem 3.8).
    """
    wanted = _wanted(pattern, None)
    if not wanted[latent, feature]:
        raise ValueError(f"absorbed: feature {feature} is not in the set of latent {latent}; name one of its own.")
    child = np.zeros((1, wanted.shape[1]), dtype=bool)
    wanted[latent, feature], child[0, feature] = False, True
    return np.concatenate([wanted, child])


def absorb_weakest(
    W_enc: Float[np.ndarray, "n_latents d_in"], features: Float[np.ndarray, "n_features d_in"], latent: int, threshold: float
) -> tuple[Float[np.ndarray, "n_latents_and_1 d_in"], int]:
    """A constructed witness of Theorem 3.8: the encoder whose last row has taken the latent's weakest feature, and that feature.

        a_(1) < a_(2) < ...  = <W_enc_latent, w_d> above the threshold c
        W_enc_latent *= c / sqrt(a_(1) a_(2));   new row = 2 c / (1 + M) w_d*,   M = max_d <w_d, w_d*>

    Other rows stay as they are, which raising a common threshold would not do. Needs c > 0 (scaling a row of a plain ReLU changes no
    set), unit features and M < 1; ties are refused.
    """
    if threshold <= 0:
        raise ValueError(f"absorb_weakest: the threshold is {threshold:g}; scaling a row changes its set only above zero.")
    pre = features @ W_enc[latent]
    own = np.flatnonzero(pre > threshold)
    if len(own) < 2:
        raise ValueError(f"absorb_weakest: latent {latent} has {len(own)} features above {threshold:g}; it needs two to give one away.")
    first, second = own[np.argsort(pre[own])][:2]
    overlap = np.delete(features @ features[first], first).max()
    if pre[first] == pre[second] or overlap >= 1:
        raise ValueError(f"absorb_weakest: features {first} and {second} of latent {latent} cannot be told apart; move one of them.")
    rows = np.concatenate([W_enc, 2 * threshold / (1 + max(overlap, 0)) * features[[first]]])
    rows[latent] *= threshold / np.sqrt(pre[first] * pre[second])
    return rows, int(first)


# the programme ---------------------------------------------------------------------------------------------------------


def _span(features: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the features' span, (rank, d_in)."""
    _, sizes, basis = np.linalg.svd(features, full_matrices=False)
    return basis[sizes > sizes.max() * max(features.shape) * np.finfo(np.float32).eps]


def _widest(wanted: np.ndarray, features: np.ndarray, free: tuple[bool, bool], k: int | None) -> tuple[_Solved, bool]:
    """Margins on both sides, or with silent pairs on the border where that leaves none."""
    solved = _solve(wanted, features, free, k, border=False)
    if solved.t > SLACK:
        return solved, False
    return _solve(wanted, features, free, k, border=True), True


def _solve(wanted: np.ndarray, features: np.ndarray, free: tuple[bool, bool], k: int | None, border: bool) -> _Solved:
    """max t over |W| <= 1, shifts s and each full feature's level m (the lowest pre-activation among the latents it fires):

    firing        <W_i, w_d> - s_i      >= t        and  <W_i, w_d> - s_i >= m_d,  m_d >= t  where d fires k latents
    silent        <W_i, w_d> - s_i      <= -t       (0 on the border)
    silent, full  <W_i, w_d> - s_i      <= m_d - t
    """
    n, (n_features, d) = len(wanted), features.shape
    bias, above = free
    full = (wanted.sum(axis=0) == k) if k is not None else np.zeros(n_features, dtype=bool)
    i, f = np.indices(wanted.shape).reshape(2, -1)
    on, packed = wanted.ravel(), full[f]
    sign = np.where(on, 1.0, -1.0)
    n_shift, n_full = n if bias or above else 0, int(full.sum())
    shift_at, level_at, t_at = n * d, n * d + n_shift, n * d + n_shift + n_full
    if len(i) * (d + 3) > LARGEST:
        raise ValueError(f"realise: the programme has {len(i) * (d + 3):,} numbers and {LARGEST:,} are the limit; give fewer latents.")
    requirement = np.arange(len(i))
    blocks = [(np.repeat(requirement, d), (i[:, None] * d + np.arange(d)).ravel(), (sign[:, None] * features[f]).ravel())]
    if n_shift:
        blocks.append((requirement, shift_at + i, -sign))
    level = np.cumsum(full) - 1
    blocks.append((requirement[packed], level_at + level[f[packed]], -sign[packed]))
    strict = np.where(packed, ~on, on | (not border))
    blocks.append((requirement[strict], np.full(strict.sum(), t_at), -np.ones(strict.sum())))
    extra = len(i)
    for at in ([*range(level_at, t_at)], [*range(shift_at, level_at)] if above and not bias else []):
        blocks += [(np.arange(extra, extra + len(at)), np.array(at, int), np.ones(len(at)))]
        blocks += [(np.arange(extra, extra + len(at)), np.full(len(at), t_at), -np.ones(len(at)))]
        extra += len(at)
    rows, columns, values = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    needs = csr_array((values, (rows, columns)), shape=(extra, t_at + 1))  # needs @ v >= 0
    bounds = np.full((t_at + 1, 2), (-np.inf, np.inf))
    bounds[:shift_at], bounds[t_at] = (-1, 1), (-1, 1)
    found = linprog(-np.eye(1, t_at + 1, t_at)[0], A_ub=-needs, b_ub=np.zeros(extra), bounds=bounds, method="highs")
    if found.x is None:
        raise ArithmeticError(f"realise: the solver stopped ({found.message}); scale the features to unit norm.")
    multipliers = np.maximum(-found.ineqlin.marginals, 0)
    balance = (needs.T @ multipliers)[:t_at]  # zero where the bounds of W do not bind
    shift = found.x[shift_at:level_at] if n_shift else np.zeros(n)
    return _Solved(found.x[t_at], found.x[:shift_at].reshape(n, d), shift, multipliers[: len(i)].reshape(n, -1), np.abs(balance).max())


# the answer ------------------------------------------------------------------------------------------------------------


def _scaled(rows: np.ndarray, shift: np.ndarray, threshold: float, bias: bool, k: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Encoder rows and biases at the threshold asked for: unit rows where latents do not compete, the longest at one where they do."""
    norms = np.linalg.norm(rows, axis=1)
    size = np.maximum(norms if k is None else np.full(len(rows), norms.max(initial=0)), np.finfo(float).tiny)
    size = np.where(norms > 0, size, 1.0)
    if threshold > 0 and not bias:
        size = np.where(norms > 0, shift / threshold, 1.0)  # the threshold is given: it sets the length of the row
        return rows / size[:, None], np.zeros(len(rows))
    return rows / size[:, None], threshold - shift / size if bias else np.zeros(len(rows))


def _witness(wanted, features, rows, b_enc, border: bool, k: int | None, threshold: float) -> Realisation:
    """Run it: the sets that come out have to be those asked for."""
    dictionary = _dictionary(torch.as_tensor(rows).float(), torch.as_tensor(b_enc).float(), None, k, threshold)
    fires = respond_alone(dictionary, torch.as_tensor(features).float())[0]
    same = np.array_equal(fires.toarray() > 0, wanted)
    return Realisation(
        verdict="realisable" if same else "too close to call",
        reason="the witness has these sets when run" if same else "in single precision the witness has other sets",
        margin=_margin(wanted, features @ rows.T + b_enc, np.linalg.norm(rows, axis=1).max(initial=0), k, threshold),
        border=border,
        impossible=np.zeros(len(wanted), dtype=bool),
        W_enc=rows.astype(np.float32),
        b_enc=b_enc.astype(np.float32),
        certificate=csr_array(wanted.shape, dtype=np.float64),
        residual=0.0,
        threshold=threshold,
        k=k,
    )


def _margin(wanted: np.ndarray, pre: np.ndarray, longest: float, k: int | None, threshold: float) -> float:
    """The smallest slack of a pre-activation (n_features, n_latents), in units of the longest row."""
    on, distance = wanted.T, pre - threshold
    full = on.sum(axis=1, keepdims=True) == k
    lowest = np.where(on, distance, np.inf).min(axis=1, keepdims=True)
    slack = np.where(on, distance, np.where(full, np.maximum(lowest - distance, -distance), -distance))
    return max(float(slack.min()), 0.0) / longest if longest > 0 else 0.0


def _refused(wanted, features, reason, certificate, residual, failed, k, threshold) -> Realisation:
    sure = residual <= PROOF
    return Realisation(
        verdict="not realisable" if sure else "too close to call",
        reason=reason if sure else f"the margin is zero and the certificate is off by {residual:.2g}",
        margin=0.0,
        border=False,
        impossible=failed,
        W_enc=np.zeros((len(wanted), features.shape[1]), dtype=np.float32),
        b_enc=np.zeros(len(wanted), dtype=np.float32),
        certificate=certificate,
        residual=float(residual),
        threshold=threshold,
        k=k,
    )


def _dictionary(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor | None, k: int | None, threshold: float) -> SparseDictionary:
    sigma = Rectified() if k is None else TopKSelection(k)
    if threshold > 0:
        sigma = JumpRectified(len(W_enc))
        sigma.threshold.data.fill_(threshold)
    return SparseDictionary(W_enc, W_enc.clone() if W_dec is None else W_dec, b_enc, nonlinearity=sigma).eval()


def _wanted(pattern, n_features: int | None) -> np.ndarray:
    """The sets as a boolean matrix of its own."""
    if issparse(pattern):
        return np.asarray(pattern.toarray() != 0)
    if isinstance(pattern, np.ndarray | Tensor):
        return np.array(pattern, dtype=bool)
    if n_features is None:
        n_features = 1 + max((d for members in pattern for d in members), default=0)
    wanted = np.zeros((len(pattern), n_features), dtype=bool)
    for i, members in enumerate(pattern):
        wrong = [d for d in members if not 0 <= d < n_features]
        if wrong:
            raise ValueError(f"realise: set {i} holds feature {wrong[0]} and there are {n_features}; ids run from 0.")
        wanted[i, list(members)] = True
    return wanted


def _check(wanted: np.ndarray, features: np.ndarray, k: int | None, threshold: float) -> None:
    if wanted.ndim != 2 or wanted.shape[1] != len(features) or wanted.size == 0:
        shape = " x ".join(map(str, wanted.shape))
        raise ValueError(f"realise: the pattern is {shape}, and there are {len(features)} features; give n_latents x n_features.")
    if not np.isfinite(features).all() or not features.any():
        raise ValueError("realise: the features are all zero, or not finite; give directions, one a row.")
    if k is not None and not 1 <= k <= len(wanted):
        raise ValueError(f"realise: k is {k} and there are {len(wanted)} latents; k is between 1 and that.")
    if threshold < 0 or (threshold > 0 and k is not None):
        raise ValueError(f"realise: threshold={threshold:g} with k={k}; it is zero or above, and Top-k has none.")
