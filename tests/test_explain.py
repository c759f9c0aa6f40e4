"""Verdicts: planted damage is named first, with the latents that have it, and its advice can be applied and heals it."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Anchors, Pins
from sdl_explorer.data.hierarchy import HierarchyBench
from sdl_explorer.data.sources import stream
from sdl_explorer.diagnosis.explain import MOST, explain
from sdl_explorer.diagnosis.observe import observe
from sdl_explorer.diagnosis.scores import DetectorScore
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import TopK
from sdl_explorer.training.interventions import Resample
from sdl_explorer.training.realign import Realign
from sdl_explorer.training.split import Split
from sdl_explorer.training.state import TrainState
from sdl_explorer.training.unabsorb import Unabsorb

FLAT = HierarchyBench(parents=0, independent=8, d_in=8, independent_probability=0.08, magnitude_std=0.3)
TREE = HierarchyBench(parents=2, children=2, independent=4, d_in=12, parent_probability=0.3, child_probability=0.3)
N = 3_000


def rows_of(source, part="judge", noise=0.0) -> Activations:
    rows = source.sample(N, stream(part), part)
    if not noise:
        return rows
    noisy = rows.inputs + noise * torch.randn(rows.inputs.shape, generator=stream("noise", part))
    return replace(rows, inputs=noisy, targets=noisy)


def truth_of(source):
    return source.sample(1, torch.Generator()).truth


def healthy():
    W = truth_of(FLAT).input_features
    return W.clone(), W.clone()


def merged():
    W_enc, W_dec = healthy()
    for W in (W_enc, W_dec):
        W[0], W[1] = normalize(W[0] + W[1], dim=0), 0.0
    return W_enc, W_dec


def dead():
    W_enc, W_dec = healthy()
    W_enc[[2, 5]] = 0.0
    W_dec[[2, 5]] = normalize(torch.randn(2, 8, generator=stream("dead")), dim=1)
    return W_enc, W_dec


def copied():
    W_enc, W_dec = healthy()
    W_enc[3], W_dec[3] = 0.9 * W_enc[6], W_dec[6]
    return W_enc, W_dec


def misread():
    """Each latent reads a mixture, fires on its own feature and writes it."""
    W_enc, W_dec = healthy()
    return W_enc - 0.75 * W_enc.roll(1, dims=0), W_dec


def absorbed():
    truth = truth_of(TREE)
    W_enc, W_dec = truth.input_features.clone(), truth.input_features.clone()
    for child, parent in enumerate(truth.parents):
        if parent is not None:
            W_dec[child] = normalize(truth.input_features[parent] + truth.input_features[child], dim=0)
            W_enc[child] = 2**0.5 * truth.input_features[child]
            W_enc[parent] -= truth.input_features[child]
    return W_enc, W_dec


CASES = {  # what is damaged, where, the verdict, the advice, the latents that have it, the features that it costs
    "merged": (merged, FLAT, Split, {0}, {0, 1}),
    "dead": (dead, FLAT, Resample, {2, 5}, {2, 5}),
    "copies": (copied, FLAT, Resample, {3}, {3}),
    "encoder": (misread, FLAT, Realign, set(range(8)), set(range(8))),
    "absorbed": (absorbed, TREE, Unabsorb, {0, 1, 2, 3, 4, 5}, {0, 1, 2, 3, 4, 5}),
}


def dictionary_of(make, order=None) -> SparseDictionary:
    W_enc, W_dec = make()
    order = torch.arange(len(W_enc)) if order is None else order
    return SparseDictionary(W_enc[order], W_dec[order], nonlinearity=TopK(k=5).nonlinearity(len(W_enc)))


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_planted_damage_is_the_first_verdict(case, shuffled, noise):
    make, source, kind, latents, features = CASES[case]
    n = len(make()[0])
    order = torch.randperm(n, generator=stream(3)) if shuffled else torch.arange(n)
    found = explain(dictionary_of(make, order), rows_of(source, noise=noise))
    first = found[0]
    assert first.id == case and isinstance(first.advice, kind), found
    if case == "copies":  # either of the two is the better one
        assert set(order[list(first.latents)].tolist()) <= {3, 6}
    else:
        assert set(order[list(first.latents)].tolist()) == latents
    assert set(first.features) == features and not first.candidate
    costs = 0.5 if case == "absorbed" else len(features) / source.n_features  # 4 are missed, and 2 silent where a child is active
    assert first.harm == pytest.approx(costs, abs=0.1)
    assert first.side == ("encoder" if case == "encoder" else "decoder")
    assert [v.harm for v in found] == sorted((v.harm for v in found), reverse=True) and len(found) <= MOST


@pytest.mark.parametrize("case", CASES)
def test_advice_can_be_applied(case):
    make, source, *_, features = CASES[case]
    dictionary = dictionary_of(make)
    first = explain(dictionary, rows_of(source))[0]
    state = TrainState.start(dictionary)
    first.advice.plan(state, rows_of(source, "choose"), stream(0)).apply(state)
    side = dictionary.W_enc if case == "encoder" else dictionary.W_dec
    cosines = normalize(side.detach(), dim=1) @ truth_of(source).target_features.T
    mended = int((cosines.max(dim=0).values[list(features)] > 0.9).sum())
    if case in ("dead", "copies"):  # a restart begins somewhere; training has to do the rest
        assert torch.isfinite(dictionary.W_dec).all()
    else:
        assert mended == len(features)
        assert case not in {v.id for v in explain(dictionary, rows_of(source))}


def test_nothing_is_wrong_with_the_truth():
    assert explain(dictionary_of(healthy), rows_of(FLAT)) == []
    tree = truth_of(TREE).input_features
    assert explain(SparseDictionary(tree, tree, nonlinearity=TopK(k=5).nonlinearity(len(tree))), rows_of(TREE)) == []


def test_dead_latents_cost_nothing_where_nothing_is_missed():
    W_enc, W_dec = healthy()
    spare = torch.zeros(3, 8)
    dictionary = SparseDictionary(torch.cat([W_enc, spare]), torch.cat([W_dec, spare]), nonlinearity=TopK(k=5).nonlinearity(11))
    assert explain(dictionary, rows_of(FLAT)) == []


def test_counts_of_training_say_who_is_dead():
    dictionary, rows = dictionary_of(dead), rows_of(FLAT)
    since = torch.zeros(8, dtype=torch.int64)
    assert "dead" not in {v.id for v in explain(dictionary, rows, samples_since_fired=since, dead_after=10_000)}
    since[5] = 20_000
    found = next(v for v in explain(dictionary, rows, samples_since_fired=since, dead_after=10_000) if v.id == "dead")
    assert found.latents == (5,) and found.advice.latents is None, "whoever is dead when it is applied"


def test_what_is_pinned_is_left_alone():
    W = truth_of(FLAT).input_features
    pins = Pins(Anchors.from_rows(W[:1]), torch.tensor([5]), torch.ones(1), torch.tensor([True]))
    found = explain(dictionary_of(dead), rows_of(FLAT), pins=pins)
    assert found[0].latents == (2,)


def test_without_truth_all_but_death_is_a_candidate():
    for make, of, latents in ((dead, "dead", {2, 5}), (copied, "copies", {6}), (misread, "encoder", set(range(8)))):
        rows = rows_of(FLAT)
        found = explain(dictionary_of(make), Activations(rows.inputs, rows.inputs))
        first = found[0]
        assert first.id == of and set(first.latents) == latents, found
        assert first.candidate is (of != "dead") and ("candidate" in first.claim) is first.candidate
        assert first.features == () and first.harm == pytest.approx(len(latents) / 8)
    assert explain(dictionary_of(healthy), Activations(rows.inputs, rows.inputs)) == []


def test_theory_says_whether_its_assumptions_hold():
    first = explain(dictionary_of(merged), rows_of(FLAT), theory=True)[0]
    assert "Theorem 3.6" in first.theorem and "Checked here (T5): " in first.theorem
    assert "Checked here" not in explain(dictionary_of(merged), rows_of(FLAT))[0].theorem


def test_blocks_and_lengths_do_not_matter():
    dictionary = dictionary_of(absorbed)
    said = [(v.id, v.claim, v.evidence, v.latents) for v in explain(dictionary, rows_of(TREE))]
    for block in (311, 1_000):
        again = observe(dictionary, rows_of(TREE), [explain], block=block)[0]
        assert [(v.id, v.claim, v.evidence, v.latents) for v in again] == said
    plain = SparseDictionary(*copied(), nonlinearity=lambda pre: pre * (pre > 0))
    scaled = SparseDictionary(3 * copied()[0], copied()[1] / 3, nonlinearity=lambda pre: pre * (pre > 0))
    assert [(v.id, v.latents) for v in explain(plain, rows_of(FLAT))] == [(v.id, v.latents) for v in explain(scaled, rows_of(FLAT))]


@pytest.mark.parametrize(("case", "precision"), [("merged", 0.9), ("merged", 0.3), ("absorbed", 0.9)])
def test_candidates_without_truth_are_named_where_their_detectors_are_right(case, precision, monkeypatch):
    worth = DetectorScore("polysemantic", 0.0, 1.0, 400, 100, 100, precision, 0.9, 0.9, 0.25)
    monkeypatch.setattr("sdl_explorer.diagnosis.meanings.detector_scores", lambda *_: worth)
    make, source, kind, latents, _ = CASES[case]
    rows, choose = rows_of(source), rows_of(source, "choose")
    found = {v.id: v for v in explain(dictionary_of(make), Activations(rows.inputs, rows.inputs))}
    assert (case in found) is (precision > 0.5)
    if case in found:
        assert found[case].candidate and "candidate" in found[case].claim and isinstance(found[case].advice, kind)
        assert set(found[case].latents) <= latents
        found[case].advice.plan(TrainState.start(dictionary_of(make)), Activations(choose.inputs, choose.inputs), stream(0))
