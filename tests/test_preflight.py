"""Preflight and continuation: planted scales are found, foreign rows are turned away, penalties are told from the weights."""

import pytest
import torch

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.continuation import continued_method, estimate_penalty
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.diagnosis.preflight import preflight
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import BatchTopK, JumpReLU, Matryoshka, Pursuit, ReLU, TopK
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.methods.matryoshka import NestedSelection
from sdl_explorer.models.methods.pursuit import OMP, MatchingPursuit
from sdl_explorer.models.methods.relu import Rectified
from sdl_explorer.models.methods.topk import BatchTopKSelection, TopKSelection
from sdl_explorer.models.rewrites import scaled

D, N_FEATURES, K = 32, 28, 3
NAMES = ["relu", "topk", "batchtopk", "jumprelu"]


def world(n=400, seed=0):
    """Orthonormal features, a mean, three features a row, a little noise."""
    torch.manual_seed(seed)
    features = torch.linalg.qr(torch.randn(D, D)).Q[:N_FEATURES].contiguous()
    codes = torch.zeros(n, N_FEATURES).scatter(1, torch.rand(n, N_FEATURES).topk(K, dim=1).indices, 1.0) * (1 + torch.rand(n, N_FEATURES))
    mean = torch.randn(D) * 0.3
    return features, mean, codes @ features + mean + 0.03 * torch.randn(n, D)


def rows(x):
    return Activations(x, x)


def planted(name="topk", norm=1.0):
    """A dictionary that knows the features and the mean; its latents are 1/norm times as large as the codes."""
    features, mean, _ = world()
    if name == "topk":
        sigma = TopKSelection(K)
    elif name == "batchtopk":
        sigma = BatchTopKSelection(K)
        sigma.threshold.fill_(0.4 / norm)
        sigma.n_averaged.fill_(1)
    elif name == "jumprelu":
        sigma = JumpRectified(N_FEATURES)
        sigma.threshold.data.fill_(0.4 / norm)
    else:
        sigma = Rectified()
    b_enc = torch.full((N_FEATURES,), -0.15 if name == "relu" else -0.02) / norm
    return SparseDictionary(features / norm, features * norm, b_enc, mean, sigma, subtract_b_dec=True).eval()


@pytest.mark.parametrize("name", NAMES)
def test_own_rows_fit(name):
    dictionary, activations = planted(name), rows(world()[2])
    found, health = preflight(dictionary, activations), check_health(dictionary, activations)
    assert found.verdict == "fits"
    assert found.fits
    assert found.scale == 1
    assert found.input_norm_ratio == pytest.approx(1, abs=0.15)
    assert found.unexplained_variance == pytest.approx(health.unexplained_variance, rel=1e-5)
    assert found.l0 == pytest.approx(health.l0)
    assert found.hooks == "unknown"
    assert found.stamp.startswith("Preflight on 400 rows: fits (unexplained variance 0.0")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", [1.0, 4.0])
@pytest.mark.parametrize("s", [7.3, 0.1])
def test_a_planted_scale_is_found_and_folded(name, norm, s):
    dictionary, x = planted(name, norm), world()[2]
    found = preflight(dictionary, rows(x / s))
    assert found.fits
    assert found.verdict == f"fits after scaling by {found.scale:.3g}"
    assert found.scale == pytest.approx(s, rel=0.15)
    assert found.input_norm_ratio == pytest.approx(1 / s, rel=0.15)
    assert found.expected_norm == pytest.approx(float(x.norm(dim=1).mean()), rel=0.15)
    assert found.best_unexplained_variance < 0.1
    folded = preflight(scaled(dictionary, found.scale), rows(x / s))
    assert folded.verdict == "fits"
    assert folded.unexplained_variance == pytest.approx(found.best_unexplained_variance, rel=1e-3)
    assert folded.l0 == pytest.approx(found.best_l0, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_foreign_rows_do_not_fit(name):
    torch.manual_seed(5)
    other = torch.randn(400, D) + torch.randn(D)
    found = preflight(planted(name), rows(other))
    if name in ("topk", "batchtopk"):
        assert found.verdict == "does not fit"
    else:  # half of the dimensions on any row: the error alone proves nothing, and the stamp says so
        assert found.verdict == "does not fit" or "reconstructs almost any rows" in found.stamp


def test_a_dense_code_is_no_proof():
    """Every direction and its opposite reconstruct anything; only the L0 tells."""
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    dictionary, activations = SparseDictionary(both, both, nonlinearity=BatchTopKSelection(K)).eval(), rows(torch.randn(100, D))
    found = preflight(dictionary, activations)
    assert found.unexplained_variance < 1e-6
    assert found.verdict == "does not fit"
    assert "the file says 3 latents a row" in found.stamp
    unsaid = preflight(SparseDictionary(both, both).eval(), activations)
    assert unsaid.verdict == "fits"
    assert "reconstructs almost any rows" in unsaid.stamp


def test_permuted_dimensions_do_not_fit():
    x = world()[2][:, torch.randperm(D, generator=torch.Generator().manual_seed(1))]
    assert preflight(planted("topk"), rows(x)).verdict == "does not fit"


def test_a_wrong_width_is_a_verdict():
    found = preflight(planted(), rows(torch.randn(10, D + 1)))
    assert found.verdict == "does not fit"
    assert not found.widths_fit
    assert f"{D + 1} and {D + 1} columns" in found.stamp


def test_scale_is_one_where_it_does_not_matter():
    features, _, x = world()
    dictionary = SparseDictionary(features, features, nonlinearity=TopKSelection(K)).eval()
    found = preflight(dictionary, rows((x - x.mean(dim=0)) * 50))
    assert found.verdict == "fits"
    assert found.scale == 1


def test_a_transcoder_is_compared_with_its_targets():
    features, mean, x = world()
    W_dec = torch.randn(N_FEATURES, 9, generator=torch.Generator().manual_seed(2))
    dictionary = SparseDictionary(features, W_dec, -features @ mean, torch.ones(9), TopKSelection(K)).eval()
    with torch.no_grad():
        targets = dictionary(x).reconstruction
    assert preflight(dictionary, Activations(x, targets)).unexplained_variance < 1e-6
    assert preflight(dictionary, Activations(x / 7.3, targets / 7.3)).scale == pytest.approx(7.3, rel=0.05)
    assert preflight(dictionary, Activations(x, targets.roll(1, dims=0))).verdict == "does not fit"


@pytest.mark.parametrize(
    ("hooks", "expected"), [((), "unknown"), (("layer.3",), "match"), (("layer.4",), "mismatch"), (("layer.3", "layer.4"), "mismatch")]
)
def test_hook_names_are_compared(hooks, expected):
    dictionary = planted()
    dictionary.provenance = {"hook_name": "layer.3", "assumptions": ["taken as true"]}
    found = preflight(dictionary, rows(world()[2]), hooks)
    assert found.hooks == expected
    assert ("hook names differ" in found.stamp) == (expected == "mismatch")
    assert found.assumptions == ("taken as true",)


def test_constant_rows_do_not_fit():
    assert preflight(planted(), rows(torch.ones(20, D))).verdict == "does not fit"


def test_rows_that_cannot_be_judged_raise():
    with pytest.raises(ValueError, match="0 rows"):
        preflight(planted(), rows(torch.zeros(0, D)))
    x = world()[2].clone()
    x[3, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        preflight(planted(), rows(x))


def test_preflight_changes_nothing():
    dictionary = planted("batchtopk").train()
    before = {name: value.clone() for name, value in dictionary.state_dict().items()}
    preflight(dictionary, rows(world()[2]))
    assert dictionary.training
    assert all(torch.equal(value, before[name]) for name, value in dictionary.state_dict().items())


# continuation -----------------------------------------------------------------------------------------------------------


def trained(l1, steps=300):
    """A small ReLU dictionary brought close to stationarity under a known penalty."""
    features, mean, x = world(2000)
    torch.manual_seed(1)
    dictionary = SparseDictionary(features + 0.1 * torch.randn(N_FEATURES, D), features.clone(), None, mean)
    optimiser = torch.optim.Adam(dictionary.parameters(), lr=3e-3)
    for step in range(steps):
        batch = x[torch.arange(step * 256, (step + 1) * 256) % len(x)]
        encoding = dictionary(batch)
        error = (batch - encoding.reconstruction).square().sum(dim=1).mean()
        loss = error + l1 * (encoding.latents.values @ dictionary.W_dec.norm(dim=1)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return dictionary.eval(), rows(x)


@pytest.mark.parametrize("l1", [0.1, 0.5])
def test_the_l1_coefficient_is_told_from_the_weights(l1):
    dictionary, activations = trained(l1)
    found = estimate_penalty(dictionary, activations)
    assert found.l1 == pytest.approx(l1, rel=0.1)
    health = check_health(dictionary, activations)
    assert found.l0 == pytest.approx(health.l0)
    assert found.error == pytest.approx(health.mse, rel=1e-4)


@pytest.mark.parametrize(("name", "method"), [("relu", ReLU), ("topk", TopK), ("batchtopk", BatchTopK), ("jumprelu", JumpReLU)])
def test_each_nonlinearity_goes_on_with_its_method(name, method):
    activations = rows(world()[2])
    chosen = continued_method(planted(name), activations)
    assert type(chosen) is method
    assert chosen.unit_norm
    assert not continued_method(planted(name, norm=4.0), activations).unit_norm
    if name in ("relu", "jumprelu"):
        assert chosen.l0_target == pytest.approx(preflight(planted(name), activations).l0)
    else:
        assert chosen.k == K


@pytest.mark.parametrize("sigma", [OMP(K), MatchingPursuit(K)])
def test_a_pursuit_stays_one(sigma):
    features, _, x = world()
    chosen = continued_method(SparseDictionary(features, features, nonlinearity=sigma).eval(), rows(x))
    assert type(chosen) is Pursuit
    assert (chosen.k, chosen.orthogonal) == (K, type(sigma) is OMP)


def test_a_nested_dictionary_keeps_its_widths():
    features, _, x = world()
    nested = SparseDictionary(features, features, nonlinearity=NestedSelection(K, [N_FEATURES // 2, N_FEATURES])).eval()
    chosen = continued_method(nested, rows(x))
    assert type(chosen) is Matryoshka
    assert (chosen.k, chosen.prefixes) == (K, [N_FEATURES // 2])


def test_the_bandwidth_reaches_some_pre_activations():
    dictionary, activations = planted("jumprelu"), rows(world()[2])
    chosen = continued_method(dictionary, activations)
    with torch.no_grad():
        near = (dictionary.pre(activations.inputs) - dictionary.nonlinearity.threshold).abs() <= chosen.bandwidth / 2 * 1.001
    assert near.sum(dim=1).float().mean() == pytest.approx(0.05 * K, rel=0.1)
    assert chosen.l0 > 0


def test_continuing_needs_a_known_nonlinearity_and_a_latent_that_fires():
    features, _, x = world()
    with pytest.raises(TypeError, match="no method trains"):
        continued_method(SparseDictionary(features, features, nonlinearity=torch.tanh), rows(x))
    with pytest.raises(ValueError, match="no latent fires"):
        continued_method(SparseDictionary(features, features, torch.full((N_FEATURES,), -99.0)), rows(x))
