"""One parent-child edge: the numbers that `find_absorption` shows, and what they say."""

from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from sdl_explorer.data.activations import Truth
from sdl_explorer.diagnosis.families import FULL_COSINE, FamilySums
from sdl_explorer.diagnosis.proportions import Interval, Z, newcombe, wilson
from sdl_explorer.models.dictionary import SparseDictionary

KINDS = ("absorbed", "partly absorbed", "split", "hedged", "merged", "lost", "none", "not eligible")
DETECTS = 0.5  # recall without the child from which a latent is one of the parent
TAKEN = 0.2  # share of the parent's part, or of its rows, from which a change is named
MOSTLY = 0.5  # the same from which it is the rule
TRACE = 0.1  # share of the parent, or of what its latents write otherwise, up to which they are as good as silent
MIXED = 0.1  # a child's coefficient, relative to the parent's, from which a row holds the child too
EQUAL = 0.5  # the same from which a row is as much the child's as the parent's


class Absorber(NamedTuple):
    """A latent that writes more of the parent when the child is active, and what it is made of.

    takes      of the parent's activation: what zeroing its code removes of the parent's part, less what it removes without the child
    left       the parent's part of the reconstruction, of the parent's activation, with this latent's code at zero
    parent_part, child_part, residual     W_dec_j / |W_dec_j| = parent_part * parent + child_part * child + ancestors' parts + rest:
               coefficients >= 0 (non-negative least squares), and the norm of the rest
    """

    latent: int
    takes: float
    left: float
    parent_part: float
    child_part: float
    residual: float


class Contrast(NamedTuple):
    """Rows on which the parent is active: with the child (on) against without it (off).

    siblings        whether these are all such rows; where enough of them have no sibling active, they alone count
    n_on, n_off     how many
    latent_on, latent_off       share of them on which `latent` fires
    recall_on, recall_off       share on which any of the parent's latents fires;  drop_interval: recall_off - recall_on, Newcombe
    own_on, own_off             what these latents write along the parent, of its activation;  lost_interval: own_off - own_on, 95 %
    written_on, written_off     what all latents write along the parent, of its activation
    full, fraction              SAEBench's scores on the rows with the child; `fraction_off` the second on the others
    """

    siblings: bool
    n_on: int
    n_off: int
    latent_on: float
    latent_off: float
    recall_on: float
    recall_off: float
    drop_interval: Interval
    own_on: float
    own_off: float
    lost_interval: Interval
    written_on: float
    written_off: float
    full: float
    fraction: float
    fraction_off: float


class Evidence(NamedTuple):
    """The numbers behind an edge's kind; None where there is no row or no latent to take them from.

    hits_with, hits_without     rows on which the parent's latent fires, of n_with and n_without
    recall_with_interval, recall_without_interval, gap_interval      95 %, Wilson and Newcombe
    n_alone         rows with the parent and none of its children
    latents         the parent's latents: the nearest decoder row, and those with a cosine of at least 0.9 with it
    cosine          of `latent`'s decoder row with the parent's direction
    contrast        what the parent's latents do with the child and without
    absorbers       the latents that write more of the parent when the child is active, largest first
    share           what absorbers take, of that and what the parent's latents write with the child
    child_latent    the latent nearest to the child's direction;  leak: its decoder's cosine with the parent's
    hole            cos(W_enc_latent, child): negative where the parent's latent avoids the child
    encoder_child, decoder_child     the child's coefficient in `latent`'s rows, in units of the parent's (least squares on the lineage)
    """

    hits_with: int
    hits_without: int
    recall_with_interval: Interval
    recall_without_interval: Interval
    gap_interval: Interval
    n_alone: int
    latents: tuple[int, ...]
    cosine: float | None
    contrast: Contrast | None
    absorbers: tuple[Absorber, ...]
    share: float
    child_latent: int
    leak: float
    hole: float | None
    encoder_child: float | None
    decoder_child: float | None


class Edge(NamedTuple):
    """A parent and one of its children.

    latent          the parent's, -1 for none
    recall_with, recall_without     share of the rows with the parent active, and the child active or silent, on which `latent` fires
    gap             recall_without - recall_with, signed
    eligible        whether both stand on enough rows and a latent detects the parent without this child; else `why` says
    absorber        the latent that takes over, -1 for none
    kind            one of KINDS, and `why` in words
    """

    parent: int
    child: int
    latent: int
    recall_with: float | None
    recall_without: float | None
    n_with: int
    n_without: int
    gap: float | None
    eligible: bool
    absorber: int
    kind: str
    why: str
    evidence: Evidence


def judge(seen: Evidence, n_with: int, n_without: int, least: int) -> tuple[str, str]:
    """The kind of an edge, and why."""
    for n, which in ((n_with, "with"), (n_without, "without")):
        if n < least:
            return "not eligible", f"{n} rows have the parent {which} the child; {least} are needed"
    rows = seen.contrast
    if rows is None:
        return "not eligible", "no latent's decoder row is near enough to the parent"
    latent, others = seen.latents[0], _takers(seen.absorbers)
    if rows.recall_off < DETECTS or rows.own_off < TRACE:
        if _never_alone(seen):
            return "absorbed", f"the parent is never alone, latent {latent} is not used for it, and {others} {seen.share:.0%} of it"
        where = "with the parent and without the child"
        return (
            "not eligible",
            f"latent {latent} fires on {rows.recall_off:.0%} of the rows {where} and writes {rows.own_off:.2f} of it there",
        )
    if seen.child_latent in seen.latents and _at_least(seen.decoder_child, EQUAL):
        return "merged", f"latent {seen.child_latent} is the nearest to both and holds {seen.decoder_child:.2f} of the child per parent"
    weaker = rows.own_on <= (1 - TAKEN) * rows.own_off and rows.lost_interval.low > 0
    if weaker and seen.share >= TAKEN:
        return _taken(seen, rows, others)
    if weaker and rows.written_on <= (1 - TAKEN) * rows.written_off:
        return "lost", f"with the child active {rows.written_on:.2f} of the parent is written ({rows.written_off:.2f} without it)"
    if max(rows.recall_on - rows.latent_on, rows.recall_off - rows.latent_off) >= TAKEN:
        return (
            "split",
            f"{len(seen.latents)} latents share the parent's rows: any fires on {rows.recall_on:.0%}, {latent} on {rows.latent_on:.0%}",
        )
    if _at_least(seen.encoder_child, MIXED) and _at_least(seen.decoder_child, MIXED):
        return "hedged", f"per parent, latent {latent} reads {seen.encoder_child:.2f} and writes {seen.decoder_child:.2f} of the child"
    return "none", f"the parent's latents write {rows.own_on:.2f} of it with the child active and {rows.own_off:.2f} without"


def _taken(seen: Evidence, rows: Contrast, others: str) -> tuple[str, str]:
    """The parent's latents write less with the child, and other latents more."""
    taker = seen.absorbers[0]
    if taker.child_part < MIXED * taker.parent_part:
        return "split", f"latent {taker.latent} writes the parent alone and takes {seen.share:.0%} of it when the child is active"
    silent = rows.recall_on < 1 - MOSTLY and rows.drop_interval.low > 0 and seen.share >= MOSTLY
    kind = "absorbed" if silent or rows.own_on <= TRACE * rows.own_off else "partly absorbed"
    return kind, (
        f"with the child active the parent's latents fire on {rows.recall_on:.0%} of the rows ({rows.recall_off:.0%} without it) and "
        f"write {rows.own_on:.2f} of the parent ({rows.own_off:.2f}); {others} {seen.share:.0%}"
    )


def _never_alone(seen: Evidence) -> bool:
    """Each row of the parent has a child, and its absorbers write it: a latent of its own had nothing left to show."""
    if seen.n_alone > 0 or seen.share < MOSTLY:
        return False
    return seen.absorbers[0].child_part >= MIXED * seen.absorbers[0].parent_part


def _takers(absorbers: tuple[Absorber, ...]) -> str:
    ids = ", ".join(str(a.latent) for a in absorbers)
    return f"latent {ids} takes" if len(absorbers) == 1 else f"latents {ids} take"


def _at_least(value: float | None, bound: float) -> bool:
    return value is not None and value >= bound


class Look:
    """One edge's numbers, from the sums of a pass."""

    def __init__(self, sums: FamilySums, dictionary: SparseDictionary, truth: Truth, e: int, least: int, min_cosine: float):
        self.sums, self.dictionary, self.e, self.least = sums, dictionary, e, least
        self.parent, self.child = (int(ids[e]) for ids in (sums.family.parent, sums.family.child))
        lineage = list(sums.family.lineage[e])
        self.inputs, self.targets = (_double(side[lineage]) for side in (truth.input_features, truth.target_features))
        self.candidates, self.cosines, places = (part[e].cpu().numpy() for part in (sums.of.latents, sums.of.cosine, sums.of.main))
        self.places = places[places >= 0] if self.cosines[0] >= min_cosine else places[:0]
        if self.places.size:
            self.places = self.places[self._order()]
        enough = min(self._sum("n", "only"), self._sum("n", "alone")) >= least
        self.on, self.off = ("only", "alone") if enough else ("with", "without")

    def edge(self) -> Edge:
        n_with, n_without = int(self._sum("n", "with")), int(self._sum("n", "without"))
        seen = self._evidence(n_with, n_without)
        recall_with = seen.hits_with / n_with if n_with and seen.latents else None
        recall_without = seen.hits_without / n_without if n_without and seen.latents else None
        kind, why = judge(seen, n_with, n_without, self.least)
        return Edge(
            parent=self.parent,
            child=self.child,
            latent=seen.latents[0] if seen.latents else -1,
            recall_with=recall_with,
            recall_without=recall_without,
            n_with=n_with,
            n_without=n_without,
            gap=None if recall_with is None or recall_without is None else recall_without - recall_with,
            eligible=kind != "not eligible",
            absorber=seen.absorbers[0].latent if kind in ("absorbed", "partly absorbed") else -1,
            kind=kind,
            why=why,
            evidence=seen,
        )

    def _evidence(self, n_with: int, n_without: int) -> Evidence:
        known = self.places.size > 0
        hits = {cells: int(self._sum("fired", cells)[self.slot]) if known else 0 for cells in ("with", "without")}
        n_with, n_without = (n_with, n_without) if known else (0, 0)
        contrast, absorbers = self._contrast(), self._absorbers()
        takes = sum(absorber.takes for absorber in absorbers)
        read, written = self._row(self.dictionary.W_enc), self._row(self.dictionary.W_dec)
        child_latent = int(self.sums.of.child[self.e])
        return Evidence(
            hits_with=hits["with"],
            hits_without=hits["without"],
            recall_with_interval=wilson(hits["with"], n_with),
            recall_without_interval=wilson(hits["without"], n_without),
            gap_interval=newcombe(hits["without"], n_without, hits["with"], n_with),
            n_alone=int(self._sum("n", "alone")),
            latents=tuple(int(i) for i in self.candidates[self.places]),
            cosine=float(self.cosines[self.places[0]]) if known else None,
            contrast=contrast,
            absorbers=absorbers,
            share=takes / (takes + max(contrast.own_on if contrast else 0.0, 0.0)) if absorbers else 0.0,
            child_latent=child_latent,
            leak=_cosine(_double(self.dictionary.W_dec[child_latent]), self.targets[0]),
            hole=None if read is None else _cosine(read, self.inputs[1]),
            encoder_child=None if read is None else _relative(self.inputs, read),
            decoder_child=None if written is None else _relative(self.targets, written),
        )

    def _contrast(self) -> Contrast | None:
        n_on, n_off = (int(self._sum("n", cells)) for cells in (self.on, self.off))
        if not (self.places.size and n_on and n_off):
            return None
        share = lambda name, cells: float(self._sum(name, cells) / self._sum("n", cells))
        part = lambda name, cells: float(self._sum(name, cells) / self._sum("activation", cells))
        own_on, own_off = part("main", self.on), part("main", self.off)
        return Contrast(
            siblings=self.on == "with",
            n_on=n_on,
            n_off=n_off,
            latent_on=float(self._sum("fired", self.on)[self.slot]) / n_on,
            latent_off=float(self._sum("fired", self.off)[self.slot]) / n_off,
            recall_on=share("any", self.on),
            recall_off=share("any", self.off),
            drop_interval=newcombe(float(self._sum("any", self.off)), n_off, float(self._sum("any", self.on)), n_on),
            own_on=own_on,
            own_off=own_off,
            lost_interval=self._lost_interval(own_on, own_off),
            written_on=part("written", self.on),
            written_off=part("written", self.off),
            full=share("full", self.on),
            fraction=share("fraction", self.on),
            fraction_off=share("fraction", self.off),
        )

    def _order(self) -> np.ndarray:
        """The parent's latents, the one that detects it best first: of the nearest (within 0.01) by F1, then by cosine and id."""
        self.slot = 0
        hits = (self._sum("fired", "with") + self._sum("fired", "without"))[: len(self.places)]
        active = self._sum("n", "with") + self._sum("n", "without")
        f1 = 2 * hits / np.maximum(self.sums.count.numpy()[self.candidates[self.places]] + active, 1)
        further = self.cosines[self.places] < self.cosines[self.places].max() - 0.01
        order = np.lexsort((self.candidates[self.places], -self.cosines[self.places], -np.round(f1, 9), further))
        self.slot = int(order[0])
        return order

    def _sum(self, name: str, cells: str):
        return self.sums.over(name, cells)[self.e]

    def _lost_interval(self, own_on: float, own_off: float) -> Interval:
        """Of a difference of two ratios sum m / sum c, by linearisation (Cochran 1977, chapter 2)."""
        variance = 0.0
        for cells, own in ((self.on, own_on), (self.off, own_off)):
            spread = self._sum("main_square", cells) - 2 * own * self._sum("main_activation", cells)
            spread += own**2 * self._sum("activation_square", cells)
            variance += max(float(spread), 0.0) / float(self._sum("activation", cells)) ** 2
        lost, half = own_off - own_on, Z * variance**0.5
        return Interval(lost - half, lost + half)

    def _absorbers(self) -> tuple[Absorber, ...]:
        """Latents that are not the parent's and write at least MIXED of it more when the child is active."""
        activation = [float(self._sum("activation", cells)) for cells in (self.on, self.off)]
        if activation[0] == 0:
            return ()
        on = self._sum("taken", self.on) / activation[0]
        takes = on - (self._sum("taken", self.off) / activation[1] if activation[1] else 0)
        takes[self.places] = 0
        takes[self.cosines < FULL_COSINE] = 0
        left = float(self._sum("written", self.on)) / activation[0] - on
        chosen = [place for place in np.lexsort((self.candidates, -takes)) if takes[place] >= MIXED]
        return tuple(self._absorber(int(self.candidates[i]), float(takes[i]), float(left[i])) for i in chosen)

    def _absorber(self, latent: int, takes: float, left: float) -> Absorber:
        row = _double(self.dictionary.W_dec[latent])
        parts, residual = nnls(self.targets.T, row / np.linalg.norm(row))
        return Absorber(latent, takes, left, float(parts[0]), float(parts[1]), float(residual))

    def _row(self, rows) -> np.ndarray | None:
        """`latent`'s, of the encoder or the decoder."""
        return _double(rows[int(self.candidates[self.places[0]])]) if self.places.size else None


def _double(rows) -> np.ndarray:
    return rows.detach().cpu().double().numpy()


def _cosine(row: np.ndarray, direction: np.ndarray) -> float:
    norm = np.linalg.norm(row)
    return float(row @ direction / norm) if norm > 0 else 0.0


def _relative(lineage: np.ndarray, row: np.ndarray) -> float | None:
    """The second coefficient in units of the first; None where the first is not positive."""
    parts = np.linalg.lstsq(lineage.T, row, rcond=None)[0]
    return float(parts[1] / parts[0]) if parts[0] > 0 else None
