"""Rows on disk: reading the file forms as memory-mapped tensors, and our own folder of shards.

A folder of activations, `format_version` 1, holds

    activations.json            the manifest, written last: a folder without it is not finished
    shard-00000.safetensors     "inputs" (rows, d_in) and, unless they are the inputs, "targets" (rows, d_out)
    rows.safetensors            optional, one entry per row: "keep" (uint8), "labels", "document", "position" (int64),
                                and "thumbnails" (n_documents, height, width, 3), uint8
    documents.json              optional: a list of documents, each a list of its pieces

Row i of the folder is row i of the shards in order. The manifest says what is in the rows that are kept: sha256, widths,
hooks, blocks, label names, and what was left out. Every file is written beside its place, synced, and renamed into it.
"""

import hashlib
import json
import os
import pickle
import warnings
import zipfile
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

FORMAT, FORMAT_VERSION = "sdl_explorer.activations", 1
MANIFEST = "activations.json"
SHARD_ROWS, SHARD_BYTES = 65_536, 2**28
SHOW_PROGRESS_FROM = 2**30  # bytes
STORED_DTYPES = {  # of a safetensors file: how numpy maps it (it has no bfloat16), and what it is
    "F16": (np.float16, torch.float16),
    "BF16": (np.int16, torch.bfloat16),
    "F32": (np.float32, torch.float32),
    "F64": (np.float64, torch.float64),
}
FORMS = ".npy, .pt, .safetensors, or a folder written by capture or Stored.save"


class Table:
    """`n` rows of `d` numbers in pieces, each in memory or memory-mapped; pieces share their dtype and d."""

    def __init__(self, pieces: list[Tensor]):
        self.pieces = pieces
        self.starts = np.cumsum([0] + [len(p) for p in pieces])
        self.n, self.d, self.dtype = int(self.starts[-1]), pieces[0].shape[1], pieces[0].dtype

    def __len__(self) -> int:
        return self.n

    @property
    def row_bytes(self) -> int:
        return self.d * self.dtype.itemsize

    def read(self, rows: np.ndarray) -> Float[Tensor, "rows d"]:
        """The given rows in the given order, float32 on the CPU. Reads those rows alone."""
        return self.gather(rows).float()

    def gather(self, rows: np.ndarray) -> Tensor:
        """The given rows in the dtype they are stored in."""
        if len(self.pieces) == 1:
            return self.pieces[0][torch.from_numpy(rows)]
        out = torch.empty(len(rows), self.d, dtype=self.dtype)
        piece = np.searchsorted(self.starts, rows, side="right") - 1
        for p in np.unique(piece):
            where = np.flatnonzero(piece == p)
            out[torch.from_numpy(where)] = self.pieces[p][torch.from_numpy(rows[where] - self.starts[p])]
        return out

    def slice(self, start: int, stop: int) -> Tensor:
        """Consecutive rows in the dtype they are stored in; a view where one piece holds them all."""
        parts = []
        while start < stop:
            p = bisect_right(self.starts, start) - 1
            end = min(stop, int(self.starts[p + 1]))
            parts.append(self.pieces[p][start - self.starts[p] : end - self.starts[p]])
            start = end
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def spans(self, limit: int = 2**25) -> Iterator[tuple[int, int]]:
        """(start, stop) of consecutive blocks of at most `limit` bytes as float32."""
        size = max(1, limit // (4 * self.d))
        return ((start, min(self.n, start + size)) for start in range(0, self.n, size))


class Contents(NamedTuple):
    """What a tensor, a file or a finished folder holds; the last three are empty but for folders."""

    inputs: Table
    targets: Table | None
    manifest: dict
    rows: dict[str, Tensor]
    documents: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Removed:
    """What was left out: rows, the share of the variance of the inputs that went with them, and how many for which reason.

    variance = 1 - sum |x - mean|^2 over the kept rows / the same over all rows, each about its own mean.
    """

    rows: int = 0
    variance: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)


def open_contents(what, role: str = "inputs") -> Contents:
    """Opens every form that `Stored` takes."""
    if isinstance(what, (str, os.PathLike)) and Path(what).is_dir():
        return read_folder(Path(what))
    tables = open_tables(what, role)
    return Contents(tables["inputs"], tables.get("targets"), {}, {}, ())


def scan(inputs: Table, targets: Table | None, kept: np.ndarray | None) -> tuple[str, Removed]:
    """One pass over the rows: sha256 of the kept ones, that all of them are finite, and what was left out.

    `kept` are ascending row numbers (None: all). Rows left out that are not finite count as rows and have no variance.
    """
    sides = {"inputs": inputs} | ({} if targets is None else {"targets": targets})
    hashes = {side: hashlib.sha256(f"{table.dtype} {table.d}".encode()) for side, table in sides.items()}
    keep = np.ones(inputs.n, dtype=bool) if kept is None else np.zeros(inputs.n, dtype=bool)
    keep[kept if kept is not None else slice(0)] = True
    everything, stays = _Scatter(inputs), _Scatter(inputs)
    nbytes = inputs.n * sum(t.row_bytes for t in sides.values())
    for start, stop in tqdm(list(inputs.spans()), "reading activations", disable=nbytes < SHOW_PROGRESS_FROM, leave=False):
        here = torch.from_numpy(keep[start:stop])
        for side, table in sides.items():
            block = table.slice(start, stop)
            chosen = block if bool(here.all()) else block[here]
            hashes[side].update(tensor_bytes(chosen))
            finite = torch.isfinite(chosen.float()).all(dim=1)
            if not finite.all():
                row = start + int(here.nonzero()[int((~finite).nonzero()[0])])
                raise ValueError(
                    f"{side}: row {row} is not finite (NaN or infinity, in float32). Leave such rows out with keep=, a mask of rows."
                )
        if kept is not None:
            block = inputs.slice(start, stop)
            everything.add(block)
            stays.add(block[here])
    digest = hashlib.sha256(repr([(side, h.hexdigest()) for side, h in hashes.items()]).encode()).hexdigest()
    total = everything.scatter
    return digest, Removed(int((~keep).sum()), 1 - stays.scatter / total if total > 0 else 0.0)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The numbers as they lie in memory, in order; bfloat16 too, which numpy does not know."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


class _Scatter:
    """Sum of squared distances from the mean, streamed: squares are taken about the first row, so that they do not cancel."""

    def __init__(self, table: Table):
        self.origin = table.slice(0, 1).double().nan_to_num()
        self.n, self.sum, self.squares = 0, torch.zeros(table.d, dtype=torch.float64), 0.0

    def add(self, rows: Tensor) -> None:
        shifted = rows[torch.isfinite(rows).all(dim=1)].double() - self.origin
        self.n, self.sum, self.squares = self.n + len(shifted), self.sum + shifted.sum(dim=0), self.squares + float(shifted.square().sum())

    @property
    def scatter(self) -> float:
        return self.squares - float(self.sum @ self.sum) / max(self.n, 1)


def open_tables(what, role: str) -> dict[str, Table]:
    """The "inputs", and the "targets" where the file holds them too, of a tensor, an array, or a file."""
    if isinstance(what, Tensor):
        return {"inputs": check_rows(what.detach().cpu(), role)}
    if isinstance(what, np.ndarray):
        return {"inputs": check_rows(_from_array(what, role), role)}
    if not isinstance(what, (str, os.PathLike)):
        raise TypeError(f"{role}: {type(what).__name__} is not a tensor, an array or a path. Give one of those; paths may be {FORMS}.")
    path = Path(what)
    if not path.exists():
        raise FileNotFoundError(f"{role}: {path} does not exist. Check the path.")
    readers = {".npy": _open_npy, ".pt": _open_pt, ".pth": _open_pt, ".safetensors": _open_safetensors}
    if path.suffix not in readers:
        raise ValueError(f"{role}: {path} has the ending {path.suffix!r}; readable are {FORMS}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{role}: {path} is empty (0 bytes). Write it again.")
    return {name: check_rows(tensor, f"{name} of {path}") for name, tensor in readers[path.suffix](path).items()}


def check_rows(tensor: Tensor, role: str) -> Table:
    if tensor.ndim != 2:
        way = "Flatten all but the last dimension: x.reshape(-1, x.shape[-1])." if tensor.ndim > 2 else "Give one row per activation."
        raise ValueError(f"{role}: shape {tuple(tensor.shape)}; activations are n rows of d numbers. {way}")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{role}: dtype {tensor.dtype}; activations are floating-point numbers. Convert them with .float().")
    if tensor.shape[1] == 0:
        raise ValueError(f"{role}: shape {tuple(tensor.shape)}; rows need at least one column.")
    return Table([tensor])


def _from_array(array: np.ndarray, role: str) -> Tensor:
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"{role}: dtype {array.dtype}; activations are floating-point numbers. Convert them with .astype(np.float32).")
    if not array.dtype.isnative or array.dtype.itemsize > 8:
        raise TypeError(f"{role}: dtype {array.dtype.str} cannot be read as a tensor. Convert it with .astype(np.float32).")
    return _as_tensor(array if min(array.strides, default=0) >= 0 else array.copy())


def _as_tensor(array: np.ndarray) -> Tensor:
    """Shares the memory, or the map. Maps are read-only: Linux refuses writable private ones that are larger than memory."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array)


def _open_npy(path: Path) -> dict[str, Tensor]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as .npy: {error}. Write it again with np.save(path, array).") from error
    return {"inputs": _from_array(array, f"inputs of {path}")}


def _open_pt(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # its remarks on pickles that it then refuses
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = "it holds other objects" if isinstance(error, pickle.UnpicklingError) else str(error).splitlines()[0]
        raise ValueError(
            f"{path} does not hold plain tensors ({reason}). Only files that load with weights_only=True are read, since others can "
            "run code. Save the tensor itself: torch.save(x, path)."
        ) from error
    return _named(found if isinstance(found, dict) else {"inputs": found}, path)


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "np") as file:  # checks the header and the length
            names = set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}). Copy or write it again.") from error
    wanted = names & {"inputs", "activations", "targets"} or names
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return _named({name: _map_safetensor(path, header[name], 8 + length, name) for name in wanted}, path)


def _map_safetensor(path: Path, entry: dict, start: int, name: str) -> Tensor:
    """safetensors itself maps a file privately and writable, which fails for files larger than memory."""
    if entry["dtype"] not in STORED_DTYPES:
        raise TypeError(f"{name} of {path}: dtype {entry['dtype']}; readable are {', '.join(STORED_DTYPES)}.")
    stored, dtype = STORED_DTYPES[entry["dtype"]]
    if 0 in entry["shape"]:
        return torch.empty(entry["shape"], dtype=dtype)
    array = np.memmap(path, stored, mode="r", offset=start + entry["data_offsets"][0], shape=tuple(entry["shape"]))
    return _as_tensor(array).view(dtype)


def _named(found: dict, path: Path) -> dict[str, Tensor]:
    names = [k for k in ("inputs", "activations") if k in found] or [k for k in found if len(found) == 1]
    if len(names) != 1 or not all(isinstance(found[k], Tensor) for k in (names[0], "targets") if k in found):
        raise ValueError(
            f"{path} holds {sorted(map(str, found))[:10]}; a file of activations holds one tensor, or tensors named 'inputs' "
            "(or 'activations') and, for a transcoder, 'targets'."
        )
    return {"inputs": found[names[0]].detach()} | ({"targets": found["targets"].detach()} if "targets" in found else {})


def read_folder(folder: Path) -> Contents:
    """A finished folder, its shards memory-mapped."""
    manifest = read_manifest(folder)
    shards = [open_tables(folder / name, "shard") for name in manifest["shards"]]
    tables = {side: Table([s[side].pieces[0] for s in shards]) for side in shards[0]}
    if tables["inputs"].n != manifest["rows"]:
        raise ValueError(f"{folder}: its shards hold {tables['inputs'].n} rows and {MANIFEST} says {manifest['rows']}. Write it again.")
    rows, documents = {}, ()
    if (folder / "rows.safetensors").exists():
        with safe_open(folder / "rows.safetensors", "pt") as file:
            rows = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    if (folder / "documents.json").exists():
        documents = tuple(map(tuple, json.loads((folder / "documents.json").read_text(encoding="utf-8"))))
    return Contents(tables["inputs"], tables.get("targets"), manifest, rows, documents)


def read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(
            f"{folder} has no {MANIFEST}: it is not a folder of activations, or writing it was not finished. Capture it again."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Write the folder again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is not a manifest of activations. Give a folder written by capture or Stored.save.")
    if manifest["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {manifest['format_version']}; this version reads up to {FORMAT_VERSION}. Upgrade sdl-explorer."
        )
    return manifest


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def rows_per_shard(row_bytes: int) -> int:
    return max(1, min(SHARD_ROWS, SHARD_BYTES // row_bytes))


def write_folder(folder: Path, manifest: dict, rows: dict[str, Tensor], documents) -> None:
    """The tables beside the shards, then the manifest that finishes the folder."""
    if rows:
        write_tensors(folder / "rows.safetensors", rows)
    if documents:
        write_json(folder / "documents.json", documents)
    write_json(folder / MANIFEST, {"format": FORMAT, "format_version": FORMAT_VERSION} | manifest)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    # clone: safetensors refuses views that share memory, and writes no strides
    _replace(path, lambda part: save_file({k: v.contiguous().clone() for k, v in tensors.items()}, part))


def write_json(path: Path, content) -> None:
    _replace(path, lambda part: part.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8"))


def _replace(path: Path, write) -> None:
    part = path.with_name(path.name + ".part")
    write(part)
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
