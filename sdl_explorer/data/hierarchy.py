"""Features that imply each other: where absorption comes from, with the answer known."""

from functools import cached_property

import param
import torch
from jaxtyping import Float
from torch import Generator, Tensor

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.bench import LinearBench, linear_activations, random_rotation
from sdl_explorer.data.sources import Generated, stream

MAX_INTERFERENCE = 0.3


class HierarchyBench(Generated):
    """Parents, children that fire only with their parent, and independent features (arXiv 2503.17547, the tree toy).

        parent ~ Bernoulli(parent_probability);  child | parent ~ Bernoulli(child_probability)
        codes = active * max(0, 1 + magnitude_std * N(0, 1));  inputs = targets = codes @ features

    `exclusive`: at most one child of a parent at a time (each with child_probability, none with the
    rest). Directions are orthonormal while n_features <= d_in, beyond that as in LinearBench with inner
    products of at most 0.3. Features come as parent, its children, next parent ..., then the independent ones.
    """

    parents = param.Integer(3, bounds=(0, None), constant=True, doc="Parent features.")
    children = param.Integer(3, bounds=(0, None), constant=True, doc="Children of each parent.")
    independent = param.Integer(8, bounds=(0, None), constant=True, doc="Features outside the hierarchy.")
    d_in = param.Integer(20, bounds=(1, None), constant=True, doc="Width of the inputs.")
    parent_probability = param.Number(0.15, bounds=(0, 1), constant=True, doc="Probability that a parent fires.")
    child_probability = param.Number(0.2, bounds=(0, 1), constant=True, doc="Probability that a child fires when its parent does.")
    independent_probability = param.Number(0.05, bounds=(0, 1), constant=True, doc="Probability that an independent feature fires.")
    exclusive = param.Boolean(True, constant=True, doc="At most one child of a parent fires.")
    magnitude_std = param.Number(0.0, bounds=(0, None), constant=True, doc="Spread of the activations around 1; none falls below 0.")

    def __init__(self, **settings):
        super().__init__(**settings)
        if self.n_features == 0:
            raise ValueError("HierarchyBench: no features (parents=0, independent=0). Ask for at least one.")
        if self.exclusive and self.children * self.child_probability > 1:
            raise ValueError(
                f"HierarchyBench: {self.children} exclusive children with probability {self.child_probability:g} each sum to "
                f"{self.children * self.child_probability:g}, above 1. Lower child_probability, or set exclusive=False."
            )

    @property
    def n_features(self) -> int:
        return self.parents * (1 + self.children) + self.independent

    @property
    def width_in(self) -> int:
        return self.d_in

    @cached_property
    def features(self) -> Float[Tensor, "n_features d_in"]:
        """The true directions, unit rows."""
        if self.n_features <= self.d_in:
            return random_rotation(self.d_in, stream(self.seed, "directions", "hierarchy"))[: self.n_features].float()
        bench = LinearBench(n_features=self.n_features, d_in=self.d_in, max_interference=MAX_INTERFERENCE, seed=self.seed)
        return bench.directions[0]

    @cached_property
    def _tree(self) -> dict[str, tuple]:
        """Parent and name of each feature, in order."""
        parents, names = [], []
        for p in range(self.parents):
            above = len(names)
            parents += [None] + [above] * self.children
            names += [f"parent {p}"] + [f"child {p}.{c}" for c in range(self.children)]
        parents += [None] * self.independent
        names += [f"independent {i}" for i in range(self.independent)]
        return {"parents": tuple(parents), "names": tuple(names)}

    def draw(self, n: int, generator: Generator) -> Activations:
        parents = torch.rand(n, self.parents, 1, generator=generator) < self.parent_probability
        families = torch.cat([parents, parents & self._children(n, generator)], dim=2).flatten(1)
        independent = torch.rand(n, self.independent, generator=generator) < self.independent_probability
        active = torch.cat([families, independent], dim=1)
        magnitudes = (1 + self.magnitude_std * torch.randn(n, self.n_features, generator=generator)).clamp(min=0)
        return linear_activations(active * magnitudes, self.features, self.features, **self._tree)

    def _children(self, n: int, generator: Generator) -> Tensor:
        """(n, parents, children) bool: which would fire if all parents did."""
        if not self.exclusive:
            return torch.rand(n, self.parents, self.children, generator=generator) < self.child_probability
        place = torch.rand(n, self.parents, 1, generator=generator)
        edges = torch.arange(self.children) * self.child_probability
        return (edges <= place) & (place < edges + self.child_probability)
