"""LinearBench: rates, magnitudes, interference and the kinds of data, against what was planted."""

import pytest
import torch

from sdl_explorer.data.bench import LinearBench, bounded_directions, simplex_directions, sparse_product
from sdl_explorer.data.sources import PARTS, stream

SMALL = {"n_features": 30, "d_in": 24, "sparsity": 0.9}


def off_diagonal(rows):
    gram = rows @ rows.T
    return gram[~torch.eye(len(rows), dtype=torch.bool)]


def test_codes_have_the_planted_rate_and_magnitude():
    truth = LinearBench(**SMALL, minimum=0.5, scale=2.0).sample(20_000, stream(0)).truth
    active = truth.codes > 0
    assert active.float().mean().item() == pytest.approx(0.1, abs=0.002)
    values = truth.codes[active]
    assert values.mean().item() == pytest.approx(2.5, abs=0.03)
    assert values.std().item() == pytest.approx(2.0, abs=0.05)
    assert values.min().item() >= 0.5
    together = (active[:, 0] & active[:, 1]).float().mean().item()  # independent features
    assert together == pytest.approx(0.01, abs=0.003)


def test_features_fire_at_equal_rates():
    rates = (LinearBench(**SMALL).sample(20_000, stream(0)).truth.codes > 0).float().mean(dim=0)
    assert rates.min() > 0.085
    assert rates.max() < 0.115


@pytest.mark.parametrize("kind", ["sae", "transcoder", "crosscoder"])
def test_rows_are_codes_times_features(kind):
    bench = LinearBench(**SMALL, kind=kind, n_sources=3)
    data = bench.batch(0, 50)
    assert (bench.width_in, bench.width_out) == (data.inputs.shape[1], data.targets.shape[1])
    assert data.kind == kind
    torch.testing.assert_close(data.inputs, data.truth.codes @ data.truth.input_features)
    torch.testing.assert_close(data.targets, data.truth.codes @ data.truth.target_features)
    for side in (data.truth.input_features, data.truth.target_features):
        torch.testing.assert_close(side.norm(dim=1), torch.ones(30))


def test_a_transcoder_writes_other_directions_of_its_own_width():
    data = LinearBench(**SMALL, kind="transcoder", d_out=40).batch(0, 5)
    assert data.targets.shape == (5, 40)
    same_width = LinearBench(**SMALL, kind="transcoder").batch(0, 5).truth
    cosines = (same_width.input_features * same_width.target_features).sum(dim=1)
    assert cosines.abs().max() < 0.9


def test_a_crosscoder_stacks_scaled_sources():
    bench = LinearBench(**SMALL, kind="crosscoder", n_sources=3)
    features = bench.batch(0, 5).truth.input_features
    assert [b.name for b in bench.blocks] == ["source 0", "source 1", "source 2"]
    for block in bench.blocks:
        part = features[:, block.inputs]
        torch.testing.assert_close(part.norm(dim=1), torch.full((30,), 3**-0.5))
        assert off_diagonal(part * 3**0.5).max() <= 0.1 + 1e-6
    assert set(bench.reached) == {"source 0", "source 1", "source 2"}


@pytest.mark.parametrize(("n", "d", "bound"), [(100, 77, 0.1), (20, 16, 0.05), (24, 16, 0.2), (5, 8, 0.0)])
def test_bounded_directions_keep_their_bound(n, d, bound):
    bench = LinearBench(n_features=n, d_in=d, max_interference=bound)
    overlaps = off_diagonal(bench.batch(0, 1).truth.input_features)
    assert overlaps.max() <= bound + 1e-6
    assert bench.reached["input"].largest == pytest.approx(overlaps.max().item(), abs=1e-6)
    assert bench.reached["input"].smallest == pytest.approx(overlaps.min().item(), abs=1e-6)


def test_bound_beyond_reach_warns_and_says_what_was_reached():
    bench = LinearBench(n_features=8, d_in=3, max_interference=0.1)
    with pytest.warns(UserWarning, match=r"is 0\.\d+; 0\.1 was asked for .* 8 features in 3 dimensions"):
        bench.batch(0, 4)
    assert 0.1 < bench.reached["input"].largest < 0.5


@pytest.mark.parametrize(("n", "d"), [(30, 20), (100, 64), (20, 16)])
def test_negative_directions_come_close_to_no_positive_overlap(n, d):
    assert LinearBench(n_features=n, d_in=d, interference="negative").reached["input"].largest <= 0.01


def test_descent_stays_apart_where_long_steps_would_collapse_it():
    rows = bounded_directions(400, 300, 0.0, stream(0), tolerance=0.02)
    assert off_diagonal(rows).max() <= 0.02


@pytest.mark.parametrize(("n", "d"), [(4, 3), (20, 16), (30, 20), (32, 16), (2, 1)])
def test_simplices_have_no_positive_overlap(n, d):
    rows = simplex_directions(n, d, stream(1))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(n))
    assert off_diagonal(rows).max() < 1e-6
    smallest_block = d // (n - d)
    assert off_diagonal(rows).min().item() == pytest.approx(-1 / smallest_block, abs=1e-5)
    assert torch.linalg.matrix_rank(rows) == d


def test_four_features_in_space_are_a_tetrahedron():
    rows = LinearBench(n_features=4, d_in=3, interference="simplex").batch(0, 1).truth.input_features
    torch.testing.assert_close(off_diagonal(rows), torch.full((12,), -1 / 3))


@pytest.mark.parametrize(("n", "d"), [(16, 16), (33, 16), (3, 16)])
def test_simplex_outside_its_range_is_refused(n, d):
    with pytest.raises(ValueError, match=f"{n} features in {d} dimensions"):
        LinearBench(n_features=n, d_in=d, interference="simplex")


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="a sae writes what it reads"):
        LinearBench(d_in=20, d_out=30)
    with pytest.raises(ValueError, match="sparsity"):
        LinearBench(sparsity=1.5)
    with pytest.raises(TypeError, match="Constant"):
        LinearBench().seed = 3


def test_batches_are_functions_of_their_arguments():
    bench, fresh = LinearBench(**SMALL, seed=5), LinearBench(**SMALL, seed=5)
    for index in (3, 0, 3):
        assert torch.equal(bench.batch(index, 8, order=2).inputs, fresh.batch(index, 8, order=2).inputs)
    others = [bench.batch(4, 8, 2), bench.batch(3, 8, 1), LinearBench(**SMALL, seed=6).batch(3, 8, 2)]
    assert all(not torch.equal(bench.batch(3, 8, 2).truth.codes, o.truth.codes) for o in others)


def test_parts_are_different_streams():
    bench = LinearBench(**SMALL)
    codes = [bench.sample(20, stream(0), part).truth.codes for part in PARTS]
    assert not any(torch.equal(codes[i], codes[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(codes[0], bench.sample(20, stream(0), "train").truth.codes)


def test_fingerprint_tells_settings_apart():
    benches = [LinearBench(), LinearBench(seed=1), LinearBench(scale=2.0), LinearBench(kind="transcoder")]
    assert len({b.fingerprint() for b in benches}) == 4
    assert LinearBench().fingerprint() == LinearBench().fingerprint()


def test_sparse_product_is_the_product():
    codes = torch.rand(7, 9, generator=stream(0)) * (torch.rand(7, 9, generator=stream(1)) < 0.3)
    codes[2] = 0
    codes[6] = 0
    rows = torch.randn(9, 4, generator=stream(2))
    torch.testing.assert_close(sparse_product(codes, rows), codes @ rows)
    assert sparse_product(torch.zeros(3, 9), rows).abs().sum() == 0


def test_a_single_feature_and_no_activity():
    data = LinearBench(n_features=1, d_in=2, sparsity=1.0).batch(0, 4)
    assert data.inputs.abs().sum() == 0
    assert data.truth.name(0) == "feature 0"
