"""The family of data: a `Source` gives training batches and samples, and keeps no state."""

import hashlib
from typing import Literal

import param
import torch
from torch import Generator

from sdl_explorer.data.activations import Activations, Block

Part = Literal["train", "choose", "judge"]
PARTS: tuple[Part, ...] = ("train", "choose", "judge")


def stream(*purpose) -> Generator:
    """A generator that depends on its purpose alone: equal arguments give equal numbers."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    generator = Generator()
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return generator


class Source(param.Parameterized):
    """Where activations come from. Abstract and stateless: the data cursor of a run is one integer.

    Settings are constant parameters; `width_in`, `width_out` and `n` are facts. A subclass gives those
    three, `batch`, `sample` and `fingerprint`.
    """

    __abstract = True

    @property
    def width_in(self) -> int:
        """Columns of the inputs."""
        raise TypeError(f"{type(self).__name__} does not say its width_in; a Source must.")

    @property
    def width_out(self) -> int:
        """Columns of the targets."""
        return self.width_in

    @property
    def n(self) -> int | None:
        """Rows, or None when they are generated without end."""
        return None

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The sources of a crosscoder; empty otherwise."""
        return ()

    @property
    def dead_after(self) -> int:
        """Samples of silence after which a latent counts as dead: 100,000 for generated data; 3,000,000
        for stored data, or all its training rows where there are fewer."""
        return 100_000

    def batch(self, index: int, size: int, order: int = 0) -> Activations:
        """The index-th training batch, a pure function of its arguments."""
        raise TypeError(f"{type(self).__name__} has no batch(); a Source must.")

    def sample(self, n: int, generator: Generator, part: Part = "judge") -> Activations:
        """`n` rows of one part. The parts are disjoint: training sees "train", interventions choose their
        targets on "choose", findings and verdicts read "judge"."""
        raise TypeError(f"{type(self).__name__} has no sample(); a Source must.")

    def fingerprint(self) -> str:
        """What a run folder and a cached finding remember of the data."""
        raise TypeError(f"{type(self).__name__} has no fingerprint(); a Source must.")

    def __repr__(self) -> str:
        changed = [f"{k}={v!r}" for k, v in self.param.values(onlychanged=True).items() if k != "name"]
        rows = [] if self.n is None else [f"{self.n:,} rows"]
        widths = f"{self.width_in}" if self.width_in == self.width_out else f"{self.width_in} -> {self.width_out}"
        return f"{type(self).__name__}({', '.join([*changed, *rows, f'width {widths}'])})"

    __str__ = __repr__


class Generated(Source):
    """Data drawn without end from a seed. A subclass gives `draw(n, generator)` and the widths."""

    __abstract = True

    seed = param.Integer(0, bounds=(0, None), constant=True, doc="Seed of the directions and of every draw.")

    def draw(self, n: int, generator: Generator) -> Activations:
        raise TypeError(f"{type(self).__name__} has no draw(); generated data needs one.")

    def batch(self, index: int, size: int, order: int = 0) -> Activations:
        return self.draw(size, stream(self.seed, "batch", order, index))

    def sample(self, n: int, generator: Generator, part: Part = "judge") -> Activations:
        if part not in PARTS:
            raise ValueError(f"sample: part is {part!r}; it is one of {', '.join(PARTS)}.")
        ticket = torch.randint(2**62, (1,), generator=generator).item()
        return self.draw(n, stream(self.seed, "sample", part, ticket))

    def fingerprint(self) -> str:
        settings = {k: v for k, v in sorted(self.param.values().items()) if k != "name"}
        return f"{type(self).__name__}:{hashlib.sha256(repr(settings).encode()).hexdigest()[:16]}"
