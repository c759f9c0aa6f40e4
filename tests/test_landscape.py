"""The landscape around two latents: Example 3.5's trap, a constructed optimum, convexity, and what must not change it."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.bench import linear_activations
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.diagnosis.landscape import probe_landscape
from sdl_explorer.diagnosis.landscape_kick import FATES
from sdl_explorer.diagnosis.landscape_local import Local
from sdl_explorer.diagnosis.observe import evaluating, observe
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods.gated import GatedRectified
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.methods.pursuit import with_pursuit
from sdl_explorer.models.methods.topk import BatchTopKSelection, TopKSelection

AXES = torch.eye(2)
QUICK = {"grid": 8, "n_kicks": 2, "n_steps": 2, "n_rows": 64}
TRAP = SparseDictionary(torch.tensor([[1.0, 1], [0, 0]]), torch.tensor([[0.5, 0.5], [0, 0]]), nonlinearity=TopKSelection(1)).eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def alone(features=AXES):
    """One row a feature, M_d = 1: the loss on these rows is the sum over features."""
    n = len(features)
    return linear_activations(torch.diag(torch.full((n,), n**0.5)), features, features)


def noisy(activations, size):
    inputs = activations.inputs + size * torch.randn(activations.inputs.shape, generator=seeded(9))
    return Activations(inputs, inputs, activations.truth)


def sparse_rows(n=300, n_features=12, d=10, seed=0):
    features = normalize(torch.randn(n_features, d, generator=seeded(seed)), dim=1)
    codes = (torch.rand(n, n_features, generator=seeded(seed + 1)) < 0.15) * (0.5 + torch.rand(n, n_features, generator=seeded(seed + 2)))
    return linear_activations(codes, features, features)


def dictionary_of(sigma=None, n_latents=14, d=10, seed=3, b_enc=None):
    W = normalize(torch.randn(n_latents, d, generator=seeded(seed)), dim=1)
    return SparseDictionary(W, 0.7 * W, b_enc, nonlinearity=sigma).eval()


def permuted(dictionary, order):
    rows = (p.detach()[order] for p in (dictionary.W_enc, dictionary.W_dec, dictionary.b_enc))
    return SparseDictionary(*rows, dictionary.b_dec.detach(), dictionary.nonlinearity).eval()


def share(landscape, loss):
    return float((abs(landscape.map.profiled - loss) < 1e-3).mean())


def finite(found):
    """Every number of a finding, whatever it lies in."""
    if isinstance(found, float | int | np.floating):
        assert math.isfinite(found)
    elif isinstance(found, np.ndarray):
        assert np.isfinite(found).all()
    elif isinstance(found, tuple):
        for part in found:
            finite(part)
    elif hasattr(found, "__dataclass_fields__"):
        for field in fields(found):
            finite(getattr(found, field.name))


# planted --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_the_two_neuron_trap(order, noise):
    """Example 3.5: loss 1 where it stands, 0 elsewhere on the map; the solved-out loss is 2 - rank, on 5/16, 10/16, 1/16 of the torus."""
    found = probe_landscape(permuted(TRAP, order), noisy(alone(), noise), grid=128, n_kicks=4, n_steps=60, relative=False)
    assert found.latents == (order.index(0), order.index(1)) and found.silent == (False, True)
    assert found.loss == pytest.approx(1, abs=1e-6 if noise == 0 else 1e-3)
    assert found.map.profiled_here == pytest.approx(1, abs=1e-6 if noise == 0 else 1e-3)
    assert found.map.best[0] == pytest.approx(0, abs=1e-6)
    assert [share(found, loss) for loss in (0, 1, 2)] == pytest.approx([5 / 16, 10 / 16, 1 / 16], abs=0.01)
    assert found.map.here == (pytest.approx(math.pi / 4, abs=1e-3), None)
    small, middle, _ = found.kicks.arms
    assert small.count("finds lower") == middle.count("finds lower") == 0
    assert small.after.min() > 1 - 1e-3 and small.end == pytest.approx(1, abs=0.02)
    finite(found.kicks), finite(found.slice)


def test_regions_of_the_trap_have_their_losses():
    found = probe_landscape(TRAP, alone(), grid=64, n_kicks=1, n_steps=1).map
    assert found.plane == found.probes == ("feature 0", "feature 1")
    losses = {region.label: (region.least, region.largest) for region in found.regions}
    assert losses["∅ | ∅"] == pytest.approx((2, 2), abs=1e-6)
    assert losses["{feature 0, feature 1} | ∅"] == pytest.approx((1, 1), abs=1e-6)
    assert losses["{feature 0} | {feature 1}"] == pytest.approx((0, 0), abs=1e-6)
    assert sum(region.share for region in found.regions) == pytest.approx(1)
    at = found.region[40, 8]  # the first at pi / 4 reads both, the second at 5 pi / 4 neither
    assert found.regions[at].label == "{feature 0, feature 1} | ∅"


def test_a_short_row_wins_only_where_the_other_is_off():
    """As the second row shrinks: 4/16, 11/16, 1/16."""
    found = probe_landscape(TRAP, alone(), grid=128, ratio=1e-3, n_kicks=1, n_steps=1)
    assert [share(found, loss) for loss in (0, 1, 2)] == pytest.approx([4 / 16, 11 / 16, 1 / 16], abs=0.01)
    assert found.map.lengths[1] == pytest.approx(1e-3 * found.map.lengths[0])


def test_twenty_thousand_kicks_of_the_trap():
    """Gaussian noise on all eight weights: nothing lower up to 0.1, and below 0.6 at 0.3."""
    found = probe_landscape(TRAP, alone(), grid=4, sigmas=(0.01, 0.1, 0.3, 1.0), n_kicks=20_000, n_steps=1, relative=False)
    lowest = [arm.after.min() for arm in found.kicks.arms]
    assert min(lowest[:2]) >= 1 - 1e-6
    assert lowest[2] < 0.6 and lowest[3] < lowest[2]


@pytest.mark.parametrize("relative", [True, False])
def test_a_large_kick_leaves_the_trap(relative):
    found = probe_landscape(TRAP, alone(), grid=4, sigmas=(0.01, 1.0), n_kicks=40, n_steps=100, relative=relative)
    small, large = found.kicks.arms
    assert small.count("finds lower") == 0 < large.count("finds lower") < 40
    assert large.end.min() < 0.1 and found.verdict == "finds lower"
    assert found.kicks.unkicked == pytest.approx(1, abs=1e-6)
    assert f"{large.count('finds lower')} of 80 kicks end lower" in found.kicks.reason


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
@pytest.mark.parametrize("noise", [0.0, 1e-4])
@pytest.mark.parametrize("sigma", [None, TopKSelection(1)])
def test_a_kicked_optimum_comes_back(order, noise, sigma):
    features = torch.eye(3)
    dictionary = permuted(SparseDictionary(features, features, nonlinearity=sigma).eval(), order)
    found = probe_landscape(dictionary, noisy(alone(features), noise), latents=(0, 1), grid=8, sigmas=(0.1, 0.2), n_kicks=5, n_steps=150)
    assert found.loss == pytest.approx(0, abs=1e-6)
    assert found.verdict == "comes back"
    for arm in found.kicks.arms:
        assert arm.count("comes back") == 5
        assert (arm.after > 1e-4).all() and arm.end == pytest.approx(0, abs=1e-2)
    finite(found.kicks)


def test_a_flat_valley_drifts():
    """Around the trap any reading of both features has loss 1: a small kick ends there, and not where it began."""
    arm = probe_landscape(TRAP, alone(), grid=4, sigmas=(0.1,), n_kicks=12).kicks.arms[0]
    assert arm.end == pytest.approx(1, abs=1e-3) and arm.count("finds lower") == 0 < arm.count("drifts")
    assert (arm.moved_end[arm.fate == FATES.index("drifts")] > 1e-4).all()


# the local loss -------------------------------------------------------------------------------------------------------


def sigmas():
    jump, batch, gated = JumpRectified(14), BatchTopKSelection(2), GatedRectified(14)
    jump.threshold.data.fill_(0.3)
    batch.threshold.fill_(0.2)
    gated.r.data.fill_(0.2)
    gated.b_mag.data.fill_(0.1)
    return [None, jump, batch, gated, TopKSelection(1), TopKSelection(2), TopKSelection(5), TopKSelection(13), TopKSelection(14)]


@pytest.mark.parametrize("sigma", sigmas(), ids=lambda s: f"{type(s).__name__}{getattr(s, 'k', '')}")
def test_the_loss_around_some_latents_is_the_loss(sigma):
    """For any rows of the latents that move, competition included; and the profiled loss is least squares."""
    rows, chosen = sparse_rows(), [4, 9]
    dictionary = dictionary_of(sigma, b_enc=0.05 * torch.randn(14, generator=seeded(5)))
    dictionary.b_dec.data.copy_(0.1 * torch.randn(10, generator=seeded(6)))
    dictionary.input_scale = dictionary.target_scale = 1.5
    generator = seeded(7)
    with evaluating(dictionary):
        local = Local.of(dictionary, rows, torch.ones(rows.n), chosen)
        for size in (0.0, 0.5, 3.0):
            W_enc, W_dec = (w + size * torch.randn(w.shape, generator=generator).double() for w in (local.W_enc, local.W_dec))
            dictionary.W_enc.data[chosen], dictionary.W_dec.data[chosen] = W_enc.float(), W_dec.float()
            latents, reconstruction, _ = dictionary(rows.inputs)
            own = (rows.targets - reconstruction).square().sum(dim=1).mean().item()
            assert float(local.loss(W_enc, W_dec)) == pytest.approx(own, rel=1e-4)
            assert float(local.loss(W_enc[None].expand(3, -1, -1), W_dec)[2]) == pytest.approx(own, rel=1e-4)
            mine = latents.by_latent(chosen).double() / 1.5
            rest = (rows.targets - reconstruction).double() + mine @ W_dec
            fit = torch.linalg.lstsq(mine, rest, driver="gelsd").solution
            assert float(local.profiled(*local.codes(local.pre(W_enc)))) == pytest.approx(
                (rest - mine @ fit).square().sum(dim=1).mean().item(), rel=1e-4
            )


def test_codes_of_a_pursuit_are_not_known_alone():
    pursuit = with_pursuit(dictionary_of(), k=2)
    with pytest.raises(ValueError, match="codes all latents of a row together"):
        probe_landscape(pursuit, sparse_rows(), **QUICK)


# the slice ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [None, TopKSelection(2)])
def test_a_slice_is_convex_in_each_block_and_not_in_both(sigma):
    cut = probe_landscape(dictionary_of(sigma), sparse_rows(), latents=(2, 3), **(QUICK | {"grid": 16})).slice
    assert cut.inside == 1 and cut.convex_in_each
    assert cut.loss.shape == (17, 17) and cut.reads[8] == cut.writes[8] == 0
    bent = np.diff(cut.loss, n=2, axis=1).min(), np.diff(cut.loss, n=2, axis=0).min()
    assert min(bent) > -1e-9


def test_the_trap_s_slice_is_no_bowl():
    """Convex in either block, and the product of the two bends it: along a diagonal it lies above its chord."""
    cut = probe_landscape(TRAP, alone(), grid=16, n_kicks=1, n_steps=1).slice
    assert cut.convex_in_each and not cut.convex_in_both and cut.gap_both > 1e-4


# the choice of latents and rows ----------------------------------------------------------------------------------------


def test_the_partner_is_silent_or_near():
    W = normalize(torch.randn(5, 10, generator=seeded(1)), dim=1)
    W[3] = normalize(W[1] + 0.1 * W[0], dim=0)
    rows = sparse_rows()
    live = SparseDictionary(W, W).eval()
    assert probe_landscape(live, rows, latents=1, **QUICK).latents == (1, 3)
    dead = SparseDictionary(W, W, torch.tensor([0, 0, 0, 0, -9.0])).eval()
    assert probe_landscape(dead, rows, latents=[1], **QUICK).latents == (1, 4)
    first, second = probe_landscape(dead, rows, latents=4, **QUICK).latents
    assert first == 4 and second == probe_landscape(dead, rows, **QUICK).latents[0]


def test_without_truth_rows_tell_regions_apart():
    rows = sparse_rows()
    plain = Activations(rows.inputs, rows.inputs)
    found = probe_landscape(dictionary_of(), plain, **QUICK)
    assert all(name.startswith("row ") for name in found.map.probes) and len(found.map.probes) == 6
    assert found.map.plane[0] in found.map.probes
    assert sum(region.share for region in found.map.regions) == pytest.approx(1)
    same = probe_landscape(dictionary_of(), rows, **QUICK)
    assert same.loss == found.loss and same.latents == found.latents


def test_some_rows_stand_for_all():
    rows = sparse_rows(n=5000)
    dictionary = dictionary_of(TopKSelection(2))
    every = probe_landscape(dictionary, rows, latents=(0, 1), **(QUICK | {"n_rows": 5000, "grid": 4}))
    some = probe_landscape(dictionary, rows, latents=(0, 1), **(QUICK | {"n_rows": 1500, "grid": 4}))
    assert every.n_rows == 5000 and some.n_rows <= 1501 and some.n_samples == 5000
    assert every.loss == pytest.approx(check_health(dictionary, rows).mse, rel=1e-5)
    assert some.loss == pytest.approx(every.loss, rel=0.1)


# what must not change it ----------------------------------------------------------------------------------------------


def same(one, other, rel=1e-4):
    """Up to the rounding of single precision."""
    assert one.verdict == other.verdict
    assert one.map.profiled == pytest.approx(other.map.profiled, rel=rel, abs=1e-7)
    assert [r.label for r in one.map.regions] == [r.label for r in other.map.regions]
    for a, b in zip((*one.kicks.arms, one.kicks.random), (*other.kicks.arms, other.kicks.random), strict=True):
        assert a.end == pytest.approx(b.end, rel=1e-2, abs=1e-6)
        assert a.fate.tolist() == b.fate.tolist()
    assert one.slice.convex_in_each == other.slice.convex_in_each


@pytest.mark.parametrize("sigma", [None, TopKSelection(2)])
def test_the_order_of_latents_and_the_blocks_change_nothing(sigma):
    rows, dictionary = sparse_rows(), dictionary_of(sigma)
    found = probe_landscape(dictionary, rows, **QUICK)
    assert all(arm.fate.max() < len(FATES) for arm in found.kicks.arms)
    same(found, probe_landscape(dictionary, rows, **QUICK))
    order = torch.randperm(14, generator=seeded(8)).tolist()
    moved = probe_landscape(permuted(dictionary, order), rows, **QUICK)
    assert tuple(order[i] for i in moved.latents) == found.latents
    same(found, moved)
    for block in (1, 7, 500):
        same(found, observe(dictionary, rows, [check_health, (probe_landscape, QUICK)], block=block)[1])


def test_rescaling_rows_inversely_changes_nothing():
    rows, plain = sparse_rows(), dictionary_of()
    sizes = 0.5 + 2 * torch.rand(14, 1, generator=seeded(2))
    rescaled = SparseDictionary(plain.W_enc.detach() * sizes, plain.W_dec.detach() / sizes).eval()
    scaled = SparseDictionary(plain.W_enc.detach() / 4, plain.W_dec.detach() * 3, input_scale=4.0, target_scale=3.0).eval()
    found = probe_landscape(plain, rows, **QUICK)
    for other in (rescaled, scaled):
        same(found, probe_landscape(other, rows, latents=found.latents, **QUICK))


def test_silent_latents_and_zero_rows_have_numbers():
    for dictionary in (
        SparseDictionary(torch.zeros(3, 10), torch.zeros(3, 10)).eval(),
        dictionary_of(b_enc=torch.full((14,), -9.0)),
        dictionary_of(TopKSelection(1), n_latents=2),
    ):
        found = probe_landscape(dictionary, sparse_rows(), **QUICK)
        finite(found.kicks), finite(found.slice), finite(found.map.profiled), finite(found.map.profiled_here)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"latents": (1, 1)}, "different ids from 0 to 13"),
        ({"latents": 14}, "different ids from 0 to 13"),
        ({"grid": 2}, "grid is 2; give 4"),
        ({"n_kicks": 0}, "n_kicks is 0"),
        ({"sigmas": ()}, "above zero"),
        ({"sigmas": (0.1, -1.0)}, "above zero"),
        ({"ratio": 0.0}, "ratio is 0.0"),
    ],
)
def test_settings_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        probe_landscape(dictionary_of(), sparse_rows(n=20), **settings)


def test_one_latent_has_no_pair():
    with pytest.raises(ValueError, match="n_latents is 1"):
        probe_landscape(dictionary_of(n_latents=1), sparse_rows(n=20))
