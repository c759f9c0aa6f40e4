"""The training loop: a run is a function of settings, seed and the absolute step, and touches only what it may."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdl_explorer.data.anchors import Anchors, Pins
from sdl_explorer.data.hierarchy import HierarchyBench
from sdl_explorer.models.methods import BatchTopK, JumpReLU, ReLU, TopK
from sdl_explorer.models.terms import anchor_distance
from sdl_explorer.training.history import LIMIT, Recorder
from sdl_explorer.training.loop import train
from sdl_explorer.training.state import Schedule, Step, TrainState, threads_for

SOURCE = HierarchyBench(parents=2, children=2, independent=4, d_in=10)
METHODS = [ReLU(l1=0.01), JumpReLU(l0=0.01), TopK(k=2), BatchTopK(k=2)]
by_name = lambda method: type(method).__name__


def started(method, device="cpu", **fields) -> TrainState:
    dictionary = method.build(10, 10, 16, torch.Generator().manual_seed(0)).to(device)
    schedule = fields.pop("schedule", Schedule(lr=1e-2, warmup_steps=3))
    return TrainState.start(dictionary, schedule, **fields)


def go(state, method, n, only=None) -> list[Step]:
    return list(itertools.islice(train(state, method, SOURCE, batch_size=32, only=only), n))


def tensors(state: TrainState) -> dict[str, torch.Tensor]:
    """Everything that a step can change, copied."""
    names = {id(p): name for name, p in state.dictionary.named_parameters()}
    moments = {f"{names[id(p)]}/{k}": v for p, slots in state.optimiser.state.items() for k, v in slots.items()}
    found = dict(state.dictionary.state_dict()) | moments | {"silent": state.samples_since_fired}
    return {name: t.detach().clone() for name, t in found.items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# one run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=by_name)
@settings(max_examples=5, deadline=None)
@given(parts=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_chunks_do_not_matter(method, parts):
    whole, split = started(method), started(method)
    in_one = go(whole, method, sum(parts))
    in_parts = [step for n in parts for step in go(split, method, n)]
    assert same(tensors(whole), tensors(split))
    assert [s.index for s in in_one] == [s.index for s in in_parts] == list(range(sum(parts)))
    assert all(torch.equal(a.losses["error"], b.losses["error"]) for a, b in zip(in_one, in_parts, strict=True))


@pytest.mark.parametrize("method", METHODS, ids=by_name)
def test_training_descends(method, device):
    losses = [s.losses["error"].item() for s in go(started(method, device), method, 120)]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])


def test_the_batch_is_a_function_of_the_absolute_step():
    asked = []

    class Listening(HierarchyBench):
        def batch(self, index, size, order=0):
            asked.append((index, size, order))
            return super().batch(index, size, order)

    state = started(TopK(k=2))
    source = Listening(parents=2, children=2, independent=4, d_in=10)
    list(itertools.islice(train(state, TopK(k=2), source, batch_size=8, order=3), 2))
    list(itertools.islice(train(state, TopK(k=2), source, batch_size=8, order=3), 2))
    assert asked == [(i, 8, 3) for i in range(4)]
    assert torch.equal(source.batch(2, 8).inputs, source.batch(2, 8).inputs)
    assert not torch.equal(source.batch(2, 8).inputs, source.batch(2, 8, order=1).inputs)


def test_one_step_is_adam_on_the_sum_of_the_terms():
    method, state = ReLU(l1=0.3), started(ReLU(), schedule=Schedule(lr=0.02))
    reference = copy.deepcopy(state.dictionary)
    (step,) = go(state, method, 1)
    x = SOURCE.batch(0, 32).inputs
    z = (x @ reference.W_enc.T + reference.b_enc).relu()
    error = (z @ reference.W_dec + reference.b_dec - x).square().sum(1).mean()
    l1 = 0.3 * (z * reference.W_dec.norm(dim=1)).sum(1).mean()
    optimiser = torch.optim.Adam(reference.parameters(), lr=0.02)
    (error + l1).backward()
    optimiser.step()
    torch.testing.assert_close(step.losses["error"], error.detach())
    torch.testing.assert_close(step.losses["l1"], l1.detach())
    torch.testing.assert_close(step.l0, (z > 0).float().sum(1).mean())
    for a, b in zip(state.dictionary.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_numbers_of_a_step_are_detached_scalars_on_the_device(device):
    (step,) = go(started(TopK(k=2), device), TopK(k=2), 1)
    for value in (*step.losses.values(), step.l0, step.dead):
        assert value.shape == () and not value.requires_grad and value.device.type == device


# dead counter --------------------------------------------------------------------------------------------------------


def test_the_counter_counts_samples_since_a_value_above_zero():
    state = started(TopK(k=2), dead_after=64)
    with torch.no_grad():
        state.dictionary.b_enc[:] = torch.tensor([100.0] * 2 + [-100.0] * 14)
    steps = go(state, TopK(k=2), 3)
    assert state.samples_since_fired.tolist() == [0, 0] + [96] * 14
    assert [s.dead.item() for s in steps] == [0, 14, 14]
    assert state.dead.tolist() == [False] * 2 + [True] * 14
    with torch.no_grad():
        state.dictionary.b_enc[15] = 200.0
    go(state, TopK(k=2), 1)
    assert state.samples_since_fired[15] == 0


def test_a_stored_zero_is_silence():
    """Where fewer than k pre-activations are positive, TopK stores zeros; those have not fired."""
    state = started(TopK(k=16))
    with torch.no_grad():
        state.dictionary.b_enc[:8] = -100.0
    go(state, TopK(k=16), 1)
    assert state.samples_since_fired[:8].tolist() == [32] * 8
    assert (state.samples_since_fired[8:] == 0).all()


# only, pins ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=by_name)
@pytest.mark.parametrize("before", [0, 4])
def test_only_leaves_everything_else_bit_identical(method, before, device):
    state = started(method, device)
    go(state, method, before)
    old = tensors(state)
    go(state, method, 5, only=[3, 11])
    new = tensors(state)
    per_latent = ("W_enc", "W_dec", "b_enc", *(["nonlinearity.threshold"] if isinstance(method, JumpReLU) else []))
    others = [i for i in range(16) if i not in (3, 11)]
    for name in new:
        base, _, slot = name.partition("/")
        if name == "silent" or slot == "step":
            continue
        started_at = old.get(name, torch.zeros_like(new[name]))
        if base in per_latent:
            assert torch.equal(new[name][others], started_at[others]), name
        else:
            assert torch.equal(new[name], started_at), name
    assert not torch.equal(new["W_enc"][[3, 11]], old["W_enc"][[3, 11]])
    assert not torch.equal(new["W_dec"][[3, 11]], old["W_dec"][[3, 11]])
    if before == 0:
        assert not any(name.startswith("b_dec/") for name in new), "what does not move gets no moments"


def test_only_all_latents_moves_every_row_but_not_the_decoder_bias():
    state = started(ReLU())
    old = tensors(state)
    go(state, ReLU(), 3, only=range(16))
    assert (state.dictionary.W_dec != old["W_dec"]).any(1).all() and torch.equal(state.dictionary.b_dec, old["b_dec"])


def some_pins(device, hard, weight=0.5) -> Pins:
    anchors = Anchors.from_rows(torch.eye(10)[:2])
    return Pins(anchors, torch.tensor([5, 2]), torch.full((2,), weight), torch.tensor(hard)).to(device)


@pytest.mark.parametrize("method", METHODS, ids=by_name)
def test_hard_pins_do_not_move(method, device):
    state = started(method, device)
    go(state, method, 2)
    state.pins = some_pins(device, [True, True])
    old = tensors(state)
    steps = go(state, method, 4)
    for name in ("W_enc", "W_dec", "b_enc"):
        assert torch.equal(getattr(state.dictionary, name)[[5, 2]], old[name][[5, 2]])
        assert torch.equal(tensors(state)[f"{name}/exp_avg"][[5, 2]], old[f"{name}/exp_avg"][[5, 2]])
    assert not torch.equal(state.dictionary.W_enc, old["W_enc"]) and not torch.equal(state.dictionary.b_dec, old["b_dec"])
    assert all(s.losses["anchor"].item() == 0 for s in steps), "a fixed row is not pulled"


def test_soft_pins_add_their_formula_and_pull(device):
    method, state = ReLU(l1=0.0), started(ReLU(), device, schedule=Schedule(lr=0.05))
    state.pins = some_pins(device, [False, True], weight=50.0)
    expected = anchor_distance(state.dictionary, state.pins).item()
    row = 50 * ((state.dictionary.W_enc[5].cpu() - torch.eye(10)[0]) ** 2 + (state.dictionary.W_dec[5].cpu() - torch.eye(10)[0]) ** 2)
    assert expected == pytest.approx(row.sum().item(), rel=1e-5)
    steps = go(state, method, 100)
    assert steps[0].losses["anchor"].item() == pytest.approx(expected)
    for rows in (state.dictionary.W_enc, state.dictionary.W_dec):
        torch.testing.assert_close(rows[5].cpu(), torch.eye(10)[0], atol=0.1, rtol=0)


def test_only_and_hard_pins_together():
    state = started(ReLU())
    state.pins = some_pins("cpu", [True, False])
    old = tensors(state)
    go(state, ReLU(), 3, only=[5, 7])
    moved = (state.dictionary.W_dec != old["W_dec"]).any(1)
    assert moved.nonzero().flatten().tolist() == [7]


# schedule ------------------------------------------------------------------------------------------------------------


def test_the_schedule_is_a_function_of_the_step():
    schedule = Schedule(lr=2.0, warmup_steps=4, decay_steps=100, hold_steps=10)
    assert [schedule.rate(s) for s in (0, 9)] == [0.0, 0.0]
    assert [schedule.rate(s) for s in (10, 11, 13, 14, 80)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    assert schedule.rate(90) == pytest.approx(2.0 * 0.55)
    assert [schedule.rate(s) for s in (100, 10_000)] == pytest.approx([0.2, 0.2])
    assert Schedule(lr=0.3).rate(0) == Schedule(lr=0.3).rate(10**6) == 0.3


@given(st.integers(0, 300), st.integers(0, 40), st.integers(1, 200), st.integers(0, 50))
@settings(max_examples=50, deadline=None)
def test_the_rate_never_leaves_its_range(step, warmup, decay, hold):
    schedule = Schedule(1.0, warmup, decay, hold)
    lowest = 0.1 / max(warmup, 1) - 1e-9 if step >= hold else 0
    assert lowest <= schedule.rate(step) <= 1


@pytest.mark.parametrize("method", [ReLU(l1=0.01), JumpReLU(l0=0.01), TopK(k=2, unit_norm=False)], ids=by_name)
def test_at_rate_zero_moments_fill_and_weights_stay(method):
    state = started(method, schedule=Schedule(lr=0.1, hold_steps=5))
    old = tensors(state)
    go(state, method, 5)
    now = tensors(state)
    assert all(torch.equal(now[name], old[name]) for name, _ in state.dictionary.named_parameters())
    assert now["W_enc/exp_avg_sq"].any()
    go(state, method, 1)
    assert not torch.equal(state.dictionary.W_enc, old["W_enc"])


def test_threads_are_a_function_of_the_size():
    assert threads_for(64, 256, 512, available=8) == 1
    assert threads_for(768, 16_384, 512, available=8) == 8
    assert threads_for(768, 16_384, 512, available=0) == 1


# moments -------------------------------------------------------------------------------------------------------------


def test_moments_of_exactly_the_named_rows_are_cleared():
    state = started(JumpReLU(l0=0.1, bandwidth=2.0))
    go(state, JumpReLU(l0=0.1, bandwidth=2.0), 3)
    old = tensors(state)
    state.clear_moments(torch.tensor([4, 9]))
    now = tensors(state)
    others = [i for i in range(16) if i not in (4, 9)]
    for name in ("W_enc", "b_enc", "W_dec", "nonlinearity.threshold"):
        for slot in ("exp_avg", "exp_avg_sq"):
            key = f"{name}/{slot}"
            assert not now[key][[4, 9]].any() and old[key][[4, 9]].any(), key
            assert torch.equal(now[key][others], old[key][others])
    assert torch.equal(now["b_dec/exp_avg"], old["b_dec/exp_avg"])


# history -------------------------------------------------------------------------------------------------------------


def steps_of(losses) -> list[Step]:
    number = lambda value: torch.tensor(float(value))
    return [Step(i, {"error": number(loss), "l1": number(1.0)}, number(2.0), number(0), 0.01) for i, loss in enumerate(losses)]


def test_history_keeps_the_lowest_and_the_highest_in_at_most_2000_points():
    losses = 100 + np.random.default_rng(0).normal(size=9_001)
    losses[3_333], losses[7_001] = 500, -500
    recorder, steps = Recorder(), steps_of(losses)
    for start in range(0, 9_001, 137):
        for step in steps[start : start + 137]:
            recorder.add(step)
        assert recorder.flush() is None
    history = recorder.history()
    assert 500 <= len(history) <= LIMIT
    assert (np.diff(history.steps) > 0).all() and history.steps.dtype == np.int64
    assert history.losses["total"].max() == 501 and history.losses["total"].min() == -499
    assert history.steps[history.losses["error"].argmax()] == 3_333
    np.testing.assert_allclose(history.losses["total"], history.losses["error"] + history.losses["l1"])


def test_a_loss_that_is_not_finite_is_found_and_its_neighbours_are_kept():
    losses = np.ones(5_000)
    losses[1_234], losses[1_235], losses[4_000] = np.nan, 77, np.inf
    recorder = Recorder()
    for step in steps_of(losses):
        recorder.add(step)
    assert recorder.flush() == 1_234
    assert recorder.flush() is None
    assert not np.isfinite(recorder.history().losses["total"]).all()


def test_history_can_be_cut():
    recorder = Recorder()
    for step in steps_of([3, 2, 1]):
        recorder.add(step)
    assert recorder.truncated(2).history().steps.tolist() == [0, 1]
    assert recorder.history().steps.tolist() == [0, 1, 2]


def test_a_term_that_starts_later_is_nan_before():
    recorder = Recorder()
    recorder.add(steps_of([1])[0])
    recorder.add(Step(1, {"error": torch.tensor(1.0), "anchor": torch.tensor(4.0)}, torch.tensor(1.0), torch.tensor(0), 0.0))
    recorder.flush()
    np.testing.assert_array_equal(recorder.history().losses["anchor"], [np.nan, 4.0])
