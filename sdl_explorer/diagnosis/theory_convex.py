"""The card on convexity in each block inside a region (T2)."""

import torch
from torch import Generator, Tensor

from sdl_explorer.diagnosis.theory_cards import PAPER, Assumption, Found, Text, TheoryCard, Witness, card
from sdl_explorer.diagnosis.theory_facts import CELLS, Facts
from sdl_explorer.models.methods.topk import BatchTopKSelection

T2 = Text(
    "T2",
    "convex in each block inside a region",
    "While the sets F_i stay as they are, L~ is convex in W_dec for fixed W_enc, and convex in W_enc for fixed W_dec.",
    f"{PAPER}, Theorem 3.2 (v3, v5/6; absent in v2)",
)
MOVED = 256  # latents that one segment moves
SHRINKS = 20
ROUNDING = 1e-9  # of the loss at the ends


def check_convexity(facts: Facts, generator: Generator, n_segments: int) -> TheoryCard:
    """T2. left = the largest f(middle) - (f(a) + f(b)) / 2 over random segments, relative to the ends; right = 0.

    Segments start and end in the region of this model's own pattern, and their middles are tested for it again. One segment moves the
    rows of up to 256 latents; inside the region nothing else changes. Where there are more than CELLS pairs of a feature and a latent, each
    segment takes the terms of some features alone: every term is convex by the same argument. Biases stay as they are, and the proof
    stays too: b_enc is a column that reads a constant, b_dec moves the targets.
    """
    frozen = isinstance(facts.model.sigma, BatchTopKSelection)
    fixed = Assumption(
        "the region is fixed by the weights", f"{facts.model.name}: {'needs the batch' if frozen else 'yes'}", None if frozen else True
    )
    assumptions = [facts.masks(), fixed]
    if any(a.met is not True for a in assumptions):
        return card(T2, assumptions, Found("not checkable", ""), facts.sums.n, ROUNDING)
    gaps, outside, lengths, bent = [], 0, [], []
    for _ in range(n_segments):
        latents = torch.randperm(facts.n_latents, generator=generator)[:MOVED]
        segment = _Segment(facts, latents, generator)
        gaps.append(segment.gaps)
        outside += not segment.middle_inside
        lengths.append(segment.length)
        bent.append(segment.curvature)
    writes, reads = torch.tensor(gaps, dtype=torch.float64).T
    left = float(max(writes.max(), reads.max()))
    worst = "W_dec" if writes.max() >= reads.max() else "W_enc"
    region = Assumption("middles stay in the region", f"{outside} of {n_segments} left it", outside == 0)
    moved = Assumption("segments have a length", f"median {float(torch.tensor(lengths).median()):.2g} of the rows moved", max(lengths) > 0)
    numbers: dict[str, float | str] = {
        "largest in W_dec": float(writes.max()),
        "largest in W_enc": float(reads.max()),
        "largest drop below the chord in W_enc": float(max(bent)),
        "segments": float(n_segments),
        "features in a segment": float(min(facts.n, max(1, CELLS // facts.n_latents))),
        "L~": facts.loss,
    }
    return card(
        T2,
        [*assumptions, region, moved],
        Found(
            "holds" if left <= ROUNDING else "violated",
            f"the middle of {n_segments} segments lies above the chord by at most {left:.2g} of the loss, in {worst}",
            "max f((a + b) / 2) - (f(a) + f(b)) / 2 <= 0",
            left,
            0.0,
            Witness(f"the segment in {worst} with the largest gap"),
            numbers,
        ),
        facts.sums.n,
        ROUNDING,
    )


class _Segment:
    """Two ends and a middle, in each block, over the rows of some latents."""

    def __init__(self, facts: Facts, latents: Tensor, generator: Generator):
        self.facts, self.latents = facts, latents
        self.features = torch.randperm(facts.n, generator=generator)[: max(1, CELLS // facts.n_latents)]
        self.W_p, self.pattern = facts.W_p[self.features], facts.pattern[self.features]
        self.z = facts.model.alone(self.W_p)[:, latents]
        self.W_enc, self.W_dec = facts.model.W_enc[latents], facts.model.W_dec[latents]
        self.pre = self.W_p @ facts.model.W_enc.T + facts.model.b_enc
        draw = lambda like: torch.randn(like.shape, generator=generator, dtype=torch.float64) * _size(like)
        a, b = (self._inside(draw(self.W_enc), generator) for _ in range(2))
        middle = (a + b) / 2
        self.middle_inside = not self._left(middle).any()
        self.length = float((a - b).norm() / self.W_enc.norm().clamp_min(torch.finfo(torch.float64).tiny))
        reads = [self._loss(self._codes(rows), self.W_dec) for rows in (a, middle, b)]
        own = self._codes(self.W_enc)
        c, d = (self.W_dec + draw(self.W_dec) for _ in range(2))
        writes = [self._loss(own, rows) for rows in (c, (c + d) / 2, d)]
        self.gaps = _gap(*writes), _gap(*reads)
        self.curvature = -self.gaps[1]

    def _codes(self, rows: Tensor) -> Tensor:
        """The codes of all latents on each feature alone, with these encoder rows."""
        pre = self.pre.clone()
        pre[:, self.latents] = self.W_p @ rows.T + self.facts.model.b_enc[self.latents]
        return self.facts.model.codes(pre)

    def _left(self, rows: Tensor) -> Tensor:
        """Which of the latents moved have another set now; all of them where another latent's set changed."""
        changed = (self.facts.model.fires(self._codes(rows)) != self.pattern).any(dim=0)
        mine = changed[self.latents]
        return mine if mine.any() or not changed.any() else torch.ones_like(mine)

    def _inside(self, noise: Tensor, generator: Generator) -> Tensor:
        """An end: each row scaled and moved, by less and less until the pattern is that of the model."""
        stretch = torch.rand(len(noise), 1, generator=generator, dtype=torch.float64) - 0.5
        step = torch.ones(len(noise), 1, dtype=torch.float64)
        for attempt in range(SHRINKS):
            rows = (1 + stretch) * self.W_enc + step * noise
            left = self._left(rows)
            if not left.any():
                return rows
            step[left] /= 4
            if attempt > SHRINKS // 2:
                step[left], stretch[left] = 0, stretch[left] / 4
        return self.W_enc

    def _loss(self, codes: Tensor, W_dec: Tensor) -> float:
        """L~ with these codes, and these decoder rows for the latents moved."""
        facts, some = self.facts, self.features
        change = codes[:, self.latents] @ W_dec - self.z @ self.W_dec
        return float(facts.weights[some] @ (facts.residual[some] - change).square().sum(dim=1))


def _size(rows: Tensor) -> Tensor:
    """Noise of half a row's length."""
    return 0.5 * rows.norm(dim=1, keepdim=True) / rows.shape[1] ** 0.5


def _gap(a: float, middle: float, b: float) -> float:
    chord = (a + b) / 2
    return (middle - chord) / chord if chord > 0 else 0.0
