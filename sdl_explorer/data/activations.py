"""What every other layer reads: activations, the truth behind them, and what each row is."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


class Block(NamedTuple):
    """One source of a crosscoder: its name and its columns of the inputs and of the targets."""

    name: str
    inputs: slice
    targets: slice


class Passage(NamedTuple):
    """A token (or a patch) with the pieces around it; `focus` is its place in `pieces`."""

    pieces: tuple[str, ...]
    focus: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Examples:
    """What row i *is*: piece `position[i]` of document `document[i]`.

    A document is a tuple of text pieces (tokens; a plain string is a document of one piece) or, for
    images, a title beside its thumbnail. A document of one piece describes all of its rows, whatever their
    position. Subsets share the documents.
    """

    documents: tuple[tuple[str, ...], ...]
    document: Int[np.ndarray, " n"]
    position: Int[np.ndarray, " n"]
    thumbnails: np.ndarray | None = None  # uint8 (n_documents, height, width, 3)

    def __post_init__(self):
        if len(self.document) != len(self.position):
            raise ValueError(f"Examples: {len(self.document)} document ids and {len(self.position)} positions; give one of each per row.")

    def __len__(self) -> int:
        return len(self.document)

    @classmethod
    def from_strings(cls, strings) -> "Examples":
        documents = tuple((str(s),) for s in strings)
        return cls(documents, np.arange(len(documents)), np.zeros(len(documents), dtype=np.int64))

    def take(self, rows) -> "Examples":
        rows = np.asarray(rows)
        return replace(self, document=self.document[rows], position=self.position[rows])

    def piece(self, row: int) -> str:
        pieces = self.documents[self.document[row]]
        return pieces[0] if len(pieces) == 1 else pieces[self.position[row]]

    def context(self, row: int, width: int = 12) -> Passage:
        """The `width` pieces on either side of row's piece, with their positions in the document."""
        pieces, at = self.documents[self.document[row]], int(self.position[row])
        if len(pieces) == 1:
            return Passage(pieces, 0, (at,))
        start, stop = max(0, at - width), min(len(pieces), at + width + 1)
        return Passage(tuple(pieces[start:stop]), at - start, tuple(range(start, stop)))

    def thumbnail(self, row: int) -> np.ndarray | None:
        return None if self.thumbnails is None else self.thumbnails[self.document[row]]


@dataclass(frozen=True)
class Truth:
    """The linear representation behind generated data: x_p = W_p x and x_r = W_r x, x >= 0
    (arXiv 2512.05534, Assumption 2.1). Features are rows here.

    `complete`: no other feature is in the rows. False where known ones were put into rows that hold unknown ones too.
    """

    codes: Float[Tensor, "n n_features"]
    input_features: Float[Tensor, "n_features d_in"]
    target_features: Float[Tensor, "n_features d_out"]
    parents: tuple[int | None, ...] = ()
    names: tuple[str, ...] = ()
    complete: bool = True

    @property
    def n_features(self) -> int:
        return self.input_features.shape[0]

    def name(self, feature: int) -> str:
        return self.names[feature] if self.names else f"feature {feature}"


@dataclass(frozen=True)
class Activations:
    """`n` rows read from a network. A training batch is one of these too.

    For an SAE `targets` is the same tensor as `inputs`; for a crosscoder `blocks` names the sources.
    """

    inputs: Float[Tensor, "n d_in"]
    targets: Float[Tensor, "n d_out"]
    truth: Truth | None = None
    labels: Int[Tensor, " n"] | None = None
    label_names: tuple[str, ...] = ()
    examples: Examples | None = None
    blocks: tuple[Block, ...] = ()

    def __post_init__(self):
        counts = {"inputs": len(self.inputs), "targets": len(self.targets)}
        if self.truth is not None:
            counts["truth.codes"] = len(self.truth.codes)
        if self.labels is not None:
            counts["labels"] = len(self.labels)
        if self.examples is not None:
            counts["examples"] = len(self.examples)
        if len(set(counts.values())) > 1:
            raise ValueError(f"Activations: rows differ ({counts}); every part needs one entry per row.")

    def __len__(self) -> int:
        return self.inputs.shape[0]

    @property
    def n(self) -> int:
        return self.inputs.shape[0]

    @property
    def kind(self) -> str:
        """ "sae", "transcoder" or "crosscoder": a property of the data, not of the model."""
        if self.blocks:
            return "crosscoder"
        return "sae" if self.targets is self.inputs else "transcoder"

    def take(self, rows) -> "Activations":
        """The given rows (a slice or an index array); targets stay the same object as inputs in an SAE."""
        index = torch.arange(self.n)[rows] if isinstance(rows, slice) else torch.as_tensor(rows)
        device_index = index.to(self.inputs.device)
        inputs = self.inputs[device_index]
        targets = inputs if self.targets is self.inputs else self.targets[device_index]
        truth = self.truth and replace(self.truth, codes=self.truth.codes[index.to(self.truth.codes.device)])
        labels = None if self.labels is None else self.labels[index.to(self.labels.device)]
        examples = None if self.examples is None else self.examples.take(index.cpu().numpy())
        return replace(self, inputs=inputs, targets=targets, truth=truth, labels=labels, examples=examples)

    def to(self, device) -> "Activations":
        inputs = self.inputs.to(device)
        targets = inputs if self.targets is self.inputs else self.targets.to(device)
        return replace(self, inputs=inputs, targets=targets)
