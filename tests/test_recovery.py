"""Recovery against planted answers, the definitions written out, and its invariants."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations, Truth
from sdl_explorer.data.bench import LinearBench
from sdl_explorer.data.sources import stream
from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.diagnosis.observe import observe
from sdl_explorer.diagnosis.patterns import trace_patterns
from sdl_explorer.diagnosis.recovery import score_recovery
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods.topk import TopKSelection

ARRAYS = ("feature", "cosine", "precision", "recall", "f1", "accuracy", "slope", "copy", "silent")
NUMBERS = ("mcc", "mmcs", "uniqueness", "mean_f1", "alive_f1", "feature_f1", "dead_fraction", "l0", "true_l0", "shrinkage")


def bench_rows(n=400, kind="sae", **settings):
    bench = LinearBench(**{"n_features": 10, "d_in": 8, "sparsity": 0.8, "max_interference": 0.5, "kind": kind} | settings)
    return bench.sample(n, stream(0, "rows"))


def one_at_a_time(n_features, d=None, n=40):
    """Rows of one feature each, activations from 1 to 2."""
    features = torch.eye(d or n_features)[:n_features]
    codes = torch.zeros(n, n_features)
    codes[torch.arange(n), torch.arange(n) % n_features] = torch.linspace(1, 2, n)
    x = codes @ features
    return Activations(x, x, Truth(codes, features, features))


def test_the_truth_scores_one():
    rows = one_at_a_time(5)
    found = score_recovery(SparseDictionary(torch.eye(5), torch.eye(5)), rows)
    for name in ("mcc", "mmcs", "uniqueness", "mean_f1", "alive_f1", "feature_f1", "l0", "true_l0", "shrinkage", "explained_variance"):
        assert getattr(found, name) == pytest.approx(1, abs=1e-6), name
    assert found.feature.tolist() == found.matching.tolist() == found.classifier.tolist() == list(range(5))
    np.testing.assert_allclose(found.slope, 1, rtol=1e-6)
    assert (found.status == "recovered").all() and not found.copy.any() and found.dead_fraction == 0


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4]])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_copies_merged_missed_and_dead(order, noise):
    """Six latents for five features: 0 twice, 1 and 2 merged, 3 alone and halved, 4 by nobody, and one dead."""
    rows = one_at_a_time(5)
    merged = (torch.eye(5)[1] + torch.eye(5)[2]) / 2**0.5
    W_dec = torch.stack([torch.eye(5)[0], 3 * torch.eye(5)[0], merged, 0.5 * torch.eye(5)[3], -torch.ones(5), torch.ones(5)])
    W_dec = W_dec + noise * torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    W_enc = torch.stack([0.9 * torch.eye(5)[0], torch.eye(5)[0] / 9, merged, torch.eye(5)[3], -torch.ones(5), -torch.ones(5)])
    found = score_recovery(SparseDictionary(W_enc[order], W_dec[order]), rows)
    assert found.status.tolist() == ["one-to-many", "merged", "merged", "recovered", "missed"]
    assert found.n_latents_above.tolist() == [2, 0, 0, 1, 0]
    assert sorted(order[j] for j in np.flatnonzero(found.copy))[0] in (0, 1) and found.copy.sum() == 1
    assert sorted(order[j] for j in np.flatnonzero(found.silent)) == [4, 5]
    assert found.missed.tolist() == [4]
    by_id = np.argsort(order)
    slopes = found.slope[by_id]
    np.testing.assert_allclose(slopes[[0, 1, 3]], [0.9, 1 / 3, 0.5], atol=4 * noise + 1e-6)
    np.testing.assert_allclose(found.f1[by_id][[0, 1, 3, 4, 5]], [1, 1, 1, 0, 0])
    assert found.f1[by_id][2] == pytest.approx(2 / 3)  # fires for two features: precision 1/2, recall 1
    assert found.precision[by_id][2] == pytest.approx(1 / 2) and found.recall[by_id][2] == 1
    assert found.alive_f1 == pytest.approx((3 + 2 / 3) / 4) and found.mean_f1 == pytest.approx((3 + 2 / 3) / 6)
    assert found.classifier[4] == -1 and found.classifier_f1[4] == 0
    assert found.classifier_f1[:4].tolist() == pytest.approx([1, 2 / 3, 2 / 3, 1])


def test_a_child_that_took_its_parent_with_it_is_merged():
    """An absorbing latent writes parent and child; the parent has its own latent as well, and is recovered."""
    rows = one_at_a_time(3)
    W_dec = torch.stack([torch.eye(3)[0], (torch.eye(3)[0] + torch.eye(3)[1]) / 2**0.5])
    found = score_recovery(SparseDictionary(torch.eye(3)[:2], W_dec), rows)
    assert found.status.tolist() == ["recovered", "merged", "missed"]
    assert found.matching.tolist() == [0, 1, -1] and found.matching_cosine[2] == 0


def test_minus_a_feature_matches_it_in_absolute_value_alone():
    rows = one_at_a_time(2)
    found = score_recovery(SparseDictionary(torch.eye(2), -torch.eye(2)), rows)
    assert found.mcc == pytest.approx(1) and found.uniqueness == 1
    assert found.cosine.tolist() == [-1, -1] and (found.status == "missed").all() and found.mmcs == pytest.approx(0)


@pytest.mark.parametrize("kind", ["sae", "transcoder", "crosscoder"])
def test_against_the_definitions_written_out(kind):
    rows = bench_rows(kind=kind)
    d_in, d_out = rows.inputs.shape[1], rows.targets.shape[1]
    g = torch.Generator().manual_seed(3)
    W_dec = rows.truth.target_features[torch.arange(14) % 10] + 0.2 * torch.randn(14, d_out, generator=g)
    W_enc = rows.truth.input_features[torch.arange(14) % 10] + 0.2 * torch.randn(14, d_in, generator=g)
    W_enc[13] = 0
    dictionary = SparseDictionary(W_enc, 2 * W_dec, nonlinearity=TopKSelection(3))
    found = score_recovery(dictionary, rows)
    z, codes = dictionary.encode(rows.inputs).dense().detach().double(), rows.truth.codes
    fires, active = z > 1e-6 * W_enc.norm(dim=1) * rows.inputs.norm(dim=1)[:, None], codes > 0
    cosines = normalize(W_dec, dim=1) @ rows.truth.target_features.T
    np.testing.assert_array_equal(found.feature, cosines.abs().argmax(dim=1))
    for j in range(14):
        truly = active[:, found.feature[j]]
        tp, p, t = (fires[:, j] & truly).sum().item(), fires[:, j].sum().item(), truly.sum().item()
        assert found.precision[j] == pytest.approx(tp / p if p else 0)
        assert found.recall[j] == pytest.approx(tp / t)
        assert found.f1[j] == pytest.approx(2 * tp / (p + t))
        assert found.accuracy[j] == pytest.approx((fires[:, j] == truly).double().mean().item())
        both, c = fires[:, j] & truly, codes[:, found.feature[j]].double()
        slope = (z[both, j] * c[both]).sum() / c[both].square().sum() * 2 * W_dec[j].norm() if both.any() else 0
        assert found.slope[j] == pytest.approx(float(slope), rel=1e-5)
    counts = fires.double().T @ active.double()
    f1 = 2 * counts / (fires.sum(dim=0)[:, None] + active.sum(dim=0))
    np.testing.assert_allclose(found.classifier_f1, f1.amax(dim=0), rtol=1e-9)
    np.testing.assert_array_equal(found.classifier, f1.argmax(dim=0))
    recon = dictionary(rows.inputs).reconstruction.detach()
    some = rows.targets.norm(dim=1) > 0
    assert found.shrinkage == pytest.approx((recon.norm(dim=1) / rows.targets.norm(dim=1))[some].mean().item(), rel=1e-5)
    assert found.explained_variance == pytest.approx(
        1 - ((rows.targets - recon) ** 2).sum().item() / ((rows.targets - rows.targets.mean(0)) ** 2).sum().item(), rel=1e-4
    )
    alignment = align(dictionary, rows)
    assert found.mcc == pytest.approx(alignment.mcc, abs=1e-6)
    np.testing.assert_allclose(found.best_cosine, alignment.decoder, atol=1e-6)
    np.testing.assert_array_equal(found.best_latent, alignment.decoder_latent)


def looking():
    rows = bench_rows()
    g = torch.Generator().manual_seed(5)
    W = rows.truth.target_features[torch.arange(16) % 10] + 0.25 * torch.randn(16, 8, generator=g)
    return rows, W, -0.2 * torch.rand(16, generator=g)


def same(a, b, order=None):
    order = np.arange(a.n_latents) if order is None else order
    for name in ARRAYS:
        np.testing.assert_allclose(getattr(a, name)[order], getattr(b, name), rtol=1e-5, atol=1e-6, err_msg=name)
    for name in NUMBERS:
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-5), name
    assert a.status.tolist() == b.status.tolist()
    np.testing.assert_array_equal(a.n_latents_above, b.n_latents_above)
    np.testing.assert_allclose(a.classifier_f1, b.classifier_f1)


def test_permuting_latents_permutes_the_findings():
    rows, W, bias = looking()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    a, b = (
        score_recovery(SparseDictionary(W, W.clone(), bias), rows),
        score_recovery(SparseDictionary(W[order], W[order], bias[order]), rows),
    )
    same(a, b, order.numpy())
    np.testing.assert_array_equal(order.numpy()[b.matching], a.matching)


def test_scaling_rows_inversely_changes_nothing():
    rows, W, bias = looking()
    scale = torch.logspace(-2, 2, 16)
    scaled = SparseDictionary(W * scale[:, None], W / scale[:, None], bias * scale)
    same(score_recovery(SparseDictionary(W, W.clone(), bias), rows), score_recovery(scaled, rows))


def test_stored_scales_change_nothing():
    rows, W, bias = looking()
    stored = SparseDictionary(W / 4, 2 * W, bias, input_scale=4.0, target_scale=2.0)
    same(score_recovery(SparseDictionary(W, W.clone(), bias), rows), score_recovery(stored, rows))


@pytest.mark.parametrize("block", [1, 13, 400])
def test_one_pass_with_others_in_blocks_of_any_size(block, monkeypatch):
    rows, W, bias = looking()
    dictionary = SparseDictionary(W, W.clone(), bias)
    alone = score_recovery(dictionary, rows)
    monkeypatch.setattr("sdl_explorer.diagnosis.cofiring.PAIRS", 100)
    monkeypatch.setattr("sdl_explorer.diagnosis.cosines.CELLS", 30)
    patterns, together = observe(dictionary, rows, [trace_patterns, score_recovery], block=block)
    same(alone, together)
    np.testing.assert_allclose(patterns.firing_rate, trace_patterns(dictionary, rows).firing_rate)


def test_on_each_device(device):
    rows, W, bias = looking()
    dictionary = SparseDictionary(W, W.clone(), bias)
    here = [trace_patterns(dictionary, rows), score_recovery(dictionary, rows)]
    there = observe(dictionary.to(device), rows.to(device), [trace_patterns, score_recovery])
    same(here[1], there[1])
    np.testing.assert_allclose(here[0].share.toarray(), there[0].share.toarray(), atol=1e-5)
    np.testing.assert_allclose(here[0].fires.toarray(), there[0].fires.toarray())
    assert here[0].status.tolist() == there[0].status.tolist()


def test_nothing_ever_fires():
    rows = one_at_a_time(3)
    silent = SparseDictionary(-torch.eye(3), torch.zeros(3, 3))
    rows = Activations(rows.inputs, rows.inputs, Truth(torch.zeros_like(rows.truth.codes), *[rows.truth.input_features] * 2))
    found = score_recovery(silent, rows)
    for name in (*ARRAYS, "matching_cosine", "best_cosine", "classifier_f1"):
        assert not np.isnan(np.asarray(getattr(found, name), dtype=float)).any(), name
    for name in NUMBERS:
        assert getattr(found, name) == pytest.approx(getattr(found, name)), name
    assert found.mean_f1 == found.alive_f1 == found.mcc == 0 and found.dead_fraction == 1


def test_without_matching_and_refusals():
    rows, W, bias = looking()
    dictionary = SparseDictionary(W, W.clone(), bias)
    assert np.isnan(score_recovery(dictionary, rows, match=False).mcc)
    with pytest.raises(ValueError, match="score_recovery compares with true features"):
        score_recovery(dictionary, Activations(rows.inputs, rows.inputs))
    with pytest.raises(ValueError, match="tau is 0"):
        score_recovery(dictionary, rows, tau=0.0)
