"""Spare latents against planted answers: exact duplicates, dead and nearly dead, dense and weak, and losses by removal."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.bench import random_rotation
from sdl_explorer.diagnosis import copies
from sdl_explorer.diagnosis.copies import nearest_others
from sdl_explorer.diagnosis.observe import observe
from sdl_explorer.diagnosis.redundancy import find_redundant
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods.topk import TopKSelection

N, D = 2000, 16


def planted(noise=0.0, order=None, scale=None, **settings):
    """Latents 0 and 1 share feature 0, 2 and 3 take turns at feature 1 (small and large activations), 4 has feature 2, 5 is dead,
    6 fires on two rows, 7 on most, 8 hardly writes."""
    g = torch.Generator().manual_seed(0)
    features = random_rotation(D, g)[:7].float()
    codes = (torch.rand(N, 7, generator=g) < 0.06) * (0.5 + torch.rand(N, 7, generator=g))
    codes[:, 4], codes[:, 5] = 0, 1 + torch.rand(N, generator=g)
    codes[[100, 1700], 4] = 2
    x = codes @ features + noise * torch.randn(N, D, generator=g)
    W_enc = torch.stack([features[k] for k in (0, 0, 1, 1, 2, 3, 4, 5, 6)])
    W_dec = W_enc * torch.tensor([0.5, 0.5, 1, 1, 1, 1, 1, 1, 0.001])[:, None]
    bias = torch.tensor([-0.3, -0.3, -0.3, -1.0, -0.3, -9.0, -0.3, -0.3, -0.3])
    scale = torch.ones(9) if scale is None else scale
    order = torch.arange(9) if order is None else order
    dictionary = SparseDictionary((W_enc * scale[:, None])[order], (W_dec / scale[:, None])[order], (bias * scale)[order], **settings)
    return dictionary.eval(), Activations(x, x)


def by_removal(dictionary, activations) -> np.ndarray:
    """mean |e|^2 with each latent taken out in turn, less that with all."""
    with torch.no_grad():
        codes = dictionary.encode(activations.inputs).dense().double()
        errors = []
        for i in [None, *range(dictionary.n_latents)]:
            kept = codes.clone()
            if i is not None:
                kept[:, i] = 0
            recon = (kept @ dictionary.W_dec.double() + dictionary.b_dec.double()) / dictionary.target_scale
            errors.append((activations.targets.double() - recon).square().sum(dim=1).mean().item())
    return np.array(errors[1:]) - errors[0]


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("order", [None, [8, 3, 5, 1, 7, 0, 2, 6, 4]])
def test_planted_latents_are_told(noise, order):
    at = np.arange(9) if order is None else np.argsort(order)
    found = find_redundant(*planted(noise, None if order is None else torch.tensor(order)))
    assert np.flatnonzero(found.dead).tolist() == [at[5]] and not found.unseen.any()
    assert np.flatnonzero(found.dense).tolist() == [at[7]]
    assert at[8] in np.flatnonzero(found.weak) and not found.weak[at[[0, 1, 2, 4, 7]]].any()
    assert {frozenset(c.tolist()) for c in found.clusters} == {frozenset(at[[0, 1]]), frozenset(at[[2, 3]])}
    assert found.twin[at[0]] == at[1] and found.twin_cosine[at[0]] == pytest.approx(1, abs=1e-6)
    assert found.twin_encoder[at[0]] == pytest.approx(1, abs=1e-6)
    assert found.twin_overlap[at[0]] == 1 and 0.2 < found.twin_overlap[at[2]] < 0.8
    assert found.firing_rate[at[6]] == 2 / N and found.loss[at[6]] > 0
    assert found.duplicate.sum() == 4 and found.live.sum() == 8


def test_unseen_and_dead_follow_what_training_counted():
    dictionary, activations = planted()
    since = torch.tensor([0, 0, 0, 0, 0, 7_000, 0, 0, 0])
    early = find_redundant(dictionary, activations, samples_since_fired=since, dead_after=10_000)
    late = find_redundant(dictionary, activations, samples_since_fired=since, dead_after=5_000)
    assert np.flatnonzero(early.unseen).tolist() == [5] and not early.dead.any()
    assert np.flatnonzero(late.dead).tolist() == [5] and not late.unseen.any()
    assert late.samples_since_fired[5] == 7_000


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("target_scale", [1.0, 3.0])
def test_loss_is_that_of_removing_the_latent(sparse, target_scale):
    g = torch.Generator().manual_seed(1)
    W = normalize(torch.randn(40, D, generator=g), dim=1)
    sigma = TopKSelection(2) if sparse else None
    writes = W + 0.2 * torch.randn(40, D, generator=g)
    dictionary = SparseDictionary(W, writes, 0.1 * torch.randn(40, generator=g), 0.1 * torch.randn(D, generator=g), sigma)
    dictionary.target_scale = target_scale
    x = torch.randn(500, D, generator=g)
    activations = Activations(x, x @ torch.randn(D, D, generator=g))
    found, expected = find_redundant(dictionary.eval(), activations), by_removal(dictionary, activations)
    np.testing.assert_allclose(found.loss, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    t = (activations.targets - activations.targets.mean(dim=0)).double()
    np.testing.assert_allclose(found.explained, expected * 500 / t.square().sum().item(), rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        z = dictionary.encode(x).dense().double()
        z = z - z.mean(dim=0)
        left = [(t - z[:, [i]] * dictionary.W_dec[i].double() / target_scale).square().sum().item() for i in range(40)]
    np.testing.assert_allclose(found.alone, 1 - np.array(left) / t.square().sum().item(), rtol=1e-3, atol=1e-5)


def test_two_that_share_a_code_both_look_needed_and_one_alone_explains_its_feature():
    found = find_redundant(*planted())
    assert found.loss[0] == pytest.approx(found.loss[1]) and found.loss[0] > 0
    assert found.alone[4] > 0.9 * found.alone[0] > 0
    assert found.explained[7] > 1 > found.alone[7]  # the dense one carries the mean, which no variance counts


@pytest.mark.parametrize("block", [300, 41])
def test_blocks_of_any_size_and_inverse_scaling_give_the_same(block):
    dictionary, activations = planted(0.02)
    one = find_redundant(dictionary, activations)
    blocks = observe(dictionary, activations, [find_redundant], block=block)[0]
    scaled = find_redundant(*planted(0.02, scale=torch.tensor([0.1, 3, 0.5, 2, 1, 1, 1, 7, 1])))
    for other in (blocks, scaled):
        for name in ("dead", "dense", "weak", "cluster"):
            np.testing.assert_array_equal(getattr(other, name), getattr(one, name), err_msg=name)
        np.testing.assert_array_equal(other.twin[one.duplicate], one.twin[one.duplicate])
        for name in ("loss", "explained", "alone", "expected_rate", "twin_cosine", "twin_overlap", "twin_encoder"):
            some = one.duplicate if name.startswith("twin") else slice(None)
            np.testing.assert_allclose(getattr(other, name)[some], getattr(one, name)[some], rtol=1e-3, atol=1e-5, err_msg=name)


def test_nothing_is_nan_where_nothing_fires_or_varies():
    dictionary, activations = planted()
    silent = find_redundant(SparseDictionary(dictionary.W_enc, dictionary.W_dec, torch.full((9,), -99.0)), activations)
    still = find_redundant(dictionary, Activations(same := torch.ones(20, D), same))
    for found in (silent, still):
        for field in fields(found):
            value = getattr(found, field.name)
            if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                assert np.isfinite(value).all(), field.name
    assert silent.dead.all() and silent.clusters == () and silent.coherence == 0 and silent.chance_pairs == 0


def test_nearest_and_clusters_are_those_of_the_whole_matrix(monkeypatch):
    g = torch.Generator().manual_seed(4)
    rows = normalize(torch.randn(60, 4, generator=g), dim=1)
    rows[[7, 41]] = rows[[3, 3]]
    chosen = torch.tensor([i for i in range(60) if i % 5])
    cosines = (rows[chosen].double() @ rows[chosen].double().T).fill_diagonal_(-2).numpy()
    labels = np.arange(len(chosen))
    for _ in labels:  # the smallest label spreads along near pairs
        labels = np.array([min(labels[i], *labels[cosines[i] >= 0.9], len(labels)) for i in range(len(labels))])
    for cells in (2**22, 100):
        monkeypatch.setattr(copies, "CELLS", cells)
        found = nearest_others(rows, chosen, 0.9)
        np.testing.assert_allclose(found.cosine[chosen], cosines.max(axis=1), atol=1e-6)
        together = found.cluster[chosen][:, None] == found.cluster[chosen]
        several = np.bincount(labels)[labels] > 1
        np.testing.assert_array_equal(together & several[:, None] & several, (labels[:, None] == labels) & several[:, None])
        np.testing.assert_array_equal(found.cluster[chosen] >= 0, several)
        assert (found.twin[::5] == -1).all() and found.cluster[3] == found.cluster[7] >= 0
        off = np.abs(cosines[~np.eye(len(labels), dtype=bool)])
        assert found.coherence == pytest.approx(off.mean(), rel=1e-5)


def test_chance_pairs_and_errors():
    dictionary, activations = planted()
    found = find_redundant(dictionary, activations)
    assert 0 < found.chance_pairs < 1e-3  # 28 pairs in 16 dimensions
    assert "4 duplicate in 2 clusters" in repr(found)
    with pytest.raises(ValueError, match=r"cosine is 1\.5; it is above 0 and at most 1"):
        find_redundant(dictionary, activations, cosine=1.5)
    with pytest.raises(ValueError, match=r"weak_share is -1\.0; it is a share"):
        find_redundant(dictionary, activations, weak_share=-1.0)
