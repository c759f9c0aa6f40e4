"""TopK (Makhzani & Frey 2014; Gao et al. 2024) and BatchTopK (Bussmann et al. 2024)."""

import param
import torch
from torch import Tensor

from sdl_explorer.models.dictionary import Latents, Nonlinearity
from sdl_explorer.models.kernels import above, pays, top_batch, top_rows
from sdl_explorer.models.methods.base import Method
from sdl_explorer.models.terms import squared_error

TINY = 1e-12  # least norm that a contribution is divided by


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
    batches of the smallest positive value kept.

    Without `n_latents` the values are z_i, and one threshold serves all latents. With it they are contributions
    c_i = z_i |W_dec_i|, which do not depend on how a latent's length is shared between its two rows, and latent i has
    the threshold of its own that comes of averaging (smallest c kept) / |W_dec_i|.
    """

    masks_only = True
    threshold: Tensor
    n_averaged: Tensor

    def __init__(self, k: int, n_latents: int | None = None):
        super().__init__()
        self.k = int(k)
        self.by_contribution = n_latents is not None
        self.register_buffer("threshold", torch.zeros(() if n_latents is None else int(n_latents)))
        self.register_buffer("n_averaged", torch.zeros((), dtype=torch.int64))

    def settings(self):
        return {"k": self.k} | ({"n_latents": len(self.threshold)} if self.by_contribution else {})

    def gain(self, dictionary) -> Tensor | None:
        """What a code is multiplied by before it competes: |W_dec_i|, or None where codes compete as they are."""
        return dictionary.W_dec.detach().norm(dim=1).clamp_min(TINY) if self.by_contribution else None

    def select(self, inputs: Tensor, dictionary) -> Latents | None:
        """What `forward` gives, where it is cheaper without pre-activations of size n x n_latents; otherwise None."""
        if not self.training:
            bound = lambda latents: self.threshold[latents] if self.by_contribution else self.threshold
            return above(inputs, dictionary, self.threshold.clamp_min(0), lambda pre, latents: pre.relu() * (pre > bound(latents)))
        count = self.k * len(inputs)
        return top_batch(inputs, dictionary, count, self.gain(dictionary)) if pays(len(inputs), dictionary, count) else None

    def forward(self, pre: Tensor, *, inputs, dictionary) -> Tensor:
        codes = pre.relu()
        if not self.training:
            return codes * (codes > self.threshold)
        gain = self.gain(dictionary)
        values = codes if gain is None else codes.detach() * gain
        n_kept = min(self.k * len(pre), codes.numel())
        kept = values.flatten().topk(n_kept, sorted=False).indices
        mask = torch.zeros(codes.numel(), dtype=torch.bool, device=codes.device).index_fill(0, kept, True)
        return codes * mask.view_as(codes)

    @torch.no_grad()
    def average(self, latents: Latents, dictionary, rate: float) -> None:
        """Fold a batch's smallest positive value into the threshold; the first batch sets it."""
        gain, codes = self.gain(dictionary), latents.values.detach()
        values = codes if gain is None else codes * (gain[latents.layout[0]] if latents.is_sparse else gain)
        smallest = torch.where(values > 0, values, torch.inf).amin()
        share = torch.where(self.n_averaged == 0, 1.0, rate)
        moved = self.threshold + share * ((smallest if gain is None else smallest / gain) - self.threshold)
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
    by = param.Selector(
        default="code",
        objects=["code", "contribution"],
        constant=True,
        doc="What competes for the k places of a row: codes z_i, or contributions z_i |W_dec_i|. With unit decoder rows they are one.",
    )

    def nonlinearity(self, n_latents):
        return BatchTopKSelection(self.k, n_latents if self.by == "contribution" else None)

    def after_step(self, dictionary, encoding, context):
        super().after_step(dictionary, encoding, context)
        dictionary.nonlinearity.average(encoding.latents, dictionary, self.threshold_rate)


class TopK(_RowTop):
    """z = ReLU(top-k of W_enc x + b_enc); loss mean |x_r - recon|^2."""


class BatchTopK(_BatchTop):
    """z keeps the k*n largest of a batch of n; at inference one threshold, so L0 is k on average."""
