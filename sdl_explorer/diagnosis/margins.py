"""How far below its threshold a silent latent stays, and so how often it may be expected to fire."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sdl_explorer.diagnosis.observe import BLOCK_BYTES, Accumulator, Rows, Stream
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods.gated import GatedRectified
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.methods.relu import Rectified
from sdl_explorer.models.methods.topk import BatchTopKSelection, TopKSelection

MOST_ROWS = 2**14  # whose margins are taken; pre-activations of silent latents alone, on these rows alone
LARGEST = 32  # margins that make the tail
SHARE = 0.1  # of the rows, at most
FLOOR = 1e-12  # the least rate that is told


class Margins(Accumulator):
    """The largest margins of each latent that never fires, (n_latents, LARGEST); those of the others are not kept up.

        margin = pre_i - bar,   bar: what pre_i must exceed to fire on this row

    bar is 0 for a ReLU, a threshold where there is one, and the smallest code kept on the row for a TopK. Nonlinearities that look at
    more than that (pursuits, lasso, any function) have no margin.
    """

    def __init__(self, stream: Stream):
        super().__init__(stream)
        n_latents, device = stream.dictionary.n_latents, stream.dictionary.device
        self.n, self.known = 0, False
        self.fired = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.top = torch.full((n_latents, LARGEST), -torch.inf, device=device)

    def add(self, rows: Rows) -> None:
        self.n += rows.n
        self.fired += rows.count
        dictionary, inputs = self.stream.dictionary, rows.inputs[: max(0, MOST_ROWS - rows.start)]
        bar = _bar(dictionary, rows)
        if bar is None or not len(inputs):
            return
        self.known = True
        inputs, bar = inputs.to(dictionary.W_enc), bar.expand(rows.n, -1)[: len(inputs)]
        for some in (self.fired == 0).nonzero()[:, 0].split(max(1, BLOCK_BYTES // (4 * len(inputs)))):
            margins = dictionary.pre(inputs, some).float() - (bar[:, some] if bar.shape[1] > 1 else bar)
            self.top[some] = torch.cat([self.top[some], margins.T], dim=1).topk(LARGEST, dim=1).values

    def rates(self) -> Float[np.ndarray, " n_latents"]:
        """r / n exp(-gap / excess), the tail of the r largest of n margins taken as exponential: gap is what the r-th of them lacks,
        excess the mean of the others above it (Weissman 1978). 1 where nothing is known, as of a latent that fired.
        """
        n = min(self.n, MOST_ROWS)
        r, silent, rates = min(LARGEST, int(SHARE * n)), (self.fired == 0).cpu().numpy(), np.ones(len(self.top))
        if not self.known or r < 2:
            return rates
        top = self.top[:, :r].double().cpu().numpy()[silent]
        gap, excess = np.maximum(-top[:, -1], 0), (top[:, :-1] - top[:, -1:]).mean(axis=1)
        near = np.divide(gap, excess, out=np.full(len(gap), np.inf), where=excess > 0)  # without spread nothing comes nearer
        rates[silent] = np.clip(r / n * np.exp(-near), FLOOR, 1)
        return rates


def _bar(dictionary: SparseDictionary, rows: Rows) -> Tensor | None:
    """What pre-activations must exceed, (b or 1, n_latents or 1); None where that alone does not decide."""
    sigma = dictionary.nonlinearity
    if isinstance(sigma, TopKSelection):
        _, row, code = rows.entries
        least = code.new_full((rows.n,), torch.inf).scatter_reduce(0, row, code, "amin")
        return torch.where(torch.bincount(row, minlength=rows.n) >= sigma.k, least, 0)[:, None]
    if isinstance(sigma, GatedRectified):  # exp(r) (pre - b_enc) + b_mag must be positive as well
        bar = dictionary.b_enc - sigma.b_mag * (-sigma.r).exp()
    elif isinstance(sigma, (BatchTopKSelection, JumpRectified)):
        bar = sigma.threshold
    elif isinstance(sigma, Rectified):
        bar = torch.zeros(1, device=dictionary.device)
    else:
        return None
    return bar.detach().float().clamp_min(0).reshape(1, -1)
