"""Candidates without truth: planted parents, whole and in part, the closed form, what must not be flagged, and the test's invariants."""

import math

import numpy as np
import pytest
import torch

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.bench import linear_activations
from sdl_explorer.diagnosis import candidates_pairs
from sdl_explorer.diagnosis.absorption import find_absorption
from sdl_explorer.diagnosis.candidates import Suspects, score_candidates, suspect_absorption
from sdl_explorer.diagnosis.candidates_pairs import Codes
from sdl_explorer.diagnosis.observe import evaluating, observe
from sdl_explorer.models.dictionary import SparseDictionary

N, D = 360, 8
PARENTS = (None, 0, 0, 0, None)  # one parent, three exclusive children, and a feature of its own


def codes() -> torch.Tensor:
    """Rows in turn: the parent alone, with child 1, 2, 3, and twice no family; feature 4 on every fifth row."""
    codes = torch.zeros(N, 5)
    rows = torch.arange(N)
    kind = rows % 6
    codes[kind < 4, 0] = 1.0
    for child in (1, 2, 3):
        codes[kind == child, child] = 1.0
    codes[rows % 5 == 0, 4] = 1.0
    return codes


def planted(codes: torch.Tensor | None = None, parents=PARENTS) -> Activations:
    codes = globals()["codes"]() if codes is None else codes
    features = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0)))[0][: codes.shape[1]]
    return linear_activations(codes, features, features, parents=parents)


def rows_of(children=(), delta=1.0, n=5, spare=0):
    """enc_parent = parent - delta * children, dec_child = child + delta * parent (Chanin et al. 2024, appendix A.2)."""
    enc, dec = torch.eye(n + spare, n), torch.eye(n + spare, n)
    for child in children:
        enc[0, child] = -delta
        dec[child, 0] = delta
    return enc, dec, torch.zeros(n + spare)


def hedged():
    """The parent's latent holds the child too, with a plus in both rows; the child has its own (Chanin et al. 2025)."""
    enc, dec, bias = rows_of()
    angle = 0.5 * math.atan2(2 * 0.1, 0.3)
    for rows in (enc, dec):
        rows[0, :2] = torch.tensor([math.cos(angle), math.sin(angle)])
    return enc, dec, bias


def composite():
    """Parent and child alone have latents of their own; both together are latent 5."""
    enc, dec, bias = rows_of(spare=1)
    enc[0, 1] = enc[1, 0] = -1
    enc[5, :2] = dec[5, :2] = 1
    bias[5] = -1
    return enc, dec, bias


def duplicated():
    """Latents 0 and 5 write the parent, each on half of its rows."""
    enc, dec, bias = rows_of(spare=1)
    enc[0, 1] = -1
    enc[5, 0] = enc[5, 1] = dec[5, 0] = 1
    bias[5] = -1
    return enc, dec, bias


def on(data: Activations, rows, order=None, noise=0.0) -> SparseDictionary:
    enc, dec, bias = rows
    generator = torch.Generator().manual_seed(3)
    W_enc, W_dec = (W @ data.truth.input_features for W in (enc, dec))
    W_enc, W_dec = (W + noise * torch.randn(W.shape, generator=generator) for W in (W_enc, W_dec))
    order = torch.arange(len(W_enc)) if order is None else order
    return SparseDictionary(W_enc[order], W_dec[order], (bias - 0.1 * (noise > 0))[order])


def edges(found: Suspects) -> set[tuple[int, int]]:
    return {(c.parent, c.child) for c in found.candidates}


CASES = {
    "clean": (rows_of(), set()),
    "absorbed by one": (rows_of((1,)), {(0, 1)}),
    "absorbed by two": (rows_of((1, 3)), {(0, 1), (0, 3)}),
    "absorbed by all": (rows_of((1, 2, 3)), {(0, 1), (0, 2), (0, 3)}),
    "in part": (rows_of((2,), 0.6), {(0, 2)}),
    "hardly": (rows_of((2,), 0.3), set()),
    "hedged": (hedged(), set()),
    "composite": (composite(), {(0, 5)}),  # the child's own latent never fires: it is always with its parent
    "duplicated": (duplicated(), set()),
}


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("case", CASES)
def test_planted_whatever_the_order_of_latents_and_a_little_noise(case, noise):
    rows, expected = CASES[case]
    data = planted()
    order = torch.randperm(len(rows[0]), generator=torch.Generator().manual_seed(5))
    found, shuffled = (suspect_absorption(on(data, rows, o, noise), data) for o in (None, order))
    assert edges(found) == expected
    assert {(int(order[p]), int(order[c])) for p, c in edges(shuffled)} == expected
    assert found.coherence == pytest.approx(shuffled.coherence) and found.crosstalk == pytest.approx(shuffled.crosstalk, abs=1e-6)
    back = {(int(order[p]), int(order[c])): s for p, c, s in zip(*shuffled.examined, strict=True)}
    assert back == pytest.approx({(p, c): s for p, c, s in zip(*found.examined, strict=True)})
    for one in (found, shuffled):
        assert np.isfinite([x for c in one.candidates for x in c if x is not None]).all() and np.isfinite(one.examined.score).all()
        assert all(np.isfinite(points).all() for points in one.points)


@pytest.mark.parametrize("delta", [0.4, 0.5, 0.8, 1.0])
def test_the_closed_form_of_partial_absorption(delta):
    """Whatever the degree, parent and child complete each other; what is left is 1 - delta, and the child's share delta."""
    data = planted()
    found = suspect_absorption(on(data, rows_of((1,), delta)), data)
    (edge,) = found.candidates
    assert (edge.parent, edge.child, edge.n_child, edge.n_parent) == (0, 1, N // 6, N * 4 // 6 - (N // 6 if delta == 1 else 0))
    assert edge.cosine == pytest.approx(delta / math.sqrt(1 + delta**2))
    assert edge.reference == pytest.approx(1, abs=1e-5)
    assert edge.attenuation == pytest.approx(1 - delta, abs=1e-5)
    assert edge.completion == pytest.approx(1, abs=1e-5)
    assert edge.absorbed == pytest.approx(delta, abs=1e-5)
    assert edge.score == pytest.approx(delta * edge.cosine, abs=1e-4)
    assert (edge.given_child, edge.given_parent) == ((0, 0) if delta == 1 else (1, 0.25))
    assert (edge.holes, edge.n_looked) == (1, N // 6)
    assert edge.similarity_child == pytest.approx(0 if delta == 1 else 1, abs=1e-6)  # both constant over the child's rows
    z = edge.completion - edge.attenuation
    on_line = found.points[0][: edge.n_looked]  # z_p + cosine z_c is one number
    assert on_line @ [1, edge.cosine] == pytest.approx(np.full(len(on_line), edge.attenuation + z), abs=1e-5)
    assert (found.points[0][edge.n_looked :, 1] == 0).all() and (found.points[0][edge.n_looked :, 0] > 0).all()
    assert found.status == "candidate" and found.reliable


def test_magnitudes_that_vary_and_rescaled_rows_change_no_verdict():
    generator = torch.Generator().manual_seed(1)
    data = planted(codes() * (1 + 0.2 * torch.randn(N, 5, generator=generator)).clamp(min=0))
    plain = on(data, rows_of((1, 3)))
    scale = torch.tensor([0.1, 3.0, 1.0, 20.0, 0.5])[:, None]
    scaled = SparseDictionary(plain.W_enc * scale, plain.W_dec / scale)
    found, again = (suspect_absorption(dictionary, data) for dictionary in (plain, scaled))
    assert edges(found) == edges(again) == {(0, 1), (0, 3)}
    for one, other in zip(found.candidates, again.candidates, strict=True):
        assert one[2:9] == pytest.approx(other[2:9], abs=1e-5) and one.holes == other.holes
    assert found.crosstalk == pytest.approx(again.crosstalk, abs=1e-6)


def test_units_of_the_data_change_no_verdict():
    """A dictionary that scales its rows sees the same thing."""
    data = planted()
    plain = on(data, rows_of((1,), 0.6))
    big = Activations(data.inputs * 8, data.inputs * 8)
    scaled = SparseDictionary(plain.W_enc, plain.W_dec, input_scale=1 / 8, target_scale=1 / 8)
    (one,), (other,) = (suspect_absorption(d, x).candidates for d, x in ((plain, data), (scaled, big)))
    assert one[2:9] == pytest.approx(other[2:9], abs=1e-5) and one[9:] == pytest.approx(other[9:])


@pytest.mark.parametrize("block", [1, 7, 200])
def test_blocks_of_any_size_and_one_pass_give_the_same(block, monkeypatch):
    data = planted()
    dictionary = on(data, rows_of((1, 2), 0.7), noise=0.02)
    whole = suspect_absorption(dictionary, data)
    monkeypatch.setattr(candidates_pairs, "EVENTS", 5)
    monkeypatch.setattr(candidates_pairs, "CELLS", 7)
    found = observe(dictionary, data, [suspect_absorption, find_absorption], block=block)[0]
    assert edges(found) == edges(whole)
    for one, other in zip(found.candidates, whole.candidates, strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    assert found.crosstalk == pytest.approx(whole.crosstalk, abs=1e-6) and found.coherence == pytest.approx(whole.coherence, abs=1e-6)
    assert found.contained == whole.contained


def test_no_more_codes_are_kept_than_fit_and_the_rows_are_counted(monkeypatch):
    data = planted()
    dictionary = on(data, rows_of((1,)))
    monkeypatch.setattr(candidates_pairs, "MOST_CODES", 150)
    first, second = (observe(dictionary, data, [suspect_absorption], block=b)[0] for b in (11, 360))
    assert first.n_samples == second.n_samples < N
    assert first.crosstalk == pytest.approx(second.crosstalk, abs=1e-6)
    rows = data.take(slice(0, first.n_samples))
    assert int((dictionary.encode(rows.inputs).dense() > 1e-5).sum()) <= 150
    assert suspect_absorption(dictionary, rows).candidates == first.candidates


def test_sums_are_those_of_dense_products():
    """Against the formulas, written out on dense matrices."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(300, 6, generator=generator)
    data = Activations(inputs, inputs)
    dictionary = SparseDictionary(torch.randn(12, 6, generator=generator), torch.randn(12, 6, generator=generator), torch.full((12,), -0.5))
    found = suspect_absorption(dictionary, data, least=5)
    with evaluating(dictionary):
        z = (dictionary.encode(inputs).dense() * dictionary.W_dec.norm(dim=1)).double().numpy()
    unit = (dictionary.W_dec / dictionary.W_dec.norm(dim=1, keepdim=True)).detach().double().numpy()
    cosines = unit @ unit.T
    written = z @ cosines
    fires = z > 1e-6
    assert found.crosstalk == pytest.approx((z * np.abs(written - z))[fires].sum() / (z**2).sum(), rel=1e-4)
    assert found.coherence == pytest.approx(np.abs(cosines[~np.eye(12, dtype=bool)]).mean(), rel=1e-4)
    near = (cosines >= 0.2) & (cosines < 0.9)
    assert set(zip(*np.nonzero(near), strict=True)) == set(zip(found.examined.parent, found.examined.child, strict=True))
    numbers = {}
    for p, c in zip(*np.nonzero(near), strict=True):
        silent = fires[:, p] & ~fires[:, c]
        r = (z[silent, p] ** 2).sum() / z[silent, p].sum() if silent.sum() >= 5 else 0
        a = (z[:, c] * z[:, p]).sum() / z[:, c].sum() / r if r else 0
        numbers[p, c] = a, a + cosines[p, c] * (z[:, c] ** 2).sum() / z[:, c].sum() / r if r else 0
    for p, c, score in zip(*found.examined, strict=True):
        (a, done), (_, back) = numbers[p, c], numbers[c, p]
        close, other = (min(x, 1 / x) if x else 0 for x in (done, back))
        expected = close**2 * (1 - a / done) * cosines[p, c] if done and close > other else 0
        assert score == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_bounded_number_of_pairs_and_how_many_were_left_out():
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(40, 4, generator=generator)
    data = Activations(torch.randn(200, 4, generator=generator), torch.randn(200, 4, generator=generator))
    dictionary = SparseDictionary(rows, rows)
    every, few = (suspect_absorption(dictionary, data, near=near) for near in (40, 2))
    assert every.n_left_out == 0
    assert len(few.examined.score) + few.n_left_out == len(every.examined.score)
    assert len(few.examined.score) <= 2 * 2 * 40
    assert few.coherence == pytest.approx(every.coherence)
    kept = set(zip(few.examined.parent, few.examined.child, strict=True))
    assert {(c, p) for p, c in kept} == kept


def test_containment_is_a_layer_of_its_own():
    """Without absorption the child's latent fires inside the parent's; absorption breaks exactly that."""
    data = planted()
    found = suspect_absorption(on(data, rows_of()), data, least=5)
    assert {(k.inner, k.outer) for k in found.contained} == set()  # P(parent) is 2/3: not half of 1
    data = planted(torch.cat([codes(), torch.zeros(N, 5)]))
    found = suspect_absorption(on(data, rows_of((3,))), data)
    assert {(k.inner, k.outer) for k in found.contained} == {(1, 0), (2, 0)}
    assert found.contained[0] == (1, 0, N // 6, N // 2, N // 6)
    assert (found.contained[0].given_inner, found.contained[0].given_outer) == (1, pytest.approx(1 / 3))
    assert edges(found) == {(0, 3)}


def test_a_chain_is_a_forest():
    """0 > 1 > 2: latent 1 writes 0 and 1, latent 2 writes all three."""
    chain = torch.zeros(N, 3)
    for r in range(N):
        chain[r, : r % 4] = 1.0
    enc, dec, bias = rows_of(n=3)
    enc[0, 1] = enc[1, 2] = -1
    dec[1, 0] = dec[2, 0] = dec[2, 1] = 1
    data = planted(chain, (None, 0, 1))
    found = suspect_absorption(on(data, (enc, dec, bias)), data)
    assert edges(found) == {(0, 1), (0, 2), (1, 2)}
    assert found.forest.tolist() == [-1, 0, 1]  # of two parents the one with the better score


def test_the_ambiguity_is_real_and_so_it_is_a_candidate():
    """Two exclusive features, f0 and f0 + f1, give the data of a parent absorbed by its child; nothing can tell them apart."""
    exclusive = torch.zeros(N, 2)
    exclusive[::3, 0], exclusive[1::3, 1] = 1.0, math.sqrt(2)
    features = torch.tensor([[1.0, 0.0], [math.sqrt(0.5), math.sqrt(0.5)]])
    data = linear_activations(exclusive, features, features)
    found = suspect_absorption(SparseDictionary(torch.linalg.inv(features).T, features), data)
    assert edges(found) == {(0, 1)} and found.status == "candidate"


def test_scores_beside_the_truth():
    data = planted()
    dictionary = on(data, rows_of((1, 3)))
    suspects, absorption = observe(dictionary, data, [suspect_absorption, find_absorption])
    score, truth = score_candidates(suspects, absorption)
    assert len(score) == len(suspects.examined.score) and truth.sum() == 2
    assert score[truth].min() > score[~truth].max()
    bare = suspect_absorption(dictionary, data, min_cosine=0.8)
    assert len(bare.examined.score) == 0
    assert [part.tolist() for part in score_candidates(bare, absorption)] == [[0, 0], [True, True]]


def test_nothing_that_fires_and_one_latent_are_no_candidates_and_never_nan():
    data = planted()
    silent = SparseDictionary(torch.randn(6, D), torch.randn(6, D), torch.full((6,), -100.0))
    for dictionary in (silent, SparseDictionary(torch.randn(1, D), torch.randn(1, D))):
        found = suspect_absorption(dictionary, data)
        assert (found.candidates, found.contained, found.n_left_out, found.coherence) == ((), (), 0, 0)
        assert math.isfinite(found.crosstalk) and (found.forest == -1).all()


def test_crowded_latents_are_not_reliable():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 8, generator=generator)
    inputs = torch.randn(500, 8, generator=generator)
    found = suspect_absorption(SparseDictionary(rows, rows), Activations(inputs, inputs))
    assert found.crosstalk > 0.2 and not found.reliable and "not reliable" in repr(found)


@pytest.mark.parametrize("settings", [{"least": 0}, {"near": 0}, {"min_cosine": 0.0}, {"min_cosine": 1.0}])
def test_settings_out_of_bounds_are_refused(settings):
    data = planted()
    with pytest.raises(ValueError, match="suspect_absorption"):
        suspect_absorption(on(data, rows_of()), data, **settings)


def test_codes_are_shared():
    """Several findings that read codes hold them once."""
    data = planted()
    dictionary = on(data, rows_of((1,)))
    one, two = observe(dictionary, data, [suspect_absorption, (suspect_absorption, {"least": 30})])
    assert one.candidates == two.candidates
    assert issubclass(Codes, object)
