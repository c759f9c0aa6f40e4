"""Loss terms, one family: each is a mean over the batch, so a batch and the same batch doubled give the same loss.

Squared errors are sums over coordinates (arXiv 2512.05534, eq. 4), which sets the scale of every coefficient.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sdl_explorer.data.anchors import Pins, Pulls
from sdl_explorer.models.dictionary import Latents, SparseDictionary


def squared_error(reconstruction: Tensor, targets: Tensor) -> Tensor:
    """mean_r sum_d (recon - x)^2"""
    return (reconstruction - targets).square().sum(dim=1).mean()


def weighted_l1(latents: Latents, dictionary: SparseDictionary) -> Tensor:
    """mean_r sum_i z_i |W_dec_i|: cannot be shrunk away by growing the decoder (Conerly et al. 2024)."""
    norms = dictionary.W_dec.norm(dim=1)
    if latents.is_sparse:
        return (latents.values * norms[latents.layout[0]]).sum() / latents.n
    return (latents.values @ norms).mean()


def anchor_distance(dictionary: SparseDictionary, pins: Pins) -> Tensor:
    """sum_j weight_j (|W_enc_j - a_j|^2 + |W_dec_j - b_j|^2), plain sums of squares (arXiv 2512.05534, eq. 26)."""
    weight = pins.weight * ~pins.hard
    encoder = (dictionary.W_enc[pins.latents] - pins.anchors.inputs).square().sum(dim=1)
    decoder = (dictionary.W_dec[pins.latents] - pins.anchors.targets).square().sum(dim=1)
    return torch.dot(weight, encoder + decoder)


def pull_distance(dictionary: SparseDictionary, pulls: Pulls) -> Tensor:
    """sum_j weight_j |W_enc_j / |W_enc_j| - u_j|^2: turns encoder rows towards unit rows u and leaves their norms alone."""
    rows = normalize(dictionary.W_enc[pulls.latents], dim=1)
    return torch.dot(pulls.weight, (rows - pulls.directions).square().sum(dim=1))
