"""Which true features (or anchors) did this dictionary find, in its encoder, its decoder and its responses?"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Anchors, Pins
from sdl_explorer.diagnosis.chance import Chance
from sdl_explorer.diagnosis.cosines import Best, RunningBest, cosines_of, largest, latent_blocks, row_cosines, unit
from sdl_explorer.diagnosis.directions import directions_of, held_by
from sdl_explorer.diagnosis.matching import Matcher
from sdl_explorer.diagnosis.observe import Accumulator, Moments, Rows, Stream, finding, observe
from sdl_explorer.models.dictionary import SparseDictionary

SIDES = ("encoder", "decoder", "response", "minimum")
SCORINGS = ("heldout", "heldout_strict", "all")
TAU = 0.95


class PerLatent(NamedTuple):
    """Each latent's best feature by signed cosine on each side, arrays (n_latents,).

    `encoder_at_decoder` is the cosine of the encoder row with the input direction of the *decoder's* best
    feature: beside `decoder_cosine` it shows a latent that writes a feature and reads something else.
    The last two hold one row per source of a crosscoder, at the decoder's best feature: (n_blocks, n_latents).
    """

    encoder_feature: np.ndarray
    encoder_cosine: np.ndarray
    decoder_feature: np.ndarray
    decoder_cosine: np.ndarray
    encoder_at_decoder: np.ndarray
    response_feature: np.ndarray
    response_cosine: np.ndarray
    block_encoder: np.ndarray
    block_decoder: np.ndarray


@dataclass(frozen=True, repr=False)
class Alignment:
    """What `align` found. `features` below are the true features, or the anchors when `of` is "anchors".

    best                per side, each feature's best latent and cosine: signed, absolute, with and without held latents
    matching            one latent per feature (decoder, signed, largest sum), -1 for none; `matching_cosine` beside it
    matching_note       empty, or how the matching was cut down to size
    mcc                 mean |cos| of the one-to-one matching of decoder rows on |cos| (mean correlation coefficient)
    f1, feature_f1      F1 of "the decoder's best latent fires" as a classifier of "the feature is active", mean and per
                        feature; NaN without true codes
    chance              the same scores for random unit rows
    anchored_features, anchored_latents      masks of what pins hold
    block_encoder, block_decoder             best signed cosine within each source of a crosscoder (n_blocks, n_features)
    """

    of: str
    n_samples: int
    names: tuple[str, ...]
    best: dict[str, Best]
    per_latent: PerLatent
    matching: Int[np.ndarray, " n_features"]
    matching_cosine: Float[np.ndarray, " n_features"]
    matching_note: str
    mcc: float
    f1: float
    feature_f1: Float[np.ndarray, " n_features"]
    chance: Chance
    anchored_features: Bool[np.ndarray, " n_features"]
    anchored_latents: Bool[np.ndarray, " n_latents"]
    block_names: tuple[str, ...]
    block_encoder: Float[np.ndarray, "n_blocks n_features"]
    block_decoder: Float[np.ndarray, "n_blocks n_features"]

    def __repr__(self) -> str:
        sides = ", ".join(f"{side} {self.recovery(side=side):.1%} ({self.mean_best(side):.3f})" for side in SIDES)
        what = "anchors" if self.of == "anchors" else "true features"
        return f"Alignment({self.n_features} {what} against {self.n_latents} latents; recovered at {TAU} (mean best cosine): {sides})"

    n_features = property(lambda self: len(self.names), doc="True features, or anchors.")
    n_latents = property(lambda self: len(self.anchored_latents), doc="Latents compared.")
    encoder = property(lambda self: self.best["encoder"].cosine, doc="max_j cos(W_enc_j, w_p^i), signed, over all latents.")
    decoder = property(lambda self: self.best["decoder"].cosine, doc="max_j cos(W_dec_j, w_r^i), signed, over all latents.")
    response = property(lambda self: self.best["response"].cosine, doc="max_j cos(E[z_j x_p]/E[z_j] - E[x_p], w_p^i), signed.")
    minimum = property(lambda self: self.best["minimum"].cosine, doc="max_j of the smaller of latent j's two row cosines.")
    encoder_latent = property(lambda self: self.best["encoder"].latent, doc="The latent behind `encoder`.")
    decoder_latent = property(lambda self: self.best["decoder"].latent, doc="The latent behind `decoder`.")
    response_latent = property(lambda self: self.best["response"].latent, doc="The latent behind `response`.")
    minimum_latent = property(lambda self: self.best["minimum"].latent, doc="The latent behind `minimum`.")

    def scores(self, side: str = "decoder", scoring: str = "heldout", signed: bool = True) -> np.ndarray:
        """Best cosines of the features that count under `scoring` (held-out features alone, or all).

        "heldout": features that no latent is pinned to, against all latents. "heldout_strict": the same features,
        pinned latents left out of the maximum. "all": all features, all latents.
        """
        _one_of("side", side, SIDES)
        _one_of("scoring", scoring, SCORINGS)
        values = self.best[side].scores(strict=scoring == "heldout_strict", signed=signed)
        return values if scoring == "all" else values[~self.anchored_features]

    def recovery(self, tau: float = TAU, side: str = "decoder", scoring: str = "heldout", signed: bool = True) -> float:
        """M_GT: share of the features whose best cosine exceeds tau; NaN when every feature is anchored."""
        return _mean(self.scores(side, scoring, signed) > tau)

    def mean_best(self, side: str = "decoder", scoring: str = "heldout", signed: bool = True) -> float:
        """M_IP: mean best cosine; NaN when every feature is anchored."""
        return _mean(self.scores(side, scoring, signed))

    def curve(self, side: str = "decoder", scoring: str = "heldout", taus=None, signed: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Recovery at each tau (None: 0, 0.005, ..., 1), as (taus, shares)."""
        taus = np.linspace(0, 1, 201) if taus is None else np.asarray(taus, dtype=float)
        values = np.sort(self.scores(side, scoring, signed))
        above = len(values) - np.searchsorted(values, taus, side="right")
        return taus, above / len(values) if len(values) else np.full(len(taus), np.nan)


class _Aligner(Accumulator):
    def __init__(self, stream: Stream, *, anchors=None, pins=None, match=True):
        super().__init__(stream)
        dictionary, activations = stream.dictionary, stream.activations
        self.features = directions_of(activations, dictionary, anchors)
        self.held, self.anchored = held_by(pins, self.features, dictionary)
        self.moments = stream.share(Moments)
        self.matcher = Matcher(len(self.features.names), dictionary.n_latents, dictionary.device) if match else None
        self.rows_done = self._search_rows()
        self.matched = self._matched()  # now: it needs the weights alone, and a large matrix goes before the rows come
        self.detector = torch.as_tensor(self.rows_done["decoder"].latent, device=dictionary.device)
        shape = (3, len(self.features.names))
        self.both, self.detected, self.active = torch.zeros(shape, dtype=torch.int64, device=dictionary.device)

    def add(self, rows: Rows) -> None:
        truth = self.stream.activations.truth
        if truth is None:
            return
        codes = truth.codes[rows.start : rows.start + rows.n].to(rows.inputs.device)
        active = (codes[:, self.features.ids.clamp_min(0)] > 0) & (self.features.ids >= 0)
        fires = rows.codes_of(self.detector) > 0
        self.both += (active & fires).sum(dim=0)
        self.detected += fires.sum(dim=0)
        self.active += active.sum(dim=0)

    def result(self) -> Alignment:
        response, response_feature, response_cosine = self._search_responses()
        matching, matching_cosine, mcc, note = self.matched
        f1 = self._f1()
        within_feature, within_latent = self._within_blocks()
        n_features, n_latents = len(self.features.names), self.stream.dictionary.n_latents
        return Alignment(
            of=self.features.of,
            n_samples=self.moments.n,
            names=self.features.names,
            best={**self.rows_done, "response": response},
            per_latent=PerLatent(
                **self.per_latent,
                response_feature=response_feature,
                response_cosine=response_cosine,
                block_encoder=within_latent[0],
                block_decoder=within_latent[1],
            ),
            matching=matching,
            matching_cosine=matching_cosine,
            matching_note=note,
            mcc=mcc,
            f1=_mean(f1[~np.isnan(f1)]),
            feature_f1=f1,
            chance=Chance(n_latents, n_features, self.stream.dictionary.d_in, self.stream.dictionary.d_out),
            anchored_features=self.anchored.cpu().numpy(),
            anchored_latents=self.held.cpu().numpy(),
            block_names=tuple(block.name for block in self.stream.activations.blocks),
            block_encoder=within_feature[0],
            block_decoder=within_feature[1],
        )

    def _search_rows(self) -> dict[str, Best]:
        """Encoder and decoder rows against the features, in one sweep over blocks of latents."""
        features, W_enc, W_dec = self.features, self.stream.dictionary.W_enc, self.stream.dictionary.W_dec
        running = {side: RunningBest(len(features.names), W_enc.device) for side in ("encoder", "decoder", "minimum")}
        encoder_feature, decoder_feature = W_enc.new_zeros(2, len(W_enc), dtype=torch.int64)
        encoder_cosine, decoder_cosine, encoder_at_decoder = W_enc.new_zeros(3, len(W_enc), dtype=torch.float32)
        for latents, held in latent_blocks(len(features.names), self.held):
            reads, writes = cosines_of(W_enc[latents], features.inputs), cosines_of(W_dec[latents], features.targets)
            running["encoder"].add(reads, largest(reads), latents, held)
            running["decoder"].add(writes, largest(writes), latents, held)
            encoder_cosine[latents], encoder_feature[latents] = reads.max(dim=0)
            decoder_cosine[latents], best = writes.max(dim=0)
            decoder_feature[latents] = best
            encoder_at_decoder[latents] = reads.gather(0, best[None])[0]
            if self.matcher:
                self.matcher.add(writes, latents)
            smaller = torch.minimum(reads, writes)
            running["minimum"].add(smaller, torch.minimum(reads.abs_(), writes.abs_()).amax(dim=1), latents, held)
            self.stream.pulse()
        self.per_latent = {
            "encoder_feature": encoder_feature.cpu().numpy(),
            "encoder_cosine": encoder_cosine.cpu().numpy(),
            "decoder_feature": decoder_feature.cpu().numpy(),
            "decoder_cosine": decoder_cosine.cpu().numpy(),
            "encoder_at_decoder": encoder_at_decoder.cpu().numpy(),
        }
        return {side: best.best() for side, best in running.items()}

    def _search_responses(self) -> tuple[Best, np.ndarray, np.ndarray]:
        # the moment is the response times sum z_i > 0: the same direction
        return best_latents(self.moments.input_moment, self.features.inputs, self.held, self.stream.pulse)

    def _within_blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """Within each source, for encoder and decoder: each feature's best cosine (2, n_blocks, n_features), and each
        latent's cosine with the decoder's best feature (2, n_blocks, n_latents)."""
        dictionary, features, blocks = self.stream.dictionary, self.features, self.stream.activations.blocks
        chosen = torch.as_tensor(self.per_latent["decoder_feature"], device=self.held.device)
        by_feature = np.zeros((2, len(blocks), len(features.names)), dtype=np.float32)
        by_latent = np.zeros((2, len(blocks), dictionary.n_latents), dtype=np.float32)
        for b, block in enumerate(blocks):
            reads = (dictionary.W_enc[:, block.inputs], features.inputs[:, block.inputs])
            writes = (dictionary.W_dec[:, block.targets], features.targets[:, block.targets])
            for side, (rows, directions) in enumerate((reads, writes)):
                by_feature[side, b] = best_latents(rows, unit(directions), self.held, self.stream.pulse)[0].cosine
                by_latent[side, b] = row_cosines(rows, directions, chosen)
        return by_feature, by_latent

    def _matched(self) -> tuple[np.ndarray, np.ndarray, float, str]:
        """Each feature's latent and cosine, mcc, and how it was found."""
        matcher, self.matcher = self.matcher, None
        if matcher is None:
            n = len(self.features.names)
            return np.full(n, -1, dtype=np.int64), np.zeros(n, dtype=np.float32), float("nan"), "matching was not asked for"
        matching, cosine = matcher.solve()
        self.stream.pulse()
        _, absolute = matcher.solve(signed=False)
        return matching, cosine, float(absolute.sum() / min(matcher.shape)), matcher.note

    def _f1(self) -> np.ndarray:
        """2 TP / (2 TP + FP + FN) per feature, 0 where neither ever happens, NaN without codes."""
        both, either = self.both.cpu().numpy(), (self.detected + self.active).cpu().numpy()
        known = (self.features.ids >= 0).cpu().numpy() & (self.stream.activations.truth is not None)
        return np.where(known, 2 * both / np.maximum(either, 1), np.nan)


@finding(_Aligner)
def align(
    dictionary: SparseDictionary,
    activations: Activations,
    anchors: Anchors | None = None,
    pins: Pins | None = None,
    match: bool = True,
) -> Alignment:
    """Compare each side of each latent with the true features, or with `anchors` where those are given.

        encoder_i  = max_j cos(W_enc_j, w_p^i)                            what a latent reads
        decoder_i  = max_j cos(W_dec_j, w_r^i)                            what it writes
        response_i = max_j cos(E[z_j x_p]/E[z_j] - E[x_p], w_p^i)         what fires it
        minimum_i  = max_j min(cos(W_enc_j, w_p^i), cos(W_dec_j, w_r^i))  one latent that does both
        M_GT(tau)  = mean_i [score_i > tau];   M_IP = mean_i score_i

    signed here, absolute with `signed=False`; a row of zeros, or a latent that never fired, scores 0. `pins` says which
    features and latents the three scorings hold out. The encoder and the decoder score of one dictionary can differ
    widely, and the source of both metrics scores the encoder: compare like with like, and with `chance`.
    `match=False` leaves the one-to-one matching and mcc out (-1 and NaN), which are the slow part at size.

    Raises ValueError where there is nothing to compare with, for directions of the wrong width or not of unit norm,
    and for what `observe` refuses. M_GT and M_IP: arXiv 2512.05534, appendix B; mcc as in SAELens.
    """
    return observe(dictionary, activations, [(align, {"anchors": anchors, "pins": pins, "match": match})])[0]


def best_latents(rows: Tensor, directions: Tensor, held: Tensor, pulse=lambda: None) -> tuple[Best, np.ndarray, np.ndarray]:
    """Best latent of each direction; best direction of each latent and its cosine."""
    running = RunningBest(len(directions), rows.device)
    feature, cosine = held.long(), torch.zeros(len(rows), device=rows.device)
    for latents, is_held in latent_blocks(len(directions), held):
        block = cosines_of(rows[latents], directions)
        running.add(block, largest(block), latents, is_held)
        cosine[latents], feature[latents] = block.max(dim=0)
        pulse()
    return running.best(), feature.cpu().numpy(), cosine.cpu().numpy()


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it is one of {', '.join(allowed)}.")
