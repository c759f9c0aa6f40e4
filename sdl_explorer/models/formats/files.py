"""Safetensors and JSON files read with errors that name the file, what is wrong with it and the way out."""

import json
from math import isfinite
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

_PICKLES = (b"PK\x03\x04", b"\x80")  # torch.save writes a zip of pickles; older files and pickle.dump start with 0x80


def tensor_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file in memory; `metadata` goes into its header."""
    return safetensors.torch.save(tensors, metadata)


def read_header(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file."""
    length = _check_content(path)
    with open(path, "rb") as file:
        start = file.read(9)
        size = 8 + int.from_bytes(start[:8], "little")
        if start[8:] != b"{":
            if start.startswith(_PICKLES):
                raise ValueError(
                    f"{path} is a pickle, whatever its name, and opening one can run any code. Save the weights as safetensors."
                )
            raise ValueError(f"{path} is not a safetensors file: it does not start with a header. Write it again.")
        if size > length:
            raise ValueError(f"{path} is truncated: its header needs {size} bytes and the file has {length}. Copy or write it again.")
        header = start[8:] + file.read(size - 9)
    try:
        return json.loads(header).get("__metadata__", {})
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header is not JSON ({error}). Copy or write it again.") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and the metadata in its header."""
    metadata = read_header(path)
    try:
        return safetensors.torch.load(path.read_bytes()), metadata
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}). Copy or write it again.") from error


def read_names(path: Path) -> set[str]:
    """The names of the tensors in a safetensors file, which stay on disk."""
    read_header(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}). Copy or write it again.") from error


def read_json(path: Path) -> dict:
    """The object in a JSON file."""
    _check_content(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}). Copy or write it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; it must hold an object.")
    return value


def number(value) -> float | None:
    """A JSON value as a finite number, None for anything else; true and false are none."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value) else None


def check_tensors(path: Path | str, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Exactly the named tensors, in these shapes and finite."""
    if missing := sorted(set(shapes) - set(tensors)):
        raise ValueError(f"{path}: tensor {missing[0]} is missing; this kind of dictionary needs {', '.join(sorted(shapes))}.")
    if extra := sorted(set(tensors) - set(shapes)):
        raise ValueError(f"{path}: tensor {extra[0]} is not part of this kind of dictionary, which has {', '.join(sorted(shapes))}.")
    for name, shape in shapes.items():
        check_tensor(path, name, tensors[name], shape)


def check_tensor(path: Path | str, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{path}: {name} has shape {tuple(value.shape)}; by the rest of the file it must be {tuple(shape)}.")
    bad = value.isnan() if name.endswith("threshold") else ~value.isfinite()  # an infinite threshold switches a latent off
    if bad.any():
        raise ValueError(
            f"{path}: {name} holds {int(bad.sum())} values of {value.numel()} that are not finite. Go back to a finite version."
        )


def _check_content(path: Path) -> int:
    """The length of a file that must be there and hold something."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Check the path, or copy the folder again.")
    if not (length := path.stat().st_size):
        raise ValueError(f"{path} is empty (0 bytes). Copy or write it again.")
    return length
