"""Alignment against a brute force in double precision, planted answers, and the chance levels of random rows."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations, Block, Truth
from sdl_explorer.data.anchors import Anchors, Pins
from sdl_explorer.diagnosis import cosines, matching
from sdl_explorer.diagnosis.alignment import SCORINGS, SIDES, align
from sdl_explorer.diagnosis.chance import Chance
from sdl_explorer.diagnosis.matching import Matcher
from sdl_explorer.models.dictionary import SparseDictionary

N, N_FEATURES, D_IN, D_OUT, N_LATENTS = 200, 9, 6, 5, 14


def directions(n, d, seed):
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def planted(names=(), blocks=()):
    g = torch.Generator().manual_seed(0)
    codes = torch.rand(N, N_FEATURES, generator=g) * (torch.rand(N, N_FEATURES, generator=g) < 0.2)
    W_p, W_r = directions(N_FEATURES, D_IN, 1), directions(N_FEATURES, D_OUT, 2)
    return Activations(codes @ W_p, codes @ W_r, Truth(codes, W_p, W_r, names=names), blocks=blocks)


def random_dictionary(seed=3):
    g = torch.Generator().manual_seed(seed)
    W_enc, W_dec = torch.randn(N_LATENTS, D_IN, generator=g), 3 * torch.randn(N_LATENTS, D_OUT, generator=g)
    W_dec[4] = 0
    return SparseDictionary(W_enc, W_dec, b_enc=0.1 * torch.randn(N_LATENTS, generator=g))


def pins_of(features, latents, truth):
    k = len(features)
    return Pins(Anchors.from_truth(truth, features), torch.tensor(latents), torch.ones(k), torch.zeros(k, dtype=torch.bool))


def brute_cosines(dictionary, activations):
    """Each side's cosines (n_latents, n_features), in double precision and straight from the definitions."""

    def cos(a, b):
        a, b = a.double().detach().numpy(), b.double().numpy()
        norms = np.linalg.norm(a, axis=1, keepdims=True)
        return np.divide(a, norms, out=np.zeros_like(a), where=norms > 0) @ b.T

    truth = activations.truth
    x = activations.inputs.double()
    z = torch.relu(x @ dictionary.W_enc.double().T + dictionary.b_enc.double())
    response = torch.nan_to_num((z.T @ x) / z.sum(0)[:, None] - x.mean(0))
    found = {
        "encoder": cos(dictionary.W_enc, truth.input_features),
        "decoder": cos(dictionary.W_dec, truth.target_features),
        "response": cos(response, truth.input_features),
    }
    return found


@pytest.mark.parametrize("cells", [cosines.CELLS, 40])
def test_every_score_equals_the_brute_force(monkeypatch, device, cells):
    monkeypatch.setattr(cosines, "CELLS", cells)  # 40: blocks of four latents
    activations, dictionary = planted(), random_dictionary()
    features, latents = [2, 7], [0, 11]
    found = align(dictionary.to(device), activations, pins=pins_of(features, latents, activations.truth))
    brute = brute_cosines(dictionary.cpu(), activations)
    free_features, free_latents = np.setdiff1d(range(N_FEATURES), features), np.setdiff1d(range(N_LATENTS), latents)
    for side in SIDES:
        for signed in (True, False):
            phi = (lambda c: c) if signed else np.abs
            cos = np.minimum(phi(brute["encoder"]), phi(brute["decoder"])) if side == "minimum" else phi(brute[side])
            expected = {
                "all": cos.max(0),
                "heldout": cos.max(0)[free_features],
                "heldout_strict": cos[free_latents].max(0)[free_features],
            }
            for scoring in SCORINGS:
                scores = found.scores(side, scoring, signed)
                np.testing.assert_allclose(scores, expected[scoring], atol=1e-5, err_msg=f"{side} {scoring} {signed}")
                assert found.mean_best(side, scoring, signed) == pytest.approx(expected[scoring].mean(), abs=1e-5)
                assert found.recovery(0.6, side, scoring, signed) == pytest.approx((expected[scoring] > 0.6).mean())
        if side != "minimum":
            np.testing.assert_array_equal(getattr(found, f"{side}_latent"), brute[side].argmax(0))
            np.testing.assert_allclose(getattr(found, side), brute[side].max(0), atol=1e-5)
    np.testing.assert_array_equal(found.minimum_latent, np.minimum(brute["encoder"], brute["decoder"]).argmax(0))
    assert np.flatnonzero(found.anchored_features).tolist() == features
    assert np.flatnonzero(found.anchored_latents).tolist() == latents


@pytest.mark.parametrize("cells", [cosines.CELLS, 40])
def test_per_latent_matching_and_mcc_equal_the_brute_force(monkeypatch, cells):
    monkeypatch.setattr(cosines, "CELLS", cells)
    activations, dictionary = planted(), random_dictionary()
    found, brute = align(dictionary, activations), brute_cosines(dictionary, activations)
    per = found.per_latent
    nonzero = np.arange(N_LATENTS) != 4  # a zero row is as good with every feature
    np.testing.assert_array_equal(per.encoder_feature, brute["encoder"].argmax(1))
    np.testing.assert_array_equal(per.decoder_feature[nonzero], brute["decoder"].argmax(1)[nonzero])
    np.testing.assert_array_equal(per.response_feature, brute["response"].argmax(1))
    for side in ("encoder", "decoder", "response"):
        np.testing.assert_allclose(getattr(per, f"{side}_cosine"), brute[side].max(1), atol=1e-5)
    at = brute["encoder"][np.arange(N_LATENTS), per.decoder_feature]
    np.testing.assert_allclose(per.encoder_at_decoder, at, atol=1e-5)
    rows, columns = linear_sum_assignment(-brute["decoder"].T)
    np.testing.assert_array_equal(found.matching, columns[np.argsort(rows)])
    np.testing.assert_allclose(found.matching_cosine, brute["decoder"][columns, rows], atol=1e-5)
    assert found.matching_note == ""
    absolute = np.abs(brute["decoder"]).T
    assert found.mcc == pytest.approx(absolute[linear_sum_assignment(-absolute)].mean(), abs=1e-5)


def test_f1_is_the_decoders_best_latent_as_a_classifier():
    activations, dictionary = planted(), random_dictionary()
    found = align(dictionary, activations)
    fires = (torch.relu(dictionary.pre(activations.inputs)) > 0).numpy()[:, found.decoder_latent]
    active = activations.truth.codes.numpy() > 0
    tp, fp, fn = (fires & active).sum(0), (fires & ~active).sum(0), (~fires & active).sum(0)
    np.testing.assert_allclose(found.feature_f1, 2 * tp / (2 * tp + fp + fn))
    assert found.f1 == pytest.approx(found.feature_f1.mean())


def test_a_dictionary_of_the_true_directions_is_found_whole_and_its_negative_only_unsigned():
    g = torch.Generator().manual_seed(0)
    W = torch.linalg.qr(torch.randn(6, 6, generator=g))[0]
    codes = torch.rand(300, 6, generator=g) * (torch.rand(300, 6, generator=g) < 0.1)
    activations = Activations(*(codes @ W,) * 2, Truth(codes, W, W))
    order = torch.randperm(6, generator=g)
    found = align(SparseDictionary(5 * W[order], W[order]), activations)
    for side in SIDES:
        assert found.recovery(0.95, side) == 1
    np.testing.assert_array_equal(order.numpy()[found.matching], np.arange(6))
    assert (found.mcc, found.f1) == (pytest.approx(1), pytest.approx(1, abs=0.05))
    turned = align(SparseDictionary(-W, -W), activations)
    assert turned.recovery(side="decoder") == 0
    assert turned.recovery(side="decoder", signed=False) == 1


def test_encoder_and_decoder_of_different_latents_do_not_make_a_minimum():
    eye = torch.eye(2)
    activations = Activations(*(torch.rand(20, 2),) * 2, Truth(torch.ones(20, 2), eye, eye))
    found = align(SparseDictionary(eye, eye.flip(0)), activations)
    assert found.recovery(side="encoder") == found.recovery(side="decoder") == 1
    assert found.recovery(side="minimum") == 0
    np.testing.assert_allclose(found.per_latent.encoder_at_decoder, 0)


def test_the_curve_is_recovery_at_each_tau():
    found = align(random_dictionary(), planted())
    taus, shares = found.curve("encoder")
    assert (taus[0], taus[-1], len(taus)) == (0, 1, 201)
    assert shares.tolist() == [found.recovery(t, "encoder") for t in taus]
    assert found.curve("decoder", taus=[0.3])[1] == found.recovery(0.3)


def test_strict_scoring_takes_an_anchored_latent_away_from_its_neighbours():
    features = normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.0, 1.0]]), dim=1)
    codes = torch.rand(30, 3)
    activations = Activations(*(codes @ features,) * 2, Truth(codes, features, features))
    rows = torch.stack([features[0], torch.tensor([0.0, 1.0])])
    found = align(SparseDictionary(rows, rows), activations, pins=pins_of([0], [0], activations.truth))
    assert found.recovery(scoring="all") == 1
    assert found.recovery(scoring="heldout") == 1  # feature 1 lives on feature 0's latent
    assert found.recovery(scoring="heldout_strict") == 0.5


def test_pins_hold_a_feature_by_direction_too_and_all_held_gives_nan():
    activations = planted()
    truth = activations.truth
    rows = Anchors.from_rows(truth.input_features[[3]], truth.target_features[[3]])
    pins = Pins(rows, torch.tensor([1]), torch.ones(1), torch.zeros(1, dtype=torch.bool))
    assert np.flatnonzero(align(random_dictionary(), activations, pins=pins).anchored_features).tolist() == [3]
    everything = pins_of(range(N_FEATURES), range(N_FEATURES), truth)
    found = align(random_dictionary(), activations, pins=everything)
    assert np.isnan(found.recovery())
    assert np.isfinite(found.recovery(scoring="all"))


def test_anchors_take_the_place_of_the_truth():
    activations = planted()
    anchors = Anchors.from_truth(activations.truth, [5, 1])
    found = align(random_dictionary(), activations, anchors=anchors)
    whole = align(random_dictionary(), activations)
    assert (found.of, whole.of, found.n_features) == ("anchors", "truth", 2)
    np.testing.assert_allclose(found.decoder, whole.decoder[[5, 1]], atol=1e-6)
    np.testing.assert_allclose(found.feature_f1, whole.feature_f1[[5, 1]])
    bare = Activations(activations.inputs, activations.targets)
    without = align(random_dictionary(), bare, anchors=Anchors.from_rows(anchors.inputs, anchors.targets, names=("cat", "dog")))
    assert without.names == ("cat", "dog")
    np.testing.assert_allclose(without.response, found.response, atol=1e-6)
    assert np.isnan(without.f1)


def test_a_crosscoder_is_scored_within_each_source():
    blocks = (Block("early", slice(0, 2), slice(0, 2)), Block("late", slice(2, 6), slice(2, 5)))
    activations, dictionary = planted(blocks=blocks), random_dictionary()
    found = align(dictionary, activations)
    assert found.block_names == ("early", "late")
    for b, block in enumerate(blocks):
        for rows, features, span, score, per in (
            (dictionary.W_enc, activations.truth.input_features, block.inputs, found.block_encoder, found.per_latent.block_encoder),
            (dictionary.W_dec, activations.truth.target_features, block.targets, found.block_decoder, found.per_latent.block_decoder),
        ):
            expected = (normalize(rows[:, span], dim=1) @ normalize(features[:, span], dim=1).T).detach().numpy()
            np.testing.assert_allclose(score[b], expected.max(0), atol=1e-5)
            at = expected[np.arange(N_LATENTS), found.per_latent.decoder_feature]
            np.testing.assert_allclose(per[b], at, atol=1e-5)
    assert align(dictionary, planted()).block_encoder.shape == (0, N_FEATURES)


def matched(scores, candidates, dense_cells):
    solver = Matcher(*scores.shape, device="cpu", candidates=candidates, dense_cells=dense_cells)
    for latents in torch.arange(scores.shape[1]).split(7):
        solver.add(scores[:, latents], latents)
    return solver, solver.solve(), solver.solve(signed=False)


def test_matching_on_candidates_equals_the_whole_matrix_where_they_reach():
    scores = 2 * torch.rand(12, 40, generator=torch.Generator().manual_seed(0)) - 1
    whole, *exact = matched(scores, 64, 10_000)
    cut, *sparse = matched(scores, 16, 10)
    assert whole.note == ""
    assert "16 best latents" in cut.note
    for (latent, cosine), (other, other_cosine) in zip(exact, sparse, strict=True):
        np.testing.assert_array_equal(latent, other)
        np.testing.assert_allclose(cosine, other_cosine, atol=1e-6)


def test_matching_on_candidates_never_fails_and_never_gives_a_latent_twice():
    scores = torch.zeros(8, 30)
    scores[:, :2] = 0.9  # all features want the same two latents
    _, (latent, cosine), _ = matched(scores, 2, 10)
    assert sorted(latent.tolist()) == [-1] * 6 + [0, 1]
    np.testing.assert_allclose(cosine[latent >= 0], 0.9, atol=1e-6)
    assert (cosine[latent < 0] == 0).all()


def test_more_features_than_latents_leaves_some_unmatched_and_match_false_all():
    activations = planted()
    dictionary = random_dictionary()
    small = SparseDictionary(dictionary.W_enc[:3], dictionary.W_dec[:3])
    assert (align(small, activations).matching >= 0).sum() == 3
    left_out = align(small, activations, match=False)
    assert (left_out.matching == -1).all()
    assert np.isnan(left_out.mcc)
    assert matching.DENSE_CELLS == 20_000_000


@pytest.mark.parametrize(
    ("d", "n_latents", "absolute", "signed"),
    [
        (768, 16000, 0.148, 0.142),
        (77, 200, 0.331, 0.307),
        (64, 1600, 0.428, 0.408),
        (16, 24, 0.535, 0.474),
        (3, 4, 0.80, 0.60),
        (2, 8, 0.97, 0.90),
    ],
)
def test_chance_levels_of_random_rows(d, n_latents, absolute, signed):
    chance = Chance(n_latents, 50, d, d)
    assert chance.mean_best(signed=False) == pytest.approx(absolute, abs=0.004)
    assert chance.mean_best(signed=True) == pytest.approx(signed, abs=0.004)


@pytest.mark.parametrize("side", ["decoder", "minimum"])
@pytest.mark.parametrize("signed", [True, False])
def test_chance_equals_simulation(side, signed):
    d_in, d_out, n_latents = 5, 3, 20
    chance, scores = Chance(n_latents, 4000, d_in, d_out), []
    for seed in range(400):
        reads = directions(n_latents, d_in, 3 * seed) @ directions(10, d_in, 3 * seed + 1).T
        writes = directions(n_latents, d_out, 3 * seed + 2) @ directions(10, d_out, 1_000_000 + seed).T
        reads, writes = (reads, writes) if signed else (reads.abs(), writes.abs())
        scores.append((torch.minimum(reads, writes) if side == "minimum" else writes).amax(0))
    scores = torch.cat(scores).numpy()
    assert chance.mean_best(side, signed) == pytest.approx(scores.mean(), abs=0.01)
    for tau in (0.5, 0.8, 0.95):
        assert chance.recovery(tau, side, signed) == pytest.approx((scores > tau).mean(), abs=0.03)
    np.testing.assert_allclose(np.quantile(chance.sample(side, signed), [0.1, 0.5, 0.9]), np.quantile(scores, [0.1, 0.5, 0.9]), atol=0.02)


def test_chance_in_one_dimension_and_at_the_ends():
    assert Chance(3, 10, 1, 1).recovery(0.95) == pytest.approx(7 / 8)
    assert Chance(3, 10, 1, 1).recovery(0.95, signed=False) == 1
    np.testing.assert_allclose(Chance(5, 10, 4, 4).recovery(np.array([-1.5, 1.0, 2.0])), [1, 0, 0])
    with pytest.raises(ValueError, match="side is 'left'"):
        Chance(5, 10, 4, 4).recovery(side="left")


def test_what_is_refused():
    activations, dictionary = planted(), random_dictionary()
    bare = Activations(activations.inputs, activations.targets)
    with pytest.raises(ValueError, match=r"align compares with true features, and these activations have none \(truth=None\)"):
        align(dictionary, bare)
    with pytest.raises(ValueError, match="4 columns and the dictionary 6"):
        align(dictionary, bare, anchors=Anchors.from_rows(torch.randn(2, 4)))
    stretched = Truth(activations.truth.codes, 2 * activations.truth.input_features, activations.truth.target_features)
    with pytest.raises(ValueError, match="input direction 0 of the truth has norm 2"):
        align(dictionary, Activations(activations.inputs, activations.targets, stretched))
    with pytest.raises(ValueError, match="latent 99 is pinned"):
        align(dictionary, activations, pins=pins_of([0], [99], activations.truth))
    with pytest.raises(ValueError, match="side is 'both'"):
        align(dictionary, activations).scores("both")
