"""Directions that we are told (`Anchors`), which latents are held to them (`Pins`), and to measured ones (`Pulls`)."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations, Truth


@dataclass(frozen=True)
class Anchors:
    """`k` directions on both sides, unit rows (arXiv 2512.05534, eq. 22-24).

    `features` holds the true feature behind each row (-1: none) where rows come from the truth; it lets
    recovery leave anchored features out.
    """

    inputs: Float[Tensor, "k d_in"]
    targets: Float[Tensor, "k d_out"]
    names: tuple[str, ...]
    features: tuple[int, ...] = ()

    def __post_init__(self):
        if len(self.names) != len(self.inputs):
            raise ValueError(f"Anchors: {len(self.inputs)} rows and {len(self.names)} names; give one name per row.")
        for side, rows in (("inputs", self.inputs), ("targets", self.targets)):
            norms = rows.norm(dim=1)
            if not torch.isfinite(norms).all() or (norms == 0).any():
                bad = int((~(norms > 0)).nonzero()[0])
                raise ValueError(
                    f"Anchors: row {bad} ({self.names[bad]!r}) of the {side} is zero or not finite and has no direction; leave it out."
                )

    def __len__(self) -> int:
        return self.inputs.shape[0]

    @classmethod
    def from_rows(cls, inputs, targets=None, names=()) -> "Anchors":
        """Any vectors (tensor, array or lists), normalised. `targets=None` uses the inputs on both sides (an SAE)."""
        inputs = torch.atleast_2d(torch.as_tensor(inputs, dtype=torch.float32))
        targets = inputs if targets is None else torch.atleast_2d(torch.as_tensor(targets, dtype=torch.float32))
        names = tuple(names) or tuple(f"anchor {i}" for i in range(len(inputs)))
        return cls(_unit(inputs), _unit(targets), names)

    @classmethod
    def from_truth(cls, truth: Truth | Activations, features=None) -> "Anchors":
        """The true directions of the given features (None: all)."""
        if isinstance(truth, Activations):
            if truth.truth is None:
                raise ValueError(
                    "Anchors.from_truth: these activations have no truth (truth=None). Use LinearBench or "
                    "HierarchyBench, or anchor with Anchors.from_labels or Anchors.from_rows."
                )
            truth = truth.truth
        chosen = range(truth.n_features) if features is None else [int(f) for f in features]
        outside = [f for f in chosen if not 0 <= f < truth.n_features]
        if outside:
            raise ValueError(f"Anchors.from_truth: feature {outside[0]} does not exist; there are {truth.n_features}.")
        index = torch.tensor(list(chosen), dtype=torch.long)
        names = tuple(truth.name(f) for f in chosen)
        return cls(_unit(truth.input_features[index]), _unit(truth.target_features[index]), names, tuple(chosen))

    @classmethod
    def from_labels(cls, activations: Activations, labels=None, centre: bool = True) -> "Anchors":
        """Normalised class means: mean of the rows of each label (None: all labels present).

        `centre` subtracts the mean of all rows first; class means share a large common component
        otherwise and anchors stand in for each other.
        """
        if activations.labels is None:
            raise ValueError("Anchors.from_labels: these activations have no labels (labels=None). Pass labels= to Stored or capture.")
        present = torch.unique(activations.labels).tolist()
        chosen = present if labels is None else [activations.label_names.index(x) if isinstance(x, str) else int(x) for x in labels]
        missing = [x for x in chosen if x not in present]
        if missing:
            raise ValueError(f"Anchors.from_labels: no row has label {missing[0]}; labels present: {present[:20]}.")
        names = tuple(activations.label_names[x] if activations.label_names else f"label {x}" for x in chosen)
        means = [_class_means(side, activations.labels, chosen, centre) for side in (activations.inputs, activations.targets)]
        return cls(_unit(means[0]), _unit(means[1]), names)

    def take(self, rows) -> "Anchors":
        rows = [int(r) for r in rows]
        features = tuple(self.features[r] for r in rows) if self.features else ()
        return Anchors(self.inputs[rows], self.targets[rows], tuple(self.names[r] for r in rows), features)


@dataclass(frozen=True)
class Pins:
    """Latent `latents[j]` is held to row j of `anchors` with `weight[j]`; `hard[j]` fixes the rows instead."""

    anchors: Anchors
    latents: Int[Tensor, " k"]
    weight: Float[Tensor, " k"]
    hard: Bool[Tensor, " k"]

    def __post_init__(self):
        if not len(self.anchors) == len(self.latents) == len(self.weight) == len(self.hard):
            raise ValueError("Pins: anchors, latents, weight and hard need one entry per pinned latent.")
        if len(set(self.latents.tolist())) < len(self.latents):
            raise ValueError("Pins: a latent is pinned twice; hold each latent to one anchor.")

    def __len__(self) -> int:
        return len(self.latents)

    @cached_property
    def any_hard(self) -> bool:
        return bool(self.hard.any())

    def without(self, latents) -> "Pins | None":
        """The pins of all other latents; None when none is left."""
        drop = {int(i) for i in latents}
        keep = [j for j, i in enumerate(self.latents.tolist()) if i not in drop]
        if not keep:
            return None
        return Pins(self.anchors.take(keep), self.latents[keep], self.weight[keep], self.hard[keep])

    def merged(self, other: "Pins") -> "Pins":
        """Both; a latent in both follows `other`."""
        mine = self.without(other.latents.tolist())
        if mine is None:
            return other
        features = tuple(f for p in (mine, other) for f in p.anchors.features or (-1,) * len(p))
        anchors = Anchors(
            torch.cat([mine.anchors.inputs, other.anchors.inputs]),
            torch.cat([mine.anchors.targets, other.anchors.targets]),
            mine.anchors.names + other.anchors.names,
            features,
        )
        return Pins(
            anchors,
            torch.cat([mine.latents, other.latents]),
            torch.cat([mine.weight, other.weight]),
            torch.cat([mine.hard, other.hard]),
        )

    def to(self, device) -> "Pins":
        anchors = replace(self.anchors, inputs=self.anchors.inputs.to(device), targets=self.anchors.targets.to(device))
        return Pins(anchors, self.latents.to(device), self.weight.to(device), self.hard.to(device))


@dataclass(frozen=True)
class Pulls:
    """The encoder row of latent `latents[j]` is turned towards unit row j of `directions` with `weight[j]`.

    Directions that were measured on the data, unlike `Pins`, whose directions we are told: no feature is held out
    for them, and neither the row's norm nor the decoder is touched.
    """

    latents: Int[Tensor, " k"]
    directions: Float[Tensor, "k d_in"]
    weight: Float[Tensor, " k"]

    def __post_init__(self):
        if not len(self.latents) == len(self.directions) == len(self.weight):
            raise ValueError("Pulls: latents, directions and weight need one entry per latent.")
        if len(set(self.latents.tolist())) < len(self.latents):
            raise ValueError("Pulls: a latent is pulled twice; pull each latent to one direction.")

    def __len__(self) -> int:
        return len(self.latents)

    def without(self, latents) -> "Pulls | None":
        """The pulls of all other latents; None when none is left."""
        drop = {int(i) for i in latents}
        keep = [j for j, i in enumerate(self.latents.tolist()) if i not in drop]
        return Pulls(self.latents[keep], self.directions[keep], self.weight[keep]) if keep else None

    def merged(self, other: "Pulls") -> "Pulls":
        """Both; a latent in both follows `other`."""
        mine = self.without(other.latents.tolist())
        if mine is None:
            return other
        sides = ((getattr(mine, name), getattr(other, name)) for name in ("latents", "directions", "weight"))
        return Pulls(*map(torch.cat, sides))


def _unit(rows: Tensor) -> Tensor:
    return normalize(rows.detach().float(), dim=1)


def _class_means(side: Tensor, labels: Tensor, chosen, centre: bool) -> Tensor:
    means = torch.stack([side[labels == label].mean(dim=0) for label in chosen])
    return means - side.mean(dim=0) if centre else means
