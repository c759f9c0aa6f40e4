"""Do the theorems on sparse dictionary learning apply to this dictionary on these rows, and what do they say?"""

from torch import Generator

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Pins
from sdl_explorer.diagnosis.cofiring import true_directions
from sdl_explorer.diagnosis.observe import Accumulator, Rows, Stream, finding, observe
from sdl_explorer.diagnosis.theory_anchors import T7, check_anchors
from sdl_explorer.diagnosis.theory_cards import Assumption, Found, TheoryCard, card
from sdl_explorer.diagnosis.theory_convex import T2, check_convexity
from sdl_explorer.diagnosis.theory_facts import LARGEST, Facts, Sums
from sdl_explorer.diagnosis.theory_losses import T1, T3, T4, check_approximation, check_construction, check_zero_loss
from sdl_explorer.diagnosis.theory_minima import T5, check_partial_minimum
from sdl_explorer.diagnosis.theory_patterns import T6, check_absorbable
from sdl_explorer.diagnosis.theory_seeds import Seeds
from sdl_explorer.models.dictionary import SparseDictionary


class _Checker(Accumulator):
    def __init__(self, stream: Stream, *, pins=None, seeds=None, tolerance=1e-3, n_segments=8, seed=0):
        super().__init__(stream)
        if not 0 < tolerance < 1:
            raise ValueError(f"check_theory: tolerance is {tolerance}; it is a share, between 0 and 1.")
        if n_segments < 1:
            raise ValueError(f"check_theory: n_segments is {n_segments}; convexity is tested on one segment at least.")
        self.pins, self.seeds, self.tolerance, self.n_segments, self.seed = pins, seeds, tolerance, n_segments, seed
        self.missing = self._missing()
        truth = stream.activations.truth
        self.sums = None if self.missing or truth is None else Sums(truth)

    def _missing(self) -> str:
        activations, n_latents = self.stream.activations, self.stream.dictionary.n_latents
        if activations.truth is None:
            return "these activations have no truth (truth=None)"
        if not activations.truth.complete:
            return f"{activations.truth.n_features:,} features are known, put into rows with others that are not"
        n = len(true_directions(activations, self.stream.dictionary, "check_theory").names)
        cells = n * max(n, n_latents)
        return f"{n:,} features x {max(n, n_latents):,} are {cells:,} cells; {LARGEST:,} are kept" if cells > LARGEST else ""

    def add(self, rows: Rows) -> None:
        if self.sums is not None:
            self.sums.add(rows)

    def result(self) -> list[TheoryCard]:
        if self.sums is None:
            known = Assumption("the true features and their activations are known", self.missing, None)
            n = self.stream.activations.n
            return [card(text, [known], Found("not checkable", ""), n, self.tolerance) for text in (T1, T2, T3, T4, T5, T6, T7)]
        facts = Facts(self.stream.dictionary, self.sums, self.tolerance)
        checks = (
            check_approximation,
            lambda facts: check_convexity(facts, Generator().manual_seed(self.seed), self.n_segments),
            check_construction,
            check_zero_loss,
            check_partial_minimum,
            check_absorbable,
            lambda facts: check_anchors(facts, self.pins, self.seeds),
        )
        cards = []
        for check in checks:
            cards.append(check(facts))
            self.stream.pulse()
        return cards


@finding(_Checker)
def check_theory(
    dictionary: SparseDictionary,
    activations: Activations,
    pins: Pins | None = None,
    tolerance: float = 1e-3,
    n_segments: int = 8,
    seed: int = 0,
    seeds: Seeds | None = None,
) -> list[TheoryCard]:
    """A card for each of six theorems, and one on anchors: assumptions with live values, both sides, and what follows here.

        T1 |L - L~| <= n^2 C (1-S)^2             T4 L~ = 0 <=> every feature is reconstructed (recovered is something else)
        T2 L~ convex in each block of a region    T5 polysemantic partitions have partial minima with positive loss
        T3 the constructed solution's loss        T6 a parent that lost one child to a latent of its own is realisable
        T7 free numbers of the decoder with the anchors of `pins` held, and without; the spread over `seeds` (`train_seeds`), likewise

        L = mean |x_r - recon|^2;   L~ = sum_d M_d |w_r^d - W_dec^T sigma(W_enc w_p^d)|^2,   M_d = P(x = x_d e_d) E[x_d^2 | x_d > 0]

    A verdict is "holds", "violated", "assumption not met" or "not checkable", and never "holds" where an assumption fails: on the bench
    of the paper's own size 1 - S = 0.01 exceeds 1/n = 0.001, and T1 does not apply. Without true features all are "not checkable".
    `tolerance`: what share of the rows may be no sum of features, and which residuals, relative gradients count as zero. `n_segments`
    random segments test convexity; `seed` draws them. Each feature alone is encoded in double precision, at unit strength.

    Raises ValueError for settings out of range and for what `observe` refuses. Theorems: arXiv 2512.05534; each card has the number.
    """
    settings = {"pins": pins, "tolerance": tolerance, "n_segments": n_segments, "seed": seed, "seeds": seeds}
    return observe(dictionary, activations, [(check_theory, settings)])[0]
