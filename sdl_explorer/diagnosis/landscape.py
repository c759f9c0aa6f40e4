"""Why did training stop here? The loss around two latents: a map of regions, a slice inside one, and kicks."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.sources import stream
from sdl_explorer.diagnosis.cosines import cosines_of, unit
from sdl_explorer.diagnosis.landscape_kick import Kicks, kick
from sdl_explorer.diagnosis.landscape_local import Local
from sdl_explorer.diagnosis.landscape_map import Probes, RegionMap, map_regions
from sdl_explorer.diagnosis.landscape_slice import Slice, cut_slice
from sdl_explorer.diagnosis.observe import Accumulator, Rows, Stream, finding, observe
from sdl_explorer.models.dictionary import SparseDictionary

CANDIDATES = 256  # inputs from which the probes are taken
DESCENDED = 2**23  # numbers that all batches to descend on hold: 64 MB
BLOCK = 2**22  # numbers of a block of rows, while the strongest are looked for


@dataclass(frozen=True, repr=False)
class Landscape:
    """The loss as a function of two latents, all others held.

    latents    the two;  silent  whether each fired on no row
    loss       mean |x_r - recon|^2 on the rows used;  n_samples  rows given;  n_rows  rows used, weighted to stand for all
    map        `RegionMap`: the rows of the encoder turned in a plane, the decoder rows at their least squares
    slice      `Slice`: inside one region, convex in each block; of the probes of the map alone
    kicks      `Kicks`: moved at random and trained alone, with the null of random directions
    """

    latents: tuple[int, int]
    silent: tuple[bool, bool]
    loss: float
    n_samples: int
    n_rows: int
    map: RegionMap
    slice: Slice
    kicks: Kicks

    verdict = property(lambda self: self.kicks.verdict, doc='"comes back", "finds lower" or "drifts": what a kick does.')

    def __repr__(self) -> str:
        first, second = self.latents
        return f"Landscape(latents {first} and {second}: loss {self.loss:.4g}, a kick {self.verdict}; {self.kicks.reason})"


class Part(NamedTuple):
    """Some rows, and how many each stands for."""

    rows: Tensor
    weights: Tensor


class _Prober(Accumulator):
    def __init__(
        self,
        stream: Stream,
        *,
        latents=None,
        grid=64,
        ratio=None,
        sigmas=(0.1, 0.3, 1.0),
        n_kicks=12,
        n_steps=100,
        relative=True,
        n_rows=512,
        n_probes=6,
        seed=0,
    ):
        super().__init__(stream)
        n_latents, d_in = stream.dictionary.n_latents, stream.dictionary.d_in
        for name, value, least in (("n_latents", n_latents, 2), ("d_in", d_in, 2)):
            if value < least:
                raise ValueError(f"probe_landscape: {name} is {value}; two encoder rows turn in a plane, so it needs {least} at least.")
        limits = {"grid": (grid, 4), "n_kicks": (n_kicks, 1), "n_steps": (n_steps, 1), "n_rows": (n_rows, 2), "n_probes": (n_probes, 2)}
        for name, (value, least) in limits.items():
            if value < least:
                raise ValueError(f"probe_landscape: {name} is {value}; give {least} at least.")
        if not sigmas or min(sigmas) <= 0:
            raise ValueError(f"probe_landscape: sigmas are {tuple(sigmas)}; give sizes of kicks, above zero.")
        if ratio is not None and not 0 < ratio < float("inf"):
            raise ValueError(f"probe_landscape: ratio is {ratio}; it is a length over a length, above zero, or None.")
        self.asked = _asked(latents, n_latents)
        self.grid, self.ratio, self.sigmas, self.n_kicks, self.n_steps = grid, ratio, tuple(sigmas), n_kicks, n_steps
        self.relative, self.n_rows, self.n_probes, self.seed = relative, n_rows, n_probes, seed
        self.fired = torch.zeros(n_latents, dtype=torch.int64)
        self.blame = torch.zeros(n_latents, dtype=torch.float64)
        self.lengths = stream.dictionary.W_dec.detach().float().norm(dim=1)

    def add(self, rows: Rows) -> None:
        """blame_i = sum over rows of |residual|^2 times the share of latent i in sum_j z_j |W_dec_j|"""
        self.fired += rows.count.cpu()
        latent, row, value = rows.entries
        parts = value * self.lengths[latent]
        sums = torch.bincount(row, weights=parts, minlength=rows.n).clamp_min(torch.finfo(torch.float32).tiny)
        errors = (rows.targets - rows.reconstruction).square().sum(dim=1)
        shares = errors[row] * parts / sums[row]
        self.blame += torch.bincount(latent, weights=shares, minlength=rows.n_latents).cpu().double()

    def result(self) -> Landscape:
        dictionary, activations = self.stream.dictionary, self.stream.activations
        pair = self._pair()
        judged, trained = self._rows(pair)
        around = lambda part: Local.of(dictionary, _taken(activations, part.rows), part.weights, list(pair))
        local = around(judged)
        self.stream.pulse()
        probes = self._probes(pair, judged.rows)
        regions = map_regions(local, probes, self.grid, self.ratio)
        self.stream.pulse()
        cut = cut_slice(probes.local, self.grid // 2 * 2 + 1, stream(self.seed, "landscape", "slice"))
        draw = stream(self.seed, "landscape", "kicks")
        kicks = kick(local, [around(part) for part in trained], self.sigmas, self.n_kicks, self.n_steps, self.relative, draw)
        silent = (self.fired[list(pair)] == 0).tolist()
        return Landscape(pair, (silent[0], silent[1]), kicks.start, activations.n, local.n, regions, cut, kicks)

    def _pair(self) -> tuple[int, int]:
        """The latents asked for. Else the one with the largest part in the error; beside it a silent one, or the nearest decoder row."""
        if len(self.asked) == 2:
            return self.asked[0], self.asked[1]
        worst = lambda without: int(torch.where(torch.arange(len(self.blame)) == without, -1.0, self.blame).argmax())
        first = self.asked[0] if self.asked else worst(-1)
        silent = self.fired == 0
        if silent[first] and not silent.all():
            return first, worst(first)
        W_dec = self.stream.dictionary.W_dec.detach()
        cosines = cosines_of(W_dec, unit(W_dec[first][None]))[0].cpu()
        others = torch.arange(len(silent)) != first
        among = others & silent if (others & silent).any() else others
        return first, int(torch.where(among, cosines, -torch.inf).argmax())

    def _rows(self, pair: tuple[int, int]) -> tuple[Part, list[Part]]:
        """The rows that are judged, and batches of others to descend on; all rows for both where there are no more than `n_rows`.

        Of one half of the rows the strongest of both latents are judged, and a sample of the rest; the other half makes the batches.
        """
        activations, m = self.stream.activations, len(pair)
        n = activations.n
        if n <= self.n_rows:
            every = Part(torch.arange(n), torch.ones(n))
            return every, [every]
        order = torch.randperm(n, generator=stream(self.seed, "landscape", "rows"))
        pool, train = order[: (n + 1) // 2], order[(n + 1) // 2 :]
        strength = self._strength(activations.inputs[pool], pair)
        top = strength.topk(min(max(1, self.n_rows // 4), len(pool)), dim=0).indices.unique()
        rest = torch.ones(len(pool), dtype=torch.bool)
        rest[top] = False
        others = rest.nonzero()[:, 0]
        sample = others[: max(self.n_rows - len(top), 1)]
        stands = torch.cat([torch.ones(len(top)), torch.full((len(sample),), len(others) / max(len(sample), 1))])
        width = activations.inputs.shape[1] + (m + 1) * activations.targets.shape[1]
        batches = train[: max(1, DESCENDED // width)].split(self.n_rows)
        return Part(pool[torch.cat([top, sample])], stands), [Part(batch, torch.ones(len(batch))) for batch in batches]

    def _strength(self, inputs: Tensor, pair: tuple[int, int]) -> Tensor:
        """(n, 2) how strongly each latent reads each row, over its own length, on the CPU."""
        dictionary, latents = self.stream.dictionary, list(pair)
        lengths = dictionary.W_enc[latents].norm(dim=1)
        size = max(1, BLOCK // inputs.shape[1])
        parts = [(dictionary.pre(part.to(dictionary.W_enc), latents)).cpu() for part in inputs.split(size)]
        return torch.cat(parts) / torch.where(lengths > 0, lengths, 1.0).cpu()

    def _probes(self, pair: tuple[int, int], rows: Tensor) -> Probes:
        """True features alone, those that fire the two most; without truth, rows that fire them, each as unlike the former as can be."""
        activations, truth = self.stream.activations, self.stream.activations.truth
        everything = _taken(activations, rows) if truth is None else _alone(truth)
        strength = self._strength(everything.inputs, pair).amax(dim=1)
        some = strength.topk(min(CANDIDATES, len(strength))).indices.sort().values
        near = Local.of(self.stream.dictionary, _taken(everything, some), torch.ones(len(some)), list(pair))
        codes = (near.codes(near.pre(near.W_enc))[0] * near.W_dec.norm(dim=1)).amax(dim=1)
        order = np.lexsort((-strength[some].numpy(), -codes.numpy()))
        chosen = order[: self.n_probes]
        if truth is None:
            chosen = _unlike(near.inputs, order[: max(int((codes > 0).sum()), self.n_probes)], self.n_probes)
        places = some[torch.from_numpy(np.ascontiguousarray(chosen))]
        names = tuple(f"row {int(rows[i])}" if truth is None else truth.name(int(i)) for i in places)
        return Probes(names, Local.of(self.stream.dictionary, _taken(everything, places), torch.ones(len(places)), list(pair)))


@finding(_Prober)
def probe_landscape(
    dictionary: SparseDictionary,
    activations: Activations,
    latents: int | Sequence[int] | None = None,
    grid: int = 64,
    ratio: float | None = None,
    sigmas: Sequence[float] = (0.1, 0.3, 1.0),
    n_kicks: int = 12,
    n_steps: int = 100,
    relative: bool = True,
    n_rows: int = 512,
    n_probes: int = 6,
    seed: int = 0,
) -> Landscape:
    """The loss around two latents, all others held where they are; under Top-k the others still compete with them.

        map     W_enc_i = rest_i + length_i (cos a_i, sin a_i) in a plane;   min over W_dec of the two, by least squares
        slice   f(s, t) = loss(W_enc + s A, W_dec + t B) of the probes, as far along A as each fires what it fires
        kicks   rows + sigma * unit * noise, then `n_steps` of Adam on the two latents' rows alone, beside the same without a kick

    `latents`: two ids, or one (its partner is a silent latent, or the nearest decoder row), or None (first the latent with the largest
    part in the error). The plane is spanned by the two inputs that fire them most: true features alone where these are known, rows
    otherwise; `n_probes` such inputs tell regions apart. `ratio` sets the second row's length on the map over the first's; without it
    the rows have their own, and a row without a part in the plane has the other's. A unit is the root mean square entry of the row
    (of the other row, where it is zero); with relative=False it is 1, as in arXiv 2512.05534, Example 3.5. `n_rows` rows are used, the
    strongest of either latent and a sample that stands for all others; kicks descend on batches of other ones, where there are. Biases
    and thresholds stay. The loss is the squared error alone.

    Two directions of many are looked at, so what a kick does not find can still be there. Raises ValueError for settings out of range,
    latents that do not exist, and nonlinearities that code all latents together.
    """
    settings = {"latents": latents, "grid": grid, "ratio": ratio, "sigmas": sigmas, "n_kicks": n_kicks, "n_steps": n_steps}
    settings |= {"relative": relative, "n_rows": n_rows, "n_probes": n_probes, "seed": seed}
    return observe(dictionary, activations, [(probe_landscape, settings)])[0]


def _asked(latents, n_latents: int) -> tuple[int, ...]:
    if latents is None:
        return ()
    asked = tuple(int(i) for i in ([latents] if isinstance(latents, Integral) else latents))
    if not 1 <= len(asked) <= 2 or len(set(asked)) < len(asked) or not all(0 <= i < n_latents for i in asked):
        raise ValueError(f"probe_landscape: latents are {asked}; give one or two different ids from 0 to {n_latents - 1}.")
    return asked


def _taken(activations: Activations, rows: Tensor) -> Activations:
    inputs = activations.inputs[rows]
    return Activations(inputs, inputs if activations.targets is activations.inputs else activations.targets[rows])


def _alone(truth) -> Activations:
    """Each true feature alone at unit strength."""
    return Activations(truth.input_features, truth.target_features)


def _unlike(inputs: Tensor, order: np.ndarray, n: int) -> np.ndarray:
    """The first of the order, then each time the one furthest in angle from all those taken."""
    rows = inputs[torch.from_numpy(np.ascontiguousarray(order))]
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    taken, nearest = [0], rows @ rows[0]
    while len(taken) < min(n, len(order)):
        nearest[taken] = torch.inf
        taken.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, rows @ rows[taken[-1]])
    return order[taken]
