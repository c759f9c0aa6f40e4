"""find_twins on planted pairs: copies, splits, merges, additions, rotations, and what two unrelated dictionaries get."""

import numpy as np
import pytest
import torch
from torch import Generator
from torch.nn.functional import normalize

from sdl_explorer import HierarchyBench, Session, SparseDictionary, TopK, find_twins
from sdl_explorer.data.activations import Activations
from sdl_explorer.data.bench import random_rotation
from sdl_explorer.diagnosis import cosines, similarity
from sdl_explorer.diagnosis.observe import observe

N, D, M = 3_000, 16, 12
TURNED = random_rotation(D, Generator().manual_seed(1)).float()
FEATURES, SIDEWAYS = TURNED[:M], TURNED[M]
MODES = ["decoder", "activations"]


def drawn(n=N, seed=0) -> Activations:
    """Twelve features; the first one comes with a direction of its own, plus or minus: two kinds of it."""
    g = Generator().manual_seed(seed)
    codes = (torch.rand(n, M, generator=g) < 0.15) * (0.8 + 0.4 * torch.rand(n, M, generator=g))
    side = codes[:, :1] * torch.where(torch.rand(n, 1, generator=g) < 0.5, 1, -1)
    rows = codes @ FEATURES + side * SIDEWAYS
    return Activations(rows, rows)


ROWS = drawn()


def dictionary(directions, noise=0.0, seed=0) -> SparseDictionary:
    """Reads and writes these directions, from a fifth of their size on."""
    directions = directions + noise * torch.randn(directions.shape, generator=Generator().manual_seed(seed)) / directions.shape[1] ** 0.5
    return SparseDictionary(directions, directions.clone(), -0.2 * directions.norm(dim=1))


HALVES = torch.stack([FEATURES[0] + SIDEWAYS, FEATURES[0] - SIDEWAYS])
SPLIT = torch.cat([HALVES, FEATURES[1:]])


def shuffled(found, order):
    return dictionary_of(found, torch.as_tensor(order))


def dictionary_of(made, order):
    return SparseDictionary(made.W_enc[order], made.W_dec[order], made.b_enc[order])


@pytest.mark.parametrize("by", MODES)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_permuted_copy_shares_everything(by, noise):
    order = torch.randperm(M, generator=Generator().manual_seed(2))
    found = find_twins(dictionary(FEATURES), ROWS, shuffled(dictionary(FEATURES, noise), order), by=by)
    assert found.here.kinds == {"shared": M, "split": 0, "part": 0, "novel": 0, "silent": 0} == found.there.kinds
    assert (order.numpy()[found.here.partner] == np.arange(M)).all()
    assert [tuple(pair) for pair in found.pairs] == [(i, int((order == i).nonzero())) for i in range(M)]
    least = 0.999 if noise == 0 else 0.9
    assert found.here.similarity.min() > least and found.here.shared_fraction == 1
    assert found.by == by and found.n_samples == N


@pytest.mark.parametrize("by", MODES)
@pytest.mark.parametrize("tau", [0.65, 0.8])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_latent_split_in_two_is_split(by, tau, noise):
    order = torch.randperm(M + 1, generator=Generator().manual_seed(3))
    found = find_twins(dictionary(FEATURES), ROWS, shuffled(dictionary(SPLIT, noise), order), by=by, tau=tau)
    assert found.here.of("split").tolist() == [0] and found.here.kinds["shared"] == M - 1
    halves = sorted((order == i).nonzero().item() for i in (0, 1))
    assert found.there.of("part").tolist() == halves == found.parts(0).tolist() and found.there.kinds["novel"] == 0
    assert found.here.joint[0] > 0.9 and found.here.similarity[0] < 0.8
    assert found.here.partner[0] == -1 and (found.there.partner[halves] == -1).all()


@pytest.mark.parametrize("by", MODES)
def test_two_latents_merged_are_a_split_seen_from_the_other_side(by):
    merged = torch.cat([normalize(FEATURES[:1] + FEATURES[1:2], dim=1), FEATURES[2:]])
    found = find_twins(dictionary(FEATURES), ROWS, dictionary(merged), by=by, tau=0.8)
    assert found.there.of("split").tolist() == [0] and found.here.of("part").tolist() == [0, 1]
    assert found.here.whole[:2].tolist() == [0, 0] and found.here.kinds["shared"] == M - 2


@pytest.mark.parametrize("by", MODES)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_added_latents_are_novel(by, noise):
    here, extra = dictionary(FEATURES[:9]), torch.cat([FEATURES[:9], FEATURES[9:]])
    order = torch.randperm(M, generator=Generator().manual_seed(4))
    found = find_twins(here, ROWS, shuffled(dictionary(extra, noise), order), by=by)
    assert found.here.kinds["shared"] == 9 and found.there.kinds["shared"] == 9
    assert set(order[found.there.of("novel")].tolist()) == {9, 10, 11}


@pytest.mark.parametrize("by", MODES)
def test_an_exact_duplicate_is_a_split(by):
    found = find_twins(dictionary(FEATURES), ROWS, dictionary(torch.cat([FEATURES, FEATURES[3:4]])), by=by)
    assert found.here.of("split").tolist() == [3] and found.parts(3).tolist() == [3, M]


def test_a_weaker_copy_is_a_part_of_what_is_shared():
    near = normalize(FEATURES[3] + 0.9 * SIDEWAYS, dim=0)[None]
    found = find_twins(dictionary(FEATURES), ROWS, dictionary(torch.cat([FEATURES, near])), by="decoder")
    assert found.here.kinds["shared"] == M and found.there.kind[M] == "part" and found.there.whole[M] == 3


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_correlation_sees_through_a_rotation_and_another_width(noise):
    rotation = random_rotation(D, Generator().manual_seed(9)).float()
    wider = torch.linalg.qr(torch.randn(30, D, generator=Generator().manual_seed(8)))[0].T
    for turn in (rotation, wider):
        rows = Activations(ROWS.inputs @ turn, ROWS.inputs @ turn)
        order = torch.randperm(M, generator=Generator().manual_seed(5))
        other = shuffled(dictionary(FEATURES @ turn, noise), order)
        found = find_twins(dictionary(FEATURES), ROWS, other, rows)
        assert found.by == "activations" and found.here.kinds["shared"] == M
        assert (order.numpy()[found.here.partner] == np.arange(M)).all()
    by_rows = find_twins(
        dictionary(FEATURES),
        ROWS,
        dictionary(FEATURES @ rotation),
        Activations(ROWS.inputs @ rotation, ROWS.inputs @ rotation),
        by="decoder",
    )
    assert by_rows.here.kinds["shared"] < M  # directions mean nothing in a turned space


def test_unrelated_dictionaries_share_as_much_as_chance():
    wide = torch.randn(3_000, 64, generator=Generator().manual_seed(0))
    one, two = (dictionary(normalize(torch.randn(80, 64, generator=Generator().manual_seed(s)), dim=1)) for s in (1, 2))
    for by in MODES:
        found = find_twins(one, Activations(wide, wide), two, by=by)
        assert found.here.kinds["shared"] == found.there.kinds["shared"] == 0
        assert found.here.kinds["novel"] > 75
    by_cosine = find_twins(one, Activations(wide, wide), two)
    assert by_cosine.here.similarity.mean() == pytest.approx(by_cosine.chance, abs=0.03)


def test_chance_of_correlations_is_that_of_other_rows():
    copy = find_twins(dictionary(FEATURES), ROWS, dictionary(FEATURES), by="activations")
    assert copy.here.similarity.mean() > 0.99 and 0 < copy.chance < 0.1


def test_silent_latents_are_neither_shared_nor_nan():
    mute = dictionary(FEATURES)
    with torch.no_grad():
        mute.b_enc[2] = -100
        mute.W_dec[5] = 0
    for by in MODES:
        found = find_twins(mute, ROWS, mute, by=by)
        assert found.here.kind[2] == found.there.kind[2] == "silent" and found.here.partner[2] == -1
        assert found.here.shared_fraction == pytest.approx(1 if by == "activations" else 10 / 11)
        for side in (found.here, found.there):
            assert all(np.isfinite(values).all() for values in (side.similarity, side.joint, side.firing_rate))
    nothing = dictionary(FEATURES)
    with torch.no_grad():
        nothing.b_enc.fill_(-100)
    for by in MODES:
        found = find_twins(nothing, ROWS, nothing, by=by)
        assert found.here.kinds["silent"] == M and found.here.shared_fraction is None and np.isfinite(found.chance)


@pytest.mark.parametrize("by", MODES)
def test_both_sides_are_one_answer(by):
    here, there = dictionary(FEATURES, 0.3, 1), dictionary(SPLIT, 0.3, 2)
    one, two = find_twins(here, ROWS, there, by=by, tau=0.8), find_twins(there, ROWS, here, by=by, tau=0.8)
    for a, b in ((one.here, two.there), (one.there, two.here)):
        assert a.kind.tolist() == b.kind.tolist() and a.partner.tolist() == b.partner.tolist() and a.whole.tolist() == b.whole.tolist()
        np.testing.assert_allclose(a.joint, b.joint, atol=1e-5)


@pytest.mark.parametrize("by", MODES)
def test_blocks_scales_and_order_change_no_verdict(by, monkeypatch):
    here, there = dictionary(FEATURES, 0.2, 1), dictionary(SPLIT, 0.2, 2)
    settings = {"other": there, "by": by, "tau": 0.8}
    whole = find_twins(here, ROWS, **settings)
    scale = torch.linspace(0.2, 5, M)
    scaled = SparseDictionary(here.W_enc * scale[:, None], here.W_dec / scale[:, None], here.b_enc * scale)
    monkeypatch.setattr(cosines, "CELLS", 30)
    monkeypatch.setattr("sdl_explorer.diagnosis.similarity.CELLS", 30)
    for found in (observe(here, ROWS, [(find_twins, settings)], block=77)[0], find_twins(scaled, ROWS, **settings)):
        for a, b in ((found.here, whole.here), (found.there, whole.there)):
            assert a.kind.tolist() == b.kind.tolist() and a.best.tolist() == b.best.tolist()
            np.testing.assert_allclose(a.similarity, b.similarity, atol=1e-5)
    order = torch.randperm(M, generator=Generator().manual_seed(6))
    turned = find_twins(shuffled(here, order), ROWS, **settings)
    assert turned.here.kind.tolist() == whole.here.kind[order].tolist() and turned.there.kind.tolist() == whole.there.kind.tolist()


@pytest.mark.parametrize("dense", [0, np.inf])
@pytest.mark.parametrize("cells", [30, 2**22])
def test_correlation_is_numpy_s(monkeypatch, dense, cells):
    """Products of sparse codes, and of dense ones, in blocks."""
    monkeypatch.setattr(similarity, "DENSE", dense)
    monkeypatch.setattr(similarity, "CELLS", cells)
    here, there = dictionary(FEATURES, 0.5, 1), dictionary(SPLIT, 0.5, 2)
    found = find_twins(here, ROWS, there, by="activations")
    codes = [d.encode(ROWS.inputs).dense().detach().numpy() for d in (here, there)]
    correlation = np.corrcoef(codes[0].T, codes[1].T)[:M, M:]
    np.testing.assert_allclose(found.here.similarity, correlation.max(axis=1), atol=1e-5)
    assert found.here.best.tolist() == correlation.argmax(axis=1).tolist()
    np.testing.assert_allclose(found.there.similarity, correlation.max(axis=0), atol=1e-5)
    elsewhere = np.corrcoef(codes[0].T, np.roll(codes[1], -N // 2, axis=0).T)[:M, M:]
    assert found.chance == pytest.approx(elsewhere.max(axis=1).mean(), abs=1e-5)


def test_rows_beyond_the_codes_that_are_kept_are_not_read(monkeypatch):
    here, there = dictionary(FEATURES), dictionary(SPLIT)
    monkeypatch.setattr(similarity, "MOST_ENTRIES", 400)
    for block in (None, 50):
        found = observe(here, ROWS, [(find_twins, {"other": there, "by": "activations"})], block=block)[0]
        n = found.n_samples
        fired = [(d.encode(ROWS.inputs).dense() > 0).sum(dim=1).cumsum(0) for d in (here, there)]
        assert n == min(int((side <= 400).sum()) for side in fired) < N
        assert f"correlated on the first {n} of 3,000 rows" in found.note
        whole = find_twins(here, ROWS.take(slice(n)), there, by="activations")
        assert whole.note == ""
        for some, all_of_it in ((found.here, whole.here), (found.there, whole.there)):
            assert some.kind.tolist() == all_of_it.kind.tolist()
            np.testing.assert_allclose(some.similarity, all_of_it.similarity, atol=1e-5)
            np.testing.assert_array_equal(some.firing_rate, all_of_it.firing_rate)


def test_errors_say_what_is_wrong():
    here, narrow = dictionary(FEATURES), dictionary(torch.eye(4))
    small = Activations(ROWS.inputs[:, :4], ROWS.inputs[:, :4])
    with pytest.raises(ValueError, match=r"reads 4 and writes 4 columns, and its rows have 16 and 16. Pass other_activations="):
        find_twins(here, ROWS, narrow)
    with pytest.raises(ValueError, match=r"3000 rows here and 10 in other_activations"):
        find_twins(here, ROWS, narrow, small.take(slice(10)))
    with pytest.raises(ValueError, match=r"decoder rows of 16 and 4 columns have no cosine"):
        find_twins(here, ROWS, narrow, small, by="decoder")
    with pytest.raises(ValueError, match="by is 'encoder'"):
        find_twins(here, ROWS, here, by="encoder")
    with pytest.raises(ValueError, match="tau is 0"):
        find_twins(here, ROWS, here, tau=0.0)
    with pytest.raises(ValueError, match="kind is 'same'"):
        find_twins(here, ROWS, here).here.of("same")


def test_it_says_what_it_found():
    found = find_twins(dictionary(FEATURES), ROWS, dictionary(SPLIT), by="decoder", tau=0.8)
    assert repr(found).startswith("Twins(by decoder at 0.8 on 3,000 rows, chance 0.")
    assert repr(found).endswith("here 12 latents: 11 shared, 1 split; there 13 latents: 11 shared, 2 part)")


def test_two_seeds_of_a_session_in_one_line():
    here, there = (Session(HierarchyBench(), TopK(k=2), n_latents=24, seed=seed) for seed in (0, 1))
    found = here.find(find_twins, n=500, other=there.dictionary)
    assert len(found.here.kind) == len(found.there.kind) == 24 and found.n_samples == 500
    itself = here.find(find_twins, n=500, other=here.dictionary)
    assert itself.here.shared_fraction == 1
