"""`Session`: settings describe the next step, facts are of the latest one, and only training moves the model."""

import gc
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from sdl_explorer.data.anchors import Anchors
from sdl_explorer.data.bench import LinearBench
from sdl_explorer.data.hierarchy import HierarchyBench
from sdl_explorer.data.sources import stream
from sdl_explorer.data.store import Stored
from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import BatchTopK, JumpReLU, ReLU, TopK
from sdl_explorer.session import Session
from sdl_explorer.training import run as run_module
from sdl_explorer.training.interventions import Resample
from sdl_explorer.training.run import Diverged

SOURCE = LinearBench(n_features=12, d_in=8, sparsity=0.8, max_interference=0.7)


pytestmark = pytest.mark.usefixtures("few_rows")


@pytest.fixture
def make():
    made = []

    def make(method=None, source=SOURCE, n_latents=16, **settings) -> Session:
        made.append(Session(source, method or TopK(k=2), n_latents, **({"batch_size": 16, "dead_after": 100} | settings)))
        return made[-1]

    yield make
    for session in made:
        session.close()


def weights(session) -> dict:
    return {k: v.cpu().clone() for k, v in session.dictionary.state_dict().items()}


def same(a, b, device="cpu") -> bool:
    equal = torch.equal if device == "cpu" else (lambda x, y: torch.allclose(x, y, rtol=1e-4, atol=1e-5))
    return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


# what training depends on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [ReLU(l1=0.01), JumpReLU(l0=0.01), TopK(k=2), BatchTopK(k=2)], ids=lambda m: type(m).__name__)
def test_only_training_advances_training(make, method, device, tmp_path):
    plain, busy = make(method, device=device), make(method, device=device)
    plain.train(20)
    for n in (3, 10, 7):
        busy.train(n)
        busy.find([check_health, align], n=200)
        busy.plan(Resample(latents=[1]))
        busy.commit("x")
        busy.save(tmp_path / "run")
        _ = busy.dictionary, busy.history, busy.kind, busy.snapshot
        with busy.branch() as twin:
            twin.train(2)
    assert same(weights(plain), weights(busy), device)


def test_weights_exist_before_the_first_step_and_follow_the_seed(make):
    a, b, c = make(seed=1), make(seed=1), make(seed=2)
    assert a.step == 0 and same(weights(a), weights(b)) and not same(weights(a), weights(c))
    start = weights(a)
    a.train(5)
    assert same(weights(a.restart()), start) and a.step == 0 and not len(a.history)
    assert same(weights(a.train(5)), weights(b.train(5)))


def test_defaults(make):
    session = Session(LinearBench(n_features=6, d_in=5, sparsity=0.5, max_interference=0.9), TopK(k=3))
    with session:
        assert session.n_latents == 20 and session.dead_after == 100_000 and session.seed == 0
        assert session.device == ("cuda" if torch.cuda.is_available() else "cpu")
        assert session.dictionary.device.type == session.device
        assert not session.running and not session.stale and session.writable and session.folder is None
        assert [c.kind for c in session.commits] == ["start"] and session.head == session.commits[0]
        assert session.pins is None and session.preflight is None and session.last_control is None


@pytest.mark.parametrize(
    ("source", "kind", "widths"),
    [
        (SOURCE, "sae", (8, 8)),
        (LinearBench(n_features=12, d_in=8, d_out=5, sparsity=0.8, max_interference=0.9, kind="transcoder"), "transcoder", (8, 5)),
        (LinearBench(n_features=12, d_in=4, sparsity=0.8, max_interference=1.0, kind="crosscoder"), "crosscoder", (8, 8)),
    ],
)
def test_the_data_say_what_the_model_is(make, source, kind, widths):
    session = make(source=source).train(3)
    assert session.kind == kind and (session.dictionary.d_in, session.dictionary.d_out) == widths
    session.resample([1])
    assert session.find(check_health, n=100).n_latents == 16


# settings ------------------------------------------------------------------------------------------------------------


def test_a_changed_setting_is_stale_until_the_next_command_writes_it(make):
    session = make().train(4)
    before = weights(session)
    session.lr, session.method.k = 0.1, 3
    assert session.stale and len(session.commits) == 1 and same(weights(session), before)
    session.train(1)
    assert not session.stale and [c.kind for c in session.commits] == ["start", "run", "settings"]
    assert session.commits[1].step == session.commits[2].step == 4
    assert session.dictionary.nonlinearity.k == 3 and session.snapshot.l0 == pytest.approx(3, abs=0.6)


def test_revert_brings_settings_back(make):
    session = make().train(2)
    good = session.commit()
    session.lr, session.method.k, session.dead_after = 0.3, 4, 7
    session.train(1)
    session.lr = 0.9
    session.revert(good)
    assert (session.lr, session.method.k, session.dead_after, session.stale) == (1e-3, 2, 100, False)
    assert session.dictionary.nonlinearity.k == 2


def test_a_setting_that_does_not_fit_is_refused_and_can_be_put_right(make):
    session = make().train(2)
    before = weights(session)
    session.method.k = 17
    for command in (lambda: session.train(1), session.commit, lambda: session.resample([1])):
        with pytest.raises(ValueError, match="k is 17 and n_latents 16"):
            command()
    assert same(weights(session), before) and not session.running and "k is 17" in session.snapshot.error
    session.method.k = 2
    assert session.train(1).step == 3 and session.snapshot.error is None


def test_bounds_and_constants(make):
    session = make()
    for name, value in (("batch_size", 0), ("lr", -1), ("dead_after", 0), ("budget", 0), ("decay_steps", 0)):
        with pytest.raises(ValueError):
            setattr(session, name, value)
    for name, value in (("n_latents", 5), ("seed", 1), ("source", LinearBench()), ("method", ReLU()), ("device", "cpu:0")):
        with pytest.raises(TypeError):
            setattr(session, name, value)
    with pytest.raises(TypeError, match="colour"):
        make(colour="red")


@pytest.mark.parametrize("wrong", [{"n_latents": 0}, {"method": TopK(k=99)}, {"device": "abacus"}, {"device": "cuda:99"}])
def test_what_cannot_be_built(wrong):
    with pytest.raises(ValueError, match=r"n_latents is 0|k is 99 and n_latents 16|cannot be used here"):
        Session(SOURCE, **({"method": TopK(k=2), "n_latents": 16} | wrong))


def test_the_given_method_is_copied(make):
    method = TopK(k=2)
    a, b = make(method), make(method)
    a.method.k = 5
    assert method.k == b.method.k == 2


# findings ------------------------------------------------------------------------------------------------------------


def test_findings_are_cached_by_state_and_settings(make):
    session = make().train(3)
    first = session.find(check_health, n=100)
    assert session.find(check_health, n=100) is first
    assert session.find(check_health, n=101) is not first
    assert session.find(check_health, n=100, dead_after=5) is not first
    session.plan(Resample(latents=[1]))
    assert session.find(check_health, n=100) is first
    session.train(1)
    assert session.find(check_health, n=100) is not first
    commit = session.commit()
    second = session.find(check_health, n=100)
    session.train(2).revert(commit)
    assert session.find(check_health, n=100) is second, "a finding belongs to the commit that it was computed on"


def test_findings_take_what_the_session_knows(make):
    session = make(dead_after=48).train(3)
    session.anchor(Anchors.from_truth(SOURCE.sample(1, torch.Generator()), [3]), latents=[5])
    session.train(1)
    health, alignment = session.find([check_health, align], n=300)
    expected = session._run.state.samples_since_fired.numpy()
    np.testing.assert_array_equal(health.samples_since_fired, expected)
    np.testing.assert_array_equal(health.dead, expected >= 48)
    assert health.n_dead == session.snapshot.dead
    assert (expected >= 48).any()
    assert health.n_samples == 300
    assert alignment.recovery(0.0, "decoder", "heldout") == pytest.approx(1) and alignment.n_features == 12
    assert session.find([align, check_health], n=300)[1] is health
    assert session.find(check_health, n=300, dead_after=1).dead.sum() >= health.dead.sum()


def test_tensors_as_settings_are_told_apart(make):
    session = make(source=Stored(torch.randn(2_000, 400, generator=torch.Generator().manual_seed(0))), n_latents=4)
    eye = torch.eye(400)
    one, other = (Anchors.from_rows(eye[i : i + 3]) for i in (0, 100))
    a, b = (session.find(align, n=50, anchors=anchors) for anchors in (one, other))
    assert not np.array_equal(a.decoder, b.decoder)
    assert session.find(align, n=50, anchors=one) is a


def test_unknown_settings_of_findings(make):
    with pytest.raises(TypeError, match=r"no finding in .*check_health.* takes .*colour"):
        make().find(check_health, n=50, colour="red")


def test_many_findings_from_many_threads(make):
    session, errors = make().train(1), []

    def look(n):
        try:
            for i in range(8):
                assert session.find(check_health, n=40 + 10 * n + i).n_samples == 40 + 10 * n + i
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=look, args=(n,)) for n in range(8)]
    [t.start() for t in threads]
    session.train(30)
    [t.join() for t in threads]
    assert not errors


# running -------------------------------------------------------------------------------------------------------------


def test_start_returns_at_once_and_stop_ends_within_a_step(make):
    session = make()
    future = session.start(10**9)
    assert session.running
    until(lambda: session.snapshot.step > 5)
    assert session.snapshot.running and session.snapshot.target == 10**9
    session.stop()
    step = session.step
    assert future.done() and not session.running
    snapshot = session.snapshot
    assert (snapshot.step, snapshot.running, snapshot.stopping, snapshot.rate) == (step, False, False, 0.0)
    time.sleep(0.05)
    assert session.step == step and len(session.history) == step
    session.stop()
    assert same(weights(session), weights(make().train(step)))


def test_the_snapshot_is_the_last_one_when_train_returns(make):
    session = make()
    for n in range(1, 15):
        session.train(3)
        snapshot = session.snapshot
        assert (snapshot.step, snapshot.running, snapshot.target) == (3 * n, False, 3 * n)
        assert snapshot.losses["total"] == session.history.losses["total"][-1]
        assert snapshot.samples_since_fired.shape == (16,) and snapshot.n_latents == 16


def test_versions_grow(make):
    session, seen = make(), []
    session.pulses.append(lambda: seen.append(session.snapshot.version))
    session.train(400).commit()
    assert seen == sorted(seen) and session.version > seen[0]


def test_training_twice_at_once_is_refused(make):
    session = make()
    session.start(10**9)
    with pytest.raises(RuntimeError, match=r"already training up to step 1000000000; call stop\(\) first"):
        session.train(1)
    commit = session.commit("while it runs")
    assert session.running and commit.step > -1
    session.resample([1])
    assert session.running, "commands run between two steps"
    session.revert(commit)
    assert not session.running and session.step == commit.step


def test_pulses_beat_while_a_cell_waits(make):
    session, beats = make(), []
    session.pulses.append(lambda: beats.append((threading.current_thread(), session.running)))
    session.start(10**9)
    waiting = threading.Timer(0.9, session.stop)
    waiting.start()
    session._wait(session._future)
    waiting.join()
    assert 3 <= len(beats) <= 8 and {thread for thread, _ in beats} == {threading.current_thread()}
    assert beats[0][1] and not beats[-1][1], "the last one shows the end"


def test_an_interrupt_stops_at_the_next_step(make):
    session = make()

    def interrupt():
        session.pulses.clear()
        raise KeyboardInterrupt

    session.pulses.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.train(10**9)
    assert not session.running and session.step > 0
    assert session.train(1).step == len(session.history)


def test_a_pulse_that_fails_does_not_leave_training_alone(make):
    session = make()
    session.pulses.append(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.train(10**9)
    assert not session.running


def test_two_sessions_share_the_device(make):
    a, b = make(), make()
    a.start(10**9)
    b.start(10**9)
    until(lambda: a.snapshot.step > 20 and b.snapshot.step > 20)
    until(lambda: a.snapshot.queue == 1 and b.snapshot.queue == 1)
    assert make().train(2).step == 2, "a short run is done while long ones go on"
    a.stop()
    b.stop()
    assert a.snapshot.queue <= 1 and min(a.step, b.step) > 0.1 * max(a.step, b.step)


@pytest.mark.parametrize("n", [0, -1, 2.5, True, "ten", None, float("inf")])
def test_steps_are_whole_numbers(make, n):
    with pytest.raises(ValueError, match=r"train: n is .*; give a whole number, at least 1"):
        make().train(n)


@pytest.mark.parametrize(
    ("only", "message"),
    [([], "non-empty"), ([16], "latent 16 does not exist"), ([1.5], "non-empty"), ([True], "non-empty"), ([2, 2], "twice")],
)
def test_only_names_latents(make, only, message):
    with pytest.raises(ValueError, match=message):
        make().train(1, only=only)


def test_training_some_latents_alone(make, device):
    session = make(device=device).train(3)
    before = weights(session)
    session.train(4, only=np.array([2, 9]))
    after = weights(session)
    moved = (after["W_enc"] != before["W_enc"]).any(1) | (after["W_dec"] != before["W_dec"]).any(1) | (after["b_enc"] != before["b_enc"])
    assert moved.nonzero().flatten().tolist() == [2, 9] and torch.equal(after["b_dec"], before["b_dec"])
    assert session.head.python == "session.train(4, only=[2, 9])" and [c.kind for c in session.commits] == ["start", "run", "run"]


# ends that are not the end -------------------------------------------------------------------------------------------


def test_divergence_raises_and_offers_the_last_finite_commit(make, device):
    session = make(device=device, lr=1e-3, warmup_steps=0).train(5)
    good = session.commit("good")
    at_commit = weights(session)
    session.lr = 1e30
    with pytest.raises(Diverged, match=r"Diverged at step \d+ \(lr 1e\+30\).*session\.revert\('\w{8}'\) goes back to step 5") as caught:
        session.train(50)
    error = caught.value
    assert 5 <= error.step < 10 and error.lr == 1e30 and error.last_finite == session.head and error.last_finite.step == 5
    assert session.snapshot.diverged is error and not session.running
    with pytest.raises(ValueError, match="not finite"):
        session.commit()
    session.revert(error.last_finite)
    assert same(weights(session), at_commit) and session.snapshot.diverged is None
    session.revert(good)
    assert session.lr == 1e-3 and session.train(5).step == 10
    assert np.isfinite(session.history.losses["total"]).all()


def test_a_run_pauses_when_it_no_longer_gets_better(make, monkeypatch):
    monkeypatch.setattr(run_module, "COMMIT_EVERY", 10)

    class Still(LinearBench):
        def batch(self, index, size, order=0):
            return super().batch(0, size, order)

    frozen = make(source=Still(n_features=12, d_in=8, sparsity=0.8, max_interference=0.7), lr=0.0)
    frozen.start(10**9, converge=True).result(30)
    assert frozen.snapshot.converged == frozen.step == 20 and not frozen.running
    assert frozen.train(45).step == 65 and frozen.snapshot.converged is None, "train(n) does n steps"
    learning = make(lr=1e-2)
    learning.start(60, converge=True).result(30)
    assert learning.step == 60 and learning.snapshot.converged is None


# branches ------------------------------------------------------------------------------------------------------------


def test_a_branch_is_a_session_of_its_own(make):
    session = make().train(5)
    here = session.commit("here")
    session.anchor(Anchors.from_rows(torch.eye(8)[:1]), latents=[4])
    session.train(5)
    with session.branch(here) as twin, session.branch() as now:
        assert twin.step == 5 and twin.pins is None and [c.kind for c in twin.commits] == ["start"]
        assert now.step == 10 and now.pins.latents.tolist() == [4] and same(weights(now), weights(session))
        assert len(twin.history) == 5 and len(now.history) == 10
        expected = weights(session)
        twin.lr = 0.5
        twin.method.k = 3
        twin.train(3)
        assert same(weights(session), expected) and session.lr == 1e-3 and session.method.k == 2
        assert same(weights(now.train(4)), weights(session.train(4))), "a branch goes on as the trunk does"
        assert now.restart().step == 10
    assert session.step == 14 and session.writable


def test_branches_left_by_a_revert_stay_visible(make):
    session = make().train(4)
    here = session.commit()
    session.train(6).revert(here)
    assert len(session.history) == 4 and [len(g) for g in session.ghosts] == [10]
    assert any(c.step == 10 for c in session.commits), "what was not committed was committed first"


# training on a dictionary that exists ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Preflight")  # random weights fit nothing
@pytest.mark.parametrize(
    "method", [ReLU(l1=0.05), JumpReLU(l0=0.02, bandwidth=0.1), TopK(k=2), BatchTopK(k=2)], ids=lambda m: type(m).__name__
)
def test_training_on_a_given_dictionary(make, method, device):
    first = make(method, device=device).train(150)
    given = first.dictionary
    before = {k: v.cpu().clone() for k, v in given.state_dict().items()}
    with Session(SOURCE, dictionary=given, batch_size=16, dead_after=100, device=device) as session:
        assert type(session.method) is type(method) and session.n_latents == 16
        assert session.preflight is not None and session.preflight.fits and "trained elsewhere" in session.head.message
        rows = ("W_enc", "b_enc", "b_dec") if session.method.unit_norm else ("W_enc", "b_enc", "b_dec", "W_dec")
        session.train(99)
        held = weights(session)
        assert all(torch.equal(held[name], before[name]) for name in rows), "moments fill at rate 0 first"
        torch.testing.assert_close(held["W_dec"], before["W_dec"])
        session.train(30)
        assert not torch.equal(weights(session)["W_enc"], before["W_enc"])
    assert all(torch.equal(v.cpu(), before[k]) for k, v in given.state_dict().items()), "what was given is left alone"


def test_dictionaries_that_do_not_fit():
    with pytest.raises(ValueError, match=r"widths \(5, 5\) and the data \(8, 8\)"):
        Session(SOURCE, dictionary=SparseDictionary(torch.randn(6, 5), torch.randn(6, 5)))
    with pytest.raises(ValueError, match="n_latents is 7 and the dictionary has 6"):
        Session(SOURCE, n_latents=7, dictionary=SparseDictionary(torch.randn(6, 8), torch.randn(6, 8)))


# interventions by command ----------------------------------------------------------------------------------------------


def test_the_plan_that_is_shown_is_the_one_that_is_applied(make, device):
    session = make(device=device).train(5)
    before = weights(session)
    plan = session.plan(Resample(latents=[3, 8]))
    assert same(weights(session), before) and len(session.commits) == 1
    again = session.plan(Resample(latents=[3, 8]))
    assert torch.equal(plan.W_dec, again.W_dec)
    commit = session.apply(plan.drop([8]))
    after = weights(session)
    assert torch.equal(after["W_dec"][3], plan.W_dec[0].cpu()) and torch.equal(after["W_dec"][8], before["W_dec"][8])
    assert commit.kind == "resample" and commit.latents == (3,) and session.head == commit
    with pytest.raises(ValueError, match="every latent was dropped"):
        session.apply(plan.drop([3, 8]))


def test_resample_revives_the_dead(make):
    session = make(dead_after=64)
    with torch.no_grad():
        session._run.state.dictionary.b_enc[[2, 7]] = -50.0
    session.train(10)
    dead = set(np.flatnonzero(session.snapshot.samples_since_fired >= 64))
    assert {2, 7} <= dead and session.snapshot.dead == len(dead)
    assert set(session.resample(scale=1.0).latents) == dead
    assert session.snapshot.dead == 0
    session.train(10)
    assert not {2, 7} & set(np.flatnonzero(session.snapshot.samples_since_fired >= 64))


def test_a_failed_intervention_changes_nothing(make):
    session = make().train(3)
    before, n = weights(session), len(session.commits)
    for failing in (lambda: session.resample([99]), lambda: session.release(), lambda: session.anchor(Anchors.from_rows(torch.eye(3)))):
        with pytest.raises(ValueError):
            failing()
    assert same(weights(session), before) and len(session.commits) == n


# ends ----------------------------------------------------------------------------------------------------------------


def test_a_session_that_is_dropped_goes_with_its_files():
    session = Session(SOURCE, TopK(k=2), 8, batch_size=8).train(2)
    session.start(3).result(20)
    folder, gone = session._run.store.folder.parent, weakref.ref(session)
    assert folder.exists()
    del session
    for _ in range(20):
        gc.collect()
        if gone() is None:
            break
        time.sleep(0.01)
    assert gone() is None and not folder.exists()


def test_close_stops_a_run():
    session = Session(SOURCE, TopK(k=2), 8, batch_size=8)
    future = session.start(10**9)
    session.close()
    assert future.done() and not session.running


def test_a_checkpoint_of_another_scale_is_scaled_on_request():
    rows = HierarchyBench().sample(2000, stream("scale"))
    W = rows.truth.input_features
    made_for = SparseDictionary(W, W, b_enc=-0.1 - 0.3 * W.sum(dim=1), b_dec=torch.full((W.shape[1],), 0.3))
    source = Stored(7.3 * (rows.inputs + 0.3))
    with pytest.warns(UserWarning, match=r"fits after scaling by 0\.1.*rescale=True scales them"):
        asked = Session(source, dictionary=made_for)
    with asked, Session(source, dictionary=made_for, rescale=True) as rescaled:
        assert asked.preflight.verdict.startswith("fits after scaling by 0.1") and asked.preflight.scale != 1
        assert asked.dictionary.input_scale == 1, "nothing is scaled unasked"
        assert rescaled.preflight.verdict == "fits" and rescaled.preflight.scale == 1
        assert rescaled.dictionary.input_scale == rescaled.dictionary.target_scale == asked.preflight.scale
        assert torch.equal(rescaled.dictionary.W_enc, made_for.W_enc), "it trains on in the units that it was made in"
        assert rescaled.find(check_health).unexplained_variance < 0.5 * asked.find(check_health).unexplained_variance
