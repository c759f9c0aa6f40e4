"""Spike-ins: known sparse directions put into anybody's rows, so that there is a truth in this data's own regime."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from numbers import Real
from typing import NamedTuple

import param
import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations, Block, Truth
from sdl_explorer.data.bench import Interference, measure_interference, sparse_product
from sdl_explorer.data.shards import Removed
from sdl_explorer.data.sources import Part, Source, stream
from sdl_explorer.data.store import Stored

TYPICAL_ROWS = 4_096  # training rows that give the unit and the covariance


class SpikeIn(Source):
    """The rows of `source` with `n_features` known directions added, each active in its own few rows.

        active_k ~ Bernoulli(rate_k), for a child in its parent's rows alone
        codes_k  = active_k * magnitude_k * unit * max(0, 1 + spread * N(0, 1))
        inputs   = the source's inputs + codes @ input_features;  targets likewise

    `source` is any Source, or the path of stored rows. Spikes are linear, and independent of the rows and of each other unless
    `parents` says otherwise: one entry a spike, None or its parent's number. Truth holds the spikes alone (`truth.complete` is
    False): whatever else is in the rows stays unknown, and so does a truth that the source has itself.

    `unit` is the median distance of training rows from their mean; of a transcoder, the geometric mean of both sides', as one code
    is written on both. Directions have the covariance of the rows (centred, at norm 1, so that outliers do not decide), where they meet
    what is in the data; or they are uniform, which is easier. In a transcoder a spike has another direction in the targets. In a
    crosscoder it has one in each block, as large as that block's rows ask for.

    Rows, parts, labels and examples are the source's. A stored row has other spikes each time that it comes.
    """

    source = param.ClassSelector(class_=Source, constant=True, doc="The rows that get the spikes: a Source, or the path of stored rows.")
    n_features = param.Integer(64, bounds=(1, None), constant=True, doc="Spikes.")
    rate = param.Parameter(0.01, constant=True, doc="Share of the rows with a spike, of its parent's for a child: a number, or one each.")
    magnitude = param.Parameter(0.3, constant=True, doc="Mean size of an active spike, of the median distance of rows from their mean.")
    parents = param.Parameter((), constant=True, doc="The parent of each spike, a number or None; empty: there is no hierarchy.")
    child_rate = param.Number(
        0.3,
        bounds=(0, 1),
        inclusive_bounds=(False, True),
        constant=True,
        doc="A child's rate, where `rate` is one number.",
    )
    exclusive = param.Boolean(False, constant=True, doc="At most one child of a parent is active.")
    spread = param.Number(0.2, bounds=(0, None), constant=True, doc="Standard deviation of an active spike's size, of its mean.")
    directions = param.Selector(
        default="rows", objects=["rows", "uniform"], constant=True, doc="Directions with the covariance of the rows, or uniform ones."
    )
    seed = param.Integer(0, bounds=(0, None), constant=True, doc="Seed of the directions and of every draw.")

    def __init__(self, source, n_features=64, rate=0.01, magnitude=0.3, parents=(), **settings):
        if isinstance(source, (str, os.PathLike)):
            source = Stored(source)
        if not isinstance(source, Source):
            raise TypeError(
                f"SpikeIn: source is a {type(source).__name__}; give a Source, such as Stored(tensor), or the path of stored rows."
            )
        rate, magnitude = (value if isinstance(value, Real) else _listed(value) for value in (rate, magnitude))
        self._host: Source = source
        settings |= {"rate": rate, "magnitude": magnitude, "parents": _listed(parents)}
        super().__init__(source=source, n_features=n_features, **settings)
        self._levels = _levels(self.parents, n_features)
        children = {k for level in self._levels[1:] for k in level}
        rates = [self.child_rate if k in children else rate for k in range(n_features)] if isinstance(rate, Real) else rate
        self._rates = _numbers("rate", rates, n_features, most=1.0)
        self._magnitudes = _numbers("magnitude", [magnitude] * n_features if isinstance(magnitude, Real) else magnitude, n_features)
        self._place, self._edge = self._places()

    # facts -----------------------------------------------------------------------------------------------------

    @property
    def width_in(self) -> int:
        return self._host.width_in

    @property
    def width_out(self) -> int:
        return self._host.width_out

    @property
    def n(self) -> int | None:
        return self._host.n

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self._host.blocks

    @property
    def dead_after(self) -> int:
        return self._host.dead_after

    @property
    def hooks(self) -> tuple[str, ...]:
        """Where in the network the rows were read; empty where that is not known."""
        return getattr(self._host, "hooks", ())

    @property
    def removed(self) -> Removed:
        """What the source left out."""
        return getattr(self._host, "removed", Removed())

    @property
    def unit(self) -> float:
        """The size of a spike of magnitude 1, in the rows' own units."""
        return self._made.unit

    @property
    def input_features(self) -> Float[Tensor, "n_features d_in"]:
        """The spikes' directions, unit rows."""
        return self._made.inputs

    @property
    def target_features(self) -> Float[Tensor, "n_features d_out"]:
        """Their directions in the targets, unit rows; the same tensor where targets are inputs."""
        return self._made.targets

    @property
    def rates(self) -> Float[Tensor, " n_features"]:
        """Share of the rows in which each spike is active: a child's rate times its ancestors'."""
        rates = self._rates.clone()
        for level in self._levels[1:]:
            rates[level] *= rates[[self.parents[k] for k in level]]
        return rates

    @property
    def interference(self) -> Interference:
        """Largest and smallest inner product of two spikes' input directions."""
        return measure_interference(self.input_features)

    @property
    def summary(self) -> str:
        """What was put in, and what is not known."""
        family = "independent of the rows, and of each other except that children are active only in their parents' rows"
        how = family if len(self._levels) > 1 else "independent of the rows and of each other"
        return (
            f"{self.n_features} spike-ins in {type(self._host).__name__}, each active in {_range(self.rates, '.2%')} of the rows, "
            f"{_range(self._magnitudes, '.2g')} times {self.unit:.3g} (the median distance of a row from the mean) in size; linear, {how}. "
            "The data's own features are unknown."
        )

    def __repr__(self) -> str:
        how = "linear, independent but for parents" if len(self._levels) > 1 else "linear and independent"
        return f"{super().__repr__()[:-1]}, spikes {how}, other features unknown)"

    __str__ = __repr__

    # rows ------------------------------------------------------------------------------------------------------

    def batch(self, index: int, size: int, order: int = 0) -> Activations:
        return self._spiked(self._host.batch(index, size, order), stream(self.seed, "spikes", "batch", order, index))

    def sample(self, n: int, generator: Generator, part: Part = "judge") -> Activations:
        rows = self._host.sample(n, generator, part)
        ticket = torch.randint(2**62, (1,), generator=generator).item()
        return self._spiked(rows, stream(self.seed, "spikes", "sample", part, ticket))

    def fingerprint(self) -> str:
        settings = {k: v for k, v in sorted(self.param.values().items()) if k not in ("name", "source")}
        digest = hashlib.sha256(repr((settings, self._host.fingerprint())).encode())
        return f"{type(self).__name__}:{digest.hexdigest()[:16]}"

    def _spiked(self, rows: Activations, generator: Generator) -> Activations:
        made = self._made
        codes = self._codes(len(rows), generator).to(rows.inputs.device)
        inputs = rows.inputs + sparse_product(codes, made.inputs.to(rows.inputs))
        same = rows.targets is rows.inputs
        targets = inputs if same else rows.targets + sparse_product(codes, made.targets.to(rows.targets))
        names = tuple(f"spike {k}" for k in range(self.n_features))
        truth = Truth(codes, made.inputs, made.targets, self.parents, names, complete=False)
        return replace(rows, inputs=inputs, targets=targets, truth=truth)

    def _codes(self, n: int, generator: Generator) -> Float[Tensor, "n n_features"]:
        sizes = (1 + self.spread * torch.randn(n, self.n_features, generator=generator)).clamp(min=0)
        return self._active(n, generator) * sizes * (self._magnitudes * self.unit)

    def _active(self, n: int, generator: Generator) -> Bool[Tensor, "n n_features"]:
        drawn = torch.rand(n, self.n_features, generator=generator)[:, self._place]
        active = (self._edge <= drawn) & (drawn < self._edge + self._rates)
        for level in self._levels[1:]:
            active[:, level] &= active[:, [self.parents[k] for k in level]]
        return active

    def _places(self) -> tuple[Tensor, Tensor]:
        """Which uniform number decides each spike, and where its interval of it begins: exclusive siblings share one number."""
        place, edge = torch.arange(self.n_features), torch.zeros(self.n_features)
        if not self.exclusive or not self.parents:
            return place, edge
        for parent in set(self.parents) - {None}:
            siblings = [k for k, above in enumerate(self.parents) if above == parent]
            ends = self._rates[siblings].cumsum(0)
            if ends[-1] > 1 + 1e-6:
                raise ValueError(
                    f"SpikeIn: the rates of the {len(siblings)} exclusive children of spike {parent} sum to {ends[-1]:g}, above 1. "
                    "Lower them, or set exclusive=False."
                )
            place[siblings], edge[siblings] = siblings[0], ends - self._rates[siblings]
        return place, edge

    @cached_property
    def _made(self) -> "_Made":
        rows = self._host.sample(TYPICAL_ROWS, stream("spikes", "typical rows"), "train")
        inputs, unit = self._side("inputs", rows)
        if rows.targets is rows.inputs:
            return _Made(inputs, inputs, unit)
        targets, other = self._side("targets", rows)
        return _Made(inputs, targets, (unit * other) ** 0.5)

    def _side(self, side: str, rows: Activations) -> tuple[Tensor, float]:
        """Directions in the inputs or the targets, and the median distance of rows from their mean."""
        values = getattr(rows, side).cpu().double()
        values = values - values.mean(dim=0)
        columns = [getattr(block, side) for block in rows.blocks] or [slice(None)]
        parts = [self._directions(values[:, c], side, i) * _typical(values[:, c], side) for i, c in enumerate(columns)]
        return normalize(torch.cat(parts, dim=1), dim=1).float(), _typical(values, side)

    def _directions(self, centred: Tensor, side: str, block: int) -> Tensor:
        """Unit rows for one block of columns."""
        generator = stream(self.seed, "spikes", "directions", side, block)
        mixed = torch.randn(self.n_features, len(centred) if self.directions == "rows" else centred.shape[1], generator=generator)
        return normalize(mixed.double() @ normalize(centred, dim=1) if self.directions == "rows" else mixed.double(), dim=1)


class _Made(NamedTuple):
    inputs: Tensor
    targets: Tensor
    unit: float


def _typical(centred: Tensor, side: str) -> float:
    distance = float(centred.norm(dim=1).median())
    if not 0 < distance < float("inf"):
        raise ValueError(
            f"SpikeIn: the median distance of the source's {side} from their mean is {distance:g}; the size of a spike is measured by it. "
            "Give rows that differ and are finite."
        )
    return distance


def _listed(values) -> tuple:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"SpikeIn: {values!r} is given where there is a number, or one for each spike.")
    return tuple(value.item() if hasattr(value, "item") else value for value in values)


def _numbers(name: str, values, n_features: int, most: float = float("inf")) -> Float[Tensor, " n_features"]:
    if len(values) != n_features:
        raise ValueError(f"SpikeIn: {len(values)} values of {name} for {n_features} spikes; give one number, or one for each.")
    for value in values:
        if not isinstance(value, int | float) or not 0 < value <= most or value == float("inf"):
            raise ValueError(
                f"SpikeIn: {name} is {value!r}; it is a number above 0{'' if most == float('inf') else f', at most {most:g}'}."
            )
    return torch.tensor([float(value) for value in values])


def _levels(parents: tuple, n_features: int) -> list[list[int]]:
    """The spikes without a parent, then their children, and so on."""
    if not parents:
        return [list(range(n_features))]
    if len(parents) != n_features:
        raise ValueError(
            f"SpikeIn: {len(parents)} parents for {n_features} spikes; give one entry each, None for no parent, or none at all."
        )
    for k, parent in enumerate(parents):
        if parent is not None and (not isinstance(parent, int) or not 0 <= parent < n_features):
            raise ValueError(f"SpikeIn: the parent of spike {k} is {parent!r}; it is None or a number from 0 to {n_features - 1}.")
    levels, above = [], {None}
    while found := [k for k, parent in enumerate(parents) if parent in above]:
        levels.append(found)
        above = set(found)
    placed = {k for level in levels for k in level}
    if len(placed) < n_features:
        lost = min(set(range(n_features)) - placed)
        raise ValueError(f"SpikeIn: spike {lost} is its own ancestor, or has one that is; a hierarchy is a forest.")
    return levels


def _range(values: Tensor, form: str) -> str:
    low, high = (format(float(value), form) for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"
