"""Which children took their parent's latent's place? `find_absorption` looks at every parent-child edge of the truth."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.edges import KINDS, Edge, Look
from sdl_explorer.diagnosis.families import FamilySums
from sdl_explorer.diagnosis.observe import Accumulator, Rows, Stream, finding, observe
from sdl_explorer.models.dictionary import SparseDictionary


@dataclass(frozen=True, repr=False)
class Absorption:
    """What `find_absorption` found, an edge for each child of the truth, by child."""

    edges: tuple[Edge, ...]
    n_samples: int
    n_latents: int
    names: tuple[str, ...]

    def __repr__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.kinds.items() if n) or "no parent has a child"
        return f"Absorption({len(self.edges)} edges on {self.n_samples:,} rows: {kinds})"

    @property
    def kinds(self) -> dict[str, int]:
        """How many edges of each kind, in the order of KINDS."""
        count = Counter(edge.kind for edge in self.edges)
        return {kind: count[kind] for kind in KINDS}

    @property
    def eligible(self) -> tuple[Edge, ...]:
        return tuple(edge for edge in self.edges if edge.eligible)

    @property
    def eligible_fraction(self) -> float | None:
        """Share of the edges that are eligible; None where there are no edges."""
        return len(self.eligible) / len(self.edges) if self.edges else None

    @property
    def mean_gap(self) -> float | None:
        """Mean signed gap of the eligible edges; None where there are none."""
        return float(np.mean(self._gaps)) if self._gaps else None

    @property
    def max_gap(self) -> float | None:
        """Largest signed gap of the eligible edges; None where there are none."""
        return max(self._gaps, default=None)

    @property
    def _gaps(self) -> list[float]:
        return [edge.gap for edge in self.eligible if edge.gap is not None]

    def of(self, parent: int | None = None, child: int | None = None) -> tuple[Edge, ...]:
        """The edges of one parent, or of one child."""
        return tuple(edge for edge in self.edges if parent in (None, edge.parent) and child in (None, edge.child))


class _Finder(Accumulator):
    def __init__(self, stream: Stream, *, least=10, min_cosine=0.5):
        super().__init__(stream)
        truth = stream.activations.truth
        if truth is None:
            raise ValueError(
                "find_absorption looks at parents and children of the truth, and these activations have none (truth=None). "
                "Use HierarchyBench or SynthBench, or suspect_absorption, which needs no truth."
            )
        if least < 1:
            raise ValueError(f"find_absorption: least is {least}; an edge needs at least 1 row with the child and 1 without.")
        self.truth, self.least, self.min_cosine, self.n = truth, least, min_cosine, 0
        self.sums = FamilySums(stream, truth)

    def add(self, rows: Rows) -> None:
        self.n += rows.n
        self.sums.add(rows)

    def result(self) -> Absorption:
        dictionary = self.stream.dictionary
        looks = (Look(self.sums, dictionary, self.truth, e, self.least, self.min_cosine) for e in range(self.sums.n_edges))
        names = tuple(self.truth.name(i) for i in range(self.truth.n_features))
        return Absorption(tuple(look.edge() for look in looks), self.n, dictionary.n_latents, names)


@finding(_Finder)
def find_absorption(dictionary: SparseDictionary, activations: Activations, least: int = 10, min_cosine: float = 0.5) -> Absorption:
    """Does the parent's latent go silent, or weaker, when a child is active, and which latent writes the parent then?

        recall_with    = P(z_j > 0 | c_parent > 0, c_child > 0)       j: the parent's latent
        recall_without = P(z_j > 0 | c_parent > 0, c_child = 0);      gap = recall_without - recall_with
        takes_i        = E[z_i W_dec_i . u] / E[c_parent], with the child less without; what zeroing z_i removes

    where u reads the parent's direction out of the reconstruction (dual to it among parent, child and ancestors). The parent's
    latents are the decoder row nearest to its direction, if its cosine is at least `min_cosine`, and its twins (cosine 0.9); of
    those nearest within 0.01, `latent` is the one with the best F1 as a detector of the parent, then the nearest. An edge needs
    `least` rows of each condition, and a latent that fires on half of the parent's rows without the child and writes a tenth of it
    there. Absorption is told from

        split     several latents write the parent alone, and share its rows out
        hedged    the child's direction is in the parent's encoder and decoder row, both with a plus
        merged    one latent is the nearest to both, and holds them about equally
        lost      the parent's latent goes silent, and no latent writes the parent instead

    Raises ValueError where there is no truth, and for what `observe` refuses. Where no feature has a parent there are no edges.
    Chanin et al. 2024 (arXiv 2409.14507), Chanin et al. 2025 (arXiv 2505.11756); SAEBench: Karvonen et al. 2025 (arXiv 2503.09532).
    """
    return observe(dictionary, activations, [(find_absorption, {"least": least, "min_cosine": min_cosine})])[0]
