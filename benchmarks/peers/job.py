"""What every contender trains: the same weights, data and sizes, so that only the code differs."""

import math
import statistics
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

LR = 1e-6  # so small that the sparsity at the start is that of every step


class Job(NamedTuple):
    """One training step of `method` on `n` rows of width `d`, `m` latents; ReLU and JumpReLU start at about `l0` active."""

    method: str
    m: int
    d: int = 768
    n: int = 2048
    k: int = 32
    l0: int = 64
    device: str = "cpu"

    def rows(self) -> Tensor:
        """(n, d) standard normal."""
        return torch.randn(self.n, self.d, generator=torch.Generator().manual_seed(1)).to(self.device)

    def directions(self) -> Tensor:
        """(m, d), unit rows: encoder and decoder of all. A pre-activation is then standard normal."""
        return normalize(torch.randn(self.m, self.d, generator=torch.Generator().manual_seed(2)), dim=1).to(self.device)

    @property
    def bias(self) -> float:
        """Encoder bias that leaves l0 of m above zero; none for the methods that select."""
        if self.method in ("topk", "batchtopk") or self.l0 == 0:
            return 0.0
        return -statistics.NormalDist().inv_cdf(1 - self.l0 / self.m)

    @property
    def penalty(self) -> float:
        return 1e-3 / math.sqrt(self.m)


class Missing(Exception):
    """A contender that has no such method."""
