"""The biconvex slice: inside one region, convex along the encoder and along the decoder, and not in both together."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Generator, Tensor

from sdl_explorer.diagnosis.landscape_local import Local

SHRINKS = 40
ROUNDING = 1e-9  # of the largest loss on the slice
REACH = 0.98  # of the way to the border
STEP = 2.0  # at most, in lengths of the rows


class Slice(NamedTuple):
    """f(s, t) = loss at W_enc + s A, W_dec + t B of two latents; A and B are random directions as long as their rows.

    The loss is that of the inputs that tell regions apart: a region of many rows is too small to be looked at.

    reads (g,)  s, as far as all inputs keep their pattern;  writes (g,)  t;  loss (g_t, g_s)
    gap_reads, gap_writes, gap_both   the largest f(middle) - (f(a) + f(b)) / 2 along s, along t, and along the diagonals, over the
                 largest loss: at most rounding where f is convex so
    inside  share of the points of the slice whose pattern, over these inputs, is that of the model
    """

    reads: Float[np.ndarray, " g"]
    writes: Float[np.ndarray, " h"]
    loss: Float[np.ndarray, "h g"]
    gap_reads: float
    gap_writes: float
    gap_both: float
    inside: float

    convex_in_each = property(lambda self: max(self.gap_reads, self.gap_writes) <= ROUNDING, doc="Along the encoder and the decoder.")
    convex_in_both = property(lambda self: self.convex_in_each and self.gap_both <= ROUNDING, doc="Along the diagonals as well.")


def cut_slice(local: Local, grid: int, generator: Generator) -> Slice:
    """The slice through the two latents as they are."""
    A, B = (_direction(rows, generator) for rows in (local.W_enc, local.W_dec))
    s = torch.linspace(-1, 1, grid, dtype=torch.float64) * _reach(local, A)
    t = torch.linspace(-STEP, STEP, grid, dtype=torch.float64)
    loss = torch.stack([local.loss(local.W_enc + s[:, None, None] * A, local.W_dec + step * B) for step in t]).numpy()
    inside = _inside(local, local.W_enc + s[:, None, None] * A)
    size = max(float(loss.max()), 1e-300)
    return Slice(
        reads=s.numpy(),
        writes=t.numpy(),
        loss=loss,
        gap_reads=_gap(loss) / size,
        gap_writes=_gap(loss.T) / size,
        gap_both=max(_gap_diagonal(loss), _gap_diagonal(loss[::-1])) / size,
        inside=float(inside.double().mean()),
    )


def _direction(rows: Tensor, generator: Generator) -> Tensor:
    """Random, each row as long as its own; a row of zeros gets the longest's length, or 1."""
    noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    lengths = rows.norm(dim=1, keepdim=True)
    lengths = torch.where(lengths > 0, lengths, lengths.max() if lengths.max() > 0 else 1.0)
    return noise / noise.norm(dim=1, keepdim=True) * lengths


def _inside(local: Local, W_enc: Tensor) -> Tensor:
    """Which encoders (..., m, d_in) have the pattern of the model on every input, bool (...)."""
    (own, own_kept), (codes, kept) = (local.codes(local.pre(rows)) for rows in (local.W_enc, W_enc))
    return ((codes > 0) == (own > 0)).all(dim=-1).all(dim=-1) & (kept == own_kept).all(dim=-1)


def _reach(local: Local, A: Tensor) -> float:
    """How far both ways along A the pattern stays, by bisection; a region is convex, so what lies between stays in it."""
    low, high = 0.0, STEP
    ends = lambda step: bool(_inside(local, torch.stack([local.W_enc + step * A, local.W_enc - step * A])).all())
    if ends(high):
        return high
    for _ in range(SHRINKS):
        middle = (low + high) / 2
        low, high = (middle, high) if ends(middle) else (low, middle)
    return REACH * low


def _gap(values: np.ndarray) -> float:
    """The largest excess of a middle over its chord along the last axis."""
    gaps = [values[:, h:-h] - (values[:, 2 * h :] + values[:, : -2 * h]) / 2 for h in range(1, (values.shape[1] - 1) // 2 + 1)]
    return float(max(gap.max() for gap in gaps))


def _gap_diagonal(values: np.ndarray) -> float:
    """The same along the diagonals that go down and right."""
    g = len(values)
    gaps = [
        values[h : g - h, h : g - h] - (values[2 * h :, 2 * h :] + values[: g - 2 * h, : g - 2 * h]) / 2 for h in range(1, (g - 1) // 2 + 1)
    ]
    return float(max(gap.max() for gap in gaps))
