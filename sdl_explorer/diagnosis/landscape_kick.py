"""The kick test: move two latents at random, train them alone for a while, and see where they end."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Generator, Tensor

from sdl_explorer.diagnosis.landscape_local import Local

LR = 0.05  # of Adam, in units of a row's own size; it falls to 0
SAME = 0.01  # losses within this share of what the latents write are one loss
NEAR = 0.25  # squared distance, of that right after the kick, from which it counts as come back
CELLS = 2**21  # numbers that one block of kicks holds
FATES = ("comes back", "finds lower", "drifts")


class Arm(NamedTuple):
    """Kicks of one size: losses right after and at the end, and the mean square by which the reconstruction has moved.

    sigma   of the noise, in units of a row's root mean square entry; None for rows in random directions at their own lengths
    fate    index in FATES of each
    """

    sigma: float | None
    after: Float[np.ndarray, " k"]
    end: Float[np.ndarray, " k"]
    moved_after: Float[np.ndarray, " k"]
    moved_end: Float[np.ndarray, " k"]
    fate: np.ndarray

    def count(self, fate: str) -> int:
        return int((self.fate == FATES.index(fate)).sum())


class Kicks(NamedTuple):
    """arms     one for each size of noise;  random  the null: the same latents restarted in random directions
    start    the loss before;  unkicked  after the same training without a kick: a kick finds lower where it ends below both
    stake    mean square of what the latents write: a hundredth of it is a difference;  n_steps  of training
    verdict  "finds lower" where any kick does, else what most do;  reason  the verdict in numbers
    """

    arms: tuple[Arm, ...]
    random: Arm
    start: float
    unkicked: float
    stake: float
    n_steps: int
    verdict: str
    reason: str

    @property
    def lowest(self) -> float:
        """The lowest loss that a kick ended at."""
        return float(min(arm.end.min() for arm in self.arms))


def kick(
    local: Local, descends: list[Local], sigmas: tuple[float, ...], n_kicks: int, n_steps: int, relative: bool, generator: Generator
) -> Kicks:
    """Gaussian noise on all entries of the latents' rows, then Adam on their rows alone, all others held.

    It descends on the batches of `descends` in turn; every loss here is that of `local`, on other rows where there are others.
    """
    units = [_unit(rows) if relative else torch.ones(len(rows), 1, dtype=torch.float64) for rows in (local.W_enc, local.W_dec)]
    point = (local.W_enc, local.W_dec)
    draw = lambda rows: torch.randn(n_kicks, *rows.shape, generator=generator, dtype=torch.float64)
    starts: list[list[Tensor]] = [[rows[None] for rows in point]]
    for sigma in sigmas:
        starts.append([rows + sigma * unit * draw(rows) for rows, unit in zip(point, units, strict=True)])
    starts.append([_directions(draw(rows)) * unit * rows.shape[1] ** 0.5 for rows, unit in zip(point, units, strict=True)])

    codes, _ = local.codes(local.pre(local.W_enc))
    stake = float(local.energy(codes @ local.W_dec))
    stake = max(stake, 1e-3 * float(local.loss(torch.zeros_like(point[0]), point[1])), 1e-30)
    W_enc, W_dec = (torch.cat(side) for side in zip(*starts, strict=True))
    after, end, moved_after, moved_end = _trained(local, descends, W_enc, W_dec, units, n_steps, stake)
    fate = np.full(len(end), FATES.index("drifts"))
    returned = (moved_end <= NEAR * moved_after) | (moved_end <= SAME**2 * stake)
    fate[(abs(end - end[0]) <= SAME * stake) & returned] = FATES.index("comes back")
    fate[end < min(after[0], end[0]) - SAME * stake] = FATES.index("finds lower")
    arms = []
    for at, sigma in enumerate((*sigmas, None)):
        part = slice(1 + at * n_kicks, 1 + (at + 1) * n_kicks)
        arms.append(Arm(sigma, after[part], end[part], moved_after[part], moved_end[part], fate[part]))
    return Kicks(tuple(arms[:-1]), arms[-1], float(after[0]), float(end[0]), stake, n_steps, *_verdict(arms[:-1], arms[-1], n_kicks))


def _trained(
    local: Local, descends: list[Local], W_enc: Tensor, W_dec: Tensor, units: list[Tensor], n_steps: int, stake: float
) -> list[np.ndarray]:
    """(after, end, moved after, moved at the end) of each start, the first of which is not kicked."""
    kept: list[list[Tensor]] = [[], [], [], []]
    size = max(1, CELLS // (max(one.n for one in (local, *descends)) * max(4 * local.m, local.W_dec.shape[1])))
    reference = before = local.written(local.W_enc, local.W_dec)
    for block in torch.arange(len(W_enc)).split(size):
        start = (W_enc[block], W_dec[block])
        end = _descend(descends, *start, units, n_steps, stake)
        if 0 in block:
            reference = local.written(end[0][0], end[1][0])
        moved = (local.energy(local.written(*at) - was) for at, was in ((start, before), (end, reference)))
        for one, values in zip(kept, (local.loss(*start), local.loss(*end), *moved), strict=True):
            one.append(values)
    return [torch.cat(one).numpy() for one in kept]


def _descend(batches: list[Local], W_enc: Tensor, W_dec: Tensor, units: list[Tensor], n_steps: int, stake: float) -> list[Tensor]:
    """Adam on rows over their units, so that the scale of a row changes nothing; each start of the batch descends by itself."""
    with torch.enable_grad():
        rows = [(w / unit).requires_grad_() for w, unit in zip((W_enc, W_dec), units, strict=True)]
        adam = torch.optim.Adam(rows, lr=LR)
        for step in range(n_steps):
            adam.param_groups[0]["lr"] = LR * (1 - step / n_steps)
            adam.zero_grad()
            (batches[step % len(batches)].loss(*(r * unit for r, unit in zip(rows, units, strict=True))).sum() / stake).backward()
            adam.step()
    return [(r * unit).detach() for r, unit in zip(rows, units, strict=True)]


def _unit(rows: Tensor) -> Tensor:
    """(m, 1) root mean square entry of each row; a row of zeros has that of the longest, or 1."""
    sizes = rows.norm(dim=1, keepdim=True) / rows.shape[1] ** 0.5
    return torch.where(sizes > 0, sizes, sizes.max() if sizes.max() > 0 else 1.0)


def _directions(noise: Tensor) -> Tensor:
    return noise / noise.norm(dim=-1, keepdim=True)


def _verdict(arms: list[Arm], random: Arm, n_kicks: int) -> tuple[str, str]:
    counts = {fate: sum(arm.count(fate) for arm in arms) for fate in FATES}
    n = n_kicks * len(arms)
    verdict = "finds lower" if counts["finds lower"] else max(("comes back", "drifts"), key=lambda fate: counts[fate])
    lower = f"{counts['finds lower']} of {n} kicks end lower than no kick, {counts['comes back']} come back"
    return (
        verdict,
        f"{lower}, {counts['drifts']} end elsewhere; of {n_kicks} restarts in random directions {random.count('finds lower')} end lower",
    )
