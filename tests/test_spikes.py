"""SpikeIn: known directions in anybody's rows, and what findings make of a truth that is not the whole truth."""

import numpy as np
import pytest
import torch
from torch import Generator

from sdl_explorer import (
    HierarchyBench,
    LinearBench,
    Session,
    SparseDictionary,
    SpikeIn,
    Stored,
    TopK,
    align,
    check_theory,
    find_absorption,
    precision_on_spikes,
    score_recovery,
    suspect_absorption,
    trace_causes,
    trace_patterns,
)
from sdl_explorer.app.facts import describe_data
from sdl_explorer.data.activations import Activations
from sdl_explorer.data.sources import PARTS
from sdl_explorer.diagnosis import meanings
from sdl_explorer.diagnosis.meanings import suspect_polysemantic
from sdl_explorer.diagnosis.observe import Accumulator, finding, observe
from sdl_explorer.diagnosis.redundancy import find_redundant
from sdl_explorer.diagnosis.scores import DetectorScore
from sdl_explorer.diagnosis.spiked import judge_of

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
    turned = tuple(None if (above := TREE[k]) is None else order.index(above) for k in order)
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


# what findings make of them --------------------------------------------------------------------------------------------

FAMILY = (None,) * 7 + (6,)  # spike 7 fires inside spike 6


@pytest.fixture(scope="module")
def spiked() -> SpikeIn:
    """Eight spikes far above rows of noise, one inside another."""
    rows = torch.randn(6_000, 24, generator=Generator().manual_seed(5))
    return SpikeIn(Stored(rows), 8, rate=0.06, magnitude=8, parents=FAMILY, child_rate=0.4, directions="uniform")


def planted(source: SpikeIn, noise: float = 0.0) -> SparseDictionary:
    """0, 1: a spike each. 2: two spikes. 3: the rows' own. 4, 5: one spike twice. 6, 7: a parent absorbed by its child. 8: dead."""
    F = source.input_features
    reads, generator = torch.linalg.pinv(F).T, Generator().manual_seed(0)
    own = torch.randn(24, generator=generator)
    own = own - own @ torch.linalg.pinv(F) @ F
    enc = torch.stack([reads[0], reads[1], reads[2] + reads[3], own, reads[4], 2 * reads[4], reads[6] - reads[7], reads[7], 0 * own])
    dec = torch.stack([F[0], F[1], F[2] + F[3], own / own.norm() ** 2, F[4] / 2, F[4] / 4, F[6], F[6] + F[7], own])
    enc = enc + noise * enc.norm(dim=1, keepdim=True) * torch.randn(enc.shape, generator=generator) / 24**0.5
    b_enc = torch.where(enc.norm(dim=1) > 0, -0.3 * 8 * source.unit, -1.0)
    b_enc[3] = 0
    return SparseDictionary(enc, dec, b_enc)


def judged(source, n=600):
    return source.sample(n, Generator().manual_seed(3), "judge")


@pytest.fixture(scope="module")
def rows(spiked):
    return spiked.sample(4_000, Generator().manual_seed(3), "train")


def permuted(dictionary, order):
    return SparseDictionary(dictionary.W_enc[order], dictionary.W_dec[order], dictionary.b_enc[order])


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("order", [list(range(9)), [8, 2, 5, 0, 7, 1, 4, 6, 3]])
def test_patterns_know_what_no_spike_explains(spiked, rows, noise, order):
    found = trace_patterns(permuted(planted(spiked, noise), order), rows)
    status = dict(zip(order, found.status, strict=True))
    assert [status[i] for i in (0, 1, 2, 3, 4, 5, 6, 7, 8)] == ["mono", "mono", "poly", "alive", "mono", "mono", "mono", "mono", "dead"]
    assert np.isfinite(found.other).all() and (found.other[order.index(3)] > 0.8) and (found.other[order.index(0)] < 0.1)
    assert "1 alive" in repr(found)


def test_a_complete_truth_leaves_nothing_unknown():
    rows = HierarchyBench().sample(500, Generator().manual_seed(0))
    found = trace_patterns(SparseDictionary(rows.truth.input_features, rows.truth.target_features), rows)
    assert not found.other.any() and "alive" not in found.status


def test_absorption_recovery_and_alignment_see_the_spikes_through_the_rows(spiked, rows):
    dictionary = planted(spiked)
    (edge,) = find_absorption(dictionary, rows).edges
    assert (edge.kind, edge.latent, edge.absorber) == ("absorbed", 6, 7)
    clean = planted(spiked)
    reads, F = torch.linalg.pinv(spiked.input_features).T, spiked.input_features
    with torch.no_grad():
        clean.W_enc[6], clean.W_dec[7] = reads[6], F[7]
    assert find_absorption(clean, rows).edges[0].kind == "none"
    found = score_recovery(clean, rows)
    assert found.status.tolist() == ["recovered"] * 2 + ["merged"] * 2 + ["one-to-many", "missed"] + ["recovered"] * 2
    assert "8 known features beside unknown ones" in repr(found) and "feature_f1" in repr(found)
    assert align(clean, rows).recovery(0.95) == pytest.approx(5 / 8)


def test_a_cause_is_a_spike_only_where_it_adds_more_than_the_rest_of_the_row(spiked, rows):
    of_spike, of_rows = (trace_causes(planted(spiked, 0.05), rows, latent) for latent in (0, 3))
    assert (of_spike.feature == 0).mean() > 0.95 and of_spike.share.mean() > 0.8
    known = (of_rows.feature >= 0).mean()
    with_spike = (rows.truth.codes[of_rows.row].sum(dim=1) > 0).float().mean()
    assert known < 0.7 * with_spike and np.isfinite(of_rows.share).all()


def test_theory_says_nothing_of_a_truth_that_is_not_whole(spiked):
    cards = check_theory(planted(spiked), judged(spiked))
    assert {card.verdict for card in cards} == {"not checkable"}
    assert "8 features are known" in repr(cards[0])


def test_the_app_says_what_is_known_and_what_not(spiked):
    words = describe_data(spiked, judged(spiked))
    assert "8 spike-ins in Stored" in words and "own features are unknown" in words and "ground truth" not in words


# precision of detectors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("order", [list(range(9)), [8, 2, 5, 0, 7, 1, 4, 6, 3]])
def test_candidates_are_judged_where_spikes_can(spiked, rows, noise, order):
    dictionary = permuted(planted(spiked, noise), order)
    at = lambda *latents: tuple(order.index(i) for i in latents)
    poly = precision_on_spikes(dictionary, rows, at(0, 2, 3, 8), "polysemantic")
    assert (poly.hits, poly.n, poly.n_unknown, poly.n_true, poly.n_able) == (1, 2, 2, 1, 7)
    assert (poly.precision, poly.recall, poly.chance) == (0.5, 1.0, 1 / 7)
    same = precision_on_spikes(dictionary, rows, [at(4, 5), at(0, 1), at(0, 3), at(3, 8)], "redundant")
    assert (same.hits, same.n, same.n_unknown, same.n_true) == (1, 3, 1, 1)
    taken = precision_on_spikes(dictionary, rows, [at(6, 7), at(7, 6), at(0, 1), at(3, 8)], "absorbed")
    assert (taken.hits, taken.n, taken.n_unknown, taken.n_true) == (1, 3, 1, 1)
    assert str(taken) == "precision on spike-ins here: 0.33 (1 of 3, 95 %: 0.06 to 0.79)"


def test_a_group_is_all_its_pairs_and_nothing_is_counted_twice(spiked, rows):
    dictionary = planted(spiked)
    found = precision_on_spikes(dictionary, rows, [(4, 5, 0), (5, 4)], "redundant")
    assert (found.hits, found.n) == (1, 3)
    assert precision_on_spikes(dictionary, rows, [2, 2], "polysemantic").n == 1


def test_what_cannot_be_judged_is_said(spiked, rows):
    found = precision_on_spikes(planted(spiked), rows, [3, 8])
    assert found.precision is None and found.interval == (0, 1)
    assert str(found) == "precision on spike-ins here: not known, none of 2 candidates is about a spike"
    assert str(precision_on_spikes(planted(spiked), rows)).endswith("not known, there are no candidates")
    with pytest.raises(ValueError, match="carry no spikes"):
        precision_on_spikes(planted(spiked), Activations(rows.inputs, rows.inputs))
    with pytest.raises(ValueError, match="latent 12 does not exist; there are 9"):
        precision_on_spikes(planted(spiked), rows, [12])
    with pytest.raises(ValueError, match="claim is 'dead'"):
        precision_on_spikes(planted(spiked), rows, [1], "dead")


def test_rescaling_and_blocks_change_no_verdict(spiked, rows):
    dictionary, scale = planted(spiked, 0.05), torch.tensor([0.1, 3, 7, 0.5, 2, 1, 9, 0.3, 1])
    scaled = SparseDictionary(dictionary.W_enc * scale[:, None], dictionary.W_dec / scale[:, None], dictionary.b_enc * scale)
    request = [(precision_on_spikes, {"candidates": (0, 2, 7)}), (trace_patterns, {})]
    whole, parts = (observe(dictionary, rows, request, block=block) for block in (None, 700))
    assert whole[0] == parts[0] == precision_on_spikes(scaled, rows, (0, 2, 7))
    np.testing.assert_allclose(whole[1].other, parts[1].other, atol=1e-4)
    np.testing.assert_allclose(trace_patterns(scaled, rows).other, whole[1].other, atol=1e-4)


def test_a_detector_can_say_it_in_its_own_pass(spiked, rows):
    class Detector(Accumulator):
        def __init__(self, stream):
            super().__init__(stream)
            self.spikes = judge_of(stream)

        def add(self, rows):
            pass

        def result(self):
            return self.spikes and self.spikes.judge([2], "polysemantic")

    @finding(Detector)
    def detect(dictionary, activations):
        return observe(dictionary, activations, [detect])[0]

    assert detect(planted(spiked), rows) == precision_on_spikes(planted(spiked), rows, [2])
    assert detect(planted(spiked), Activations(rows.inputs, rows.inputs)) is None


@pytest.mark.parametrize("order", [list(range(9)), [8, 2, 5, 0, 7, 1, 4, 6, 3]])
def test_findings_without_truth_say_how_right_they_are_on_spikes(spiked, rows, order, monkeypatch):
    on_benches = DetectorScore("polysemantic", 0.0, 1.0, 100, 50, 50, 0.9, 0.8, 0.9, 0.5)
    monkeypatch.setattr(meanings, "detector_scores", lambda *_: on_benches)
    dictionary, bare = permuted(planted(spiked), order), Activations(rows.inputs, rows.inputs)
    same = find_redundant(dictionary, rows)
    assert [sorted(order[i] for i in group) for group in same.clusters] == [[4, 5]]
    assert (same.on_spikes.hits, same.on_spikes.n) == (1, 1) and "duplicates: precision on spike-ins here: 1.00" in repr(same)
    poly = suspect_polysemantic(dictionary, rows)
    assert poly.on_spikes == precision_on_spikes(dictionary, rows, np.flatnonzero(poly.candidate), "polysemantic")
    assert poly.candidate[order.index(2)] and poly.on_spikes.hits == 1 and "precision on spike-ins here" in poly.reading
    taken = suspect_absorption(dictionary, rows)
    named = [(c.parent, c.child) for c in taken.candidates]
    assert taken.on_spikes == precision_on_spikes(dictionary, rows, named, "absorbed")
    assert (taken.on_spikes.hits, taken.on_spikes.recall) == (1, 1) and "; precision on spike-ins here: " in repr(taken)
    assert suspect_absorption(dictionary, bare).on_spikes is None
    for found, unspiked in ((same, find_redundant(dictionary, bare)), (poly, suspect_polysemantic(dictionary, bare))):
        assert unspiked.on_spikes is None and "spike" not in repr(unspiked) and found.coherence == unspiked.coherence
