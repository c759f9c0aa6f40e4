"""The card on anchors (T7): how much of the decoder's freedom they remove. No theorem says so; it is counted."""

import torch

from sdl_explorer.data.anchors import Pins
from sdl_explorer.diagnosis.cosines import row_cosines
from sdl_explorer.diagnosis.theory_cards import PAPER, Assumption, Found, Text, TheoryCard, Witness, card
from sdl_explorer.diagnosis.theory_facts import Facts

T7 = Text(
    "T7",
    "anchors remove freedom",
    "For a fixed encoder, decoders that reconstruct each single feature alike leave (n_latents - rank Z) d_out numbers free, with z_d the "
    "rows of Z. Holding the rows A removes (rank [Z; E_A] - rank Z) d_out of them. What training finds does not follow.",
    f"no theorem; counted on the constraints of {PAPER}, equations 17 and 26",
)
RANK = 1e-6  # singular values below it, relative to the largest, are rounding of single precision


def check_anchors(facts: Facts, pins: Pins | None) -> TheoryCard:
    """T7. left = free numbers with the anchored decoder rows held, right = without; it holds where left < right."""
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
    numbers: dict[str, float | str] = {
        "anchored latents": float(len(latents)),
        "rank Z": float(rank),
        "rank [Z; E_A]": float(len(latents) + left_over),
        "numbers removed": float(right - left),
        "numbers that the anchors fix": float(len(latents) * d_out),
    }
    return card(
        T7,
        [held],
        Found(
            "holds" if left < right else "violated",
            f"of {right:,} free numbers of the decoder {left:,} remain; "
            + ("the spread over seeds is not part of this" if left < right else "the features alone had fixed the anchored rows"),
            "free numbers with anchors < free numbers without",
            left,
            right,
            Witness(f"latent {int(latents[worst])} is furthest from its anchor", (), (int(latents[worst]),)),
            numbers,
        ),
        facts.sums.n,
        facts.tolerance,
    )


def rank_of(rows: torch.Tensor) -> int:
    return int(torch.linalg.matrix_rank(rows, rtol=RANK)) if rows.numel() else 0
