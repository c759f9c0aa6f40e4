"""The card on spurious partial minima (T5): gradients of both blocks, the joint second-order test, and a construction."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import null_space
from scipy.optimize import linprog
from torch import Tensor

from sdl_explorer.diagnosis.observe import FIRES
from sdl_explorer.diagnosis.theory_cards import PAPER, Assumption, Found, Text, TheoryCard, Witness, card
from sdl_explorer.diagnosis.theory_facts import Facts, blocks
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.methods.relu import Rectified
from sdl_explorer.models.methods.topk import TopKSelection

T5 = Text(
    "T5",
    "polysemantic patterns have spurious partial minima",
    "A realisable, polysemantic pattern that is a partition of the features has a partial minimum of L~ with positive loss: optimal in "
    "W_dec and in W_enc, each for the other fixed. Partial is not local: the two are tested apart.",
    f"{PAPER}, Theorem 3.6 of v5/6 (3.7 in v3, 3.5 in v2)",
)
POSITIVE = 1e-9  # an eigenvector's smallest entry, from which it is positive
SADDLE = 1e-7  # a negative eigenvalue, relative to the largest
PARALLEL = 1 - 1e-6  # of features in single precision
PROGRAMME = 50_000  # n_features x d_in, up to which a linear programme is solved for each latent


class Point(NamedTuple):
    """A pair of blocks and what L~ does there.

    decoder, encoder   sum_i |grad_i| |row_i| / sum_d M_d |w_r^d|^2 of each block, which rescaling a latent does not change
    curvature          smallest eigenvalue of the joint Hessian over the largest, the least of all latents; NaN unless a partition
    margin             how far the pattern is from changing, relative to the longest row; NaN where sigma's rule is not known
    """

    loss: float
    decoder: float
    encoder: float
    curvature: float
    margin: float

    @property
    def joint(self) -> str:
        if not (self.curvature >= -SADDLE):
            return "saddle" if self.curvature < 0 else "unknown"
        return "passed" if self.margin > POSITIVE else "on the border of the region, undecided"


def check_partial_minimum(facts: Facts) -> TheoryCard:
    """T5. left = the larger relative block gradient at the partial minimum, right = tolerance.

    The partial minimum is this model, where it is one; else it is built: with v a positive eigenvector of
    G_dd' = sqrt(M_d M_d') <w_r^d, w_r^d'> over F_i and eigenvalue mu, W_dec_i = sum_d sqrt(M_d) v_d w_r^d / sqrt(mu) and
    <W_enc_i, w_p^d> = sqrt(mu / M_d) v_d on F_i, below zero elsewhere. Where the features are independent and no such v exists there is
    no partial minimum, and the statement as printed is violated.
    """
    sets = facts.pattern.T
    assumptions = _assumptions(facts, sets)
    here = look(facts, facts.model.W_enc, facts.model.W_dec)
    numbers: dict[str, float | str] = {
        "L~ here": here.loss,
        "gradient of W_dec here": here.decoder,
        "gradient of W_enc here": here.encoder,
        "joint second-order test here": here.joint,
        "curvature here": here.curvature,
        "margin here": here.margin,
        "latents with an empty set": float((facts.sizes == 0).sum()),
        "latents with two features or more": float((facts.sizes > 1).sum()),
    }
    if any(a.met is not True for a in assumptions):
        return _card(facts, assumptions, Found("not checkable", "", numbers=numbers))
    numbers |= _distances(facts, sets)
    scale = float(facts.weights @ facts.W_r.square().sum(dim=1))
    if max(here.decoder, here.encoder) <= facts.tolerance and here.loss > facts.tolerance**2 * scale:
        return _card(facts, assumptions, _is_one(facts, here, "this model", numbers))
    built, reason, latent = construct(facts, sets)
    witness = Witness(f"latent {latent}", tuple(torch.nonzero(sets[latent])[:, 0].tolist()), (latent,)) if latent >= 0 else Witness("")
    if built is None:
        return _card(facts, assumptions, Found(reason[0], reason[1], witness=witness, numbers=numbers))
    there = look(facts, *built)
    numbers |= {"joint second-order test of the construction": there.joint, "L~ of the construction": there.loss}
    same = torch.equal(facts.model.fires(facts.model.codes(facts.W_p @ built[0].T)), facts.pattern)
    if not same:
        return _card(facts, assumptions, Found("not checkable", "the construction has another pattern in this precision", numbers=numbers))
    return _card(facts, assumptions, _is_one(facts, there, "the construction", numbers))


def look(facts: Facts, W_enc: Tensor, W_dec: Tensor) -> Point:
    """Loss, gradients and curvature of L~ at a pair of blocks, with this model's sigma and biases."""
    scale = max(float(facts.weights @ facts.W_r.square().sum(dim=1)), np.finfo(float).tiny)
    loss, partition, margins, decoder, encoder = 0.0, True, [], torch.zeros_like(W_dec), torch.zeros_like(W_enc)
    fires, strength = torch.zeros(facts.n, facts.n_latents, dtype=torch.bool), torch.zeros(facts.n, dtype=torch.float64)
    for some in blocks(facts.n, facts.n_latents):
        pre = facts.W_p[some] @ W_enc.T + facts.model.b_enc
        z = facts.model.codes(pre) if facts.model.masks_only else facts.model.alone(facts.W_p[some])
        on = z > FIRES * W_enc.norm(dim=1)
        residual = facts.W_r[some] - z @ W_dec - facts.model.b_dec
        weighted = facts.weights[some, None] * residual
        loss += float(weighted.mul(residual).sum())
        decoder.addmm_(z.T, weighted, alpha=-2)
        encoder.addmm_((on * (weighted @ W_dec.T)).T, facts.W_p[some], alpha=-2)
        margins.append(_margin(facts, pre, on))
        fires[some], strength[some] = on, (z * on).sum(dim=1)
        partition = partition and bool((on.sum(dim=1) == 1).all())
    relative = lambda gradient, rows: float((gradient.norm(dim=1) * rows.norm(dim=1)).sum()) / scale
    owners = torch.nonzero(fires.any(dim=0))[:, 0].tolist() if partition else []
    curvatures = [_curvature(facts, i, fires[:, i], strength, W_dec) for i in owners]
    longest = float(W_enc.norm(dim=1).max())
    return Point(
        loss=loss,
        decoder=relative(decoder, W_dec),
        encoder=relative(encoder, W_enc),
        curvature=min(curvatures, default=float("nan")),
        margin=min(margins) / longest if longest > 0 else 0.0,
    )


def construct(facts: Facts, sets: Tensor) -> tuple[tuple[Tensor, Tensor] | None, tuple[str, str], int]:
    """The blocks of a partial minimum with these sets, or (None, (verdict, why), the latent that has none)."""
    W_dec, wanted = torch.zeros_like(facts.model.W_dec), torch.zeros(facts.n, facts.n_latents, dtype=torch.float64)
    independent = int(torch.linalg.matrix_rank(facts.W_p)) == facts.n
    threshold = torch.as_tensor(getattr(facts.model.sigma, "threshold", 0.0)).detach().double()
    threshold = threshold.expand(facts.n_latents)
    for i in torch.nonzero(sets.any(dim=1))[:, 0].tolist():
        own = torch.nonzero(sets[i])[:, 0]
        root = facts.weights[own].sqrt()
        v, mu = positive_eigenvector((root[:, None] * facts.W_r[own]).numpy())
        if v is None:
            proved = independent and type(facts.model.sigma) in (Rectified, JumpRectified)
            words = f"features {own.tolist()} of latent {i} have no positive eigenvector, so that no partial minimum has this pattern"
            return None, ("violated" if proved else "not checkable", words if proved else f"{words} for a plain ReLU"), i
        v = torch.from_numpy(v)
        a = mu**0.5 * v / root
        stretch = max(1.0, float(2 * threshold[i] / a.min()))
        W_dec[i] = (root * v) @ facts.W_r[own] / mu**0.5 / stretch
        wanted[:, i] = -0.1 * float(a.min())
        wanted[own, i] = stretch * a
    alive = sets.any(dim=1)
    W_enc = torch.zeros_like(facts.model.W_enc)
    if independent:
        W_enc[alive] = torch.linalg.lstsq(facts.W_p, wanted[:, alive], driver="gelsd").solution.T
        return (W_enc, W_dec), ("", ""), -1
    if facts.W_p.numel() > PROGRAMME:
        size = f"{facts.n} dependent features in {facts.W_p.shape[1]} dimensions; the programme is solved up to {PROGRAMME:,} numbers"
        return None, ("not checkable", size), -1
    for i in torch.nonzero(alive)[:, 0].tolist():
        row = _row(facts.W_p.numpy(), wanted[:, i].numpy(), sets[i].numpy())
        if row is None:
            return None, ("not checkable", f"the construction has no encoder row for latent {i}: more features than dimensions"), i
        W_enc[i] = torch.from_numpy(row)
    return (W_enc, W_dec), ("", ""), -1


def positive_eigenvector(rows: np.ndarray) -> tuple[np.ndarray | None, float]:
    """A unit eigenvector of rows @ rows.T with all entries positive and its eigenvalue; (None, nan) where there is none.

    Eigenvalues that agree to rounding share a space, in which a linear programme looks. No two spaces can hold one: they are orthogonal.
    """
    values, vectors = np.linalg.eigh(rows @ rows.T)
    values, vectors = values[::-1], vectors[:, ::-1]
    new = np.concatenate([[0], np.flatnonzero(-np.diff(values) > 1e-6 * values[0]) + 1, [len(values)]])
    for start, stop in pairwise(new.tolist()):
        if values[start] <= 1e-9 * values[0]:
            break
        basis = vectors[:, start:stop]
        if stop - start == 1:
            v = basis[:, 0] * np.sign(basis[:, 0].sum())
        else:  # max t with basis c >= t, |c| <= 1
            needs = np.concatenate([-basis, np.ones((len(basis), 1))], axis=1)
            goal = np.concatenate([np.zeros(stop - start), [-1.0]])
            found = linprog(goal, A_ub=needs, b_ub=np.zeros(len(basis)), bounds=[(-1, 1)] * (stop - start + 1), method="highs")
            v = basis @ found.x[:-1]
        if v.min() > POSITIVE:
            v = v / np.linalg.norm(v)
            return v, float(v @ (rows @ (rows.T @ v)))
    return None, float("nan")


def _assumptions(facts: Facts, sets: Tensor) -> list[Assumption]:
    times = torch.from_numpy(facts.pattern.numpy().sum(axis=1))
    off = torch.nonzero(times != 1)[:, 0]
    words = (
        "yes" if not len(off) else f"no: feature {int(off[0])} fires {int(times[off[0]])} latents alone, and {len(off) - 1} more are off"
    )
    largest = int(facts.sizes.max())
    unit = facts.W_r / facts.W_r.norm(dim=1, keepdim=True)
    closest = float((unit @ unit.T).fill_diagonal_(-1).max())
    return [
        facts.linear(),
        facts.unit("input"),
        facts.unit("target"),
        facts.no_biases(),
        facts.masks(),
        facts.weighed(),
        Assumption(
            "n_features >= 2 and n_latents >= n_features",
            f"{facts.n:,} features, {facts.n_latents:,} latents",
            2 <= facts.n <= facts.n_latents,
        ),
        Assumption("the pattern is a partition of the features", words, not len(off)),
        Assumption("the pattern is polysemantic", f"the largest set has {largest} features", largest >= 2),
        Assumption("no two target features are parallel", f"largest cosine {closest:.4g}", closest < PARALLEL),
    ]


def _is_one(facts: Facts, point: Point, name: str, numbers: dict) -> Found:
    left = max(point.decoder, point.encoder)
    positive = point.loss > facts.tolerance**2 * float(facts.weights.sum())
    local = {"passed": "it passes the joint second-order test too", "saddle": "jointly it is a saddle, no local minimum"}
    return Found(
        "holds" if left <= facts.tolerance and positive else "not checkable",
        f"{name} has loss {point.loss:.4g} and relative gradients {point.decoder:.2g}, {point.encoder:.2g}; "
        + local.get(point.joint, f"the joint second-order test: {point.joint}"),
        "relative gradients of both blocks = 0, L~ > 0",
        left,
        facts.tolerance,
        Witness(name, (), tuple(torch.nonzero(facts.sizes > 1)[:20, 0].tolist())),
        numbers | {"the partial minimum is": name, "L~": point.loss},
    )


def _card(facts: Facts, assumptions: list[Assumption], found: Found) -> TheoryCard:
    return card(T5, assumptions, found, facts.sums.n, facts.tolerance)


def _curvature(facts: Facts, latent: int, own: Tensor, strength: Tensor, W_dec: Tensor) -> float:
    """Smallest over largest eigenvalue of the Hessian of sum_{F_i} M_d |w_r^d - w <e, w_p^d>|^2 in (w, e), at |w| = 1.

    H_ww = 2 sum M_d a_d^2 I,  H_ee = 2 |w|^2 sum M_d p_d p_d^T,  H_we = -2 sum M_d (w_r^d - 2 a_d w) p_d^T;  p_d in the span of F_i.
    """
    norm = float(W_dec[latent].norm())
    if norm == 0:
        return 0.0
    w, a = W_dec[latent] / norm, strength[own] * norm
    weights, targets = facts.weights[own], facts.W_r[own]
    _, sizes, axes = torch.linalg.svd(facts.W_p[own], full_matrices=False)
    p = facts.W_p[own] @ axes[sizes > 1e-9 * sizes[0]].T
    _, sizes, axes = torch.linalg.svd(torch.cat([targets, w[None]]), full_matrices=False)
    span = axes[sizes > 1e-9 * sizes[0]].T
    w, targets = w @ span, targets @ span
    ww = 2 * float(weights @ a.square()) * torch.eye(len(w), dtype=torch.float64)
    ee = 2 * (weights[:, None] * p).T @ p
    we = -2 * (weights[:, None] * (targets - 2 * a[:, None] * w)).T @ p
    values = torch.linalg.eigvalsh(torch.cat([torch.cat([ww, we], dim=1), torch.cat([we.T, ee], dim=1)]))
    return float(values[0] / values[-1])


def _margin(facts: Facts, pre: Tensor, fires: Tensor) -> float:
    """The least distance of a pre-activation from where its latent's set would change."""
    sigma = facts.model.sigma
    if type(sigma) not in (Rectified, JumpRectified, TopKSelection):
        return float("nan")
    distance = pre - torch.as_tensor(getattr(sigma, "threshold", 0.0)).detach().double()
    slack = torch.where(fires, distance, -distance)
    if isinstance(sigma, TopKSelection):
        full = fires.sum(dim=1, keepdim=True) == sigma.k
        lowest = torch.where(fires, distance, torch.inf).amin(dim=1, keepdim=True)
        slack = torch.where(full & ~fires, torch.maximum(lowest - distance, -distance), slack)
    return float(slack.min())


def _distances(facts: Facts, sets: Tensor) -> dict[str, float | str]:
    """How far the decoder is from the least squares of each latent, and sqrt(M_d) z_d from an eigenvector of G."""
    z = facts.z * facts.pattern
    squares = (facts.weights[:, None] * z.square()).sum(dim=0)
    best = (facts.weights[:, None] * z).T @ facts.W_r / squares.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    norms = best.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    alive = sets.any(dim=1)
    off = ((facts.model.W_dec - best).norm(dim=1) / norms)[alive].max()
    residuals = []
    for i in torch.nonzero(sets.sum(dim=1) > 1)[:, 0].tolist():
        own = sets[i]
        rows = facts.weights[own].sqrt()[:, None] * facts.W_r[own]
        v = facts.weights[own].sqrt() * facts.z[own, i]
        image = rows @ (rows.T @ v)
        residuals.append(float((image - v * (v @ image) / (v @ v)).norm() / image.norm().clamp_min(torch.finfo(torch.float64).tiny)))
    return {"decoder's distance from least squares": float(off), "eigen-residual of the responses": max(residuals)}


def _row(features: np.ndarray, wanted: np.ndarray, own: np.ndarray) -> np.ndarray | None:
    """<row, w_p^d> = wanted_d on its own features, <= 0 elsewhere with the widest margin; None where the margin is not positive."""
    start = np.linalg.lstsq(features[own], wanted[own], rcond=None)[0]
    if np.abs(features[own] @ start - wanted[own]).max() > 1e-9:
        return None
    free = null_space(features[own])
    rest = features[~own]
    if not len(rest):
        return start
    needs = np.concatenate([rest @ free, np.ones((len(rest), 1))], axis=1)
    goal = np.concatenate([np.zeros(free.shape[1]), [-1.0]])
    found = linprog(goal, A_ub=needs, b_ub=-rest @ start, bounds=[(-10, 10)] * free.shape[1] + [(None, 1)], method="highs")
    return start + free @ found.x[:-1] if found.x is not None and found.x[-1] > 1e-7 else None
