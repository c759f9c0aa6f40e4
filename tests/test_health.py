"""Health against numbers worked out by hand and against a double-precision brute force."""

import numpy as np
import pytest
import torch

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.models.dictionary import SparseDictionary


def sae(rows):
    x = torch.as_tensor(rows, dtype=torch.float32)
    return Activations(x, x)


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_numbers_worked_out_by_hand():
    # latent 0 reads and writes axis 0, latent 1 writes half of axis 1, latent 2 never fires
    dictionary = SparseDictionary(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.5], [1.0, 1.0]]))
    health = check_health(dictionary, sae([[2.0, 0.0], [0.0, 4.0], [2.0, 2.0], [0.0, 0.0]]))
    assert health.n_samples == 4
    assert health.mse == pytest.approx((0 + 4 + 1 + 0) / 4)
    assert health.unexplained_variance == pytest.approx(5 / (4 * 1 + (2.5**2 + 0.5**2 + 1.5**2 + 1.5**2)))
    assert health.l0 == pytest.approx(1.0)
    assert health.utilisation == pytest.approx(2 / 3)
    np.testing.assert_allclose(health.firing_rate, [0.5, 0.5, 0.0])
    np.testing.assert_allclose(health.mean_activation, [2.0, 3.0, 0.0])
    assert health.dead.tolist() == [False, False, True]
    assert not health.unseen.any()
    assert health.samples_since_fired.tolist() == [1, 1, 4]
    assert health.shrinkage == pytest.approx((1 + 0.5 + np.sqrt(5) / np.sqrt(8)) / 3)
    assert (health.n_latents, health.n_dead, health.n_unseen) == (3, 1, 0)


def test_responses_of_a_transcoder_against_double_precision():
    g = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(400, 5, generator=g) + 2, torch.randn(400, 7, generator=g) - 1
    W_enc, W_dec, b_enc = torch.randn(8, 5, generator=g), torch.randn(8, 7, generator=g), 4 + torch.randn(8, generator=g)
    b_enc[3] = -1e3
    health = check_health(SparseDictionary(W_enc, W_dec, b_enc), Activations(inputs, targets))
    x, y, E, D = (t.double().numpy() for t in (inputs, targets, W_enc, W_dec))
    z = np.maximum(x @ E.T + b_enc.double().numpy(), 0)
    for i in range(8):
        if i == 3:
            assert health.encoder_response[i] == health.decoder_response[i] == 0
            continue
        reads = z[:, i] @ x / z[:, i].sum() - x.mean(0)
        writes = z[:, i] @ y / z[:, i].sum() - y.mean(0)
        assert health.encoder_response[i] == pytest.approx(cosine(E[i], reads), abs=1e-4)
        assert health.decoder_response[i] == pytest.approx(cosine(D[i], writes), abs=1e-4)
    errors = ((y - z @ D) ** 2).sum(1)
    assert health.mse == pytest.approx(errors.mean(), rel=1e-5)
    assert health.unexplained_variance == pytest.approx(errors.sum() / ((y - y.mean(0)) ** 2).sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("since", "dead_after", "dead", "unseen"),
    [
        (None, None, [0, 1, 1], [0, 0, 0]),
        (None, 3, [0, 0, 0], [0, 1, 1]),
        (None, 2, [0, 1, 1], [0, 0, 0]),
        ([0, 99, 100], 100, [0, 0, 1], [0, 1, 0]),
        ([500, 99, 100], 100, [1, 0, 1], [0, 1, 0]),  # what training counted decides, so that every page counts the same
        ([0, 0, 0], None, [0, 1, 1], [0, 0, 0]),
    ],
)
def test_dead_and_unseen(since, dead_after, dead, unseen):
    dictionary = SparseDictionary(torch.tensor([[1.0, 0], [-1.0, 0], [0, -1.0]]), torch.ones(3, 2))
    counts = None if since is None else torch.tensor(since)
    health = check_health(dictionary, sae([[1.0, 1.0], [2.0, 1.0]]), samples_since_fired=counts, dead_after=dead_after)
    assert health.dead.astype(int).tolist() == dead
    assert health.unseen.astype(int).tolist() == unseen
    assert health.alive.astype(int).tolist() == [1 - d - u for d, u in zip(dead, unseen, strict=True)]
    if since is not None:
        assert health.samples_since_fired.tolist() == since


def test_twice_the_rows_give_the_same_means_and_nothing_is_nan():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=g)
    dictionary = SparseDictionary(torch.randn(6, 4, generator=g), torch.randn(6, 4, generator=g))
    once, twice = check_health(dictionary, sae(x)), check_health(dictionary, sae(torch.cat([x, x])))
    for name in ("mse", "unexplained_variance", "l0", "shrinkage", "utilisation", "firing_rate", "encoder_response"):
        np.testing.assert_allclose(getattr(twice, name), getattr(once, name), rtol=1e-5)
        assert np.isfinite(getattr(once, name)).all()


def test_targets_that_do_not_vary_have_no_unexplained_variance():
    dictionary = SparseDictionary(torch.eye(2), torch.eye(2))
    health = check_health(dictionary, sae(torch.zeros(3, 2)))
    assert np.isnan(health.unexplained_variance)
    assert np.isnan(health.shrinkage)
    assert health.mse == 0


def test_what_is_refused():
    dictionary = SparseDictionary(torch.eye(2), torch.eye(2))
    with pytest.raises(ValueError, match=r"shape \(3,\) and the dictionary 2 latents"):
        check_health(dictionary, sae([[1.0, 1.0]]), samples_since_fired=torch.zeros(3))
    with pytest.raises(ValueError, match="dead_after is 0"):
        check_health(dictionary, sae([[1.0, 1.0]]), dead_after=0)
