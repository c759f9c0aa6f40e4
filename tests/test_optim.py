"""Optimisers, schedules, clipping and ramps: what they compute, and that a run stays a function of the absolute step."""

import copy
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdl_explorer.data.anchors import Anchors, Pins
from sdl_explorer.data.bench import LinearBench
from sdl_explorer.data.hierarchy import HierarchyBench
from sdl_explorer.models.methods import BatchTopK, JumpReLU, ReLU, TopK
from sdl_explorer.session import Session
from sdl_explorer.training.commits import CommitStore
from sdl_explorer.training.loop import train
from sdl_explorer.training.optim import Ramp, ScheduleFreeSignSGD, look_ahead, optimiser_for, ramped, ramps_of, settle
from sdl_explorer.training.state import Schedule, TrainState

SOURCE = HierarchyBench(parents=2, children=2, independent=4, d_in=10)
BENCH = LinearBench(n_features=12, d_in=8, sparsity=0.8, max_interference=0.7)
FREE = "signsgd"


def started(method, schedule=None, optimiser="adam", **fields) -> TrainState:
    dictionary = method.build(10, 10, 16, torch.Generator().manual_seed(0))
    state = TrainState.start(dictionary, schedule or Schedule(lr=1e-2, warmup_steps=3), optimiser=optimiser)
    for name, value in fields.items():
        setattr(state, name, value)
    return state


def go(state, method, n, only=None):
    return list(itertools.islice(train(state, method, SOURCE, batch_size=32, only=only), n))


def tensors(state) -> dict[str, torch.Tensor]:
    names = {id(p): name for name, p in state.dictionary.named_parameters()}
    slots = {f"{names[id(p)]}/{k}": v for p, held in state.optimiser.state.items() for k, v in held.items()}
    found = dict(state.dictionary.state_dict()) | slots | {"silent": state.samples_since_fired}
    return {name: t.detach().clone() for name, t in found.items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# the learning rate ------------------------------------------------------------------------------------------------------


def test_cosine_falls_to_a_tenth_and_stays():
    schedule = Schedule(lr=2.0, warmup_steps=4, decay_steps=100, decay="cosine")
    assert [schedule.rate(s) / (2 * (0.1 + 0.45 * (1 + math.cos(math.pi * s / 100)))) for s in (0, 1, 3, 50)] == pytest.approx(
        [0.25, 0.5, 1, 1]
    )
    assert schedule.rate(50) == pytest.approx(2 * 0.55)
    assert schedule.rate(100) == schedule.rate(10**6) == pytest.approx(0.2)


@given(step=st.integers(0, 500), warmup=st.integers(0, 50), decay_steps=st.none() | st.integers(1, 300))
def test_without_new_settings_the_rate_is_what_it_was(step, warmup, decay_steps):
    """The formula of the first version, in its own words."""
    fallen = 0.0 if decay_steps is None else min(max((step - 0.8 * decay_steps) / max(decay_steps - 0.8 * decay_steps, 1), 0.0), 1.0)
    expected = 0.3 * (min(1.0, (step + 1) / warmup) if warmup else 1.0) * (1 - 0.9 * fallen)
    assert Schedule(0.3, warmup, decay_steps).rate(step) == pytest.approx(expected, rel=1e-12)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"decay is 'step'; it is one of linear, cosine"):
        Schedule(decay="step")
    with pytest.raises(ValueError, match=r"optimiser is 'sgd'; it is one of adam, signsgd"):
        optimiser_for("sgd", TopK(k=2).build(4, 4, 8, torch.Generator()), 1e-3)


# clipping ---------------------------------------------------------------------------------------------------------------


def test_clipping_scales_the_whole_gradient():
    """One step of plain descent, against the same step with the gradient scaled by hand."""
    method, moved = ReLU(l1=0.1), {}
    for clip in (None, 0.05, 1e6):
        state = started(method, Schedule(lr=1.0), clip_norm=clip)
        state.optimiser = torch.optim.SGD(state.dictionary.parameters(), lr=1.0)
        before = {n: p.detach().clone() for n, p in state.dictionary.named_parameters()}
        go(state, method, 1)
        moved[clip] = {n: before[n] - p.detach() for n, p in state.dictionary.named_parameters()}
    norm = torch.cat([t.flatten() for t in moved[None].values()]).norm()
    assert norm > 0.5
    for name, step in moved[None].items():
        torch.testing.assert_close(moved[0.05][name], step * 0.05 / norm, rtol=1e-3, atol=1e-6)
        assert torch.equal(moved[1e6][name], step)


# ramps ------------------------------------------------------------------------------------------------------------------


def test_a_ramp_is_a_line_that_ends_at_the_setting():
    assert [Ramp("k", 10, 4).value(s, 2) for s in (0, 1, 2, 3, 4, 400)] == [10, 8, 6, 4, 2, 2]
    assert [Ramp("l1", 0.0, 4).value(s, 0.2) for s in (0, 1, 4, 9)] == pytest.approx([0, 0.05, 0.2, 0.2])
    method = TopK(k=2)
    assert ramped(ReLU(l1=1), (Ramp("l1", 0, 4),), 1).l1 == 0.25 and ramped(method, (Ramp("k", 3, 4),), 1).k == 3
    assert ramped(method, (Ramp("k", 10, 4),), 1).k == 8 and method.k == 2
    assert ramped(method, (Ramp("k", 10, 4),), 4) is method


@pytest.mark.parametrize("method", [TopK(k=2), BatchTopK(k=2)], ids=["TopK", "BatchTopK"])
def test_k_is_annealed(method):
    state = started(method, Schedule(lr=1e-3, ramps=(Ramp("k", 6, 4),)))
    steps = go(state, method, 6)
    if isinstance(method, TopK):
        assert [state.dictionary.nonlinearity.k, method.k] == [2, 2]
        assert steps[0].l0 > steps[2].l0 > steps[5].l0 and steps[5].l0 <= 2
    widths = []
    for s in range(6):
        again = started(method, Schedule(lr=1e-3, ramps=(Ramp("k", 6, 4),)))
        go(again, method, s + 1)
        widths.append(again.dictionary.nonlinearity.k)
    assert widths == [6, 5, 4, 3, 2, 2]


def test_l1_warms_up():
    """The penalty of the first steps is that share of what it would be."""
    plain, warm = started(ReLU(l1=0.4)), started(ReLU(l1=0.4), Schedule(lr=0.0, ramps=(Ramp("l1", 0.0, 4),)))
    plain.schedule = Schedule(lr=0.0)
    full, ramp = (np.array([float(s.losses["l1"]) for s in go(state, ReLU(l1=0.4), 6)]) for state in (plain, warm))
    np.testing.assert_allclose(ramp / full, [0, 0.25, 0.5, 0.75, 1, 1], rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"l1": [0.0, 10]}, r"'l1' is no number that TopK\(k=2\) holds; there are .*k\."),
        ({"k": 8}, r"'k' has 8; give \[start, number of steps\]"),
        ({"k": [8, 0]}, r"'k' has \[8, 0\]"),
        ({"k": [99, 10]}, "k is 99 and n_latents 16"),
        ({"k": [0, 10]}, "k"),
    ],
)
def test_a_ramp_that_does_not_fit_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ramps_of(settings, TopK(k=2), 16)
    with pytest.raises(ValueError, match=message):
        Session(BENCH, TopK(k=2), 16, device="cpu", ramps=settings)


# schedule-free sign descent ---------------------------------------------------------------------------------------------


def test_schedule_free_is_the_published_recurrence():
    """x, y, z in numpy (Defazio et al. 2024), with sign(gradient) of a quadratic and a warm-up."""
    layer = TopK(k=2).build(4, 4, 8, torch.Generator().manual_seed(0))
    goal = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    optimiser = ScheduleFreeSignSGD([layer.W_enc], lr=1.0)
    x = z = layer.W_enc.detach().double().numpy().copy()
    total, largest = 0.0, 0.0
    for rate in (0.0, 0.01, 0.02, 0.02, 0.01):
        optimiser.param_groups[0]["lr"] = rate
        look_ahead(optimiser)
        y = 0.05 * z + 0.95 * x
        np.testing.assert_allclose(layer.W_enc.detach().numpy(), y, atol=1e-6)
        layer.W_enc.grad = (layer.W_enc - goal).detach()
        optimiser.step()
        settle(optimiser)
        z = z - rate * np.sign(y - goal.numpy())
        largest = max(largest, rate)
        total += largest**2
        x = x + (largest**2 / total if total else 0.0) * (z - x)
        np.testing.assert_allclose(layer.W_enc.detach().numpy(), x, atol=1e-6)
        np.testing.assert_allclose(optimiser.state[layer.W_enc]["z"].numpy(), z, atol=1e-6)


@pytest.mark.parametrize("method", [ReLU(l1=0.01), JumpReLU(l0=0.01), TopK(k=2), TopK(k=2, tie="tied")], ids=str)
@pytest.mark.slow
def test_schedule_free_trains_and_chunks_do_not_matter(method):
    whole, split = (started(method, Schedule(lr=1e-2), FREE) for _ in range(2))
    losses = [float(s.losses["error"]) for s in go(whole, method, 100)]
    for n in (1, 30, 69):
        go(split, method, n)
    assert same(tensors(whole), tensors(split))
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])
    if method.unit_norm:
        torch.testing.assert_close(whole.dictionary.W_dec.norm(dim=1), torch.ones(16))


def test_the_weights_between_steps_are_the_average():
    """The average reconstructs better than the fast weights, which jump about it."""
    method = ReLU(l1=0.01)
    state = started(method, Schedule(lr=1e-2), FREE)
    go(state, method, 200)
    rows = SOURCE.sample(500, torch.Generator().manual_seed(1)).inputs
    average, fast = state.dictionary, copy.deepcopy(state.dictionary)
    with torch.no_grad():
        for parameter, twin in zip(average.parameters(), fast.parameters(), strict=True):
            twin.copy_(state.optimiser.state[parameter]["z"])
        error = lambda d: float((d(rows).reconstruction - rows).square().sum(dim=1).mean())
        assert error(average) < 0.8 * error(fast)


def test_only_and_hard_pins_hold_bit_for_bit():
    method = TopK(k=2)
    state = started(method, Schedule(lr=1e-2), FREE)
    anchors = Anchors(torch.eye(10)[:1], torch.eye(10)[:1], ("a",))
    state.pins = Pins(anchors, torch.tensor([5]), torch.tensor([0.1]), torch.tensor([True]))
    before = tensors(state)
    go(state, method, 4, only=[3, 5])
    after = tensors(state)
    for name in ("W_enc", "b_enc", "W_dec", "W_enc/z", "b_enc/z", "W_dec/z"):
        moved = (before[name] != after[name]).reshape(16, -1).any(dim=1)
        assert moved.nonzero().flatten().tolist() in ([3], []), name
    assert (before["W_dec"][3] != after["W_dec"][3]).any()
    assert torch.equal(before["b_dec"], after["b_dec"]) and torch.equal(before["b_dec/z"], after["b_dec/z"])


def test_a_cleared_row_starts_its_fast_weights_at_the_row():
    state = started(TopK(k=2), Schedule(lr=1e-2), FREE)
    go(state, TopK(k=2), 5)
    with torch.no_grad():
        state.dictionary.W_enc[3] = 7.0
    others = tensors(state)["W_enc/z"][4:]
    state.clear_moments(torch.tensor([3]))
    assert torch.equal(state.optimiser.state[state.dictionary.W_enc]["z"][3], torch.full((10,), 7.0))
    assert torch.equal(tensors(state)["W_enc/z"][4:], others)
    go(state, TopK(k=2), 1)
    assert (state.dictionary.W_enc[3] - 7.0).abs().max() < 0.1


def test_an_error_in_a_step_leaves_the_average():
    method = TopK(k=2)
    state = started(method, Schedule(lr=1e-2), FREE)
    go(state, method, 3)
    before = tensors(state)

    class Failing(TopK):
        def objective(self, *args):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        go(state, Failing(k=2), 1)
    for name, tensor in tensors(state).items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-6)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(ImportError, match=r"needs the package schedulefree.*pip install 'sdl-explorer\[optim\]'"):
        Session(BENCH, TopK(k=2), 16, device="cpu", optimiser=FREE)
    assert Session(BENCH, TopK(k=2), 16, device="cpu").train(1).step == 1


# sessions ---------------------------------------------------------------------------------------------------------------

SETTINGS = {
    "optimiser": FREE,
    "decay_steps": 60,
    "decay": "cosine",
    "clip_norm": 0.5,
    "ramps": {"k": [6, 30]},
    "lr": 5e-3,
    "batch_size": 16,
}


def weights(session):
    return {name: tensor.clone() for name, tensor in session.dictionary.state_dict().items()}


@pytest.mark.parametrize("at", [0, 10, 45])
def test_a_session_goes_on_bit_for_bit(tmp_path, at):
    with Session(BENCH, TopK(k=2), 16, device="cpu", **SETTINGS) as whole:
        whole.train(60)
        expected = weights(whole)
        with Session(BENCH, TopK(k=2), 16, device="cpu", **SETTINGS) as first:
            if at:
                first.train(at)
            shown = first.dictionary.nonlinearity.k
            first.save(tmp_path / "run")
        with Session.open(tmp_path / "run", device="cpu") as second:
            assert {name: getattr(second, name) for name in SETTINGS} == SETTINGS and not second.stale
            assert second.dictionary.nonlinearity.k == shown
            second.train(60 - at)
            assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(second).items())
            commit = second.commit()
            second.train(5)
            beyond = weights(second)
            twin = second.branch(commit).train(5)
            assert all(torch.equal(tensor, beyond[name]) for name, tensor in weights(twin).items())
            second.revert(commit).train(5)
            assert all(torch.equal(tensor, beyond[name]) for name, tensor in weights(second).items())


def test_each_setting_is_recorded_and_matters():
    runs = {}
    for name, settings in {
        "plain": {},
        "cosine": {"decay": "cosine", "decay_steps": 20},
        "linear": {"decay_steps": 20},
        "clip": {"clip_norm": 0.01},
        "ramp": {"ramps": {"k": [6, 10]}},
        FREE: {"optimiser": FREE},
    }.items():
        with Session(BENCH, TopK(k=2), 16, device="cpu", **settings) as session:
            session.train(20)
            runs[name] = weights(session)["W_dec"]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(runs.values(), 2))


def test_changes_are_commits_and_come_back():
    with Session(BENCH, TopK(k=2), 16, device="cpu") as session:
        session.train(5)
        start = session.commit()
        session.clip_norm, session.ramps, session.optimiser = 0.5, {"k": [4, 50]}, FREE
        assert session.stale
        session.train(5)
        changed = next(c for c in session.commits if c.kind == "settings")
        assert "clip_norm None to 0.5" in changed.message and "optimiser adam to signsgd" in changed.message
        assert session.dictionary.nonlinearity.k == 4
        session.revert(start)
        assert (session.clip_norm, session.ramps, session.optimiser) == (None, {}, "adam") and not session.stale
        assert session.dictionary.nonlinearity.k == 2


def test_a_setting_that_cannot_be_had_changes_nothing(monkeypatch):
    with Session(BENCH, TopK(k=2), 16, device="cpu") as session:
        session.train(5)
        monkeypatch.setitem(sys.modules, "schedulefree", None)
        session.optimiser = FREE
        with pytest.raises(ImportError, match="schedulefree"):
            session.train(5)
        session.optimiser = "adam"
        assert not session.stale and session.step == 5
        assert session.train(5).step == 10


@pytest.mark.parametrize("pair", [[None, 10], ["6", 10], [6], 6, [6, 0], [6, 1.5]])
def test_a_ramp_is_a_start_and_a_number_of_steps(pair):
    with pytest.raises(ValueError, match=r"give \[start, number of steps\]"):
        Session(BENCH, TopK(k=2), 16, device="cpu", ramps={"k": pair})


def test_a_folder_from_before_these_settings_opens(tmp_path):
    """Its record lacks them: they are at their defaults, and nothing is stale."""
    with Session(BENCH, TopK(k=2), 16, device="cpu") as session:
        session.train(7).save(tmp_path / "run")
        expected = weights(session.train(3))
        session.revert(next(c for c in session.commits if c.step == 7))
    later = ("decay", "optimiser", "clip_norm", "precision", "ramps")
    for path in (tmp_path / "run").rglob("*.json"):
        record = json.loads(path.read_text())
        for settings in (record.get("session"), record.get("settings")):
            for name in later if settings else ():
                del settings[name]
        if "state" in record:
            del record["state"]["optimiser"], record["state"]["clip_norm"], record["state"]["precision"]
            del record["state"]["schedule"]["decay"], record["state"]["schedule"]["ramps"]
        path.write_text(json.dumps(record))
    with Session.open(tmp_path / "run", device="cpu") as session:
        assert session.step == 7 and not session.stale
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(session.train(3)).items())


def test_a_commit_store_brings_the_optimiser_back(tmp_path):
    method = TopK(k=2)
    state = started(method, Schedule(lr=1e-2), FREE, clip_norm=0.5)
    go(state, method, 6)
    store = CommitStore(tmp_path, 10**9)
    commit = store.write(state, {}, parent=None, message="", python="", kind="manual", latents=(), metrics={})
    loaded = store.load(commit, "cpu")
    assert isinstance(loaded.optimiser, ScheduleFreeSignSGD) and loaded.clip_norm == 0.5
    assert same(tensors(loaded), tensors(state))
    go(loaded, method, 4), go(state, method, 4)
    assert same(tensors(loaded), tensors(state))
