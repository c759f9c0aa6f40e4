"""TopK and BatchTopK with an auxiliary loss that brings dead latents back (AuxK; Gao et al. 2024, appendix A.2)."""

import param
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods.topk import _BatchTop, _RowTop, _Top
from sdl_explorer.models.terms import squared_error

SIGNS = ("signed", "rectified")


def dead_error(
    dictionary: SparseDictionary,
    inputs: Float[Tensor, "n d_in"],
    residual: Float[Tensor, "n d_out"],
    dead: Int[Tensor, " n_dead"],
    k: int,
    sign: str = "signed",
) -> Float[Tensor, ""]:
    """How badly dead latents rebuild what the live ones leave over, as a share of its variance.

        e = residual, detached;   z = the k largest pre of the dead latents in each row
        mean_r |e - z @ W_dec[dead]|^2 / mean_r |e - mean e|^2

    Gradient goes to the dead rows of W_enc, b_enc and W_dec alone. "signed" keeps z as it is, so it reaches every chosen
    encoder row; "rectified" takes z = ReLU(z), so a latent whose pre-activations are all negative gets none. Residuals
    that are all alike (variance 0) give 0, and so do no dead latents.
    """
    if len(dead) == 0:
        return residual.new_zeros(())
    residual = residual.detach()
    codes = linear(dictionary.centred(inputs).detach(), dictionary.W_enc[dead], dictionary.b_enc[dead])
    if k < len(dead):
        values, indices = codes.topk(k, dim=1, sorted=False)
        codes = torch.zeros_like(codes).scatter(1, indices, values)
    if sign == "rectified":
        codes = codes.relu()
    variance = squared_error(residual, residual.mean(dim=0))
    return squared_error(codes @ dictionary.W_dec[dead], residual) / torch.where(variance > 0, variance, torch.inf)


class _Auxiliary(_Top):
    """Adds aux * dead_error. Comes before `_RowTop` or `_BatchTop` among the bases.

    Finding the dead latents is the one place of a step where the host waits for the device: their number is a shape.
    """

    __abstract = True

    aux = param.Number(1 / 32, bounds=(0, None), doc="Weight of the dead latents' error; 0 leaves it out.")
    k_aux = param.Integer(None, bounds=(1, None), allow_None=True, doc="Dead latents that rebuild a row's residual; None: half of d_out.")
    sign = param.Selector(
        default="signed",
        objects=list(SIGNS),
        doc="signed: dead latents are reached wherever their pre-activations are. rectified: only where they are positive (as published).",
    )

    def objective(self, dictionary, encoding, batch, context):
        losses = super().objective(dictionary, encoding, batch, context)
        if self.aux == 0:
            return losses | {"aux": losses["error"].new_zeros(())}
        dead = context.dead.nonzero().flatten()
        k = self.k_aux or max(1, dictionary.d_out // 2)
        residual = batch.targets - encoding.reconstruction
        return losses | {"aux": self.aux * dead_error(dictionary, batch.inputs, residual, dead, k, self.sign)}


class TopKAux(_Auxiliary, _RowTop):
    """loss = mean |x_r - recon|^2 + aux * (error of the residual's rebuild from dead latents / variance of the residual)."""


class BatchTopKAux(_Auxiliary, _BatchTop):
    """BatchTopK with the auxiliary error of TopKAux."""
