"""Are the rows that fire a latent of one kind or of two? Cuts of many small samples at once."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

DIRECTIONS = 3  # principal directions along which rows are cut
FEWEST_OF_A_KIND = 3
STEPS = 12


class Cut(NamedTuple):
    """The cut into two kinds that counts most modes, one entry per latent.

    modes in [1, 2];  smaller, the rarer kind's share;  cosine of the kinds' means;  kind (n, m): 0, 1 for the rarer, -1 for no row
    """

    modes: Float[Tensor, " n"]
    smaller: Float[Tensor, " n"]
    cosine: Float[Tensor, " n"]
    kind: Int[Tensor, "n m"]


def cut_in_two(gram: Float[Tensor, "n m m"], there: Bool[Tensor, "n m"]) -> Cut:
    """For each of n latents, its m rows (where `there`) cut in two along the first principal directions of their unit shifts.

    modes = 1 / (p_a^2 + p_b^2 + 2 p_a p_b max(0, cos)): 1 for one kind, 2 for equal halves whose means have nothing in common. A cut
    that leaves fewer than three rows on a side counts one mode. Inner products of the shifts are all that it needs.
    """
    count = there.sum(dim=1)
    best = Cut(
        torch.ones(len(gram), device=gram.device),
        torch.zeros(len(gram), device=gram.device),
        torch.zeros(len(gram), device=gram.device),
        torch.where(there, 0, -1),
    )
    tiny = torch.finfo(gram.dtype).tiny
    norms = gram.diagonal(dim1=1, dim2=2).clamp_min(tiny).sqrt()
    for places in principal_places(gram / norms[:, :, None] / norms[:, None, :], there):
        second = _cut(places, there, count)
        share = second.sum(dim=1) / count.clamp_min(1)
        sides = torch.stack([there & ~second, second], dim=1).float()
        means = sides @ gram @ sides.mT
        lengths = means.diagonal(dim1=1, dim2=2).clamp_min(tiny).sqrt()
        cosine = means[:, 0, 1] / lengths[:, 0] / lengths[:, 1]
        modes = 1 / (share.square() + (1 - share).square() + 2 * share * (1 - share) * cosine.clamp(0, 1))
        fewest = torch.minimum(second.sum(dim=1), count - second.sum(dim=1))
        better = (modes > best.modes) & (fewest >= FEWEST_OF_A_KIND)
        rarer = torch.where((share > 0.5)[:, None], ~second, second) & there
        kind = torch.where(there, rarer.long(), -1)
        found = Cut(modes, torch.minimum(share, 1 - share), cosine, kind)
        best = Cut(*(torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old) for new, old in zip(found, best, strict=True)))
    return best


def of_one_meaning(
    shifts: Float[Tensor, "n m d"], there: Bool[Tensor, "n m"], codes: Float[Tensor, "n m"], random: Float[Tensor, "k d"]
) -> Float[Tensor, "n m m"]:
    """The null: rows of one kind, as far along the mean shift as their codes say, and in every other direction rows drawn at random.

    Their inner products: with u the direction of the mean shift, row i is a_i u + r_i - (r_i . u) u.
    """
    share = there.float() / there.sum(dim=1).clamp_min(1)[:, None]
    mean = (share[:, None] @ shifts)[:, 0]
    usual = torch.where(there, codes, 0).sum(dim=1) / there.sum(dim=1).clamp_min(1)
    along = codes * (mean.norm(dim=1) / usual.clamp_min(torch.finfo(codes.dtype).tiny))[:, None]
    random = random[torch.arange(shifts.shape[1], device=random.device) % len(random)]
    left_out = normalize(mean, dim=1) @ random.T
    outer = along[:, :, None] * along[:, None, :] - left_out[:, :, None] * left_out[:, None, :]
    return outer + random @ random.T


def principal_places(gram: Float[Tensor, "n m m"], there: Bool[Tensor, "n m"]) -> list[Float[Tensor, "n m"]]:
    """Where each row lies along the first principal directions of its latent's rows, from the largest variance down; up to a scale.

    Orthogonal iteration on the fourth power of their centred Gram matrix: an eigensolver on each of 16,384 small matrices takes ten
    times as long.
    """
    mask = there.float()
    mean = (gram @ (mask / mask.sum(dim=1, keepdim=True).clamp_min(1))[..., None])[..., 0]
    centre = (mean * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
    gram = (gram - mean[:, :, None] - mean[:, None, :] + centre[:, None, None]) * (mask[:, :, None] * mask[:, None, :])
    gram = gram / gram.diagonal(dim1=1, dim2=2).sum(dim=1).clamp_min(torch.finfo(gram.dtype).tiny)[:, None, None]
    power = gram @ gram
    power = power @ power
    found: list[Tensor] = []
    start = torch.randn(gram.shape[1], DIRECTIONS, generator=torch.Generator().manual_seed(0)).to(gram.device)
    vectors = gram @ start
    for _ in range(STEPS):
        found = []
        for vector in (power @ vectors).unbind(dim=2):
            for other in found:
                vector = vector - (vector * other).sum(dim=1, keepdim=True) * other
            found.append(normalize(vector, dim=1, eps=torch.finfo(vector.dtype).tiny))
        vectors = torch.stack(found, dim=2)
    return found


def _cut(places: Float[Tensor, "n m"], there: Bool[Tensor, "n m"], count: Int[Tensor, " n"]) -> Bool[Tensor, "n m"]:
    """The upper side of the cut of least squares, as 2-means finds it in one dimension."""
    ordered, order = torch.where(there, places, torch.inf).sort(dim=1)
    ordered = ordered.masked_fill(ordered == torch.inf, 0)
    left = torch.arange(1, places.shape[1] + 1, device=places.device)
    right = count[:, None] - left
    sums = ordered.cumsum(dim=1)
    between = sums.square() / left + (sums[:, -1:] - sums).square() / right.clamp_min(1)
    last = between.masked_fill(right <= 0, -1).argmax(dim=1, keepdim=True)
    upper = left - 1 > last
    return torch.zeros_like(upper).scatter_(1, order, upper) & there
