"""From whatever somebody has to a `Session`."""

from pathlib import Path

import numpy as np
import torch

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.sources import Source
from sdl_explorer.data.store import Stored
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.formats.files import read_names
from sdl_explorer.models.methods import TopK
from sdl_explorer.session import Session

WEIGHTS = ("cfg.json", "dictionary.safetensors")


def session_of(what, dictionary=None, targets=None, activations=None, **settings) -> Session:
    """The session behind `explore`; see there. A session is returned as it is."""
    if isinstance(what, Session):
        if settings or dictionary is not None:
            raise TypeError(
                f"explore: a Session has its settings already ({', '.join(settings) or 'dictionary'} given); set them on the session."
            )
        return what
    if _is_path(what):
        path = Path(what).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"explore: there is nothing at {path}. Give a run folder, a checkpoint or a file of activations.")
        if (path / "run.json").exists():
            if activations is None and dictionary is None:
                return Session.open(path, **settings)
            what = SparseDictionary.load(path)
        elif _is_checkpoint(path):
            what = SparseDictionary.load(path)
    if isinstance(what, SparseDictionary):
        if dictionary is not None:
            raise TypeError("explore: two dictionaries given; pass activations first and the dictionary second, or activations= by name.")
        what, dictionary = activations, what
        if what is None:
            raise ValueError(
                f"explore: a dictionary of {dictionary.n_latents} latents and no activations to look at; pass "
                "activations=, of the place that it was trained on."
            )
    if dictionary is not None and not isinstance(dictionary, SparseDictionary):
        dictionary = SparseDictionary.load(dictionary)
    source = source_of(what, targets)
    if dictionary is None and "method" not in settings:
        settings["method"] = TopK(k=_places(settings.get("n_latents") or 4 * source.width_in))
    return Session(source, dictionary=dictionary, **settings)


def _places(n_latents: int) -> int:
    """A k that fits small dictionaries too: an eighth of the latents, at most TopK's own default."""
    return max(1, min(TopK.param.k.default, n_latents // 8))


def source_of(what, targets=None) -> Source:
    """A source of rows: itself, or stored activations."""
    if isinstance(what, Source):
        if targets is not None:
            raise TypeError(f"explore: {type(what).__name__} has targets of its own; leave targets out.")
        return what
    if isinstance(what, Activations):
        own = None if what.targets is what.inputs else what.targets
        if what.truth is not None:
            raise TypeError("explore: these activations carry a truth, which stored rows cannot hold; pass their source itself.")
        return Stored(
            what.inputs, own, labels=what.labels, label_names=what.label_names, examples=what.examples, blocks=what.blocks or None
        )
    if isinstance(what, torch.Tensor | np.ndarray) or _is_path(what):
        return Stored(what, targets)
    raise TypeError(
        f"explore: {type(what).__name__} is nothing to explore. Give a tensor, an array, a file or folder of activations, a checkpoint "
        "with activations=, a Source or a Session."
    )


def _is_path(what) -> bool:
    return isinstance(what, str | Path)


def _is_checkpoint(path: Path) -> bool:
    """A folder with weights of a dictionary, or a file that says it is one."""
    if path.is_dir():
        return any((path / name).exists() for name in WEIGHTS)
    return path.suffix == ".safetensors" and {"W_enc", "W_dec"} <= read_names(path)
