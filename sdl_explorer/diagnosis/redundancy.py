"""Which latents are spare? Duplicates, dead, unseen, dense and weak ones, and what each adds; without ground truth."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn.functional import embedding_bag

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.chance import Chance
from sdl_explorer.diagnosis.copies import nearest_others
from sdl_explorer.diagnosis.cosines import row_cosines
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.diagnosis.margins import Margins
from sdl_explorer.diagnosis.observe import Accumulator, Rows, Stream, finding, observe
from sdl_explorer.diagnosis.scores import DetectorScore, detector_scores, known_hierarchy
from sdl_explorer.diagnosis.spiked import OnSpikes, judge_of
from sdl_explorer.models.dictionary import SparseDictionary

MOST_ENTRIES = 2**22  # firings that are kept for the overlap of twins; rows beyond do not count in it


@dataclass(frozen=True, repr=False)
class Redundancy:
    """What `find_redundant` found; arrays have one entry per latent, zeros for one that never fires.

    dead, unseen, samples_since_fired   as in `check_health`: silent for `dead_after` samples, or silent on these rows but for less
    expected_rate  share of further rows on which it should fire: its rate here where it fires; else 1 / (1 / p + N) for N samples without
                   a firing, training's and these, and the rate p at which its margins' tail would reach the threshold (`Margins`)
    dense          fires on more than `dense_rate` of the rows
    weak           fires, and its removal raises the error by less than `weak_share` of what a live latent's does on average
    cluster        which cluster of duplicates it is in, -1 for none: live latents joined by decoder cosines of `cosine` or more
    twin, twin_cosine   the other live latent whose decoder row is nearest, -1 and 0 where there is none
    twin_encoder   cosine of the two encoder rows;  twin_overlap  rows on which both fire, of those on which either does, among the first
                   `n_overlap` rows: near 1 they share a code, near 0 they take turns
    loss           mean |e + z_i w_i|^2 - mean |e|^2, e = x_r - recon: what removing it costs, other codes as they are; below 0 it does harm
    explained      loss / mean |x_r - mean x_r|^2, above 1 for a dense latent that carries the mean;  alone  the share of that variance
                   which the latent explains by itself
    coherence      mean |cos| over pairs of live decoder rows
    on_spikes      how often two of a cluster are duplicates, among latents that stand for spike-ins; None where rows have none
    hierarchy      whether features imply each other, None where it is not known: which benches are like these rows
    """

    n_samples: int
    cosine: float
    dense_rate: float
    weak_share: float
    n_overlap: int
    d_out: int
    coherence: float
    firing_rate: Float[np.ndarray, " n_latents"]
    dead: Bool[np.ndarray, " n_latents"]
    unseen: Bool[np.ndarray, " n_latents"]
    samples_since_fired: Int[np.ndarray, " n_latents"]
    expected_rate: Float[np.ndarray, " n_latents"]
    dense: Bool[np.ndarray, " n_latents"]
    weak: Bool[np.ndarray, " n_latents"]
    cluster: Int[np.ndarray, " n_latents"]
    twin: Int[np.ndarray, " n_latents"]
    twin_cosine: Float[np.ndarray, " n_latents"]
    twin_encoder: Float[np.ndarray, " n_latents"]
    twin_overlap: Float[np.ndarray, " n_latents"]
    loss: Float[np.ndarray, " n_latents"]
    explained: Float[np.ndarray, " n_latents"]
    alone: Float[np.ndarray, " n_latents"]
    on_spikes: OnSpikes | None = None
    hierarchy: bool | None = None

    def __repr__(self) -> str:
        counts = {"dead": self.dead, "unseen": self.unseen, "dense": self.dense, "weak": self.weak, "duplicate": self.duplicate}
        said = ", ".join(f"{int(mask.sum())} {name}" for name, mask in counts.items())
        spikes = "" if self.on_spikes is None else f"; duplicates: {self.on_spikes}"
        return f"Redundancy({self.n_latents} latents on {self.n_samples:,} rows: {said} in {len(self.clusters)} clusters{spikes})"

    @property
    def n_latents(self) -> int:
        return len(self.cluster)

    @property
    def live(self) -> Bool[np.ndarray, " n_latents"]:
        """Those that fired on these rows."""
        return self.firing_rate > 0

    @property
    def duplicate(self) -> Bool[np.ndarray, " n_latents"]:
        """In a cluster with another live latent."""
        return self.cluster >= 0

    @cached_property
    def clusters(self) -> tuple[Int[np.ndarray, " n_members"], ...]:
        """The clusters of duplicates, as ids, the largest first."""
        order = np.argsort(self.cluster, kind="stable")[int((self.cluster < 0).sum()) :]
        groups = np.split(order, np.flatnonzero(np.diff(self.cluster[order])) + 1) if len(order) else []
        return tuple(sorted(groups, key=lambda members: (-len(members), members[0])))

    @property
    def chance_pairs(self) -> float:
        """Pairs that would be as near by chance, were the live decoder rows independent random ones."""
        n = int(self.live.sum())
        return n * (n - 1) / 2 * float(Chance(1, 1, self.d_out, self.d_out).recovery(self.cosine))

    def worth(self, detector: str) -> DetectorScore:
        """How right "duplicate" or "dead" is on benches of this coherence, and kind where it is known."""
        return detector_scores(detector, self.coherence, self.hierarchy)


class _Ledger(Accumulator):
    def __init__(self, stream: Stream, *, samples_since_fired=None, dead_after=None, cosine=0.9, dense_rate=0.1, weak_share=0.01):
        super().__init__(stream)
        for name, value in (("cosine", cosine), ("dense_rate", dense_rate)):
            if not 0 < value <= 1:
                raise ValueError(f"find_redundant: {name} is {value}; it is above 0 and at most 1.")
        if weak_share < 0:
            raise ValueError(f"find_redundant: weak_share is {weak_share}; it is a share of the mean loss, at least 0.")
        self.cosine, self.dense_rate, self.weak_share = cosine, dense_rate, weak_share
        self.spikes = judge_of(stream)
        self.checkup = stream.ask(check_health, {"samples_since_fired": samples_since_fired, "dead_after": dead_after})
        self.counted, self.margins = samples_since_fired is not None, stream.share(Margins)
        dictionary = stream.dictionary
        self.writes = dictionary.W_dec.detach().float() / dictionary.target_scale  # w_i, in units of the targets
        self.total, self.square, self.error, self.target = torch.zeros(4, dictionary.n_latents, dtype=torch.float64)
        self.variance = 0.0
        self.firings: list[tuple[np.ndarray, np.ndarray]] = []
        self.n_firings = self.n_overlap = 0

    def add(self, rows: Rows) -> None:
        latent, row, value = rows.entries
        shift = rows.targets - self.stream.target_mean
        self.variance += float(shift.square().sum(dtype=torch.float64))
        self.total += _per_latent(latent, value, rows.n_latents)
        self.square += _per_latent(latent, value.square(), rows.n_latents)
        some, error, target = _products(rows, rows.targets - rows.reconstruction, shift)
        self.error[some.cpu()] += (error * self.writes[some]).sum(dim=1).cpu().double()
        self.target[some.cpu()] += (target * self.writes[some]).sum(dim=1).cpu().double()
        if self.n_firings + len(latent) <= MOST_ENTRIES or not self.firings:
            self.firings.append((latent.cpu().numpy().astype(np.int32), (row + rows.start).cpu().numpy().astype(np.int32)))
            self.n_firings += len(latent)
            self.n_overlap = rows.start + rows.n

    def result(self) -> Redundancy:
        dictionary, health = self.stream.dictionary, self.checkup.result()
        n, size = health.n_samples, self.writes.cpu().double().square().sum(dim=1)
        loss = ((2 * self.error + self.square * size) / n).numpy()
        gained = (2 * self.target - (self.square - self.total.square() / n) * size).numpy()
        live = health.firing_rate > 0
        silence = n + health.samples_since_fired if self.counted else n
        usual = max(loss[live].mean(), 0.0) if live.any() else 0.0
        twins = nearest_others(dictionary.W_dec.detach(), torch.as_tensor(np.flatnonzero(live), device=dictionary.device), self.cosine)
        other = torch.as_tensor(np.maximum(twins.twin, 0), device=dictionary.device)
        reads = row_cosines(dictionary.W_enc.detach(), dictionary.W_enc.detach(), other)
        found = Redundancy(
            n_samples=n,
            cosine=self.cosine,
            dense_rate=self.dense_rate,
            weak_share=self.weak_share,
            n_overlap=self.n_overlap,
            d_out=dictionary.d_out,
            coherence=twins.coherence,
            firing_rate=health.firing_rate,
            dead=health.dead,
            unseen=health.unseen,
            samples_since_fired=health.samples_since_fired,
            expected_rate=np.where(live, health.firing_rate, 1 / (1 / self.margins.rates() + silence)),
            dense=health.firing_rate > self.dense_rate,
            weak=live & (loss < self.weak_share * usual),
            cluster=twins.cluster,
            twin=twins.twin,
            twin_cosine=twins.cosine,
            twin_encoder=np.where(twins.twin >= 0, reads, 0),
            twin_overlap=self._overlap(twins.twin),
            loss=loss,
            explained=loss * n / self.variance if self.variance > 0 else np.zeros_like(loss),
            alone=gained / self.variance if self.variance > 0 else np.zeros_like(gained),
            hierarchy=known_hierarchy(self.stream.activations),
        )
        return found if self.spikes is None else replace(found, on_spikes=self.spikes.judge(found.clusters, "redundant"))

    def _overlap(self, twin: np.ndarray) -> np.ndarray:
        """|rows of both| / |rows of either| with the twin."""
        latent, row = (np.concatenate(side) for side in zip(*self.firings, strict=True))
        fires = csr_array((np.ones(len(latent), dtype=np.int32), (latent, row)), shape=(len(twin), self.n_overlap))
        count, some = np.bincount(latent, minlength=len(twin)), np.flatnonzero(twin >= 0)
        both = np.zeros(len(twin))
        for part in np.array_split(some, 1 + len(latent) // 2**20):
            both[part] = fires[part].multiply(fires[twin[part]]).sum(axis=1)
        either = count + count[np.maximum(twin, 0)] - both
        return np.divide(both, either, out=np.zeros(len(twin)), where=(either > 0) & (twin >= 0))


def _per_latent(latent: Tensor, value: Tensor, n_latents: int) -> Tensor:
    return torch.zeros(n_latents, dtype=torch.float64).index_add_(0, latent.cpu(), value.cpu().double())


def _products(rows: Rows, *values: Tensor) -> list[Tensor]:
    """Ids of the latents that fire, and for each matrix of values (b, d) their sums over rows, weighted by the codes (m, d)."""
    some = rows.count.nonzero()[:, 0]
    if not rows.sparse:
        return [some, *(rows.codes[:, some].T @ side for side in values)]
    _, row, code = rows.entries
    return [some, *(embedding_bag(row, side, rows.first[some], mode="sum", per_sample_weights=code) for side in values)]


@finding(_Ledger)
def find_redundant(
    dictionary: SparseDictionary,
    activations: Activations,
    samples_since_fired: Tensor | np.ndarray | None = None,
    dead_after: int | None = None,
    cosine: float = 0.9,
    dense_rate: float = 0.1,
    weak_share: float = 0.01,
) -> Redundancy:
    """Clusters of near-identical live latents, and which latents are dead, unseen, dense or weak, with what each contributes.

        duplicates: connected by cos(W_dec_i, W_dec_j) >= cosine, both firing on these rows
        loss = mean |e + z_i w_i|^2 - mean |e|^2 = mean(2 z_i <e, w_i> + z_i^2 |w_i|^2),   e = x_r - recon
        alone = 1 - sum |t - (z_i - mean z_i) w_i|^2 / sum |t|^2,   t = x_r - mean x_r

    `loss` is exact for the codes as they are: a TopK would let another latent in when one is removed. Two duplicates that share a code
    both look needed. Squared units of the targets. `samples_since_fired` and `dead_after` as in `check_health`; latents that fire on more
    than a tenth of the rows are the dense ones of Sun et al. 2025 (arXiv 2506.15679). Raises ValueError for settings out of range and for
    what `observe` refuses.
    """
    settings = {"samples_since_fired": samples_since_fired, "dead_after": dead_after, "cosine": cosine}
    settings |= {"dense_rate": dense_rate, "weak_share": weak_share}
    return observe(dictionary, activations, [(find_redundant, settings)])[0]
