"""Planted dictionaries whose answers are known, read by every finding in one pass, in any order of latents and with noise in the rows."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations, Truth
from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.diagnosis.meanings import suspect_polysemantic
from sdl_explorer.diagnosis.observe import observe
from sdl_explorer.diagnosis.patterns import trace_patterns
from sdl_explorer.diagnosis.recovery import score_recovery
from sdl_explorer.diagnosis.redundancy import find_redundant
from sdl_explorer.models.dictionary import SparseDictionary

N, N_FEATURES = 3_000, 6
ALL = [check_health, align, trace_patterns, score_recovery, suspect_polysemantic, find_redundant]
ORDERS = [lambda m: torch.arange(m), lambda m: torch.randperm(m, generator=torch.Generator().manual_seed(3))]


def rows(noise: float, rate: float = 0.05, rare: float | None = None) -> Activations:
    """Orthonormal features, each alone or beside others; the last one at the rate `rare`."""
    g = torch.Generator().manual_seed(0)
    rates = torch.full((N_FEATURES,), rate)
    if rare is not None:
        rates[-1] = rare
    codes = (0.5 + torch.rand(N, N_FEATURES, generator=g)) * (torch.rand(N, N_FEATURES, generator=g) < rates)
    features = torch.eye(N_FEATURES)
    x = codes @ features + noise * torch.randn(N, N_FEATURES, generator=g)
    return Activations(x, x, Truth(codes, features, features))


def read(W_enc, W_dec, b_enc, order, activations, **settings):
    """The findings by name, of the latents put in the order; and where each planted latent went."""
    dictionary = SparseDictionary(W_enc[order], W_dec[order].clone(), b_enc[order], torch.zeros(N_FEATURES)).eval()
    found = observe(dictionary, activations, [(f, settings if f in (trace_patterns, find_redundant) else {}) for f in ALL])
    return dict(zip([f.__name__ for f in ALL], found, strict=True)), order.argsort().numpy()


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("order", ORDERS)
def test_the_constructed_optimum(order, noise):
    eye = torch.eye(N_FEATURES)
    found, at = read(eye, eye, torch.full((N_FEATURES,), -0.1), order(N_FEATURES), rows(noise))
    assert found["align"].recovery(0.95, side="decoder", scoring="all") == found["align"].recovery(0.95, side="encoder", scoring="all") == 1
    assert (found["trace_patterns"].status == "mono").all()
    np.testing.assert_allclose(found["trace_patterns"].effective_features, 1, atol=0.05)
    recovery = found["score_recovery"]
    assert (
        recovery.feature[at].tolist() == list(range(N_FEATURES))
        and recovery.mean_f1 > 0.999
        and recovery.status.tolist() == ["recovered"] * 6
    )
    assert not found["suspect_polysemantic"].candidate.any()
    spare = found["find_redundant"]
    assert not (spare.dead | spare.unseen | spare.duplicate | spare.weak | spare.dense).any()
    assert found["check_health"].unexplained_variance < 0.05


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("order", ORDERS)
def test_a_merged_pair_a_copy_a_dead_and_a_nearly_dead_latent(order, noise):
    """Latent 0 stands for features 0 and 1; 1 for 2; 2 copies 1; 3 for 3; 4 for the rare 5; 5 never fires; feature 4 is nobody's."""
    eye = torch.eye(N_FEATURES)
    pair = normalize(eye[0] + eye[1], dim=0)
    W = torch.stack([pair, eye[2], eye[2], eye[3], eye[5], -eye.sum(dim=0)])
    silent = torch.tensor([0, 0, 0, 0, 0, 9_000])
    W_dec = normalize(W, dim=1)
    activations = rows(noise, rare=0.004)
    arranged = order(6)
    found, at = read(W, W_dec, torch.full((6,), -0.1), arranged, activations, samples_since_fired=silent[arranged], dead_after=5_000)
    patterns, recovery, spare = found["trace_patterns"], found["score_recovery"], found["find_redundant"]
    assert patterns.status[at].tolist() == ["poly", "mono", "mono", "mono", "mono", "dead"]
    np.testing.assert_allclose(patterns.effective_features[at[0]], 2, atol=0.05)
    assert set(patterns.features_of(int(at[0]), 0.5).tolist()) == {0, 1}
    assert found["suspect_polysemantic"].candidate[at].tolist() == [True, False, False, False, False, False]
    assert spare.dead[at].tolist() == [False] * 5 + [True]
    assert spare.duplicate[at].tolist() == [False, True, True, False, False, False]
    rate = found["check_health"].firing_rate[at]
    assert 0 < rate[4] < 0.01 and rate[5] == 0, "nearly dead is alive"
    assert recovery.status.tolist()[:2] == ["merged", "merged"] and recovery.status[2] == "one-to-many" and recovery.status[4] == "missed"
    assert recovery.status[3] == recovery.status[5] == "recovered"


@pytest.mark.parametrize("noise", [0.0, 1e-4])
@pytest.mark.parametrize("order", ORDERS)
def test_zero_loss_without_recovery(order, noise):
    """[A; -A] of an orthogonal A rebuilds every row through a ReLU (arXiv 2512.05534, figure 4), and its rows are no features."""
    A = torch.eye(N_FEATURES) - 2 / N_FEATURES  # a reflection: no row is closer to a feature than 2/3
    W = torch.cat([A, -A])
    found, at = read(W, W, torch.zeros(12), order(12), rows(noise))
    assert found["check_health"].unexplained_variance < 1e-6
    assert found["align"].recovery(0.95, side="decoder", scoring="all") == 0
    for i in range(12):
        assert set(found["trace_patterns"].features_of(int(at[i]), 0.5).tolist()) == set((W[i] > 0).nonzero()[:, 0].tolist())
    assert (found["score_recovery"].explained_variance > 1 - 1e-6) and not (found["score_recovery"].status == "recovered").any()
