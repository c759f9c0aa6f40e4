"""Examples: top rows against a sort, random ones against the uniform distribution, strata against quantiles."""

import numpy as np
import pytest
import torch

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis import examples
from sdl_explorer.diagnosis.examples import KINDS, activations_of, find_examples
from sdl_explorer.diagnosis.observe import observe
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import TopK


def pair(n=300, n_latents=7, d=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g)
    W = torch.randn(n_latents, d, generator=g)
    return SparseDictionary(W, W, b_enc=torch.linspace(-6, 1, n_latents)), Activations(x, x)


def codes_of(dictionary, activations):
    return torch.relu(dictionary.pre(activations.inputs)).detach().numpy()


@pytest.mark.parametrize("block", [None, 11])
def test_examples_are_firing_rows_with_their_values_and_top_is_a_sort(device, block):
    dictionary, activations = pair()
    z = codes_of(dictionary, activations)
    (found,) = observe(dictionary.to(device), activations, [(find_examples, {"n_each": 4})], block=block)
    np.testing.assert_array_equal(found.n_fires, (z > 0).sum(0))
    np.testing.assert_allclose(found.highest, z.max(0), rtol=1e-5)
    for latent in range(7):
        shown = found.of(latent)
        for example in shown:
            assert example.value == pytest.approx(z[example.row, latent], rel=1e-5)
            assert example.value > 0
        for kind in KINDS:
            rows = [e.row for e in found.of(latent, kind)]
            assert len(rows) == len(set(rows)) == min(4, found.n_fires[latent])
        assert [e.row for e in found.of(latent, "top")] == list(np.argsort(-z[:, latent])[: min(4, found.n_fires[latent])])
        quantile = [e.value for e in found.of(latent, "quantile")]
        assert quantile == sorted(quantile, reverse=True)
        assert [e.kind for e in shown] == sorted((e.kind for e in shown), key=KINDS.index)


def test_a_latent_that_never_fires_has_none():
    dictionary, activations = pair()
    with torch.no_grad():
        dictionary.b_enc[0] = -1e4
    found = find_examples(dictionary, activations)
    assert found.of(0) == ()
    assert (found.n_fires[0], found.highest[0]) == (0, 0)
    assert len(found.of(6)) == 24


@pytest.mark.slow
def test_random_examples_are_uniform_over_the_firing_rows():
    x = torch.arange(1.0, 13.0)[:, None] * torch.tensor([[1.0, -1.0]])
    x[::3] *= -1  # latent 0 fires on rows 1, 2, 4, 5, ...
    dictionary, activations = SparseDictionary(torch.eye(2), torch.eye(2)), Activations(x, x)
    counts = np.zeros(12)
    for seed in range(400):
        for example in find_examples(dictionary, activations, n_each=2, seed=seed).of(0, "random"):
            counts[example.row] += 1
    firing = np.arange(12) % 3 != 0
    assert counts[~firing].sum() == 0
    assert (abs(counts[firing] - 100) < 45).all()  # 4.8 standard deviations


def test_quantile_examples_span_the_activations():
    x = torch.linspace(0.01, 1, 1000)[torch.randperm(1000, generator=torch.Generator().manual_seed(1)), None]
    found = find_examples(SparseDictionary(torch.ones(1, 1), torch.ones(1, 1)), Activations(x, x), n_each=10)
    values = np.array([e.value for e in found.of(0, "quantile")])
    np.testing.assert_allclose(values, np.linspace(0.95, 0.05, 10), atol=0.25)
    assert values.max() - values.min() > 0.6
    assert found.of(0, "top")[-1].value > 0.98


def test_the_seed_decides_and_memory_is_bounded(monkeypatch):
    dictionary, activations = pair()
    same = [find_examples(dictionary, activations, n_each=3, seed=5).rows for _ in range(2)]
    other = find_examples(dictionary, activations, n_each=3, seed=6).rows
    np.testing.assert_array_equal(*same)
    assert not np.array_equal(same[0], other)
    monkeypatch.setattr(examples, "WAITING", 50)
    reservoir, keys = examples.Reservoir(4, 7, "cpu"), torch.rand(7, 90).round(decimals=1)
    for start in range(0, 90, 30):
        rows = torch.arange(start, start + 30).repeat(7)
        reservoir.add(torch.arange(7).repeat_interleave(30), keys[:, rows[:30]].flatten(), rows, rows.float())
        assert sum(len(part[0]) for part in reservoir.parts) <= 4 * 7 + 50
    expected = np.argsort(-keys.numpy(), axis=1, kind="stable")[:, :4]  # of equal keys the first
    np.testing.assert_array_equal(reservoir.arrays()[0], expected)
    np.testing.assert_array_equal(reservoir.arrays()[1], expected)


def test_activations_of_one_latent_on_chosen_rows():
    _, activations = pair()
    dictionary = TopK(k=2).build(5, 5, 7, torch.Generator().manual_seed(0))
    z = dictionary.eval()(activations.inputs).latents.dense().detach().numpy()
    rows = [5, 3, 299, 3]
    for latent in range(7):
        np.testing.assert_allclose(activations_of(dictionary, activations, latent, rows), z[rows, latent], rtol=1e-5)
    assert activations_of(dictionary, activations, 0, []).shape == (0,)
    with pytest.raises(ValueError, match="latent 7 does not exist; there are 7"):
        activations_of(dictionary, activations, 7, rows)


def test_what_is_refused():
    dictionary, activations = pair()
    with pytest.raises(ValueError, match="n_each is 0"):
        find_examples(dictionary, activations, n_each=0)
    found = find_examples(dictionary, activations)
    with pytest.raises(ValueError, match="latent -1 does not exist"):
        found.of(-1)
    with pytest.raises(ValueError, match="kind is 'worst'"):
        found.of(0, "worst")
