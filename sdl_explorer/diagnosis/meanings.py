"""Candidates for polysemanticity, without ground truth: does one latent fire on rows of two kinds?"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.cosines import row_cosines, unit
from sdl_explorer.diagnosis.examples import Reservoir
from sdl_explorer.diagnosis.modes import cut_in_two, of_one_meaning
from sdl_explorer.diagnosis.observe import Accumulator, Moments, Rows, Stream, finding, observe
from sdl_explorer.diagnosis.scores import DetectorScore, detector_scores, known_hierarchy, mean_coherence
from sdl_explorer.diagnosis.spiked import OnSpikes, judge_of
from sdl_explorer.models.dictionary import SparseDictionary

FEWEST = 10  # firing rows below which a latent is not judged
CELLS = 2**21  # numbers of the rows that are looked at together
COSINES = 2**23  # with decoder rows, at a time


@dataclass(frozen=True, repr=False)
class Polysemanticity:
    """What `suspect_polysemantic` found; arrays have one entry per latent, zeros (partners: -1) where it was not judged.

    score       modes - 1, in [0, 1]: 0 for firing rows of one kind, 1 for two equal halves that have nothing in common
    candidate   score at the threshold or above, and above `null`; a candidate, since no truth was seen
    judged      latents that fired on 10 rows or more
    null        the score of a latent of one meaning with these codes on this background: shifts along their mean in proportion to the
                codes, and random rows in all other directions; 0 below the threshold, where it is not needed
    smaller     share of the rows that are of the rarer kind;  mode_cosine  cosine between the two kinds' mean shifts
    partners    (n_latents, 2) the other live latents whose decoder rows are nearest the mean shift of each kind, the rarer one second,
                and partner_cosine; for candidates
    encoder_decoder, encoder_response, decoder_response   cosines of its two rows, and of each with what fires it; the first is 0 where
                inputs and targets differ in width
    rows, kind  (n_latents, n_rows) the rows that were looked at, drawn with chances that grow with the activation, -1 where fewer
                fired; and of which kind each is: 0, 1 (the rarer), -1 for none
    coherence   mean |cos| over pairs of live decoder rows: the regime that decides what the score is worth
    on_spikes   how often candidates are right in these rows, among latents that stand for spike-ins; None where there are none
    hierarchy   whether features imply each other, None where it is not known: which benches are like these rows
    """

    n_samples: int
    threshold: float
    coherence: float
    score: Float[np.ndarray, " n_latents"]
    null: Float[np.ndarray, " n_latents"]
    judged: Bool[np.ndarray, " n_latents"]
    n_fires: Int[np.ndarray, " n_latents"]
    smaller: Float[np.ndarray, " n_latents"]
    mode_cosine: Float[np.ndarray, " n_latents"]
    partners: Int[np.ndarray, "n_latents 2"]
    partner_cosine: Float[np.ndarray, "n_latents 2"]
    encoder_decoder: Float[np.ndarray, " n_latents"]
    encoder_response: Float[np.ndarray, " n_latents"]
    decoder_response: Float[np.ndarray, " n_latents"]
    rows: Int[np.ndarray, "n_latents n_rows"]
    kind: Int[np.ndarray, "n_latents n_rows"]
    on_spikes: OnSpikes | None = None
    hierarchy: bool | None = None

    def __repr__(self) -> str:
        return f"Polysemanticity({self.reading})"

    @property
    def n_latents(self) -> int:
        return len(self.score)

    @cached_property
    def candidate(self) -> Bool[np.ndarray, " n_latents"]:
        return self.judged & (self.score >= self.threshold) & (self.score > self.null)

    @property
    def worth(self) -> DetectorScore:
        """How right the detector is on benches of this coherence, and kind where it is known."""
        return detector_scores("polysemantic", self.coherence, self.hierarchy)

    @property
    def reading(self) -> str:
        """The finding in words; where the detector is not to be trusted it says so and names nobody."""
        seen = f"{int(self.judged.sum())} latents on {self.n_samples:,} rows, mean coherence {self.coherence:.2f}"
        worth = str(self.worth) if self.on_spikes is None else f"{self.worth}; {self.on_spikes}"
        if not self.worth.confident:
            return f"no claim about {seen}: {worth}"
        return f"{int(self.candidate.sum())} polysemantic candidates of {seen}; {worth}"

    def rows_of(self, latent: int, kind: int) -> Int[np.ndarray, " m"]:
        """The rows of one kind, 0 or 1 (the rarer), that fire a latent: look at both."""
        if not 0 <= latent < self.n_latents:
            raise ValueError(f"Polysemanticity: latent {latent} does not exist; there are {self.n_latents}.")
        return self.rows[latent][self.kind[latent] == kind]


class _Suspect(Accumulator):
    def __init__(self, stream: Stream, *, threshold=0.25, n_rows=32, seed=0):
        super().__init__(stream)
        if not 0 < threshold <= 1:
            raise ValueError(f"suspect_polysemantic: threshold is {threshold}; it is a score above 0, at most 1.")
        if n_rows < FEWEST:
            raise ValueError(f"suspect_polysemantic: n_rows is {n_rows}; two kinds are not told apart on fewer than {FEWEST} rows.")
        device = stream.dictionary.device
        self.threshold, self.n_rows = threshold, n_rows
        self.moments, self.spikes = stream.share(Moments), judge_of(stream)
        self.reservoir = Reservoir(n_rows, stream.dictionary.n_latents, device)
        # one random number a row: with keys log(u) / z, rows are drawn in proportion to z (Efraimidis and Spirakis 2006)
        chance = torch.rand(stream.activations.n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.chance = chance.log().clamp_min(torch.finfo(torch.float32).min).float().to(device)

    def add(self, rows: Rows) -> None:
        latent, row, value = rows.entries
        self.reservoir.add(latent, self.chance[rows.start + row] / value, rows.start + row, value)

    def result(self) -> Polysemanticity:
        dictionary, moments = self.stream.dictionary, self.moments
        rows, codes = self.reservoir.arrays()
        n_latents, fires = len(rows), moments.count.numpy()
        judged = fires >= FEWEST
        found: dict[str, np.ndarray] = {name: np.zeros(n_latents) for name in ("score", "null", "smaller", "mode_cosine")}
        found |= {"partners": np.full((n_latents, 2), -1), "partner_cosine": np.zeros((n_latents, 2))}
        found["kind"] = np.full(rows.shape, -1, dtype=np.int8)
        live = torch.as_tensor(np.flatnonzero(fires), device=dictionary.device)
        writes = unit(dictionary.W_dec.detach()[live])
        random = self._shifts("inputs", self.chance.argsort()[: self.n_rows])  # the rows least likely to have been drawn
        width = max(self.stream.activations.inputs.shape[1], self.n_rows)
        for some in np.array_split(np.flatnonzero(judged), -(-int(judged.sum()) * self.n_rows * width // CELLS) or 1):
            if len(some):
                for name, values in self._judge(some, rows[some], codes[some], random, live, writes).items():
                    found[name][some] = values
                self.stream.pulse()
        same = dictionary.d_in == dictionary.d_out
        suspected = Polysemanticity(
            n_samples=moments.n,
            threshold=self.threshold,
            coherence=mean_coherence(dictionary.W_dec[live]),
            judged=judged,
            n_fires=fires,
            encoder_decoder=row_cosines(dictionary.W_enc.detach(), dictionary.W_dec.detach()) if same else np.zeros(n_latents),
            encoder_response=row_cosines(dictionary.W_enc.detach(), moments.input_moment),
            decoder_response=row_cosines(dictionary.W_dec.detach(), moments.target_moment),
            rows=rows,
            on_spikes=None,
            hierarchy=known_hierarchy(self.stream.activations),
            **found,
        )
        if self.spikes is None:
            return suspected
        return replace(suspected, on_spikes=self.spikes.judge(np.flatnonzero(suspected.candidate), "polysemantic"))

    def _judge(
        self, latents: np.ndarray, rows: np.ndarray, codes: np.ndarray, random: Tensor, live: Tensor, writes: Tensor
    ) -> dict[str, np.ndarray]:
        device = self.stream.dictionary.device
        at = torch.as_tensor(rows, dtype=torch.int64, device=device)
        there = at >= 0
        shifts = self._shifts("inputs", at)
        found = cut_in_two(shifts @ shifts.mT, there)
        score = found.modes - 1
        null, partners, cosines = torch.zeros_like(score), at.new_full((len(at), 2), -1), score.new_zeros(len(at), 2)
        high = (score >= self.threshold).nonzero()[:, 0]
        if len(high):
            single = of_one_meaning(shifts[high], there[high], torch.as_tensor(codes, device=device)[high], random)
            null[high] = cut_in_two(single, there[high]).modes - 1
            high = high[score[high] > null[high]]
            same = self.stream.activations.targets is self.stream.activations.inputs
            written = shifts[high] if same else self._shifts("targets", at[high])
            sides = torch.stack([found.kind[high] == kind for kind in (0, 1)], dim=1).float()
            own = torch.searchsorted(live, torch.as_tensor(latents, device=device)[high])
            place, cosines[high] = _nearest(unit((sides @ written).flatten(0, 1)), writes, own.repeat_interleave(2))
            partners[high] = torch.where(place >= 0, live[place], -1)
        values = {"score": score, "null": null, "smaller": found.smaller, "mode_cosine": found.cosine, "kind": found.kind}
        values |= {"partners": partners, "partner_cosine": cosines}
        return {name: value.cpu().numpy() for name, value in values.items()}

    def _shifts(self, side: str, at: Tensor) -> Tensor:
        """Rows less the mean over all rows; those that are not there (-1) come as row 0 and are left out by their mask."""
        values = getattr(self.stream.activations, side)
        mean = self.stream.input_mean if side == "inputs" else self.stream.target_mean
        return values[at.clamp_min(0).to(values.device)].to(mean) - mean


def _nearest(means: Tensor, writes: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Which row writes most nearly the mean shift, but for the latent's own, and its cosine; -1 and 0 where there is no other. (m, 2) each:
    both kinds of a latent follow each other."""
    found, size = [], max(1, COSINES // len(writes))
    room = means.new_empty(min(size, len(means)), len(writes))
    for mean, mine in zip(means.split(size), own.split(size), strict=True):
        found.append(torch.mm(mean, writes.T, out=room[: len(mean)]).scatter_(1, mine[:, None], -torch.inf).max(dim=1))
    cosine, place = (torch.cat(side).view(-1, 2) for side in zip(*found, strict=True))
    there = cosine > -torch.inf
    return torch.where(there, place, -1), torch.where(there, cosine, 0)


@finding(_Suspect)
def suspect_polysemantic(
    dictionary: SparseDictionary, activations: Activations, threshold: float = 0.25, n_rows: int = 32, seed: int = 0
) -> Polysemanticity:
    """Which latents may fire for two things? A score in [0, 1] for each, from the rows that fire it alone: no truth is read.

        shift = x_p - mean x_p,   on n_rows rows drawn in proportion to z_i
        modes = 1 / (p_a^2 + p_b^2 + 2 p_a p_b max(0, cos(mean shift_a, mean shift_b))),   of the cut into kinds a and b that counts most
        score = modes - 1

    the effective number of two kinds where likeness counts (Leinster and Cobbold 2012, order 2); cuts are the best ones of unit shifts
    along their first three principal directions. A parent that fires with and without its child has a shift in common, so cos > 0.

    What it cannot see: a latent that reads two features that only ever come together looks like one meaning, and is one as far as the
    rows can tell. In heavy superposition other features blur the kinds: `worth` is the precision measured on benches of the same
    coherence, and `reading` claims nothing where that is below one half. Raises ValueError for settings out of range and for what
    `observe` refuses.
    """
    settings = {"threshold": threshold, "n_rows": n_rows, "seed": seed}
    return observe(dictionary, activations, [(suspect_polysemantic, settings)])[0]
