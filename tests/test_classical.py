"""The classical baseline: planted dictionaries are found, and its encoder agrees with scikit-learn's own."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.decomposition import sparse_encode

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.bench import LinearBench
from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods.classical import Lasso, learn_classically
from sdl_explorer.models.methods.pursuit import OMP

SOURCE = LinearBench(n_features=16, d_in=20, sparsity=0.85, max_interference=0.4)


@pytest.fixture(scope="module")
def rows():
    return SOURCE.sample(1_500, torch.Generator().manual_seed(0), "train"), SOURCE.sample(1_000, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("k", [None, 4])
@pytest.mark.slow
def test_a_planted_dictionary_is_found(rows, k):
    fit, judge = rows
    learned = learn_classically(fit, 16, alpha=0.2, k=k, centre=False)
    assert align(learned, judge).recovery(tau=0.95, side="decoder", scoring="all") >= 15 / 16
    assert isinstance(learned.nonlinearity, OMP if k else Lasso)
    assert check_health(learned, judge).unexplained_variance < (0.1 if k else 0.5)  # the lasso shrinks
    torch.testing.assert_close(learned.W_dec.norm(dim=1), torch.ones(16))
    assert not learned.b_dec.any()


def test_the_mean_is_no_atom(rows):
    """Centred, a shift of the data changes nothing but b_dec."""
    fit, judge = rows[0].take(slice(0, 400)), rows[1].inputs[:100]
    far = fit.inputs + 5.0
    learned, moved = (learn_classically(Activations(x, x), 16, n_passes=2, k=3) for x in (fit.inputs, far))
    torch.testing.assert_close(moved.b_dec, learned.b_dec + 5.0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved.W_dec, learned.W_dec, rtol=0, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(moved(judge + 5.0).reconstruction - 5.0, learned(judge).reconstruction, rtol=0, atol=2e-3)


def test_random_rows_are_no_recovery(rows):
    """The atoms start as random rows: without the fit they do not pass."""
    start = torch.nn.functional.normalize(rows[0].inputs[:16], dim=1)
    found = align(SparseDictionary(start, start, nonlinearity=Lasso(0.05)), rows[1])
    assert found.recovery(tau=0.95, side="decoder", scoring="all") < 0.6


@pytest.mark.parametrize(("alpha", "n_iterations"), [(0.05, 4_000), (0.3, 500)])
def test_the_lasso_is_scikit_learns(alpha, n_iterations):
    generator = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(40, 12, generator=generator), dim=1)
    rows, mu = torch.randn(100, 12, generator=generator), torch.randn(12, generator=generator)
    theirs = sparse_encode(rows.double().numpy(), W.double().numpy(), algorithm="lasso_lars", alpha=alpha, max_iter=20_000, positive=True)
    ours = SparseDictionary(W, W, -W @ mu, mu, Lasso(alpha, n_iterations)).eval().encode(rows + mu).dense().detach()
    assert 1 < (theirs > 0).sum(axis=1).mean() < 20 and (ours >= 0).all()
    torch.testing.assert_close(ours, torch.from_numpy(theirs).float(), rtol=5e-3, atol=2e-3)
    cost = lambda z: 0.5 * np.square(rows.numpy() - z @ W.numpy()).sum(axis=1) + alpha * z.sum(axis=1)
    assert (cost(ours.numpy()) <= cost(theirs) * 1.001 + 1e-5).all()


def test_it_is_a_function_of_the_seed_and_round_trips(rows, tmp_path):
    fit, judge = rows[0].take(slice(0, 400)), rows[1].inputs[:50]
    one, again, other = (learn_classically(fit, 12, n_passes=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.W_dec, again.W_dec) and not torch.equal(one.W_dec, other.W_dec)
    one.save(tmp_path / "classical")
    loaded = SparseDictionary.load(tmp_path / "classical")
    assert torch.equal(loaded.encode(judge).dense(), one.encode(judge).dense())
    assert loaded.provenance["library"] == "scikit-learn" and loaded.provenance["metadata"]["seed"] == 1


def test_what_it_cannot_do_says_so(rows):
    pair = LinearBench(n_features=24, d_in=16, kind="transcoder").sample(50, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="a transcoder's rows"):
        learn_classically(pair, 8)
    few = rows[0].take(slice(0, 5))
    for settings, message in (
        ({"n_latents": 8}, "n_latents is 8 and there are 5 rows"),
        ({"n_latents": 4, "alpha": 0}, "alpha is 0"),
        ({"n_latents": 4, "k": 5}, "k is 5 and n_latents 4"),
    ):
        with pytest.raises(ValueError, match=message):
            learn_classically(few, **settings)


def test_importing_it_does_not_import_scikit_learn():
    code = "import sys, sdl_explorer.models.methods.classical; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
