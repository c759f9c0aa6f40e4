"""Which latents may have taken another one's place? `suspect_absorption` needs no truth, and so it never says more than candidate."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.absorption import Absorption
from sdl_explorer.diagnosis.candidates_pairs import MOST, Codes, Contained, Containment, Near, Together, sums_of
from sdl_explorer.diagnosis.observe import Accumulator, Rows, Stream, finding, observe
from sdl_explorer.diagnosis.scores import DetectorScore, detector_scores, known_hierarchy
from sdl_explorer.diagnosis.sparse import Csr, like, row_sums
from sdl_explorer.diagnosis.spiked import OnSpikes, judge_of
from sdl_explorer.models.dictionary import SparseDictionary

ATTENUATED = 0.6  # of its usual activation, up to which a parent has gone silent or weak
COMPLETED = (0.75, 2.0)  # of the same: what parent and child write together along the parent
CROSSTALK, COHERENCE = 0.2, 0.21  # from which, on trees with known answers, most candidates are wrong (benchmarks/candidates.py)
POINTS = 200  # rows of the child, and of the parent without it, that are kept for a scatter
READS = 0.5  # of the parent's usual activation: what a row shows along it where the parent has a hole
HOLES = 1 / 3  # share of the child's rows with a hole, from which a pair is a candidate


class Candidate(NamedTuple):
    """A pair of latents in which the child may have absorbed the parent. Codes are z |W_dec|.

    score        from 0 to 1, to rank by
    reference    the parent's usual activation: sum z_p^2 / sum z_p over the rows where the child is silent
    attenuation  sum z_c z_p / sum z_c / reference: what is left of the parent where the child fires
    completion   attenuation + cosine sum z_c^2 / sum z_c / reference: what both write along the parent then; 1 is all of it
    absorbed     the child's share of that
    backwards    the completion of the same pair with the roles exchanged; None where the child is never without the parent
    n_parent, n_child, n_both    rows on which each fires
    holes        of `n_looked` rows of the child, the share that reads at least half of the reference along the parent's direction and
                 has its latent at most 0.6 of the reference
    similarity_child, similarity_parent    cosine of z_p and z_c over the rows on which the child fires, or the parent (Bricken et al. 2023)
    """

    parent: int
    child: int
    score: float
    cosine: float
    reference: float
    attenuation: float
    completion: float
    absorbed: float
    backwards: float | None
    n_parent: int
    n_child: int
    n_both: int
    holes: float
    n_looked: int
    similarity_child: float
    similarity_parent: float

    @property
    def given_child(self) -> float:
        """P(parent fires | child fires)."""
        return self.n_both / self.n_child

    @property
    def given_parent(self) -> float:
        """P(child fires | parent fires)."""
        return self.n_both / self.n_parent


class Examined(NamedTuple):
    """Every ordered pair that was looked at, with its score; 0: it cannot be judged, or the roles fit better the other way round."""

    parent: Int[np.ndarray, " n_pairs"]
    child: Int[np.ndarray, " n_pairs"]
    score: Float[np.ndarray, " n_pairs"]


@dataclass(frozen=True, repr=False)
class Suspects:
    """What `suspect_absorption` found.

    candidates     best score first, of the 1000 pairs that pass with the best scores;  n_unlooked: pairs that pass beyond those
    contained      the separate layer of containment, without candidates, most rows first, at most 1000;  n_contained counts all, on the
                   first n_together rows
    points         for each candidate (z_p, z_c), (k, 2): up to 200 rows of the child, then up to 200 of the parent alone
    examined       every pair with its score;  n_left_out: pairs as near that were not looked at
    coherence      mean |cos| of two live latents' decoder rows
    crosstalk      what other latents write along one that fires, of its code: the measured predictor of when candidates are wrong
    n_samples      rows read
    on_spikes      how often candidates are right here, among latents that stand for spike-ins; None where rows have none
    hierarchy      whether features imply each other, None where it is not known: which benches are like these rows
    """

    candidates: tuple[Candidate, ...]
    n_unlooked: int
    contained: tuple[Contained, ...]
    n_contained: int
    n_together: int
    points: tuple[Float[np.ndarray, "_ 2"], ...]
    examined: Examined
    n_left_out: int
    coherence: float
    crosstalk: float
    n_samples: int
    n_latents: int
    on_spikes: OnSpikes | None = None
    hierarchy: bool | None = None

    status = "candidate"

    def __repr__(self) -> str:
        spikes = "" if self.on_spikes is None else f"; {self.on_spikes}"
        return (
            f"Suspects({len(self.candidates)} candidates of {len(self.examined.score):,} pairs on {self.n_samples:,} rows, "
            f"crosstalk={self.crosstalk:.2f}{'' if self.reliable else ': not reliable'}{spikes})"
        )

    @property
    def reliable(self) -> bool:
        """Whether crosstalk and coherence are such that most candidates were right where the truth is known."""
        return self.crosstalk < CROSSTALK and self.coherence < COHERENCE

    @property
    def worth(self) -> DetectorScore:
        """How right candidates are on benches of this coherence, and kind where it is known, where they are `reliable`."""
        return detector_scores("absorption", self.coherence, self.hierarchy)

    @property
    def confident(self) -> bool:
        """Whether more may be said than what the codes are."""
        return self.reliable and self.worth.confident

    @property
    def forest(self) -> Int[np.ndarray, " n_latents"]:
        """Each latent's candidate parent, -1 for none: the best scores first, one parent a latent, and no circles."""
        above = np.full(self.n_latents, -1)
        for edge in self.candidates:
            at = edge.parent
            while at >= 0 and at != edge.child:
                at = above[at]
            if at < 0 and above[edge.child] < 0:
                above[edge.child] = edge.parent
        return above


class _Suspicion(Accumulator):
    def __init__(self, stream: Stream, *, least=20, min_cosine=0.2, near=32):
        super().__init__(stream)
        if least < 1 or near < 1:
            raise ValueError(f"suspect_absorption: least is {least} and near {near}; both start at 1.")
        if not 0 < min_cosine < 1:
            raise ValueError(f"suspect_absorption: min_cosine is {min_cosine:g}; give a cosine above 0 and below 1.")
        self.least, self.min_cosine, self.near, self.codes = least, min_cosine, near, stream.share(Codes)
        self.spikes = judge_of(stream)

    def add(self, rows: Rows) -> None:
        """The codes are collected by `Codes`, once for every finding that reads them."""

    def result(self) -> Suspects:
        dictionary, codes = self.stream.dictionary, self.codes.matrix()
        fired = np.diff(codes.indptr)
        live = torch.as_tensor(np.flatnonzero(fired >= self.least), device=dictionary.device)
        near = Near.of(dictionary.W_dec, live, self.min_cosine, self.near)
        scores = _Scores(codes, near, sums_of(codes, near), self.least)
        containment = Containment(codes, self.least, self.stream.pulse)
        passed = scores.passed()
        looks = [self._look(codes, near, scores, int(pair)) for pair in passed[:MOST]]
        looks = [(candidate, points) for candidate, points in looks if candidate.holes >= HOLES]
        named = {(candidate.parent, candidate.child) for candidate, _ in looks}
        contained = [pair for pair in containment.best() if (pair.outer, pair.inner) not in named]
        return Suspects(
            candidates=tuple(candidate for candidate, _ in looks),
            n_unlooked=max(0, len(passed) - MOST),
            contained=tuple(contained),
            n_contained=containment.n - len(containment.kept) + len(contained),
            n_together=containment.n_samples,
            points=tuple(points for _, points in looks),
            examined=Examined(near.i, near.j, scores.score),
            n_left_out=near.left_out,
            coherence=near.coherence,
            crosstalk=self.codes.crosstalk,
            n_samples=self.codes.n,
            n_latents=dictionary.n_latents,
            on_spikes=self.spikes and self.spikes.judge(named, "absorbed"),
            hierarchy=known_hierarchy(self.stream.activations),
        )

    def _look(self, codes: Csr, near: Near, scores: "_Scores", pair: int) -> tuple[Candidate, np.ndarray]:
        """What a candidate shows on its own rows."""
        self.stream.pulse()
        parent, child = int(near.i[pair]), int(near.j[pair])
        (with_parent, z_p), (with_child, z_c) = (_row(codes, latent) for latent in (parent, child))
        of_child = with_child[_spaced(len(with_child))]
        alone = np.setdiff1d(with_parent, with_child, assume_unique=True)
        rows = np.concatenate([of_child, alone[_spaced(len(alone))]])
        points = np.stack([_at(with_parent, z_p, rows), _at(with_child, z_c, rows)], axis=1)
        reference = scores.reference[pair]
        reads = self._reads(of_child, parent)
        holes = (reads >= READS * reference) & (points[: len(of_child), 0] <= ATTENUATED * reference)
        return scores.candidate(pair, float(holes.mean()), len(of_child)), points

    def _reads(self, rows: np.ndarray, latent: int) -> np.ndarray:
        """(target - b_dec) . w of some rows, in units of the weights."""
        dictionary = self.stream.dictionary
        targets = self.stream.activations.targets[torch.as_tensor(rows)].to(dictionary.device).float() * dictionary.target_scale
        row = dictionary.W_dec[latent].float()
        return ((targets - dictionary.b_dec.float()) @ (row / row.norm())).cpu().numpy()


@finding(_Suspicion)
def suspect_absorption(
    dictionary: SparseDictionary, activations: Activations, least: int = 20, min_cosine: float = 0.2, near: int = 32
) -> Suspects:
    """Pairs of latents (parent p, child c) that look as if c had absorbed p: where c fires p goes silent or weak, and what c writes
    along p completes it. w is a unit decoder row, z a code times its norm; both from rows that fire, weighted by activation, since
    weak firings are many and mean little.

        reference    r = sum z_p^2 / sum z_p                                 over rows where c is silent
        attenuation  a = sum z_c z_p / sum z_c / r                           at most 0.6
        completion   a + (w_c . w_p) sum z_c^2 / sum z_c / r                 between 0.75 and 2; 1 for a clean absorption of any degree
        holes        rows of c that read r / 2 along w_p, while z_p <= 0.6 r  at least a third
        score        min(completion, 1 / completion)^2 (1 - a / completion) (w_c . w_p),  0 where the roles fit better exchanged

    Only pairs with min_cosine <= w_c . w_p < 0.9 are examined (above that they are duplicates), for each latent its `near` nearest
    rows; both latents fire on at least `least` rows, the parent on as many without the child.

    Absorption cannot be identified from data alone: {f0, f1 inside f0} and the exclusive pair {f0, f0 + f1} give the same data. Hence
    every pair is a candidate, whatever its score; and where latents crowd each other (`crosstalk` from 0.2, `coherence` from 0.21)
    most are wrong: see `reliable`. `contained` has the pairs of which one fires inside the other: absorption breaks exactly those.
    Raises ValueError for least or near below 1, min_cosine outside (0, 1), and for what `observe` refuses.
    Absorption: Chanin et al. 2024 (arXiv 2409.14507); masked similarity: Bricken et al. 2023, "Towards Monosemanticity".
    """
    return observe(dictionary, activations, [(suspect_absorption, {"least": least, "min_cosine": min_cosine, "near": near})])[0]


def score_candidates(suspects: Suspects, absorption: Absorption) -> tuple[Float[np.ndarray, " n"], np.ndarray]:
    """(score, is it true) of every examined pair, where `find_absorption` knows the answer on the same rows.

    True: one of the parent's latents, and a latent that takes the parent over, of an edge that is absorbed or partly absorbed. One
    that was not examined counts as true with score 0, so that recall is not flattered.
    """
    parents, children, score = suspects.examined
    truth, missed = np.zeros(len(score), dtype=bool), 0
    for edge in absorption.edges:
        if edge.kind not in ("absorbed", "partly absorbed"):
            continue
        for absorber in edge.evidence.absorbers:
            mine = np.isin(parents, edge.evidence.latents) & (children == absorber.latent)
            truth |= mine
            missed += not mine.any()
    return np.append(score, np.zeros(missed)), np.append(truth, np.ones(missed, dtype=bool))


class _Scores:
    """The test at every pair, p = near.i and c = near.j."""

    def __init__(self, codes: Csr, near: Near, sums: Together, least: int):
        self.near, self.sums = near, sums
        totals = row_sums(codes), row_sums(like(codes, codes.data.astype(np.float64) ** 2))
        self.fired, (self.total, self.square) = np.diff(codes.indptr), totals
        p, c = near.i, near.j
        self.back = np.lexsort((p, c))  # where the same pair stands the other way round
        parent_square = sums.square_j[self.back]  # sum z_p^2 over the child's rows
        # differences of sums: rows without the child, or nothing but rounding
        enough = self.fired[p] - sums.both >= least
        self.reference = _ratio(self.square[p] - parent_square, self.total[p] - sums.of_i, enough)
        known = self.reference > 0
        self.attenuation = _ratio(sums.product, self.total[c] * self.reference, known)
        self.completion = self.attenuation + near.cosine * _ratio(self.square[c], self.total[c] * self.reference, known)
        self.absorbed = 1 - _ratio(self.attenuation, self.completion, known)
        self.known = known
        close = np.where(known, np.minimum(self.completion, _ratio(1.0, self.completion, known)), 0)
        self.fits = close > close[self.back]
        self.score = np.where(self.fits, close**2 * self.absorbed * near.cosine, 0)

    def passed(self) -> np.ndarray:
        """The pairs that pass the three numbers, best score first."""
        low, high = COMPLETED
        kept = self.fits & (self.attenuation <= ATTENUATED) & (low <= self.completion) & (self.completion <= high)
        pairs = np.flatnonzero(kept)
        return pairs[np.argsort(-self.score[pairs], kind="stable")]

    def candidate(self, pair: int, holes: float, n_looked: int) -> Candidate:
        p, c, back = int(self.near.i[pair]), int(self.near.j[pair]), int(self.back[pair])
        product, mine, other = self.sums.product[pair], self.sums.square_j[back], self.sums.square_j[pair]
        return Candidate(
            parent=p,
            child=c,
            score=float(self.score[pair]),
            cosine=float(self.near.cosine[pair]),
            reference=float(self.reference[pair]),
            attenuation=float(self.attenuation[pair]),
            completion=float(self.completion[pair]),
            absorbed=float(self.absorbed[pair]),
            backwards=float(self.completion[back]) if self.known[back] else None,
            n_parent=int(self.fired[p]),
            n_child=int(self.fired[c]),
            n_both=int(self.sums.both[pair]),
            holes=holes,
            n_looked=n_looked,
            similarity_child=_cosine(product, mine, self.square[c]),
            similarity_parent=_cosine(product, self.square[p], other),
        )


def _ratio(above, below: np.ndarray, known: np.ndarray) -> np.ndarray:
    """above / below where it is known, else 0."""
    return np.divide(above, below, out=np.zeros(len(below)), where=known & (below > 0))


def _cosine(product: float, square: float, other: float) -> float:
    return float(product / np.sqrt(square * other)) if square > 0 and other > 0 else 0.0


def _row(codes: Csr, latent: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows on which a latent fires, in order, and its codes there."""
    span = slice(codes.indptr[latent], codes.indptr[latent + 1])
    return codes.indices[span], codes.data[span]


def _at(rows: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Values at some rows, 0 where there is none."""
    place = np.searchsorted(rows, wanted)
    place[place == len(rows)] = 0
    return np.where(rows[place] == wanted, values[place], 0.0)


def _spaced(n: int) -> np.ndarray:
    """At most POINTS of n places, evenly spaced."""
    return np.unique(np.linspace(0, n - 1, min(n, POINTS)).round().astype(np.int64)) if n else np.arange(0)
