"""Gated: one path decides which latents fire, another how strongly (Rajamanoharan et al. 2024a, arXiv 2404.16014)."""

import param
import torch
from torch import Tensor, nn

from sdl_explorer.models.dictionary import Latents, Nonlinearity
from sdl_explorer.models.methods.base import Method, pre_activations
from sdl_explorer.models.terms import squared_error, weighted_l1


class GatedRectified(Nonlinearity):
    """z = 1[pre > 0] * ReLU(pi_mag), with pre = pi_gate = W_enc x + b_enc.

        pi_mag = (exp(r) * W_enc) x + b_mag = exp(r) * (pre - b_enc) + b_mag

    `r` and `b_mag` (n_latents,) share the gate's directions. Nothing flows back through the gate.
    """

    def __init__(self, n_latents: int):
        super().__init__()
        self.r = nn.Parameter(torch.zeros(int(n_latents)))
        self.b_mag = nn.Parameter(torch.zeros(int(n_latents)))

    def settings(self):
        return {"n_latents": len(self.r)}

    def forward(self, pre: Tensor, *, inputs, dictionary) -> Tensor:
        magnitude = self.r.exp() * (pre - dictionary.b_enc) + self.b_mag
        return magnitude.relu() * (pre > 0)

    def absorb(self, shift: Tensor) -> None:
        self.b_mag.sub_(self.r.exp() * shift)


class Gated(Method):
    """loss = mean |x_r - recon|^2 + l1 * mean sum_i ReLU(pi_gate)_i |W_dec_i| + mean |x_r - recon of the gate path|^2.

    The gate path is ReLU(pi_gate) @ W_dec + b_dec through a frozen decoder, so that it trains the gate alone. The
    penalty falls on the gate, and magnitudes are not shrunk by it. Decoder rows are held at norm 1, as published:
    without `unit_norm` the penalty shrinks them for ever, since the frozen path does not hold them.
    """

    masks_only = False

    unit_norm = param.Boolean(True)
    l1 = param.Number(0.1, bounds=(0, None), doc="Weight of the L1 penalty on the gate.")

    def nonlinearity(self, n_latents):
        return GatedRectified(n_latents)

    def objective(self, dictionary, encoding, batch, context):
        gate = Latents(pre_activations(dictionary, encoding, batch.inputs).relu())
        through = gate.values @ dictionary.W_dec.detach() + dictionary.b_dec.detach()
        return {
            "error": squared_error(encoding.reconstruction, batch.targets),
            "l1": self.l1 * weighted_l1(gate, dictionary),
            "gate": squared_error(through, batch.targets),
        }
