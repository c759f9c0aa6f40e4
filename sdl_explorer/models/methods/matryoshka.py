"""One dictionary at several scales: nested prefixes of it (Bussmann et al. 2025), or several k (arXiv 2512.05534, eq. 9).

The two share a name in the literature and nothing else: a prefix orders the latents, a second k does not.
"""

from itertools import pairwise

import param
import torch
from jaxtyping import Float
from torch import Tensor

from sdl_explorer.models.dictionary import Encoding, Latents, SparseDictionary
from sdl_explorer.models.kernels import Bags, pays, top_rows
from sdl_explorer.models.methods.auxiliary import _Auxiliary
from sdl_explorer.models.methods.topk import BatchTopKSelection, TopKSelection, _BatchTop, _RowTop
from sdl_explorer.models.terms import squared_error


class NestedSelection(BatchTopKSelection):
    """BatchTopK of a dictionary whose prefixes are dictionaries too; it remembers their `widths`, the last one n_latents."""

    def __init__(self, k: int, widths: list[int], n_latents: int | None = None):
        super().__init__(k, n_latents)
        self.widths = [int(width) for width in widths]

    def settings(self):
        return super().settings() | {"widths": self.widths}


def nested_reconstructions(dictionary: SparseDictionary, latents: Latents, widths: list[int]) -> Float[Tensor, "levels n d_out"]:
    """recon_m = sum_{i < m} z_i W_dec_i + b_dec for each m of the increasing `widths`, at the cost of one decode.

    Dense and sparse latents give the same; in the sparse case each (block between two widths, row) is one bag.
    """
    if not latents.is_sparse:
        blocks = [latents.values[:, a:b] @ dictionary.W_dec[a:b] for a, b in pairwise([0, *widths])]
        return torch.stack(blocks).cumsum(dim=0) + dictionary.b_dec
    n, indices = latents.n, latents.layout[0]
    block = torch.stack([indices >= width for width in widths]).sum(dim=0)  # the last one lies beyond all widths
    bag, order = torch.sort(block * n + latents.row, stable=True)
    offsets = torch.searchsorted(bag, torch.arange((len(widths) + 1) * n + 1, device=bag.device))
    sums = Bags(indices[order], offsets, latents.n_latents).decode(latents.values[order], dictionary.W_dec)
    return sums.view(-1, n, dictionary.d_out)[:-1].cumsum(dim=0) + dictionary.b_dec


class Matryoshka(_Auxiliary, _BatchTop):
    """Nested prefixes: BatchTopK whose first m latents are a dictionary too, for each width m.

    loss = sum_m mean |x_r - (sum_{i < m} z_i W_dec_i + b_dec)|^2 + aux; "error" is the term of all latents, "nested" those
    of the inner prefixes. General concepts move to the front, and children no longer absorb them (Bussmann et al. 2025).
    """

    prefixes = param.List(
        [1 / 16, 1 / 8, 1 / 4, 1 / 2],
        item_type=(int, float),
        doc="Inner widths: numbers below 1 are shares of n_latents (rounded, at least 1), others are sizes. The whole dictionary is added.",
    )

    def check(self, n_latents):
        super().check(n_latents)
        for width in self.prefixes:
            if not (0 < width < 1 or (1 <= width <= n_latents and width == int(width))):
                raise ValueError(
                    f"Matryoshka: a prefix is {width} and n_latents {n_latents}; give shares below 1, or whole sizes up to n_latents."
                )

    def widths(self, n_latents: int) -> list[int]:
        """The increasing widths, the last one n_latents; shares that round to one width count once."""
        sizes = {max(1, round(width * n_latents)) if width < 1 else int(width) for width in self.prefixes}
        return sorted(sizes | {n_latents})

    def nonlinearity(self, n_latents):
        return NestedSelection(self.k, self.widths(n_latents), n_latents if self.by == "contribution" else None)

    def retune(self, nonlinearity):
        super().retune(nonlinearity)
        if isinstance(nonlinearity, NestedSelection):
            nonlinearity.widths = self.widths(nonlinearity.widths[-1])

    def objective(self, dictionary, encoding, batch, context):
        losses = super().objective(dictionary, encoding, batch, context)
        inner = self.widths(dictionary.n_latents)[:-1]
        levels = nested_reconstructions(dictionary, encoding.latents, inner) if inner else batch.targets[None][:0]
        return losses | {"nested": (levels - batch.targets).square().sum(dim=2).mean(dim=1).sum()}


class Ranked(Latents):
    """The codes of k, with the ranking of more latents that they were cut from."""

    def __init__(self, ranking: Latents, k: int):
        codes = _cut(ranking, k)
        super().__init__(codes.values, codes.indices, codes.offsets, codes.n_latents, codes.bags)
        self.ranking = ranking


class RankedSelection(TopKSelection):
    """TopK that in training ranks `most` latents a row, so that all k_i are cut from one encoder product."""

    def __init__(self, k: int, most: int):
        super().__init__(k)
        self.most = int(most)

    def settings(self):
        return super().settings() | {"most": self.most}

    def select(self, inputs: Tensor, dictionary) -> Latents | None:
        """The codes of `TopKSelection`; in training `Ranked` ones, or None where that many are too dense for the kernels."""
        if not self.training:
            return super().select(inputs, dictionary)
        most = min(max(self.most, self.k), dictionary.n_latents)
        return Ranked(top_rows(inputs, dictionary, most), self.k) if pays(len(inputs), dictionary, most * len(inputs)) else None


class MultiTopK(_RowTop):
    """Several k: the same latents ranked once and cut at k and at further k_i, each with its own reconstruction.

    loss = mean |x_r - recon(top k)|^2 + sum_i weight_i mean |x_r - recon(top k_i)|^2 (arXiv 2512.05534, eq. 9). The codes
    are those of k. The default is Gao et al.'s L(k) + L(4k) / 8, which keeps a dictionary good when it is read at another k.
    """

    multiples = param.List(
        [4.0], item_type=(int, float), doc="Each further k_i as a multiple of k; k_i is at least 1 and at most n_latents."
    )
    weights = param.List([1 / 8], item_type=(int, float), doc="Weight of each further term, one for each multiple.")

    def check(self, n_latents):
        super().check(n_latents)
        if len(self.weights) != len(self.multiples):
            raise ValueError(
                f"MultiTopK: {len(self.multiples)} multiples and {len(self.weights)} weights; give one weight for each multiple."
            )
        for name, values in (("multiple", self.multiples), ("weight", self.weights)):
            if bad := [value for value in values if not 0 < value < float("inf")]:
                raise ValueError(f"MultiTopK: a {name} is {bad[0]}; it must be a positive number.")

    def further(self, n_latents: int) -> list[int]:
        """k_i of each multiple."""
        return [min(max(round(multiple * self.k), 1), n_latents) for multiple in self.multiples]

    @property
    def most(self) -> int:
        """The largest of all k."""
        return max(self.k, *(round(multiple * self.k) for multiple in self.multiples), 1)

    def nonlinearity(self, n_latents):
        return RankedSelection(self.k, self.most)

    def retune(self, nonlinearity):
        super().retune(nonlinearity)
        if isinstance(nonlinearity, RankedSelection):
            nonlinearity.most = self.most

    def objective(self, dictionary, encoding, batch, context):
        losses = super().objective(dictionary, encoding, batch, context)
        ks = self.further(dictionary.n_latents)
        ranking = _ranking(dictionary, encoding, batch.inputs, max(ks, default=1))
        errors = [squared_error(dictionary.decode(_cut(ranking, k)), batch.targets) for k in ks]
        further = sum((weight * error for weight, error in zip(self.weights, errors, strict=True)), losses["error"].new_zeros(()))
        return losses | {"further": further}


def _ranking(dictionary: SparseDictionary, encoding: Encoding, inputs: Tensor, k: int) -> Latents:
    """At least the k largest of each row; where the encoding kept neither them nor pre, at the cost of a second encoder product."""
    sigma, pre, latents = TopKSelection(k), encoding.pre, encoding.latents
    if isinstance(latents, Ranked) and len(latents.ranking.values) >= k * latents.n:
        return latents.ranking
    selected = sigma.select(inputs, dictionary) if pre is None else None
    if selected is not None:
        return selected
    return sigma(dictionary.pre(inputs) if pre is None else pre, inputs=inputs, dictionary=dictionary)


def _cut(latents: Latents, k: int) -> Latents:
    """The k largest of each row of latents with the same number in each."""
    n, n_latents = latents.n, latents.n_latents
    values, indices = latents.values.view(n, -1), latents.layout[0].view(n, -1)
    if k == values.shape[1]:
        return latents
    values, places = values.topk(k, dim=1, sorted=False)
    cut = Latents.rows_of(values, indices.gather(1, places), n_latents)
    if latents.bags is not None:
        cut.bags = Bags(*cut.layout, n_latents)
    return cut
