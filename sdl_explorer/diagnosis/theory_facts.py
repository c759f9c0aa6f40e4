"""What the theory cards share: each feature shown alone in double precision, and the sums of one pass over the rows."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_array
from scipy.stats import poisson
from torch import Tensor

from sdl_explorer.data.activations import Truth
from sdl_explorer.diagnosis.observe import FIRES, Rows
from sdl_explorer.diagnosis.theory_cards import Assumption
from sdl_explorer.models.dictionary import Nonlinearity, Pointwise, SparseDictionary

LARGEST = 2**26  # cells of n_features x n_latents in double precision: 512 MB
CELLS = 2**18  # of them that are worked on at once
UNIT = 1e-3  # how far from 1 the norm of a unit direction may be
REJECT = 1e-3  # chance of calling independent features dependent


class Sums:
    """Squared errors by the number of active features, and which features are active together; one `add` a block of rows."""

    def __init__(self, truth: Truth):
        n = truth.n_features
        self.truth, self.n = truth, 0
        self.error, self.rows = np.zeros(3), np.zeros(3, dtype=np.int64)  # of rows with 0, 1, more active features
        self.largest, self.largest_row = 0.0, -1
        self.alone, self.alone_error, self.alone_square = np.zeros((3, n))
        self.active, self.square = np.zeros((2, n))
        self.both = csr_array((n, n))
        self.off, self.size = np.zeros(2), np.zeros(2)  # of inputs, targets: squares of what no feature explains, and in all
        self.negative = 0

    def add(self, rows: Rows) -> None:
        codes = self.truth.codes[rows.start : rows.start + rows.n].to(rows.inputs.device).float()
        sides = ((rows.inputs, self.truth.input_features), (rows.targets, self.truth.target_features))
        for side, (values, features) in enumerate(sides):
            self.off[side] += (values - codes @ features.to(values)).square().sum().item()
            self.size[side] += values.square().sum().item()
        errors = (rows.targets - rows.reconstruction).cpu().double().square().sum(dim=1).numpy()
        codes = codes.cpu().double().numpy()
        self.negative += int((codes < 0).sum())
        on = csr_array(codes > 0, dtype=np.float64)
        kind = np.minimum(np.diff(on.indptr), 2)
        self.error += np.bincount(kind, weights=errors, minlength=3)
        self.rows += np.bincount(kind, minlength=3)
        if errors.max() > self.largest:
            self.largest, self.largest_row = float(errors.max()), rows.start + int(errors.argmax())
        single = np.flatnonzero(kind == 1)
        feature = on.indices[on.indptr[single]]
        n = len(self.active)
        self.alone += np.bincount(feature, minlength=n)
        self.alone_error += np.bincount(feature, weights=errors[single], minlength=n)
        self.alone_square += np.bincount(feature, weights=codes[single, feature] ** 2, minlength=n)
        self.active += np.asarray(on.sum(axis=0)).ravel()
        self.square += (np.maximum(codes, 0) ** 2).sum(axis=0)
        self.both = self.both + on.T @ on
        self.n += rows.n

    @cached_property
    def rates(self) -> Float[np.ndarray, " n_features"]:
        return self.active / self.n

    @cached_property
    def dependence(self) -> tuple[float, tuple[int, int]]:
        """The smallest chance of a pair's joint count if it were independent (Poisson, both tails), times the number of pairs; the pair."""
        n = len(self.active)
        expected = np.outer(self.active, self.active / self.n)
        seen = self.both.toarray()
        chance = np.minimum(poisson.cdf(seen, expected), poisson.sf(seen - 1, expected))
        chance[np.tril_indices(n)] = np.inf
        pair = np.unravel_index(int(chance.argmin()), chance.shape)
        return (float(min(1.0, chance[pair] * n * (n - 1))) if n > 1 else 1.0), (int(pair[0]), int(pair[1]))

    @cached_property
    def weights(self) -> tuple[Float[np.ndarray, " n_features"], str]:
        """M_d = P(x = x_d e_d) E[x_d^2 | x_d > 0], and where the probability is from.

        Counted where every feature was seen alone, or features are dependent; else rate_d prod_{j != d} (1 - rate_j).
        """
        strength = self.square / np.maximum(self.active, 1)
        if self.alone.all() or self.dependence[0] < REJECT:
            return self.alone / self.n * strength, "counted on rows with one active feature"
        silent = np.log1p(-np.minimum(self.rates, 1 - 1e-12))
        return self.rates * np.exp(silent.sum() - silent) * strength, "from the rates of independent features"


@dataclass(frozen=True)
class Model:
    """The dictionary without its scales, in double precision on the CPU: z = sigma(W_enc x + b_enc), recon = z W_dec + b_dec."""

    dictionary: SparseDictionary
    sigma: Nonlinearity
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    @classmethod
    def of(cls, dictionary: SparseDictionary) -> "Model":
        W_enc, b_enc, W_dec, b_dec = (getattr(dictionary, name).detach().double().cpu() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
        if dictionary.subtract_b_dec:
            b_enc = b_enc - W_enc @ b_dec
        sigma = deepcopy(dictionary.nonlinearity).cpu()  # not every device has double precision
        return cls(
            dictionary, sigma, W_enc * dictionary.input_scale, b_enc, W_dec / dictionary.target_scale, b_dec / dictionary.target_scale
        )

    name = property(lambda self: type(self.sigma).__name__)
    masks_only = property(lambda self: getattr(self.sigma, "masks_only", False))

    def codes(self, pre: Tensor) -> Tensor:
        """sigma, for one that reads pre-activations alone."""
        found = self.sigma(pre, inputs=None, dictionary=self.dictionary)
        return found if isinstance(found, Tensor) else found.dense()

    def alone(self, inputs: Tensor) -> Tensor:
        """The codes of each row of inputs."""
        if self.masks_only or isinstance(self.sigma, Pointwise):
            return self.codes(inputs @ self.W_enc.T + self.b_enc)
        return self.dictionary.encode(inputs.to(self.dictionary.W_enc)).dense().double().cpu()

    def fires(self, codes: Tensor) -> Tensor:
        """Which codes of unit inputs are firing: above rounding."""
        return codes > FIRES * self.W_enc.norm(dim=1)


def blocks(n: int, width: int) -> Iterator[slice]:
    """Rows of an n x width array, as many at a time as are worked on at once."""
    step = max(1, CELLS // width)
    return (slice(start, start + step) for start in range(0, n, step))


class Facts:
    """The model, the true features, each feature alone, and the sums: what a card is made of."""

    def __init__(self, dictionary: SparseDictionary, sums: Sums, tolerance: float):
        self.model, self.sums, self.tolerance = Model.of(dictionary), sums, tolerance
        self.n, self.n_latents = sums.truth.n_features, dictionary.n_latents
        self.W_p, self.W_r = (w.detach().double().cpu() for w in (sums.truth.input_features, sums.truth.target_features))
        weights, self.weights_from = sums.weights
        self.weights = torch.from_numpy(weights)

    @cached_property
    def z(self) -> Tensor:
        """z_d = sigma(W_enc w_p^d), (n_features, n_latents): large, and made only where it is needed whole."""
        return torch.cat([z for _, z in self.codes()])

    def codes(self) -> Iterator[tuple[slice, Tensor]]:
        """z_d of a few features at a time."""
        for some in blocks(self.n, self.n_latents):
            yield some, self.model.alone(self.W_p[some])

    @cached_property
    def pattern(self) -> Tensor:
        """F_i as columns: which features fire latent i alone, bool (n_features, n_latents)."""
        return torch.cat([self.model.fires(z) for _, z in self.codes()])

    @cached_property
    def sizes(self) -> Tensor:
        """|F_i| of each latent; numpy adds booleans without a copy in integers."""
        return torch.from_numpy(self.pattern.numpy().sum(axis=0))

    @cached_property
    def residual(self) -> Tensor:
        """w_r^d - W_dec^T z_d - b_dec, (n_features, d_out)."""
        return torch.cat([self.W_r[some] - z @ self.model.W_dec - self.model.b_dec for some, z in self.codes()])

    @cached_property
    def loss(self) -> float:
        """L~ = sum_d M_d |w_r^d - W_dec^T sigma(W_enc w_p^d)|^2"""
        return float(self.weights @ self.residual.square().sum(dim=1))

    @cached_property
    def overlap(self) -> tuple[float, tuple[int, int]]:
        """M = max_{i != j} <w_p^i, w_p^j>, signed, and the pair; 0 for one feature."""
        if self.n < 2:
            return 0.0, (0, 0)
        gram = (self.W_p @ self.W_p.T).fill_diagonal_(-torch.inf)
        at = int(gram.argmax())
        return float(gram.max()), (at // self.n, at % self.n)

    # assumptions that several theorems share ---------------------------------------------------------------------------

    def linear(self) -> Assumption:
        off = np.sqrt(self.sums.off / np.maximum(self.sums.size, np.finfo(float).tiny))
        value = f"{off[0]:.2g} of the inputs and {off[1]:.2g} of the targets is not a sum of features"
        return Assumption("rows are sums of features, x_p = W_p x and x_r = W_r x", value, bool(off.max() <= self.tolerance))

    def nonnegative(self) -> Assumption:
        return Assumption("feature activations are >= 0", f"{self.sums.negative:,} below zero", self.sums.negative == 0)

    def unit(self, side: str) -> Assumption:
        rows = {"input": self.W_p, "target": self.W_r}[side]
        off = float((rows.norm(dim=1) - 1).abs().max())
        return Assumption(f"{side} features have norm 1", f"off by at most {off:.2g}", off <= UNIT)

    def no_biases(self) -> Assumption:
        largest = max(float(b.abs().max()) for b in (self.model.b_enc, self.model.b_dec))
        return Assumption("no biases", f"largest {largest:.3g}", largest == 0)

    def homogeneous(self) -> Assumption:
        met = bool(getattr(self.model.sigma, "homogeneous", False))
        return Assumption("sigma(a z) = a sigma(z)", f"{self.model.name}: {'yes' if met else 'no, or not declared'}", met)

    def masks(self) -> Assumption:
        known = not isinstance(self.model.sigma, Pointwise)
        words = "yes" if self.model.masks_only else "no" if known else "not declared"
        met = True if self.model.masks_only else (False if known else None)
        return Assumption("sigma keeps a pre-activation or sets it to 0", f"{self.model.name}: {words}", met)

    def weighed(self) -> Assumption:
        least = int(self.weights.argmin())
        value = f"smallest {float(self.weights[least]):.3g}, of feature {least} ({self.weights_from})"
        return Assumption("every feature occurs alone, M_d > 0", value, bool(self.weights[least] > 0))

    def independent(self) -> Assumption:
        chance, pair = self.sums.dependence
        value = f"the most telling pair is {pair}, p = {chance:.2g} after correction for all pairs"
        return Assumption("features are active independently", value, chance >= REJECT)
