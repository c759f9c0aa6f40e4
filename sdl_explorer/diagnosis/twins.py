"""Which latents of two dictionaries are the same, which are one here and several there, and which have no counterpart."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import nnls

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.chance import Chance
from sdl_explorer.diagnosis.matching import Matcher
from sdl_explorer.diagnosis.observe import Accumulator, Rows, Stream, encoded, evaluating, finding, observe
from sdl_explorer.diagnosis.similarity import MOST_ENTRIES, Codes, Similarity
from sdl_explorer.models.dictionary import SparseDictionary

KINDS = ("shared", "split", "part", "novel", "silent")
BY = ("auto", "decoder", "activations")
PART = 0.5  # similarity from which a latent can be a part: four equal parts that exclude each other have it
MOST_PARTS = 4
AS_NEAR = 0.1  # two similarities that differ by less: neither latent is the counterpart rather than the other


@dataclass(frozen=True)
class Side:
    """One dictionary's latents against the other's; arrays (n_latents,).

    kind               one of KINDS
    best, similarity   the most similar latent of the other; -1 and 0 where either is silent
    partner            the one that it shares, one to one; -1 for none
    whole              the one that it is a part, or one more copy, of; -1 for none
    joint              its similarity with the best non-negative combination of its parts; `similarity` where it has not several
    firing_rate        share of the rows on which it fires
    """

    kind: np.ndarray
    best: Int[np.ndarray, " n_latents"]
    similarity: Float[np.ndarray, " n_latents"]
    partner: Int[np.ndarray, " n_latents"]
    whole: Int[np.ndarray, " n_latents"]
    joint: Float[np.ndarray, " n_latents"]
    firing_rate: Float[np.ndarray, " n_latents"]

    @property
    def kinds(self) -> dict[str, int]:
        """How many latents of each kind, in the order of KINDS."""
        return {kind: int((self.kind == kind).sum()) for kind in KINDS}

    @property
    def shared_fraction(self) -> float | None:
        """Share of the latents that fire which are shared; None where none fires."""
        alive = int((self.kind != "silent").sum())
        return self.kinds["shared"] / alive if alive else None

    def of(self, kind: str) -> Int[np.ndarray, " m"]:
        """The latents of one kind."""
        if kind not in KINDS:
            raise ValueError(f"Side: kind is {kind!r}; it is one of {', '.join(KINDS)}.")
        return np.flatnonzero(self.kind == kind)


@dataclass(frozen=True, repr=False)
class Twins:
    """What `find_twins` found: `here` the dictionary, `there` the other one.

    by        "decoder" or "activations": what is compared
    chance    mean best similarity of latents that have nothing in common: random decoder rows, or codes of other rows (of 1,024 latents)
    note      empty, or how rows and matching were cut down to size
    """

    by: str
    tau: float
    n_samples: int
    here: Side
    there: Side
    chance: float
    note: str

    @property
    def pairs(self) -> Int[np.ndarray, "m 2"]:
        """The shared latents, here and there."""
        shared = self.here.of("shared")
        return np.stack([shared, self.here.partner[shared]], axis=1)

    def parts(self, latent: int) -> Int[np.ndarray, " m"]:
        """The latents there that are parts of one here, or further copies of it."""
        return np.flatnonzero(self.there.whole == latent)

    def __repr__(self) -> str:
        sides = []
        for name, side in (("here", self.here), ("there", self.there)):
            kinds = ", ".join(f"{n} {kind}" for kind, n in side.kinds.items() if n)
            sides.append(f"{name} {len(side.kind)} latents: {kinds}")
        return f"Twins(by {self.by} at {self.tau:g} on {self.n_samples:,} rows, chance {self.chance:.2f}; {'; '.join(sides)})"


class _Finder(Accumulator):
    def __init__(self, stream: Stream, *, other, other_activations=None, by="auto", tau=0.7):
        super().__init__(stream)
        dictionary, activations = stream.dictionary, stream.activations
        self.other, self.tau = other, tau
        self.given = activations if other_activations is None else other_activations
        _check(dictionary, activations, other, self.given, by, tau)
        same_place = other_activations is None and dictionary.d_out == other.d_out
        self.by = by if by != "auto" else "decoder" if same_place else "activations"
        keep = self.by == "activations"
        self.codes = Codes(dictionary.n_latents, keep), Codes(other.n_latents, keep)

    def add(self, rows: Rows) -> None:
        span = slice(rows.start, rows.start + rows.n)
        inputs = self.given.inputs[span]
        given = Activations(inputs, inputs if self.given.targets is self.given.inputs else self.given.targets[span])
        if any(side.full for side in self.codes):
            return
        self.codes[0].add(rows)
        with evaluating(self.other):
            for part in encoded(self.other, given):
                self.codes[1].add(part)

    def result(self) -> Twins:
        n, here, there = min(side.n for side in self.codes), self.stream.dictionary, self.other
        like = Similarity(here, there, self.codes, n, self.by)
        near, matcher = self._search(like)
        latent, similarity = matcher.solve()
        matched = np.where((similarity >= self.tau) & near[0].alive, latent, -1)
        sides = _sides(near, matched, like, self.tau, n, self.codes)
        return Twins(
            self.by, float(self.tau), n, *sides, self._chance(like), "; ".join(note for note in (self._cut(n), matcher.note) if note)
        )

    def _cut(self, n: int) -> str:
        whole = self.stream.activations.n
        return f"correlated on the first {n:,} of {whole:,} rows: {MOST_ENTRIES:,} codes are kept" if n < whole else ""

    def _search(self, like: Similarity) -> "tuple[tuple[_Near, _Near], Matcher]":
        """Each latent's most similar one of the other side, and what a one-to-one matching needs."""
        matcher = Matcher(*like.shape, device="cpu", signs=(True,))
        here, there = (_Near.nothing(alive.numpy()) for alive in like.alive)
        for block, latents in like.blocks():
            where = latents.numpy()
            matcher.add(block, latents)
            there.best[where], there.similarity[where] = block.argmax(dim=0).numpy(), block.amax(dim=0).numpy()
            top, at = (part.numpy() for part in block.max(dim=1))
            better = top > here.similarity
            here.best[better], here.similarity[better] = where[at[better]], top[better]
            self.stream.pulse()
        return (here.cleaned(), there.cleaned()), matcher

    def _chance(self, like: Similarity) -> float:
        n_here, n_there = like.shape
        if self.by == "decoder":
            return Chance(n_there, n_here, self.other.d_out, self.other.d_out).mean_best()
        best = torch.zeros(1)
        for block in like.on_other_rows() if like.alive[0].any() else ():
            best = torch.maximum(best, block.amax(dim=1))
            self.stream.pulse()
        return float(best.mean())


@finding(_Finder)
def find_twins(
    dictionary: SparseDictionary,
    activations: Activations,
    other: SparseDictionary,
    other_activations: Activations | None = None,
    by: str = "auto",
    tau: float = 0.7,
) -> Twins:
    """Compare two dictionaries, of two runs, seeds or widths: which latents are shared, split, or novel, on both sides.

        "decoder"      similarity_ij = cos(W_dec_i, W_dec_j), signed
        "activations"  similarity_ij = correlation of z_i and z_j over the rows; for dictionaries of other places or models, which read
                       `other_activations`, the same rows there. "auto" takes it for these, and decoder rows otherwise

        shared   one to one at similarity tau or more, in the matching with the largest sum
        split    the other has several, each with this latent as its most similar and at 0.5 or more: up to four whose best non-negative
                 combination reaches tau, where the nearest alone does not, or another one is as near (within 0.1)
        part     one of these several, or one more copy of a latent that is shared
        novel    nothing there reaches tau, alone or in company;  silent: it did not fire on these rows

    Thresholds are conventions (0.7: Paulo and Belrose 2025, arXiv 2501.16615): compare with `chance`, and with two seeds of one setting.
    One latent that became more than four is called novel. Rows are encoded once by each dictionary, in blocks; codes that fire are kept
    where they are correlated, rows beyond 2**23 codes are not read, and similarities are never all there at once. `twins.here` and
    `twins.there` are the two sides.

    Raises ValueError for widths that do not fit, other numbers of rows, settings out of range, and for what `observe` refuses.
    Correlation across models: Lan et al. 2024 (arXiv 2410.06981).
    """
    settings = {"other": other, "other_activations": other_activations, "by": by, "tau": tau}
    return observe(dictionary, activations, [(find_twins, settings)])[0]


class _Near(NamedTuple):
    """Of each latent of one side: does it fire, its most similar latent of the other side, and how similar that is."""

    alive: np.ndarray
    best: np.ndarray
    similarity: np.ndarray

    @classmethod
    def nothing(cls, alive: np.ndarray) -> "_Near":
        return cls(alive, np.full(len(alive), -1, dtype=np.int64), np.full(len(alive), -np.inf, dtype=np.float32))

    def cleaned(self) -> "_Near":
        known = self.alive & np.isfinite(self.similarity)
        return _Near(self.alive, np.where(known, self.best, -1), np.where(known, self.similarity, 0))


def _sides(near, matched: np.ndarray, like: Similarity, tau: float, n: int, codes) -> tuple[Side, Side]:
    """Both sides, from each latent's most similar one and the matching of those here (-1: none)."""
    splits = [_splits(near[1 - side], near[side], like, 1 - side, tau) for side in (0, 1)]
    i = np.flatnonzero(matched >= 0)
    i = i[~splits[0].split[i] & ~splits[1].split[matched[i]]]
    partners = [np.full(len(one.alive), -1, dtype=np.int64) for one in near]
    partners[0][i], partners[1][matched[i]] = matched[i], i
    found = []
    for side in (0, 1):
        own, partner, split = near[side], partners[side], splits[side].split
        copy = own.alive & (partner < 0) & ~split & (own.similarity >= tau)
        whole = np.where(splits[1 - side].part_of >= 0, splits[1 - side].part_of, np.where(copy, own.best, -1))
        whole = np.where(split | (partner >= 0), -1, whole)
        kind = np.select([~own.alive, split, partner >= 0, whole >= 0], ["silent", "split", "shared", "part"], "novel")
        found.append(Side(kind, own.best, own.similarity, partner, whole, splits[side].joint, codes[side].count / n))
    return found[0], found[1]


class _Splits(NamedTuple):
    """Of one side: latents that are split in the other, and `joint`; of the other side: the latent that each is a part of."""

    split: np.ndarray
    joint: np.ndarray
    part_of: np.ndarray


def _splits(pieces: _Near, wholes: _Near, like: Similarity, side: int, tau: float) -> _Splits:
    """Which `wholes` several `pieces`, latents of `side`, stand for."""
    split, joint = np.zeros(len(wholes.alive), dtype=bool), wholes.similarity.copy()
    part_of = np.full(len(pieces.alive), -1, dtype=np.int64)
    able = np.flatnonzero(pieces.similarity >= PART)
    able = able[np.lexsort((able, -pieces.similarity[able], pieces.best[able]))]
    for parts in np.split(able, np.flatnonzero(np.diff(pieces.best[able])) + 1):
        if len(parts) < 2:
            continue
        parts = parts[:MOST_PARTS]
        whole, near = pieces.best[parts[0]], pieces.similarity[parts]
        joint[whole] = max(near[0], _joint(near, like.among(parts, side)))
        equal = near >= near[0] - AS_NEAR
        if joint[whole] >= tau and (near[0] < tau or equal[1]):
            split[whole], part_of[parts[equal] if equal[1] else parts] = True, whole
    return _Splits(split, joint, part_of)


def _joint(with_whole: np.ndarray, among: np.ndarray) -> float:
    """max over a >= 0 of <a, with_whole> / sqrt(a^T among a): the similarity of a latent with its parts' best combination."""
    values, vectors = np.linalg.eigh(among)
    root = np.sqrt(np.maximum(values, 0))
    kept = root > 1e-6
    turned = np.divide(vectors.T @ with_whole, root, out=np.zeros(len(root)), where=kept)
    weights, _ = nnls(np.where(kept, root, 0)[:, None] * vectors.T, turned)
    size = float(weights @ among @ weights)
    return min(1.0, float(weights @ with_whole) / size**0.5) if size > 0 else 0.0


def _check(here, activations: Activations, there, given: Activations, by: str, tau: float) -> None:
    if by not in BY:
        raise ValueError(f"find_twins: by is {by!r}; it is one of {', '.join(BY)}.")
    if not 0 < tau <= 1:
        raise ValueError(f"find_twins: tau is {tau}; it is a similarity above 0, at most 1.")
    if given.n != activations.n:
        raise ValueError(
            f"find_twins: {activations.n} rows here and {given.n} in other_activations; give the same rows, read in both places."
        )
    widths = (given.inputs.shape[1], given.targets.shape[1])
    if widths != (there.d_in, there.d_out):
        raise ValueError(
            f"find_twins: the other dictionary reads {there.d_in} and writes {there.d_out} columns, and its rows have {widths[0]} and "
            f"{widths[1]}. Pass other_activations=, the same rows of the place that it was trained on."
        )
    if by == "decoder" and here.d_out != there.d_out:
        raise ValueError(f"find_twins: decoder rows of {here.d_out} and {there.d_out} columns have no cosine. Use by='activations'.")
