"""What a theory card holds, and the rule of its verdict: a failed assumption outranks everything."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

PAPER = "arXiv 2512.05534"


class Assumption(NamedTuple):
    """One hypothesis: what it asks, its live value in words, and whether it is met (None: cannot be told)."""

    asks: str
    value: str
    met: bool | None


class Witness(NamedTuple):
    """The worst or the constructed case, in words, and the ids to select."""

    text: str
    features: tuple[int, ...] = ()
    latents: tuple[int, ...] = ()


@dataclass(frozen=True, repr=False)
class TheoryCard:
    """One statement, checked on one dictionary and these rows.

    id           "T1" ... "T7";   title, statement, source   in words; numbers of theorems move between versions of the paper
    left, right  the two sides that `relation` names; NaN where they could not be had;   slack = right - left
    numbers      everything else that was measured, by name
    n_samples    rows read;   tolerance   what counts as zero
    verdict      "holds" | "violated" | "assumption not met" | "not checkable";   reason   the verdict in a sentence
    """

    id: str
    title: str
    statement: str
    source: str
    assumptions: tuple[Assumption, ...]
    relation: str
    left: float
    right: float
    witness: Witness
    numbers: dict[str, float | str]
    n_samples: int
    tolerance: float
    verdict: str
    reason: str

    slack = property(lambda self: self.right - self.left, doc="right - left.")
    failed = property(lambda self: tuple(a for a in self.assumptions if a.met is False), doc="The assumptions that are not met.")

    def __repr__(self) -> str:
        return f"TheoryCard({self.id} {self.title}: {self.verdict}; {self.reason})"


class Found(NamedTuple):
    """What a check measured; `says` is its verdict where every assumption is met."""

    says: str
    reason: str
    relation: str = ""
    left: float = float("nan")
    right: float = float("nan")
    witness: Witness = Witness("")
    numbers: dict[str, float | str] | None = None


class Text(NamedTuple):
    """What a card says whatever is measured."""

    id: str
    title: str
    statement: str
    source: str


def card(text: Text, assumptions: Sequence[Assumption], found: Found, n_samples: int, tolerance: float) -> TheoryCard:
    """The verdict is the check's own only where every assumption is met."""
    failed = [a for a in assumptions if a.met is False]
    unknown = [a for a in assumptions if a.met is None]
    verdict, reason = found.says, found.reason
    if failed:
        verdict, reason = "assumption not met", "; ".join(f"{a.asks}: {a.value}" for a in failed)
    elif unknown:
        verdict, reason = "not checkable", "; ".join(f"{a.asks}: {a.value}" for a in unknown)
    return TheoryCard(
        *text,
        assumptions=tuple(assumptions),
        relation=found.relation,
        left=float(found.left),
        right=float(found.right),
        witness=found.witness,
        numbers=found.numbers or {},
        n_samples=n_samples,
        tolerance=tolerance,
        verdict=verdict,
        reason=reason,
    )
