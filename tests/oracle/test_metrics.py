"""Our matching scores against those of sae-lens on the same directions."""

import pytest
import torch
from sae_lens.synthetic.evals import feature_uniqueness, mean_correlation_coefficient

from sdl_explorer.data.activations import Activations, Truth
from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.models.dictionary import SparseDictionary


def planted(n_features, n_latents, d=16, noise=0.6):
    """Noisy signed copies of features, some twice, and rows of the features' own data."""
    torch.manual_seed(4)
    features = torch.nn.functional.normalize(torch.randn(n_features, d), dim=1)
    copied = features[torch.randint(n_features, (n_latents,))]
    W_dec = copied * torch.randn(n_latents, 1).sign() + noise * torch.randn(n_latents, d) / d**0.5
    codes = torch.rand(64, n_features) * (torch.rand(64, n_features) < 0.2)
    x = codes @ features
    return SparseDictionary(W_dec.clone(), W_dec * 2.5).eval(), Activations(x, x, Truth(codes, features, features))


@pytest.mark.parametrize(("n_features", "n_latents"), [(12, 30), (30, 12), (20, 20)])
def test_mcc_equals_theirs(n_features, n_latents):
    dictionary, activations = planted(n_features, n_latents)
    found = align(dictionary, activations)
    expected = mean_correlation_coefficient(dictionary.W_dec.detach(), activations.truth.target_features)
    assert 0.3 < expected < 0.99
    assert found.mcc == pytest.approx(expected, abs=1e-5)


def test_best_features_give_their_uniqueness():
    dictionary, activations = planted(20, 40)
    W_dec, features = (
        dictionary.W_dec.detach().abs(),
        activations.truth.target_features.abs(),
    )  # positive, so that |cos| is the signed cosine
    truth = Truth(activations.truth.codes, activations.truth.input_features, torch.nn.functional.normalize(features, dim=1))
    found = align(SparseDictionary(dictionary.W_enc, W_dec), Activations(activations.inputs, activations.inputs, truth))
    unique = len(set(found.per_latent.decoder_feature.tolist())) / dictionary.n_latents
    assert unique == pytest.approx(feature_uniqueness(W_dec, truth.target_features))
