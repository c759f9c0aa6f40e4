"""Cards on the value of the loss: the per-feature loss (T1), the constructed solution (T3), zero loss (T4)."""

import numpy as np
import torch

from sdl_explorer.diagnosis.theory_cards import PAPER, Assumption, Found, Text, TheoryCard, Witness, card
from sdl_explorer.diagnosis.theory_facts import Facts, blocks

T1 = Text(
    "T1",
    "the loss is nearly a sum over single features",
    "Where at most one feature is active at a time in all but rare rows, |L - L~| <= n^2 C (1-S)^2, with C the largest squared error.",
    f"{PAPER}, Theorem 3.1 (v2, v3, v5/6)",
)
T3 = Text(
    "T3",
    "the constructed solution has small loss",
    "W_enc = [W_p; 0], W_dec = [W_r; 0] has L~ <= M^2 sum_d M_d (K_d - 1)^2 <= n^2 M^2 sum_d M_d; K_d latents fire for feature d.",
    f"{PAPER}, Theorem 3.3 of v5/6 (3.2 in v2)",
)
T4 = Text(
    "T4",
    "zero loss means every feature reconstructed, not recovered",
    "L~ = 0 if and only if w_r^d = W_dec^T sigma(W_enc w_p^d) for every feature d. It does not say that any latent is a feature.",
    f"{PAPER}, Theorem 3.4 of v5/6 (unnumbered in v2)",
)


def check_approximation(facts: Facts) -> TheoryCard:
    """T1. left = |L - L~| on these rows, right = n^2 C_N (1-S)^2.

    Where sigma is not homogeneous, or biases exist, L~ is the loss of the rows with at most one active feature.
    """
    sums, n = facts.sums, facts.n
    loss = float(sums.error.sum() / sums.n)
    plain = facts.homogeneous().met and facts.no_biases().met
    approximate = facts.loss if plain else float(sums.error[:2].sum() / sums.n)
    rate = float(sums.rates.max())
    left, right = abs(loss - approximate), n**2 * sums.largest * rate**2
    shares = sums.error / max(sums.error.sum(), np.finfo(float).tiny)
    numbers: dict[str, float | str] = {
        "L": loss,
        "L~": approximate,
        "L~ is": f"sum over features, M_d {facts.weights_from}" if plain else "the mean over rows with at most one active feature",
        "share of L with 0 active": float(shares[0]),
        "share of L with 1 active": float(shares[1]),
        "share of L with 2 or more": float(shares[2]),
        "P(2 or more active)": float(sums.rows[2] / sums.n),
        "C_N, a lower bound of C": sums.largest,
        "C_N P(2 or more active)": float(sums.largest * sums.rows[2] / sums.n),
    }
    sparse = Assumption("1 - S <= 1/n", f"1 - S = {rate:.3g}, 1/n = {1 / n:.3g}", rate <= 1 / n)
    finite = Assumption("errors are bounded, C < inf", f"largest on these rows {sums.largest:.3g}", bool(np.isfinite(sums.largest)))
    bounded = left <= right + facts.tolerance * loss
    return _card(
        facts,
        T1,
        [sparse, facts.independent(), facts.homogeneous(), facts.no_biases(), finite],
        Found(
            "holds" if bounded else "not checkable",
            f"the losses differ by {left:.3g} and the bound is {right:.3g}"
            + ("" if bounded else ": the largest error seen is only a lower bound of C"),
            "|L - L~| <= n^2 C_N (1-S)^2",
            left,
            right,
            Witness(
                f"row {sums.largest_row} has the largest error; feature {int(sums.rates.argmax())} is active most",
                (int(sums.rates.argmax()),),
            ),
            numbers,
        ),
    )


def check_construction(facts: Facts) -> TheoryCard:
    """T3. left = L~ of the constructed dictionary under this sigma, right = n^2 M^2 sum_d M_d."""
    n, total = facts.n, float(facts.weights.sum())
    room = Assumption("n_latents >= n_features", f"{facts.n_latents:,} and {n:,}", facts.n_latents >= n)
    largest, pair = facts.overlap
    shared = [room, facts.unit("target"), facts.masks(), facts.weighed()]
    if not room.met or not facts.model.masks_only:
        return _card(facts, T3, shared, Found("not checkable", "the solution cannot be built", witness=Witness(f"pair {pair}", pair)))
    rows = torch.zeros_like(facts.model.W_enc)
    rows[:n] = facts.W_p
    z = torch.cat([facts.model.codes(facts.W_p[some] @ rows.T)[:, :n] for some in blocks(n, len(rows))])
    residual = (facts.W_r - z @ facts.W_r).square().sum(dim=1)
    others = (z > 0).sum(dim=1).double() - 1
    left, right = float(facts.weights @ residual), n**2 * largest**2 * total
    tight = float(facts.weights @ others.clamp_min(0).square()) * max(largest, 0) ** 2
    own = float((z.diagonal() - 1).abs().max())
    worst = int(residual.argmax())
    numbers: dict[str, float | str] = {
        "M": largest,
        "n M": n * largest,
        "M^2 sum M_d (K_d - 1)^2": tight,
        "L~ of the zero model": float(facts.weights @ facts.W_r.square().sum(dim=1)),
        "L~ / sum M_d": left / total if total > 0 else float("nan"),
        "the bound beats the zero model": "yes" if n * abs(largest) < 1 else "no: it needs n M < 1",
    }
    bounded = left <= right + _rounding(total)
    return _card(
        facts,
        T3,
        [*shared, Assumption("each constructed latent reads its own feature as 1", f"off by at most {own:.2g}", own <= facts.tolerance)],
        Found(
            "holds" if bounded else "violated",
            f"its loss is {left:.3g} and the bound {right:.3g}",
            "L~(W_enc*, W_dec*) <= n^2 M^2 sum M_d",
            left,
            right,
            Witness(f"features {pair[0]} and {pair[1]} overlap most; feature {worst} is reconstructed worst", (*pair, worst)),
            numbers,
        ),
    )


def check_zero_loss(facts: Facts) -> TheoryCard:
    """T4. left = sqrt(L~ / sum M_d), right = the largest residual of a feature.

    With p the smallest share of a feature in sum M_d, sqrt(p) right <= left <= right: one is zero exactly where the other is. Where
    every feature was alone in some row, the left side is the error of those rows, and not made of the residuals.
    """
    sums, weights = facts.sums, facts.weights
    seen = bool(sums.alone.all())
    parts = torch.from_numpy(sums.alone_square if seen else weights.numpy())
    share = parts / parts.sum().clamp_min(torch.finfo(torch.float64).tiny)
    errors = facts.residual.norm(dim=1)
    left = float(sums.alone_error.sum() / sums.alone_square.sum()) ** 0.5 if seen else float(share @ errors.square()) ** 0.5
    right, worst = float(errors.max()), int(errors.argmax())
    slack = 3 * facts.tolerance
    agree = float(share.min()) ** 0.5 * right - slack <= left <= right + slack
    scores = {
        f"{name} {side}": value
        for side, rows, features in (("encoder", facts.model.W_enc, facts.W_p), ("decoder", facts.model.W_dec, facts.W_r))
        for name, value in _recovery(rows, features).items()
    }
    numbers: dict[str, float | str] = {
        "L~": facts.loss,
        "L": float(sums.error.sum() / sums.n),
        "features not reconstructed": float((errors > facts.tolerance).sum()),
        **scores,
        "left is": "measured on rows with one active feature" if seen else "the sum over features",
    }
    zero = right <= facts.tolerance
    state = "every feature is reconstructed" if zero else f"feature {worst} is not reconstructed (residual {right:.3g})"
    found = f"{scores['M_GT decoder']:.0%} of the features are recovered in decoder rows, {scores['M_GT encoder']:.0%} in encoder rows"
    return _card(
        facts,
        T4,
        [facts.weighed(), facts.homogeneous(), facts.no_biases()],
        Found(
            "holds" if agree else "violated",
            f"{state} and the loss is {'zero' if left <= slack else 'not zero'}; {found}",
            "sqrt(L~ / sum M_d) = 0 <=> largest residual = 0",
            left,
            right,
            Witness(f"feature {worst} has the largest residual", (worst,)),
            numbers,
        ),
    )


def _card(facts: Facts, text: Text, own: list[Assumption], found: Found) -> TheoryCard:
    """With the model of the data, which all three assume."""
    data = [facts.linear(), facts.unit("input"), facts.nonnegative()]
    return card(text, [*data, *own], found, facts.sums.n, facts.tolerance)


def _recovery(rows: torch.Tensor, features: torch.Tensor, tau: float = 0.95) -> dict[str, float]:
    """M_GT at tau and M_IP, by signed cosine; a row of zeros has none."""
    norms = rows.norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    best = torch.cat([(features[some] @ rows.T / norms).amax(dim=1) for some in blocks(len(features), len(rows))])
    return {"M_GT": float((best > tau).double().mean()), "M_IP": float(best.mean())}


def _rounding(size: float) -> float:
    return 1e-9 * size
