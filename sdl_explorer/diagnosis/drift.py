"""Do pinned latents stay where they are held? The cosine of each pinned row to its anchor."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Pins
from sdl_explorer.diagnosis.cosines import row_cosines
from sdl_explorer.diagnosis.observe import Accumulator, Rows, Stream, finding, observe
from sdl_explorer.models.dictionary import SparseDictionary


@dataclass(frozen=True)
class Drift:
    """What `measure_drift` found; arrays have one entry per pinned latent, none without pins.

    encoder, decoder      cos(W_enc_i, anchor input), cos(W_dec_i, anchor target); 1 is where it is held
    nearest, overlap      the other anchor nearest to this one (-1: none), and their cosine on the target side (-1: none)
    """

    names: tuple[str, ...]
    latents: Int[np.ndarray, " k"]
    weight: Float[np.ndarray, " k"]
    hard: Bool[np.ndarray, " k"]
    encoder: Float[np.ndarray, " k"]
    decoder: Float[np.ndarray, " k"]
    nearest: Int[np.ndarray, " k"]
    overlap: Float[np.ndarray, " k"]

    def __len__(self) -> int:
        return len(self.names)


class _Drifter(Accumulator):
    """Reads no rows: weights and pins say it all."""

    def __init__(self, stream: Stream, *, pins: Pins | None = None):
        super().__init__(stream)
        self.pins = pins

    def add(self, rows: Rows) -> None:
        pass

    def result(self) -> Drift:
        dictionary, pins = self.stream.dictionary, self.pins
        if pins is None or len(pins) == 0:
            none = np.zeros(0, dtype=np.float32)
            ids = np.zeros(0, dtype=np.int64)
            return Drift((), ids, none, none.astype(bool), none, none, ids, none)
        pins = pins.to(dictionary.device)
        if int(pins.latents.max()) >= dictionary.n_latents:
            raise ValueError(
                f"measure_drift: latent {int(pins.latents.max())} is pinned and the dictionary has {dictionary.n_latents}; "
                "take the pins of its own session."
            )
        cosines = (pins.anchors.targets @ pins.anchors.targets.T).fill_diagonal_(-1).cpu().numpy()
        alone = len(pins) == 1
        return Drift(
            names=pins.anchors.names,
            latents=pins.latents.cpu().numpy(),
            weight=pins.weight.cpu().numpy(),
            hard=pins.hard.cpu().numpy(),
            encoder=row_cosines(dictionary.W_enc[pins.latents], pins.anchors.inputs),
            decoder=row_cosines(dictionary.W_dec[pins.latents], pins.anchors.targets),
            nearest=np.full(1, -1) if alone else cosines.argmax(axis=1),
            overlap=cosines.max(axis=1),
        )


@finding(_Drifter)
def measure_drift(dictionary: SparseDictionary, activations: Activations, pins: Pins | None = None) -> Drift:
    """How far each pinned latent has moved from its anchor, and which anchors are nearly the same direction.

        encoder_j = cos(W_enc[latents_j], anchors.inputs_j);  decoder_j = cos(W_dec[latents_j], anchors.targets_j)
        overlap_j = max_{k != j} cos(anchors.targets_j, anchors.targets_k)

    A soft pin whose cosines fall has too small a weight. Raises ValueError for pins of another dictionary. Anchors: arXiv
    2512.05534, eq. 22-26.
    """
    return observe(dictionary, activations, [(measure_drift, {"pins": pins})])[0]
