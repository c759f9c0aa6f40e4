"""Is this dictionary alive, sparse and faithful? `check_health` needs no ground truth."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.cosines import row_cosines
from sdl_explorer.diagnosis.observe import Accumulator, Moments, Rows, Stream, finding, observe
from sdl_explorer.models.dictionary import SparseDictionary


@dataclass(frozen=True, repr=False)
class Health:
    """What `check_health` found; arrays have one entry per latent.

    mse                   mean over rows of the sum over coordinates of (x_r - recon)^2
    unexplained_variance  sum |x_r - recon|^2 / sum |x_r - mean x_r|^2, pooled over rows and coordinates
    l0                    mean number of latents that fire on a row
    utilisation           share of the latents that fired at all
    firing_rate           share of the rows on which a latent fires
    dead, unseen          masks, never both: silent for `dead_after` samples, silent on these rows but for less
    samples_since_fired   samples since each latent last fired
    shrinkage             mean |recon| / |x_r| (SAELens's definition), over rows that are not zero
    encoder_response      cos(W_enc_i, E[z_i x_p]/E[z_i] - E[x_p]); 0 where latent i never fired
    decoder_response      cos(W_dec_i, E[z_i x_r]/E[z_i] - E[x_r]); 0 where latent i never fired
    mean_activation       mean z_i over the rows on which latent i fires; 0 where it never did
    """

    n_samples: int
    mse: float
    unexplained_variance: float
    l0: float
    utilisation: float
    firing_rate: Float[np.ndarray, " n_latents"]
    dead: Bool[np.ndarray, " n_latents"]
    unseen: Bool[np.ndarray, " n_latents"]
    samples_since_fired: Int[np.ndarray, " n_latents"]
    shrinkage: float
    encoder_response: Float[np.ndarray, " n_latents"]
    decoder_response: Float[np.ndarray, " n_latents"]
    mean_activation: Float[np.ndarray, " n_latents"]
    dead_after: int | None = None

    def __repr__(self) -> str:
        return (
            f"Health({self.n_latents} latents on {self.n_samples:,} rows: {self.n_dead} dead, {self.n_unseen} unseen, "
            f"unexplained_variance={self.unexplained_variance:.4g}, mse={self.mse:.4g}, l0={self.l0:.4g})"
        )

    @property
    def n_latents(self) -> int:
        return len(self.dead)

    @property
    def n_dead(self) -> int:
        return int(self.dead.sum())

    @property
    def n_unseen(self) -> int:
        return int(self.unseen.sum())

    @property
    def alive(self) -> np.ndarray:
        """Neither dead nor unseen."""
        return ~(self.dead | self.unseen)


class _Checkup(Accumulator):
    def __init__(self, stream: Stream, *, samples_since_fired=None, dead_after=None):
        super().__init__(stream)
        n_latents = stream.dictionary.n_latents
        self.since, self.dead_after = _counts(samples_since_fired, n_latents), _window(dead_after)
        self.moments = stream.share(Moments)
        self.last = torch.full((n_latents,), -1, dtype=torch.int64, device=stream.dictionary.device)
        self.error = self.variance = self.ratio = 0.0
        self.n_ratio = 0

    def add(self, rows: Rows) -> None:
        sizes, made = rows.targets.norm(dim=1).cpu().double(), rows.reconstruction.norm(dim=1).cpu().double()
        self.error += (rows.targets - rows.reconstruction).square().sum(dim=1).cpu().double().sum().item()
        self.variance += (rows.targets - self.stream.target_mean).square().sum(dim=1).cpu().double().sum().item()
        seen = sizes > 0
        self.ratio += (made[seen] / sizes[seen]).sum().item()
        self.n_ratio += int(seen.sum())
        fires = rows.count > 0
        if rows.sparse:
            self.last[fires] = rows.start + rows.entries[1][(rows.first + rows.count)[fires] - 1]
        else:
            backwards = rows.fired.flip(0).to(torch.uint8).argmax(dim=0)  # rows after the last one on which each fires
            self.last = torch.where(fires, rows.start + rows.n - 1 - backwards, self.last)

    def result(self) -> Health:
        moments, dictionary = self.moments, self.stream.dictionary
        n, fires = moments.n, moments.count.numpy()
        silent = fires == 0
        here = np.where(silent, n, n - 1 - self.last.cpu().numpy())
        since = here if self.since is None else self.since
        dead = silent if self.dead_after is None else since >= self.dead_after
        return Health(
            n_samples=n,
            mse=self.error / n,
            unexplained_variance=self.error / self.variance if self.variance > 0 else float("nan"),
            l0=float(fires.sum() / n),
            utilisation=float((~silent).mean()),
            firing_rate=fires / n,
            dead=dead,
            unseen=silent & ~dead,
            samples_since_fired=since,
            shrinkage=self.ratio / self.n_ratio if self.n_ratio else float("nan"),
            encoder_response=row_cosines(dictionary.W_enc, moments.input_moment),
            decoder_response=row_cosines(dictionary.W_dec, moments.target_moment),
            mean_activation=moments.total.numpy() / np.maximum(fires, 1),
            dead_after=self.dead_after,
        )


@finding(_Checkup)
def check_health(
    dictionary: SparseDictionary,
    activations: Activations,
    samples_since_fired: Tensor | np.ndarray | None = None,
    dead_after: int | None = None,
) -> Health:
    """Error, sparsity, dead latents and the agreement of each latent's rows with what fires it.

        mse = mean_n |x_r - recon|^2
        unexplained_variance = sum |x_r - recon|^2 / sum |x_r - mean x_r|^2
        dead = samples_since_fired >= dead_after;  unseen = silent here and not dead

    Latent i fires on x when z_i > 1e-6 |W_enc_i| |x|. `samples_since_fired` (n_latents,) is what training
    counted; None counts on the rows given. Without `dead_after` the rows given are the window: silent is dead and
    none is unseen. A latent silent in N samples has a rate below 3/N at 95 %.

    `mse` is in squared units of the targets, summed over coordinates; `unexplained_variance` and `shrinkage` have
    no unit (NaN for targets that do not vary, or are all zero). Raises ValueError for counts of the wrong length
    and for what `observe` refuses. Responses: one-pass form of the spike-triggered average (Chichilnisky 2001).
    """
    settings = {"samples_since_fired": samples_since_fired, "dead_after": dead_after}
    return observe(dictionary, activations, [(check_health, settings)])[0]


def _counts(counts, n_latents: int) -> np.ndarray | None:
    if counts is None:
        return None
    counts = torch.as_tensor(counts).cpu().to(torch.int64).numpy().copy()
    if counts.shape != (n_latents,):
        raise ValueError(
            f"check_health: samples_since_fired has shape {counts.shape} and the dictionary {n_latents} latents; give one count each."
        )
    return counts


def _window(dead_after) -> int | None:
    if dead_after is not None and dead_after < 1:
        raise ValueError(f"check_health: dead_after is {dead_after}; it is a number of samples, at least 1, or None for the rows given.")
    return dead_after
