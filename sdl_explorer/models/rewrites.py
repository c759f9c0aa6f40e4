"""Exact rewrites between conventions: the same function with other weights."""

from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor

from sdl_explorer.models.dictionary import SparseDictionary


@torch.no_grad()
def scaled(dictionary: SparseDictionary, s: float | int) -> SparseDictionary:
    """A copy for raw x of a dictionary that was made for s*x, on both sides: g(x) = f(s*x) / s.

        W_enc <- s * W_enc,  W_dec <- W_dec / s,  b_dec <- b_dec / s

    b_enc, thresholds and codes stay as they are, so the decoder norms change by 1/s. Exact for every
    nonlinearity that reads the pre-activations alone.
    """
    if not (0 < s < float("inf")):
        raise ValueError(f"scaled: s is {s}; an input scale is a positive finite number.")
    copy = deepcopy(dictionary)
    copy.W_enc.mul_(s)
    copy.W_dec.div_(s)
    copy.b_dec.div_(s)
    if copy.provenance:
        copy.provenance["assumptions"] = [*copy.provenance.get("assumptions", []), f"input scale {s:.6g} folded into the weights"]
    return copy


@torch.no_grad()
def shifted(dictionary: SparseDictionary, inputs: Float[Tensor, " d_in"], targets: Float[Tensor, " d_out"]) -> SparseDictionary:
    """A copy for raw rows of a dictionary that was made for centred ones: g(x) = f(x - mu_in) + mu_out.

        b_enc <- b_enc - W_enc @ mu_in,  b_dec <- b_dec + mu_out

    `inputs` and `targets` are the means mu_in and mu_out. Codes unchanged. A dictionary that subtracts b_dec from its
    input centres by that alone; its two means must be one. After `scaled`: made for s * (x - mu).
    """
    for side, mean, width in (("inputs", inputs, dictionary.d_in), ("targets", targets, dictionary.d_out)):
        if mean.shape != (width,) or not mean.isfinite().all():
            raise ValueError(f"shifted: the mean of the {side} has shape {tuple(mean.shape)}; it is ({width},), of finite numbers.")
    if dictionary.subtract_b_dec and not torch.equal(inputs, targets):
        raise ValueError(
            "shifted: this dictionary subtracts b_dec from its input and the means of inputs and targets differ; use uncentred first."
        )
    copy = deepcopy(dictionary)
    if not copy.subtract_b_dec:
        copy.b_enc.sub_(copy.W_enc @ inputs.to(copy.W_enc))
    copy.b_dec.add_(targets.to(copy.b_dec))
    return copy


@torch.no_grad()
def uncentred(dictionary: SparseDictionary) -> SparseDictionary:
    """A copy that does not subtract b_dec from the input: b_enc <- b_enc - W_enc @ b_dec; codes unchanged."""
    copy = deepcopy(dictionary)
    if copy.subtract_b_dec:
        copy.b_enc.sub_(copy.W_enc @ copy.b_dec)
        copy.subtract_b_dec = False
    return copy
