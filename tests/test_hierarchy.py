"""HierarchyBench: what implies what, and how often, against what was planted."""

import pytest
import torch

from sdl_explorer.data.hierarchy import HierarchyBench
from sdl_explorer.data.sources import stream


def rates(codes):
    return (codes > 0).float().mean(dim=0)


def test_names_and_parents_describe_the_tree():
    truth = HierarchyBench(parents=2, children=2, independent=1, d_in=7).batch(0, 1).truth
    assert truth.names == ("parent 0", "child 0.0", "child 0.1", "parent 1", "child 1.0", "child 1.1", "independent 0")
    assert truth.parents == (None, 0, 0, None, 3, 3, None)


def test_features_fire_at_their_rates():
    truth = HierarchyBench().sample(40_000, stream(0)).truth
    expected = [0.15 if name.startswith("parent") else 0.03 if name.startswith("child") else 0.05 for name in truth.names]
    torch.testing.assert_close(rates(truth.codes), torch.tensor(expected), atol=0.006, rtol=0)
    assert set(truth.codes.unique().tolist()) == {0.0, 1.0}


def test_a_child_fires_only_with_its_parent_and_alone():
    truth = HierarchyBench(child_probability=0.3).sample(5_000, stream(1)).truth
    active = truth.codes > 0
    for child, parent in enumerate(truth.parents):
        if parent is not None:
            assert not (active[:, child] & ~active[:, parent]).any()
    for parent in (0, 4, 8):
        assert active[:, parent + 1 : parent + 4].sum(dim=1).max() == 1


def test_children_overlap_where_they_are_not_exclusive():
    codes = HierarchyBench(exclusive=False, child_probability=0.5).sample(20_000, stream(1)).truth.codes > 0
    both = (codes[:, 1] & codes[:, 2]).float().mean().item() / codes[:, 0].float().mean().item()
    assert both == pytest.approx(0.25, abs=0.02)


def test_magnitudes_spread_around_one_and_stay_positive():
    codes = HierarchyBench(magnitude_std=0.2, independent_probability=0.9).sample(5_000, stream(0)).truth.codes[:, 12:]
    values = codes[codes > 0]
    assert values.mean().item() == pytest.approx(1.0, abs=0.01)
    assert values.std().item() == pytest.approx(0.2, abs=0.01)
    assert HierarchyBench(magnitude_std=5.0).sample(2_000, stream(0)).truth.codes.min() == 0


def test_directions_are_orthonormal_where_they_fit():
    data = HierarchyBench(d_in=25, seed=3).batch(0, 20)
    features = data.truth.input_features
    torch.testing.assert_close(features @ features.T, torch.eye(20), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.inputs, data.truth.codes @ features)
    assert data.targets is data.inputs


def test_more_features_than_dimensions_are_bounded():
    features = HierarchyBench(d_in=16).batch(0, 1).truth.input_features
    overlaps = (features @ features.T).fill_diagonal_(0)
    assert 0.05 < overlaps.max() <= 0.3


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"3 exclusive children with probability 0\.4"):
        HierarchyBench(child_probability=0.4)
    assert HierarchyBench(child_probability=0.4, exclusive=False).n_features == 20
    with pytest.raises(ValueError, match="no features"):
        HierarchyBench(parents=0, independent=0)


def test_a_flat_bench_has_no_parents():
    data = HierarchyBench(parents=0, independent=4, d_in=4).batch(0, 3)
    assert data.truth.parents == (None,) * 4
    assert HierarchyBench(children=0, independent=0, parents=2).batch(0, 3).truth.codes.shape == (3, 2)


def test_batches_are_functions_of_their_arguments():
    a, b = HierarchyBench(seed=1), HierarchyBench(seed=1)
    assert torch.equal(a.batch(2, 9).inputs, b.batch(2, 9).inputs)
    assert not torch.equal(a.batch(2, 9).inputs, HierarchyBench(seed=2).batch(2, 9).inputs)
    assert a.fingerprint() == b.fingerprint() != HierarchyBench(seed=2).fingerprint()
