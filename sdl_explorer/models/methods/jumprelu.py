"""JumpReLU with rectangle straight-through gradients and a step (L0) penalty (Rajamanoharan et al. 2024b), or a tanh
penalty and a pre-activation loss (Conerly et al., Circuits Updates January 2025)."""

import param
import torch
from torch import Tensor, nn

from sdl_explorer.models.dictionary import Encoding, Latents, Nonlinearity
from sdl_explorer.models.kernels import above
from sdl_explorer.models.methods.base import Method, pre_activations
from sdl_explorer.models.terms import pre_activation_loss, smooth_l0, squared_error


class _Jump(torch.autograd.Function):
    """z = pre * H(pre - theta); d z / d theta = -(theta / bandwidth) K((pre - theta) / bandwidth)."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        edge = _rectangle(pre - threshold, ctx.bandwidth)
        return grad * (pre > threshold), -(grad * edge * threshold).sum_to_size(threshold.shape), None


class _Step(torch.autograd.Function):
    """H(pre - theta); d / d theta = -(1 / bandwidth) K((pre - theta) / bandwidth), none for pre."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        return None, -(grad * _rectangle(pre - threshold, ctx.bandwidth)).sum_to_size(threshold.shape), None


def _rectangle(distance: Tensor, bandwidth: float) -> Tensor:
    return (distance.abs() < bandwidth / 2).to(distance.dtype) / bandwidth


class JumpRectified(Nonlinearity):
    """z_i = pre_i if pre_i > threshold_i else 0, threshold >= 0."""

    masks_only = True

    def __init__(self, n_latents: int, bandwidth: float = 1e-3):
        super().__init__()
        self.bandwidth = float(bandwidth)
        self.threshold = nn.Parameter(torch.zeros(int(n_latents)))

    def settings(self):
        return {"n_latents": len(self.threshold), "bandwidth": self.bandwidth}

    def select(self, inputs: Tensor, dictionary) -> Latents | None:
        """What `forward` gives, where the codes are sparse enough to be cheaper so; otherwise None. Entries begin at
        theta - bandwidth / 2, where the straight-through gradients do."""
        jump = lambda pre, latents: _Jump.apply(pre, self.threshold[latents], self.bandwidth)
        return above(inputs, dictionary, self.threshold.detach() - self.bandwidth / 2, jump)

    def forward(self, pre: Tensor, *, inputs, dictionary) -> Tensor:
        return _Jump.apply(pre, self.threshold, self.bandwidth)

    def active(self, pre: Tensor, latents: Tensor | None = None) -> Tensor:
        """H(pre - theta), with the straight-through gradient to theta; `latents` says whose, where pre is not of all."""
        return _Step.apply(pre, self.threshold if latents is None else self.threshold[latents], self.bandwidth)

    def l0(self, encoding: Encoding) -> Tensor:
        """mean_r sum_i H(pre_i - theta_i). Entries that `select` left out are further below theta than a gradient reaches."""
        if encoding.pre is not None:
            return self.active(encoding.pre).sum(dim=1).mean()
        return self.active(encoding.latents.bags.pre, encoding.latents.layout[0]).sum() / encoding.latents.n


class JumpReLU(Method):
    """loss = mean |x_r - recon|^2 + l0 * L0, with the L0 of `penalty`:

        "step"    mean sum_i H(pre_i - theta_i)              its gradient reaches theta alone
        "tanh"    mean sum_i tanh(tanh_scale * z_i |W_dec_i|)  its gradient reaches the encoder too

    With `l0_target` the penalty is l0 * (L0 / l0_target - 1)^2 instead, which holds that L0 there (sae-lens squares the
    distance of each row from the target, not of their mean). `pre_loss` adds
    pre_loss * mean sum_i max(theta_i - pre_i, 0) |W_dec_i| over the dead latents i, which brings them back.
    """

    tuned = ("bandwidth",)
    l0 = param.Number(0.1, bounds=(0, None), doc="Weight of the L0 penalty.")
    penalty = param.Selector(default="step", objects=["step", "tanh"], doc="How L0 is made differentiable.")
    tanh_scale = param.Number(4.0, bounds=(0, None), inclusive_bounds=(False, True), doc="Steepness of the tanh penalty.")
    l0_target = param.Number(
        None, bounds=(0, None), inclusive_bounds=(False, True), allow_None=True, doc="Hold L0 here; None: penalise L0 itself."
    )
    bandwidth = param.Number(1e-3, bounds=(0, None), inclusive_bounds=(False, True), doc="Width of the straight-through rectangle.")
    threshold = param.Number(1e-3, bounds=(0, None), inclusive_bounds=(False, True), doc="Threshold at the start.")
    pre_loss = param.Number(
        0.0, bounds=(0, None), doc="Weight of the loss that lifts dead latents towards their threshold; 3e-6 as published."
    )

    def nonlinearity(self, n_latents):
        sigma = JumpRectified(n_latents, self.bandwidth)
        with torch.no_grad():
            sigma.threshold.fill_(self.threshold)
        return sigma

    def objective(self, dictionary, encoding, batch, context):
        sigma = dictionary.nonlinearity
        l0 = smooth_l0(encoding.latents, dictionary, self.tanh_scale) if self.penalty == "tanh" else sigma.l0(encoding)
        penalty = l0 if self.l0_target is None else (l0 / self.l0_target - 1).square()
        losses = {"error": squared_error(encoding.reconstruction, batch.targets), "l0": self.l0 * penalty}
        if self.pre_loss > 0:
            pre = pre_activations(dictionary, encoding, batch.inputs)
            losses["pre"] = self.pre_loss * pre_activation_loss(pre, dictionary, sigma.threshold, among=context.dead)
        return losses

    def after_step(self, dictionary, encoding, context):
        super().after_step(dictionary, encoding, context)
        dictionary.nonlinearity.threshold.clamp_(min=0)
