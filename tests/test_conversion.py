"""A selection turned into thresholds: the same L0 on planted numbers, exact where the selection is pointwise already."""

import pytest
import torch

from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.methods.relu import Rectified
from sdl_explorer.models.methods.topk import BatchTopKSelection, TopKSelection
from sdl_explorer.models.rewrites import as_jumprelu

# with W_enc = identity these rows are the pre-activations
PLANTED = torch.tensor([[5.0, 4.0, 1.0, -1.0], [0.5, 3.0, 2.0, -2.0], [6.0, 0.1, 0.2, -3.0]])


def dictionary(sigma, n_latents=4, d=None, seed=0):
    if d is None:
        return SparseDictionary(torch.eye(4), torch.eye(4), nonlinearity=sigma).eval()
    generator = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(n_latents, d, generator=generator), dim=1)
    b_enc = 0.1 * torch.randn(n_latents, generator=generator)
    return SparseDictionary(W, W, b_enc, torch.randn(d, generator=generator), sigma).eval()


def test_one_threshold_is_the_planted_one():
    """TopK(1) keeps 5, 3 and 6 of PLANTED; the three largest of all are 6, 5, 4, so the edge is between 4 and 3."""
    converted = as_jumprelu(dictionary(TopKSelection(1)), PLANTED)
    torch.testing.assert_close(converted.nonlinearity.threshold, torch.full((4,), 3.5))
    expected = torch.tensor([[5.0, 4.0, 0, 0], [0, 0, 0, 0], [6.0, 0, 0, 0]])
    assert torch.equal(converted.encode(PLANTED).dense(), expected)


def test_thresholds_per_latent_are_the_planted_ones():
    """Latent 0 fires twice (6, 5; next 0.5), latent 1 once (4 is above 3), 2 and 3 never (2 and nothing above 0)."""
    converted = as_jumprelu(dictionary(TopKSelection(1)), PLANTED, per_latent=True)
    torch.testing.assert_close(converted.nonlinearity.threshold, torch.tensor([2.75, 3.5, 2.0, 0.0]), rtol=1e-4, atol=0)
    assert torch.equal((converted.encode(PLANTED).dense() > 0).sum(dim=0), torch.tensor([2, 1, 0, 0]))


@pytest.mark.parametrize("per_latent", [False, True])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_l0_stays(k, per_latent):
    """With k=40 of 40, most rows have fewer than k positive pre-activations, and L0 is what fires, not k."""
    topk, rows = dictionary(TopKSelection(k), n_latents=40, d=12), torch.randn(300, 12, generator=torch.Generator().manual_seed(1))
    converted = as_jumprelu(topk, rows, per_latent)
    before, after = topk.encode(rows), converted.encode(rows)
    assert after.l0 == before.l0 and (k == 40 or before.l0 == k)
    if per_latent:
        assert torch.equal((after.dense() > 0).sum(dim=0), (before.dense() > 0).sum(dim=0))
    assert (converted.nonlinearity.threshold >= 0).all()
    pre = topk.pre(rows)
    assert torch.equal(after.dense(), torch.where(after.dense() > 0, pre, 0.0))


def test_blocks_change_nothing(monkeypatch):
    topk, rows = dictionary(TopKSelection(3), n_latents=40, d=12), torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    whole = [as_jumprelu(topk, rows, each).nonlinearity.threshold for each in (False, True)]
    monkeypatch.setattr("sdl_explorer.models.rewrites.BLOCK", 130)
    for threshold, each in zip(whole, (False, True), strict=True):
        torch.testing.assert_close(as_jumprelu(topk, rows, each).nonlinearity.threshold, threshold)


@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_batchtopk_is_exact_and_asks_for_no_rows(threshold):
    sigma = BatchTopKSelection(3)
    sigma.threshold.fill_(threshold)
    batch, rows = dictionary(sigma, n_latents=40, d=12), torch.randn(200, 12, generator=torch.Generator().manual_seed(1))
    converted = as_jumprelu(batch, bandwidth=0.02)
    assert torch.equal(converted.encode(rows).dense(), batch.encode(rows).dense())
    assert torch.equal(converted(rows).reconstruction, batch(rows).reconstruction)
    assert isinstance(converted.nonlinearity, JumpRectified) and converted.nonlinearity.bandwidth == 0.02
    assert isinstance(batch.nonlinearity, BatchTopKSelection) and not converted.training


def test_relu_and_jumprelu_stay_what_they_are():
    rows = torch.randn(200, 12, generator=torch.Generator().manual_seed(1))
    relu, jump = dictionary(Rectified(), n_latents=20, d=12), dictionary(JumpRectified(20), n_latents=20, d=12)
    with torch.no_grad():
        jump.nonlinearity.threshold.uniform_(0, 1, generator=torch.Generator().manual_seed(2))
    for before in (relu, jump):
        assert torch.equal(as_jumprelu(before).encode(rows).dense(), before.encode(rows).dense())
    assert as_jumprelu(jump) is not jump


@pytest.mark.parametrize("per_latent", [False, True])
def test_separated_strengths_are_coded_alike_on_new_rows(per_latent):
    """Each row has k of the orthonormal features, at strengths from 0.5 to 1, in small noise: both selections find them."""
    generator = torch.Generator().manual_seed(0)
    W = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    codes = torch.zeros(2_000, 16).scatter_(1, torch.rand(2_000, 16, generator=generator).argsort()[:, :3], 0.5)
    codes *= 1 + torch.rand(2_000, 16, generator=generator)
    fit, judge = (codes @ W + 0.01 * torch.randn(2_000, 16, generator=generator)).chunk(2)
    topk = SparseDictionary(W, W, nonlinearity=TopKSelection(3)).eval()
    found = as_jumprelu(topk, fit, per_latent).encode(judge).dense()
    torch.testing.assert_close(found, topk.encode(judge).dense())
    assert torch.equal(found > 0, codes[1_000:] > 0)


def test_what_does_not_convert_says_why():
    with pytest.raises(ValueError, match="TopK threshold is estimated on rows of the data"):
        as_jumprelu(dictionary(TopKSelection(1)))
    with pytest.raises(TypeError, match="Pointwise selects by more"):
        as_jumprelu(dictionary(torch.tanh))


def test_the_assumption_is_on_record():
    source = dictionary(TopKSelection(1))
    source.provenance = {"format": "saelens"}
    assert as_jumprelu(source, PLANTED).provenance["assumptions"] == [
        "TopKSelection({'k': 1}) replaced by thresholds with the same L0 on 3 rows"
    ]
    assert "assumptions" not in source.provenance
