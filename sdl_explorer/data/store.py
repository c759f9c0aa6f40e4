"""Activations that exist: in memory, in a file, or in a folder of shards larger than memory."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from sdl_explorer.data.activations import Activations, Block, Examples
from sdl_explorer.data.shards import (
    MANIFEST,
    Contents,
    Removed,
    open_contents,
    rows_per_shard,
    scan,
    shard_name,
    write_folder,
    write_tensors,
)
from sdl_explorer.data.sources import PARTS, Part, Source, stream

WINDOW = 131_072  # rows that are shuffled together; fixed, so that an order is the same wherever the rows are kept


class Stored(Source):
    """`n` rows of activations that were read from a network.

    `inputs` is a tensor, a numpy array, a .npy, .pt or .safetensors file, or a folder written by `capture` or
    `Stored.save`; all but the first two are memory-mapped. `targets=None` makes an SAE. Rows come back as
    they are, in float32: centring and scaling belong to the model. Tensors in memory are not copied: do not change them.

    labels: one integer or string per row. examples: what each row is. keep: one bool per row; `removed` says what it left out.
    blocks: the sources of a crosscoder, `Block`s or names of equally wide ones. hooks: where the rows were read, inputs first.

    train, choose and judge are 80, 10 and 10 % of the rows. Documents of several rows stay whole where there are at least
    three. Batches visit each training row once an epoch, in an order that depends on (order, epoch), and run across the border.
    """

    def __init__(self, inputs, targets=None, *, labels=None, label_names=(), examples=None, keep=None, blocks=(), hooks=()):
        super().__init__()
        found = open_contents(inputs)
        if targets is not None:
            if found.targets is not None:
                raise ValueError(f"targets: {inputs} holds targets itself, and targets= gives others. Leave one out.")
            found = found._replace(targets=open_contents(targets, "targets").inputs)
        alone = targets is labels is examples is keep is None and not (label_names or blocks or hooks)
        self._origin = Path(inputs).absolute() if alone and isinstance(inputs, (str, os.PathLike)) else None
        self._inputs, self._targets, facts = found.inputs, found.targets, found.manifest
        visible = _mask_rows(found.rows.get("keep"))
        n = self._inputs.n if visible is None else len(visible)
        own_labels, own_examples = _own_rows(found, visible)
        self._labels, self._label_names = own_labels, tuple(facts.get("label_names", ()))
        if labels is not None:
            self._labels, self._label_names = as_labels(labels, label_names)
        self._examples = own_examples if examples is None else examples
        self._check_counts(n, keep)
        self._rows = visible
        if keep is not None:
            chosen = _mask_rows(keep)
            self._rows = chosen if visible is None else visible[chosen]
            self._labels = None if self._labels is None else self._labels[torch.from_numpy(chosen)]
            self._examples = None if self._examples is None else self._examples.take(chosen)
        if self.n < 10:
            raise ValueError(f"Stored: {self.n} rows; at least 10 are needed for parts of 80, 10 and 10 %. Give more rows.")
        self._blocks = _as_blocks(blocks or facts.get("blocks", ()), self.width_in, self.width_out)
        self._hooks = tuple(hooks) or tuple(facts.get("hooks", ()))
        self._removed = Removed(**facts.get("removed", {}))
        if "sha256" in facts and targets is None and keep is None:
            self._digest = facts["sha256"]
        else:
            self._digest, removed = scan(self._inputs, self._targets, self._rows)
            reasons = {"keep": n - self.n} if n > self.n else {}
            self._removed = replace(removed, reasons=self._removed.reasons | reasons)
        self._parts, self._split_by = split_rows(self.n, self._examples)
        self._epochs: dict[tuple[int, int], np.ndarray] = {}

    # facts -----------------------------------------------------------------------------------------------------

    @property
    def n(self) -> int:
        return self._inputs.n if self._rows is None else len(self._rows)

    @property
    def width_in(self) -> int:
        return self._inputs.d

    @property
    def width_out(self) -> int:
        return self._inputs.d if self._targets is None else self._targets.d

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self._blocks

    @property
    def hooks(self) -> tuple[str, ...]:
        """Where in the network the rows were read, inputs first; empty where that is not known."""
        return self._hooks

    @property
    def labels(self) -> Tensor | None:
        """The label of each row."""
        return self._labels

    @property
    def label_names(self) -> tuple[str, ...]:
        return self._label_names

    @property
    def examples(self) -> Examples | None:
        """What each row is."""
        return self._examples

    @property
    def removed(self) -> Removed:
        """What was left out."""
        return self._removed

    @property
    def split_by(self) -> str:
        """ "document" where whole documents went to one part, otherwise "row"."""
        return self._split_by

    @property
    def part_sizes(self) -> dict[str, int]:
        return {part: len(rows) for part, rows in self._parts.items()}

    @property
    def origin(self) -> Path | None:
        """The file or folder that gives this source back, `Stored(origin)`; None where there is none: rows or facts from memory."""
        return self._origin

    @property
    def nbytes(self) -> int:
        """Bytes of the kept rows, in the precision they are stored in."""
        return self.n * sum(table.row_bytes for table in (self._inputs, self._targets) if table is not None)

    @property
    def dead_after(self) -> int:
        return min(3_000_000, len(self._parts["train"]))

    def fingerprint(self) -> str:
        """sha256 of the kept rows, their labels and their documents, wherever they are stored."""
        digest = hashlib.sha256(self._digest.encode())
        digest.update(b"" if self._labels is None else self._labels.numpy().tobytes())
        digest.update(b"" if self._examples is None else np.asarray(self._examples.document, dtype=np.int64).tobytes())
        return f"Stored:{digest.hexdigest()}"

    # rows ------------------------------------------------------------------------------------------------------

    def batch(self, index: int, size: int, order: int = 0) -> Activations:
        return self._take(self._batch_rows(index, size, order))

    def sample(self, n: int, generator: Generator, part: Part = "judge") -> Activations:
        """`n` different rows of one part, in their stored order; the whole part where it has no more."""
        if part not in PARTS:
            raise ValueError(f"sample: part is {part!r}; it is one of {', '.join(PARTS)}.")
        rows = self._parts[part]
        if n < len(rows):
            rows = rows[torch.randperm(len(rows), generator=generator)[:n].sort().values.numpy()]
        return self._take(rows)

    def part(self, part: Part) -> np.ndarray:
        """The row numbers of one part, ascending."""
        return self._parts[part].copy()

    def _take(self, rows: np.ndarray) -> Activations:
        stored = rows if self._rows is None else self._rows[rows]
        inputs = self._inputs.read(stored)
        return Activations(
            inputs,
            inputs if self._targets is None else self._targets.read(stored),
            labels=None if self._labels is None else self._labels[torch.from_numpy(rows)],
            label_names=self._label_names,
            examples=None if self._examples is None else self._examples.take(rows),
            blocks=self._blocks,
        )

    def _batch_rows(self, index: int, size: int, order: int) -> np.ndarray:
        parts, (epoch, start) = [], divmod(index * size, len(self._parts["train"]))
        while size > 0:
            rows = self._epoch(order, epoch)[start : start + size]
            parts.append(rows)
            epoch, start, size = epoch + 1, 0, size - len(rows)
        return np.concatenate(parts)

    def _epoch(self, order: int, epoch: int) -> np.ndarray:
        """The training rows in the order of one epoch: windows permuted, and rows inside each, so that reads stay local."""
        found = self._epochs.get((order, epoch))
        if found is None:
            generator, train = stream("stored rows", order, epoch), self._parts["train"]
            windows = np.split(train, np.searchsorted(train, np.arange(WINDOW, self.n, WINDOW)))
            shuffled = [windows[w] for w in torch.randperm(len(windows), generator=generator)]
            found = np.concatenate([w[torch.randperm(len(w), generator=generator).numpy()] for w in shuffled])
            recent = dict(list(self._epochs.items())[-1:])  # a batch may need two epochs
            self._epochs = recent | {(order, epoch): found}
        return found

    # writing ---------------------------------------------------------------------------------------------------

    def save(self, folder) -> Path:
        """Writes the kept rows, labels, examples and facts as a folder of shards: `Stored(folder)` has the same fingerprint,
        parts and batches. The manifest is written last; saving the same rows again does nothing."""
        folder = Path(folder)
        if (folder / MANIFEST).exists():
            if Stored(folder).fingerprint() == self.fingerprint():
                return folder
            raise ValueError(f"{folder} already holds other activations. Save into another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        shards = [self._write_shard(folder, i, start, stop) for i, (start, stop) in enumerate(self._shard_spans())]
        write_folder(folder, self._manifest() | {"rows": self.n, "shards": shards}, self._row_tables(), self._documents())
        return folder

    def _shard_spans(self) -> Iterator[tuple[int, int]]:
        size = rows_per_shard(self.nbytes // self.n)
        return ((start, min(self.n, start + size)) for start in range(0, self.n, size))

    def _write_shard(self, folder: Path, index: int, start: int, stop: int) -> str:
        tables = {"inputs": self._inputs} | ({} if self._targets is None else {"targets": self._targets})
        rows = np.arange(start, stop) if self._rows is None else self._rows[start:stop]
        write_tensors(folder / shard_name(index), {side: table.gather(rows) for side, table in tables.items()})
        return shard_name(index)

    def _manifest(self) -> dict:
        return {
            "sha256": self._digest,
            "removed": asdict(self._removed),
            "blocks": block_records(self._blocks),
            "hooks": list(self._hooks),
            "label_names": list(self._label_names),
        }

    def _row_tables(self) -> dict[str, Tensor]:
        tables = {} if self._labels is None else {"labels": self._labels}
        if self._examples is not None:
            tables |= {name: torch.from_numpy(getattr(self._examples, name).astype(np.int64)) for name in ("document", "position")}
            if self._examples.thumbnails is not None:
                tables["thumbnails"] = torch.from_numpy(self._examples.thumbnails)
        return tables

    def _documents(self) -> tuple:
        return () if self._examples is None else self._examples.documents

    def _check_counts(self, n: int, keep) -> None:
        parts = {"targets": self._targets, "labels": self._labels, "examples": self._examples, "keep": keep}
        for name, part in parts.items():
            rows = self._inputs.n if name == "targets" else n
            if part is not None and len(part) != rows:
                raise ValueError(f"Stored: {rows} rows of inputs and {len(part)} of {name}; give one for each row.")


def split_rows(n: int, examples: Examples | None) -> tuple[dict[str, np.ndarray], str]:
    """The ascending rows of each part, and "document" or "row": what was kept whole. A fixed function of what is given."""
    order = torch.randperm(n, generator=stream("parts", "row")).numpy()
    if examples is None:
        return _cut(order, max(1, n // 10), max(1, n // 10)), "row"
    documents, which, counts = np.unique(examples.document, return_inverse=True, return_counts=True)
    if len(documents) < 3 or counts.max() == 1:
        return _cut(order, max(1, n // 10), max(1, n // 10)), "row"
    shuffled = torch.randperm(len(documents), generator=stream("parts", "document")).numpy()
    shuffled = shuffled[np.argsort(counts[shuffled] > n / 10, kind="stable")]  # large ones last: they go to train
    ends = counts[shuffled].cumsum()
    n_judge = int(np.clip(np.searchsorted(ends, n / 10) + 1, 1, len(ends) - 2))
    n_choose = int(np.clip(np.searchsorted(ends, ends[n_judge - 1] + n / 10) + 1 - n_judge, 1, len(ends) - n_judge - 1))
    chosen = _cut(shuffled, n_judge, n_choose)
    return {part: np.flatnonzero(np.isin(which, inside)) for part, inside in chosen.items()}, "document"


def _cut(order: np.ndarray, n_judge: int, n_choose: int) -> dict[str, np.ndarray]:
    judge, choose, train = np.split(order, [n_judge, n_judge + n_choose])
    return {"train": np.sort(train), "choose": np.sort(choose), "judge": np.sort(judge)}


def _mask_rows(keep) -> np.ndarray | None:
    """The row numbers of a mask."""
    if keep is None:
        return None
    mask = np.asarray(keep)
    if mask.dtype not in (np.bool_, np.uint8) or mask.ndim != 1:
        raise TypeError(f"keep: {mask.dtype} of shape {mask.shape}; give one bool for each row, True for the rows to keep.")
    return np.flatnonzero(mask)


def _own_rows(found: Contents, visible: np.ndarray | None) -> tuple[Tensor | None, Examples | None]:
    """The labels and examples that a folder holds, of its visible rows."""
    index = slice(None) if visible is None else torch.from_numpy(visible)
    rows = {name: found.rows[name][index] for name in ("labels", "document", "position") if name in found.rows}
    if "document" not in rows:
        return rows.get("labels"), None
    thumbnails = found.rows["thumbnails"].numpy() if "thumbnails" in found.rows else None
    return rows.get("labels"), Examples(found.documents, rows["document"].numpy(), rows["position"].numpy(), thumbnails)


def as_labels(labels, label_names) -> tuple[Tensor, tuple[str, ...]]:
    """Integers as they are; strings as places in their sorted names."""
    array = np.asarray(labels)
    if array.ndim != 1:
        raise ValueError(f"labels: shape {array.shape}; give one label for each row.")
    if array.dtype.kind in "US":
        names, array = np.unique(array, return_inverse=True)
        return torch.from_numpy(array.astype(np.int64)), tuple(map(str, names))
    if array.dtype.kind not in "iub":
        raise TypeError(f"labels: dtype {array.dtype}; labels are integers or strings.")
    if label_names and len(array) and not 0 <= array.min() <= array.max() < len(label_names):
        raise ValueError(f"labels: from {array.min()} to {array.max()}, and {len(label_names)} label_names; name each label from 0.")
    return torch.from_numpy(array.astype(np.int64)), tuple(label_names)


def block_records(blocks) -> list[list]:
    """What a manifest keeps of blocks."""
    return [[b.name, b.inputs.start, b.inputs.stop, b.targets.start, b.targets.stop] for b in blocks]


def _as_blocks(blocks, width_in: int, width_out: int) -> tuple[Block, ...]:
    """`Block`s, names of equally wide blocks, or rows of a manifest: name, start and stop in the inputs, then in the targets."""
    blocks = tuple(blocks)
    if blocks and all(isinstance(b, str) for b in blocks):
        edges = [[width * i // len(blocks) for i in range(len(blocks) + 1)] for width in (width_in, width_out)]
        blocks = [(name, *(edge for e in edges for edge in e[i : i + 2])) for i, name in enumerate(blocks)]
    blocks = tuple(b if isinstance(b, Block) else Block(b[0], slice(b[1], b[2]), slice(b[3], b[4])) for b in blocks)
    for side, width in (("inputs", width_in), ("targets", width_out)):
        columns = [c for b in blocks for c in range(width)[getattr(b, side)]]
        if blocks and columns != list(range(width)):
            raise ValueError(f"blocks: their {side} cover {len(columns)} columns of {width}; each column belongs to one block, in order.")
    return blocks
