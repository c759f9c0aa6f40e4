"""Reads activations from a network: forward hooks on any `torch.nn.Module`, streamed to shards on disk."""

import difflib
import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdl_explorer.data.activations import Block
from sdl_explorer.data.feeds import Batch, Feed, Ready, make_feed, to_device
from sdl_explorer.data.spool import Piece, Spool
from sdl_explorer.data.store import Stored, as_labels


def capture(
    model: nn.Module,
    batches,
    hook_in,
    hook_out=None,
    *,
    tokenizer=None,
    labels=None,
    label_names=(),
    folder=None,
    batch_size: int = 32,
    max_rows: int | None = None,
    keep: str = "content",
) -> Stored:
    """The activations that `model` computes at `hook_in` (and at `hook_out`) while it reads `batches`.

    batches     texts (with `tokenizer`); a folder of images (subfolders become labels; `tokenizer` may be an image processor or a
                callable from image to tensor); a tensor, cut into batches; or any iterable of what the model takes: a dict is
                passed by keyword, a tuple or list by position. Texts longer than the model reads are cut.
    hook_in     dotted name of a submodule: its output (of several, the first tensor), or "name:in" for its input.
                A list of names makes a crosscoder: one block each, side by side, as they are.
    hook_out    another place: the targets, for a transcoder; a list beside a list, for the targets of a crosscoder.
    labels      one integer or string for each text, image or item; its rows share it.
    folder      where the shards stay. A capture that was interrupted goes on at the next batch that is not written, and one
                that is finished is read again. None: a temporary folder, which goes with the source.
    max_rows    stops after so many rows, counted before any is left out.
    keep        "content" leaves out special tokens and rows with a norm above ten times the median; "all" keeps them.
                Padding is never kept. `Stored.removed` says how many rows, and their share of the variance.

    Outputs (n, d) give a row for each item, outputs (n, positions, d) one for each token or patch. The model runs in eval mode
    without gradients where it is; its training flags come back and every hook is taken off.
    """
    _check_numbers(keep, batch_size, max_rows)
    places = find_places(model, hook_in, hook_out)
    feed = make_feed(batches, tokenizer, batch_size, _longest(model, tokenizer))
    labels = feed.labels if labels is None else labels
    codes, label_names = (None, ()) if labels is None else as_labels(labels, label_names)
    request = {
        "model": _model_digest(model),
        "hook_in": places.inputs,
        "hook_out": places.targets,
        "batch_size": batch_size,
        "max_rows": max_rows,
        "keep": keep,
        "labels": None if codes is None else hashlib.sha256(codes.numpy().tobytes()).hexdigest(),
        "label_names": list(label_names),
    }
    home = Path(tempfile.mkdtemp(prefix="sdl_explorer_")) if folder is None else Path(folder)
    try:
        spool = Spool(home, request)
        _fill(spool, model, places, feed, max_rows, codes)
        if not spool.finished:
            spool.finish(keep, {"hooks": places.names, "label_names": list(label_names)}, places.blocks(spool.widths))
        source = Stored(home)
    except BaseException:
        if folder is None:
            shutil.rmtree(home, ignore_errors=True)
        raise
    if folder is None:
        source._origin = None  # the folder goes away with the source
        weakref.finalize(source, shutil.rmtree, home, ignore_errors=True)
    return source


class Places(NamedTuple):
    """Names of modules to read, with ":in" for what goes in. `several`: a crosscoder."""

    inputs: list[str]
    targets: list[str]
    several: bool

    @property
    def names(self) -> list[str]:
        return self.inputs + self.targets

    def blocks(self, widths: dict[str, int]) -> tuple[Block, ...]:
        if not self.several:
            return ()
        columns = [_columns([widths[name] for name in side]) for side in (self.inputs, self.targets or self.inputs)]
        return tuple(Block(name, *slices) for name, *slices in zip(self.inputs, *columns, strict=True))


def find_places(model: nn.Module, hook_in, hook_out) -> Places:
    """The places, checked against the modules that the model has."""
    several = not isinstance(hook_in, str)
    inputs = list(hook_in) if several else [hook_in]
    targets = [] if hook_out is None else [hook_out] if isinstance(hook_out, str) else list(hook_out)
    if not inputs or (targets and (len(targets) != len(inputs) or several == isinstance(hook_out, str))):
        raise ValueError(
            f"capture: hook_in is {hook_in!r} and hook_out {hook_out!r}. Give one name each, two lists of as many names, or no hook_out."
        )
    known = [name for name, _ in model.named_modules()]
    for place in inputs + targets:
        if _module_name(place) not in known:
            near = difflib.get_close_matches(_module_name(place), known, n=5, cutoff=0.4) or known[1:6]
            raise ValueError(f"capture: the model has no module {_module_name(place)!r}. Close to it: {', '.join(near)}.")
    return Places(inputs, targets, several)


def _fill(spool: Spool, model: nn.Module, places: Places, feed: Feed, max_rows: int | None, labels: Tensor | None) -> None:
    """Runs every batch that is not written yet; those that are must be the ones that come again."""
    written, count = len(spool.keys), 0
    with _evaluating(model), tqdm(feed.batches, "capturing", feed.count, unit="batch", leave=False) as progress:
        for index, batch in enumerate(progress):
            if index >= written and max_rows is not None and spool.n_rows >= max_rows:
                break
            count = index + 1
            if index < written or spool.finished:
                _check_same(spool, index, batch.key)
                continue
            try:
                piece = _read(model, places, batch, index, spool, max_rows, labels)
            except BaseException:
                spool.flush()  # what is done is kept, and need not be done again
                raise
            spool.add(piece)
    spool.flush()
    if count < written:
        _check_same(spool, count, b"")
    if labels is not None and not spool.finished and max_rows is None and len(labels) != spool.n_items:
        raise ValueError(f"capture: {len(labels)} labels for {spool.n_items} items; give one for each.")


def _check_same(spool: Spool, index: int, key: bytes) -> None:
    if index >= len(spool.keys) or spool.keys[index] != key.hex():
        raise ValueError(
            f"capture: batch {index} is not the one that {spool.folder} was captured from. Give the same batches in the same order, or "
            "another folder."
        )


def _read(model, places: Places, batch: Batch, index: int, spool: Spool, max_rows: int | None, labels: Tensor | None) -> Piece:
    """Runs one batch and makes rows of what the places gave."""
    ready = batch.prepare()
    blocks = _run(model, places, ready, index)
    shapes = {place: tuple(block.shape[:-1]) for place, block in blocks.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"capture: the places give different rows in batch {index} ({shapes}). Choose places with as many.")
    shape = shapes[places.inputs[0]]  # (n,) with one row for each item, or (n, positions)
    real, special = _mask(ready.real, shape, True, index), _mask(ready.special, shape, False, index)
    room = None if max_rows is None else max_rows - spool.n_rows
    rows = {place: block[real][:room] for place, block in blocks.items()}
    _check_finite(rows, index)
    item, position = (real.nonzero()[:room, 0], real.long().cumsum(dim=-1)[real][:room] - 1)
    tables = {
        "inputs": torch.cat([rows[place] for place in places.inputs], dim=1),
        "item": item,
        "position": position if len(shape) == 2 else torch.zeros_like(item),
        "special": special[real][:room].to(torch.uint8),
        "norms": torch.stack([block.float().norm(dim=1) for block in rows.values()], dim=1),
    }
    if places.targets:
        tables["targets"] = torch.cat([rows[place] for place in places.targets], dim=1)
    if labels is not None:
        tables["labels"] = _batch_labels(labels, batch, spool.n_items, shape[0], index)[item]
    documents = _documents(ready, len(shape) == 1, shape[0], spool.n_items)
    widths = {place: block.shape[-1] for place, block in blocks.items()}
    return Piece(batch.key.hex(), tables, shape[0], int((~real).sum()), documents, ready.thumbnails, widths)


def _check_finite(rows: dict[str, Tensor], index: int) -> None:
    for place, block in rows.items():
        if not torch.isfinite(block.float()).all():
            raise ValueError(
                f"capture: {place!r} gives NaN or infinity in batch {index}. Leave that batch out, or run the model in float32."
            )


def _batch_labels(labels: Tensor, batch: Batch, first: int, n_items: int, index: int) -> Tensor:
    items = torch.arange(first, first + n_items) if batch.items is None else torch.tensor(batch.items)
    if int(items.max()) >= len(labels):
        raise ValueError(f"capture: {len(labels)} labels, and batch {index} holds item {int(items.max())}; give one for each item.")
    return labels[items]


def _documents(ready: Ready, whole: bool, n_items: int, first: int) -> list[tuple[str, ...]]:
    if ready.pieces and not whole:
        return list(ready.pieces)
    if ready.titles:
        return [(title,) for title in ready.titles]
    return [] if whole else [(f"item {first + i}",) for i in range(n_items)]


def _mask(mask: Tensor | None, shape: tuple[int, ...], default: bool, index: int) -> Tensor:
    if mask is None or len(shape) == 1:
        return torch.full(shape, default)
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"capture: batch {index} has {tuple(mask.shape)} tokens and the hook gives {shape} positions. Choose a module with a row "
            "per token."
        )
    return mask.cpu()


# the model -----------------------------------------------------------------------------------------------------


def _run(model: nn.Module, places: Places, ready: Ready, index: int) -> dict[str, Tensor]:
    """What the places gave for one batch: (n, d) or (n, positions, d) each, on the CPU."""
    seen: dict[str, list] = {place: [] for place in places.names}
    handles = [_hook(model, place, found) for place, found in seen.items()]
    try:
        inputs = to_device(ready.inputs, _device(model))
        with torch.no_grad():
            if isinstance(inputs, Mapping):
                model(**inputs)
            elif isinstance(inputs, tuple):
                model(*inputs)
            else:
                model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {place: _block(place, found, index) for place, found in seen.items()}


def _hook(model: nn.Module, place: str, found: list):
    module = model.get_submodule(_module_name(place))
    if place.endswith(":in"):
        return module.register_forward_pre_hook(lambda _, args, kwargs: found.append((*args, *kwargs.values())), with_kwargs=True)
    return module.register_forward_hook(lambda _, args, output: found.append(output))


def _block(place: str, found: list, index: int) -> Tensor:
    if len(found) != 1:
        raise ValueError(f"capture: {place!r} ran {len(found)} times in batch {index}; it must run once. Choose another module.")
    values = found[0].values() if isinstance(found[0], Mapping) else found[0] if isinstance(found[0], (tuple, list)) else [found[0]]
    tensor = next((value for value in values if isinstance(value, Tensor)), None)
    if tensor is None or not tensor.is_floating_point() or tensor.ndim not in (2, 3):
        what = type(found[0]).__name__ if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        raise ValueError(
            f"capture: {place!r} gives {what}; readable are floating-point (n, d) and (n, positions, d). Choose another module, or wrap "
            "the model so that one flattens it."
        )
    return tensor.detach().cpu()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def _module_name(place: str) -> str:
    return place.removesuffix(":in")


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def _model_digest(model: nn.Module) -> str:
    """The class, and name, shape and sixteen values of every tensor: enough to tell models and their fine-tunes apart."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, len(flat) // 16)][:16].double().cpu().tolist()
        digest.update(repr((name, tuple(tensor.shape), values)).encode())
    return digest.hexdigest()


def _longest(model: nn.Module, tokenizer) -> int | None:
    """Tokens that the model and its tokenizer can read; None: no limit known."""
    limits = [getattr(tokenizer, "model_max_length", None), getattr(getattr(model, "config", None), "max_position_embeddings", None)]
    return min((limit for limit in limits if limit and limit < 10**9), default=None)


def _columns(widths: list[int]) -> list[slice]:
    edges = torch.tensor([0, *widths]).cumsum(0).tolist()
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _check_numbers(keep: str, batch_size: int, max_rows: int | None) -> None:
    if keep not in ("content", "all"):
        raise ValueError(f"capture: keep is {keep!r}; it is 'content' or 'all'.")
    if batch_size < 1 or (max_rows is not None and max_rows < 1):
        raise ValueError(f"capture: batch_size is {batch_size} and max_rows {max_rows}; both are at least 1.")
