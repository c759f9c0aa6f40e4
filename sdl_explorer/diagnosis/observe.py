"""The one pass: stream an encoding once, in blocks of rows, and feed every finding that is asked for.

A finding is a public function `f(dictionary, activations, **settings) -> frozen dataclass`, marked with the
accumulator that it is built from:

    class Counter(Accumulator):
        def __init__(self, stream, *, floor=0): ...   # the settings that f declares
        def add(self, rows): ...                      # one block
        def result(self): ...                         # numpy and floats

    @finding(Counter)
    def count(dictionary, activations, floor=0):
        return observe(dictionary, activations, [(count, {"floor": floor})])[0]
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.rows import Rows
from sdl_explorer.models.dictionary import Latents, SparseDictionary

FIRES = 1e-6  # latent i fires on x when z_i > FIRES * |W_enc_i| * |input_scale x|: rounding at an exact zero is not firing
BLOCK_BYTES = 16 * 2**20  # of one block's dense pre-activations; a pass holds a few blocks of this size
WIDE = 16  # times as many rows where sigma selects, and pre-activations are never made whole
MOST_ROWS = 4096


class Accumulator:
    """What one finding keeps while the rows go by. Sums are O(n_latents * d) at most, never n x n_latents."""

    def __init__(self, stream: "Stream"):
        self.stream = stream

    def add(self, rows: Rows) -> None:
        raise TypeError(f"{type(self).__name__} has no add(rows); an accumulator needs one.")

    def result(self):
        raise TypeError(f"{type(self).__name__} has no result(); an accumulator needs one.")


Shared = TypeVar("Shared", bound=Accumulator)


class Stream:
    """What every accumulator knows before the first row, and the accumulators that several findings share."""

    def __init__(self, dictionary: SparseDictionary, activations: Activations, pulse: Callable[[], None] = lambda: None):
        self.dictionary, self.activations, self.pulse = dictionary, activations, pulse
        self.input_mean = _mean(activations.inputs).to(dictionary.device)
        same = activations.targets is activations.inputs
        self.target_mean = self.input_mean if same else _mean(activations.targets).to(dictionary.device)
        self.shared: dict[type[Accumulator], Accumulator] = {}
        self.asked: list[Asked] = []

    def share(self, kind: type[Shared]) -> Shared:
        """The one accumulator of this kind in this pass; it is fed once however many findings read it."""
        if kind not in self.shared:
            self.shared[kind] = kind(self)
        return cast(Shared, self.shared[kind])

    def ask(self, function: Callable, settings: dict[str, Any], whatever: Sequence[str] = ()) -> "Asked":
        """A finding of this pass, once for all who ask with the same settings. Of those named in `whatever` any value will do."""
        declared = list(inspect.signature(function).parameters.values())[2:]
        whole = {p.name: settings.get(p.name, p.default) for p in declared}
        for one in self.asked:
            if one.function is function and all(_same(one.settings[k], v) for k, v in whole.items() if k not in whatever):
                return one
        self.asked.append(Asked(function, whole, function.accumulator(self, **settings)))
        return self.asked[-1]


class Asked:
    """One finding of a pass; its result is made once, and its accumulator then makes room."""

    def __init__(self, function: Callable, settings: dict[str, Any], accumulator: Accumulator):
        self.function, self.settings = function, settings
        self.accumulator: Accumulator | None = accumulator

    def result(self) -> Any:
        if self.accumulator is not None:
            self.found, self.accumulator = self.accumulator.result(), None
        return self.found


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, int | float | str | tuple) and type(a) is type(b) and a == b)


def finding(accumulator: type[Accumulator]) -> Callable[[Callable], Callable]:
    """Mark a function as a finding that `observe` builds with this accumulator."""

    def mark(function):
        function.accumulator = accumulator
        return function

    return mark


def declared_settings(function: Callable) -> tuple[str, ...]:
    """Names of the settings that a finding takes, after dictionary and activations."""
    return tuple(inspect.signature(function).parameters)[2:]


def observe(
    dictionary: SparseDictionary,
    activations: Activations,
    requests: Sequence,
    *,
    progress: Callable[[float], None] | None = None,
    block: int | None = None,
    kept: "Kept | None" = None,
) -> list:
    """Several findings from one pass over the rows.

    `requests` holds findings or pairs (finding, settings); the results come back in that order, each equal to
    calling the finding alone. `progress(done)` is called with a fraction in [0, 1] after each block, and again at
    the same fraction during long work between blocks; an exception raised in it cancels the pass. `block` rows are
    encoded at a time (None: about 16 MB of pre-activations, or 256 MB where they are never made). The encoder runs
    in eval mode without gradients on the dictionary's device; blocks that `kept` holds are not encoded again.

    Raises ValueError for no rows, a wrong width, rows or weights that are not finite; TypeError for something
    that is not a finding or a setting that it does not declare.
    """
    requests = [r if isinstance(r, tuple) else (r, {}) for r in requests]
    for function, settings in requests:
        _check_request(function, settings)
    _check(dictionary, activations)
    done = 0.0

    def pulse():
        if progress is not None:
            progress(done)

    def feed() -> None:
        nonlocal done
        fed = [*stream.shared.values(), *(one.accumulator for one in stream.asked if one.accumulator is not None)]
        for rows in encoded(dictionary, activations, block, kept):
            for accumulator in fed:
                accumulator.add(rows)
            done = (rows.start + rows.n) / activations.n
            pulse()

    with evaluating(dictionary):
        stream = Stream(dictionary, activations, pulse)
        wanted = [stream.ask(function, settings) for function, settings in requests]
        feed()
        stream.shared.clear()  # whoever reads one holds it
        return [one.result() for one in wanted]  # each makes room for the next


@contextmanager
def evaluating(dictionary: SparseDictionary) -> Iterator[None]:
    """Eval mode and no gradients; the mode comes back afterwards."""
    training = dictionary.training
    dictionary.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        dictionary.train(training)


class Kept:
    """Encodings of whole blocks that outlive the pass: what `encoded` finds here is not computed again.

    A block comes in parts, one after the other.
    """

    def read(self, start: int) -> list[Latents] | None:
        """The parts of the block that begins at this row, on the dictionary's device; None where it is not there."""
        raise TypeError(f"{type(self).__name__} has no read(start).")

    def add(self, latents: Latents) -> None:
        """The next part of a block that was not there."""
        raise TypeError(f"{type(self).__name__} has no add(latents).")

    def write(self, start: int) -> None:
        """The block is complete."""
        raise TypeError(f"{type(self).__name__} has no write(start).")


def encoded(dictionary: SparseDictionary, activations: Activations, block: int | None = None, kept: Kept | None = None) -> Iterator[Rows]:
    """The rows in blocks, each encoded once. Call it inside `evaluating`.

    Where sigma selects without pre-activations, blocks are WIDE: sums over entries cost something for each latent and
    block. Where it does not they come in parts of BLOCK_BYTES. The sizes depend on the problem's alone.
    """
    part = block_rows(max(dictionary.n_latents, dictionary.d_in, dictionary.d_out)) if block is None else block
    select = getattr(dictionary.nonlinearity, "select", None)
    wide = part if block is not None or select is None else max(part, block_rows(dictionary.n_latents, WIDE))
    like, same = dictionary.W_enc, activations.targets is activations.inputs
    reads = FIRES * dictionary.input_scale * like.float().norm(dim=1)
    for start in range(0, activations.n, wide):
        inputs = activations.inputs[start : start + wide].to(like)
        targets = inputs if same else activations.targets[start : start + wide].to(like)
        _check_finite("inputs", inputs, start)
        _check_finite("targets", targets, start)
        known = None if kept is None else kept.read(start)
        begin = 0
        for latents, reconstruction in _encodings(dictionary, inputs, part) if known is None else _decoded(dictionary, known):
            span = slice(begin, begin + latents.n)
            x, begin = inputs[span].float(), span.stop
            y = x if same else targets[span].float()
            if kept is not None and known is None:
                kept.add(latents)
                if begin == len(inputs):
                    kept.write(start)
            yield Rows(start + span.start, x, y, latents, reconstruction.float(), reads)


def _encodings(dictionary: SparseDictionary, inputs: Tensor, size: int) -> Iterator[tuple[Latents, Tensor]]:
    """Codes and reconstruction of all rows at once where sigma selects, of at most `size` rows at a time where it does not."""
    select = getattr(dictionary.nonlinearity, "select", None)
    selected = select(inputs, dictionary) if select is not None and len(inputs) > size else None
    if selected is not None:
        yield selected, dictionary.decode(selected)
        return
    for part in inputs.split(size):
        latents, reconstruction, _ = dictionary(part)
        del _  # pre-activations, as large as the codes
        yield latents, reconstruction


def _decoded(dictionary: SparseDictionary, parts: list[Latents]) -> Iterator[tuple[Latents, Tensor]]:
    for latents in parts:
        yield latents, dictionary.decode(latents)


def block_rows(widest: int, times: int = 1) -> int:
    """Rows in a block whose widest matrix, as a rule the pre-activations, takes at most so many times BLOCK_BYTES."""
    return min(max(1, times * BLOCK_BYTES // (4 * widest)), MOST_ROWS)


class Moments(Accumulator):
    """Per latent: how often it fires, the sum of its codes, and the moments behind its responses.

        count = sum [z_i fires];  total = sum z_i
        input_moment = sum z_i (x_p - mean x_p);  target_moment = sum z_i (x_r - mean x_r)

    so that the response E[z_i x]/E[z_i] - E[x] is moment / total, without the cancellation of two large means.
    Shapes (n_latents,) and (n_latents, d); the moments stay on the device, the rest is on the CPU.
    """

    def __init__(self, stream: Stream):
        super().__init__(stream)
        dictionary, activations = stream.dictionary, stream.activations
        self.n = 0
        self.count = torch.zeros(dictionary.n_latents, dtype=torch.int64)
        self.total = torch.zeros(dictionary.n_latents, dtype=torch.float64)
        self.input_moment = self.target_moment = torch.zeros(dictionary.n_latents, dictionary.d_in, device=dictionary.device)
        if activations.targets is not activations.inputs:
            self.target_moment = torch.zeros(dictionary.n_latents, dictionary.d_out, device=dictionary.device)

    def add(self, rows: Rows) -> None:
        self.n += rows.n
        self.count += rows.count.cpu()
        add = self._add_sparse if rows.sparse else self._add_dense
        self.total += add(rows, torch.ones_like(rows.inputs[:, :1]), torch.zeros_like(self.input_moment[:, :1]))[:, 0].cpu().double()
        add(rows, rows.inputs - self.stream.input_mean, self.input_moment)
        if self.target_moment is not self.input_moment:
            add(rows, rows.targets - self.stream.target_mean, self.target_moment)

    def _add_dense(self, rows: Rows, values: Tensor, moment: Tensor) -> Tensor:
        return moment.addmm_(rows.codes.T, values)

    def _add_sparse(self, rows: Rows, values: Tensor, moment: Tensor) -> Tensor:
        _, row, value = rows.entries
        some = rows.count.nonzero()[:, 0]
        moment[some] += embedding_bag(row, values, rows.first[some], mode="sum", per_sample_weights=value)
        return moment


def _mean(values: Tensor) -> Tensor:
    sums = torch.stack([chunk.cpu().double().sum(dim=0) for chunk in values.split(MOST_ROWS)])
    return (sums.sum(dim=0) / len(values)).float()


def _check_request(function, settings) -> None:
    if not hasattr(function, "accumulator"):
        raise TypeError(f"observe: {getattr(function, '__name__', function)!r} is not a finding; mark it with @finding(Accumulator).")
    unknown = set(settings) - set(declared_settings(function))
    if unknown:
        raise TypeError(
            f"{function.__name__}: no setting {sorted(unknown)[0]!r}; it takes {', '.join(declared_settings(function)) or 'none'}."
        )


def _check(dictionary: SparseDictionary, activations: Activations) -> None:
    if activations.n == 0:
        raise ValueError("observe: the activations have 0 rows; a finding needs at least one.")
    widths = (activations.inputs.shape[1], activations.targets.shape[1])
    if widths != (dictionary.d_in, dictionary.d_out):
        raise ValueError(
            f"observe: inputs and targets have {widths[0]} and {widths[1]} columns, and this dictionary reads "
            f"{dictionary.d_in} and writes {dictionary.d_out}. Use the activations that it was trained on."
        )
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        if not torch.isfinite(getattr(dictionary, name).sum()):
            raise ValueError(f"observe: {name} holds values that are not finite; training diverged. Revert to the last finite commit.")


def _check_finite(side: str, values: Tensor, start: int) -> None:
    if not torch.isfinite(values.sum()):  # one number first: it is cheap
        finite = torch.isfinite(values).all(dim=1)
        row = start + int((~finite).nonzero()[0])
        raise ValueError(f"observe: row {row} of the {side} is not finite; leave such rows out (keep= in Stored) before looking.")
