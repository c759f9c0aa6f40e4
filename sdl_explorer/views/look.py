"""How one viewer looks at the findings: what is selected, which threshold, which theme, which size."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """Everything that a drawing depends on beside the findings.

    width, height   pixels; a width of None fills the card, a height of None is the view's own
    side            the direction of a latent that is compared with the truth: encoder, decoder or response
    block           one source of a crosscoder by name; None is the worst of them for each latent
    step, head      the global cursor, and the commit that is checked out
    n_latents       size of the dictionary, for views whose findings do not know it
    """

    selected_latents: tuple[int, ...] = ()
    primary_latent: int | None = None
    selected_features: tuple[int, ...] = ()
    primary_feature: int | None = None
    tau: float = 0.95
    side: str = "decoder"
    theme: str = "light"
    width: int | None = None
    height: int | None = None
    block: str | None = None
    step: int | None = None
    head: str | None = None
    n_latents: int | None = None
