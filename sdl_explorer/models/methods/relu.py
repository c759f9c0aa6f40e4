"""ReLU with an L1 penalty, plain (Bricken et al. 2023) or weighted by decoder norms (Conerly et al. 2024)."""

import param
import torch
from torch import Tensor

from sdl_explorer.models.dictionary import Latents, Nonlinearity
from sdl_explorer.models.kernels import above
from sdl_explorer.models.methods.base import Method
from sdl_explorer.models.terms import plain_l1, squared_error, weighted_l1


class Rectified(Nonlinearity):
    """z = max(pre, 0). `log_scale` multiplies the penalty where a method holds L0 at a target."""

    homogeneous = True
    masks_only = True
    log_scale: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("log_scale", torch.zeros(()))

    def select(self, inputs: Tensor, dictionary) -> Latents | None:
        """What `forward` gives, where the codes are sparse enough to be cheaper so; otherwise None."""
        return above(inputs, dictionary)

    def forward(self, pre: Tensor, *, inputs, dictionary) -> Tensor:
        return pre.relu()


class ReLU(Method):
    """loss = mean |x_r - recon|^2 + l1 * mean sum_i z_i |W_dec_i|, or l1 * mean sum_i z_i with `penalty="plain"`.

    The plain penalty vanishes as codes shrink and decoder rows grow: use it with `unit_norm`, where both are one.

    With `l0_target` the penalty is multiplied by exp(log_scale), which grows while L0 is above the target
    and falls while it is below: d log_scale = l0_rate * (L0 / l0_target - 1) a step, at most l0_rate.
    """

    homogeneous = True

    l1 = param.Number(0.1, bounds=(0, None), doc="Weight of the L1 penalty.")
    penalty = param.Selector(default="weighted", objects=["weighted", "plain"], doc="L1 weighted by decoder norms, or of the codes alone.")
    l0_target = param.Number(
        None, bounds=(0, None), inclusive_bounds=(False, True), allow_None=True, doc="Hold L0 here by scaling l1; None: leave l1 alone."
    )
    l0_rate = param.Number(0.01, bounds=(0, 1), doc="How fast the penalty follows l0_target.")

    def nonlinearity(self, n_latents):
        return Rectified()

    def objective(self, dictionary, encoding, batch, context):
        weight = self.l1 if self.l0_target is None else self.l1 * dictionary.nonlinearity.log_scale.exp()
        l1 = weighted_l1(encoding.latents, dictionary) if self.penalty == "weighted" else plain_l1(encoding.latents)
        return {"error": squared_error(encoding.reconstruction, batch.targets), "l1": weight * l1}

    def after_step(self, dictionary, encoding, context):
        super().after_step(dictionary, encoding, context)
        if self.l0_target is not None:
            excess = encoding.latents.l0 / self.l0_target - 1
            dictionary.nonlinearity.log_scale += self.l0_rate * excess.clamp(-1, 1)
