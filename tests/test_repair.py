"""Repairs: what is broken is mended and said so, a sham is not kept, and the session stays as it was until a person applies."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from sdl_explorer.data.hierarchy import HierarchyBench
from sdl_explorer.data.sources import stream
from sdl_explorer.data.store import Stored
from sdl_explorer.diagnosis.compare import Control, paired
from sdl_explorer.diagnosis.verdict import Verdict
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import TopK
from sdl_explorer.repair import gains_of, judged
from sdl_explorer.session import Session
from sdl_explorer.training.interventions import Resample
from sdl_explorer.training.prune import Prune
from sdl_explorer.training.split import Split

SOURCE = HierarchyBench(parents=0, independent=8, d_in=8, independent_probability=0.1, magnitude_std=0.3)
W = SOURCE.sample(1, torch.Generator()).truth.input_features
STEPS, TRY = 5, 5 * 15  # of one arm, and of one try

pytestmark = pytest.mark.filterwarnings("ignore:Preflight")  # the cases begin broken


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch):
    monkeypatch.setattr("sdl_explorer.training.run.CHOOSE_ROWS", 1_500)
    monkeypatch.setattr("sdl_explorer.session.CHOOSE_ROWS", 400)


def trapped(bias: float = 0.0) -> SparseDictionary:
    """Four pairs of features in four latents, and four that are silent."""
    rows = torch.cat([normalize(W[:4] + W[4:], dim=1), torch.zeros(4, 8)])
    return SparseDictionary(rows, rows.clone(), torch.full((8,), bias), nonlinearity=TopK(k=3).nonlinearity(8))


@pytest.fixture
def make():
    made = []

    def make(dictionary=None, source=SOURCE, **settings) -> Session:
        settings = {"batch_size": 32, "dead_after": 10_000, "lr": 1e-3, "warmup_steps": 0} | settings
        made.append(Session(source, TopK(k=3), dictionary=trapped() if dictionary is None else dictionary, **settings))
        return made[-1]

    yield make
    for session in made:
        session.close()


def verdict_of(advice, latents=(0,)) -> Verdict:
    return Verdict("planted", "Something is wrong.", (), "", advice, 0.5, "decoder", tuple(latents))


def control_of(treated, untreated, sham, primary="recovery_decoder") -> Control:
    arm = lambda values: {"l0": np.ones(5), "unexplained_variance": np.zeros(5), primary: np.asarray(values, dtype=float)}
    return Control("resample", 10, {primary: 0.0}, arm(treated), arm(untreated), arm(sham), primary)


# what is done --------------------------------------------------------------------------------------------------------


def test_merged_pairs_are_split_once_a_person_applies_it(make):
    session = make().train(3)
    weights, commits = session.dictionary.W_enc.clone(), session.commits
    found = session.repair(TRY * 2, n_steps=STEPS, n=800, apply=False)
    assert session.commits == commits and session.step == 3 and torch.equal(session.dictionary.W_enc, weights)
    assert session.snapshot.job is None and session.last_control is None
    (one,) = [one for one in found.tried if one.kept]
    assert one.verdict.id == "merged" and isinstance(one.verdict.advice, Split)
    assert all(gain.low > 0 for gain in one.gains) and one.control.n == 5
    assert "4 latents stand for two features or more" in found.reading and "Nothing was applied yet" in found.reading
    (commit,) = found.apply(session)
    assert commit.kind == "split" and (session.dictionary.W_dec @ W.T).max(dim=0).values.min() > 0.98
    assert list(found.table()["kept"]) == [True]
    session.train(1)
    with pytest.raises(ValueError, match="judged at step 3 and the session is at step 4"):
        found.apply(session)


def test_what_passed_is_applied_at_the_end(make):
    session = make().train(3)
    before = session.commits
    split = verdict_of(Split(latents=[0, 1, 2, 3], spares=[4, 5, 6, 7]))
    found = session.repair(TRY, n_steps=STEPS, n=400, verdicts=[split])
    assert [commit.kind for commit in found.applied] == ["split"] and session.head == found.applied[-1] not in before
    assert found.reading.endswith(" Applied: split.") and (session.dictionary.W_dec @ W.T).max(dim=0).values.min() > 0.98
    with pytest.raises(ValueError, match="applied already"):
        found.apply(session)
    session.start(10**6)
    with pytest.raises(ValueError, match="the session is training"):
        session.repair(TRY, n_steps=STEPS, n=400, verdicts=[split])
    session.stop()


def test_what_nothing_helps_is_left_and_said(make):
    """Pruning live latents, and its sham is the same; nothing passes."""
    session = make().train(2)
    found = session.repair(TRY, n_steps=STEPS, n=400, verdicts=[verdict_of(Prune(latents=[0, 1]))])
    assert found.kept == () and found.apply(session) == ()
    assert "Nothing passed, so nothing is proposed." in found.reading
    assert "It is not better than 5 plain steps" in found.tried[0].why


def test_nothing_is_wrong(make):
    found = make(SparseDictionary(W.clone(), W.clone(), nonlinearity=TopK(k=3).nonlinearity(8))).repair(TRY, n_steps=STEPS, n=400)
    assert found.tried == () and found.reading == "Nothing to repair: explain has no verdict here."
    assert found.table().empty


@pytest.mark.slow
def test_a_repair_goes_on_from_what_was_kept(make):
    """The second advice finds the latents that the first has changed, and says so."""
    session = make().train(2)
    split, again = verdict_of(Split(latents=[0, 1, 2, 3], spares=[4, 5, 6, 7])), verdict_of(Resample(latents=[0, 4]))
    found = session.repair(3 * TRY, n_steps=STEPS, n=400, verdicts=[split, again], apply=False)
    assert [one.kept for one in found.tried] == [True, False] and found.n_tries == 2
    assert found.tried[1].why == "It could not be planned: latent 0 was changed by an earlier repair; train on and call repair again."


@pytest.mark.slow
def test_without_truth_by_unexplained_variance(make):
    """The split costs no L0: features seldom meet, and a bias keeps what directions are off by from firing."""
    sparse = HierarchyBench(parents=0, independent=8, d_in=8, independent_probability=0.04, magnitude_std=0.3)
    session = make(trapped(bias=-0.2), source=Stored(sparse.sample(6_000, stream("rows")).inputs), dead_after=500).train(2)
    split = verdict_of(Split(latents=[0, 1, 2, 3], spares=[4, 5, 6, 7]))
    (one,) = session.repair(TRY, n_steps=STEPS, n=600, verdicts=[split], apply=False).tried
    assert one.control.primary == "unexplained_variance" and one.kept
    assert one.gains[0].mean > 0, "less of it is better"


def test_stop_keeps_what_was_finished(make):
    session, seen = make().train(2), []

    def stop_late():
        seen.append(session.snapshot.job)
        if session.snapshot.job.done > 0.5:
            session.stop()

    session.pulses.append(stop_late)
    verdicts = [verdict_of(Prune(latents=[0])), verdict_of(Prune(latents=[1]))]
    commits = session.commits
    found = session.repair(2 * TRY, n_steps=STEPS, n=400, verdicts=verdicts)
    session.pulses.clear()
    assert session.commits == commits and found.applied == ()
    assert found.stopped and len(found.tried) == 1 and "Stopped before the rest." in found.reading
    done = [job.done for job in seen]
    assert done == sorted(done) and seen[0].name == "repair" and session.snapshot.job is None
    assert session.train(1).step == 3


def test_one_that_fails_leaves_the_session_as_it_was(make, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of order")

    monkeypatch.setattr(Prune, "plan", broken)
    session = make().train(2)
    commits = session.commits
    with pytest.raises(RuntimeError, match="out of order"):
        session.repair(TRY, n_steps=STEPS, n=400, verdicts=[verdict_of(Prune(latents=[0]))])
    assert session.commits == commits and session.snapshot.job is None and session.train(1).step == 3


def test_what_is_refused(make):
    session = make()
    with pytest.raises(ValueError, match="budget is 10 steps, and one try takes 75"):
        session.repair(10, n_steps=STEPS)
    with pytest.raises(ValueError, match="4 pairs; at least 5 are needed"):
        session.repair(10**4, n_steps=STEPS, runs=4)
    with pytest.raises(ValueError, match="give a whole number"):
        session.repair(0)


# how it is judged ----------------------------------------------------------------------------------------------------


def test_intervals_against_both_arms():
    treated, untreated, sham = [0.6, 0.7, 0.5, 0.6, 0.6], [0.3, 0.3, 0.3, 0.3, 0.3], [0.4, 0.3, 0.3, 0.4, 0.4]
    trained, reset = gains_of(control_of(treated, untreated, sham), 0.05)
    half = 2.7764451 * np.std([0.3, 0.4, 0.2, 0.3, 0.3], ddof=1)
    assert (trained.mean, trained.high - trained.mean) == pytest.approx((0.3, half / 5**0.5))
    half = 2.7764451 * np.std([0.2, 0.4, 0.2, 0.2, 0.2], ddof=1)
    assert (reset.mean, reset.high - reset.mean) == pytest.approx((0.24, half * 1.2**0.5))
    narrow = gains_of(control_of([0.5] * 5, [0.4] * 5, [0.4] * 5), 0.05, step=0.1)
    assert narrow[0].low == pytest.approx(0.1 - 2.7764451 * 0.05 / 5**0.5) and narrow[1].low < 0, "one feature more is not enough"
    lower = control_of([0.1] * 5, [0.2] * 5, [0.3] * 5, "unexplained_variance")
    assert [gain.mean for gain in gains_of(lower, 0.05)] == pytest.approx([0.1, 0.2])


def test_a_lucky_draw_of_the_sham_is_seldom_kept():
    """The treatment is one more draw of the sham, and all five pairs share it: the usual interval is fooled, this one is not."""
    generator, kept, better, fooled = np.random.default_rng(0), 0, 0, 0
    for _ in range(500):
        draws, noise = generator.normal(size=6), generator.normal(scale=0.2, size=(2, 5))
        control = control_of(draws[0] + noise[0], np.full(5, -9.0), draws[1:] + noise[1])
        kept += judged(control, 0.05, 0.0)[0]
        better += control.better()
        fooled += paired(control.treated["recovery_decoder"], control.sham["recovery_decoder"]).low > 0
    assert kept / 500 < 0.045 and better == kept and fooled / 500 > 0.1


def test_words_for_each_way_not_to_pass():
    passed = control_of([0.9] * 5, [0.3] * 5, [0.3] * 5)
    assert judged(passed, 0.05, 0.0)[0]
    assert "not better than 10 plain steps" in judged(control_of([0.3] * 5, [0.3] * 5, [0.1] * 5), 0.05, 0.0)[1]
    assert "resetting the same latents at random" in judged(control_of([0.9] * 5, [0.3] * 5, [0.9] * 5), 0.05, 0.0)[1]
    assert "not defined here" in judged(control_of([np.nan] * 5, [0.3] * 5, [0.9] * 5), 0.05, 0.0)[1]
    dense = control_of([0.1] * 5, [0.2] * 5, [0.2] * 5, "unexplained_variance")
    assert "costs unexplained variance or L0" in judged(replace(dense, treated=dense.treated | {"l0": np.full(5, 2.0)}), 0.05, 0.0)[1]
