"""TopK (Makhzani & Frey 2014; Gao et al. 2024) and BatchTopK (Bussmann et al. 2024)."""

import param
import torch
from torch import Tensor

from sdl_explorer.models.dictionary import Latents, Nonlinearity
from sdl_explorer.models.kernels import above, pays, top_batch, top_rows
from sdl_explorer.models.methods.base import Method
from sdl_explorer.models.terms import squared_error


class TopKSelection(Nonlinearity):
    """Keep the k largest pre-activations of each row, then ReLU."""

    homogeneous = True
    masks_only = True

    def __init__(self, k: int):
        super().__init__()
        self.k = int(k)

    def settings(self):
        return {"k": self.k}

    def select(self, inputs: Tensor, dictionary) -> Latents | None:
        """What `forward` gives, where it is cheaper without pre-activations of size n x n_latents; otherwise None."""
        return top_rows(inputs, dictionary, self.k) if pays(len(inputs), dictionary, self.k * len(inputs)) else None

    def forward(self, pre: Tensor, *, inputs, dictionary) -> Latents:
        values, indices = pre.topk(self.k, dim=1, sorted=False)
        return Latents.rows_of(values.relu(), indices, pre.shape[1])


class BatchTopKSelection(Nonlinearity):
    """Training: keep the k*n largest of the whole batch. Eval: keep z > threshold, the running mean over
    batches of the smallest positive value kept."""

    masks_only = True
    threshold: Tensor
    n_averaged: Tensor

    def __init__(self, k: int):
        super().__init__()
        self.k = int(k)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("n_averaged", torch.zeros((), dtype=torch.int64))

    def settings(self):
        return {"k": self.k}

    def select(self, inputs: Tensor, dictionary) -> Latents | None:
        """What `forward` gives, where it is cheaper without pre-activations of size n x n_latents; otherwise None."""
        if not self.training:
            return above(inputs, dictionary, self.threshold.clamp_min(0), lambda pre, _: pre.relu() * (pre > self.threshold))
        count = self.k * len(inputs)
        return top_batch(inputs, dictionary, count) if pays(len(inputs), dictionary, count) else None

    def forward(self, pre: Tensor, *, inputs, dictionary) -> Tensor:
        codes = pre.relu()
        if not self.training:
            return codes * (codes > self.threshold)
        n_kept = min(self.k * len(pre), codes.numel())
        kept = codes.flatten().topk(n_kept, sorted=False).indices
        mask = torch.zeros(codes.numel(), dtype=torch.bool, device=codes.device).index_fill(0, kept, True)
        return codes * mask.view_as(codes)

    @torch.no_grad()
    def average(self, codes: Tensor, rate: float) -> None:
        """Fold a batch's smallest positive value into the threshold; the first batch sets it."""
        smallest = torch.where(codes > 0, codes, torch.inf).amin()
        share = torch.where(self.n_averaged == 0, 1.0, rate)
        moved = self.threshold + share * (smallest - self.threshold)
        self.threshold.copy_(torch.where(smallest.isfinite(), moved, self.threshold))
        self.n_averaged += smallest.isfinite()


class _Top(Method):
    """What all share: k, unit decoder rows, and the squared error."""

    __abstract = True

    tuned = ("k",)
    k = param.Integer(32, bounds=(1, None), doc="Latents kept per row (on average per row in BatchTopK).")
    unit_norm = param.Boolean(True)

    def check(self, n_latents):
        super().check(n_latents)
        if self.k > n_latents:
            raise ValueError(f"{type(self).__name__}: k is {self.k} and n_latents {n_latents}; k can be at most n_latents.")

    def objective(self, dictionary, encoding, batch, context):
        return {"error": squared_error(encoding.reconstruction, batch.targets)}


class _RowTop(_Top):
    """k of each row."""

    __abstract = True

    homogeneous = True

    def nonlinearity(self, n_latents):
        return TopKSelection(self.k)


class _BatchTop(_Top):
    """k*n of the batch, and a threshold for the time after."""

    __abstract = True

    threshold_rate = param.Number(0.01, bounds=(0, 1), doc="Weight of a new batch in the running threshold.")

    def nonlinearity(self, n_latents):
        return BatchTopKSelection(self.k)

    def after_step(self, dictionary, encoding, context):
        super().after_step(dictionary, encoding, context)
        dictionary.nonlinearity.average(encoding.latents.values.detach(), self.threshold_rate)


class TopK(_RowTop):
    """z = ReLU(top-k of W_enc x + b_enc); loss mean |x_r - recon|^2."""


class BatchTopK(_BatchTop):
    """z keeps the k*n largest of a batch of n; at inference one threshold, so L0 is k on average."""
