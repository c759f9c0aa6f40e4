"""The card on absorption (T6): a parent that has lost one child to a latent of its own is realisable."""

import numpy as np
import torch

from sdl_explorer.diagnosis.realisable import Realisation, absorb_weakest, absorbed, realise
from sdl_explorer.diagnosis.theory_cards import PAPER, Assumption, Found, Text, TheoryCard, Witness, card
from sdl_explorer.diagnosis.theory_facts import Facts
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.methods.relu import Rectified
from sdl_explorer.models.methods.topk import BatchTopKSelection, TopKSelection

T6 = Text(
    "T6",
    "absorption is realisable",
    "If the sets F_i are realisable, then so are, for each parent i with two children or more, those in which some child has left F_i for "
    "a latent of its own. Nothing follows about the loss, nor that training goes there.",
    f"{PAPER}, Theorem 3.8 of v2 and v5/6 (3.10 in v3, for any child)",
)
LOOKED = 256  # parents for which a witness is built, those with the smallest sets
SOLVED = 4  # parents whose own programme is solved, for the margin
PROGRAMME = 10_000  # n_features x d_in of such a programme
JOINT = 20_000  # n_latents x n_features x d_in of one under Top-k, in which all latents compete


def check_absorbable(facts: Facts) -> TheoryCard:
    """T6. left = parents (latents with two features or more) of which some child can be split off, right = parents looked at.

    A witness is built for each (`absorb_weakest`) and run: the row scaled by c / sqrt(a_(1) a_(2)), a new row 2 c / (1 + M) w_d*. Margins
    are from linear programmes (`realise`), for the parents with the smallest sets; under Top-k these hold the competition too.
    """
    sets, sigma = facts.pattern.T.numpy(), facts.model.sigma
    sizes = facts.sizes.numpy()
    parents = np.flatnonzero(sizes > 1)
    parents = parents[np.argsort(sizes[parents], kind="stable")]
    pointwise = isinstance(sigma, Rectified | JumpRectified | BatchTopKSelection)
    largest, _ = facts.overlap
    rule = "yes" if pointwise else "no, latents compete" if isinstance(sigma, TopKSelection) else "no"
    raised = _thresholds(facts) if pointwise else np.zeros(facts.n_latents)
    least = float(raised[parents].min()) if len(parents) else 0.0
    assumptions = [
        facts.unit("input"),
        Assumption("M < 1", f"{largest:.4g}", largest < 1 - 1e-6),
        Assumption("a parent has two children or more", f"{len(parents):,} latents have", len(parents) > 0),
        Assumption("each latent fires above a threshold of its own", f"{facts.model.name}: {rule}", pointwise),
        Assumption("thresholds of the parents are above zero", f"least {least:.3g}", least > 0),
    ]
    numbers: dict[str, float | str] = {"parents": float(len(parents)), "M": largest}
    witness = Witness("")
    if not facts.unit("input").met or not len(parents):
        return card(T6, assumptions, Found("not checkable", "", numbers=numbers), facts.sums.n, 0.0)
    numbers |= _programmes(facts, sets, parents, raised)
    if any(a.met is not True for a in assumptions):
        return card(T6, assumptions, Found("not checkable", "", numbers=numbers), facts.sums.n, 0.0)
    split, undecided = [], []
    for i in parents[:LOOKED].tolist():
        child = _split_off(facts, sets, i, float(raised[i]))
        (split if child >= 0 else undecided).append((i, child))
    if split:
        parent, child = split[0]
        witness = Witness(f"feature {child} leaves latent {parent} for a new one", (child,), (parent,))
    left, right = len(split), len(split) + len(undecided)
    reason = f"{left:,} of {right:,} parents looked at, of {len(parents):,}, can lose a child to a latent of its own"
    if undecided:
        latent = undecided[0][0]
        reason += f"; of latent {latent} the construction gives none"
    return card(
        T6,
        assumptions,
        Found(
            "holds" if left == right else "not checkable",
            reason,
            "parents with a child that can be split off = parents looked at",
            left,
            right,
            witness,
            numbers,
        ),
        facts.sums.n,
        0.0,
    )


def _thresholds(facts: Facts) -> np.ndarray:
    """c_i: latent i fires where <W_enc_i, x> > c_i."""
    threshold = torch.as_tensor(getattr(facts.model.sigma, "threshold", 0.0)).detach().double()
    return (threshold - facts.model.b_enc).numpy()


def _split_off(facts: Facts, sets: np.ndarray, latent: int, threshold: float) -> int:
    """The child that the construction splits off, once its two rows have been seen to have the right sets; -1 for none."""
    features = facts.W_p.numpy()
    try:
        rows, child = absorb_weakest(facts.model.W_enc[[latent]].numpy(), features, 0, threshold)
    except ValueError:  # two children tie: the linear programme may still tell them apart
        return next((c for c, found in _candidates(facts, sets, latent, threshold) if found.realisable), -1)
    fires = features @ rows.T > threshold
    wanted = absorbed(sets[[latent]], 0, child)
    return child if np.array_equal(fires.T, wanted) else -1


def _candidates(facts: Facts, sets: np.ndarray, latent: int, threshold: float):
    """Each child with the linear programme of the two rows that its leaving concerns, the weakest first."""
    if facts.W_p.numel() > PROGRAMME:
        return
    own = np.flatnonzero(sets[latent])
    for child in own[np.argsort(facts.model.alone(facts.W_p[own])[:, latent].numpy(), kind="stable")].tolist():
        yield child, realise(absorbed(sets[[latent]], 0, child), facts.W_p, threshold=max(threshold, 0.0))


def _programmes(facts: Facts, sets: np.ndarray, parents: np.ndarray, raised: np.ndarray) -> dict[str, float | str]:
    """For some parents: how many have a child whose leaving is realisable, and the margin of the first such child (the worst of them)."""
    sigma = facts.model.sigma
    best: list[Realisation | None] = []
    for i in parents[:SOLVED].tolist():
        if isinstance(sigma, TopKSelection):
            if sets.size * facts.W_p.shape[1] > JOINT:
                break
            tried = (realise(absorbed(sets, i, int(c)), facts.W_p, k=sigma.k) for c in np.flatnonzero(sets[i]))
        else:
            tried = (found for _, found in _candidates(facts, sets, i, float(raised[i])))
        found = next((f for f in tried if f.realisable), None)
        best.append(found)
    if not best or facts.W_p.numel() > PROGRAMME:
        return {"linear programmes": f"none: {facts.n_latents:,} latents, {facts.n:,} features, width {facts.W_p.shape[1]} are too many"}
    margins = [f.margin for f in best if f is not None]
    return {
        "linear programmes": float(len(best)),
        "realisable by programme": float(len(margins)),
        "least margin": float(min(margins, default=float("nan"))),
    }
