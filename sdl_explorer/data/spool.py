"""Batches on their way to a finished folder: written in parts, so that a capture that was interrupted can go on.

Beside each shard lie `part-00000.safetensors` (what its rows are) and `part-00000.json`, written last: a part without it is not there.
`finish` turns the parts into the tables and the manifest of a folder of activations.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from sdl_explorer.data.activations import Block
from sdl_explorer.data.shards import (
    MANIFEST,
    Table,
    open_contents,
    read_manifest,
    rows_per_shard,
    scan,
    shard_name,
    write_folder,
    write_json,
    write_tensors,
)
from sdl_explorer.data.store import block_records

REQUEST = "request.json"
OUTLIER = 10  # times the median norm


class Piece(NamedTuple):
    """One batch. `rows`: "inputs", maybe "targets" and "labels", "item" and "position" in the batch, "special" and "norms" (rows, blocks).

    `documents` has one entry per item, or is empty where rows are not described; so have `thumbnails`.
    """

    key: str
    rows: dict[str, Tensor]
    n_items: int
    padding: int
    documents: list[tuple[str, ...]]
    thumbnails: np.ndarray | None
    widths: dict[str, int]  # columns of each place


class Spool:
    """The batches that a folder holds so far: `keys` names them, `finished` says whether the folder is."""

    def __init__(self, folder: Path, request: dict):
        self.folder, self.request, self.finished = folder, request, (folder / MANIFEST).exists()
        self._waiting: list[Piece] = []
        self._parts: list[dict] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._check_request(self._former_request())
        if self.finished:
            manifest = read_manifest(folder)
            self.keys, self.n_rows, self.n_items = list(manifest["batches"]), manifest["rows"], 0
        else:
            write_json(folder / REQUEST, request)
            self._parts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("part-*.json"))]
            self.keys = [key for part in self._parts for key in part["keys"]]
            self.n_rows, self.n_items = (sum(part[name] for part in self._parts) for name in ("rows", "items"))

    @property
    def widths(self) -> dict[str, int]:
        """Columns of each place; known once a part is written."""
        return self._parts[0]["widths"]

    def add(self, piece: Piece) -> None:
        self._waiting.append(piece)
        self.keys.append(piece.key)
        self.n_rows, self.n_items = self.n_rows + len(piece.rows["inputs"]), self.n_items + piece.n_items
        row_bytes = sum(piece.rows[s][0:1].nbytes for s in ("inputs", "targets") if s in piece.rows)
        if sum(len(p.rows["inputs"]) for p in self._waiting) >= rows_per_shard(max(1, row_bytes)):
            self.flush()

    def flush(self) -> None:
        """Writes the batches that wait, as one part."""
        if not self._waiting:
            return
        waiting, index = self._waiting, len(self._parts)
        firsts = np.cumsum([0] + [p.n_items for p in waiting]) + self.n_items - sum(p.n_items for p in waiting)
        rows = {name: torch.cat([p.rows[name] for p in waiting]) for name in waiting[0].rows}
        rows["document"] = torch.cat([p.rows["item"] + int(first) for p, first in zip(waiting, firsts, strict=False)])
        thumbnails = [p.thumbnails for p in waiting if p.thumbnails is not None]
        if thumbnails:
            rows["thumbnails"] = torch.from_numpy(np.concatenate(thumbnails))
        sides = {side: rows.pop(side) for side in ("inputs", "targets") if side in rows}
        part = {
            "keys": [p.key for p in waiting],
            "rows": len(sides["inputs"]),
            "items": sum(p.n_items for p in waiting),
            "padding": sum(p.padding for p in waiting),
            "widths": waiting[0].widths,
            "documents": [document for p in waiting for document in p.documents],
        }
        write_tensors(self.folder / shard_name(index), sides)
        write_tensors(self.folder / f"part-{index:05d}.safetensors", rows)
        write_json(self.folder / f"part-{index:05d}.json", part)
        self._parts.append(part)
        self._waiting = []

    def finish(self, keep: str, facts: dict, blocks: tuple[Block, ...]) -> None:
        """Decides which rows stay, and writes the tables and the manifest; the parts are no longer needed then."""
        tables = [load_file(self.folder / f"part-{i:05d}.safetensors") for i in range(len(self._parts))]
        rows = {name: torch.cat([t[name] for t in tables]) for name in tables[0]}
        shards = [shard_name(i) for i in range(len(self._parts))]
        inputs, targets = _join([open_contents(self.folder / name) for name in shards])
        kept, reasons = choose_rows(rows["special"].bool(), rows["norms"], keep)
        digest, removed = scan(inputs, targets, None if kept.all() else kept.nonzero()[:, 0].numpy())
        padding = sum(part["padding"] for part in self._parts)
        removed = replace(removed, reasons=reasons | ({"padding": padding} if padding else {}))
        documents = [document for part in self._parts for document in part["documents"]]
        described = ("labels", "document", "position", "thumbnails") if documents else ("labels",)
        kept_tables = {name: rows[name] for name in described if name in rows}
        kept_tables |= {} if kept.all() else {"keep": kept.to(torch.uint8)}
        manifest = {"rows": inputs.n, "shards": shards, "sha256": digest, "removed": asdict(removed), "blocks": block_records(blocks)}
        write_folder(self.folder, manifest | facts | {"request": self.request, "batches": self.keys}, kept_tables, documents)
        for path in [*self.folder.glob("part-*"), self.folder / REQUEST]:
            path.unlink()

    def _former_request(self) -> dict:
        if self.finished:
            return read_manifest(self.folder).get("request", {})
        if (self.folder / REQUEST).exists():
            return json.loads((self.folder / REQUEST).read_text(encoding="utf-8"))
        if any(self.folder.iterdir()):
            raise ValueError(f"capture: {self.folder} holds other files. Give a new or an empty folder.")
        return self.request

    def _check_request(self, before: dict) -> None:
        different = [name for name, value in self.request.items() if before.get(name) != value]
        if different:
            raise ValueError(
                f"capture: {self.folder} holds another capture; different there: {', '.join(different)}. Ask for the same, or give another "
                "folder."
            )


def choose_rows(special: Tensor, norms: Tensor, keep: str) -> tuple[Tensor, dict[str, int]]:
    """Which rows stay, and how many do not for which reason. `norms` (n, blocks); the median is that of rows that are not special, and
    sets no limit where it is zero."""
    if keep == "all":
        return torch.ones_like(special), {}
    ordinary = norms[~special]
    if len(ordinary) == 0:
        raise ValueError(f"capture: all {len(special)} rows are special tokens. Use keep='all', or give texts with words.")
    median = ordinary.median(dim=0).values
    large = ((norms > OUTLIER * median) & (median > 0)).any(dim=1) & ~special
    counts = {"special tokens": int(special.sum()), f"norm above {OUTLIER} x the median": int(large.sum())}
    return ~special & ~large, {reason: count for reason, count in counts.items() if count}


def _join(shards: list) -> tuple[Table, Table | None]:
    inputs = Table([piece for s in shards for piece in s.inputs.pieces])
    has_targets = shards[0].targets is not None
    return inputs, Table([piece for s in shards for piece in s.targets.pieces]) if has_targets else None
