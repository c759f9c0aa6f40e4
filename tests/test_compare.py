"""The scoreboard against its findings, and the control's verdicts against planted differences."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations, Truth
from sdl_explorer.data.anchors import Anchors, Pins
from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.diagnosis.compare import BETTER, MEASURES, Control, change_per_feature, paired, score, scoreboard
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.models.dictionary import SparseDictionary


def bench(seed=0):
    g = torch.Generator().manual_seed(seed)
    W = normalize(torch.randn(6, 5, generator=g), dim=1)
    codes = torch.rand(100, 6, generator=g) * (torch.rand(100, 6, generator=g) < 0.3)
    x = codes @ W
    rows = torch.cat([W[:4], torch.randn(3, 5, generator=g)])
    return SparseDictionary(rows, rows), Activations(x, x, Truth(codes, W, W))


def test_score_holds_the_numbers_of_the_findings():
    dictionary, activations = bench()
    pins = Pins(Anchors.from_truth(activations, [0, 5]), torch.tensor([0, 6]), torch.ones(2), torch.zeros(2, dtype=torch.bool))
    numbers = score(dictionary, activations, pins=pins)
    health, found = check_health(dictionary, activations), align(dictionary, activations, pins=pins)
    assert set(numbers) == set(MEASURES) == set(BETTER)
    assert numbers == scoreboard(health, found)
    assert numbers["recovery_decoder"] == found.recovery(0.95, "decoder", "heldout_strict") == 0.75
    assert numbers["recovery_all"] == pytest.approx(4 / 6)
    assert numbers["l0"] == health.l0
    assert all(isinstance(MEASURES[name].show(value), str) for name, value in numbers.items())


def test_score_without_truth_is_the_health_alone_and_anchors_bring_recovery():
    dictionary, activations = bench()
    bare = Activations(activations.inputs, activations.inputs)
    assert set(score(dictionary, bare)) == {"mse", "unexplained_variance", "l0", "dead"}
    anchors = Anchors.from_truth(activations, [0, 1])
    assert score(dictionary, bare, anchors=anchors)["recovery_decoder"] == 1
    since = torch.full((7,), 50)
    assert score(dictionary, bare, samples_since_fired=since, dead_after=100)["dead"] == 0


def test_paired_interval_is_students():
    treated, other = np.array([1.0, 2.0, 4.0, 3.0, 6.0]), np.array([0.5, 1.0, 3.5, 1.0, 4.0])
    gap = paired(treated, other)
    expected = stats.ttest_rel(treated, other).confidence_interval(0.95)
    assert (gap.mean, gap.n) == (pytest.approx(1.2), 5)
    assert (gap.low, gap.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert (gap.sign, paired(other, treated).sign, paired(treated, treated).sign) == (1, -1, 0)
    wide = paired(treated, other, redrawn=True)
    assert (wide.mean, wide.high - wide.mean) == pytest.approx((1.2, (gap.high - gap.mean) * 6**0.5))
    assert paired(treated, other, 0.01).high == pytest.approx(stats.ttest_rel(treated, other).confidence_interval(0.99).high)
    assert paired(treated, treated, least=0.5).high == pytest.approx(stats.t.ppf(0.975, 4) * 0.5 / 5**0.5)
    assert -gap == paired(other, treated)
    one = paired(treated[:1], other[:1])
    assert (one.low, one.sign) == (-np.inf, 0)


def control(treated, untreated, sham=None, runs=5, metric="recovery_decoder", noise=0.01, **extra):
    g = np.random.default_rng(0)

    def arm(level):
        numbers = {metric: level + noise * g.standard_normal(runs), "l0": np.full(runs, 10.0)}
        return numbers | {name: np.full(runs, values[len(arms)]) for name, values in extra.items()}

    arms = []
    for level in (treated, untreated) + ((sham,) if sham is not None else ()):
        arms.append(arm(level))
    return Control("resample", 500, {metric: 0.1}, *arms, **({} if sham is not None else {"sham": {}}), primary=metric)


@pytest.mark.parametrize(
    ("levels", "metric", "words"),
    [
        ((0.9, 0.5, 0.5), "recovery_decoder", "improved"),
        ((0.3, 0.5, 0.5), "recovery_decoder", "worse"),
        ((0.3, 0.5, 0.5), "mse", "improved"),
        ((0.9, 0.5, 0.5), "mse", "worse"),
        ((0.5, 0.5, 0.1), "recovery_decoder", "not distinguishable from 500 more steps"),
        ((0.9, 0.5, 0.9), "recovery_decoder", "not distinguishable from resetting the same latents at random"),
        ((0.7, 0.5, 0.9), "recovery_decoder", "improved, but worse than resetting the same latents at random"),
        ((0.9, 0.5, None), "recovery_decoder", "improved"),
    ],
)
def test_verdicts(levels, metric, words):
    pairs = control(*levels, metric=metric)
    assert pairs.verdict() == words
    if metric == "recovery_decoder":
        assert pairs.better() is (words == "improved")


def test_too_few_pairs_are_not_read():
    few = control(0.9, 0.1, 0.1, runs=4)
    assert few.verdict() == "n = 4: at least 5 seeds are needed to read this."
    assert not few.better()


def test_a_number_without_a_direction_and_one_that_is_not_defined():
    dense = control(0.9, 0.5, 0.5)
    assert dense.verdict("l0") == "not distinguishable from 500 more steps"
    dense.treated["l0"][:] = 12.0
    assert dense.verdict("l0") == "higher"
    dense.treated["l0"][0] = np.nan
    assert dense.verdict("l0") == "not defined here"


@pytest.mark.parametrize(
    ("variance", "l0", "better"),
    [
        ((0.2, 0.2, 0.2), (10, 10, 10), True),
        ((0.2019, 0.2, 0.2), (10, 10, 10), True),
        ((0.203, 0.2, 0.2), (10, 10, 10), False),
        ((0.1, 0.2, 0.2), (11, 10, 10), False),  # less error because more latents fire
        ((0.2, 0.2, 0.2), (8, 10, 10), True),
    ],
)
def test_better_without_truth_needs_the_error_not_to_rise_at_matched_l0(variance, l0, better):
    repair = control(0.1, 0.5, 0.5, metric="dead", unexplained_variance=variance)
    for arm, level in zip((repair.treated, repair.untreated, repair.sham), l0, strict=True):
        arm["l0"][:] = level
    assert repair.better() is better


def test_the_table_has_a_row_per_number():
    table = control(0.9, 0.5, 0.6).table()
    assert list(table.index) == ["recovery_decoder", "l0"]
    row = table.loc["recovery_decoder"]
    assert row["label"] == MEASURES["recovery_decoder"].label
    assert row["before"] == 0.1
    assert row["vs untreated low"] < row["vs untreated"] < row["vs untreated high"]
    assert row["vs untreated"] == pytest.approx(row["treated"] - row["untreated"])
    assert row["vs sham"] == pytest.approx(row["treated"] - row["sham"])
    sham = control(0.9, 0.5, 0.6)
    wide = paired(sham.treated["recovery_decoder"], sham.sham["recovery_decoder"], redrawn=True)
    assert (row["vs sham low"], row["vs sham high"]) == (wide.low, wide.high), "chance draws the sham anew in each pair"
    assert row["verdict"] == "improved"
    assert row["primary"]
    assert "sham" not in control(0.9, 0.5).table()


def test_what_is_refused():
    good = control(0.9, 0.5)
    with pytest.raises(ValueError, match="primary is 'holes'"):
        Control("resample", 5, {}, good.treated, good.untreated, primary="holes")
    with pytest.raises(ValueError, match="the untreated arm has runs"):
        Control("resample", 5, {}, good.treated, {"recovery_decoder": np.zeros(3), "l0": np.zeros(5)}, primary="recovery_decoder")
    with pytest.raises(ValueError, match="not measured in the sham arm; it holds nothing"):
        good.difference("l0", "sham")
    with pytest.raises(ValueError, match="against is 'chance'"):
        good.difference("l0", "chance")


def test_change_per_feature_is_sorted_by_gain():
    dictionary, activations = bench()
    worse = SparseDictionary(dictionary.W_enc, torch.cat([torch.randn(4, 5), dictionary.W_dec[4:]]))
    before, after = align(worse, activations), align(dictionary, activations)
    change = change_per_feature(before, after)
    np.testing.assert_allclose(change.after, after.decoder[change.feature])
    np.testing.assert_allclose(change.before, before.decoder[change.feature])
    assert (np.diff(change.change) <= 0).all()
    assert change.names[0] == before.names[change.feature[0]]
    anchors = Anchors.from_truth(activations, [1])
    with pytest.raises(ValueError, match="6 and 1 features are not the same"):
        change_per_feature(before, align(dictionary, activations, anchors=anchors))
