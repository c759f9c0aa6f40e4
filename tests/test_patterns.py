"""Patterns against planted answers: the sets, their dependence on magnitude, the competition in a row, and the theory's counts."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations, Block, Truth
from sdl_explorer.data.bench import LinearBench, simplex_directions
from sdl_explorer.data.sources import stream
from sdl_explorer.diagnosis.alone import respond_alone
from sdl_explorer.diagnosis.causes import trace_causes
from sdl_explorer.diagnosis.observe import observe
from sdl_explorer.diagnosis.patterns import capacities, trace_patterns
from sdl_explorer.diagnosis.sparse import overlaps
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.methods.topk import TopKSelection


def rows_of(codes, features, offset=None, noise=0.0):
    codes, features = torch.as_tensor(codes, dtype=torch.float32), torch.as_tensor(features, dtype=torch.float32)
    x = codes @ features
    x = x if offset is None else x + offset
    x = x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    return Activations(x, x, Truth(codes, features, features))


def sparse_codes(n, n_features, rate=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, n_features, generator=g) * 2 * (torch.rand(n, n_features, generator=g) < rate)


def jumping(W_enc, threshold, W_dec=None):
    sigma = JumpRectified(len(W_enc))
    sigma.threshold.data = torch.as_tensor(threshold, dtype=torch.float32).expand(len(W_enc)).clone()
    W_enc = torch.as_tensor(W_enc, dtype=torch.float32)
    return SparseDictionary(W_enc, W_enc.clone() if W_dec is None else W_dec, nonlinearity=sigma).eval()


def sets(patterns, share=0.0):
    return [set(patterns.features_of(i, share).tolist()) for i in range(patterns.n_latents)]


# planted ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_the_trap_of_two_neurons(noise):
    """Example 3.5: one neuron fires for both features alike, the other for none."""
    W_enc, W_dec = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.5, 0.5], [0.0, 0.0]])
    dictionary = SparseDictionary(W_enc, W_dec, nonlinearity=TopKSelection(1))
    found = trace_patterns(dictionary, rows_of([[1, 0], [0, 1], [1, 0], [0, 1], [0, 0]], torch.eye(2), noise=noise))
    assert sets(found) == [{0, 1}, set()]
    assert found.status.tolist() == ["poly", "dead"]
    np.testing.assert_allclose(found.effective_features, [2, 0], atol=0.05 if noise else 1e-6)
    np.testing.assert_allclose(found.participation, [2, 0], rtol=1e-3)
    np.testing.assert_allclose(found.selectivity, [0, 0], atol=1e-6)
    np.testing.assert_allclose(found.feature_rate, [0.4, 0.4])


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_mono_poly_dead_and_unseen_in_any_order(order):
    rows = torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0], [-1, -1, -1, -1], [0, 0, 0, 1]])[order]
    codes = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0]]  # feature 3 never occurs
    settings = {"samples_since_fired": torch.tensor([4, 4, 9_000, 4])[order], "dead_after": 5_000}
    found = trace_patterns(SparseDictionary(rows, rows.clone()), rows_of(codes, torch.eye(4)), **settings)
    expected = [{0}, {1, 2}, set(), {3}]
    assert sets(found) == [expected[i] for i in order]
    assert found.status.tolist() == [["mono", "poly", "dead", "unseen"][i] for i in order]
    np.testing.assert_allclose(found.effective_features, np.array([1, 1.8, 0, 0])[order])  # p = (2/3, 1/3)
    np.testing.assert_allclose(found.firing_rate, np.array([0.5, 0.75, 0, 0])[order])
    assert not np.isnan(found.share.data).any() and not np.isnan(found.context.data).any()


def test_a_latent_of_two_features_at_different_magnitudes_is_told():
    """It fires for feature 0 at every activation, and for feature 1 only at its large ones; at unit strength for feature 0 alone."""
    codes = np.zeros((30, 2))
    codes[:10, 0], codes[10:, 1] = np.linspace(1.1, 2, 10), np.linspace(0.5, 4.5, 20)
    dictionary = jumping([[1.0, 0.3]], 0.9)
    found = trace_patterns(dictionary, rows_of(codes, np.eye(2)))
    assert sets(found) == [{0, 1}]
    np.testing.assert_allclose(found.fires.toarray(), [[1.0, 0.4]])  # 0.3 a > 0.9 at the two largest of five levels
    assert sets(found, share=0.5) == [{0}]
    assert found.depends_on_magnitude.tolist() == [True]
    assert found.set_sizes[:, 0].tolist() == [1, 1, 1, 2, 2]
    assert found.status.tolist() == ["poly"]
    assert (respond_alone(dictionary, torch.eye(2))[0].toarray() > 0).tolist() == [[True, False]]
    profile = found.profile(0)
    one = profile.features.tolist().index(1)
    assert profile.alone[one] == pytest.approx(0.4)
    assert (np.diff(profile.magnitudes[:, one]) > 0).all()
    expected = np.where(0.3 * profile.magnitudes[:, one] > 0.9, 0.3 * profile.magnitudes[:, one], 0)
    np.testing.assert_allclose(profile.responses[:, one], expected, rtol=1e-6)
    assert profile.context[one] == pytest.approx(np.mean(0.3 * codes[10:, 1] > 0.9))


def test_a_homogeneous_dictionary_has_one_level():
    codes = sparse_codes(50, 3)
    found = trace_patterns(SparseDictionary(torch.eye(3), torch.eye(3)), rows_of(codes, np.eye(3)))
    assert found.responses.shape[0] == 1 and not found.depends_on_magnitude.any()
    np.testing.assert_allclose(found.responses[0], found.magnitudes[0][found.fires.indices])
    with_bias = trace_patterns(SparseDictionary(torch.eye(3), torch.eye(3), -0.1 * torch.ones(3)), rows_of(codes, np.eye(3)))
    assert with_bias.responses.shape[0] == 5


def test_the_winner_alone_loses_in_a_row():
    """Top-1: each feature alone fires its latent; beside feature 0, which is always larger, feature 1 never does."""
    dictionary = SparseDictionary(torch.eye(2), torch.eye(2), nonlinearity=TopKSelection(1))
    found = trace_patterns(dictionary, rows_of([[2, 1], [2, 1], [3, 1], [2, 0]], np.eye(2)))
    assert sets(found) == [{0}, {1}]
    assert found.status.tolist() == ["mono", "dead"]
    profile = found.profile(1)
    assert profile.features.tolist() == [1] and profile.alone[0] == 1 and profile.context[0] == 0
    assert found.context.toarray()[0, 0] == 1


def test_in_context_without_alone():
    """Two features together pass a threshold that neither passes alone."""
    found = trace_patterns(jumping([[1.0, 1.0]], 1.5), rows_of([[1, 1], [1, 1], [1, 0], [0, 1]], np.eye(2)))
    assert sets(found) == [set()]
    assert found.participation[0] == found.selectivity[0] == 0
    assert found.effective_features[0] == pytest.approx(2)
    profile = found.profile(0)
    np.testing.assert_allclose(profile.context, [2 / 3, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(profile.without, [0, 0], atol=1e-7)
    np.testing.assert_allclose(profile.share, [0.5, 0.5])
    assert profile.alone.tolist() == [0, 0]


def test_a_constant_in_the_rows_is_shown_with_every_feature():
    offset = torch.tensor([0.0, 0.0, 1.0])
    codes = sparse_codes(200, 2)
    features = torch.eye(3)[:2]
    dictionary = SparseDictionary(torch.tensor([[1.0, 0, -1.0], [0, 1.0, 1.0]]), torch.eye(3)[:2])
    found = trace_patterns(dictionary, rows_of(codes, features, offset))
    assert found.offset == pytest.approx(1, abs=1e-4)
    assert sets(found)[1] == {0, 1}  # the constant alone fires it
    assert 0 < found.fires.toarray()[0, 0] < 1  # activations above 1 get past the constant
    assert trace_patterns(dictionary, rows_of(codes, features)).offset == 0


def test_a_latent_that_nothing_drives_is_not_mono():
    dictionary = SparseDictionary(-torch.eye(2)[:1], torch.ones(1, 2), torch.tensor([10.0]))
    found = trace_patterns(dictionary, rows_of([[1, 0], [0, 1]], np.eye(2)))
    assert found.effective_features[0] == 0 and found.status.tolist() == ["poly"]
    assert found.share.nnz == 0


def test_causes_have_two_humps():
    """The planted latent again: codes 1 for feature 0 and 3 for feature 1, and a row of a bias alone."""
    codes = torch.tensor([[1.0, 0], [0, 3], [1, 0], [0, 3], [0, 0], [1, 3]])
    dictionary = SparseDictionary(torch.eye(2)[[0, 0]] + torch.eye(2)[[1, 1]], torch.ones(2, 2), torch.tensor([-9.0, 0.5]))
    found = trace_causes(dictionary, rows_of(codes, np.eye(2)), latent=1)
    assert found.row.tolist() == [0, 1, 2, 3, 4, 5] and found.feature.tolist() == [0, 1, 0, 1, -1, 1]
    assert found.values_of(0).tolist() == [1.5, 1.5] and found.values_of(1).tolist() == [3.5, 3.5, 4.5]
    np.testing.assert_allclose(found.share, [1, 1, 1, 1, 0, 0.75])
    in_blocks = observe(dictionary, rows_of(codes, np.eye(2)), [(trace_causes, {"latent": 1})], block=2)[0]
    np.testing.assert_array_equal(in_blocks.row, found.row)
    assert len(trace_causes(dictionary, rows_of(codes, np.eye(2)), latent=0).row) == 0
    with pytest.raises(ValueError, match="latent 2 does not exist"):
        trace_causes(dictionary, rows_of(codes, np.eye(2)), latent=2)


# the definition, slowly --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sae", "transcoder", "crosscoder"])
def test_against_the_formulas_written_out(kind):
    bench = LinearBench(n_features=9, d_in=6, sparsity=0.7, max_interference=0.5, kind=kind)
    rows = bench.sample(300, stream(0, "rows"))
    g = torch.Generator().manual_seed(1)
    W_enc = torch.randn(12, bench.width_in, generator=g)
    dictionary = SparseDictionary(W_enc, torch.randn(12, bench.width_out, generator=g), nonlinearity=TopKSelection(3))
    found = trace_patterns(dictionary, rows)
    codes, directions = rows.truth.codes.double(), rows.truth.input_features.double()
    z = dictionary.encode(rows.inputs).dense().detach().double()
    fires = z > 1e-6 * W_enc.norm(dim=1) * rows.inputs.norm(dim=1)[:, None]
    for i in range(12):
        drive = (codes[fires[:, i]] * (directions @ W_enc[i].double())).relu().sum(dim=0)
        share = drive / drive.sum().clamp_min(1e-30)
        np.testing.assert_allclose(found.share.toarray()[i], share, atol=1e-6)
        assert found.effective_features[i] == pytest.approx(1 / float((share**2).sum()) if fires[:, i].any() else 0, rel=1e-5)
        for k in range(9):
            driven = share[k] > 0
            rate = float((fires[:, i] & (codes[:, k] > 0)).sum() / (codes[:, k] > 0).sum()) if driven else 0
            assert found.context.toarray()[i, k] == pytest.approx(rate, abs=1e-6)
    alone = dictionary.encode(rows.truth.input_features).dense().detach()
    np.testing.assert_array_equal(found.fires.toarray() > 0, (alone.T > 1e-6).numpy())
    r = alone.T.double().numpy() * found.magnitudes
    np.testing.assert_allclose(found.participation, r.sum(1) ** 2 / np.maximum((r**2).sum(1), 1e-30), rtol=1e-5)
    top = np.sort(r, axis=1)[:, ::-1]
    expected = np.divide(top[:, 0] - top[:, 1], top[:, 0], out=np.zeros(12), where=top[:, 0] > 0)
    np.testing.assert_allclose(found.selectivity, expected, atol=1e-6)


def test_levels_are_quantiles_of_each_feature():
    codes = np.zeros((100, 3))
    codes[:, 0] = np.arange(1, 101)
    codes[::2, 1] = 5
    found = trace_patterns(jumping([[1.0, 1, 1]], 0.5), rows_of(codes, np.eye(3)), n_magnitudes=4)
    np.testing.assert_allclose(found.magnitudes, np.array([[13, 38, 63, 88], [5, 5, 5, 5], [1, 1, 1, 1]]).T)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (torch.eye(3), 1),
        (torch.tensor([[1.0, 0], [-1, 0]]), 1 / 2),
        (simplex_directions(3, 2, torch.Generator().manual_seed(0)), 2 / 3),
        (torch.tensor([[np.cos(2 * np.pi * i / 5), np.sin(2 * np.pi * i / 5)] for i in range(5)]), 2 / 5),
        (simplex_directions(4, 3, torch.Generator().manual_seed(0)), 3 / 4),
    ],
)
def test_capacities_of_known_figures(rows, expected):
    np.testing.assert_allclose(capacities(rows), expected, rtol=1e-5)
    assert capacities(torch.cat([rows, torch.zeros(1, rows.shape[1])]))[-1] == 0


def test_capacities_sum_to_at_most_d():
    assert capacities(normalize(torch.randn(40, 7), dim=1)).sum() <= 7 + 1e-9


# invariants --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_looking():
    """Noisy copies of features, with thresholds: sets that overlap and depend on the magnitude."""
    bench = LinearBench(n_features=20, d_in=12, sparsity=0.8, max_interference=0.4)
    rows = bench.sample(500, stream(0, "rows"))
    g = torch.Generator().manual_seed(3)
    W_enc = rows.truth.input_features[torch.arange(30) % 20] + 0.3 * torch.randn(30, 12, generator=g)
    W_enc[7] = 0
    return W_enc, torch.rand(30, generator=g), rows


def same(a, b, order=None):
    order = np.arange(a.n_latents) if order is None else order
    for name in ("effective_features", "selectivity", "participation", "status", "firing_rate", "depends_on_magnitude"):
        left, right = getattr(a, name)[order], getattr(b, name)
        np.testing.assert_array_equal(left, right) if left.dtype.kind in "Ub" else np.testing.assert_allclose(left, right, rtol=1e-4)
    for name in ("fires", "context", "share"):
        np.testing.assert_allclose(getattr(a, name).toarray()[order], getattr(b, name).toarray(), rtol=1e-4, atol=1e-6)


def test_permuting_latents_permutes_the_patterns(trained_looking):
    W_enc, threshold, rows = trained_looking
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5))
    same(trace_patterns(jumping(W_enc, threshold), rows), trace_patterns(jumping(W_enc[order], threshold[order]), rows), order.numpy())


def test_scaling_a_row_changes_no_verdict(trained_looking):
    W_enc, threshold, rows = trained_looking
    scale = torch.logspace(-2, 2, 30)
    same(trace_patterns(jumping(W_enc, threshold), rows), trace_patterns(jumping(W_enc * scale[:, None], threshold * scale), rows))


@pytest.mark.parametrize("block", [1, 7, 500])
def test_blocks_of_any_size_give_the_same(trained_looking, block, monkeypatch):
    W_enc, threshold, rows = trained_looking
    whole = trace_patterns(jumping(W_enc, threshold), rows)
    monkeypatch.setattr("sdl_explorer.diagnosis.cofiring.PAIRS", 50)
    monkeypatch.setattr("sdl_explorer.diagnosis.sparse.CELLS", 50)
    monkeypatch.setattr("sdl_explorer.diagnosis.alone.block_rows", lambda widest: 11)
    same(whole, observe(jumping(W_enc, threshold), rows, [trace_patterns], block=block)[0])


def test_stored_scales_change_nothing(trained_looking):
    W_enc, threshold, rows = trained_looking
    dictionary = jumping(W_enc / 4, threshold)
    scaled = SparseDictionary(
        dictionary.W_enc, dictionary.W_dec, nonlinearity=dictionary.nonlinearity, input_scale=4.0, target_scale=4.0
    ).eval()
    same(trace_patterns(jumping(W_enc, threshold), rows), trace_patterns(scaled, rows))


def test_many_features_stay_sparse():
    """20,000 features: no matrix of all pairs, and the entries are those of the pairs."""
    n, d = 20_000, 8
    g = torch.Generator().manual_seed(0)
    features = normalize(torch.randn(n, d, generator=g), dim=1)
    codes = torch.zeros(3, n)
    codes[torch.arange(3), torch.tensor([5, 19_999, 5])] = 1
    dictionary = SparseDictionary(features[:50].clone(), features[:50].clone(), nonlinearity=TopKSelection(2))
    found = trace_patterns(dictionary, rows_of(codes, features))
    assert found.fires.nnz <= 2 * n and found.share.nnz <= 6
    assert found.fires.toarray()[5, 5] == 1 and found.feature_rate[5] == pytest.approx(2 / 3)


def test_overlaps_by_blocks(monkeypatch):
    rows, directions = torch.randn(13, 5), torch.randn(9, 5)
    where = csr_array((torch.rand(13, 9) < 0.3).numpy())
    monkeypatch.setattr("sdl_explorer.diagnosis.sparse.CELLS", 20)
    expected = (rows @ directions.T).numpy()[where.toarray() != 0]
    np.testing.assert_allclose(overlaps(rows, directions, where), expected, rtol=1e-5)


# refusals ----------------------------------------------------------------------------------------------------------------


def test_refusals(trained_looking):
    W_enc, threshold, rows = trained_looking
    dictionary = jumping(W_enc, threshold)
    with pytest.raises(ValueError, match="trace_patterns compares with true features"):
        trace_patterns(dictionary, Activations(rows.inputs, rows.inputs))
    with pytest.raises(ValueError, match="n_magnitudes is 0"):
        trace_patterns(dictionary, rows, n_magnitudes=0)
    with pytest.raises(ValueError, match="dead_after is 0"):
        trace_patterns(dictionary, rows, dead_after=0)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        trace_patterns(dictionary, rows, samples_since_fired=torch.zeros(3), dead_after=5)
    with pytest.raises(ValueError, match="latent 30 does not exist"):
        trace_patterns(dictionary, rows).profile(30)


def test_too_many_pairs_are_refused(monkeypatch):
    monkeypatch.setattr("sdl_explorer.diagnosis.alone.MOST_ENTRIES", 10)
    with pytest.raises(ValueError, match="10 are kept"):
        respond_alone(SparseDictionary(torch.ones(5, 2), torch.ones(5, 2)), torch.ones(4, 2))


def test_sources_of_a_crosscoder_are_one_input():
    x = torch.eye(4)
    blocks = (Block("a", slice(0, 2), slice(0, 2)), Block("b", slice(2, 4), slice(2, 4)))
    activations = Activations(x, x, Truth(torch.eye(4), x, x), blocks=blocks)
    assert sets(trace_patterns(SparseDictionary(x, x), activations)) == [{0}, {1}, {2}, {3}]
