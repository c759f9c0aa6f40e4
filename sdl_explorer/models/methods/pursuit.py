"""Pursuits: encoders that choose latents one after another, each for what the former ones left unexplained.

They read the *dictionary*, not the pre-activations alone. The atoms are the rows of `W_enc`, a_i; `b_enc` centres:
b_enc_i = -<a_i, mu> makes <r, a_i> + b_enc_i the correlation with r - mu. On an SAE the atoms are the decoder rows
(`with_pursuit` makes them so). Codes are >= 0 here, so an atom is only taken for a positive correlation.

Mallat & Zhang 1993 (matching pursuit); Pati et al. 1993 (OMP); Bruckstein et al. 2008 (non-negative OMP).
"""

from copy import deepcopy

import param
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from sdl_explorer.models.dictionary import Latents, Nonlinearity, SparseDictionary
from sdl_explorer.models.methods.base import Method
from sdl_explorer.models.terms import squared_error

NOTHING_LEFT = 1e-6  # a correlation below this share of the row's first one is rounding
CHUNK = 2**24  # numbers of one block, n x n_latents and n x k x d_in


class _Pursuit(Nonlinearity):
    """What both share. `masks_only` is False: a code is a coefficient of a fit, which shrinks or grows with the
    other atoms chosen, and not the latent's own pre-activation. Homogeneous as a function of x - mu."""

    homogeneous = True
    masks_only = False
    explains_rows = True

    def __init__(self, k: int):
        super().__init__()
        self.k = int(k)

    def settings(self):
        return {"k": self.k}

    def forward(self, pre: Tensor, *, inputs: Tensor, dictionary: SparseDictionary) -> Latents:
        return self.select(inputs, dictionary)

    def select(self, inputs: Float[Tensor, "n d_in"], dictionary: SparseDictionary) -> Latents:
        """The codes of each row, at most k above zero; row i depends on row i alone. Never in mixed precision, whose
        rounding would look like a residual."""
        n_rows = max(1, CHUNK // max(dictionary.n_latents, self.k * dictionary.d_in))
        with torch.autocast(inputs.device.type, enabled=False):
            chosen = [self.pursue(rows, dictionary.W_enc, dictionary.b_enc) for rows in dictionary.centred(inputs).split(n_rows)]
        indices, values = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        return _ragged(indices, values, dictionary.n_latents)

    def pursue(self, rows: Tensor, atoms: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and codes, both (n, k); a slot that is not used has code 0."""
        raise TypeError(f"{type(self).__name__} has no pursue(); a pursuit needs one.")


class MatchingPursuit(_Pursuit):
    """k times: take the atom that the residual r agrees with most, and subtract it.

        i = argmax_i c_i / |a_i|,   c_i = <r, a_i> + b_enc_i
        z_i += max(c_i, 0) / |a_i|^2,   r -= max(c_i, 0) a_i / |a_i|^2

    An atom can be taken again, which adds to its code, so that at most k codes are above zero. With unit rows this is
    SAELens's `matching_pursuit` at `max_iterations` = k without its early stops.
    """

    def pursue(self, rows, atoms, bias):
        norms = atoms.detach().norm(dim=1).clamp(min=torch.finfo(atoms.dtype).tiny)
        picks, values, residual = [], [], rows
        for _ in range(self.k):
            with torch.no_grad():
                pick = (F.linear(residual, atoms, bias) / norms).argmax(dim=1)
            atom = atoms[pick]
            value = ((residual * atom).sum(dim=1) + bias[pick]).relu() / atom.square().sum(dim=1).clamp(min=torch.finfo(atom.dtype).tiny)
            residual = residual - value[:, None] * atom
            picks.append(pick)
            values.append(value)
        return _merged(torch.stack(picks, dim=1), torch.stack(values, dim=1))


class OMP(_Pursuit):
    """Orthogonal matching pursuit with non-negative codes: after each choice all codes are fitted again.

        i = argmax_i c_i / |a_i| over atoms outside the support S,   c = pre - A A_S^T z
        z = argmin_{z >= 0} |x - mu - A_S^T z|^2

    The fit is the inner loop of Lawson & Hanson (1974): where a least-squares code turns negative, its atom leaves S,
    so after enough rounds this *is* non-negative least squares. Codes of a row whose plain OMP never turns one
    negative are those of plain OMP. It stops early at a row that is explained. The gradient is
    that of the last least-squares fit on S. Each round costs an encoder product, and asks once whether a code turned
    negative, which waits for a GPU.
    """

    def pursue(self, rows, atoms, bias):
        support, active = self._support(rows, atoms.detach(), bias.detach())
        return support, _least_squares(rows, atoms, bias, support, active)

    @torch.no_grad()
    def _support(self, rows: Tensor, atoms: Tensor, bias: Tensor) -> tuple[Int[Tensor, "n k"], Bool[Tensor, "n k"]]:
        norms = atoms.norm(dim=1).clamp(min=torch.finfo(atoms.dtype).tiny)
        pre = F.linear(rows, atoms, bias)
        enough = NOTHING_LEFT * (pre / norms).amax(dim=1)
        support = torch.zeros(len(rows), self.k, dtype=torch.int64, device=rows.device)
        active = torch.zeros_like(support, dtype=torch.bool)
        codes = rows.new_zeros(len(rows), self.k)
        for slot in range(self.k):
            explained = torch.einsum("nk,nkd->nd", codes, atoms[support])
            correlation = (pre - explained @ atoms.T) / norms
            taken = torch.where(active, -torch.inf, torch.inf).to(correlation)
            correlation.scatter_reduce_(1, support, taken, "amin")
            best = correlation.max(dim=1)
            support[:, slot] = best.indices
            active[:, slot] = best.values > enough.clamp(min=0)
            codes, active = self._refit(rows, atoms, bias, support, active, codes)
        return support, active

    def _refit(self, rows, atoms, bias, support, active, codes) -> tuple[Tensor, Tensor]:
        """Non-negative least squares on the active slots, from codes that are feasible."""
        fitted = _least_squares(rows, atoms, bias, support, active)
        while bool((wrong := active & (fitted <= 0)).any()):
            share = torch.where(wrong, codes / (codes - fitted).clamp(min=torch.finfo(codes.dtype).tiny), torch.inf)
            reach = share.amin(dim=1, keepdim=True)
            active = active & ~(wrong & (share <= reach))  # it reached zero first
            codes = torch.where(active, codes + reach.clamp(max=1) * (fitted - codes), 0.0)
            fitted = _least_squares(rows, atoms, bias, support, active)
        return fitted, active


class Pursuit(Method):
    """z is a pursuit of x over the encoder rows (at most k above zero); loss mean |x_r - recon|^2.

    Both sides keep unit rows. An SAE starts with the decoder as its encoder; both get the gradient.
    """

    homogeneous = True
    masks_only = False
    tuned = ("k",)

    k = param.Integer(32, bounds=(1, None), doc="Latents chosen per row, at most.")
    orthogonal = param.Boolean(True, constant=True, doc="Fit all codes again after each choice (OMP); off: matching pursuit.")
    unit_norm = param.Boolean(True)

    def check(self, n_latents):
        super().check(n_latents)
        if self.k > n_latents:
            raise ValueError(f"Pursuit: k is {self.k} and n_latents {n_latents}; k can be at most n_latents.")

    def nonlinearity(self, n_latents):
        return OMP(self.k) if self.orthogonal else MatchingPursuit(self.k)

    def objective(self, dictionary, encoding, batch, context):
        return {"error": squared_error(encoding.reconstruction, batch.targets)}

    def after_step(self, dictionary, encoding, context):
        super().after_step(dictionary, encoding, context)
        if self.unit_norm:
            dictionary.W_enc.copy_(F.normalize(dictionary.W_enc, dim=1))


@torch.no_grad()
def with_pursuit(dictionary: SparseDictionary, k: int, orthogonal: bool = True) -> SparseDictionary:
    """A copy of a trained SAE whose codes are a pursuit over its *decoder* rows; the decoder stays.

        W_enc <- W_dec,   b_enc <- -W_dec @ b_dec   (0 where b_dec is subtracted from the input already)

    At most k codes above zero. A transcoder or crosscoder has no atoms for its input: raises ValueError.
    """
    kind = dictionary.provenance.get("kind") or "sae"
    if kind != "sae" or dictionary.d_in != dictionary.d_out:
        raise ValueError(
            f"with_pursuit: this is a {kind} of widths {dictionary.d_in} to {dictionary.d_out}, and a pursuit explains the input by "
            "decoder rows, which must live there. Use an SAE, or train with Pursuit()."
        )
    if not 1 <= k <= dictionary.n_latents:
        raise ValueError(f"with_pursuit: k is {k} and n_latents {dictionary.n_latents}; k is a whole number from 1 to n_latents.")
    copy = deepcopy(dictionary)
    copy.W_enc.copy_(copy.W_dec)
    copy.b_enc.copy_(torch.zeros_like(copy.b_enc) if copy.subtract_b_dec else -copy.W_dec @ copy.b_dec)
    copy.input_scale = copy.target_scale  # atoms live where the decoder writes
    copy.nonlinearity = OMP(k) if orthogonal else MatchingPursuit(k)
    return copy.train(dictionary.training)


def _least_squares(rows: Tensor, atoms: Tensor, bias: Tensor, support: Tensor, active: Tensor) -> Float[Tensor, "n k"]:
    """argmin_z |x - mu - A_S^T z|^2 on the active slots, 0 on the others; in float64, for atoms that are nearly parallel, and
    with a ridge of 1e-12 of their squared lengths, for a set that spans fewer dimensions than it has atoms."""
    chosen = atoms[support].double()
    target = torch.einsum("nkd,nd->nk", chosen, rows.double()) + bias[support].double()
    both = active[:, :, None] & active[:, None, :]
    gram = torch.where(both, chosen @ chosen.mT, 0.0)
    gram = gram + torch.diag_embed(torch.where(active, 1e-12 * gram.diagonal(dim1=1, dim2=2), 1.0))
    return torch.linalg.solve(gram, torch.where(active, target, 0.0)).to(rows.dtype)


def _merged(picks: Int[Tensor, "n k"], values: Float[Tensor, "n k"]) -> tuple[Tensor, Tensor]:
    """What was added to one latent in several rounds, in the slot of the first."""
    first = (picks[:, :, None] == picks[:, None, :]).int().argmax(dim=2)
    return picks, torch.zeros_like(values).scatter_add(1, first, values)


def _ragged(indices: Int[Tensor, "n k"], values: Float[Tensor, "n k"], n_latents: int) -> Latents:
    """The codes above zero alone."""
    used = values > 0
    offsets = F.pad(used.sum(dim=1).cumsum(dim=0), (1, 0))
    return Latents(values[used], indices[used], offsets, n_latents)
