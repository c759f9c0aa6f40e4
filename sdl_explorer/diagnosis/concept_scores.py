"""What `score_absorption` finds: a row for each labelled concept, and for each concept below one."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

LEAST_F1 = 0.6  # of its probe: below it a concept has no direction that could be absorbed (SAEBench)


@dataclass(frozen=True)
class Taken:
    """What the rows of one concept below say of the concept above; counts are of its probe's true positives among them.

    recall           share of the n rows on which a main latent of the concept above fires
    full, fraction   SAEBench's two scores, means over these rows
    latent           the absorber of most of these rows: the largest writer of the concept that is none of its main latents; -1: none
    n_taken, share   rows whose absorber it is, and the mean share of the row's projection that it writes there
    rows, texts      up to SHOWN of those, the largest shares first: places in the activations, and what they are
    """

    concept: int
    name: str
    n: int
    recall: float
    full: float
    fraction: float
    latent: int
    n_taken: int
    share: float
    rows: tuple[int, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class ConceptScore:
    """One concept. What has no rows to be counted on is None, never a number.

    n, n_tested      rows of it, and those of them that the probe calls so too, on which both scores are means
    probe_f1         of its probe, on rows that it was not fitted to (1 where the direction is a true feature's)
    main             its main latents, those that the most folds chose first; main_f1: of a logistic regression on them
    recall           share of its n rows on which a main latent fires
    full, fraction   SAEBench's two scores
    absorbers        latent and share of the tested rows whose absorber it is, the largest share first; folds choose their own main
                     latents, so that one of `main` can be an absorber where another fold is scored
    below            the concepts below it with at least LEAST_BELOW tested rows, those that lose the most first
    """

    concept: int
    name: str
    path: str
    parent: int | None
    n: int
    n_tested: int
    probe_f1: float
    main: tuple[int, ...]
    main_f1: float
    recall: float
    full: float | None
    fraction: float | None
    absorbers: tuple[tuple[int, float], ...]
    below: tuple[Taken, ...]

    @property
    def judged(self) -> bool:
        """Has a probe of F1 above 0.6, so that its scores mean something."""
        return self.probe_f1 > LEAST_F1 and self.n_tested > 0


@dataclass(frozen=True, repr=False)
class ConceptAbsorption:
    """What `score_absorption` found, a row for each concept with enough rows, by path. `opened`: the concept whose children are shown."""

    concepts: tuple[ConceptScore, ...]
    n_samples: int
    n_latents: int
    n_left_out: int  # concepts with too few rows
    opened: int | None = None

    def __repr__(self) -> str:
        if not self.n_concepts:
            return f"ConceptAbsorption({len(self.concepts)} concepts, none with a probe of F1 above {LEAST_F1})"
        return (
            f"ConceptAbsorption({self.n_concepts} of {len(self.concepts)} concepts judged on {self.n_samples:,} rows: "
            f"full {self.mean_full:.3f}, fraction {self.mean_fraction:.3f}, recall {self.mean_recall:.2f})"
        )

    @property
    def judged(self) -> tuple[ConceptScore, ...]:
        return tuple(one for one in self.concepts if one.judged)

    @property
    def n_concepts(self) -> int:
        """How many are judged."""
        return len(self.judged)

    @property
    def mean_full(self) -> float | None:
        return self._mean("full")

    @property
    def mean_fraction(self) -> float | None:
        return self._mean("fraction")

    @property
    def mean_recall(self) -> float | None:
        """Of the main latents: a dictionary without latents for the concepts absorbs nothing either."""
        return self._mean("recall")

    def _mean(self, name: str) -> float | None:
        return float(np.mean([getattr(one, name) for one in self.judged])) if self.judged else None

    def of(self, concept: int | str) -> ConceptScore:
        """By number, path or name; of several with one name, that with the most rows."""
        meant = [one for one in self.concepts if concept in (one.concept, one.path, one.name)]
        if not meant:
            raise ValueError(
                f"score_absorption: no concept {concept!r} among {len(self.concepts)} with enough rows: "
                f"{', '.join(one.name for one in self.concepts[:12])}, ..."
            )
        return max(meant, key=lambda one: one.n)

    def children(self, concept: int | str) -> pd.DataFrame:
        """Which latents took a concept's children, with what they are: one row per concept below it, those that lose the most first."""
        return pd.DataFrame(
            [(t.name, t.n, t.recall, t.fraction, t.latent, t.n_taken, t.share, "\n".join(t.texts)) for t in self.of(concept).below],
            columns=["child", "rows", "recall", "fraction", "latent", "rows taken", "share", "examples"],
        )

    def table(self) -> pd.DataFrame:
        """One row per concept, the largest fraction first; not-a-number where nothing is known."""
        rows = [
            (one.path, one.n, one.probe_f1, one.main_f1, one.recall, one.full, one.fraction, one.main, tuple(i for i, _ in one.absorbers))
            for one in sorted(self.concepts, key=lambda one: (not one.judged, -(one.fraction or 0.0), one.path))
        ]
        names = ["concept", "rows", "probe F1", "main F1", "recall", "full", "fraction", "main latents", "absorbers"]
        return pd.DataFrame(rows, columns=names).astype({"full": float, "fraction": float})
