"""Matching pursuit against sae-lens: unit rows, its early stops off."""

import pytest
import torch
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig

from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods.pursuit import with_pursuit


@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("centred", [True, False])
def test_matching_pursuit_is_saelens(k, centred):
    torch.manual_seed(0)
    W, rows = torch.nn.functional.normalize(torch.randn(32, 12), dim=1), torch.randn(200, 12)
    b_dec = torch.randn(12) if centred else torch.zeros(12)
    config = MatchingPursuitSAEConfig(
        d_in=12, d_sae=32, apply_b_dec_to_input=centred, residual_threshold=0.0, max_iterations=k, stop_on_duplicate_support=False
    )
    theirs = MatchingPursuitSAE(config)
    with torch.no_grad():
        theirs.W_dec.copy_(W)
        theirs.b_dec.copy_(b_dec)
    ours = with_pursuit(SparseDictionary(W, W, b_dec=b_dec), k, orthogonal=False)
    with torch.no_grad():
        expected = theirs.encode(rows)
        torch.testing.assert_close(ours.encode(rows).dense(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(rows).reconstruction, theirs.decode(expected), rtol=1e-5, atol=1e-5)
        assert (expected > 0).sum(dim=1).max() == k or k == 12
