"""What a finding may claim: the packaged scores, the regimes, and the silence where a detector is more often wrong than right."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis import scores
from sdl_explorer.diagnosis.meanings import suspect_polysemantic
from sdl_explorer.diagnosis.redundancy import find_redundant
from sdl_explorer.diagnosis.scores import DetectorScore, detector_scores, mean_coherence
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
    measured = measured[measured["regime"] == "mean coherence"]
    for name in NAMES:
        for row in measured[measured["detector"] == name].itertuples():
            found = detector_scores(name, row.low)
            for field in ("high", "n", "positives", "claimed", "precision", "recall", "average_precision", "chance"):
                assert getattr(found, field) == pytest.approx(getattr(row, field)), (name, row.low, field)


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
    ],
)
def test_only_a_measured_precision_of_one_half_is_a_claim(change, confident, says):
    found = replace(GOOD, **change)
    assert found.confident is confident and str(found).startswith(says)


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
