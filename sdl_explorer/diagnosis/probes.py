"""Does a latent stand for a labelled concept, or do its children's latents write it? `score_absorption` asks SAEBench's question."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.concepts import SEPARATOR, Concepts
from sdl_explorer.diagnosis.concept_scores import ConceptAbsorption, ConceptScore, Taken
from sdl_explorer.diagnosis.cosines import unit
from sdl_explorer.diagnosis.families import MAIN_COSINE, saebench
from sdl_explorer.diagnosis.logistic import MainLatents, Probes, f1_score, fit_probes
from sdl_explorer.diagnosis.observe import Accumulator, Rows, Stream, finding, observe
from sdl_explorer.models.dictionary import SparseDictionary

LEAST_BELOW = 5  # rows of a concept below another that are looked at on their own
SHOWN = 3  # rows that are kept to be read, of each absorber


class _Scorer(Accumulator):
    def __init__(self, stream: Stream, *, of="labels", least=20, folds=5, most_main=10, f1_jump=0.03, most_rows=4_000, seed=0):
        super().__init__(stream)
        activations = stream.activations
        self.concepts, self.known = _concepts(activations, of)
        if folds < 2 or most_main < 1 or least < folds:
            raise ValueError(
                f"score_absorption: folds={folds}, most_main={most_main}, least={least}; at least 2 folds, 1 main latent, and as many "
                "rows of a concept as folds."
            )
        order = np.random.default_rng(seed).permutation(activations.n)[:most_rows]
        self.rows, self.fold = np.sort(order), np.empty(len(order), dtype=np.int64)
        self.fold[np.argsort(order)] = np.arange(len(order)) % folds
        counts = self.concepts.member[self.rows].sum(axis=0)
        self.kept = np.flatnonzero((counts >= least) & (len(self.rows) - counts >= least))
        self.n_left_out = int((counts > 0).sum()) - len(self.kept)
        self.settings = most_main, f1_jump
        self.place = torch.full((activations.n,), -1).index_put((torch.from_numpy(self.rows),), torch.arange(len(self.rows)))
        self.entries: list[tuple[np.ndarray, ...]] = []

    def add(self, rows: Rows) -> None:
        latent, row, value = (x.cpu() for x in rows.entries)
        place = self.place[row + rows.start]
        kept = place >= 0
        self.entries.append((value[kept].numpy(), place[kept].numpy(), latent[kept].numpy()))

    def result(self) -> ConceptAbsorption:
        dictionary, activations = self.stream.dictionary, self.stream.activations
        decoder = dictionary.W_dec.detach().float().cpu()
        values, place, latent = (np.concatenate(part) for part in zip(*self.entries, strict=True))
        norms = decoder.norm(dim=1).double().numpy() / dictionary.target_scale
        shape = len(self.rows), dictionary.n_latents
        codes = sparse.csr_array((values * norms[latent], (place.astype(np.int32), latent.astype(np.int32))), shape=shape)
        member = self.concepts.member[np.ix_(self.rows, self.kept)]
        targets = activations.targets[torch.from_numpy(self.rows).to(activations.targets.device)].float().cpu()
        probes = self._probes(targets, member)
        look = _Look(self.concepts, self.kept, self.rows, self.fold, member, probes, targets, codes, unit(decoder), activations)
        scores = []
        for column in range(len(self.kept)):
            self.stream.pulse()
            scores.append(look.score(column, *self.settings))
        return ConceptAbsorption(tuple(scores), activations.n, dictionary.n_latents, self.n_left_out)

    def _probes(self, targets: Tensor, member: np.ndarray) -> Probes:
        if self.known is not None:
            return Probes.known(self.known[torch.from_numpy(self.kept)], member, int(self.fold.max()) + 1)
        return fit_probes(self.stream.activations.targets, targets, member, self.fold, self.stream.pulse)


@dataclass(frozen=True, eq=False)
class _Look:
    """Everything that scoring one concept reads; `codes` are z_j |W_dec_j|, `decoder` has unit rows."""

    concepts: Concepts
    kept: np.ndarray
    rows: np.ndarray
    fold: np.ndarray
    member: np.ndarray
    probes: Probes
    targets: Tensor
    codes: sparse.csr_array
    decoder: Tensor
    activations: Activations

    def score(self, column: int, most_main: int, f1_jump: float) -> ConceptScore:
        mine, said = self.member[:, column], self.probes.positive[:, column]
        guess, fires = np.zeros_like(mine), np.zeros_like(mine)
        parts, chosen = [], []
        for fold in range(int(self.fold.max()) + 1):
            test = self.fold == fold
            main = MainLatents.choose(self.codes[~test], mine[~test], most_main, f1_jump)
            chosen.append(main.latents)
            guess[test] = main.predict(self.codes[test])
            fires[test] = main.fire(self.codes[test])
            tested = np.flatnonzero(test & mine & said)
            if len(tested):
                parts.append(self._judge(tested, self.probes.direction[fold, column], main.latents, fires[tested]))
        judged = _Judged.join(parts)
        concept = int(self.kept[column])
        return ConceptScore(
            concept=concept,
            name=self.concepts.names[concept],
            path=self.concepts.paths[concept],
            parent=self.concepts.parents[concept],
            n=int(mine.sum()),
            n_tested=len(judged.at),
            probe_f1=float(self.probes.f1[column]),
            main=_by_votes(chosen),
            main_f1=f1_score(mine, guess),
            recall=float(fires[mine].mean()),
            full=judged.mean("full"),
            fraction=judged.mean("fraction"),
            absorbers=tuple((i, n / len(judged.at)) for i, n in _counted(judged.absorber)),
            below=self._below(concept, judged),
        )

    def _judge(self, at: np.ndarray, direction: Tensor, main: Sequence[int], fired: np.ndarray) -> "_Judged":
        """SAEBench's scores of these rows, and who wrote the concept in the place of its main latents."""
        cosine = self.decoder @ direction
        writes = torch.from_numpy(self.codes[at].toarray()).float() * cosine
        projection = self.targets[torch.from_numpy(at)] @ direction
        own = writes[:, list(main)].sum(dim=1)
        writes[:, list(main)] = 0
        full, fraction = saebench(writes, cosine.expand_as(writes), own, torch.from_numpy(fired), projection)
        there = projection > 0
        full, fraction = full & there, torch.where(there, fraction, 0.0)
        largest, absorber = torch.where(cosine >= MAIN_COSINE, writes, 0).max(dim=1)
        taken = (fraction > 0) & (largest > 0)
        share = torch.where(taken, largest / projection.clamp_min(1e-12), 0.0)
        absorber = torch.where(taken, absorber, -1)
        return _Judged(at, fired, full.numpy(), fraction.numpy(), absorber.numpy(), share.numpy())

    def _below(self, concept: int, judged: "_Judged") -> tuple[Taken, ...]:
        found = []
        for child in _descendants(self.concepts, concept):
            some = judged.take(self.concepts.member[self.rows[judged.at], child])
            if len(some.at) < LEAST_BELOW:
                continue
            latent, n_taken = next(iter(_counted(some.absorber)), (-1, 0))
            lost = some.take(some.absorber == latent) if latent >= 0 else some.take(np.zeros(len(some.at), dtype=bool))
            first = tuple(int(self.rows[i]) for i in lost.at[np.argsort(-lost.share, kind="stable")][:SHOWN])
            examples = self.activations.examples
            texts = () if examples is None else tuple(examples.piece(row) for row in first)
            share = float(lost.share.mean()) if n_taken else 0.0
            name = self.concepts.names[child]
            means = float(some.fired.mean()), float(some.full.mean()), float(some.fraction.mean())
            found.append(Taken(child, name, len(some.at), *means, latent, n_taken, share, first, texts))
        return tuple(sorted(found, key=lambda one: (-one.fraction, one.recall, one.concept)))


@dataclass(frozen=True, eq=False)
class _Judged:
    """Rows that were tested, places in the chosen rows: (t,) arrays."""

    at: np.ndarray
    fired: np.ndarray
    full: np.ndarray
    fraction: np.ndarray
    absorber: np.ndarray  # -1: none
    share: np.ndarray

    @classmethod
    def join(cls, parts: "Sequence[_Judged]") -> "_Judged":
        if not parts:
            return cls(*(np.zeros(0, dtype=kind) for kind in (np.int64, bool, bool, float, np.int64, float)))
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    def take(self, chosen: np.ndarray) -> "_Judged":
        return _Judged(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

    def mean(self, name: str) -> float | None:
        return float(getattr(self, name).mean()) if len(self.at) else None


@finding(_Scorer)
def score_absorption(
    dictionary: SparseDictionary,
    activations: Activations,
    of: str = "labels",
    least: int = 20,
    folds: int = 5,
    most_main: int = 10,
    f1_jump: float = 0.03,
    most_rows: int = 4_000,
    seed: int = 0,
) -> ConceptAbsorption:
    """SAEBench's full and fractional absorption of every labelled concept, with its probe's F1 and its main latents' recall beside.

        p       unit direction of a logistic probe of the concept on the targets;  a = x_r . p
        K       its main latents: the first of an L1 logistic regression on the codes, as long as one more brings the F1 of a logistic
                regression on them alone at least `f1_jump`, at most `most_main`
        q_j     = z_j |W_dec_j| cos(W_dec_j, p), over target_scale;  M = sum of K's
        full    no latent of K fires, a > 0, and the largest q_j is at least 0.4 a, at a cosine of at least 0.025
        A       = sum of the 3 largest q_j > 0 outside K with a cosine of at least 0.1
        fraction  0 if M >= a or A < 0.4 a, 1 if M <= 0, otherwise min(A, a - M) / (min(A, a - M) + M)

    Both are means over the rows of the concept that its probe finds. Of `folds` shares of the rows, each is scored with probe and K
    fitted to the others. Concepts are the labels, and what is above one named "animal > bird" (`Concepts`), of="labels", or the true
    features with p their own directions, of="truth"; each needs `least` rows with it and without. At most `most_rows` rows are read,
    drawn by `seed`. Means of the result are over concepts with a probe F1 above 0.6: a low score with a low recall beside it is no
    merit, as an untrained dictionary's.

    Raises ValueError without labels (or truth), and for what `observe` refuses. Karvonen et al. 2025 (arXiv 2503.09532), after
    Chanin et al. 2024 (arXiv 2409.14507).
    """
    settings = {"of": of, "least": least, "folds": folds, "most_main": most_main, "f1_jump": f1_jump, "most_rows": most_rows, "seed": seed}
    return observe(dictionary, activations, [(score_absorption, settings)])[0]


def _concepts(activations: Activations, of: str) -> tuple[Concepts, Tensor | None]:
    """What the rows can be, and the directions where they are told."""
    if of == "truth":
        found = Concepts.from_truth(activations)
        return found, found.directions
    if of != "labels":
        raise ValueError(f'score_absorption: of is {of!r}; it is "labels" or "truth".')
    if activations.labels is None:
        raise ValueError(
            "score_absorption looks at labelled concepts, and these activations have no labels. Give Stored or capture labels=, "
            f'a tree as "animal{SEPARATOR}bird"; for true features pass of="truth".'
        )
    return Concepts.from_labels(activations.labels.cpu(), activations.label_names), None


def _descendants(concepts: Concepts, concept: int) -> list[int]:
    found = list(concepts.children(concept))
    for child in found:
        found += concepts.children(child)  # grows while it is read
    return sorted(found)


def _by_votes(chosen: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The latents that at least half of the folds chose, the most votes first, then the best place; else the first of all."""
    votes: dict[int, list[int]] = {}
    for latents in chosen:
        for place, latent in enumerate(latents):
            votes.setdefault(latent, []).append(place)
    order = sorted(votes, key=lambda i: (-len(votes[i]), sum(votes[i]), i))
    return tuple(i for n, i in enumerate(order) if n == 0 or 2 * len(votes[i]) >= len(chosen))


def _counted(latents: np.ndarray) -> list[tuple[int, int]]:
    """(latent, how often), the most often first; -1 is nobody."""
    ids, counts = np.unique(latents[latents >= 0], return_counts=True)
    return [(int(ids[i]), int(counts[i])) for i in np.argsort(-counts, kind="stable")]
