"""Labels as a tree of concepts: a label named "animal > bird > owl" makes its rows owls, birds and animals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from sdl_explorer.data.activations import Activations

SEPARATOR = " > "


@dataclass(frozen=True)
class Concepts:
    """What rows can be: concept c holds the rows of `member[:, c]`, all of them rows of its parent too.

    paths        names from the root down, "animal > bird"; each once
    parents      place of the concept above, None at a root
    directions   unit directions, one a concept, where they are known (true features); otherwise None: probes find them
    """

    paths: tuple[str, ...]
    parents: tuple[int | None, ...]
    member: Bool[np.ndarray, "n n_concepts"]
    directions: Float[Tensor, "n_concepts d_out"] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def names(self) -> tuple[str, ...]:
        """The last part of each path."""
        return tuple(path.rpartition(SEPARATOR)[2] for path in self.paths)

    @classmethod
    def from_labels(cls, labels: Sequence[int] | np.ndarray | Tensor, label_names: Sequence[str] = ()) -> "Concepts":
        """A concept for every label and for everything above one. A label without a name is "label 3", and a root."""
        labels = np.asarray(labels, dtype=np.int64)
        used, which = np.unique(labels, return_inverse=True)
        lines = [_above(str(label_names[i]) if 0 <= i < len(label_names) else f"label {i}") for i in used.tolist()]
        paths = tuple(sorted({path for line in lines for path in line}))
        place = {path: i for i, path in enumerate(paths)}
        holds = np.zeros((len(used), len(paths)), dtype=bool)
        for row, line in enumerate(lines):
            holds[row, [place[path] for path in line]] = True
        above = (path.rpartition(SEPARATOR)[0] for path in paths)
        return cls(paths, tuple(place.get(parent) for parent in above), holds[which])

    @classmethod
    def from_truth(cls, activations: Activations) -> "Concepts":
        """A concept for every true feature: the rows on which it is active, and the direction in which targets hold it."""
        truth = activations.truth
        if truth is None:
            raise ValueError("Concepts: these activations have no truth. Use a generated source, or labels.")
        parents = tuple(truth.parents) or (None,) * truth.n_features
        names = tuple(truth.name(i) for i in range(truth.n_features))
        return cls(names, parents, (truth.codes > 0).cpu().numpy(), truth.target_features)

    def children(self, concept: int) -> tuple[int, ...]:
        return tuple(child for child, parent in enumerate(self.parents) if parent == concept)


def _above(path: str) -> list[str]:
    """ "a > b > c": "a", "a > b", "a > b > c"."""
    parts = path.split(SEPARATOR)
    return [SEPARATOR.join(parts[: i + 1]) for i in range(len(parts))]
