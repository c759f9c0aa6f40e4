"""Training on a checkpoint: the settings that its file does not say, measured so that L0 stays where it is."""

from typing import Any, NamedTuple

import torch
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.observe import encoded, evaluating
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import BatchTopK, Gated, JumpReLU, Matryoshka, Method, Pursuit, ReLU, TopK
from sdl_explorer.models.methods.gated import GatedRectified
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.methods.matryoshka import NestedSelection
from sdl_explorer.models.methods.pursuit import OMP, MatchingPursuit
from sdl_explorer.models.methods.relu import Rectified
from sdl_explorer.models.methods.topk import BatchTopKSelection, TopKSelection

UNIT = 1e-3  # decoder norms within this of 1 count as held there
EDGE_SHARE = 0.05  # a bandwidth is wide enough when it holds this many pre-activations per latent that fires
MOST_PAIRS = 2**24  # pre-activations that are looked at to choose a bandwidth


class Penalty(NamedTuple):
    """`l0`: latents firing per row. `l1`: the coefficient of `ReLU` under which these weights are stationary.
    `error`: mean over rows of |x_r - recon|^2."""

    l0: float
    l1: float
    error: float


def estimate_penalty(dictionary: SparseDictionary, activations: Activations) -> Penalty:
    """L0, and the L1 coefficient that the weights themselves tell.

    Where mean |r|^2 + l1 * mean sum_i z_i |W_dec_i| is stationary in b_enc_i, r = x_r - recon,
    mean over the rows on which latent i fires of 2 <r, W_dec_i> / |W_dec_i| equals l1. The estimate is the
    mean over all firing pairs; it is negative where a dictionary overshoots, which no L1 penalty does. In units of the
    weights, as training descends it.
    """
    dictionary, activations = dictionary.core, dictionary.normalised(activations)
    with evaluating(dictionary):
        directions = normalize(dictionary.W_dec.float(), dim=1)
        pulled = error = 0.0
        fired = 0
        for rows in encoded(dictionary, activations):
            residual = rows.targets - rows.reconstruction
            pulled += float((2 * residual @ directions.T)[rows.fired].double().sum())
            error += float(residual.square().sum().double())
            fired += int(rows.fired.sum())
    return Penalty(fired / activations.n, pulled / max(fired, 1), error / activations.n)


def continued_method(dictionary: SparseDictionary, activations: Activations) -> Method:
    """The method that trains this dictionary on, with defaults that hold L0 at its measured value.

    ReLU and JumpReLU get `l0_target`; the ReLU starts from the estimated l1 (at least 1e-3 of the residual's
    norm, so that it can be scaled up). The JumpReLU's penalty is ten times the error, at which L0 stays within
    about 5 % of its target, and its bandwidth is widened until a twentieth as many pre-activations lie within it
    as latents fire. Gated has no target: it starts from the l1 of its gate path, which is a ReLU dictionary with the same
    weights. TopK, BatchTopK and pursuits keep k, Matryoshka its widths. `unit_norm` is on only where all decoder rows have norm 1, and a
    tied encoder stays tied.
    """
    dictionary, activations = dictionary.core, dictionary.normalised(activations)
    sigma = dictionary.nonlinearity
    unit_norm = bool(((dictionary.W_dec.norm(dim=1) - 1).abs() <= UNIT).all())
    shared: dict[str, Any] = {"unit_norm": unit_norm, "tie": "tied" if dictionary.tied else "untied"}
    if isinstance(sigma, TopKSelection):
        return TopK(k=sigma.k, **shared)
    if isinstance(sigma, BatchTopKSelection):
        shared["by"] = "contribution" if sigma.by_contribution else "code"
    if isinstance(sigma, NestedSelection):
        return Matryoshka(k=sigma.k, prefixes=list(sigma.widths[:-1]), **shared)
    if isinstance(sigma, BatchTopKSelection):
        return BatchTopK(k=sigma.k, **shared)
    if isinstance(sigma, (MatchingPursuit, OMP)):
        return Pursuit(k=sigma.k, orthogonal=isinstance(sigma, OMP), **shared)
    if not isinstance(sigma, (Rectified, JumpRectified, GatedRectified)):
        raise TypeError(
            f"continued_method: no method trains a dictionary with {type(sigma).__name__}; ReLU, JumpReLU, Gated, TopK, "
            "BatchTopK, Matryoshka and Pursuit do. Choose a method yourself."
        )
    measured = estimate_penalty(dictionary, activations)
    if measured.l0 == 0:
        raise ValueError(
            "continued_method: no latent fires on these rows, so there is no L0 to hold. Run preflight for the scale of the inputs."
        )
    if isinstance(sigma, Rectified):
        return ReLU(l1=max(measured.l1, 1e-3 * measured.error**0.5), l0_target=measured.l0, **shared)
    if isinstance(sigma, GatedRectified):
        gate = SparseDictionary(
            dictionary.W_enc, dictionary.W_dec, dictionary.b_enc, dictionary.b_dec, subtract_b_dec=dictionary.subtract_b_dec
        )
        return Gated(l1=max(estimate_penalty(gate, activations).l1, 0.0), **shared)
    bandwidth = max(sigma.bandwidth, _bandwidth(dictionary, activations, measured.l0))
    return JumpReLU(l0=10 * measured.error, l0_target=measured.l0, bandwidth=bandwidth, **shared)


def _bandwidth(dictionary: SparseDictionary, activations: Activations, l0: float) -> float:
    """Twice the distance from the threshold within which EDGE_SHARE * l0 pre-activations a row lie."""
    inputs = activations.inputs[: max(1, MOST_PAIRS // dictionary.n_latents)].to(dictionary.W_enc)
    with torch.no_grad():
        distance = (dictionary.pre(inputs) - dictionary.nonlinearity.threshold).abs().flatten()
    within = min(distance.numel(), max(1, round(EDGE_SHARE * l0 * len(inputs))))
    return 2 * float(distance.kthvalue(within).values)
