"""Rewrites of a dictionary: the same function under another convention, and selections turned into thresholds."""

from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.methods.relu import Rectified
from sdl_explorer.models.methods.topk import BatchTopKSelection, TopKSelection

BLOCK = 2**24  # pre-activations that are looked at together


def scaled(dictionary: SparseDictionary, s: float | int) -> SparseDictionary:
    """A copy for raw x of a dictionary that was made for s*x, on both sides: g(x) = f(s*x) / s.

        input_scale <- s * input_scale,  target_scale <- s * target_scale

    Weights and codes stay as they are, so it is exact for every nonlinearity, and the copy trains on in the units that it
    was made in. `folded` moves the scales into the weights.
    """
    if not (0 < s < float("inf")):
        raise ValueError(f"scaled: s is {s}; an input scale is a positive finite number.")
    copy = deepcopy(dictionary)
    copy.input_scale, copy.target_scale = s * copy.input_scale, s * copy.target_scale
    _note(copy, f"inputs are scaled by {s:.6g}")
    return copy


@torch.no_grad()
@torch.no_grad()
def folded(dictionary: SparseDictionary) -> SparseDictionary:
    """A copy with both scales 1 and the same function, the scales folded into the weights:

        W_enc <- input_scale * W_enc,  W_dec <- W_dec / target_scale,  b_dec <- b_dec / target_scale

    b_enc, thresholds and codes stay as they are, so the decoder norms change by 1 / target_scale, and a tied encoder
    becomes one of its own. A sigma that explains rows by W_enc itself (pursuits, Lasso) would give other codes: raises TypeError.
    """
    if dictionary.input_scale == dictionary.target_scale == 1:
        return deepcopy(dictionary)
    if dictionary.nonlinearity.explains_rows:
        raise TypeError(
            f"folded: {type(dictionary.nonlinearity).__name__} explains rows by the rows of W_enc, and atoms of another length give other "
            f"codes, so its scales ({dictionary.input_scale:.6g}, {dictionary.target_scale:.6g}) stay. Save it as native, which keeps them."
        )
    copy = untied(dictionary)
    copy.W_enc.mul_(copy.input_scale)
    copy.W_dec.div_(copy.target_scale)
    copy.b_dec.div_(copy.target_scale)
    _note(copy, f"input scale {copy.input_scale:.6g} and target scale {copy.target_scale:.6g} folded into the weights")
    copy.input_scale = copy.target_scale = 1.0
    return copy


@torch.no_grad()
def shifted(dictionary: SparseDictionary, inputs: Float[Tensor, " d_in"], targets: Float[Tensor, " d_out"]) -> SparseDictionary:
    """A copy for raw rows of a dictionary that was made for centred ones: g(x) = f(x - mu_in) + mu_out.

        b_enc <- b_enc - input_scale * W_enc @ mu_in,  b_dec <- b_dec + target_scale * mu_out

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
        _move_inputs(copy, copy.input_scale * inputs.to(copy.W_enc))
    copy.b_dec.add_(copy.target_scale * targets.to(copy.b_dec))
    return copy


@torch.no_grad()
def uncentred(dictionary: SparseDictionary) -> SparseDictionary:
    """A copy that does not subtract b_dec from the input: b_enc <- b_enc - W_enc @ b_dec; codes unchanged."""
    copy = deepcopy(dictionary)
    if copy.subtract_b_dec:
        _move_inputs(copy, copy.b_dec)
        copy.subtract_b_dec = False
    return copy


@torch.no_grad()
def untied(dictionary: SparseDictionary) -> SparseDictionary:
    """A copy whose encoder is a matrix of its own: the same function, and from there on two parameters."""
    copy = deepcopy(dictionary)
    if copy.tied:
        copy.W_enc = nn.Parameter(copy.W_dec.detach().clone())
    return copy


def _move_inputs(dictionary: SparseDictionary, mean: Tensor) -> None:
    """The same codes for x as before for x - mean, in units of the weights."""
    shift = dictionary.W_enc @ mean
    dictionary.b_enc.sub_(shift)
    dictionary.nonlinearity.absorb(shift)


@torch.no_grad()
def as_jumprelu(
    dictionary: SparseDictionary,
    inputs: Float[Tensor, "n d_in"] | None = None,
    per_latent: bool = False,
    bandwidth: float = 1e-3,
) -> SparseDictionary:
    """A copy whose latents are z_i = pre_i if pre_i > theta_i else 0: each row is coded without looking at rivals.

    BatchTopK: theta is its inference threshold, and ReLU: theta = 0; both exact, without `inputs`. TopK is a
    different function, so theta is estimated on `inputs`, some thousand rows of the data, such that L0 stays:

        one threshold   sum_ri [pre_ri > theta]  =  sum_ri [z_ri > 0]      (k n, where each row has k positive ones)
        per latent      sum_r [pre_ri > theta_i] =  sum_r [z_ri > 0]       each latent keeps its firing rate

    theta lies half-way between the last value kept and the first one left out, and is at least 0. Pre-activations
    that tie there may be kept or left out together. A latent that is silent on `inputs` gets a threshold above all
    it showed; give it rows enough. `bandwidth` is for training on (Rajamanoharan et al. 2024b, arXiv 2407.14435).
    """
    sigma = dictionary.nonlinearity
    if isinstance(sigma, JumpRectified):
        return deepcopy(dictionary)
    if isinstance(sigma, BatchTopKSelection | Rectified):
        threshold, how = getattr(sigma, "threshold", torch.zeros(())), "the threshold it had at inference"
    elif not isinstance(sigma, TopKSelection):
        raise TypeError(
            f"as_jumprelu: {type(sigma).__name__} selects by more than its own pre-activation; TopK, BatchTopK and ReLU convert."
        )
    elif inputs is None or len(inputs) == 0:
        raise ValueError(
            "as_jumprelu: a TopK threshold is estimated on rows of the data, and there are none; give inputs=, some thousand rows."
        )
    else:
        threshold, how = _threshold(dictionary, inputs, per_latent), f"thresholds with the same L0 on {len(inputs)} rows"
    copy = deepcopy(dictionary)
    copy.nonlinearity = JumpRectified(dictionary.n_latents, bandwidth).to(dictionary.W_enc)
    copy.nonlinearity.threshold.copy_(threshold.expand(dictionary.n_latents))
    copy.train(dictionary.training)
    _note(copy, f"{type(sigma).__name__}({sigma.settings()}) replaced by {how}")
    return copy


def _threshold(dictionary: SparseDictionary, inputs: Tensor, per_latent: bool) -> Tensor:
    """(n_latents,) or (): above it lie as many pre-activations as fire."""
    inputs = inputs.to(dictionary.W_enc)
    fired = torch.zeros(dictionary.n_latents, dtype=torch.int64, device=inputs.device)
    for rows in inputs.split(max(1, BLOCK // dictionary.n_latents)):
        latent = dictionary.encode(rows).entries()[1]
        fired += torch.bincount(latent, minlength=dictionary.n_latents)
    blocks = torch.arange(dictionary.n_latents, device=inputs.device).split(max(1, BLOCK // len(inputs)))
    if per_latent:
        return torch.cat([_between(dictionary.pre(inputs, block), fired[block]) for block in blocks])
    kept = int(fired.sum())
    largest = inputs.new_empty(0)
    for block in blocks:
        values = torch.cat([largest, dictionary.pre(inputs, block).flatten()])
        largest = values.topk(min(kept + 1, len(values))).values
    return _between(largest[:, None], torch.tensor([kept], device=inputs.device))[0]


def _between(values: Tensor, kept: Tensor) -> Tensor:
    """Of each column, a number that exactly its `kept` largest values exceed, where there is one from 0 up."""
    edge = torch.cat([values.new_full((1, values.shape[1]), torch.inf), values.sort(dim=0, descending=True).values])
    last = edge.gather(0, kept[None])[0]
    first = torch.cat([edge, torch.zeros_like(edge[:1])]).gather(0, kept[None] + 1)[0].clamp(min=0)
    middle = torch.where(last.isinf(), first * (1 + 1e-5), (last + first) / 2)
    return torch.where(middle < last, middle, first)  # neighbours among the floats have no middle


def _note(dictionary: SparseDictionary, assumption: str) -> None:
    if dictionary.provenance:
        dictionary.provenance["assumptions"] = [*dictionary.provenance.get("assumptions", []), assumption]
