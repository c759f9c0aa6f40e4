"""Encode, select and decode at the cost of one dense product: everything after the selection is sparse.

    z_e = x_r . W_enc[i] + b_enc[i]    for each kept entry e = (row r, latent i)
    recon_r = sum_e z_e W_dec[i]

Forward makes pre-activations a part at a time (`products`), so nothing of size n x n_latents is kept for
backward. Gradients are those of the dense formula: both weights' are sums over the entries of each
latent. On one machine the same input gives the same bits, whichever path a size takes.
"""

from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sdl_explorer.models.dictionary import Latents, SparseDictionary
from sdl_explorer.models.products import (
    BLOCK,
    GROUP,
    Exact,
    Rounded,
    Upper,
    blocks,
    ceiling,
    in_bfloat16,
    in_mixed_precision,
    tiles,
    with_spare,
)

DENSITY = 1 / 32  # share of kept entries up to which sparse sums beat dense products
PROBE = 64  # rows that tell whether a batch is sparse
SMALL = 5e7  # multiply-adds of an encoder product below which a dense step is as fast


def pays(n: int, dictionary: SparseDictionary, entries: int) -> bool:
    """Is the sparse path the faster one for n rows with this many entries in all? A rule of sizes, never of clocks."""
    product = n * dictionary.n_latents * dictionary.d_in
    return product >= SMALL and entries <= DENSITY * n * dictionary.n_latents


# selection ------------------------------------------------------------------------------------------------------------


def largest(scores: Float[Tensor, "n m"], k: int) -> tuple[Tensor, Tensor]:
    """(values, indices) of the k largest of each row, in no order: `scores.topk(k, sorted=False)`, faster.

    The k largest of a row lie in the k groups with the largest maxima: were one outside, each of those k
    groups would hold a larger one. Groups are strided, member j of group g is column g + j * m / 16, so that
    a maximum is taken elementwise over contiguous memory. As in `topk`, NaN counts as the largest, and
    which of several equal scores are kept is arbitrary. Where 16 does not divide m, or fewer than 4 k groups
    come out, it is `topk`.
    """
    n, m = scores.shape
    groups = m // GROUP
    if m % GROUP or groups < 4 * k:
        values, indices = scores.topk(k, dim=1, sorted=False)
        return values, indices
    best = scores.view(n, GROUP, groups).amax(dim=1).topk(k, dim=1, sorted=False).indices
    members = (best[:, None, :] + groups * torch.arange(GROUP, device=scores.device)[:, None]).view(n, -1)
    values, place = scores.gather(1, members).topk(k, dim=1, sorted=False)
    return values, members.gather(1, place)


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def select_rows(inputs: Float[Tensor, "n d_in"], dictionary: SparseDictionary, k: int) -> tuple[Tensor, Tensor]:
    """(values, indices), both (n, k): the k largest pre-activations of each row."""
    exact = Exact.of(inputs, dictionary)
    values, indices = exact.empty(exact.n * k).view(-1, k), torch.empty(exact.n, k, dtype=torch.int64, device=exact.device)
    if in_mixed_precision(inputs):
        for rows, pre in blocks(Rounded(exact)):
            indices[rows] = largest(pre, k)[1]
        return exact.at(indices.view(-1), torch.arange(exact.n + 1, device=exact.device) * k).view(-1, k), indices
    if not in_bfloat16(inputs, dictionary):
        for rows, pre in blocks(exact):
            values[rows], indices[rows] = largest(pre, k)
        return values, indices

    left = torch.ones(exact.n, dtype=torch.bool)
    for rows, upper in blocks(Upper(exact)):
        values[rows], indices[rows], certain = _largest_rows(exact, rows, upper, k)
        left[rows] = ~certain
        if 2 * left[: rows.stop].sum() > rows.stop:
            break  # bounds too wide for these rows: float32 takes the others too
    left = left.nonzero().view(-1)
    for rows, pre in blocks(exact.rows(left)) if len(left) else ():
        values[left[rows]], indices[left[rows]] = largest(pre, k)
    return values, indices


def _largest_rows(exact: Exact, rows: slice, upper: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values, indices, is it certain) of the k largest of each row, looked for among those of the largest bounds."""
    bounds, candidates = largest(upper, with_spare(k, exact.m))
    offsets = torch.arange(len(bounds) + 1) * candidates.shape[1]
    values, place = exact.at(candidates.view(-1), offsets, rows).view(bounds.shape).topk(k, dim=1, sorted=False)
    return values, candidates.gather(1, place), values.amin(dim=1) >= ceiling(bounds.amin(dim=1))


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def select_batch(
    inputs: Float[Tensor, "n d_in"], dictionary: SparseDictionary, count: int, gain: Float[Tensor, " m"] | None = None
) -> tuple[Tensor, Tensor]:
    """(values, flat indices), both (count,): the `count` largest pre-activations of the whole batch, each times its latent's
    gain where there is one, by index."""
    exact = Exact.of(inputs, dictionary, gain)
    if in_mixed_precision(inputs):
        _, where = _largest_of_tiles(Rounded(exact), count)
        return exact.where(where), where
    if in_bfloat16(inputs, dictionary):
        bounds, candidates = _largest_of_tiles(Upper(exact), with_spare(count, exact.n * exact.m))
        values = exact.where(candidates)
        kept = values.topk(count, sorted=False).indices.sort().values
        if values[kept].amin() >= ceiling(bounds.amin()):
            return values[kept], candidates[kept]
    return _largest_of_tiles(exact, count)


def _largest_of_tiles(product: Exact | Upper, count: int) -> tuple[Tensor, Tensor]:
    """The smallest of the best so far bounds the final ones from below, so a later tile adds only what reaches it."""
    best, where = product.empty(0), torch.empty(0, dtype=torch.int64, device=product.device)
    for latents, scores in tiles(product):
        found, at = _reaching(scores, best.amin()) if len(best) == count else _largest_of_all(scores, count)
        best, where = torch.cat([best, found]), torch.cat([where, _place(at, latents, product.m)])
        if len(best) > count:
            best, kept = best.topk(count, sorted=False)
            where = where[kept]
    where, order = where.sort()
    return best[order], where


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def select_above(inputs: Float[Tensor, "n d_in"], dictionary: SparseDictionary, floor: Tensor | float) -> tuple[Tensor, Tensor] | None:
    """(values, flat indices) of the pre-activations at or above `floor`, a number or one for each latent, by row.

    None where dense products are the faster way: too small a problem, more than DENSITY of the first rows'
    pre-activations, or an accelerator, which would have to tell the host how many there are.
    """
    if inputs.device.type != "cpu" or not pays(len(inputs), dictionary, 0):
        return None
    if (dictionary.pre(inputs[:PROBE]) >= floor).float().mean() > DENSITY:
        return None
    exact = Exact.of(inputs, dictionary)
    if not in_bfloat16(inputs, dictionary):
        return _all_reaching(exact, floor)
    candidates = _all_reaching(Upper(exact, floor), 0.0)[1]
    values = exact.where(candidates)
    kept = (~(values < _of(floor, candidates % exact.m))).nonzero().view(-1)
    return values[kept], candidates[kept]


def _all_reaching(product: Exact | Upper, floor: Tensor | float) -> tuple[Tensor, Tensor]:
    found, where = [], []
    for latents, scores in tiles(product):
        values, at = _reaching(scores, _of(floor, latents))
        found.append(values)
        where.append(_place(at, latents, product.m))
    where, order = torch.cat(where).sort()
    return torch.cat(found)[order], where


def _of(floor: Tensor | float, latents: slice | Tensor) -> Tensor | float:
    return floor[latents] if isinstance(floor, Tensor) and floor.ndim > 0 else floor


def _place(at: Tensor, latents: slice, n_latents: int) -> Tensor:
    """Flat indices of a tile as those of all latents."""
    width = latents.stop - latents.start
    return at + (at // width) * (n_latents - width) + latents.start


def _largest_of_all(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, indices = largest(scores.view(1, -1), min(count, scores.numel()))
    return values[0], indices[0]


def _reaching(scores: Tensor, bound: Tensor | float) -> tuple[Tensor, Tensor]:
    """(values, flat indices) by row of all scores that are not below the bound, one for all or for each column; NaN is not."""
    n, m = scores.shape
    if m % GROUP or (isinstance(bound, Tensor) and bound.ndim > 0):
        at = (~(scores < bound)).view(-1).nonzero().view(-1)
        return scores.view(-1)[at], at
    groups = m // GROUP
    row, group = (~(scores.view(n, GROUP, groups).amax(dim=1) < bound)).nonzero(as_tuple=True)
    members = ((row * m + group)[:, None] + groups * torch.arange(GROUP, device=scores.device)).view(-1)
    values = scores.view(-1)[members]
    kept = (~(values < bound)).nonzero().view(-1)
    return values[kept], members[kept]


# gradients ------------------------------------------------------------------------------------------------------------


class Bags:
    """Which entries there are: `indices` by row, row r owning offsets[r]:offsets[r + 1]; and the same by latent."""

    pre: Tensor  # of each entry, detached

    def __init__(self, indices: Int[Tensor, " entries"], offsets: Int[Tensor, " rows"], n_latents: int):
        self.indices, self.offsets, self.n_latents = indices, offsets, n_latents

    @classmethod
    def at(cls, where: Int[Tensor, " entries"], n: int, n_latents: int) -> "Bags":
        """Entries at flat indices that are ordered by row."""
        return cls(where % n_latents, torch.searchsorted(where // n_latents, torch.arange(n + 1, device=where.device)), n_latents)

    def encode(self, values: Tensor, inputs: Tensor, dictionary: SparseDictionary) -> Tensor:
        """The entries' pre-activations, known already, with the gradient of W_enc, b_enc, inputs and a subtracted b_dec."""
        return _Encoded.apply(values, dictionary.centred(inputs), dictionary.W_enc, dictionary.b_enc, self)

    def decode(self, values: Tensor, W_dec: Float[Tensor, "n_latents d_out"]) -> Float[Tensor, "n d_out"]:
        """latents @ W_dec; embedding_bag knows the gradient of the values, latent sums are W_dec's."""
        return _Decoded.apply(self.row_sums(values, W_dec.detach()), values.detach(), W_dec, self)

    def row_sums(self, weights: Tensor, table: Tensor) -> Tensor:
        """sum_e weights_e table[i_e] for each row: (n, width of the table)."""
        return _sums(self.indices, self.offsets, weights, table)

    def latent_sums(self, weights: Tensor, table: Tensor) -> Tensor:
        """sum_e weights_e table[r_e] for each latent: (n_latents, width of the table)."""
        order, rows, offsets = self._by_latent
        return _sums(rows, offsets, weights[order], table)

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """(order, rows, offsets): the j-th entry by latent is order[j], of row rows[j]; latent i owns offsets[i]:offsets[i + 1]."""
        latents, order = self.indices.sort(stable=True)
        row = torch.repeat_interleave(self.offsets.diff(), output_size=len(order))
        return order, row[order], torch.searchsorted(latents, torch.arange(self.n_latents + 1, device=order.device))


def _sums(indices: Tensor, offsets: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    return F.embedding_bag(indices, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


class _Encoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, inputs, W_enc, b_enc, bags):
        ctx.save_for_backward(inputs, W_enc)
        ctx.bags = bags
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        (grad,), (inputs, W_enc), bags = grads, ctx.saved_tensors, ctx.bags
        _, to_inputs, to_weights, to_bias, _ = ctx.needs_input_grad
        return (
            None,
            bags.row_sums(grad, W_enc) if to_inputs else None,
            bags.latent_sums(grad, inputs) if to_weights else None,
            bags.latent_sums(grad, inputs.new_ones(len(inputs), 1)).squeeze(1) if to_bias else None,
            None,
        )


class _Decoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sums, values, W_dec, bags):
        ctx.save_for_backward(values)
        ctx.bags = bags
        return sums.view_as(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        (grad,), (values,) = grads, ctx.saved_tensors
        return grad, None, ctx.bags.latent_sums(values, grad) if ctx.needs_input_grad[2] else None, None


# latents --------------------------------------------------------------------------------------------------------------


def top_rows(inputs: Float[Tensor, "n d_in"], dictionary: SparseDictionary, k: int) -> Latents:
    """ReLU of the k largest pre-activations of each row."""
    values, indices = select_rows(inputs, dictionary, k)
    offsets = torch.arange(len(inputs) + 1, device=inputs.device) * k
    return _latents(inputs, dictionary, values.view(-1), Bags(indices.view(-1), offsets, dictionary.n_latents), _relu)


def top_batch(
    inputs: Float[Tensor, "n d_in"], dictionary: SparseDictionary, count: int, gain: Float[Tensor, " m"] | None = None
) -> Latents:
    """ReLU of the `count` largest pre-activations of the batch; with `gain`, a positive number each, of those largest after it."""
    values, where = select_batch(inputs, dictionary, count, gain)
    if gain is not None:
        values = values / gain[where % dictionary.n_latents]
    return _latents(inputs, dictionary, values, Bags.at(where, len(inputs), dictionary.n_latents), _relu)


def above(inputs: Float[Tensor, "n d_in"], dictionary: SparseDictionary, floor: Tensor | float = 0.0, sigma=None) -> Latents | None:
    """sigma(pre-activations, their latents), ReLU by default, of all that reach `floor`; None where `select_above` says so."""
    selected = select_above(inputs, dictionary, floor)
    if selected is None:
        return None
    values, where = selected
    return _latents(inputs, dictionary, values, Bags.at(where, len(inputs), dictionary.n_latents), sigma or _relu)


def _latents(inputs: Tensor, dictionary: SparseDictionary, values: Tensor, bags: Bags, sigma) -> Latents:
    bags.pre = values
    codes = sigma(bags.encode(values, inputs, dictionary), bags.indices)
    return Latents(codes, bags.indices, bags.offsets, dictionary.n_latents, bags)


def _relu(pre: Tensor, latents: Tensor) -> Tensor:
    return pre.relu()


# rows -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def project_rows(grad: Float[Tensor, "n_latents d"], rows: Float[Tensor, "n_latents d"]) -> None:
    """grad_i -= (grad_i . u_i) u_i with u_i = rows_i / |rows_i|, in place: what is left is tangent to the sphere."""
    size = len(rows) if rows.device.type != "cpu" else BLOCK
    for part, row in zip(grad.split(size), rows.split(size), strict=True):
        along = (part * row).sum(dim=1, keepdim=True) / row.square().sum(dim=1, keepdim=True).clamp_min(1e-24)
        part.addcmul_(row, along, value=-1)
