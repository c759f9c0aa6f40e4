"""Could an encoder leave a parent silent where its child is? The linear programme for one candidate pair, without truth."""

from dataclasses import dataclass

import numpy as np
import torch

from sdl_explorer.diagnosis.alone import respond_alone
from sdl_explorer.diagnosis.cosines import unit
from sdl_explorer.diagnosis.realisable import Realisation, realise
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods.gated import GatedRectified
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.methods.relu import Rectified
from sdl_explorer.models.methods.topk import BatchTopKSelection

POINTWISE = (Rectified, JumpRectified, GatedRectified, BatchTopKSelection)


@dataclass(frozen=True)
class PairRealised:
    """`realisation` of the two rows on `n_directions` directions: decoder rows of latents, which stand in for true features.

    competes    the latents compete (Top-k), which the programme of two rows leaves out: it is then necessary, and not enough
    """

    parent: int
    child: int
    n_directions: int
    competes: bool
    realisation: Realisation

    def __str__(self) -> str:
        found = self.realisation
        near = f"on {self.n_directions} decoder directions, which stand in for true features"
        left = " The competition between latents is left out." if self.competes else ""
        margin = f" (margin {found.margin:.3g} of the longest encoder row)" if found.realisable else ""
        return (
            f"{found.verdict.capitalize()}{margin}: latent {self.parent} silent on latent {self.child}'s direction, both otherwise as they "
            f"are, {near}.{left} It does not say that training goes there."
        )


def realise_pair(dictionary: SparseDictionary, parent: int, child: int, n_near: int = 30) -> PairRealised:
    """Whether two encoder rows exist of which the parent's fires on its own direction and not on the child's, and the child's on its own.

    On the `n_near` directions nearest to the two, either row fires where it does now: each is shown alone at unit norm, added to b_dec.
    Directions are decoder rows: this applies where inputs are the targets. The rows may have biases where the dictionary has. Raises
    ValueError for ids that do not exist, and where inputs and targets differ in width. The pattern: arXiv 2512.05534, Theorem 3.8.
    """
    core = dictionary.core
    if core.d_in != core.d_out:
        raise ValueError(
            f"realise_pair: the dictionary reads {core.d_in} and writes {core.d_out} columns, so that decoder rows are no inputs; "
            "this applies where inputs are the targets."
        )
    for latent in (parent, child):
        if not 0 <= latent < core.n_latents or parent == child:
            raise ValueError(f"realise_pair: latents {parent} and {child} of {core.n_latents}; give two different ones, counted from 0.")
    rows = unit(core.W_dec.detach().float())
    pair = torch.tensor([parent, child], device=rows.device)
    near = (rows @ rows[pair].T).abs().amax(dim=1)
    near[pair] = torch.inf
    order = torch.topk(near, min(2 + n_near, len(near))).indices.tolist()
    chosen = [parent, child, *(i for i in order if i not in (parent, child) and near[i] > 0)]
    fires, _ = respond_alone(core, rows[chosen], offset=core.b_dec.detach())
    wanted = np.asarray(fires[[parent, child]].toarray() > 0)
    wanted[:, :2] = np.eye(2, dtype=bool)
    sigma = core.nonlinearity
    threshold = torch.as_tensor(getattr(sigma, "threshold", 0.0)).detach().float().cpu().expand(core.n_latents)[[parent, child]]
    shifted = core.b_enc.any() or (core.b_dec.any() and not core.subtract_b_dec)
    found = realise(wanted, rows[chosen], threshold=float(threshold.clamp(min=0).mean()), bias=bool(shifted))
    return PairRealised(parent, child, len(chosen), not isinstance(sigma, POINTWISE), found)
