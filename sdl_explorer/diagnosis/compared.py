"""A comparison with another dictionary, and what that one was."""

from dataclasses import dataclass

from sdl_explorer.diagnosis.twins import Twins


@dataclass(frozen=True)
class Compared:
    """`twins`: the latents of a session at `step` (here) beside those of the dictionary called `name` (there).

    python    the line that compares them again
    """

    name: str
    step: int
    twins: Twins
    python: str = ""
