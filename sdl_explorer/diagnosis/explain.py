"""What is wrong, why, and what could be done? `explain` turns findings into at most five verdicts, the most harmful first."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Pins
from sdl_explorer.diagnosis.absorption import find_absorption
from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.diagnosis.candidates import suspect_absorption
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.diagnosis.meanings import suspect_polysemantic
from sdl_explorer.diagnosis.observe import Accumulator, Rows, Stream, finding, observe
from sdl_explorer.diagnosis.patterns import trace_patterns
from sdl_explorer.diagnosis.recovery import score_recovery
from sdl_explorer.diagnosis.theory import check_theory
from sdl_explorer.diagnosis.verdict import THEOREMS, Verdict, some
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.training.firings import copies
from sdl_explorer.training.interventions import Resample
from sdl_explorer.training.realign import Realign, refusal
from sdl_explorer.training.split import Split
from sdl_explorer.training.unabsorb import Unabsorb

MOST = 5  # verdicts
PART = 0.2  # share of a latent's drive from which a feature is one of its own
EXPLAINED = 0.01  # unexplained variance below which dead latents lack nothing to do
AGREES, DISAGREES = 0.95, 0.85  # cosine of a row with its response
LEAST = 1e-3  # harm that is told


class _Explainer(Accumulator):
    """The findings that verdicts are made of, fed together."""

    def __init__(self, stream: Stream, *, samples_since_fired=None, dead_after=None, pins=None, tau=0.9, theory=False):
        super().__init__(stream)
        truth = stream.activations.truth
        self.tau, self.dead_after, self.pinned = tau, dead_after, set() if pins is None else set(pins.latents.tolist())
        counts = {"samples_since_fired": samples_since_fired, "dead_after": dead_after}
        asked: dict[Any, dict[str, Any]] = {check_health: counts}
        self.known = truth is not None and truth.complete  # of spikes alone nothing follows for the other latents
        if not self.known:
            asked |= {suspect_polysemantic: {}, suspect_absorption: {}}
        if truth is not None and self.known:
            asked |= {trace_patterns: counts, score_recovery: {"tau": tau, "match": False}, align: {"pins": pins, "match": False}}
            if any(parent is not None for parent in truth.parents):
                asked[find_absorption] = {}
            if theory:
                asked[check_theory] = {"pins": pins}
        self.parts = {of: stream.ask(of, settings, whatever=("match",)) for of, settings in asked.items()}

    def add(self, rows: Rows) -> None:
        """The findings are fed by the stream, once for all who ask for them."""

    def result(self) -> list[Verdict]:
        found = {of: part.result() for of, part in self.parts.items()}
        verdicts = list(Known(self, found).verdicts() if self.known else Guessed(self, found).verdicts())
        return sorted((v for v in verdicts if v.harm >= LEAST), key=lambda v: -v.harm)[:MOST]


class _Case:
    """What both ways of judging share."""

    def __init__(self, asked: _Explainer, found: dict[Any, Any]):
        self.asked, self.dictionary, self.health = asked, asked.stream.dictionary, found[check_health]
        self.found = found
        self.dead = self._free(self.health.dead)
        cards = found.get(check_theory, ())
        self.cards = {card.id: card for card in cards}

    def theorem(self, of: str) -> str:
        card, text = THEOREMS[of]
        here = self.cards.get(card)
        return text if here is None else f"{text}. Checked here ({card}): {here.verdict}"

    def restart(self, latents: tuple[int, ...] | None) -> Resample:
        """From what is not explained yet, and long enough to win a place where latents compete for k."""
        competing = hasattr(self.dictionary.nonlinearity, "k")
        named = None if latents is None else list(latents)
        return Resample(latents=named, target="residual", scale=1.0 if competing else Resample.param.scale.default)

    def dead_ones(self) -> Resample:
        """By name where the rows at hand are all that is known of them."""
        return self.restart(self.dead if self.asked.dead_after is None else None)

    def _free(self, mask) -> tuple[int, ...]:
        return tuple(int(i) for i in np.flatnonzero(mask) if int(i) not in self.asked.pinned)


class Known(_Case):
    """With the truth: each cause by the features that it costs."""

    def verdicts(self) -> Iterator[Verdict]:
        self.recovery, self.patterns, self.alignment = (self.found[f] for f in (score_recovery, trace_patterns, align))
        self.tau, self.n = self.asked.tau, self.recovery.n_features
        self.missing = set(np.flatnonzero(self.recovery.best_cosine < self.tau).tolist())
        self.copied = self._free(self.recovery.copy)
        self.edges = self._edges()
        yield from self._absorbed()
        yield from self._merged()
        yield from self._dead()
        yield from self._copies()
        yield from self._encoder()

    def _missed(self) -> str:
        return f"{len(self.missing)} of {self.n} features have no decoder row at cosine {self.tau:g}"

    def _dead(self) -> Iterator[Verdict]:
        if self.dead and self.missing:
            n = self.health.n_latents
            silent = f"{len(self.dead)} of {n} latents have not fired in {self.asked.dead_after or self.health.n_samples:,} samples"
            claim = f"{some(self.dead, 'latent is', 'latents are')} dead while {some(self.missing, 'feature is', 'features are')} missed."
            harm = min(len(self.dead), len(self.missing)) / self.n
            yield self._verdict("dead", claim, (silent, self._missed()), self.dead_ones(), harm, self.dead, self.missing)

    def _copies(self) -> Iterator[Verdict]:
        if self.copied and self.missing:
            features = {int(self.recovery.feature[i]) for i in self.copied}
            claim = (
                f"{some(self.copied, 'latent is a copy', 'latents are copies')} of what another one writes better, while "
                f"{some(self.missing, 'feature is', 'features are')} missed."
            )
            evidence = (f"{len(features)} features have two or more latents at cosine {self.tau:g}", self._missed())
            harm = min(len(self.copied), len(self.missing)) / self.n
            yield self._verdict("copies", claim, evidence, self.restart(self.copied), harm, self.copied, self.missing)

    def _merged(self) -> Iterator[Verdict]:
        absorbers = {edge.absorber for edge in self.edges}
        held = {i: self._holds(i) for i in self._free(self.patterns.status == "poly") if i not in absorbers}
        held = {i: features for i, features in held.items() if len(features) > 1}
        spares = [i for i in self._spares() if i not in held][: len(held)]
        if not held or not spares:
            return
        features = set().union(*held.values())
        worst = max(held, key=lambda i: (len(held[i]), -i))
        names = ", ".join(self.recovery.names[f] for f in sorted(held[worst]))
        claim = f"{some(held, 'latent stands', 'latents stand')} for two features or more, which have no latent of their own."
        evidence = (
            f"latent {worst} is driven by {names} ({self.patterns.effective_features[worst]:.1f} effective features)",
            f"{len(spares)} latents are spare: dead, or copies of others",
            self._missed(),
        )
        advice = Split(latents=list(held), spares=spares, gain=0.05)
        yield self._verdict("merged", claim, evidence, advice, len(features) / self.n, tuple(held), features)

    def _holds(self, latent: int) -> set[int]:
        """Its own features that no decoder row has."""
        share = self.patterns.share
        span = slice(share.indptr[latent], share.indptr[latent + 1])
        return set(share.indices[span][share.data[span] >= PART].tolist()) & self.missing

    def _spares(self) -> tuple[int, ...]:
        silent = self._free(self.health.unseen)
        return tuple(dict.fromkeys([*self.dead, *silent, *self.copied]))

    def _edges(self) -> list:
        """Absorbed edges with one parent for each absorber, and nobody on both sides."""
        found = self.found.get(find_absorption)
        edges, absorbers, parents = [], set(), set()
        for edge in sorted(found.edges if found else (), key=lambda e: -(e.gap or 0)):
            named = "absorbed" in edge.kind and edge.latent >= 0 and edge.absorber >= 0 and edge.latent != edge.absorber
            free = edge.absorber not in absorbers | parents | self.asked.pinned and edge.latent not in absorbers | self.asked.pinned
            if named and free:
                edges.append(edge)
                absorbers.add(edge.absorber)
                parents.add(edge.latent)
        return edges

    def _absorbed(self) -> Iterator[Verdict]:
        if not self.edges or self.dictionary.tied:
            return
        concerned = {f for edge in self.edges for f in (edge.parent, edge.child)}
        silent = sum(max(edge.gap or 0.0, 0.0) * edge.n_with / max(edge.n_with + edge.n_without, 1) for edge in self.edges)
        worst, names = self.edges[0], self.recovery.names
        claim = (
            f"{some(self.edges, 'latent has', 'latents have')} absorbed a parent: it is written beside their own feature, and its latent "
            "keeps silent."
        )
        evidence = (
            f"latent {worst.latent} ({names[worst.parent]}) fires on {worst.recall_with:.0%} of its rows with {names[worst.child]} active "
            f"and on {worst.recall_without:.0%} without; latent {worst.absorber} takes over",
            f"{len(concerned & self.missing)} of these {len(concerned)} features have no decoder row at cosine {self.tau:g}",
        )
        absorbers, parents = [int(edge.absorber) for edge in self.edges], [int(edge.latent) for edge in self.edges]
        advice, harm = Unabsorb(latents=absorbers, parents=parents), (len(concerned & self.missing) + silent) / self.n
        yield self._verdict("absorbed", claim, evidence, advice, harm, tuple(dict.fromkeys([*absorbers, *parents])), concerned)

    def _encoder(self) -> Iterator[Verdict]:
        written, read = self.recovery.best_cosine >= self.tau, self.alignment.encoder >= self.tau
        fired = self.alignment.response >= self.tau
        features = np.flatnonzero(written & ~read & fired)
        latents = tuple(int(i) for i in np.unique(self.recovery.best_latent[features]) if int(i) not in self.asked.pinned)
        if not latents or refusal(self.dictionary):
            return
        claim = f"{some(features, 'feature is', 'features are')} in a decoder row and in what fires it, and in no encoder row."
        agree = np.median(self.health.encoder_response[list(latents)])
        evidence = (
            f"at cosine {self.tau:g}, decoder rows have {written.mean():.0%} of the features, responses {fired.mean():.0%}, encoder rows "
            f"{read.mean():.0%}",
            f"the encoder rows of these {len(latents)} latents have a median cosine of {agree:.2f} with their own responses",
        )
        advice, harm = Realign(latents=list(latents), least=20), len(features) / self.n
        yield self._verdict("encoder", claim, evidence, advice, harm, latents, set(features.tolist()), "encoder")

    def _verdict(self, of, claim, evidence, advice, harm, latents, features, side="decoder") -> Verdict:
        return Verdict(of, claim, evidence, self.theorem(of), advice, float(harm), side, tuple(latents), tuple(sorted(features)))


class Guessed(_Case):
    """Without it: what the dictionary and its own behaviour show."""

    def verdicts(self) -> Iterator[Verdict]:
        self.twins = tuple(i for i in copies(self.dictionary) if i not in self.asked.pinned and self.health.alive[i])
        yield from self._absorbed()
        yield from self._merged()
        yield from self._dead()
        yield from self._copies()
        yield from self._encoder()

    def _absorbed(self) -> Iterator[Verdict]:
        suspects, pairs = self.found[suspect_absorption], {}
        for edge in suspects.candidates if suspects.confident and not self.dictionary.tied else ():
            taken = self.asked.pinned | set(pairs) | set(pairs.values())
            if edge.child not in taken and edge.parent not in self.asked.pinned | set(pairs):
                pairs[int(edge.child)] = int(edge.parent)
        if not pairs:
            return
        claim = f"{some(pairs, 'latent is a candidate', 'latents are candidates')} for having absorbed another one's feature."
        best = suspects.candidates[0]
        evidence = (
            f"where latent {best.child} fires, latent {best.parent} has {best.attenuation:.0%} of its usual activation left, and both "
            f"together write {best.completion:.0%} of it (score {best.score:.2f})",
            f"crosstalk is {suspects.crosstalk:.2f}, coherence {suspects.coherence:.2f}; a pair that excludes itself gives the same data",
            str(suspects.worth),
        )
        advice = Unabsorb(latents=list(pairs), parents=list(pairs.values()))
        yield self._verdict("absorbed", claim, evidence, advice, tuple(dict.fromkeys([*pairs, *pairs.values()])))

    def _merged(self) -> Iterator[Verdict]:
        found = self.found[suspect_polysemantic]
        held = self._free(found.candidate)
        spares = tuple(i for i in dict.fromkeys([*self.dead, *self._free(self.health.unseen), *self.twins]) if i not in held)[: len(held)]
        if held and spares and found.worth.confident:
            claim = f"{some(held, 'latent is a candidate', 'latents are candidates')} for two meanings, and {len(spares)} others are spare."
            worst = max(held, key=lambda i: found.score[i])
            evidence = (f"the rows that fire latent {worst} are of two kinds (score {found.score[worst]:.2f})", found.reading)
            yield self._verdict("merged", claim, evidence, Split(latents=list(held), spares=list(spares), gain=0.05), held)

    def _dead(self) -> Iterator[Verdict]:
        left = self.health.unexplained_variance
        if self.dead and left > EXPLAINED:
            claim = f"{len(self.dead)} of {self.health.n_latents} latents are dead while {left:.1%} of the variance is unexplained."
            silent = f"they have not fired in {self.asked.dead_after or self.health.n_samples:,} samples"
            yield self._verdict("dead", claim, (silent,), self.dead_ones(), self.dead, candidate=False)

    def _copies(self) -> Iterator[Verdict]:
        if self.twins:
            twins = self.twins
            claim = f"{some(twins, 'candidate for a copy', 'candidates for copies')}: both rows point where another latent's do."
            evidence = ("both rows have a cosine of at least 0.95 with those of another latent; what they mean is not known",)
            yield self._verdict("copies", claim, evidence, self.restart(twins), twins)

    def _encoder(self) -> Iterator[Verdict]:
        health = self.health
        off = health.alive & (health.encoder_response < DISAGREES) & (health.decoder_response > AGREES)
        latents = self._free(off & (health.firing_rate * health.n_samples >= 100))
        if not latents or refusal(self.dictionary):
            return
        claim = f"{some(latents, 'candidate', 'candidates')} for a wrong encoder: fired by what is written, and reading something else."
        evidence = (
            f"median cosine with the response: encoder {np.median(health.encoder_response[list(latents)]):.2f}, decoder "
            f"{np.median(health.decoder_response[list(latents)]):.2f}",
            "where features overlap an encoder row may differ from its response for a good reason",
        )
        yield self._verdict("encoder", claim, evidence, Realign(latents=list(latents), least=20), latents, "encoder")

    def _verdict(self, of, claim, evidence, advice, latents, side="decoder", candidate=True) -> Verdict:
        harm = len(latents) / self.health.n_latents
        return Verdict(of, claim, tuple(evidence), self.theorem(of), advice, harm, side, tuple(latents), (), candidate)


@finding(_Explainer)
def explain(
    dictionary: SparseDictionary,
    activations: Activations,
    samples_since_fired: torch.Tensor | np.ndarray | None = None,
    dead_after: int | None = None,
    pins: Pins | None = None,
    tau: float = 0.9,
    theory: bool = False,
) -> list[Verdict]:
    """At most five verdicts, the most harmful first: a claim, its evidence, the theorem behind it, and an intervention.

        absorbed   a child's latent writes its parent too, and the parent's own latent keeps silent      Unabsorb
        merged     a latent stands for features that have no latent of their own, and others are spare   Split
        dead       latents that never fire, while features are missed                                    Resample
        copies     latents that write what another one writes, while features are missed                 Resample
        encoder    features that a decoder row and its response have, and no encoder row                 Realign

    With the truth, harm is the share of the features that a cause costs at `tau`, so that a dictionary that misses nothing has no
    verdict. One feature may count for two causes: each is what a repair could bring back at most. Without the truth harm is the
    share of the latents concerned, all but death are candidates, and two meanings and absorption are named only where their detectors were
    right more often than not on benches like these rows. What is pinned is left alone. With `theory`, `check_theory` says
    whether the theorem's assumptions hold here. Advice says what may help; `session.repair` judges whether it does.

    `samples_since_fired` and `dead_after` as in `check_health`. Raises ValueError for what those findings refuse.
    """
    settings = {"samples_since_fired": samples_since_fired, "dead_after": dead_after, "pins": pins, "tau": tau, "theory": theory}
    return observe(dictionary, activations, [(explain, settings)])[0]
