"""score_recovery against sae_lens.synthetic's own evaluation, of the same saved model on the same rows, to 1e-6."""

import pytest
import torch
from sae_lens import SAE
from sae_lens.synthetic.evals import eval_sae_on_synthetic_data
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations, Truth
from sdl_explorer.diagnosis.recovery import score_recovery
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.methods.topk import BatchTopKSelection, TopKSelection

D, N = 24, 3000


class Features:
    """What sae_lens asks of a feature dictionary."""

    def __init__(self, vectors):
        self.feature_vectors = vectors

    def __call__(self, codes):
        return codes @ self.feature_vectors


class Codes:
    """The rows, in order, as its generator gives them."""

    def __init__(self, codes):
        self.codes, self.at = codes, 0

    def sample(self, n):
        self.at += n
        return self.codes[self.at - n : self.at]


def sigma(name, n_latents):
    if name == "topk":
        return TopKSelection(4)
    if name == "batchtopk":
        chosen = BatchTopKSelection(4)
        chosen.threshold.fill_(0.6)
        chosen.n_averaged.fill_(3)
        return chosen
    if name == "jumprelu":
        chosen = JumpRectified(n_latents)
        chosen.threshold.data = 0.2 + torch.rand(n_latents)
        return chosen
    return None


@pytest.mark.parametrize("method", ["relu", "topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize(("n_features", "n_latents"), [(40, 60), (60, 30)])
def test_every_number_equals_theirs(method, n_features, n_latents, tmp_path):
    g = torch.Generator().manual_seed(n_latents)
    vectors = normalize(torch.randn(n_features, D, generator=g), dim=1)
    codes = (1 + torch.randn(N, n_features, generator=g)).relu() * (torch.rand(N, n_features, generator=g) < 0.06)
    copied = vectors[torch.randint(n_features, (n_latents,), generator=g)] + 0.15 * torch.randn(n_latents, D, generator=g)
    length = 0.3 + 3 * torch.rand(n_latents, 1, generator=g)  # decoder norms are not 1, signs and biases vary, two latents are dead
    W_enc, b_enc = copied / length, -0.2 * torch.rand(n_latents, generator=g)
    W_enc[:2], b_enc[:2] = 0, -1
    W_dec = copied * length * torch.where(torch.rand(n_latents, 1, generator=g) < 0.1, -1, 1)
    ours = SparseDictionary(W_enc, W_dec, b_enc, 0.05 * torch.randn(D, generator=g), sigma(method, n_latents)).eval()
    ours.save(tmp_path / "model", format="saelens")
    theirs = SAE.load_from_disk(str(tmp_path / "model"))
    loaded = SparseDictionary.load(tmp_path / "model", format="saelens")

    expected = eval_sae_on_synthetic_data(theirs, Features(vectors), Codes(codes), num_samples=N, batch_size=500)
    x = codes @ vectors
    found = score_recovery(loaded, Activations(x, x, Truth(codes, vectors, vectors)))

    assert 0.2 < expected.mcc < 0.99 and 0.05 < expected.classification.f1_score < 0.99 and expected.dead_latents >= 2
    assert found.mcc == pytest.approx(expected.mcc, abs=1e-6)
    assert found.uniqueness == pytest.approx(expected.uniqueness, abs=1e-9)
    assert found.mean_f1 == pytest.approx(expected.classification.f1_score, abs=1e-6)
    assert found.precision.mean() == pytest.approx(expected.classification.precision, abs=1e-6)
    assert found.recall.mean() == pytest.approx(expected.classification.recall, abs=1e-6)
    assert found.accuracy.mean() == pytest.approx(expected.classification.accuracy, abs=1e-6)
    assert found.l0 == pytest.approx(expected.sae_l0, abs=1e-6)
    assert found.true_l0 == pytest.approx(expected.true_l0, abs=1e-6)
    assert found.shrinkage == pytest.approx(expected.shrinkage, abs=1e-6)
    assert found.explained_variance == pytest.approx(expected.explained_variance, abs=1e-6)
    assert found.silent.sum() == expected.dead_latents
