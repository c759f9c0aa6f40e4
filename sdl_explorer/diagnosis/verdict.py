"""A verdict: one thing that is wrong, and what could be done about it."""

from dataclasses import dataclass

from sdl_explorer.training.interventions import Intervention

THEOREMS = {
    "dead": (
        "T5",
        "arXiv 2512.05534, Theorem 3.6: empty sets F_i are part of spurious minima, and a latent that never fires has no gradient",
    ),
    "merged": ("T5", "arXiv 2512.05534, Example 3.5 and Theorem 3.6: a latent that holds two features can be a minimum with positive loss"),
    "absorbed": ("T6", "arXiv 2512.05534, Theorem 3.8: the pattern in which a parent lost a child to another latent is realisable"),
    "copies": ("T4", "arXiv 2512.05534, Theorem 3.4: the loss counts what is written together, so copies share one feature at no cost"),
    "encoder": ("T4", "arXiv 2512.05534, Theorem 3.4: zero loss fixes what is written, not the direction in which an encoder row reads"),
}


@dataclass(frozen=True)
class Verdict:
    """One thing that is wrong.

    id         "dead" | "merged" | "absorbed" | "copies" | "encoder"
    claim      what is wrong, in a sentence; "candidate" where there is no truth to tell
    evidence   the numbers behind it, a sentence each
    theorem    what the theory says about it, and what its card says here, where it was checked
    advice     the intervention that could help; session.apply(advice) applies it
    harm       with truth: the share of the features that it costs. Without: the share of the latents that it concerns
    side       "decoder" | "encoder": where a repair is to be looked for
    latents, features    what it is about; features are empty without truth
    """

    id: str
    claim: str
    evidence: tuple[str, ...]
    theorem: str
    advice: Intervention
    harm: float
    side: str
    latents: tuple[int, ...]
    features: tuple[int, ...] = ()
    candidate: bool = False

    def __repr__(self) -> str:
        return f"Verdict({self.id}, harm {self.harm:.2f}: {self.claim} Advice: {type(self.advice).__name__})"


def some(things, one: str, many: str) -> str:
    """'1 latent is', '3 latents are'"""
    return f"{len(things)} {one if len(things) == 1 else many}"
