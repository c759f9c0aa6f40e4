"""One block of rows as findings see it: inputs, targets, and the codes that fire, by latent."""

from functools import cached_property

import torch
from torch import Tensor

from sdl_explorer.models.dictionary import Latents

SPARSE = 1 / 16  # share of the codes that fire, below which sums over entries beat a dense product


class Rows:
    """One block of b rows, on the dictionary's device, after one forward pass.

    inputs (b, d_in), targets (b, d_out; the same tensor as inputs for an SAE), reconstruction (b, d_out)
    count   how often each latent fires in this block, int (n_latents,)
    first   where each latent's entries begin, int (n_latents,)
    sparse  whether few enough codes fire that `entries` is the cheap way to read them; `codes` and `fired` then make dense
            matrices, which `codes_of` does not
    """

    def __init__(self, start: int, inputs: Tensor, targets: Tensor, latents: Latents, reconstruction: Tensor, reads: Tensor):
        self.start, self.inputs, self.targets, self.reconstruction = start, inputs, targets, reconstruction
        self.n, self.n_latents = len(inputs), latents.n_latents
        norms = inputs.norm(dim=1)
        if latents.is_sparse:
            row, latent, value = latents.row, latents.layout[0], latents.values
            self.entries = _by_latent(row, latent, value, (value > reads[latent] * norms[row]).nonzero()[:, 0])
            self.count = torch.bincount(self.entries[0], minlength=self.n_latents)
        else:
            codes = latents.values.float()
            self.fired = codes > norms[:, None] * reads
            self.codes = torch.where(self.fired, codes, 0)
            self.count = self.fired.sum(dim=0)
        n_entries = len(self.entries[0]) if latents.is_sparse else int(self.count.sum())
        self.sparse = n_entries < SPARSE * self.n * self.n_latents

    @cached_property
    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """(latent, row in the block, value) of every code that fires, by latent and then by row."""
        if not self.sparse:
            latent, row = self.fired.T.nonzero(as_tuple=True)
            return latent, row, self.codes[row, latent]
        row, latent = self.fired.nonzero(as_tuple=True)
        return _by_latent(row, latent, self.codes[row, latent], slice(None))

    @cached_property
    def first(self) -> Tensor:
        return self.count.cumsum(0) - self.count

    @cached_property
    def codes(self) -> Tensor:
        """Dense (b, n_latents), zero wherever the latent does not fire."""
        latent, row, value = self.entries
        return value.new_zeros(self.n, self.n_latents).index_put((row, latent), value)

    @cached_property
    def fired(self) -> Tensor:
        """bool (b, n_latents)."""
        return self.codes > 0

    def codes_of(self, chosen: Tensor) -> Tensor:
        """Codes of some latents, (b, m) for m ids, which may repeat; zero wherever a latent does not fire."""
        if not self.sparse:
            return self.codes[:, chosen]
        ids, place = chosen.unique(return_inverse=True)
        column = torch.full((self.n_latents,), -1, device=chosen.device)
        column[ids] = torch.arange(len(ids), device=chosen.device)
        latent, row, value = self.entries
        kept = (column[latent] >= 0).nonzero()[:, 0]
        codes = value.new_zeros(self.n, len(ids)).index_put((row[kept], column[latent[kept]]), value[kept])
        return codes[:, place]


def _by_latent(row: Tensor, latent: Tensor, value: Tensor, kept) -> tuple[Tensor, Tensor, Tensor]:
    """The kept entries, which come by row, by latent and then by row."""
    row, latent, value = row[kept], latent[kept], value[kept]
    latent, order = latent.sort(stable=True)
    return latent, row[order], value[order].float()
