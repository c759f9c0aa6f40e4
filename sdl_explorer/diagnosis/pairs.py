"""Which of some latents fire together: conditional rates, asymmetric on purpose."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.observe import Accumulator, Rows, Stream, encoded, finding, observe
from sdl_explorer.models.dictionary import SparseDictionary

MOST = 40  # latents in a matrix


@dataclass(frozen=True)
class Pairs:
    """Counts of m latents, ordered so that those that fire together stand together.

    latents (m,) ids; n_given: how many were asked for; where that is more than 40, these are the strongest.
    strength (m,)  sum z |W_dec| over the rows, in units of the targets;  fired (m,) rows;  both (m, m) rows on which j and k fire
    """

    n_samples: int
    n_given: int
    latents: Int[np.ndarray, " m"]
    strength: Float[np.ndarray, " m"]
    fired: Int[np.ndarray, " m"]
    both: Int[np.ndarray, "m m"]

    @property
    def conditional(self) -> Float[np.ndarray, "m m"]:
        """P(k fires | j fires), row j and column k; 0 where j never fires."""
        return self.both / np.maximum(self.fired, 1)[:, None]


class _Counter(Accumulator):
    def __init__(self, stream: Stream, *, latents=()):
        super().__init__(stream)
        self.given = torch.tensor(sorted({int(i) for i in latents}), dtype=torch.int64, device=stream.dictionary.device)
        outside = [int(i) for i in self.given if not 0 <= i < stream.dictionary.n_latents]
        if outside:
            raise ValueError(f"count_pairs: latent {outside[0]} does not exist; there are {stream.dictionary.n_latents}.")
        self.n = 0
        self._start(self.given)

    def _start(self, latents: torch.Tensor) -> None:
        m = len(latents)
        self.latents, self.total = latents, torch.zeros(m, dtype=torch.float64)
        self.place = torch.full((self.stream.dictionary.n_latents,), -1, device=latents.device)
        self.place[latents] = torch.arange(m, device=latents.device)
        self.both = torch.zeros((m, m) if m <= MOST else (0, 0), dtype=torch.int64)

    def add(self, rows: Rows) -> None:
        self.n += rows.n
        self._count(rows)

    def _count(self, rows: Rows) -> None:
        latent, row, value = rows.entries
        place = self.place[latent]
        kept = place >= 0
        place, row, m = place[kept], row[kept], len(self.latents)
        self.total += torch.bincount(place, weights=value[kept].double(), minlength=m).cpu()
        if m <= MOST:
            fires = torch.zeros(rows.n, m, device=row.device).index_put_((row, place), torch.ones((), device=row.device))
            self.both += (fires.T @ fires).cpu().long()

    def result(self) -> Pairs:
        dictionary = self.stream.dictionary
        if len(self.latents) > MOST:  # who is strongest is known only now: a second pass, over those alone
            strength = self.total * self._norms()
            self._start(self.latents[strength.argsort(descending=True, stable=True)[:MOST].sort().values.to(self.latents.device)])
            for rows in encoded(dictionary, self.stream.activations):
                self._count(rows)
        both = self.both.numpy()
        order = _together(both)
        return Pairs(
            n_samples=self.n,
            n_given=len(self.given),
            latents=self.latents.cpu().numpy()[order],
            strength=(self.total * self._norms()).numpy()[order],
            fired=both.diagonal()[order],
            both=both[np.ix_(order, order)],
        )

    def _norms(self) -> torch.Tensor:
        dictionary = self.stream.dictionary
        return dictionary.W_dec[self.latents].norm(dim=1).cpu().double() / dictionary.target_scale


@finding(_Counter)
def count_pairs(dictionary: SparseDictionary, activations: Activations, latents: tuple[int, ...] = ()) -> Pairs:
    """How often each of these latents fires when another one does: `pairs.conditional[j, k]` = P(z_k > 0 | z_j > 0).

    A child's latent that fires only with its parent's shows as 1 one way and less the other. Above 40 latents the 40 with the largest
    sum of z |W_dec| are counted, in a second pass over the rows. No truth is needed. A latent that never fires has zeros, never NaN.
    Raises ValueError for a latent that does not exist, and for what `observe` refuses.
    """
    return observe(dictionary, activations, [(count_pairs, {"latents": latents})])[0]


def _together(both: np.ndarray) -> np.ndarray:
    """An order of the latents by average linkage on the Jaccard distance of their rows."""
    if len(both) < 3:
        return np.arange(len(both))
    fired = both.diagonal()
    either = fired[:, None] + fired[None, :] - both
    distance = 1 - np.divide(both, either, out=np.zeros(both.shape), where=either > 0)
    np.fill_diagonal(distance, 0)
    return leaves_list(linkage(squareform(distance, checks=False), "average", optimal_ordering=True))
