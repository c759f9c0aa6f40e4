"""Which feature is behind each firing of one latent, and how strongly the latent fires for it."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.cofiring import true_codes, true_directions
from sdl_explorer.diagnosis.observe import Accumulator, Rows, Stream, finding, observe
from sdl_explorer.models.dictionary import SparseDictionary


@dataclass(frozen=True)
class Causes:
    """The m rows on which a latent fires: their place in the activations, its code, the feature that adds most to its
    pre-activation there (-1: none adds), and that feature's share of what all add."""

    latent: int
    n_samples: int
    names: tuple[str, ...]
    row: Int[np.ndarray, " m"]
    value: Float[np.ndarray, " m"]
    feature: Int[np.ndarray, " m"]
    share: Float[np.ndarray, " m"]

    def values_of(self, feature: int) -> Float[np.ndarray, " n_rows"]:
        """The codes on the rows that this feature is behind: two features with two humps are two meanings."""
        return self.value[self.feature == feature]


class _Tracer(Accumulator):
    def __init__(self, stream: Stream, *, latent=0):
        super().__init__(stream)
        if not 0 <= latent < stream.dictionary.n_latents:
            raise ValueError(f"trace_causes: latent {latent} does not exist; there are {stream.dictionary.n_latents}.")
        self.features, self.latent, self.n = true_directions(stream.activations, stream.dictionary, "trace_causes"), int(latent), 0
        self.codes = true_codes(stream.activations)
        self.overlap = self.features.inputs @ stream.dictionary.W_enc[latent].float()
        self.parts: list[tuple[np.ndarray, ...]] = []

    def add(self, rows: Rows) -> None:
        first = int(rows.count[: self.latent].sum())
        row, value = (part[first : first + int(rows.count[self.latent])] for part in rows.entries[1:])
        drive = (self.codes[row.to(self.codes.device) + rows.start].to(row.device).float() * self.overlap).relu_()
        largest, feature = drive.max(dim=1)
        feature = torch.where(largest > 0, feature, -1)
        share = largest / torch.where(largest > 0, drive.sum(dim=1), 1)
        self.parts.append(tuple(part.cpu().numpy() for part in (row + rows.start, value, feature, share)))
        self.n += rows.n

    def result(self) -> Causes:
        return Causes(self.latent, self.n, self.features.names, *(np.concatenate(parts) for parts in zip(*self.parts, strict=True)))


@finding(_Tracer)
def trace_causes(dictionary: SparseDictionary, activations: Activations, latent: int = 0) -> Causes:
    """For one latent, the feature behind each row on which it fires: argmax_k relu(codes_k <W_enc_latent, w_p^k>).

    Raises ValueError without true features, for a latent that does not exist, and for what `observe` refuses.
    """
    return observe(dictionary, activations, [(trace_causes, {"latent": latent})])[0]
