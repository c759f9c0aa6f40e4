"""The Linear Representation Bench (arXiv 2512.05534, appendix C): data whose features are known."""

import warnings
from functools import cached_property, lru_cache
from typing import NamedTuple

import param
import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn.functional import embedding_bag, normalize

from sdl_explorer.data.activations import Activations, Block, Truth
from sdl_explorer.data.sources import Generated, stream

SLACK, NEGATIVE_PULL, STEP = 1e-3, 1e-3, 0.05  # epsilon, lambda and eta of eq. 28-29; the paper does not print them
PATIENCE = 300  # steps without a smaller maximum after which the descent has stalled
NEGATIVE_TOLERANCE = 0.01  # descent towards M = 0 stalls just above zero; this is near enough for "negative"


class Interference(NamedTuple):
    """The largest and the smallest inner product of two different directions. Signed: only `largest` is bounded."""

    largest: float
    smallest: float


class LinearBench(Generated):
    """x_p = W_p x and x_r = W_r x with sparse x >= 0 and no noise (arXiv 2512.05534, eq. 27-32).

        mask ~ Bernoulli(1 - sparsity);  codes = mask * (minimum + Exponential(mean=scale))
        inputs = codes @ input_features;  targets = codes @ target_features

    Rows of both feature matrices have unit norm. `interference` says how they are drawn:
    "bounded" descends until no inner product exceeds `max_interference`; "negative" descends towards
    none above zero and stops at 0.01; "simplex" has none above zero exactly, and needs
    d_in < n_features <= 2 * d_in. A bound that is not reached warns; `reached` holds what was.

    `kind`: an "sae" has targets = inputs, a "transcoder" an independent W_r for the same codes, and a
    "crosscoder" n_sources independent matrices side by side, each scaled by 1 / sqrt(n_sources).
    """

    n_features = param.Integer(1000, bounds=(1, None), constant=True, doc="True features.")
    d_in = param.Integer(768, bounds=(1, None), constant=True, doc="Width of the inputs, or of one source of a crosscoder.")
    sparsity = param.Number(0.99, bounds=(0, 1), constant=True, doc="Probability that a feature is inactive in a row.")
    max_interference = param.Number(0.1, bounds=(0, 1), constant=True, doc="Bound on the inner product of two features, signed.")
    kind = param.Selector(default="sae", objects=["sae", "transcoder", "crosscoder"], constant=True, doc="What the targets are.")
    interference = param.Selector(
        default="bounded", objects=["bounded", "negative", "simplex"], constant=True, doc="How the directions are drawn."
    )
    d_out = param.Integer(None, bounds=(1, None), allow_None=True, constant=True, doc="Width of a transcoder's targets; None: d_in.")
    n_sources = param.Integer(2, bounds=(1, None), constant=True, doc="Sources of a crosscoder.")
    minimum = param.Number(0.0, bounds=(0, None), constant=True, doc="Smallest activation of an active feature (c_min).")
    scale = param.Number(1.0, bounds=(0, None), constant=True, doc="Mean of the exponential part of an activation (beta).")

    def __init__(self, **settings):
        super().__init__(**settings)
        if self.d_out not in (None, self.d_in) and self.kind != "transcoder":
            raise ValueError(
                f"LinearBench: d_out is {self.d_out} and d_in {self.d_in}, but a {self.kind} writes what it reads. "
                "Leave d_out out, or use kind='transcoder'."
            )
        if self.interference == "simplex":
            for width in {self.d_in, self.d_out or self.d_in}:
                check_simplex(self.n_features, width)

    @property
    def width_in(self) -> int:
        return self.d_in * (self.n_sources if self.kind == "crosscoder" else 1)

    @property
    def width_out(self) -> int:
        return (self.d_out or self.d_in) if self.kind == "transcoder" else self.width_in

    @property
    def blocks(self) -> tuple[Block, ...]:
        if self.kind != "crosscoder":
            return ()
        columns = [slice(i * self.d_in, (i + 1) * self.d_in) for i in range(self.n_sources)]
        return tuple(Block(f"source {i}", c, c) for i, c in enumerate(columns))

    @property
    def reached(self) -> dict[str, Interference]:
        """Largest and smallest inner product reached, for each drawn matrix: "input", "target", or "source 0" ..."""
        return {name: found for name, (_, found) in self._drawn.items()}

    @cached_property
    def _drawn(self) -> dict[str, tuple[Tensor, Interference]]:
        sides = {"input": self.d_in}
        if self.kind == "transcoder":
            sides["target"] = self.d_out or self.d_in
        elif self.kind == "crosscoder":
            sides = {block.name: self.d_in for block in self.blocks}
        drawn = {s: draw_directions(self.n_features, d, self.interference, self.max_interference, self.seed, s) for s, d in sides.items()}
        bound = self.max_interference if self.interference == "bounded" else NEGATIVE_TOLERANCE
        for side, (_, found) in drawn.items():
            if found.largest > bound:
                warnings.warn(
                    f"LinearBench: the largest inner product of two {side} features is {found.largest:.3f}; {bound:g} was asked for and "
                    f"not found for {self.n_features} features in {sides[side]} dimensions. Raise d_in or max_interference.",
                    UserWarning,
                    stacklevel=4,
                )
        return drawn

    @cached_property
    def directions(self) -> tuple[Tensor, Tensor]:
        """The true directions of the inputs and of the targets, (n_features, width) each, unit rows; drawn once."""
        rows = [directions for directions, _ in self._drawn.values()]
        if self.kind == "transcoder":
            return rows[0], rows[1]
        stacked = torch.cat(rows, dim=1) / len(rows) ** 0.5
        return stacked, stacked

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(f"feature {i}" for i in range(self.n_features))

    def draw(self, n: int, generator: Generator) -> Activations:
        mask = torch.rand(n, self.n_features, generator=generator) < 1 - self.sparsity
        values = self.minimum + self.scale * torch.empty(int(mask.sum())).exponential_(generator=generator)
        codes = torch.zeros(n, self.n_features).masked_scatter_(mask, values)
        return linear_activations(codes, *self.directions, names=self._names, blocks=self.blocks)


def linear_activations(
    codes: Float[Tensor, "n n_features"],
    input_features: Float[Tensor, "n_features d_in"],
    target_features: Float[Tensor, "n_features d_out"],
    **facts,
) -> Activations:
    """inputs = codes @ input_features, and so the targets; one tensor where the features are one.

    `blocks` goes to the activations, the other facts (names, parents) to their truth.
    """
    blocks = facts.pop("blocks", ())
    inputs = sparse_product(codes, input_features)
    targets = inputs if target_features is input_features else sparse_product(codes, target_features)
    return Activations(inputs, targets, Truth(codes, input_features, target_features, **facts), blocks=blocks)


def sparse_product(codes: Float[Tensor, "n k"], rows: Float[Tensor, "k d"]) -> Float[Tensor, "n d"]:
    """codes @ rows from the entries that are not zero: some thirty times less work at the default sparsity."""
    active = codes != 0
    places = active.nonzero()[:, 1]
    counts = active.sum(dim=1)
    return embedding_bag(places, rows, counts.cumsum(0) - counts, mode="sum", per_sample_weights=codes[active])


@lru_cache(maxsize=16)
def draw_directions(n: int, d: int, interference: str, bound: float, seed: int, side: str) -> tuple[Tensor, Interference]:
    """`n` unit rows of width `d`, and the interference that they reached. A function of its arguments alone."""
    generator = stream(seed, "directions", side)
    if interference == "simplex":
        rows = simplex_directions(n, d, generator)
    else:
        negative = interference == "negative"
        rows = bounded_directions(n, d, 0.0 if negative else bound, generator, NEGATIVE_TOLERANCE if negative else 0.0)
    return rows, measure_interference(rows)


def bounded_directions(
    n: int, d: int, bound: float, generator: Generator, tolerance: float = 0.0, max_steps: int = 2000
) -> Float[Tensor, "n d"]:
    """Unit rows W with max over i != j of <w_i, w_j> <= bound + tolerance, or the best that gradient descent found.

    Minimises sum [relu(G_ij - (bound - eps))]^2 + lambda sum [relu(G_ij)]^2 over i != j, G = W W^T, and stops
    at the bound (arXiv 2512.05534, eq. 27-29), or when the maximum no longer falls. Steps are shortened where
    4 * STEP times the norm of the pull passes 1, which would throw all rows together.
    """
    rows = best = normalize(torch.randn(n, d, generator=generator), dim=1)
    lowest, since = float("inf"), 0
    for _ in range(max_steps):
        overlap = (rows @ rows.T).fill_diagonal_(0)
        largest = overlap.max().item()
        since = 0 if largest < 0.999 * lowest else since + 1
        if largest < lowest:
            best, lowest = rows, largest
        if largest <= bound + tolerance or since > PATIENCE:
            break
        pull = (overlap - (bound - SLACK)).relu_().fill_diagonal_(0) + NEGATIVE_PULL * overlap.relu()
        step = min(4 * STEP, 1 / pull.sum(dim=1).max().item())
        rows = normalize(rows - step * pull @ rows, dim=1)
    return best


def simplex_directions(n: int, d: int, generator: Generator) -> Float[Tensor, "n d"]:
    """n - d mutually orthogonal regular simplices, turned at random: every inner product is zero or negative.

    A block of s dimensions holds s + 1 rows with inner products -1/s.
    """
    check_simplex(n, d)
    rows = torch.zeros(n, d, dtype=torch.float64)
    row = column = 0
    for block in range(n - d):
        size = d // (n - d) + (block < d % (n - d))
        rows[row : row + size + 1, column : column + size] = _simplex(size)
        row, column = row + size + 1, column + size
    return (rows @ random_rotation(d, generator)).float()


def random_rotation(d: int, generator: Generator) -> Float[Tensor, "d d"]:
    """An orthogonal matrix, uniform under rotation (Mezzadri 2007, math-ph/0609050)."""
    q, r = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def check_simplex(n: int, d: int) -> None:
    if not d < n <= 2 * d:
        raise ValueError(
            f"interference='simplex': {n} features in {d} dimensions; inner products that are all zero or negative need more "
            f"than {d} and at most {2 * d} features. Change n_features, or use interference='bounded'."
        )


def measure_interference(rows: Float[Tensor, "n d"]) -> Interference:
    """Over pairs of different rows; zero where there is one row."""
    n = len(rows)
    if n == 1:
        return Interference(0.0, 0.0)
    pairs = (rows @ rows.T)[~torch.eye(n, dtype=torch.bool)]
    return Interference(pairs.max().item(), pairs.min().item())


def _simplex(size: int) -> Float[Tensor, "corners size"]:
    """The size + 1 corners of a regular simplex in `size` dimensions, unit rows."""
    corners = torch.eye(size + 1, dtype=torch.float64) - 1 / (size + 1)
    basis = torch.linalg.svd(corners).Vh[:size]
    return normalize(corners @ basis.T, dim=1)
