"""Which feature is behind each firing of one latent, and how strongly the latent fires for it."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.cofiring import true_codes, true_directions
from sdl_explorer.diagnosis.observe import Accumulator, Rows, Stream, finding, observe
from sdl_explorer.models.dictionary import SparseDictionary


class Ridges(NamedTuple):
    """Histograms of a latent's codes by cause, with shared bins, most rows first.

    edges (n_bins + 1,);  features (k,), -1 where no feature adds, and -2 for all further ones together;  counts (k, n_bins) rows
    """

    edges: np.ndarray
    features: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Causes:
    """The m rows on which a latent fires: their place in the activations, its code, the feature that adds most to its
    pre-activation there (-1: none adds), and that feature's share of what all add. Without truth, `names` is empty and every
    feature is -1: the causes are unknown. Where the truth is not complete the rest of the row is one more feature, and its number -1.
    """

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

    def ridges(self, n_bins: int = 24, most: int = 6) -> Ridges:
        """How strongly it fires for each cause; equal bins from 0 to the largest code. The `most` commonest features stand alone."""
        edges = np.linspace(0, float(self.value.max(initial=0.0)) or 1.0, n_bins + 1)
        real, rows = np.unique(self.feature[self.feature >= 0], return_counts=True)
        alone = real[np.lexsort((real, -rows))][:most]
        cause = np.where((self.feature < 0) | np.isin(self.feature, alone), self.feature, -2)
        features = np.array([*alone, *(c for c in (-2, -1) if (cause == c).any())], dtype=np.int64)
        counts = np.array([np.histogram(self.value[cause == c], edges)[0] for c in features], dtype=np.int64)
        return Ridges(edges, features, counts.reshape(len(features), n_bins))


class _Tracer(Accumulator):
    def __init__(self, stream: Stream, *, latent=0):
        super().__init__(stream)
        if not 0 <= latent < stream.dictionary.n_latents:
            raise ValueError(f"trace_causes: latent {latent} does not exist; there are {stream.dictionary.n_latents}.")
        self.latent, self.n = int(latent), 0
        truth = stream.activations.truth
        self.known = truth is not None
        if truth is not None:
            self.features = true_directions(stream.activations, stream.dictionary, "trace_causes")
            self.codes = true_codes(stream.activations)
            self.reads = stream.dictionary.W_enc[latent].float()
            self.overlap = self.features.inputs @ self.reads
            mean = self.codes.mean(dim=0).to(self.overlap) @ self.overlap - stream.input_mean @ self.reads
            self.mean = None if truth.complete else mean
        self.parts: list[tuple[np.ndarray, ...]] = []

    def add(self, rows: Rows) -> None:
        first = int(rows.count[: self.latent].sum())
        row, value = (part[first : first + int(rows.count[self.latent])] for part in rows.entries[1:])
        feature, share = self._cause(row, rows) if self.known else (torch.full_like(row, -1), torch.zeros_like(value))
        self.parts.append(tuple(part.cpu().numpy() for part in (row + rows.start, value, feature, share)))
        self.n += rows.n

    def _cause(self, row: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        added = self.codes[row.to(self.codes.device) + rows.start].to(row.device).float() * self.overlap
        drive = added.relu()
        rest = drive.new_zeros(len(drive)) if self.mean is None else (rows.inputs[row] @ self.reads - added.sum(dim=1) + self.mean).relu_()
        largest, feature = drive.max(dim=1)
        feature = torch.where(largest > rest, feature, -1)
        return feature, largest / torch.where(largest > 0, drive.sum(dim=1) + rest, 1)

    def result(self) -> Causes:
        names = self.features.names if self.known else ()
        return Causes(self.latent, self.n, names, *(np.concatenate(parts) for parts in zip(*self.parts, strict=True)))


@finding(_Tracer)
def trace_causes(dictionary: SparseDictionary, activations: Activations, latent: int = 0) -> Causes:
    """For one latent, the feature behind each row on which it fires: argmax_k relu(codes_k <W_enc_latent, w_p^k>).

    Without true features the rows and codes are there, and every cause is -1. Raises ValueError for a latent that does not
    exist, and for what `observe` refuses.
    """
    return observe(dictionary, activations, [(trace_causes, {"latent": latent})])[0]
