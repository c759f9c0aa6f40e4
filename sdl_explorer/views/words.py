"""Fixed words: what a card says when there is nothing to draw. Tests compare these strings."""

from math import isnan
from typing import SupportsFloat, SupportsInt

NO_TRUTH = "No ground truth: recovery cannot be computed. Add anchors or class means →"
NO_SELECTION = "Select a latent: click a point, or press / to search. [Worst] [Random]"
NO_COMMITS = "No intervention yet. Train, then change something on the Intervene page; the comparison appears here."
NO_ANCHORS = "No anchors. Select a true feature, a class mean or a vector, then [Anchor]."
NEVER_TRAINED = "Nothing trained yet. [▸▸ Train 500 steps]"
NO_LOG = "Nothing has happened yet. Press ▸▸ to train 500 steps."
NOT_COMPUTED = "Not computed yet."
NO_PREVIEW = "No change is being previewed. Select latents, then open a preview with R or A."
NO_FAMILY_TRUTH = (
    "No ground truth: nobody knows which concept is whose child. Start a new run on HierarchyBench or SynthBench, or give the "
    "activations a Truth with parents."
)
NO_FAMILIES = (
    "This data has no parent/child concepts. Start a new run on HierarchyBench or SynthBench, or name each feature's parent in "
    "Truth(parents=...)."
)
NO_CANDIDATES = "No candidate at these thresholds."
NO_ABSORBERS = "No latent writes more of a parent when one of its children is active: no absorber to look at."
NO_PROBLEM = "No problem found at this step."
NO_REPAIR = "No repair was tried yet. Press Try repairs."
NO_TRIAL = "No trial yet. Choose an intervention and its candidates, then press Run the trial."
NOT_COMPARED = "Nothing is compared yet. Choose another dictionary, then press Compare latents."
NO_PAIRS = "Select 2 to 40 latents."
PIXELS = "Each pixel counts latents."


def no_dead(window: int | None) -> str:
    """When no latent is dead."""
    silent = "for a whole window of samples" if window is None else f"for {count(window)} samples"
    return f"No latent has been silent {silent}. Nothing to resample."


def too_few_pairs(n: int, needed: int = 5) -> str:
    """When a comparison has fewer pairs than a verdict needs."""
    return f"n = {n}: at least {needed} seeds are needed to read this. [Run {needed - n} more]"


def none_eligible(n: int, first: str) -> str:
    """When no edge of a hierarchy can be judged."""
    which = "The one parent-child edge cannot" if n == 1 else f"None of the {count(n)} parent-child edges can"
    return f"{which} be judged yet. {first}. Train until parents have latents of their own. [▸▸ Train 500 steps]"


def crowded(crosstalk: float, coherence: float) -> str:
    """Beside candidates in a dictionary whose latents crowd each other."""
    return (
        f"Crowded latents (crosstalk {crosstalk:.2f}, mean coherence {coherence:.2f}): where the truth is known, most candidates were "
        "wrong in dictionaries like this one."
    )


def never_fired(n_samples: int) -> str:
    """Instead of examples of a latent that is silent."""
    return f"Never fired in {count(n_samples)} samples."


def not_finite(step: int) -> str:
    """Over one card whose numbers are not finite."""
    return f"Not a number at step {count(step)}. [Go to last finite commit]"


def count(number: SupportsInt) -> str:
    """An integer with its thousands apart: 1 240."""
    return f"{int(number):,}".replace(",", " ")


def cosine(value: SupportsFloat) -> str:
    """A cosine with two decimals, and a word for not-a-number."""
    return "unknown" if isnan(value) else f"{float(value):.2f}"


def plural(number: SupportsInt, noun: str, nouns: str = "") -> str:
    return f"{count(number)} {noun if number == 1 else nouns or noun + 's'}"
