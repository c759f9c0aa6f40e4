"""Candidates for polysemanticity against planted latents: no truth is given, and the answer is known."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.bench import random_rotation
from sdl_explorer.diagnosis.meanings import suspect_polysemantic
from sdl_explorer.diagnosis.modes import cut_in_two, of_one_meaning, principal_places
from sdl_explorer.diagnosis.observe import observe
from sdl_explorer.models.dictionary import SparseDictionary

N_FEATURES, D = 16, 24
MEANS = [(0,), (1, 2), (3,), (5, 6), (7, 8, 9), (10,), (2,), (1,), (15,)]  # the features that latent i reads
POLY = {1, 3, 4}


def planted(noise=0.0, order=None, seed=0, scale=None):
    """Orthonormal features at a rate of 6 %; 4 fires only inside 3, on half of its rows; 6 is three times as large as 5; 15 never fires."""
    g = torch.Generator().manual_seed(seed)
    features = random_rotation(D, g)[:N_FEATURES].float()
    codes = (torch.rand(4000, N_FEATURES, generator=g) < 0.06) * (0.5 + torch.rand(4000, N_FEATURES, generator=g))
    codes[:, 4] = codes[:, 4].clamp_min(1) * (codes[:, 3] > 0) * (torch.rand(4000, generator=g) < 0.5)
    codes[:, 6] *= 3
    codes[:, 15] = 0
    x = codes @ features + noise * torch.randn(4000, D, generator=g)
    rows = torch.stack([features[list(m)].sum(dim=0) for m in MEANS])
    scale = torch.ones(len(MEANS)) if scale is None else scale
    W_enc, W_dec, bias = rows * scale[:, None], normalize(rows, dim=1) / scale[:, None], -0.2 * scale
    order = torch.arange(len(MEANS)) if order is None else order
    return SparseDictionary(W_enc[order], W_dec[order], bias[order]).eval(), Activations(x, x)


def candidates(found) -> set[int]:
    return set(np.flatnonzero(found.candidate).tolist())


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_planted_latents_of_two_meanings_are_named_and_no_others(noise):
    """A parent with and without its child has one meaning; two features at different magnitudes are two."""
    found = suspect_polysemantic(*planted(noise))
    assert candidates(found) == POLY
    assert found.score[[1, 3, 4]].min() > 0.4 and found.score[[0, 2, 5, 6, 7]].max() < 0.25
    assert (found.score >= 0).all() and (found.score <= 1).all()
    assert found.judged.tolist() == [True] * 8 + [bool(noise) and found.n_fires[8] >= 10]


def test_both_kinds_are_the_rows_of_one_feature_each():
    dictionary, activations = planted()
    found = suspect_polysemantic(dictionary, activations)
    features = dictionary.W_enc.detach()[[7, 6]]  # features 1 and 2
    kinds = [activations.inputs[found.rows_of(1, kind)] @ features.T for kind in (0, 1)]
    strongest = [rows.argmax(dim=1).float().mean().item() for rows in kinds]
    assert sorted(round(s) for s in strongest) == [0, 1] and abs(strongest[0] - strongest[1]) > 0.8
    assert len(found.rows_of(1, 0)) >= len(found.rows_of(1, 1)) > 0
    assert found.smaller[1] == pytest.approx(len(found.rows_of(1, 1)) / 32)
    assert set(found.partners[1].tolist()) == {6, 7} and found.partner_cosine[1].min() > 0.8
    assert found.mode_cosine[1] < 0.3
    with pytest.raises(ValueError, match="latent 9 does not exist; there are 9"):
        found.rows_of(9, 0)


def test_permuting_latents_permutes_the_finding():
    order = torch.randperm(len(MEANS), generator=torch.Generator().manual_seed(3))
    one, other = suspect_polysemantic(*planted(0.05)), suspect_polysemantic(*planted(0.05, order))
    for name in ("score", "null", "smaller", "mode_cosine", "partner_cosine", "encoder_response"):
        np.testing.assert_allclose(getattr(other, name), getattr(one, name)[order], atol=1e-5, err_msg=name)
    place = order.argsort().numpy()
    np.testing.assert_array_equal(other.partners, np.where(one.partners >= 0, place[one.partners], -1)[order])
    np.testing.assert_array_equal(other.rows, one.rows[order])
    assert other.coherence == pytest.approx(one.coherence, abs=1e-6)


@pytest.mark.parametrize("block", [1000, 37])
def test_blocks_of_any_size_give_the_same(block):
    dictionary, activations = planted(0.05)
    one, other = suspect_polysemantic(dictionary, activations), observe(dictionary, activations, [suspect_polysemantic], block=block)[0]
    np.testing.assert_array_equal(other.rows, one.rows)
    np.testing.assert_allclose(other.score, one.score, atol=1e-5)


def test_scaling_both_rows_inversely_changes_nothing():
    scale = torch.tensor([0.1, 0.3, 1.0, 3.0, 10.0, 1.0, 2.0, 0.5, 1.0])
    one, other = suspect_polysemantic(*planted(0.05)), suspect_polysemantic(*planted(0.05, scale=scale))
    assert candidates(one) == candidates(other)
    np.testing.assert_allclose(other.score, one.score, atol=1e-4)
    assert other.coherence == pytest.approx(one.coherence, abs=1e-6)


def test_silent_and_rare_latents_are_not_judged_and_nothing_is_nan():
    dictionary, activations = planted()
    found = suspect_polysemantic(dictionary, activations)
    assert not found.judged[8] and found.score[8] == 0 and (found.rows[8] == -1).all() and (found.kind[8] == -1).all()
    for field in fields(found):
        value = getattr(found, field.name)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            assert np.isfinite(value).all(), field.name
    few = suspect_polysemantic(dictionary, activations.take(slice(0, 5)))
    assert not few.judged.any() and not few.candidate.any() and (few.score == 0).all()
    alone = suspect_polysemantic(SparseDictionary(dictionary.W_enc[1:2], dictionary.W_dec[1:2], dictionary.b_enc[1:2]), activations)
    assert alone.candidate.all() and (alone.partners == -1).all() and (alone.partner_cosine == 0).all() and alone.coherence == 0


def test_a_transcoder_compares_partners_with_what_is_written():
    dictionary, activations = planted()
    turn = random_rotation(D, torch.Generator().manual_seed(9)).float()[:, :20]
    other = SparseDictionary(dictionary.W_enc, dictionary.W_dec.detach() @ turn, dictionary.b_enc)
    found = suspect_polysemantic(other, Activations(activations.inputs, activations.inputs @ turn))
    assert candidates(found) == POLY and set(found.partners[1].tolist()) == {6, 7}
    assert (found.encoder_decoder == 0).all()


def test_settings_out_of_range_are_refused():
    dictionary, activations = planted()
    with pytest.raises(ValueError, match=r"threshold is 0\.0; it is a score above 0"):
        suspect_polysemantic(dictionary, activations, threshold=0.0)
    with pytest.raises(ValueError, match="n_rows is 3; two kinds are not told apart on fewer than 10"):
        suspect_polysemantic(dictionary, activations, n_rows=3)


# the cut ---------------------------------------------------------------------------------------------------------------------


def products(rows):
    return rows @ rows.mT


def test_cut_of_two_equal_halves_and_of_a_parent_with_its_child():
    a, b = torch.eye(4)[0], torch.eye(4)[1]
    halves = torch.stack([a] * 6 + [b] * 6)
    family = torch.stack([a] * 6 + [a + b] * 6)
    uneven = torch.stack([a] * 9 + [b] * 3)
    found = cut_in_two(products(torch.stack([halves, family, uneven])), torch.ones(3, 12, dtype=torch.bool))
    expected = [2, 1 / (0.5 + 0.5 / 2**0.5), 1 / (0.75**2 + 0.25**2)]
    np.testing.assert_allclose(found.modes.numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(found.cosine.numpy(), [0, 2**-0.5, 0], atol=1e-6)
    np.testing.assert_allclose(found.smaller.numpy(), [0.5, 0.5, 0.25])
    assert found.kind[2].tolist() == [0] * 9 + [1] * 3


def test_rows_that_are_not_there_do_not_count():
    rows = torch.randn(1, 12, 5, generator=torch.Generator().manual_seed(0))
    there = torch.tensor([[True] * 9 + [False] * 3])
    one, other = cut_in_two(products(rows[:, :9]), there[:, :9]), cut_in_two(products(rows), there)
    assert other.modes.item() == pytest.approx(one.modes.item(), abs=1e-5) and other.kind[0, 9:].tolist() == [-1] * 3


def test_principal_places_are_those_of_a_singular_value_decomposition():
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 30, 8, generator=g) * torch.tensor([4.0, 2.5, 1.5, 0.3, 0.3, 0.3, 0.3, 0.3])
    ours = principal_places(products(rows), torch.ones(3, 30, dtype=torch.bool))
    for k, sample in enumerate(rows):
        left = torch.linalg.svd(sample - sample.mean(dim=0)).U
        for direction, places in enumerate(ours):
            assert abs(float(places[k] @ left[:, direction])) == pytest.approx(1, abs=1e-3)


def test_the_null_is_as_strong_as_the_codes_say_and_has_one_meaning():
    g = torch.Generator().manual_seed(2)
    codes = 1 + torch.rand(1, 32, generator=g)
    shifts = torch.cat([torch.eye(40)[:1].expand(16, 40), 3 * torch.eye(40)[1:2].expand(16, 40)])[None] * codes[..., None]
    there, random = torch.ones(1, 32, dtype=torch.bool), 0.02 * torch.randn(32, 40, generator=g)
    null = of_one_meaning(shifts, there, codes, random)
    mean = shifts.mean(dim=1)
    direction = normalize(mean, dim=1)
    expected = (codes[0] / codes.mean() * mean.norm())[:, None] * direction + random - random @ direction.T * direction
    np.testing.assert_allclose(null[0].numpy(), products(expected).numpy(), rtol=1e-4, atol=1e-5)
    assert cut_in_two(products(shifts), there).modes > 1.9 and cut_in_two(null, there).modes < 1.1
