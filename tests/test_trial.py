"""Trials: a planted effect is measured as it is, no effect is not found, and the session stays as it was."""

import numpy as np
import pytest
import torch

from sdl_explorer.control import Stopped
from sdl_explorer.data.anchors import Anchors
from sdl_explorer.data.bench import LinearBench
from sdl_explorer.data.sources import stream
from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.diagnosis.observe import observe
from sdl_explorer.models.methods import TopK
from sdl_explorer.session import Session
from sdl_explorer.training.interventions import Anchor, Release, Resample
from sdl_explorer.training.prune import Prune
from sdl_explorer.training.split import Split
from sdl_explorer.trial import assigned, measure_contributions, permuted

SOURCE = LinearBench(n_features=24, d_in=16, sparsity=0.9, max_interference=0.6)
TRUTH = SOURCE.sample(1, torch.Generator()).truth


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch):
    monkeypatch.setattr("sdl_explorer.training.run.CHOOSE_ROWS", 400)
    monkeypatch.setattr("sdl_explorer.session.CHOOSE_ROWS", 400)


@pytest.fixture
def session():
    with Session(SOURCE, TopK(k=4), 60, batch_size=64, dead_after=10_000, lr=1e-3, warmup_steps=0) as session:
        yield session.train(20)


def anchors_for(n: int) -> Anchors:
    return Anchors.from_truth(TRUTH, [i % 24 for i in range(n)])


# the test ------------------------------------------------------------------------------------------------------------


def test_rejects_a_true_null_one_time_in_twenty():
    """Exchangeable units of any distribution: p is uniform, so 400 trials reject 20 at 5 %, and the interval covers as often."""
    generator = np.random.default_rng(0)
    found = [permuted(*np.split(generator.exponential(size=30), [12]), generator, 300) for _ in range(400)]
    rejected = sum(effect.p <= 0.05 for effect in found)
    assert 8 <= rejected <= 34, "outside of 0.999 of Binomial(400, 0.05)"
    assert sum(not effect.low <= 0 <= effect.high for effect in found) == rejected


def test_a_shift_is_covered_and_found():
    generator = np.random.default_rng(1)
    found = [permuted(0.7 + generator.normal(size=25), generator.normal(size=25), generator, 300) for _ in range(150)]
    covered = np.mean([effect.low <= 0.7 <= effect.high for effect in found])
    assert 0.88 <= covered <= 0.995 and np.mean([effect.mean for effect in found]) == pytest.approx(0.7, abs=0.08)
    exact = permuted(np.full(9, 3.0) + np.arange(9), np.arange(9.0), generator)
    assert exact.mean == pytest.approx(3.0) and exact.low < 3.0 < exact.high


def test_two_arms_that_are_the_same():
    same = permuted(np.ones(5), np.ones(6), np.random.default_rng(0))
    assert same.mean == 0 and same.p == 1 and same.low <= 0 <= same.high


def test_arms_are_equal_in_number_and_random():
    arm = assigned(30, 0)
    assert np.bincount(arm).tolist() == [10, 10, 10]
    assert (arm == assigned(30, 0)).all() and (arm != assigned(30, 1)).any()


# what is measured ----------------------------------------------------------------------------------------------------


def test_contributions_are_the_loss_of_zeroing_a_latent(session):
    dictionary, rows = session.dictionary, SOURCE.sample(500, stream("judge"))
    found = measure_contributions(dictionary, rows)
    codes = dictionary.encode(rows.inputs).dense()
    variance = (rows.targets - rows.targets.mean(dim=0)).square().sum()
    error = lambda z: (rows.targets - dictionary.decode(z)).square().sum()
    for latent in (0, 7, 33):
        without = codes.clone()
        without[:, latent] = 0
        assert found["contribution"][latent] == pytest.approx(float((error(without) - error(codes)) / variance), abs=1e-5)
    np.testing.assert_allclose(found["firing_rate"], check_health(dictionary, rows).firing_rate)
    blocks = observe(dictionary, rows, [measure_contributions], block=77)[0]
    np.testing.assert_allclose(blocks["contribution"], found["contribution"], atol=1e-6)


# planted -------------------------------------------------------------------------------------------------------------


def test_an_effect_that_is_known(session):
    """Hard anchors set a latent's decoder row to a true feature: the cosine becomes 1 in the treated arm, whatever it was."""
    before = session.find(align, n=500).per_latent.decoder_cosine
    trial = session.trial(Anchor(anchors=anchors_for(60), hard=True), range(60), n_steps=3, n=500)
    assert trial.n_units == 60 and trial.primary == "decoder_cosine" and trial.intervention == "anchor"
    treated = trial.latents[trial.arm == 0]
    np.testing.assert_allclose(trial.after["decoder_cosine"][treated], 1.0, atol=1e-5)
    np.testing.assert_allclose(trial.before["decoder_cosine"], before, atol=1e-6)
    nothing = trial.effect(against="nothing")
    expected = (1 - before[treated]).mean() - trial.of("nothing").mean()
    assert nothing.mean == pytest.approx(expected, abs=1e-5)
    assert nothing.sign == 1 and trial.effect().sign == 1 and nothing.p < 0.01 and nothing.n == 40
    assert trial.reading.startswith("It raised decoder cosine by +")
    assert len(trial.table()) == 4 * 3


def test_pruned_latents_lose_what_they_contributed(session):
    trial = session.trial(Prune(), range(30), n_steps=1, n=500)
    treated = trial.latents[trial.arm == 0]
    assert not trial.after["firing_rate"][treated].any() and not trial.after["contribution"][treated].any()
    assert trial.effect("firing_rate", "nothing").sign == -1


def test_an_effect_of_nothing_is_rejected_one_time_in_twenty(session):
    """Anchors of weight 0 clear moments and change no row. One training run per seed, so few, and all outcomes of each."""
    still = Anchor(anchors=anchors_for(60), weight=0.0)
    p = [
        trial.effect(outcome, "nothing").p
        for seed in range(12)
        for trial in [session.trial(still, range(60), n_steps=2, seed=seed, n=200)]
        for outcome in ("decoder_cosine", "contribution")
    ]
    assert np.mean(np.array(p) <= 0.05) <= 0.25 and np.mean(p) > 0.3


def test_the_session_is_left_as_it_was(session):
    state = {k: v.clone() for k, v in session.dictionary.state_dict().items()}
    commits, step = session.commits, session.step
    twin = session.branch()
    session.trial(Resample(scale=1.0), range(40), n_steps=5, n=200)
    assert session.commits == commits and session.step == step and session.snapshot.job is None
    assert all(torch.equal(v, state[k]) for k, v in session.dictionary.state_dict().items())
    with twin:
        assert torch.equal(session.train(5).dictionary.W_enc, twin.train(5).dictionary.W_enc), "and trains on as it would have"


def test_without_truth_it_is_judged_by_contribution(session):
    rows = SOURCE.sample(2_000, stream("rows"))
    from sdl_explorer.data.store import Stored

    with Session(Stored(rows.inputs), TopK(k=4), 40, batch_size=64, warmup_steps=0, dead_after=1_000) as plain:
        trial = plain.train(5).trial(Prune(), range(30), n_steps=1, n=200)
    assert trial.primary == "contribution" and set(trial.outcomes) == {"contribution", "firing_rate"}


def test_neighbours_of_treated_latents(session):
    """Twins of the treated rows, pulled by training; and none of it where nobody is left untouched."""
    trial = session.trial(Anchor(anchors=anchors_for(20), hard=True), range(20), n_steps=3, n=200)
    assert trial.spill is not None and trial.spill.n == 60 - int((trial.arm < 2).sum()) and 0 < trial.spill.p <= 1
    assert np.isfinite(trial.spill.slope)


def test_what_is_refused(session, monkeypatch):
    with pytest.raises(ValueError, match="candidates can be changed; 2 are needed in each of 3 arms"):
        session.trial(Prune(), range(5), n_steps=1)
    with pytest.raises(ValueError, match="give a whole number"):
        session.trial(Prune(), range(30), n_steps=0)
    with pytest.raises(ValueError, match="is not pinned"):
        session.trial(Release(), range(30), n_steps=1)
    with pytest.raises(ValueError, match="which is no candidate"):
        session.trial(Split(gain=0.0, least=2, spares=list(range(30, 60))), range(30), n_steps=1)
    with pytest.raises(ValueError, match="give two of treated, sham, nothing"):
        session.trial(Prune(), range(30), n_steps=1, n=200).effect(against="treated")
    session.pulses.append(session.stop)
    with pytest.raises(Stopped, match="the session is as it was"):
        session.trial(Prune(), range(30), n_steps=10**6, n=200)
    assert session.snapshot.job is None
    session.pulses.clear()
    assert session.train(1).step == 21
