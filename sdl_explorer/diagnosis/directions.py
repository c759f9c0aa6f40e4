"""What a dictionary is compared with: true features or anchors, and which of them are pinned."""

from typing import NamedTuple

import torch
from torch import Tensor

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Anchors, Pins
from sdl_explorer.diagnosis.cosines import cosines_of
from sdl_explorer.models.dictionary import SparseDictionary

SAME = 1e-5  # two unit rows are one direction when their cosine exceeds 1 - SAME


class Directions(NamedTuple):
    """Unit rows on the dictionary's device; `ids` are their columns in the true codes (-1: none)."""

    of: str  # "truth" | "anchors"
    inputs: Tensor
    targets: Tensor
    names: tuple[str, ...]
    ids: Tensor


def directions_of(activations: Activations, dictionary: SparseDictionary, anchors: Anchors | None = None) -> Directions:
    """The anchors where given, else the true features; refused where there are none or they do not fit."""
    truth = activations.truth
    if anchors is not None:
        ids = anchors.features if anchors.features and truth is not None else (-1,) * len(anchors)
        found = Directions("anchors", anchors.inputs, anchors.targets, anchors.names, torch.tensor(ids, dtype=torch.int64))
    elif truth is not None:
        names = tuple(truth.name(i) for i in range(truth.n_features))
        found = Directions("truth", truth.input_features, truth.target_features, names, torch.arange(truth.n_features))
    else:
        raise ValueError(
            "align compares with true features, and these activations have none (truth=None). Use LinearBench or "
            "HierarchyBench, pass anchors=, or call check_health, which needs no truth."
        )
    if len(found.names) == 0:
        raise ValueError(f"align: there are 0 directions in the {found.of}; it needs at least one.")
    for side, rows, width in (("input", found.inputs, dictionary.d_in), ("target", found.targets, dictionary.d_out)):
        _check(found.of, side, rows, width)
    device = dictionary.device
    return found._replace(inputs=found.inputs.to(device).float(), targets=found.targets.to(device).float(), ids=found.ids.to(device))


def held_by(pins: Pins | None, directions: Directions, dictionary: SparseDictionary) -> tuple[Tensor, Tensor]:
    """Masks of the pinned latents, and of the directions that are one of the pinned rows (by id, or by direction)."""
    device = dictionary.device
    latents = torch.zeros(dictionary.n_latents, dtype=torch.bool, device=device)
    anchored = torch.zeros(len(directions.names), dtype=torch.bool, device=device)
    if pins is None or len(pins) == 0:
        return latents, anchored
    highest = int(pins.latents.max())
    if highest >= dictionary.n_latents:
        raise ValueError(
            f"align: latent {highest} is pinned and the dictionary has {dictionary.n_latents}; take the pins of its own session."
        )
    latents[pins.latents.to(device)] = True
    reads = cosines_of(pins.anchors.inputs.to(device), directions.inputs)
    writes = cosines_of(pins.anchors.targets.to(device), directions.targets)
    anchored |= (torch.minimum(reads, writes) > 1 - SAME).any(dim=1)
    ids = torch.tensor([i for i in pins.anchors.features if i >= 0], dtype=torch.int64, device=device)
    return latents, anchored | torch.isin(directions.ids, ids)


def _check(of: str, side: str, rows: Tensor, width: int) -> None:
    if rows.shape[1] != width:
        raise ValueError(
            f"align: the {side} directions of the {of} have {rows.shape[1]} columns and the dictionary {width}; "
            "use directions of the data that it was trained on."
        )
    norms = rows.float().norm(dim=1)
    off = ~((norms - 1).abs() <= 1e-3)  # true for NaN as well
    if off.any():
        row = int(off.nonzero()[0])
        raise ValueError(
            f"align: {side} direction {row} of the {of} has norm {norms[row]:.3g}; directions have norm 1. Divide each row by its norm."
        )
