"""Which true features fire a latent, alone and in real rows: polysemanticity with the truth at hand."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array, vstack
from torch import Tensor

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.alone import respond_alone, scales_freely
from sdl_explorer.diagnosis.cofiring import CoFiring, strips, true_directions
from sdl_explorer.diagnosis.observe import Accumulator, Rows, Stream, finding, observe
from sdl_explorer.diagnosis.sparse import Csr, like, only, overlaps, row_maxima, row_of, row_sums
from sdl_explorer.diagnosis.spiked import STANDS, Spikes
from sdl_explorer.models.dictionary import SparseDictionary

POLY = 1.5  # effective features from which a latent is polysemantic
NO_OFFSET = 1e-5  # of the mean row norm: what rounding leaves of an offset of zero


class Profile(NamedTuple):
    """One latent: every feature that fires it alone or is behind its firing, strongest first, arrays over those m features.

    magnitudes, responses (n_levels, m)  activations of the feature, as the data have them, and z of the latent on the feature alone
    alone    share of those levels at which it fires;  context  P(latent fires | feature active);  without  P(fires | not active)
    share    of the latent's total drive in the rows on which it fires
    """

    latent: int
    status: str
    features: np.ndarray
    names: tuple[str, ...]
    magnitudes: np.ndarray
    responses: np.ndarray
    alone: np.ndarray
    context: np.ndarray
    without: np.ndarray
    share: np.ndarray
    effective_features: float
    selectivity: float
    participation: float


@dataclass(frozen=True, repr=False)
class Patterns:
    """What `trace_patterns` found. CSR matrices are (n_latents, n_features).

    fires        F_i: the share of a feature's own activations at which, shown alone, it fires the latent; stored where it does at all
    responses    z at each level of magnitude, (n_levels, entries of `fires`), in their order
    magnitudes   those levels, (n_levels, n_features): middles of equal shares of a feature's activations; 1 for one never active.
                 One level where responses are proportional to the magnitude
    context      P(latent fires | feature active) in real rows, for the features that drive it;  share  of its total drive there
    effective_features   1 / sum_k p_k^2 of those shares p_k; 0 where nothing drives the latent
    selectivity, participation   (r1 - r2) / r1 and (sum r)^2 / sum r^2 of the mean responses r to each feature alone; 0 where none
    status       "dead" | "unseen" | "mono" | "poly"; poly from 1.5 effective features, or where it fires and no feature drives it
    other        share of the drive from what no known feature explains: 0 where the truth is complete. Where it is not, the rest counts
                 as one feature in effective_features, and a latent that it drives by half or more is "alive": nobody knows for what
    capacity, latent_capacity    feature dimensionality of the true input features, and of the decoder rows: at most 1 each, d in sum
    firing_rate, feature_rate    share of the rows on which a latent fires, and a feature is active
    offset       norm of the part of the inputs that no feature explains (their constant), which every feature alone is shown with
    """

    n_samples: int
    names: tuple[str, ...]
    fires: Csr
    responses: Float[np.ndarray, "n_levels n_entries"]
    magnitudes: Float[np.ndarray, "n_levels n_features"]
    context: Csr
    share: Csr
    effective_features: Float[np.ndarray, " n_latents"]
    selectivity: Float[np.ndarray, " n_latents"]
    participation: Float[np.ndarray, " n_latents"]
    status: np.ndarray
    capacity: Float[np.ndarray, " n_features"]
    latent_capacity: Float[np.ndarray, " n_latents"]
    firing_rate: Float[np.ndarray, " n_latents"]
    feature_rate: Float[np.ndarray, " n_features"]
    offset: float
    other: Float[np.ndarray, " n_latents"]

    def __repr__(self) -> str:
        counts = ", ".join(f"{int((self.status == s).sum())} {s}" for s in ("mono", "poly", "alive", "dead", "unseen"))
        return f"Patterns({self.n_latents} latents against {self.n_features} true features on {self.n_samples:,} rows: {counts})"

    n_latents = property(lambda self: self.fires.shape[0], doc="Latents traced.")
    n_features = property(lambda self: self.fires.shape[1], doc="True features.")

    @property
    def set_sizes(self) -> Int[np.ndarray, "n_levels n_latents"]:
        """|F_i| at each level of magnitude, from the smallest up."""
        latents = row_of(self.fires)
        return np.stack([np.bincount(latents[level > 0], minlength=self.n_latents) for level in self.responses])

    @property
    def depends_on_magnitude(self) -> Bool[np.ndarray, " n_latents"]:
        """Latents with a feature that fires them at some of its activations and not at others: F_i is no single set."""
        return np.diff(np.concatenate([[0], np.cumsum(self.fires.data < 1)])[self.fires.indptr]) > 0

    def features_of(self, latent: int, share: float = 0.0) -> Int[np.ndarray, " n_set"]:
        """F_i, as ids: features that fire it alone at more than `share` of their activations (0: at some)."""
        span = self._span(self.fires, latent)
        return self.fires.indices[span][self.fires.data[span] > share].astype(np.int64)

    def pattern(self, share: float = 0.0) -> Csr:
        """All sets F_i as a boolean matrix."""
        kept = self.fires.data > share
        return only(like(self.fires, kept), kept)

    def profile(self, latent: int) -> Profile:
        """What fires one latent, alone at each magnitude and in real rows."""
        alone, driven = self._span(self.fires, latent), self._span(self.share, latent)
        features = np.union1d(self.fires.indices[alone], self.share.indices[driven]).astype(np.int64)
        responses = np.zeros((len(self.responses), len(features)), dtype=np.float32)
        responses[:, np.searchsorted(features, self.fires.indices[alone])] = self.responses[:, alone]
        rates, context, share = np.zeros((3, len(features)))
        rates[np.searchsorted(features, self.fires.indices[alone])] = self.fires.data[alone]
        places = np.searchsorted(features, self.share.indices[driven])
        context[places], share[places] = self.context.data[driven], self.share.data[driven]
        order = np.lexsort((features, -share, -responses.mean(axis=0)))
        features, rate = features[order], self.feature_rate[features[order]]
        both = context[order] * rate
        return Profile(
            latent=latent,
            status=str(self.status[latent]),
            features=features,
            names=tuple(self.names[k] for k in features),
            magnitudes=self.magnitudes[:, features],
            responses=responses[:, order],
            alone=rates[order],
            context=context[order],
            without=np.where(rate < 1, np.maximum(self.firing_rate[latent] - both, 0) / np.where(rate < 1, 1 - rate, 1), 0),
            share=share[order],
            effective_features=float(self.effective_features[latent]),
            selectivity=float(self.selectivity[latent]),
            participation=float(self.participation[latent]),
        )

    def _span(self, of: Csr, latent: int) -> slice:
        if not 0 <= latent < self.n_latents:
            raise ValueError(f"Patterns: latent {latent} does not exist; there are {self.n_latents}.")
        return slice(of.indptr[latent], of.indptr[latent + 1])


class _Tracer(Accumulator):
    def __init__(self, stream: Stream, *, samples_since_fired=None, dead_after=None, n_magnitudes=5):
        super().__init__(stream)
        if n_magnitudes < 1:
            raise ValueError(f"trace_patterns: n_magnitudes is {n_magnitudes}; a feature is shown at one magnitude at least.")
        self.features = true_directions(stream.activations, stream.dictionary, "trace_patterns")
        self.since, self.dead_after, self.n_magnitudes = samples_since_fired, dead_after, n_magnitudes
        self.cofiring = stream.share(CoFiring)
        truth = stream.activations.truth
        self.unknown = None if truth is None or truth.complete else stream.share(Spikes)
        self.size = 0.0

    def add(self, rows: Rows) -> None:
        self.size += rows.inputs.norm(dim=1).sum().item()

    def result(self) -> Patterns:
        dictionary, features, together = self.stream.dictionary, self.features, self.cofiring.result()
        offset = self._offset(together.strength / together.n)
        free = scales_freely(dictionary) and offset is None
        magnitudes = self.cofiring.magnitudes(1 if free else self.n_magnitudes)
        fires, responses = respond_alone(dictionary, features.inputs, magnitudes, offset, self.stream.pulse)
        context, share, other = self._driven()
        selectivity, participation = _spread(fires, responses.mean(axis=0))
        squares = row_sums(like(share, share.data.astype(np.float64) ** 2)) + other**2
        effective = np.divide(1.0, squares, out=np.zeros_like(squares), where=squares > 0)
        silent = together.fired == 0
        dead = _dead(silent, self.since, self.dead_after, together.n)
        status = np.where(silent, "unseen", np.where((effective > 0) & (effective < POLY), "mono", "poly"))
        status = np.where(~silent & (other >= STANDS), "alive", status)
        return Patterns(
            n_samples=together.n,
            names=features.names,
            fires=fires,
            responses=responses,
            magnitudes=magnitudes,
            context=context,
            share=share,
            effective_features=effective,
            selectivity=selectivity,
            participation=participation,
            status=np.where(dead, "dead", status),
            capacity=capacities(features.inputs),
            latent_capacity=capacities(dictionary.W_dec),
            firing_rate=together.fired / together.n,
            feature_rate=together.active / together.n,
            offset=0.0 if offset is None else float(offset.norm()),
            other=other,
        )

    def _offset(self, mean_codes: np.ndarray) -> Tensor | None:
        """mean x_p - mean codes @ W_p: the constant that generated rows may have. None where it is rounding."""
        directions = self.features.inputs
        explained = torch.as_tensor(mean_codes, device=directions.device).float() @ directions
        offset = self.stream.input_mean - explained
        return offset if offset.norm() > NO_OFFSET * self.size / self.cofiring.n else None

    def _driven(self) -> tuple[Csr, Csr, np.ndarray]:
        """P(fires | active), and p_k, for the features whose activations add to the latent's pre-activation where it fires; and the
        share of what no feature explains.

        drive_ik = sum over the latent's firing rows of relu(codes_k <W_enc_i, w_p^k>);  p_k = drive_ik / sum_k drive_ik
        """
        together = self.cofiring.result()
        other = np.zeros(len(together.fired)) if self.unknown is None else self.unknown.result()[1]
        active, contexts, shares, rest = together.active.astype(np.float32), [], [], []
        for some in strips(len(other)):  # a few latents at a time, for room
            of = together.total[some]
            drive = overlaps(self.stream.dictionary.W_enc[some], self.features.inputs, of)
            kept = np.multiply(np.maximum(drive, 0, out=drive), of.data, out=drive) > 0
            drive, count = only(like(of, drive), kept), together.count[some].data[kept]
            contexts.append(like(drive, count / active[drive.indices]))
            total = row_sums(drive) + other[some]
            shares.append(drive.data / total.astype(np.float32)[row_of(drive)])
            rest.append(np.divide(other[some], total, out=np.zeros_like(total), where=total > 0))
        context: Csr = csr_array(vstack(contexts, format="csr"))
        return context, like(context, np.concatenate(shares)), np.concatenate(rest)


@finding(_Tracer)
def trace_patterns(
    dictionary: SparseDictionary,
    activations: Activations,
    samples_since_fired: Tensor | np.ndarray | None = None,
    dead_after: int | None = None,
    n_magnitudes: int = 5,
) -> Patterns:
    """The sets F_i of features that fire each latent, shown alone and within real rows, and how many there are in effect.

        F_i = {k : z_i(offset + a w_p^k) > 0};   a runs over n_magnitudes quantiles of the feature's own activations
        p_k = share of sum over the firing rows of relu(codes_k <W_enc_i, w_p^k>);   effective_features = 1 / sum_k p_k^2

    The definition shows each feature at unit strength, which decides for ReLU and TopK without biases. A threshold or a bias makes
    F_i depend on the magnitude, so that the data's own are used, and `fires` holds the share of them. A latent that wins alone may lose
    in a row, where others compete for its place: `context` is what happens there. `fires` is strict: the slightest overlap counts,
    and under ReLU nearly every latent fires for several features; `effective_features` weighs them, and gives the status.

    `samples_since_fired` and `dead_after` as in `check_health`: without the second, a latent silent on these rows is dead. A latent or
    feature that is never active has zeros, never NaN. Responses are raw codes z, not times a decoder norm.

    Raises ValueError without true features, and for what `observe` refuses. Sets: arXiv 2512.05534, Definition 3.1; feature
    dimensionality: Elhage et al. 2022 (Toy Models of Superposition), equal to the capacity of Scherlis et al. 2022.
    """
    settings = {"samples_since_fired": samples_since_fired, "dead_after": dead_after, "n_magnitudes": n_magnitudes}
    return observe(dictionary, activations, [(trace_patterns, settings)])[0]


def capacities(rows: Float[Tensor, "n d"]) -> Float[np.ndarray, " n"]:
    """D_i = |w_i|^2 / sum_j <w_i / |w_i|, w_j>^2: the share of a dimension that row i has for itself, 0 for a row of zeros.

    Orthogonal rows have 1, an antipodal pair 1/2 each, a triangle in the plane 2/3. Scaling one row changes the others' shares.
    """
    rows = rows.detach().double()
    seen = ((rows @ (rows.T @ rows)) * rows).sum(dim=1)  # sum_j <w_i, w_j>^2
    return torch.where(seen > 0, rows.square().sum(dim=1).square() / seen.clamp_min(torch.finfo(torch.float64).tiny), 0.0).cpu().numpy()


def _spread(fires: Csr, responses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Selectivity and participation ratio of each latent's responses; 0 for a latent without any."""
    responses = responses.astype(np.float64)
    first = row_maxima(like(fires, responses))
    top = responses == first[row_of(fires)]
    second = np.where(row_sums(like(fires, top)) > 1, first, row_maxima(like(fires, np.where(top, 0, responses))))
    total, squares = row_sums(like(fires, responses)), row_sums(like(fires, responses**2))
    selectivity = np.divide(first - second, first, out=np.zeros_like(first), where=first > 0)
    return selectivity, np.divide(total**2, squares, out=np.zeros_like(first), where=first > 0)


def _dead(silent: np.ndarray, since, dead_after: int | None, n: int) -> np.ndarray:
    """The rule of `check_health`; without counts of training, what these rows show."""
    if dead_after is None:
        return silent
    if dead_after < 1:
        raise ValueError(f"trace_patterns: dead_after is {dead_after}; it is a number of samples, at least 1, or None for the rows given.")
    if since is None:
        return silent & (n >= dead_after)
    since = torch.as_tensor(since).cpu().numpy()
    if since.shape != silent.shape:
        raise ValueError(
            f"trace_patterns: samples_since_fired has shape {since.shape} and the dictionary {len(silent)} latents; give one count each."
        )
    return since >= dead_after
