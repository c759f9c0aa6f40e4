"""What goes into a model during `capture`: texts, images, or batches that are ready."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdl_explorer.data.shards import tensor_bytes
from sdl_explorer.data.sources import stream

IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
THUMBNAIL = 64  # pixels
SORTED_BATCHES = 64  # texts of so many batches are put together by length


class Ready(NamedTuple):
    """One batch, ready for the model. `real` and `special` mark positions (items, positions); None: all real, none special."""

    inputs: object
    titles: tuple[str, ...] = ()
    pieces: tuple[tuple[str, ...], ...] = ()
    real: Tensor | None = None
    special: Tensor | None = None
    thumbnails: np.ndarray | None = None


class Batch(NamedTuple):
    """A batch by its content (`key`); `prepare` makes it ready, and is called for batches that are run alone.

    `items`: the numbers of its items where they do not come in order.
    """

    key: bytes
    prepare: Callable[[], Ready]
    items: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Feed:
    """Batches in order, how many (None: not known), and labels that come with them."""

    batches: Iterable[Batch]
    count: int | None = None
    labels: tuple[str, ...] | None = None


def make_feed(batches, tokenizer, batch_size: int, max_length: int | None) -> Feed:
    """Texts with a tokenizer, a folder of images, or anything else that the model takes, batch by batch."""
    if isinstance(batches, (str, os.PathLike)):
        return _image_feed(Path(batches), tokenizer, batch_size)
    if isinstance(batches, Tensor):
        chunks = batches.split(batch_size)
        return Feed(map(_model_batch, chunks), len(chunks))
    count = len(batches) if hasattr(batches, "__len__") else None
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("capture: batches is empty. Give texts, a folder of images, or an iterable of what the model takes.")
    everything = chain([first], iterator)
    if not isinstance(first, str):
        return Feed((_model_batch(batch, tokenizer) for batch in everything), count)
    if tokenizer is None:
        raise ValueError("capture: batches holds texts and tokenizer is None. Pass tokenizer=, or the tokens that the model takes.")
    groups = _similar_lengths(everything, batch_size)
    return Feed((_text_batch(group, tokenizer, max_length) for group in groups), None if count is None else -(-count // batch_size))


def to_device(inputs, device):
    """Moves the tensors of a batch, however deep."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: to_device(value, device) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(to_device(value, device) for value in inputs)
    return inputs


# texts ---------------------------------------------------------------------------------------------------------


def _similar_lengths(texts: Iterable[str], size: int) -> Iterator[list[tuple[int, str]]]:
    """Batches of numbered texts of similar length, which need little padding, in an order that does not go by length."""
    for window in _grouped(enumerate(texts), SORTED_BATCHES * size):
        ordered = sorted(window, key=lambda pair: len(pair[1]))
        groups = list(_grouped(ordered, size))
        for group in torch.randperm(len(groups), generator=stream("texts", window[0][0])).tolist():
            yield groups[group]


def _text_batch(group: list[tuple[int, str]], tokenizer, max_length: int | None) -> Batch:
    items, texts = zip(*group, strict=True)

    def prepare() -> Ready:
        with _padding(tokenizer):
            encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        return _described(encoded, tokenizer)._replace(titles=texts)

    return Batch(_digest(texts), prepare, items)


@contextmanager
def _padding(tokenizer) -> Iterator[None]:
    """Pads on the right, with the end token where a tokenizer has no padding of its own; put back afterwards."""
    side, token = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = "right"
    if token is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.padding_side = side
        if token is None:
            tokenizer.pad_token = None


def _described(encoded: Mapping, tokenizer) -> Ready:
    """Which positions are real and which special, and the text of each, from token ids."""
    ids = encoded["input_ids"]
    real = encoded["attention_mask"].bool() if "attention_mask" in encoded else torch.ones_like(ids, dtype=torch.bool)
    special = torch.isin(ids, torch.tensor(_special_ids(tokenizer), dtype=ids.dtype))
    names = _pieces(tokenizer, ids[real].unique().tolist())
    pieces = tuple(tuple(names[i] for i in row[mask].tolist()) for row, mask in zip(ids, real, strict=True))
    return Ready(dict(encoded), pieces=pieces, real=real, special=special)


def _pieces(tokenizer, ids: list[int]) -> dict[int, str]:
    """The text of each token as it stands in a sentence: with a space before it where a new word begins."""
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        return {i: tokenizer.decode([i]) for i in ids}
    vocabulary = dict(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True))
    special = set(tokenizer.all_special_ids)
    word_pieces = any(str(token).startswith("##") for token in tokenizer.get_vocab())

    def piece(i: int) -> str:
        raw, text = str(vocabulary[i]), tokenizer.decode([i])
        if word_pieces and i not in special:
            return raw[2:] if raw.startswith("##") else f" {text}"
        return f" {text.lstrip()}" if raw.startswith("\u2581") else text

    return {i: piece(i) for i in ids}


def _special_ids(tokenizer) -> list[int]:
    """Without the unknown token: it stands for text, unless it has another duty too."""
    duties = ("bos", "eos", "cls", "sep", "pad", "mask")
    others = {getattr(tokenizer, f"{duty}_token_id", None) for duty in duties}
    text = {getattr(tokenizer, "unk_token_id", None)} - others
    return [i for i in tokenizer.all_special_ids if i not in text]


# images --------------------------------------------------------------------------------------------------------


def _image_feed(folder: Path, processor, batch_size: int) -> Feed:
    if not folder.is_dir():
        raise FileNotFoundError(f"capture: {folder} is not a folder of images. Give texts as a list, or the path of a folder.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
    if not files:
        raise ValueError(f"capture: {folder} holds no images ({', '.join(sorted(IMAGE_ENDINGS))}).")
    labels = tuple(path.parent.name for path in files)
    groups = list(_grouped(files, batch_size))
    batches = (_image_batch(group, folder, processor) for group in groups)
    return Feed(batches, len(groups), labels if any(path.parent != folder for path in files) else None)


def _image_batch(files: list[Path], folder: Path, processor) -> Batch:
    titles = tuple(path.relative_to(folder).as_posix() for path in files)

    def prepare() -> Ready:
        images = [_open_image(path) for path in files]
        thumbnails = np.stack([np.asarray(image.resize((THUMBNAIL, THUMBNAIL))) for image in images])
        return Ready(_pixels(images, titles, processor), titles=titles, thumbnails=thumbnails)

    return Batch(_digest([(title, path.stat().st_size) for title, path in zip(titles, files, strict=True)]), prepare)


def _open_image(path: Path):
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("capture: reading images needs pillow. Install it with: pip install 'sdl-explorer[models]'") from error
    with Image.open(path) as image:
        return image.convert("RGB")


def _pixels(images, titles, processor):
    """A Hugging Face processor takes the batch; any other callable one image, giving a tensor; None: (3, h, w) from 0 to 1."""
    if hasattr(processor, "preprocess") or hasattr(processor, "image_processor"):
        return dict(processor(images=images, return_tensors="pt"))
    turn = processor or (lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255)
    tensors = [turn(image) for image in images]
    for title, tensor in zip(titles, tensors, strict=True):
        if tensor.shape != tensors[0].shape:
            raise ValueError(
                f"capture: {title} has shape {tuple(tensor.shape)} and {titles[0]} {tuple(tensors[0].shape)}; a batch needs one size. "
                "Pass tokenizer=, a callable that resizes an image and makes it a tensor."
            )
    return torch.stack(tensors)


# anything else -------------------------------------------------------------------------------------------------


def _model_batch(batch, tokenizer=None) -> Batch:
    def prepare() -> Ready:
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            return Ready(batch)
        if tokenizer is not None:
            return _described(batch, tokenizer)._replace(inputs=batch)
        return Ready(batch, real=batch["attention_mask"].bool() if "attention_mask" in batch else None)

    return Batch(_digest(batch), prepare)


def _grouped(items: Iterable, size: int) -> Iterator[list]:
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _digest(content) -> bytes:
    """sha256 of nested tensors, containers and plain values."""
    digest = hashlib.sha256()
    if isinstance(content, (Tensor, np.ndarray)):
        tensor = torch.as_tensor(content).detach().cpu()
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    elif isinstance(content, Mapping):
        for key in content:
            digest.update(_digest(str(key)) + _digest(content[key]))
    elif isinstance(content, (tuple, list)):
        for part in content:
            digest.update(_digest(part))
    else:
        digest.update(repr(content).encode())
    return digest.digest()
