"""The region map: which inputs fire which of two latents as their encoder rows turn in a plane, and what loss is left."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sdl_explorer.diagnosis.landscape_local import Local

CELLS = 2**22  # numbers that one strip of the map holds
TURNED = 0.1  # of a unit direction, at least so much must lie outside the first one


class Region(NamedTuple):
    """Where the same probes fire the same latents: the sets in words, its share of the map, and the losses on it."""

    label: str
    share: float
    least: float
    largest: float


class RegionMap(NamedTuple):
    """Both encoder rows turned in one plane, at their own lengths in it; the rest of each row stays.

    angles    (g_i,), (g_j,) of the two latents, radians from the plane's first axis
    profiled  (g_j, g_i) the loss with the decoder rows of the two latents at their least squares;  region  (g_j, g_i) index in `regions`
    regions   the largest first;  plane  what spans it, in words;  probes  names of the inputs that tell regions apart
    here      the angles as they are, None where a row has no part in the plane;  profiled_here  the loss there
    lengths   of the two rows in the plane, as on the map
    """

    angles: tuple[Float[np.ndarray, " g"], Float[np.ndarray, " h"]]
    profiled: Float[np.ndarray, "h g"]
    region: Int[np.ndarray, "h g"]
    regions: tuple[Region, ...]
    plane: tuple[str, str]
    probes: tuple[str, ...]
    here: tuple[float | None, float | None]
    profiled_here: float
    lengths: tuple[float, float]

    @property
    def best(self) -> tuple[float, float, float]:
        """The least loss on the map and the two angles there."""
        at = np.unravel_index(int(self.profiled.argmin()), self.profiled.shape)
        return float(self.profiled[at]), float(self.angles[0][at[1]]), float(self.angles[1][at[0]])


class Probes(NamedTuple):
    """Inputs that tell regions apart, each alone, and the local problem whose rows they are."""

    names: tuple[str, ...]
    local: Local


def plane_of(local: Local, probes: Probes) -> tuple[Tensor, tuple[str, str]]:
    """Two orthonormal directions, and what they are from: the strongest probes, else the encoder rows, else principal inputs."""
    _, _, principal = torch.linalg.svd(local.inputs * local.weights.sqrt()[:, None], full_matrices=False)
    candidates = [
        *zip(probes.local.inputs, probes.names, strict=True),
        *zip(local.W_enc, ("the first encoder row", "the second encoder row"), strict=True),
        *zip(principal, (f"principal direction {i + 1} of the rows" for i in range(len(principal))), strict=True),
        *zip(torch.eye(local.inputs.shape[1], dtype=torch.float64)[:2], ("axis 1", "axis 2"), strict=False),
    ]
    found: list[tuple[Tensor, str]] = []
    for row, name in candidates:
        if len(found) == 2 or row.norm() == 0:
            continue
        rest = row / row.norm()
        for axis, _ in found:
            rest = rest - (rest @ axis) * axis
        if rest.norm() > TURNED:
            found.append((rest / rest.norm(), name))
    return torch.stack([axis for axis, _ in found]), (found[0][1], found[1][1])


def map_regions(local: Local, probes: Probes, grid: int, ratio: float | None) -> RegionMap:
    """The map on grid x grid angles. `ratio` sets the second row's length in the plane to this times the first's."""
    axes, names = plane_of(local, probes)
    inside = local.W_enc @ axes.T
    lengths = inside.norm(dim=1)
    tiny = 1e-9 * max(float(local.W_enc.norm(dim=1).max()), 1e-30)
    there = [bool(length > tiny) for length in lengths]
    here = tuple(float(torch.atan2(row[1], row[0])) % (2 * np.pi) if known else None for row, known in zip(inside, there, strict=True))
    used = [float(length) if known else float(lengths.max()) or 1.0 for length, known in zip(lengths, there, strict=True)]
    if ratio is not None:
        used[1] = ratio * used[0]
    rest = local.W_enc - inside @ axes
    # not the same fractions of a step, so that equal angles are no ties
    angles = [(torch.arange(grid, dtype=torch.float64) + shift) * (2 * torch.pi / grid) for shift in (0.75, 0.25)]
    turned = [
        rest[i] + used[i] * (angle.cos()[:, None] * axes[0] + angle.sin()[:, None] * axes[1]) for i, angle in enumerate(angles)
    ]  # (grid, d_in) each
    profiled, patterns = [], []
    strip = max(1, CELLS // (local.n * local.m * grid + grid * local.m * local.remains.shape[-1]))
    for rows in turned[1].split(strip):
        W_enc = torch.stack([turned[0].expand(len(rows), -1, -1), rows[:, None].expand(-1, grid, -1)], dim=2)
        profiled.append(local.profiled(*local.codes(_pre(local, turned[0], rows))))
        alone, _ = probes.local.codes(_pre(probes.local, turned[0], rows))
        patterns.append(probes.local.fires(W_enc, alone).flatten(-2))
    profiled, pattern = torch.cat(profiled).numpy(), torch.cat(patterns).numpy()
    region, regions = _regions(pattern, profiled, probes.names)
    own, kept = local.codes(local.pre(local.W_enc))
    return RegionMap(
        angles=(angles[0].numpy(), angles[1].numpy()),
        profiled=profiled,
        region=region,
        regions=regions,
        plane=names,
        probes=probes.names,
        here=(here[0], here[1]),
        profiled_here=float(local.profiled(own, kept)),
        lengths=(used[0], used[1]),
    )


def _pre(local: Local, first: Tensor, second: Tensor) -> Tensor:
    """(h, g, n, 2) pre-activations of the grid, from one product per latent."""
    b = local.part.b_enc.detach()
    one, other = local.inputs @ first.T + b[0], local.inputs @ second.T + b[1]
    shape = (len(second), len(first), local.n)
    return torch.stack([one.T[None].expand(shape), other.T[:, None].expand(shape)], dim=-1)


def _regions(pattern: np.ndarray, profiled: np.ndarray, names: tuple[str, ...]) -> tuple[np.ndarray, tuple[Region, ...]]:
    """Index of each cell's region, and the regions, the largest first."""
    flat = pattern.reshape(-1, pattern.shape[-1])
    unique, index, counts = np.unique(flat, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    index, losses = place[index.reshape(-1)], profiled.reshape(-1)
    least, largest = np.full(len(order), np.inf), np.full(len(order), -np.inf)
    np.minimum.at(least, index, losses)
    np.maximum.at(largest, index, losses)
    regions = tuple(
        Region(_label(unique[u].reshape(-1, 2), names), float(counts[u] / len(flat)), float(least[r]), float(largest[r]))
        for r, u in enumerate(order)
    )
    return index.reshape(profiled.shape), regions


def _label(fires: np.ndarray, names: tuple[str, ...]) -> str:
    """ "{a, b} | ∅": the probes that fire each latent."""
    sets = ([name for name, on in zip(names, column, strict=True) if on] for column in fires.T)
    return " | ".join("{" + ", ".join(own) + "}" if own else "∅" for own in sets)
