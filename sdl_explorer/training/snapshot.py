"""What the lane publishes: numbers alone, immutable, a few times a second."""

from dataclasses import dataclass, field

import numpy as np

from sdl_explorer.training.run import Diverged


@dataclass(frozen=True)
class Job:
    """Long work beside training: its name and how much of it is done, 0 to 1."""

    name: str
    done: float


@dataclass(frozen=True)
class Snapshot:
    """One moment of a session. `target` is the step at which the run ends, `rate` steps a second, `queue` the
    sessions that share the device, `converged` the step at which a run paused for lack of progress."""

    version: int = 0
    step: int = 0
    running: bool = False
    stopping: bool = False
    target: int = 0
    rate: float = 0.0
    queue: int = 0
    dead: int = 0
    n_latents: int = 0
    samples_since_fired: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    losses: dict[str, float] = field(default_factory=dict)
    l0: float = float("nan")
    diverged: Diverged | None = None
    converged: int | None = None
    error: str | None = None
    job: Job | None = None
