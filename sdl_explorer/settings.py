"""The settings of a session, and the border where they are checked."""

from numbers import Real
from typing import Any

import param
import torch

from sdl_explorer.archive import LATER
from sdl_explorer.data.anchors import Anchors
from sdl_explorer.data.sources import Source
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import Method
from sdl_explorer.models.start import CENTRES
from sdl_explorer.training.optim import DECAYS, OPTIMISERS


class Settings(param.Parameterized):
    """What the next step will be, and what a session was started with (constant)."""

    source = param.ClassSelector(class_=Source, constant=True, doc="Where activations come from.")
    method = param.ClassSelector(class_=Method, constant=True, doc="The recipe; its own settings can be changed.")
    n_latents = param.Integer(None, bounds=(1, None), constant=True, doc="Size of the dictionary.")
    batch_size = param.Integer(512, bounds=(1, None), doc="Rows of one step.")
    lr = param.Number(1e-3, bounds=(0, None), doc="The optimiser's learning rate.")
    warmup_steps = param.Integer(50, bounds=(0, None), doc="Steps of linear warm-up.")
    decay_steps = param.Integer(
        None, bounds=(1, None), allow_None=True, doc="Step at which the rate has fallen to a tenth; None: constant."
    )
    decay = param.Selector(
        default="linear", objects=list(DECAYS), doc="How it falls: linear in the last fifth, or by a cosine from the start."
    )
    optimiser = param.Selector(
        default="adam",
        objects=list(OPTIMISERS),
        doc="Adam, or schedule-free sign descent (the package schedulefree); a change starts it afresh.",
    )
    clip_norm = param.Number(
        None, bounds=(0, None), inclusive_bounds=(False, True), allow_None=True, doc="Largest norm of the whole gradient; None: as it is."
    )
    precision = param.Selector(
        default="auto",
        objects=["auto", "float32", "bfloat16"],
        doc="Of matrix products in training; weights and moments stay in float32. auto: bfloat16 on CUDA, float32 elsewhere.",
    )
    ramps = param.Dict({}, doc="Numbers of the method that start elsewhere: {'k': [256, 1000]} goes from 256 to k in 1,000 steps.")
    dead_after = param.Integer(100_000, bounds=(1, None), doc="Samples of silence after which a latent is dead.")
    budget = param.Integer(2_000_000_000, bounds=(1, None), doc="Bytes that commits may take on disk.")
    normalise = param.Boolean(
        False, constant=True, doc="New weights train on rows scaled to a mean squared norm of their width; the dictionary keeps the scale."
    )
    centre = param.Selector(
        default="auto",
        objects=["auto", *CENTRES],
        constant=True,
        doc="Where new weights are centred: the mean or geometric median of training rows, or zero. auto: the mean where rows are stored.",
    )
    pre_bias = param.Boolean(False, constant=True, doc="New weights subtract the decoder's bias from their input (SAEs only).")
    seed = param.Integer(0, bounds=(0, None), constant=True, doc="Seed of the weights and of every plan.")
    device = param.String("auto", constant=True, doc="cpu, cuda or cuda:N.")
    anchors = param.ClassSelector(class_=Anchors, allow_None=True, doc="Directions to compare with where there is no truth.")


def check_kinds(source, method, settings: dict[str, Any]) -> None:
    if not isinstance(source, Source):
        raise TypeError(f"Session: source is a {type(source).__name__}; give a Source, such as LinearBench() or Stored(tensor).")
    if not isinstance(method, Method | None):
        raise TypeError(f"Session: method is {method!r}; give a Method, such as TopK(k=16).")
    unknown = sorted(set(settings) - set(Settings.param))
    if unknown:
        known = ", ".join(k for k in Settings.param if k != "name")
        raise TypeError(f"Session: there is no setting {unknown[0]!r}; there are {known}, expansion_factor, dictionary and rescale.")


def check_start(settings: dict) -> None:
    for name, default in LATER.items():
        if settings.get(name, default) != default:
            raise ValueError(
                f"Session: {name} is {settings[name]!r}, which says where new weights start, and the given dictionary has its own centre "
                f"and scales. Leave {name} out; rescale=True sets the scale that its preflight finds."
            )


def size_of(width: int, n_latents: int | None, expansion_factor: float | int | None) -> int:
    """n_latents, as given or by the expansion factor."""
    if expansion_factor is None:
        return 4 * width if n_latents is None else n_latents
    if isinstance(expansion_factor, bool) or not isinstance(expansion_factor, Real) or not 0 < expansion_factor < float("inf"):
        raise ValueError(f"Session: expansion_factor is {expansion_factor!r}; give a positive number, n_latents over width {width}.")
    size = max(1, round(expansion_factor * width))
    if n_latents not in (None, size):
        raise ValueError(
            f"Session: n_latents is {n_latents}, and {expansion_factor:g} (expansion_factor) times {width} is {size}; give one of them."
        )
    return size


def device_of(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device.type if ":" not in name else str(torch.empty(0, device=name).device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"Session: device {name!r} cannot be used here ({reason}). Use 'auto', 'cpu' or 'cuda'.") from error


def check_widths(dictionary: SparseDictionary, source: Source) -> None:
    if (dictionary.d_in, dictionary.d_out) != (source.width_in, source.width_out):
        raise ValueError(
            f"Session: the dictionary has widths ({dictionary.d_in}, {dictionary.d_out}) and the data ({source.width_in}, "
            f"{source.width_out}); open it on activations of the place it was trained on."
        )


def count(what: str, value) -> int:
    """A whole number, at least 1."""
    if isinstance(value, bool) or not isinstance(value, Real) or value % 1 != 0 or value < 1:
        raise ValueError(f"{what} is {value!r}; give a whole number, at least 1.")
    return int(value)
