"""Loss terms, one family: pure functions of latents, pre-activations or the dictionary.

A term of latents is a mean over the batch, so a batch and the same batch doubled give the same loss, and it is the
same for dense and sparse latents. A term of the weights alone is a function of the dictionary. Sums of squares run
over coordinates (arXiv 2512.05534, eq. 4), which sets the scale of every coefficient. All return 0-d tensors and
are unweighted; a method multiplies them by its coefficients in `objective`, and so does a method of your own.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sdl_explorer.data.anchors import Pins, Pulls
from sdl_explorer.models.dictionary import Latents, SparseDictionary

# of latents: means over the batch -------------------------------------------------------------------------------------


def squared_error(reconstruction: Tensor, targets: Tensor) -> Tensor:
    """mean_r sum_d (recon - x)^2"""
    return (reconstruction - targets).square().sum(dim=1).mean()


def plain_l1(latents: Latents) -> Tensor:
    """mean_r sum_i |z_i| (Bricken et al. 2023). Growing the decoder shrinks it away unless decoder norms are held."""
    return latents.values.abs().sum() / latents.n


def weighted_l1(latents: Latents, dictionary: SparseDictionary) -> Tensor:
    """mean_r sum_i z_i |W_dec_i|: cannot be shrunk away by growing the decoder (Conerly et al. 2024)."""
    norms = dictionary.W_dec.norm(dim=1)
    if latents.is_sparse:
        return (latents.values * norms[latents.layout[0]]).sum() / latents.n
    return (latents.values @ norms).mean()


def smooth_l0(latents: Latents, dictionary: SparseDictionary, scale: float = 4.0) -> Tensor:
    """mean_r sum_i tanh(scale * z_i |W_dec_i|): L0 for large z, L1 for small (Conerly et al., Circuits Updates January 2025)."""
    norms = dictionary.W_dec.norm(dim=1)
    if latents.is_sparse:
        norms = norms[latents.layout[0]]
    return torch.tanh(scale * latents.values * norms).sum() / latents.n


def hoyer(latents: Latents) -> Tensor:
    """mean_r |z|_1 / |z|_2, to be *minimised*: 1 for a one-hot code, sqrt(n_latents) for a constant one (Hoyer 2004).

    Blind to the scale of a code. A row without active latents counts 0, with gradient 0.
    """
    l1, squares = _row_sums(latents, latents.values.abs()), _row_sums(latents, latents.values.square())
    return (l1 / torch.where(squares > 0, squares, 1.0).sqrt()).mean()


def dead_penalty(latents: Latents, floor: float = 1e-3) -> Tensor:
    """sum_i max(floor - mean_r z_i, 0) / n_latents: asks every latent for a mean activity of at least `floor`.

    It revives nothing. Its gradient reaches the encoder through z_i, and where latent i is silent on the whole batch
    that gradient is 0: the penalty counts dead latents and moves rarely active ones. Use `pre_activation_loss`,
    an auxiliary loss or resampling to bring dead latents back. The one-sided form of the activity target of Ng
    (2011, CS294A lecture notes, Sparse autoencoder).
    """
    if latents.is_sparse:
        activity = latents.values.new_zeros(latents.n_latents).index_add(0, latents.layout[0], latents.values)
    else:
        activity = latents.values.sum(dim=0)
    return (floor - activity / latents.n).relu().mean()


def pre_activation_loss(pre: Tensor, dictionary: SparseDictionary, threshold: Tensor, among: Tensor | None = None) -> Tensor:
    """mean_r sum_i max(threshold_i - pre_i, 0) |W_dec_i|: lifts silent latents towards their threshold.

    `pre` (n, n_latents); `threshold` (n_latents,) or 0-d; `among` (n_latents,) bool restricts it, for instance to the
    dead ones as sae-lens does. The gradient reaches encoders that never fire (Conerly et al., Circuits Updates
    January 2025, coefficient 3e-6).
    """
    norms = dictionary.W_dec.norm(dim=1)
    if among is not None:
        norms = norms * among
    return ((threshold - pre).relu() @ norms).mean()


# of the weights alone -------------------------------------------------------------------------------------------------


def decoder_diversity(dictionary: SparseDictionary) -> Tensor:
    """mean_{i != j} cos(W_dec_i, W_dec_j)^2, to be minimised: 0 where all decoder rows are orthogonal.

    With unit rows U, sum_ij cos^2 = |U U^T|_F^2 = |U^T U|_F^2, so the smaller of the two Gram matrices is all that is
    ever made: nothing of size n_latents x n_latents where n_latents > d_out.
    """
    rows = normalize(dictionary.W_dec, dim=1)
    n = len(rows)
    gram = rows @ rows.T if n <= rows.shape[1] else rows.T @ rows
    of_itself = rows.square().sum(dim=1).square().sum()
    return (gram.square().sum() - of_itself) / max(n * (n - 1), 1)


def tie_distance(dictionary: SparseDictionary) -> Tensor:
    """sum_i |W_enc_i - W_dec_i|^2: a soft tie, which becomes a tied encoder as its weight grows. Needs d_in = d_out."""
    return (dictionary.W_enc - dictionary.W_dec).square().sum()


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


def _row_sums(latents: Latents, values: Tensor) -> Tensor:
    """Sums over the entries of each row, (n,)."""
    if not latents.is_sparse:
        return values.sum(dim=1)
    return values.new_zeros(latents.n).index_add(0, latents.row, values)
