"""Realisable patterns: witnesses that run, certificates that hold, and the theorem on absorption."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from sdl_explorer.diagnosis.alone import respond_alone
from sdl_explorer.diagnosis.realisable import absorb_weakest, absorbed, realise
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.methods.topk import TopKSelection

CROSS = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])


def unit_rows(n, d, seed=0):
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def fires(dictionary, features):
    return respond_alone(dictionary, torch.as_tensor(features, dtype=torch.float32))[0].toarray() > 0


def proves(found, wanted, features, competing=False):
    """The certificate, checked by hand: the same direction as a non-negative sum of firing and of silent features."""
    y = found.certificate.toarray()
    features = np.asarray(features, dtype=float)
    assert found.verdict == "not realisable" and not found.realisable
    assert (y[wanted] >= 0).all() and (y[~wanted] <= 0).all()
    assert y[wanted].sum() > 0 or competing
    assert np.abs(y).sum() > 0
    np.testing.assert_allclose(y @ features, 0, atol=1e-6)


# pointwise ---------------------------------------------------------------------------------------------------------------


def test_independent_features_take_any_sets():
    features = unit_rows(6, 8)
    sets = [{0, 1, 2}, {3}, set(), {0, 5}, {0, 1, 2, 3, 4, 5}]
    found = realise(sets, features)
    assert found.realisable and not found.impossible.any() and found.margin > 0.05 and not found.border
    result = fires(found.dictionary(), features)
    assert [set(np.flatnonzero(row)) for row in result] == sets


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 3, 1, 0]])
def test_opposite_features_never_fire_one_latent(order):
    """w and -w: no row of a plain ReLU fires for both; 1 w + 1 (-w) = 0 is the proof. A bias allows it."""
    features = CROSS[order]
    wanted = np.zeros((2, 4), dtype=bool)
    wanted[0, [order.index(0), order.index(1)]] = wanted[1, order.index(2)] = True
    found = realise(wanted, features)
    proves(found, wanted, features)
    assert found.impossible.tolist() == [True, False]
    assert (found.certificate.toarray()[1] == 0).all()
    allowed = realise(wanted[[0]] | np.ones((1, 4), dtype=bool), features, bias=True)
    assert allowed.realisable and allowed.b_enc[0] > 0


def test_a_set_on_the_border():
    """Only {e2} among e1, -e1, e2: the others have to sit at exactly zero, which is silent."""
    found = realise([{2}], CROSS[:3])
    assert found.realisable and found.border and found.margin == pytest.approx(0, abs=1e-9)
    assert fires(found.dictionary(), CROSS[:3]).tolist() == [[False, False, True]]


def test_a_feature_inside_the_cone_of_others():
    """f2 = (f0 + f1) / |f0 + f1|: a row that fires for both fires for it. A threshold lifts f2 above them, never below."""
    features = torch.tensor([[1.0, 0], [0, 1], [0.5**0.5, 0.5**0.5]])
    both, middle = np.array([[True, True, False]]), np.array([[False, False, True]])
    proves(realise(both, features), both, features)
    proves(realise(both, features, threshold=0.5), both, features)
    assert realise(both, features, bias=True).realisable  # a positive bias, and a row that takes more from f2 than from either
    proves(realise(middle, features), middle, features)  # positive on f2 means positive on f0 or f1
    lifted = realise(middle, features, threshold=0.5)
    assert lifted.realisable
    assert fires(lifted.dictionary(), features).tolist() == middle.tolist()
    assert isinstance(lifted.dictionary().nonlinearity, JumpRectified)


@pytest.mark.parametrize("settings", [{}, {"threshold": 0.7}, {"bias": True}, {"threshold": 0.3, "bias": True}])
def test_sets_of_a_real_encoder_are_realisable(settings):
    """Whatever an encoder does is realisable, in superposition too, whatever the order of latents and features."""
    features = unit_rows(14, 6)
    g = torch.Generator().manual_seed(1)
    W_enc = torch.randn(9, 6, generator=g)
    b_enc = 0.3 * torch.randn(9, generator=g) if settings.get("bias") else None
    sigma = None
    if settings.get("threshold"):
        sigma = JumpRectified(9)
        sigma.threshold.data.fill_(settings["threshold"])
    wanted = fires(SparseDictionary(W_enc, W_enc.clone(), b_enc, nonlinearity=sigma), features)
    for rows, columns in [(np.arange(9), np.arange(14)), (np.arange(9)[::-1].copy(), np.roll(np.arange(14), 3))]:
        found = realise(wanted[rows][:, columns], features[columns], **settings)
        assert found.realisable and found.margin > 0
        np.testing.assert_array_equal(fires(found.dictionary(), features[columns]), wanted[rows][:, columns])


def test_random_sets_agree_with_a_count():
    """In the plane a plain ReLU has as many sets among n features in general position as there are arcs: 2 n of 2^n."""
    features = unit_rows(5, 2, seed=4)
    every = (np.arange(32)[:, None] >> np.arange(5)) % 2 == 1
    found = realise(every, features)
    angles = np.linspace(0, 2 * np.pi, 20_001)
    seen = {tuple(row) for row in (np.stack([np.cos(angles), np.sin(angles)], axis=1) @ features.numpy().T > 0)}
    assert {tuple(row) for row, bad in zip(every, found.impossible, strict=True) if not bad} == seen | {(False,) * 5}
    assert len(seen) == 10


# competition -------------------------------------------------------------------------------------------------------------


def test_top_1_gives_each_feature_one_winner():
    """The trap of Example 3.5 is realisable; two winners of one feature are not."""
    trap = np.array([[True, True], [False, False]])
    found = realise(trap, torch.eye(2), k=1)
    assert found.realisable
    np.testing.assert_array_equal(fires(found.dictionary(), torch.eye(2)), trap)
    crowded = realise(np.ones((2, 2), dtype=bool), torch.eye(2), k=1)
    assert crowded.verdict == "not realisable" and "k is 1" in crowded.reason


BETWEEN = torch.tensor([[1.0, 0], [0, 1], [0.5**0.5, 0.5**0.5]])


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_competition_allows_what_a_relu_refuses(order):
    """A latent for f2 alone, between f0 and f1: a ReLU fires for one of those as well, but under Top-1 others may win them."""
    wanted = np.eye(3, dtype=bool)
    assert realise(wanted, BETWEEN[order]).impossible.tolist() == [i == 2 for i in order]
    found = realise(wanted, BETWEEN[order], k=1)
    assert found.realisable and found.margin > 0.01 and not found.border
    np.testing.assert_array_equal(fires(found.dictionary(), BETWEEN[order]), wanted)


def test_slots_that_are_free_leave_no_competition():
    """Each feature fires one latent and k is 2: the others may not be positive, and the same sets are out of reach again."""
    wanted = np.eye(3, dtype=bool)
    found = realise(wanted, BETWEEN, k=2)
    proves(found, wanted, BETWEEN, competing=True)
    assert found.impossible.all() and "competition" in found.reason


def test_a_latent_that_wins_on_both_sides_wins_between():
    """Under Top-1 the difference of two rows is a row: who is ahead on f0 and f1 is ahead on f2."""
    wanted = np.array([[True, True, False], [False, False, True]])
    proves(realise(wanted, BETWEEN, k=1), wanted, BETWEEN, competing=True)


@pytest.mark.parametrize("k", [1, 2])
def test_sets_of_a_top_k_encoder_are_realisable(k):
    features, W_enc = unit_rows(12, 5), unit_rows(7, 5, seed=2)
    wanted = fires(SparseDictionary(W_enc, W_enc.clone(), nonlinearity=TopKSelection(k)), features)
    found = realise(wanted, features, k=k)
    assert found.realisable
    np.testing.assert_array_equal(fires(found.dictionary(), features), wanted)
    biased = realise(wanted, features, k=k, bias=True)
    assert biased.realisable


def test_opposite_features_of_one_latent_are_refused_under_competition_too():
    wanted = np.array([[True, True, False, False], [False, False, True, True]])
    found = realise(wanted, CROSS, k=1)
    proves(found, wanted, CROSS, competing=True)


# the theorem on absorption -----------------------------------------------------------------------------------------------


def test_absorbed_pattern():
    before = [{0, 1, 2}, {3}]
    np.testing.assert_array_equal(absorbed(before, 0, 2), [[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
    with pytest.raises(ValueError, match="not in the set"):
        absorbed(before, 1, 2)


def test_a_constructed_absorption_runs_on_every_instance():
    worked = 0
    for seed in range(60):
        features = unit_rows(8, 12, seed).numpy().astype(np.float64)
        parents = np.random.default_rng(seed).permutation(8).reshape(2, 4)
        W_enc = np.stack([features[p].sum(axis=0) for p in parents])
        threshold = 0.9 * min(float((features[p] @ W_enc[i]).min()) for i, p in enumerate(parents))
        if threshold <= 0.05:
            continue
        sigma = JumpRectified(3)
        sigma.threshold.data.fill_(threshold)
        before = features @ W_enc.T > threshold
        rows, child = absorb_weakest(W_enc, features, 0, threshold)
        result = fires(SparseDictionary(torch.as_tensor(rows).float(), torch.as_tensor(rows).float(), nonlinearity=sigma), features)
        np.testing.assert_array_equal(result, absorbed(before.T, 0, child))
        assert realise(absorbed(before.T, 0, child), features, threshold=threshold).realisable
        worked += 1
    assert worked > 20


def test_a_plain_relu_cannot_rescale():
    with pytest.raises(ValueError, match="only above zero"):
        absorb_weakest(np.eye(2), np.eye(2), 0, 0.0)
    with pytest.raises(ValueError, match="has 1 features"):
        absorb_weakest(np.eye(2), np.eye(2), 0, 0.5)
    with pytest.raises(ValueError, match="cannot be told apart"):
        absorb_weakest(np.ones((1, 2)), np.eye(2), 0, 0.5)


# refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([{4}], torch.eye(3)), "feature 4 and there are 3"),
        ((np.ones((2, 4), dtype=bool), torch.eye(3)), "pattern is 2 x 4, and there are 3 features"),
        (([{0}], torch.zeros(3, 3)), "all zero"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        realise(*arguments)


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="k is 3"):
        realise([{0}], torch.eye(2), k=3)
    with pytest.raises(ValueError, match="Top-k has none"):
        realise([{0}], torch.eye(2), k=1, threshold=0.5)
