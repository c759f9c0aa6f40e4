"""What the latents do when one direction is shown alone: sigma(W_enc (offset + a w) + b_enc)."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import coo_array, csr_array
from torch import Tensor

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.observe import block_rows, encoded, evaluating
from sdl_explorer.diagnosis.sparse import Csr
from sdl_explorer.models.dictionary import SparseDictionary

MOST_ENTRIES = 2**27  # pairs of a latent and a direction that fires it: 1.6 GB at one magnitude


def respond_alone(
    dictionary: SparseDictionary,
    directions: Float[Tensor, "n_features d_in"],
    magnitudes: Float[np.ndarray, "n_levels n_features"] | None = None,
    offset: Float[Tensor, " d_in"] | None = None,
    pulse: Callable[[], None] = lambda: None,
) -> tuple[Csr, Float[np.ndarray, "n_levels n_entries"]]:
    """Which directions fire which latents, each direction shown alone at its magnitudes (None: 1).

    Returns a CSR matrix (n_latents, n_features) that holds the share of the levels at which a latent fires, where it does at
    all, and the codes z at each level in the order of its entries. Encoded in blocks of directions; `pulse()` is called after each.
    Raises ValueError where more than MOST_ENTRIES pairs fire.
    """
    n_features, n_latents = len(directions), dictionary.n_latents
    levels = torch.ones(1, n_features) if magnitudes is None else torch.as_tensor(magnitudes)
    levels = levels.to(dictionary.device)
    size = max(1, block_rows(max(n_latents, dictionary.d_in, dictionary.d_out)) // len(levels))
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    n_found = 0
    with evaluating(dictionary):
        for start in range(0, n_features, size):
            span = slice(start, min(start + size, n_features))
            part = _block(dictionary, directions[span].to(dictionary.device), levels[:, span], offset)
            found.append((part[0].astype(np.int32), (part[1] + start).astype(np.int32), part[2]))
            n_found += len(part[0])
            if n_found > MOST_ENTRIES:
                raise ValueError(
                    f"respond_alone: {n_found:,} pairs of a latent and a direction that fires it after {span.stop:,} of {n_features:,} "
                    f"directions; {MOST_ENTRIES:,} are kept. Give fewer directions, or a sparser dictionary."
                )
            pulse()
    latent, feature = (np.concatenate([part[side] for part in found]) for side in (0, 1))
    responses = np.concatenate([part[2] for part in found], axis=1)
    found.clear()
    places: Csr = csr_array(coo_array((np.arange(1, n_found + 1, dtype=np.int32), (latent, feature)), shape=(n_latents, n_features)))
    del latent, feature
    places.sort_indices()
    responses = responses[:, places.data - 1]
    shares = (responses > 0).mean(axis=0, dtype=np.float32) if n_found else np.zeros(0, dtype=np.float32)
    return csr_array((shares, places.indices, places.indptr), shape=places.shape), responses


def scales_freely(dictionary: SparseDictionary) -> bool:
    """Whether z(a x) = a z(x) for a > 0, so that one magnitude says all."""
    flat = not dictionary.b_enc.any() and not (dictionary.subtract_b_dec and dictionary.b_dec.any())
    return flat and bool(getattr(dictionary.nonlinearity, "homogeneous", False))


def _block(dictionary, directions: Tensor, levels: Tensor, offset: Tensor | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(latent, direction) of every pair that fires at some level, and its codes (n_levels, pairs)."""
    n_levels, n = levels.shape
    inputs = (levels.T[:, :, None] * directions[:, None, :]).flatten(0, 1)  # all levels of a direction, then the next one's
    inputs = inputs if offset is None else inputs + offset
    rows = next(encoded(dictionary, Activations(inputs, inputs), block=len(inputs)))
    latent, row, value = (part.cpu().numpy() for part in rows.entries)
    key = latent.astype(np.int64) * n + row // n_levels  # ascending: entries come by latent and then by row
    first = np.ones(len(key), dtype=bool)
    first[1:] = key[1:] != key[:-1]
    codes = np.zeros((n_levels, int(first.sum())), dtype=np.float32)
    codes[row % n_levels, first.cumsum() - 1] = value
    return key[first] // n, key[first] % n, codes
