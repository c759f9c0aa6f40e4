"""The card on anchors (T7): what freedom they remove. No theorem says so: equations are counted, and seeds are compared."""

import torch

from sdl_explorer.data.anchors import Pins
from sdl_explorer.diagnosis.cosines import row_cosines
from sdl_explorer.diagnosis.theory_cards import PAPER, Assumption, Found, Text, TheoryCard, Witness, card
from sdl_explorer.diagnosis.theory_facts import Facts
from sdl_explorer.diagnosis.theory_seeds import NEEDED, Seeds, Spread, measure_spread

T7 = Text(
    "T7",
    "anchors remove freedom",
    "For a fixed encoder, decoders that reconstruct each single feature alike leave (n_latents - rank Z) d_out numbers free, with z_d the "
    "rows of Z. Holding the rows A removes (rank [Z; E_A] - rank Z) d_out of them. What training finds does not follow: its spread over "
    "seeds, on features that no anchor is about, is measured beside it.",
    f"no theorem; counted on the constraints of {PAPER}, equations 17 and 26",
)
RANK = 1e-6  # singular values below it, relative to the largest, are rounding of single precision


def check_anchors(facts: Facts, pins: Pins | None, seeds: Seeds | None = None) -> TheoryCard:
    """T7. left = free numbers with the anchored decoder rows held, right = without.

    It holds where left < right and the spread over five seeds or more is smaller with anchors than without; it is violated where left =
    right, or where the spread is larger. An interval of the difference that holds 0 decides nothing.
    """
    if pins is None or len(pins) == 0:
        none = Assumption("some latents are anchored", "none is; anchor some, or give pins=", None)
        return card(T7, [none], Found("not checkable", ""), facts.sums.n, facts.tolerance)
    latents = pins.latents.cpu()
    if int(latents.max()) >= facts.n_latents:
        raise ValueError(
            f"check_theory: latent {int(latents.max())} is pinned and the dictionary has {facts.n_latents}; "
            "take the pins of its own session."
        )
    cosines = row_cosines(facts.model.W_dec[latents].float(), pins.anchors.targets.cpu().float())
    worst = int(cosines.argmin())
    held = Assumption(
        "anchored decoder rows point at their anchors",
        f"least cosine {cosines[worst]:.4g}, of latent {int(latents[worst])}",
        bool(cosines[worst] >= 1 - facts.tolerance),
    )
    rest = torch.ones(facts.n_latents, dtype=torch.bool)
    rest[latents] = False
    d_out = facts.W_r.shape[1]
    rank, left_over = rank_of(facts.z), rank_of(facts.z[:, rest])
    right, left = (facts.n_latents - rank) * d_out, (int(rest.sum()) - left_over) * d_out
    n_seeds = 0 if seeds is None else len(seeds.free)
    spread = None if seeds is None else measure_spread(seeds, facts.W_r)
    counted, says, reason = _read(left, right, spread)
    enough = Assumption(f"at least {NEEDED} seeds, with anchors and without", f"n = {n_seeds}; {counted}", n_seeds >= NEEDED or None)
    numbers: dict[str, float | str] = {
        "anchored latents": float(len(latents)),
        "rank Z": float(rank),
        "rank [Z; E_A]": float(len(latents) + left_over),
        "numbers removed": float(right - left),
        "numbers that the anchors fix": float(len(latents) * d_out),
        "seeds": float(n_seeds),
    }
    if spread is not None:
        numbers |= {
            "features that no anchor is about": float(spread.n_features),
            "spread with anchors": spread.anchored,
            "spread without anchors": spread.free,
            "difference": spread.difference,
            "difference, from": spread.low,
            "difference, to": spread.high,
        }
    return card(
        T7,
        [held, enough] if left < right else [held],
        Found(
            says,
            reason,
            "free numbers with anchors < free numbers without",
            left,
            right,
            Witness(f"latent {int(latents[worst])} is furthest from its anchor", (), (int(latents[worst]),)),
            numbers,
        ),
        facts.sums.n,
        facts.tolerance,
    )


def _read(left: int, right: int, spread: Spread | None) -> tuple[str, str, str]:
    """What was counted, and the verdict and reason, were every assumption met."""
    counted = f"of {right:,} free numbers of the decoder {left:,} remain"
    if left >= right:
        return counted, "violated", f"{counted}: the features alone had fixed the anchored rows"
    if spread is None or not spread.low <= spread.high:
        return counted, "not checkable", f"{counted}; the spread over seeds is not known"
    found = (
        f"{counted}; the spread over {spread.n} seeds is {spread.anchored:.3g} with anchors and {spread.free:.3g} without, difference "
        f"{spread.difference:.2g} ({spread.low:.2g} to {spread.high:.2g})"
    )
    if spread.high < 0:
        return counted, "holds", found
    if spread.low > 0:
        return counted, "violated", found
    return counted, "not checkable", f"{found}, which could be none"


def rank_of(rows: torch.Tensor) -> int:
    return int(torch.linalg.matrix_rank(rows, rtol=RANK)) if rows.numel() else 0
