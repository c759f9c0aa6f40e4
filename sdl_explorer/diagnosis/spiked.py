"""Where spikes were put into real rows: which latents stand for one, and how often a detector's candidates are right among those.

A detector says it in its own result, from the same pass:

    self.spikes = judge_of(stream)                                                  # in its accumulator; None without spikes
    on_spikes = self.spikes and self.spikes.judge(candidates, "polysemantic")       # in result(); or "redundant", "absorbed"
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch.nn.functional import embedding_bag

from sdl_explorer.data.activations import Activations, Truth
from sdl_explorer.diagnosis.absorption import Absorption, find_absorption
from sdl_explorer.diagnosis.cofiring import CoFiring, Together, true_codes, true_directions
from sdl_explorer.diagnosis.observe import Accumulator, Rows, Stream, finding, observe
from sdl_explorer.diagnosis.proportions import Interval, wilson
from sdl_explorer.diagnosis.sparse import Csr, like, only, overlaps, row_of, row_sums
from sdl_explorer.models.dictionary import SparseDictionary

CLAIMS = ("polysemantic", "redundant", "absorbed")
STANDS = 0.5  # share of a latent's drive from which it stands for a spike
POLY = 1.5  # effective sources from which it is polysemantic, as in `trace_patterns`


@dataclass(frozen=True, repr=False)
class OnSpikes:
    """How a detector's candidates fare where the answer is known: among latents that stand for spikes.

    claim       "polysemantic" | "redundant" | "absorbed"
    hits, n     candidates that the spikes confirm, of those that they can judge
    n_unknown   candidates that they cannot judge, as no spike is behind them
    n_true, n_able     cases that are there, of all that they could tell: a detector that guesses has n_true / n_able
    """

    claim: str
    hits: int
    n: int
    n_unknown: int
    n_true: int
    n_able: int

    @property
    def precision(self) -> float | None:
        """hits / n; None where no candidate can be judged."""
        return self.hits / self.n if self.n else None

    @property
    def interval(self) -> Interval:
        """Of the precision, 95 % (Wilson)."""
        return wilson(self.hits, self.n)

    @property
    def recall(self) -> float | None:
        """hits / n_true; None where there is no case."""
        return self.hits / self.n_true if self.n_true else None

    @property
    def chance(self) -> float | None:
        """The precision of a guess; None where nothing can be told."""
        return self.n_true / self.n_able if self.n_able else None

    def __repr__(self) -> str:
        if self.precision is None:
            which = f"none of {self.n_unknown} candidates is about a spike" if self.n_unknown else "there are no candidates"
            return f"precision on spike-ins here: not known, {which}"
        low, high = self.interval
        return f"precision on spike-ins here: {self.precision:.2f} ({self.hits} of {self.n}, 95 %: {low:.2f} to {high:.2f})"

    __str__ = __repr__


@dataclass(frozen=True)
class Standing:
    """Which spike each latent stands for; arrays (n_latents,).

    spike      its number, -1 where none is behind half of what drives the latent
    share      of its drive, from that spike and its line (ancestors and descendants)
    other      of its drive, from what is no known feature
    effective  1 / (share^2 + other^2 + sum of the squares of further spikes' shares); 0 where nothing drives it
    """

    spike: Int[np.ndarray, " n_latents"]
    share: Float[np.ndarray, " n_latents"]
    other: Float[np.ndarray, " n_latents"]
    effective: Float[np.ndarray, " n_latents"]

    @property
    def known(self) -> np.ndarray:
        """Latents that stand for a spike."""
        return np.flatnonzero(self.spike >= 0)


class Spikes(Accumulator):
    """What drives each latent, known features and the rest, over the rows on which it fires.

        drive_ik = relu(<W_enc_i, w_p^k>) sum codes_k
        other_i  = relu(sum <W_enc_i, r - mean r>),   r = x_p - codes @ W_p

    The rest is summed before it is cut off at 0: rows that only happen to go along with a spike cancel.
    """

    def __init__(self, stream: Stream):
        super().__init__(stream)
        dictionary = stream.dictionary
        self.features = true_directions(stream.activations, dictionary, "spikes")
        self.cofiring, self.codes = stream.share(CoFiring), true_codes(stream.activations)
        self.sums = torch.zeros(dictionary.n_latents, dictionary.d_in, device=dictionary.device)

    def add(self, rows: Rows) -> None:
        some = rows.count.nonzero()[:, 0]
        self.sums[some] += embedding_bag(rows.entries[1], rows.inputs - self.stream.input_mean, rows.first[some], mode="sum")

    def result(self) -> tuple[Csr, Float[np.ndarray, " n_latents"]]:
        """(drive, other): CSR (n_latents, n_features) of what is above zero, and the rest of each latent."""
        return self._parts

    @cached_property
    def _parts(self) -> tuple[Csr, np.ndarray]:
        together, W_enc = self.cofiring.result(), self.stream.dictionary.W_enc
        overlap = overlaps(W_enc, self.features.inputs, together.total).astype(np.float64)
        drive = np.maximum(overlap, 0) * together.total.data
        mean = torch.as_tensor(together.strength / together.n, device=W_enc.device).float() @ self.features.inputs
        all_of_it = (W_enc.float() * self.sums).sum(dim=1).cpu().double().numpy()
        expected = (W_enc.float() @ mean).cpu().double().numpy() * together.fired
        other = all_of_it - row_sums(like(together.total, overlap * together.total.data)) + expected
        return only(like(together.total, drive), drive > 0), np.maximum(other, 0)


class Judge(Accumulator):
    """Judges candidates after the pass. A detector holds `judge_of(stream)` and asks it in its own `result()`."""

    def __init__(self, stream: Stream):
        super().__init__(stream)
        self.truth, self.spikes = _known(stream.activations), stream.share(Spikes)
        self.absorption = stream.share(find_absorption.accumulator)

    def add(self, rows: Rows) -> None:
        """What it reads is added by the accumulators that it shares."""

    def result(self) -> Standing:
        """Which latents stand for which spike."""
        return self._standing

    def judge(self, candidates: Iterable, claim: str) -> OnSpikes:
        """Latents for "polysemantic"; pairs or groups of latents for "redundant"; pairs (parent's latent, absorber) for "absorbed"."""
        if claim not in CLAIMS:
            raise ValueError(f"judge: claim is {claim!r}; it is one of {', '.join(CLAIMS)}.")
        n_latents, stands = self.stream.dictionary.n_latents, self._standing.spike >= 0
        if claim == "polysemantic":
            asked = {(int(i),) for i in candidates}
            real, n_able = {(int(i),) for i in np.flatnonzero(stands & (self._standing.effective >= POLY))}, int(stands.sum())
        elif claim == "redundant":
            asked = {pair for group in candidates for pair in combinations(sorted({int(i) for i in group}), 2)}
            real, n_able = self._redundant(), int(stands.sum()) * (int(stands.sum()) - 1) // 2
        else:
            asked = {(int(parent), int(absorber)) for parent, absorber in candidates}
            real, n_able = _absorbed(self.absorption.result()), int(stands.sum()) * (int(stands.sum()) - 1)
        outside = [i for case in asked for i in case if not 0 <= i < n_latents]
        if outside:
            raise ValueError(f"judge: latent {outside[0]} does not exist; there are {n_latents}.")
        able = {case for case in asked if case in real or any(stands[i] for i in case)}
        hits = len(able & real)
        return OnSpikes(claim, hits, len(able), len(asked) - len(able), len(real), max(n_able, len(real)))

    def _redundant(self) -> set[tuple[int, int]]:
        """Pairs of latents that stand for one spike."""
        spike, known = self._standing.spike, self._standing.known
        groups = (known[spike[known] == k] for k in np.unique(spike[known]))
        return {(int(i), int(j)) for group in groups for i, j in combinations(group, 2)}

    @cached_property
    def _standing(self) -> Standing:
        drive, other = self.spikes.result()
        together, latent = self.spikes.cofiring.result(), row_of(drive)
        total = row_sums(drive) + other
        share = drive.data / total[latent]
        spike = _nearest(drive, together)
        line = _lines(self.truth)[spike[latent], drive.indices]
        mine = np.bincount(latent, weights=share * line, minlength=len(spike))
        further = np.bincount(latent, weights=(share * ~line) ** 2, minlength=len(spike))
        rest = np.divide(other, total, out=np.zeros_like(total), where=total > 0)
        squares = mine**2 + further + rest**2
        return Standing(
            spike=np.where(mine >= STANDS, spike, -1),
            share=mine,
            other=rest,
            effective=np.divide(1.0, squares, out=np.zeros_like(squares), where=squares > 0),
        )


def judge_of(stream: Stream) -> Judge | None:
    """The judge of this pass; None where its rows carry no spikes."""
    truth = stream.activations.truth
    return None if truth is None or truth.complete else stream.share(Judge)


class _Scorer(Accumulator):
    def __init__(self, stream: Stream, *, candidates: Iterable = (), claim="polysemantic"):
        super().__init__(stream)
        self.judge, self.candidates, self.claim = stream.share(Judge), candidates, claim

    def add(self, rows: Rows) -> None:
        """What it reads is added by the judge's accumulators."""

    def result(self) -> OnSpikes:
        return self.judge.judge(self.candidates, self.claim)


@finding(_Scorer)
def precision_on_spikes(
    dictionary: SparseDictionary, activations: Activations, candidates: Iterable = (), claim: str = "polysemantic"
) -> OnSpikes:
    """How often a detector is right among the latents that stand for spikes (`SpikeIn`), in this dictionary and on these rows.

        drive_ik = relu(<W_enc_i, w_p^k>) sum codes_k over the rows on which latent i fires;  other_i the same of what is no spike

    A latent stands for the spike that it detects best (F1) if that and its line, ancestors and descendants, are half of its drive.

    "polysemantic"  ids; true where a latent that stands for a spike has 1.5 effective sources or more, the unknown rest being one
    "redundant"     pairs, or groups, of ids; true where both latents stand for one spike
    "absorbed"      pairs (parent's latent, absorber); true where `find_absorption` says so of the spikes' hierarchy

    A candidate is judged if a spike is behind one of its latents. Spikes are independent of the rows, so that nothing else can be
    redundant with them, or absorb them. That is the precision on spikes: on this data's own features it may be another one.

    Raises ValueError for rows without spikes, an unknown claim or latent, and for what `observe` refuses. Interval: Wilson 1927.
    """
    return observe(dictionary, activations, [(precision_on_spikes, {"candidates": candidates, "claim": claim})])[0]


def _known(activations: Activations) -> Truth:
    if activations.truth is None or activations.truth.complete:
        raise ValueError(
            "precision_on_spikes: these activations carry no spikes. Train on SpikeIn(source, ...), and judge on its rows; where the "
            "whole truth is known, trace_patterns, score_recovery and find_absorption give it."
        )
    return activations.truth


def _nearest(drive: Csr, together: Together) -> np.ndarray:
    """The spike that each latent detects best of those that drive it, by F1, the first of equal ones; 0 where none does."""
    latent = row_of(drive)
    count = np.asarray(together.count[latent, drive.indices]).ravel()
    f1 = 2 * count / (together.fired[latent] + together.active[drive.indices])
    best, spike = np.zeros(drive.shape[0]), np.zeros(drive.shape[0], dtype=np.int64)
    np.maximum.at(best, latent, f1)
    at = np.flatnonzero(f1 == best[latent])[::-1]  # the last one written, the first spike, stays
    spike[latent[at]] = drive.indices[at]
    return spike


def _lines(truth: Truth) -> np.ndarray:
    """bool (n_features, n_features): one is the other, its ancestor or its descendant."""
    line = np.eye(truth.n_features, dtype=bool)
    for k, above in enumerate(truth.parents):
        while above is not None:
            line[k, above] = line[above, k] = True
            above = truth.parents[above]
    return line


def _absorbed(found: Absorption) -> set[tuple[int, int]]:
    """(parent's latent, absorber) of every edge that is absorbed, in full or part."""
    edges = (edge for edge in found.edges if edge.kind in ("absorbed", "partly absorbed"))
    return {(latent, absorber.latent) for edge in edges for latent in edge.evidence.latents for absorber in edge.evidence.absorbers}
