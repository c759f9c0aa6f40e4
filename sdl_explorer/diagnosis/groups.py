"""Without true features: which groups of rows fire a latent. Groups are those that we are told, or clusters."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Anchors
from sdl_explorer.diagnosis.alone import respond_alone
from sdl_explorer.diagnosis.directions import directions_of
from sdl_explorer.diagnosis.observe import Accumulator, Rows, Stream, finding, observe
from sdl_explorer.diagnosis.sparse import Csr, like, row_sums
from sdl_explorer.models.dictionary import SparseDictionary

FITTED = 8192  # rows that clusters are fitted on, evenly spaced; all are assigned
ROUNDS = 25
CHUNK = 4096
NONE = "rows near no anchor"


class GroupProfile(NamedTuple):
    """One latent and the m groups that fire it: its code on the group's mean row, P(fires | group), its share of the total activation."""

    latent: int
    groups: np.ndarray
    names: tuple[str, ...]
    responses: np.ndarray
    context: np.ndarray
    share: np.ndarray
    effective_groups: float


@dataclass(frozen=True, repr=False)
class Groups:
    """What `trace_groups` found. CSR matrices are (n_latents, n_groups) and hold what is not zero.

    of                "anchors" | "labels" | "clusters";  names, sizes  of the groups, and how many rows each has
    responses         z on the mean row of a group, shown alone
    context, share    P(latent fires | group), and the group's share of the latent's total activation
    effective_groups  1 / sum_g p_g^2 of those shares; 0 for a latent that never fires
    chance            the same of a latent that fires alike everywhere: 1 / sum_g (size_g / n)^2
    """

    n_samples: int
    of: str
    names: tuple[str, ...]
    sizes: Int[np.ndarray, " n_groups"]
    responses: Csr
    context: Csr
    share: Csr
    effective_groups: Float[np.ndarray, " n_latents"]
    chance: float
    firing_rate: Float[np.ndarray, " n_latents"]

    n_latents = property(lambda self: len(self.firing_rate), doc="Latents traced.")
    n_groups = property(lambda self: len(self.names), doc="Groups of rows.")

    def __repr__(self) -> str:
        return f"Groups({self.n_latents} latents over {self.n_groups} groups by {self.of} on {self.n_samples:,} rows)"

    def profile(self, latent: int) -> GroupProfile:
        """The groups that fire one latent, alone or in rows, largest share first."""
        if not 0 <= latent < self.n_latents:
            raise ValueError(f"Groups: latent {latent} does not exist; there are {self.n_latents}.")
        alone, context, share = (_row(matrix, latent) for matrix in (self.responses, self.context, self.share))
        groups = np.flatnonzero((alone > 0) | (context > 0))
        groups = groups[np.lexsort((groups, -alone[groups], -share[groups]))]
        names = tuple(self.names[g] for g in groups)
        return GroupProfile(latent, groups, names, alone[groups], context[groups], share[groups], float(self.effective_groups[latent]))


class _Tracer(Accumulator):
    def __init__(self, stream: Stream, *, anchors=None, n_clusters=16, seed=0):
        super().__init__(stream)
        if n_clusters < 1:
            raise ValueError(f"trace_groups: n_clusters is {n_clusters}; there must be one at least.")
        self.of, self.names, self.group = _groups(stream, anchors, n_clusters, seed)
        self.n, self.fired = 0, np.zeros(stream.dictionary.n_latents, dtype=np.int64)
        self.both: Csr = csr_array((stream.dictionary.n_latents, len(self.names)), dtype=np.complex128)

    def add(self, rows: Rows) -> None:
        group = self.group[rows.start : rows.start + rows.n]
        self.n += rows.n
        self.fired += rows.count.cpu().numpy()
        # one matrix holds both sums: codes in the real part, counts in the imaginary one
        latent, place, value = _entries(rows, group) if rows.sparse else _sums(rows, group)
        self.both = self.both + csr_array((value, (latent, place)), shape=self.both.shape, dtype=np.complex128)

    def result(self) -> Groups:
        both, sizes = self.both, np.bincount(self.group, minlength=len(self.names))
        both.sort_indices()
        total = like(both, both.data.real.copy())
        totals = np.repeat(row_sums(total), np.diff(both.indptr))
        share = like(both, np.divide(total.data, totals, out=np.zeros_like(totals), where=totals > 0))
        squares = row_sums(like(share, share.data**2))
        fires, responses = respond_alone(self.stream.dictionary, self._means(sizes), pulse=self.stream.pulse)
        return Groups(
            n_samples=self.n,
            of=self.of,
            names=self.names,
            sizes=sizes,
            responses=like(fires, responses[0]),
            context=like(both, both.data.imag / sizes[both.indices]),
            share=share,
            effective_groups=np.divide(1.0, squares, out=np.zeros_like(squares), where=squares > 0),
            chance=float(1 / ((sizes / self.n) ** 2).sum()),
            firing_rate=self.fired / self.n,
        )

    def _means(self, sizes: np.ndarray) -> Tensor:
        inputs = self.stream.activations.inputs
        sums = torch.zeros(len(sizes), inputs.shape[1], dtype=torch.float64)
        for rows, group in zip(inputs.split(CHUNK), torch.as_tensor(self.group).split(CHUNK), strict=True):
            sums.index_add_(0, group, rows.cpu().double())
        return (sums / torch.as_tensor(sizes)[:, None]).to(self.stream.dictionary.W_enc)


@finding(_Tracer)
def trace_groups(
    dictionary: SparseDictionary, activations: Activations, anchors: Anchors | None = None, n_clusters: int = 16, seed: int = 0
) -> Groups:
    """How a latent's activation spreads over groups of rows: a candidate's evidence for one meaning or several, without truth.

        p_g = sum over the group's rows of z_i / sum over all rows of z_i;   effective_groups = 1 / sum_g p_g^2

    Groups: the anchor that a row is nearest to, by the cosine of the row less the mean of all, or none of them where no cosine is
    positive; without anchors the rows' labels, where they differ; else `n_clusters` clusters of the centred unit rows (Lloyd's rounds
    from k-means++, deterministic in `seed`). A group is not a feature: one meaning can spread over several, and several can share one.
    Compare with `chance`. A latent that never fires has zeros, never NaN.

    Raises ValueError for n_clusters < 1, anchors of another width, and for what `observe` refuses. k-means++: Arthur & Vassilvitskii 2007.
    """
    return observe(dictionary, activations, [(trace_groups, {"anchors": anchors, "n_clusters": n_clusters, "seed": seed})])[0]


def _groups(stream: Stream, anchors: Anchors | None, n_clusters: int, seed: int) -> tuple[str, tuple[str, ...], np.ndarray]:
    """Where the groups are from, their names, and the group of each row; groups without a row are left out."""
    activations, mean = stream.activations, stream.input_mean.cpu()
    if anchors is not None:
        directions = directions_of(activations, stream.dictionary, anchors)
        centres, of, names = directions.inputs.cpu(), "anchors", (*directions.names, NONE)
        group = _nearest(activations, mean, centres, least=0.0)
    elif activations.labels is not None and len(activations.labels.unique()) > 1:
        group, of = activations.labels.cpu(), "labels"
        known = activations.label_names
        names = {g: known[g] if 0 <= g < len(known) else f"label {g}" for g in group.unique().tolist()}
    else:
        centres, of = _clusters(_unit(activations, mean, FITTED), n_clusters, seed), "clusters"
        group, names = _nearest(activations, mean, centres), tuple(f"cluster {g}" for g in range(len(centres)))
    present, place = group.unique(return_inverse=True)
    return of, tuple(names[g] for g in present.tolist()), place.numpy()


def _entries(rows: Rows, group: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(latent, group, code + i) of every code that fires."""
    latent, row, value = (part.cpu().numpy() for part in rows.entries)
    return latent, group[row], value + 1j


def _sums(rows: Rows, group: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same, added up over each group's rows."""
    present, place = np.unique(group, return_inverse=True)
    nothing = torch.zeros(len(present), rows.n_latents, dtype=torch.float64)
    total, count = (nothing.index_add(0, torch.as_tensor(place), side.cpu().double()).numpy() for side in (rows.codes, rows.fired))
    some, latent = count.nonzero()
    return latent, present[some], total[some, latent] + 1j * count[some, latent]


def _nearest(activations: Activations, mean: Tensor, centres: Tensor, least: float = -2.0) -> Tensor:
    """The centre with the largest cosine to each centred row; one past the last where none exceeds `least`."""
    parts = []
    for rows in activations.inputs.split(CHUNK):
        best, at = (normalize(rows.cpu().float() - mean, dim=1) @ centres.T).max(dim=1)
        parts.append(torch.where(best > least, at, len(centres)))
    return torch.cat(parts)


def _unit(activations: Activations, mean: Tensor, most: int) -> Tensor:
    inputs = activations.inputs
    chosen = inputs if len(inputs) <= most else inputs[torch.linspace(0, len(inputs) - 1, most).long()]
    return normalize(chosen.cpu().float() - mean, dim=1)


def _clusters(rows: Float[Tensor, "n d"], k: int, seed: int) -> Float[Tensor, "m d"]:
    """Centres of at most k clusters of unit rows: k-means++, then Lloyd's rounds with centres of norm 1."""
    generator = torch.Generator().manual_seed(seed)
    centres = rows[torch.randint(len(rows), (1,), generator=generator)]
    while len(centres) < k:
        away = (1 - (rows @ centres.T).max(dim=1).values).clamp_min(0)
        if away.max() < 1e-6:  # every row is a centre
            break
        centres = torch.cat([centres, rows[torch.multinomial(away, 1, generator=generator)]])
    for _ in range(ROUNDS):
        at = (rows @ centres.T).argmax(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, at, rows)
        moved = torch.where(sums.norm(dim=1, keepdim=True) > 0, normalize(sums, dim=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def _row(matrix: Csr, i: int) -> np.ndarray:
    dense = np.zeros(matrix.shape[1])
    span = slice(matrix.indptr[i], matrix.indptr[i + 1])
    dense[matrix.indices[span]] = matrix.data[span]
    return dense
