"""The native form: one safetensors file, which holds everything that a dictionary is.

Header metadata, key "sdl_explorer", a JSON text:

    {"format_version": 1,
     "nonlinearity": {"class": "TopKSelection", "settings": {"k": 32}},
     "subtract_b_dec": false,
     "input_scale": 1.0, "target_scale": 1.0,  of `SparseDictionary`; 1 where they are missing
     "tied": false,                            W_enc is W_dec, one parameter; false where it is missing
     "provenance": {...}}                      what `SparseDictionary.provenance` holds

format_version is 2 where a scale is not 1, which a reader of version 1 would overlook.

Tensors, row i belonging to latent i: W_enc (n_latents, d_in), W_dec (n_latents, d_out), b_enc (n_latents),
b_dec (d_out), and "nonlinearity.<name>" for each parameter and buffer of the nonlinearity.

A path that ends in .safetensors is that file; any other is a folder with dictionary.safetensors in it. A run
folder (run.json, head.json {"commit": id}, commits/<id>/dictionary.safetensors) reads as its head commit.

Class names resolve among the nonlinearities that are already imported; a file imports and unpickles nothing.
"""

import inspect
import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn

import sdl_explorer
from sdl_explorer.models import methods  # noqa: F401  registers the nonlinearities that a file may name
from sdl_explorer.models.atomic import write_file
from sdl_explorer.models.dictionary import Nonlinearity, Pointwise, SparseDictionary
from sdl_explorer.models.formats.base import Format, kind_of, provenance
from sdl_explorer.models.formats.files import check_tensors, number, read_header, read_json, read_tensors, tensor_bytes

FORMAT_VERSION = 2
FILE_NAME = "dictionary.safetensors"
_KEY = "sdl_explorer"


class Native(Format):
    name = "native"
    looks_for = "a .safetensors file with an sdl_explorer header, a folder with dictionary.safetensors, or a run folder with run.json"

    def recognises(self, path: Path) -> bool:
        if path.is_dir():
            return (path / FILE_NAME).is_file() or (path / "run.json").is_file()
        return path.suffix == ".safetensors" and _is_ours(path)

    def read(self, path: Path) -> SparseDictionary:
        file = _file(path)
        tensors, metadata = read_tensors(file)
        if _KEY not in metadata:
            raise ValueError(
                f"{file} has no sdl_explorer entry in its header, so it is not a native dictionary. Say its format with format=."
            )
        return build_dictionary(_record(file, metadata[_KEY]), tensors, file)

    def write(self, dictionary: SparseDictionary, path: Path) -> None:
        if (path / "run.json").exists():
            raise FileExistsError(f"save: {path} is a run folder, which its session writes. Choose another folder, or use session.save().")
        file = path if path.suffix == ".safetensors" else path / FILE_NAME
        header = {_KEY: json.dumps(dictionary_record(dictionary), sort_keys=True)}
        write_file(file, tensor_bytes(dictionary_tensors(dictionary), header))


def dictionary_tensors(dictionary: SparseDictionary) -> dict[str, Tensor]:
    """Copies of everything numeric in a dictionary, on the CPU, by the names that the file has."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in dictionary.state_dict().items()}


def dictionary_record(dictionary: SparseDictionary) -> dict:
    """Everything else in a dictionary, in JSON values."""
    sigma = dictionary.nonlinearity
    if isinstance(sigma, Pointwise):
        raise TypeError(
            "save: this dictionary's nonlinearity is a Python function, which no file can hold without running code when it is opened. "
            "Write it as a Nonlinearity subclass, or use one that exists."
        )
    origin = dictionary.provenance or provenance("native", "sdl_explorer", sdl_explorer.__version__, kind=kind_of(dictionary))
    scales = {"input_scale": dictionary.input_scale, "target_scale": dictionary.target_scale}
    record = {
        "format_version": 1 if set(scales.values()) == {1} else 2,
        "nonlinearity": {"class": type(sigma).__name__, "settings": sigma.settings()},
        "subtract_b_dec": dictionary.subtract_b_dec,
        "tied": dictionary.tied,
        **scales,
        "provenance": origin,
    }
    try:
        return json.loads(json.dumps(record))  # a copy, and the proof that it is JSON
    except TypeError as error:
        raise TypeError(
            f"save: settings and provenance must be JSON values ({error}). Put numbers, texts, lists and dicts there."
        ) from error


def build_dictionary(record: dict, tensors: dict[str, Tensor], origin: Path | str = "build_dictionary") -> SparseDictionary:
    """The dictionary that `dictionary_record` and `dictionary_tensors` describe, in the dtypes of the tensors.

    Nothing is allocated before the record and the tensors are known to agree. `origin` names the file in errors.
    """
    version = record.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"{origin}: format_version is {version!r}; it must be a whole number from 1.")
    if version > FORMAT_VERSION:
        raise ValueError(f"{origin}: format_version is {version} and this sdl_explorer reads up to {FORMAT_VERSION}. Update sdl_explorer.")
    n_latents, d_in = _rows_columns(origin, tensors, "W_enc")
    d_out = _rows_columns(origin, tensors, "W_dec")[1]
    member, settings = _nonlinearity(origin, record.get("nonlinearity"), n_latents)
    state = _expected_state(origin, member, settings)
    sizes = {"W_enc": (n_latents, d_in), "W_dec": (n_latents, d_out), "b_enc": (n_latents,), "b_dec": (d_out,)}
    check_tensors(origin, tensors, sizes | {f"nonlinearity.{name}": tuple(value.shape) for name, value in state.items()})

    for name, value in state.items():
        if tensors[f"nonlinearity.{name}"].is_floating_point() != value.is_floating_point():
            raise ValueError(f"{origin}: nonlinearity.{name} is {tensors[f'nonlinearity.{name}'].dtype}; it must be like {value.dtype}.")

    sigma = member(**settings)
    sigma.load_state_dict({name: tensors[f"nonlinearity.{name}"] for name in state}, assign=True)
    centred = _flag(origin, record, "subtract_b_dec")
    W_enc, W_dec = tensors["W_enc"], tensors["W_dec"]
    if _flag(origin, {"tied": False} | record, "tied"):
        if not torch.equal(W_enc, W_dec):
            raise ValueError(f"{origin}: tied is true and W_enc differs from W_dec. Set it to false in the file, or write the file again.")
        W_enc = W_dec = nn.Parameter(W_dec)
    scales = {name: _scale(origin, record, name) for name in ("input_scale", "target_scale")}
    dictionary = SparseDictionary(W_enc, W_dec, tensors["b_enc"], tensors["b_dec"], sigma, subtract_b_dec=centred, **scales)
    dictionary.provenance = dict(record.get("provenance") or {})
    return dictionary


def _is_ours(file: Path) -> bool:
    """Also true of a damaged file, so that reading it says what is wrong with it."""
    try:
        return _KEY in read_header(file)
    except (OSError, ValueError):
        return True


def _file(path: Path) -> Path:
    if path.suffix == ".safetensors" and not path.is_dir():
        return path
    if not (path / "run.json").is_file():
        return path / FILE_NAME
    commit = read_json(path / "head.json").get("commit")
    if not isinstance(commit, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", commit):
        raise ValueError(f"{path / 'head.json'}: commit is {commit!r}; it must be the name of a folder in commits/.")
    return path / "commits" / commit / FILE_NAME


def _record(file: Path, text: str) -> dict:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: the sdl_explorer entry of its header is not JSON ({error}). Write the file again.") from error
    if not isinstance(record, dict) or not isinstance(record.get("provenance", {}), dict):
        raise ValueError(f"{file}: the sdl_explorer entry of its header, and provenance in it, must be JSON objects. Write the file again.")
    return record


def _rows_columns(origin, tensors: dict[str, Tensor], name: str) -> tuple[int, int]:
    if name not in tensors:
        raise ValueError(f"{origin}: tensor {name} is missing; every dictionary has W_enc, W_dec, b_enc and b_dec.")
    if tensors[name].ndim != 2:
        raise ValueError(f"{origin}: {name} has shape {tuple(tensors[name].shape)}; it must be a matrix with one row per latent.")
    rows, columns = tensors[name].shape
    return rows, columns


def _nonlinearity(origin, entry, n_latents: int) -> tuple[type[Nonlinearity], dict]:
    """The class and the settings that a record names, both checked before anything is made of them."""
    if not isinstance(entry, dict) or not isinstance(entry.get("class"), str) or not isinstance(entry.get("settings"), dict):
        raise ValueError(f"{origin}: nonlinearity is {entry!r}; it must be an object with a class and its settings.")
    known = {member.__name__: member for member in _descendants(Nonlinearity) if member is not Pointwise}
    name, settings = entry["class"], entry["settings"]
    if name not in known:
        raise ValueError(
            f"{origin}: nonlinearity {name!r} is unknown; imported are {', '.join(sorted(known))}. Import the package that defines it."
        )
    accepted = set(inspect.signature(known[name]).parameters)
    if unknown := sorted(set(settings) - accepted):
        raise ValueError(f"{origin}: setting {unknown[0]!r} of {name} is unknown; it has {', '.join(sorted(accepted)) or 'none'}.")
    k = settings.get("k", 1)
    if not isinstance(k, int) or not 1 <= k <= n_latents:
        raise ValueError(f"{origin}: k is {k!r} and n_latents {n_latents}; k is a whole number from 1 to n_latents.")
    return known[name], settings


def _descendants(base: type) -> list[type]:
    return [member for child in base.__subclasses__() for member in (child, *_descendants(child))]


def _expected_state(origin, member: type[Nonlinearity], settings: dict) -> dict[str, Tensor]:
    """Names and shapes of a nonlinearity's tensors, made on the meta device: a size in a file costs no memory."""
    try:
        with torch.device("meta"):
            return member(**settings).state_dict()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{origin}: {member.__name__} cannot be made with {settings} ({error}). Correct the settings in the file."
        ) from error


def _flag(origin, record: dict, name: str) -> bool:
    value = record.get(name)
    if not isinstance(value, bool):
        raise ValueError(f"{origin}: {name} is {value!r}; it must be true or false.")
    return value


def _scale(origin, record: dict, name: str) -> float:
    value = number(record.get(name, 1.0))
    if value is None or value <= 0:
        raise ValueError(f"{origin}: {name} is {record.get(name)!r}; it must be a positive number.")
    return value
