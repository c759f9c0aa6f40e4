"""Where latents fire on choose rows, and what all others leave for one of them to write."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.training.interventions import BLOCK, evaluating

FIRES = 1e-6  # of |W_enc_i| |x|, as in findings: rounding at an exact zero is not firing
SAME = 0.95  # cosine of both rows from which a latent is a copy of another


class Firings:
    """One pass over choose rows: the codes that fire, by latent, and the residuals. Made under no_grad.

    inputs (n, d_in)   as the encoder sees them;  residual (n, d_out) = x_r - recon;  count (n_latents,)
    """

    def __init__(self, dictionary: SparseDictionary, choose: Activations):
        self.dictionary = dictionary
        entries, residual, inputs, reads = [], [], [], dictionary.W_enc.norm(dim=1)
        with evaluating(dictionary):
            for start in range(0, len(choose), BLOCK):
                x, target = (side[start : start + BLOCK].to(dictionary.W_enc) for side in (choose.inputs, choose.targets))
                latents, reconstruction, _ = dictionary(x)
                row, latent, value = latents.entries()
                fires = value > FIRES * reads[latent] * x.norm(dim=1)[row]
                entries.append((latent[fires], row[fires] + start, value[fires]))
                residual.append(target - reconstruction)
                inputs.append(dictionary.centred(x))
        latent, row, value = (torch.cat(side) for side in zip(*entries, strict=True))
        order = latent.argsort(stable=True)
        self.residual, self.inputs = torch.cat(residual), torch.cat(inputs)
        self.row, self.value = row[order], value[order]
        self.count = torch.bincount(latent, minlength=dictionary.n_latents)
        self.ends = self.count.cumsum(0).tolist()

    def of(self, latent: int) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
        """The rows on which a latent fires, and its codes there."""
        span = slice(self.ends[latent] - int(self.count[latent]), self.ends[latent])
        return self.row[span], self.value[span]

    def left_for(self, latent: int) -> Float[Tensor, "m d_out"]:
        """What it should have written on those rows, all others as they are: residual + z_i W_dec_i."""
        row, value = self.of(latent)
        return self.residual[row] + value[:, None] * self.dictionary.W_dec[latent]

    def share(self, latent: int, others: Int[Tensor, " k"]) -> Float[Tensor, " k"]:
        """P(other fires | latent fires)."""
        rows = torch.zeros(len(self.inputs), dtype=torch.bool, device=self.row.device)
        rows[self.of(latent)[0]] = True
        both = [int(rows[self.of(int(j))[0]].sum()) for j in others]
        return torch.tensor(both, dtype=torch.float32, device=self.row.device) / max(int(self.count[latent]), 1)


def copies(dictionary: SparseDictionary) -> list[int]:
    """Latents whose encoder and decoder rows both point where those of a latent with a smaller number do."""
    reads, writes, found = normalize(dictionary.W_enc, dim=1), normalize(dictionary.W_dec, dim=1), []
    for start in range(0, len(reads), BLOCK):
        block = slice(start, start + BLOCK)
        both = torch.minimum(reads[block] @ reads.T, writes[block] @ writes.T)
        before = torch.arange(len(reads), device=both.device)[None] < torch.arange(start, start + len(both), device=both.device)[:, None]
        found += (start + ((both >= SAME) & before).any(dim=1).nonzero().flatten()).tolist()
    return found
