"""SpikeIn: known directions in anybody's rows, and what findings make of a truth that is not the whole truth."""

import numpy as np
import pytest
import torch
from torch import Generator

from sdl_explorer import HierarchyBench, LinearBench, Session, SpikeIn, Stored, TopK
from sdl_explorer.data.sources import PARTS

ROWS = torch.randn(600, 12, generator=Generator().manual_seed(1)) @ torch.randn(12, 12, generator=Generator().manual_seed(2)) + 3
TREE = (None, 0, 0, None, 1)


def stored(**settings) -> Stored:
    return Stored(ROWS, **settings)


def sampled(source, n=480, seed=0, part="train"):
    return source.sample(n, Generator().manual_seed(seed), part)


def drawn(n=20_000, **settings):
    """Codes of many rows: from a bench, whose rows do not end."""
    source = SpikeIn(LinearBench(n_features=4, d_in=8, max_interference=1.0), **settings)
    return source, source.sample(n, Generator().manual_seed(0)).truth.codes


# rows ------------------------------------------------------------------------------------------------------------------


def test_rows_are_the_source_and_the_spikes_and_nothing_else():
    source = SpikeIn(stored(), n_features=5, rate=0.2)
    for got, own in ((source.batch(3, 40, 1), source.source.batch(3, 40, 1)), (sampled(source), sampled(source.source))):
        truth = got.truth
        torch.testing.assert_close(got.inputs - own.inputs, truth.codes @ truth.input_features, atol=1e-5, rtol=1e-5)
        assert got.targets is got.inputs and got.kind == "sae" and not truth.complete
        assert (truth.codes > 0).any() and (truth.codes == 0).any()
    torch.testing.assert_close(truth.input_features.norm(dim=1), torch.ones(5))


def test_batches_are_a_function_of_their_arguments():
    source, again = SpikeIn(stored(), 5, 0.2), SpikeIn(stored(), 5, 0.2)
    first = source.batch(3, 50)
    assert torch.equal(first.inputs, again.batch(3, 50).inputs)
    assert torch.equal(first.truth.codes, again.batch(3, 50).truth.codes)
    assert not torch.equal(first.truth.codes, source.batch(4, 50).truth.codes)
    assert not torch.equal(first.truth.codes, source.batch(3, 50, order=1).truth.codes)
    other = SpikeIn(stored(), 5, 0.2, seed=1)
    assert not torch.equal(first.truth.codes, other.batch(3, 50).truth.codes)
    assert not torch.equal(source.input_features, other.input_features)
    assert source.unit == other.unit  # what a magnitude of 1 is belongs to the rows


def test_samples_differ_by_part_and_come_again_with_the_generator():
    source = SpikeIn(stored(), 5, 0.2)
    codes = {part: sampled(source, 40, 0, part).truth.codes for part in PARTS}
    assert all(torch.equal(codes[part], sampled(source, 40, 0, part).truth.codes) for part in PARTS)
    assert not torch.equal(codes["choose"], codes["judge"])
    assert not torch.equal(codes["choose"], sampled(source, 40, 1, "choose").truth.codes)
    without = codes["choose"].sum(dim=1) == 0  # a row without a spike is the source's own row
    assert torch.equal(sampled(source, 40, 0, "choose").inputs[without], sampled(stored(), 40, 0, "choose").inputs[without])


def test_fingerprint_knows_the_rows_and_every_setting():
    source = SpikeIn(stored(), 5)
    assert source.fingerprint() == SpikeIn(stored(), 5).fingerprint()
    others = [SpikeIn(stored(), 6), SpikeIn(stored(), 5, rate=0.02), SpikeIn(stored(), 5, magnitude=1), SpikeIn(stored(), 5, spread=0)]
    others += [SpikeIn(stored(), 5, parents=TREE), SpikeIn(stored(), 5, seed=1), SpikeIn(Stored(ROWS + 1), 5)]
    assert len({source.fingerprint(), *(other.fingerprint() for other in others)}) == len(others) + 1


def test_labels_examples_and_facts_are_the_source_s():
    host = stored(labels=np.arange(600) % 3, label_names=("a", "b", "c"), hooks=("layer",))
    source = SpikeIn(host, 4)
    got = sampled(source, 60)
    assert torch.equal(got.labels, sampled(host, 60).labels) and got.label_names == ("a", "b", "c")
    assert (source.n, source.width_in, source.width_out, source.dead_after) == (600, 12, 12, host.dead_after)
    assert source.hooks == ("layer",) and source.removed == host.removed and source.blocks == ()


# codes -----------------------------------------------------------------------------------------------------------------


def test_rates_magnitudes_and_spread_are_what_was_asked_for():
    source, codes = drawn(n_features=3, rate=(0.05, 0.2, 0.5), magnitude=(1, 0.5, 2), spread=0.1)
    active = codes > 0
    torch.testing.assert_close(active.float().mean(dim=0), torch.tensor([0.05, 0.2, 0.5]), atol=0.012, rtol=0)
    sizes = torch.stack([codes[active[:, k], k].mean() for k in range(3)]) / source.unit
    torch.testing.assert_close(sizes, torch.tensor([1.0, 0.5, 2.0]), rtol=0.02, atol=0)
    assert float(codes[active[:, 2], 2].std() / (2 * source.unit)) == pytest.approx(0.1, rel=0.05)
    both = (active[:, 1] & active[:, 2]).float().mean()
    assert float(both) == pytest.approx(0.1, abs=0.01)  # independent


def test_spikes_do_not_depend_on_the_rows():
    source = SpikeIn(LinearBench(n_features=6, d_in=8, max_interference=1.0, sparsity=0.7), 2, 0.3)
    got, own = (s.sample(20_000, Generator().manual_seed(0)) for s in (source, source.source))
    active = (got.truth.codes > 0).float()
    again = (own.truth.codes > 0).float()
    assert torch.corrcoef(torch.cat([active, again], 1).T)[:2, 2:].abs().max() < 0.03
    assert got.truth.n_features == 2  # the source's own truth stays unknown


def test_children_fire_in_their_parents_rows_alone():
    source, codes = drawn(n_features=5, rate=0.2, parents=TREE, child_rate=0.4)
    active = codes > 0
    for child, parent in ((1, 0), (2, 0), (4, 1)):
        assert not (active[:, child] & ~active[:, parent]).any()
        assert float(active[active[:, parent], child].float().mean()) == pytest.approx(0.4, abs=0.04)
    torch.testing.assert_close(active.float().mean(dim=0), source.rates, atol=0.012, rtol=0)
    torch.testing.assert_close(source.rates, torch.tensor([0.2, 0.08, 0.08, 0.2, 0.032]))
    assert (active[:, 1] & active[:, 2]).any()
    exclusive = drawn(n_features=5, rate=0.2, parents=TREE, child_rate=0.4, exclusive=True)[1] > 0
    assert not (exclusive[:, 1] & exclusive[:, 2]).any()
    torch.testing.assert_close(exclusive.float().mean(dim=0), source.rates, atol=0.012, rtol=0)


def test_a_tree_in_any_order_is_the_same_tree():
    order = [4, 2, 0, 3, 1]  # new place -> old spike
    turned = tuple(None if TREE[k] is None else order.index(TREE[k]) for k in order)
    active = drawn(n_features=5, rate=0.2, parents=turned)[1] > 0
    for place, parent in enumerate(turned):
        assert parent is None or not (active[:, place] & ~active[:, parent]).any()
    assert active.any(dim=0).all()


# directions and units --------------------------------------------------------------------------------------------------


def test_unit_is_the_median_distance_from_the_mean():
    source, rows = SpikeIn(stored(), 4), sampled(stored())
    distance = (rows.inputs - rows.inputs.mean(dim=0)).norm(dim=1).median()
    assert source.unit == pytest.approx(float(distance), rel=1e-5)
    outlier = ROWS.clone()
    outlier[:5] *= 1_000
    moved = SpikeIn(Stored(outlier), 4)
    assert moved.unit < 60 * source.unit  # the mean moves, the median of distances hardly


def test_directions_have_the_rows_covariance_or_none():
    flat = torch.randn(600, 12, generator=Generator().manual_seed(1)) * torch.tensor([5.0] + 11 * [0.1])
    like_rows, uniform = (SpikeIn(Stored(flat), 50, directions=name).input_features for name in ("rows", "uniform"))
    assert like_rows[:, 0].abs().mean() > 0.8 and uniform[:, 0].abs().mean() < 0.4


def test_a_transcoder_has_other_directions_and_the_same_codes():
    targets = 9 * torch.randn(600, 7, generator=Generator().manual_seed(3))
    source = SpikeIn(Stored(ROWS, targets), 5, 0.3)
    got, own = sampled(source), sampled(source.source)
    assert got.kind == "transcoder" and got.truth.target_features.shape == (5, 7)
    torch.testing.assert_close(got.targets - own.targets, got.truth.codes @ got.truth.target_features, atol=1e-4, rtol=1e-4)
    sides = SpikeIn(Stored(ROWS), 5).unit, SpikeIn(Stored(targets), 5).unit
    assert source.unit == pytest.approx((sides[0] * sides[1]) ** 0.5, rel=1e-5)


def test_a_crosscoder_s_spike_is_in_every_block_in_proportion():
    rows = torch.cat([ROWS, 10 * ROWS.flip(0)], dim=1)
    source = SpikeIn(Stored(rows, blocks=("small", "large")), 5, 0.3)
    first, second = source.input_features[:, :12].norm(dim=1), source.input_features[:, 12:].norm(dim=1)
    torch.testing.assert_close(second / first, torch.full((5,), 10.0), rtol=0.05, atol=0)
    assert sampled(source).kind == "crosscoder" and sampled(source).blocks == source.blocks != ()


def test_any_source_takes_spikes():
    for host in (HierarchyBench(), LinearBench(n_features=9, d_in=6, kind="crosscoder", max_interference=1.0), SpikeIn(stored(), 3)):
        got = SpikeIn(host, 4, 0.2).sample(30, Generator().manual_seed(0))
        assert got.truth.n_features == 4 and got.kind == host.sample(1, Generator()).kind


# errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"rate": 0}, ValueError, "rate is 0; it is a number above 0, at most 1"),
        ({"rate": 1.5}, ValueError, "rate is 1.5"),
        ({"rate": float("nan")}, ValueError, "rate is nan"),
        ({"rate": (0.1, 0.2)}, ValueError, "2 values of rate for 5 spikes"),
        ({"rate": "often"}, TypeError, "'often' is given where"),
        ({"magnitude": -1}, ValueError, "magnitude is -1"),
        ({"magnitude": float("inf")}, ValueError, "magnitude is inf"),
        ({"parents": (None, 0)}, ValueError, "2 parents for 5 spikes"),
        ({"parents": (None, 9, 0, 0, 0)}, ValueError, "the parent of spike 1 is 9"),
        ({"parents": (1, 0, None, None, None)}, ValueError, "spike 0 is its own ancestor"),
        ({"parents": TREE, "child_rate": 0.7, "exclusive": True}, ValueError, "children of spike 0 sum to 1.4, above 1"),
        ({"n_features": 0}, ValueError, "n_features"),
        ({"directions": "any"}, ValueError, "any"),
    ],
)
def test_bad_settings_say_what_is_wrong(settings, error, words):
    with pytest.raises(error, match=words):
        SpikeIn(stored(), **{"n_features": 5} | settings)


def test_bad_sources_say_what_is_wrong(tmp_path):
    with pytest.raises(TypeError, match=r"source is a Tensor; give a Source"):
        SpikeIn(ROWS)
    with pytest.raises(FileNotFoundError):
        SpikeIn(tmp_path / "nothing.npy")
    with pytest.raises(ValueError, match="median distance of the source's inputs from their mean is 0"):
        SpikeIn(Stored(torch.ones(20, 3)), 2).batch(0, 4)


# sessions --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["memory", "file", "bench"])
def test_a_run_folder_keeps_the_spikes(tmp_path, host):
    if host == "file":
        np.save(tmp_path / "rows.npy", ROWS.numpy())
    inside = {"memory": stored, "file": lambda: tmp_path / "rows.npy", "bench": lambda: LinearBench(n_features=9, d_in=12)}[host]()
    source = SpikeIn(inside, 5, rate=(0.1,) * 5, parents=TREE)
    session = Session(source, TopK(k=2), n_latents=16, batch_size=32)
    session.train(3)
    session.save(tmp_path / "run")
    session.close()
    again = Session.open(tmp_path / "run")
    assert again.source.fingerprint() == source.fingerprint() and again.source.parents == TREE
    assert torch.equal(again.source.batch(7, 16).inputs, source.batch(7, 16).inputs)
    again.close()
    with pytest.raises(ValueError, match="was trained on data SpikeIn:"):
        Session.open(tmp_path / "run", source=SpikeIn(inside, 5, seed=1))


def test_what_it_says_of_itself():
    source = SpikeIn(stored(), 4)
    assert repr(source).startswith("SpikeIn(n_features=4, source=Stored(600 rows, width 12), ")
    assert repr(source).endswith("spikes linear and independent, other features unknown)")
    assert "4 spike-ins in Stored, each active in 1.00% of the rows, 0.3 times" in source.summary
    assert "independent of the rows and of each other. The data's own features are unknown." in source.summary
    assert "children are active only in their parents' rows" in SpikeIn(stored(), 5, parents=TREE).summary
