"""What best cosines are worth: the score of random unit rows of the same shapes, in closed form."""

from dataclasses import dataclass

import numpy as np
from scipy.integrate import trapezoid
from scipy.special import betainc


@dataclass(frozen=True)
class Chance:
    """Best cosine of any fixed direction with `n_latents` independent random unit rows of width d.

    One cosine c has (1 + c)/2 ~ Beta((d-1)/2, (d-1)/2), so the best of n_latents exceeds tau with probability
    1 - (1 - P(c > tau))^n_latents: what simulation estimates, without its noise (compare the null model of mean max
    cosine similarity, Sharkey et al. 2022). It does not depend on the features, so it holds for their average too.

    Sides "encoder" and "response" live in d_in, "decoder" in d_out; "minimum" takes independent rows on both.
    """

    n_latents: int
    n_features: int
    d_in: int
    d_out: int

    def recovery(self, tau: float | np.ndarray = 0.95, side: str = "decoder", signed: bool = True) -> float | np.ndarray:
        """Expected share of the features whose best cosine exceeds tau, scalar or array."""
        beyond = np.prod([_beyond(np.asarray(tau, dtype=float), d, signed) for d in self._widths(side)], axis=0)
        with np.errstate(divide="ignore"):
            share = -np.expm1(self.n_latents * np.log1p(-beyond))
        return float(share) if np.ndim(tau) == 0 else share

    def mean_best(self, side: str = "decoder", signed: bool = True) -> float:
        """Expected mean best cosine: lowest + integral of P(best > t) dt."""
        grid = np.linspace(-1.0 if signed else 0.0, 1.0, 8001)
        return float(grid[0] + trapezoid(self.recovery(grid, side, signed), grid))

    def sample(self, side: str = "decoder", signed: bool = True) -> np.ndarray:
        """n_features sorted best cosines at the mid-quantiles, for a chance curve beside a measured one."""
        grid = np.linspace(-1.0 if signed else 0.0, 1.0, 8001)
        quantiles = (np.arange(self.n_features) + 0.5) / self.n_features
        return np.interp(quantiles, 1.0 - self.recovery(grid, side, signed), grid)

    def _widths(self, side: str) -> tuple[int, ...]:
        widths = {"encoder": (self.d_in,), "response": (self.d_in,), "decoder": (self.d_out,), "minimum": (self.d_in, self.d_out)}
        if side not in widths:
            raise ValueError(f"chance: side is {side!r}; it is one of {', '.join(widths)}.")
        return widths[side]


def _beyond(tau: np.ndarray, d: int, signed: bool) -> np.ndarray:
    """P(c > tau) for one random cosine in d dimensions (|c| when not signed)."""
    inside = np.clip(tau, -1.0 if signed else 0.0, 1.0)
    if d == 1:
        beyond = np.where(inside >= 1, 0.0, 0.5 if signed else 1.0)
    elif signed:
        beyond = betainc((d - 1) / 2, (d - 1) / 2, (1 - inside) / 2)
    else:
        beyond = betainc((d - 1) / 2, 0.5, 1 - inside**2)
    return np.where(tau < inside, 1.0, np.where(tau > inside, 0.0, beyond))
