"""The training loop, a generator of `Step`s: whoever drains it owns the clock."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.sources import Source, stream
from sdl_explorer.models.dictionary import Encoding
from sdl_explorer.models.methods import Context, Method
from sdl_explorer.models.terms import anchor_distance, pull_distance
from sdl_explorer.training.optim import look_ahead, ramped, settle
from sdl_explorer.training.state import Step, TrainState


def train(state: TrainState, method: Method, source: Source, *, batch_size: int, order: int = 0, only=None) -> Iterator[Step]:
    """Go on from `state.step`, in place, one step for each `next()`.

    The step's batch is `source.batch(state.step, batch_size, order)`, so stopping and going on changes
    nothing. The method sees the dictionary's `core` and rows in its units, so its losses and settings are in units of the
    weights, whatever the scale of the data. `only` names latents: every other row, `b_dec`, and their optimiser moments stay bit-identical.
    """
    while True:
        yield _take_step(state, method, source, batch_size, order, only)


def _take_step(state: TrainState, method: Method, source: Source, batch_size: int, order: int, only) -> Step:
    began = time.perf_counter()
    dictionary = state.dictionary.train()
    if state.schedule.ramps:
        method = ramped(method, state.schedule.ramps, state.step)
        method.retune(dictionary.nonlinearity)
    batch = dictionary.normalised(source.batch(state.step, batch_size, order).to(dictionary.device))
    generator = stream(state.seed, "step", state.step)
    context = Context(state.step, state.samples_since_fired, state.pins, generator, state.dead_after)

    with _holding(state, only) as shared:
        look_ahead(state.optimiser)
        try:
            encoding, losses = _descend(state, method, batch, context, shared)
        finally:
            settle(state.optimiser)
        with torch.no_grad():
            method.after_step(dictionary.core, encoding, context)

    with torch.no_grad():
        fired = encoding.latents.fired()
        state.samples_since_fired = torch.where(fired, 0, state.samples_since_fired + len(batch))
        l0, dead = encoding.latents.l0, state.dead.sum()
    state.step += 1
    detached = {name: loss.detach() for name, loss in losses.items()}
    return Step(state.step - 1, detached, l0, dead, time.perf_counter() - began)


def _descend(
    state: TrainState, method: Method, batch: Activations, context: Context, shared: list[Parameter]
) -> tuple[Encoding, dict[str, Tensor]]:
    """Losses, their gradient, and one update of the weights."""
    dictionary = state.dictionary.core
    with torch.autocast(dictionary.device.type, torch.bfloat16, enabled=state.mixed):
        encoding = dictionary(batch.inputs)
        losses = method.objective(dictionary, encoding, batch, context) | method.weight_terms(dictionary)
    if state.pins is not None:
        losses["anchor"] = anchor_distance(dictionary, state.pins)
    if state.pulls is not None:
        losses["pull"] = pull_distance(dictionary, state.pulls)
    state.optimiser.zero_grad(set_to_none=True)
    torch.stack(list(losses.values())).sum().backward()
    for parameter in shared:
        parameter.grad = None  # so that no moments follow it
    with torch.no_grad():
        for group in state.optimiser.param_groups:
            group["lr"] = state.schedule.rate(state.step)
        method.constrain_gradients(dictionary)
        if state.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(dictionary.parameters(), state.clip_norm)
        state.optimiser.step()
    return encoding, losses


@contextmanager
def _holding(state: TrainState, only) -> Iterator[list[Parameter]]:
    """Put rows that may not move back after the step: all but `only`, and hard pins. Gives the parameters that belong
    to no single latent, where they may not move either."""
    held = _held_rows(state, only)
    if held is None:
        yield []
        return
    rows = state.row_parameters()
    shared = [] if only is None else _shared_parameters(state, rows)
    before = [(tensor, tensor.detach().clone()) for p in rows for tensor in (p, *state.moments(p))]
    known = {id(tensor) for tensor, _ in before}
    free = [] if only is None else [*shared, *(m for p in shared for m in state.moments(p)), *state.dictionary.buffers()]
    fixed = [(tensor, tensor.detach().clone()) for tensor in free]
    yield shared
    with torch.no_grad():
        born = [m for p in rows for m in state.moments(p) if id(m) not in known]
        for tensor, kept in before + [(m, torch.zeros_like(m)) for m in born]:
            mask = held.view(-1, *[1] * (tensor.ndim - 1))
            tensor.copy_(torch.where(mask, kept, tensor))
        for tensor, kept in fixed:
            tensor.copy_(kept)


def _held_rows(state: TrainState, only) -> Tensor | None:
    pins = state.pins if state.pins is not None and state.pins.any_hard else None
    if only is None and pins is None:
        return None
    held = torch.zeros_like(state.samples_since_fired, dtype=torch.bool)
    if only is not None:
        held.fill_(True)[torch.as_tensor(only, device=held.device)] = False
    if pins is not None:
        held[pins.latents] |= pins.hard
    return held


def _shared_parameters(state: TrainState, rows: list[Parameter]) -> list[Parameter]:
    mine = {id(p) for p in rows}
    return [p for p in state.dictionary.parameters() if id(p) not in mine]
