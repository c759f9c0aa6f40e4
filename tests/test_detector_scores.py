"""What a finding may claim: the packaged scores, the regimes, and the silence where a detector is more often wrong than right."""

import importlib
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations, Truth
from sdl_explorer.diagnosis import scores
from sdl_explorer.diagnosis.meanings import suspect_polysemantic
from sdl_explorer.diagnosis.proportions import wilson
from sdl_explorer.diagnosis.redundancy import find_redundant
from sdl_explorer.diagnosis.scores import DetectorScore, detector_scores, known_hierarchy, mean_coherence
from sdl_explorer.models.dictionary import SparseDictionary

BENCHMARK = Path(__file__).parents[1] / "benchmarks/results/detectors/regimes.csv"
NAMES = ("polysemantic", "duplicate", "dead", "absorption")


@pytest.mark.parametrize("name", NAMES)
def test_packaged_scores_are_rates_and_cover_the_low_regimes(name):
    for coherence in (0.05, 0.15):
        found = detector_scores(name, coherence)
        assert found.detector == name and found.low <= coherence < found.high
        for rate in (found.precision, found.recall, found.average_precision, found.chance):
            assert 0 <= rate <= 1
        assert found.chance == pytest.approx(found.positives / found.n, rel=1e-3) and found.claimed <= found.n
    assert detector_scores(name, 0.9).high == detector_scores(name, 1.0).high >= 0.2  # beyond the last regime, the last


def test_packaged_scores_are_those_of_the_benchmark():
    measured = pd.read_csv(BENCHMARK)
    measured = measured[(measured["regime"] == "mean coherence") & measured["detector"].isin(NAMES)]
    assert len(measured) == sum(len(scores._table()[name]) for name in NAMES)
    for row in measured.itertuples():
        found = detector_scores(row.detector, row.low, {"all": None, "linear": False, "hierarchy": True}[row.benches])
        for field in fields(DetectorScore):
            if field.name != "parts":
                expected = getattr(row, field.name)
                assert getattr(found, field.name) == (expected if isinstance(expected, str) else pytest.approx(expected)), (row, field.name)
        assert found.precision_low <= found.precision <= found.precision_high or not found.claimed


def test_a_detector_that_was_not_scored_is_refused():
    with pytest.raises(ValueError, match=r"'oracle' has no scores; there are .*polysemantic"):
        detector_scores("oracle", 0.1)


GOOD = DetectorScore("d", 0.0, 0.1, 100, 40, 30, 0.9, 0.7, 0.95, 0.4)


@pytest.mark.parametrize(
    ("change", "confident", "says"),
    [
        ({}, True, "precision 0.90, recall 0.70 on benches at mean coherence below 0.1 (chance 0.40)"),
        ({"low": 0.1, "high": 0.2}, True, "precision 0.90, recall 0.70 on benches at mean coherence 0.1 to 0.2 (chance 0.40)"),
        ({"precision": 0.49}, False, "precision 0.49"),
        ({"claimed": 5}, False, "precision not known: too few cases on benches at mean coherence below 0.1"),
        ({"positives": 5}, False, "precision not known"),
        ({"positives": 0, "precision": 0.0}, False, "all 30 claims were wrong on benches at mean coherence below 0.1, which have no case"),
    ],
)
def test_only_a_measured_precision_of_one_half_is_a_claim(change, confident, says):
    found = replace(GOOD, **change)
    assert found.confident is confident and str(found).startswith(says)
    assert found.brief.startswith(says.split(",")[0]) and "chance" not in found.brief


def test_the_kind_of_benches_is_the_one_that_is_like_the_data(monkeypatch):
    hierarchy = replace(GOOD, benches="hierarchy", precision=0.6, precision_low=0.5, precision_high=0.7)
    monkeypatch.setattr(scores, "_table", lambda: {"d": (GOOD, replace(GOOD, benches="linear"), hierarchy)})
    assert detector_scores("d", 0.05, True) is hierarchy and detector_scores("d", 0.05, False).benches == "linear"
    assert str(hierarchy).startswith("precision 0.60 (0.50 to 0.70), recall 0.70 on benches with a hierarchy at mean coherence below 0.1")
    unknown = detector_scores("d", 0.05)
    assert [part.benches for part in unknown.parts] == ["linear", "hierarchy"] and unknown.confident
    assert str(unknown).endswith("(chance 0.40); 0.90 without a hierarchy; 0.60 (0.50 to 0.70) with a hierarchy")
    for part, confident in ((replace(hierarchy, precision=0.4), False), (replace(hierarchy, precision=0.4, claimed=3), True)):
        assert replace(unknown, parts=(part,)).confident is confident  # one that was not measured says nothing
    monkeypatch.setattr(scores, "_table", lambda: {"d": (GOOD,)})
    assert detector_scores("d", 0.05, True) == GOOD


def test_a_hierarchy_is_known_from_the_whole_truth_alone():
    x, codes = torch.zeros(3, 2), torch.zeros(3, 2)
    known = lambda **facts: known_hierarchy(Activations(x, x, Truth(codes, torch.eye(2), torch.eye(2), **facts)))
    assert known(parents=(None, 0)) is True and known(parents=(None, None)) is known() is False
    assert known_hierarchy(Activations(x, x)) is known(parents=(None, 0), complete=False) is None


def test_findings_claim_nothing_where_the_precision_is_below_one_half(monkeypatch):
    features = torch.eye(12)
    codes = (torch.rand(600, 12, generator=torch.Generator().manual_seed(0)) < 0.1).float()
    dictionary = SparseDictionary(
        torch.cat([features, features[:1] + features[1:2]]), torch.cat([features, features[:1] + features[1:2]]) / 2
    )
    found = suspect_polysemantic(dictionary, Activations(x := codes @ features, x))
    for precision, start in ((0.9, "1 polysemantic candidates of 13 latents on 600 rows"), (0.4, "no claim about 13 latents on 600 rows")):
        table = {name: (replace(GOOD, detector=name, precision=precision),) for name in ("polysemantic", "duplicate", "dead")}
        monkeypatch.setattr(scores, "_table", lambda table=table: table)
        assert found.reading.startswith(start) and f"precision {precision:.2f}" in found.reading and found.reading in repr(found)
    spare = find_redundant(dictionary, Activations(x, x))
    assert spare.worth("duplicate").detector == "duplicate" and spare.coherence == pytest.approx(found.coherence, abs=1e-6)


@pytest.mark.parametrize("n", [0, 1, 2, 50])
def test_mean_coherence_is_the_mean_absolute_cosine(n, monkeypatch):
    rows = torch.randn(n, 6, generator=torch.Generator().manual_seed(1))
    unit = normalize(rows, dim=1).double().numpy()
    expected = np.abs((unit @ unit.T)[~np.eye(n, dtype=bool)]).mean() if n > 1 else 0
    assert mean_coherence(rows) == pytest.approx(expected, abs=1e-6)
    monkeypatch.setattr(scores, "CELLS", 70)
    assert mean_coherence(3 * rows) == pytest.approx(expected, abs=1e-6)


def test_mean_coherence_of_many_rows_is_that_of_a_sample():
    rows = torch.randn(5000, 8, generator=torch.Generator().manual_seed(2))
    unit = normalize(rows, dim=1)
    assert mean_coherence(rows) == pytest.approx(float((unit @ unit.T).abs().sum() - 5000) / (5000 * 4999), rel=0.02)


@pytest.fixture(scope="module")
def bench():
    """benchmarks/detectors.py, which stands beside its tables."""
    sys.path.insert(0, str(BENCHMARK.parents[2]))
    try:
        yield importlib.import_module("detectors")
    finally:
        sys.path.pop(0)


def test_intervals_are_those_of_dictionaries_drawn_with_replacement(bench):
    g = np.random.default_rng(1)
    which = np.repeat(np.arange(6), [5, 40, 8, 30, 3, 20])
    score = g.integers(0, 12, len(which)) / 4 + (which == 3)  # with ties
    truth = g.random(len(which)) < 1 / (1 + np.exp(2 - score))
    units = bench.Units(score, score >= 2, truth)
    times, figures = np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6), size=1_000), []
    for drawn in times[:200]:
        rows = np.concatenate([np.flatnonzero(which == at) for at in np.repeat(np.arange(6), drawn)])
        figures.append(bench.scores(units.of(rows)))
    tables = importlib.import_module("detector_tables")
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    areas = tables._areas(times[:200][:, which[order]].astype(float), truth[order], last)
    np.testing.assert_allclose(areas, [f["average_precision"] for f in figures if f["positives"]], atol=1e-12)
    found = tables.intervals(units, which)
    for name in tables.FIGURES:
        low, high = np.quantile([f[name] for f in figures], [0.025, 0.975])
        assert found[f"{name}_low"] <= low + 0.05 and found[f"{name}_high"] >= high - 0.05
        assert found[f"{name}_low"] < bench.scores(units)[name] < found[f"{name}_high"]


def test_an_interval_is_never_a_point_where_all_are_right(bench):
    tables, units = importlib.import_module("detector_tables"), bench.Units(np.arange(30.0), np.arange(30) > 19, np.arange(30) > 19)
    found = tables.intervals(units, np.repeat(np.arange(3), 10))
    assert (found["precision_low"], found["precision_high"]) == pytest.approx(wilson(10, 10)) and found["average_precision_low"] == 1
    nothing = tables.intervals(bench.Units(units.score, units.claimed & False, units.truth & False), np.repeat(np.arange(3), 10))
    assert set(nothing.values()) == {0.0, 1.0}


def test_what_a_decoder_row_writes_is_one_feature_or_two(bench):
    features = normalize(torch.randn(5, 24, generator=torch.Generator().manual_seed(3)), dim=1)
    mixes = [[1, 0, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0.25, 0, 0.97], [1, 0, -1, 0, 0], [0, 3, 0, 4, 0]]
    rows = torch.tensor(mixes, dtype=torch.float) @ features
    truth = bench.Truths(SparseDictionary(rows, rows), None, 0)
    truth.rows = Activations(rows, rows, Truth(torch.zeros(6, 5), features, features))
    assert truth.written.tolist() == [[0, 0], [1, 3], [-1, -1], [4, 4], [-1, -1], [1, 3]]
