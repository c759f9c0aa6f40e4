"""Pursuits against scikit-learn, scipy and a loop in numpy, on planted codes and on rows that nothing explains."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from sklearn.linear_model import orthogonal_mp

from sdl_explorer.data.bench import LinearBench
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods.pursuit import OMP, MatchingPursuit, Pursuit, with_pursuit
from sdl_explorer.models.methods.topk import TopKSelection
from sdl_explorer.training.loop import train
from sdl_explorer.training.state import Schedule, TrainState

D, N_LATENTS = 16, 24
BOTH = [OMP, MatchingPursuit]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def atoms(n_latents=N_LATENTS, d=D, unit=True, seed=0):
    W = torch.randn(n_latents, d, generator=generator(seed))
    W = W / W.norm(dim=1, keepdim=True)
    return W if unit else W * (0.5 + torch.rand(n_latents, 1, generator=generator(seed + 1)))


def planted(W, k, n=200, seed=3):
    """Codes with exactly k of the atoms, at strengths from 1 to 2, and their sums."""
    codes = torch.zeros(n, len(W)).scatter_(1, torch.rand(n, len(W), generator=generator(seed)).argsort()[:, :k], 1.0)
    codes *= 1 + torch.rand(codes.shape, generator=generator(seed + 1))
    return codes, codes @ W


def coded(sigma, W, rows, bias=None):
    return SparseDictionary(W, W, bias, nonlinearity=sigma).eval().encode(rows).dense().detach()


# what they compute ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [True, False])
def test_omp_is_sklearns_where_no_code_is_negative(unit):
    """Planted codes: scikit-learn's OMP (of unit atoms) finds the positive codes, and so does ours."""
    W = atoms(20, 60, unit)
    _, rows = planted(W, 3)
    norms = W.norm(dim=1)
    theirs = torch.from_numpy(orthogonal_mp((W / norms[:, None]).T.double().numpy(), rows.T.double().numpy(), n_nonzero_coefs=3).T).float()
    assert (theirs >= -1e-6).all() and ((theirs > 1e-3).sum(dim=1) == 3).all()
    torch.testing.assert_close(coded(OMP(3), W, rows), theirs / norms, rtol=1e-4, atol=1e-4)


def test_omp_over_atoms_and_their_mirrors_is_sklearns_signed_omp():
    """Rows that nothing explains: with -a beside each a, a negative code of plain OMP is a positive one of ours."""
    W = atoms(20, 30)
    rows = torch.randn(300, 30, generator=generator(5))
    path = np.stack([orthogonal_mp(W.T.double().numpy(), rows.T.double().numpy(), n_nonzero_coefs=k).T for k in (1, 2, 3, 4)])
    signs = np.sign(path)
    stays = (np.abs(np.diff(signs, axis=0)) < 2).all(axis=(0, 2))  # else its atom leaves our support
    mirrored = coded(OMP(4), torch.cat([W, -W]), rows)
    ours = mirrored[:, :20] - mirrored[:, 20:]
    assert stays.mean() > 0.9
    torch.testing.assert_close(ours[torch.from_numpy(stays)], torch.from_numpy(path[-1][stays]).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unit", [True, False])
def test_omp_of_enough_rounds_is_nonnegative_least_squares(unit):
    """scipy's NNLS has no limit on the support, ours has k = 2 n_latents rounds. Many codes turn negative on the way."""
    W = atoms(24, 16, unit)
    rows = torch.randn(60, 16, generator=generator(5))
    theirs = np.stack([nnls(W.T.double().numpy(), row.double().numpy())[0] for row in rows])
    ours = coded(OMP(48), W, rows)
    torch.testing.assert_close(ours, torch.from_numpy(theirs).float(), rtol=1e-3, atol=1e-4)
    assert (ours >= 0).all() and 3 < (ours > 0).sum(dim=1).float().mean() < 16


@pytest.mark.parametrize("unit", [True, False])
def test_matching_pursuit_is_the_loop(unit):
    W = atoms(unit=unit)
    rows, k = torch.randn(50, D, generator=generator(5)), 6
    expected = np.zeros((50, N_LATENTS))
    a, repeated = W.double().numpy(), 0
    for code, row in zip(expected, rows.double().numpy(), strict=True):
        residual = row.copy()
        for _ in range(k):
            i = int(np.argmax(a @ residual / np.linalg.norm(a, axis=1)))
            value = max(a[i] @ residual, 0) / (a[i] @ a[i])
            repeated += code[i] > 0 and value > 1e-3
            code[i] += value
            residual -= value * a[i]
    assert repeated > 5  # an atom that is taken twice adds up
    torch.testing.assert_close(coded(MatchingPursuit(k), W, rows), torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sigma", BOTH)
def test_one_round_is_the_best_single_atom(sigma):
    """Each atom tried with its best non-negative code: no other one leaves less."""
    W, rows = atoms(unit=False), torch.randn(80, D, generator=generator(5))
    alone = (rows @ W.T).relu() / W.square().sum(dim=1)
    left = (rows[:, None, :] - alone[:, :, None] * W).square().sum(dim=2)
    codes = coded(sigma(1), W, rows)
    torch.testing.assert_close((rows - codes @ W).square().sum(dim=1), left.amin(dim=1))
    assert torch.equal(codes.argmax(dim=1), left.argmin(dim=1))


@pytest.mark.parametrize("sigma", BOTH)
def test_the_bias_centres(sigma):
    """b_enc = -W mu codes x as x - mu, whatever x is."""
    W, rows = atoms(), torch.randn(80, D, generator=generator(5))
    mu = 3 * torch.randn(D, generator=generator(6))
    torch.testing.assert_close(coded(sigma(4), W, rows + mu, -W @ mu), coded(sigma(4), W, rows), rtol=1e-3, atol=1e-4)


def test_omp_stops_at_a_row_that_is_explained():
    W = atoms(20, 60)
    codes, rows = planted(W, 2)
    found = coded(OMP(8), W, torch.cat([rows, torch.zeros(1, 60)]))
    torch.testing.assert_close(found[:-1], codes, rtol=1e-4, atol=1e-4)
    assert torch.equal((found > 0).sum(dim=1), torch.tensor([2] * 200 + [0]))


@pytest.mark.parametrize("sigma", BOTH)
def test_a_row_depends_on_itself_alone(sigma, monkeypatch):
    W, rows = atoms(), torch.randn(30, D, generator=generator(5))
    together = coded(sigma(5), W, rows)
    torch.testing.assert_close(torch.cat([coded(sigma(5), W, row[None]) for row in rows]), together, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("sdl_explorer.models.methods.pursuit.CHUNK", 7 * 5 * D)
    torch.testing.assert_close(coded(sigma(5), W, rows), together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sigma", BOTH)
def test_sparse_codes_decode_like_dense_ones(sigma):
    """Rows differ in count, and no row names a latent twice."""
    W = atoms()
    rows = torch.cat([torch.randn(49, D, generator=generator(5)), W[:1]])
    dictionary = SparseDictionary(W, W, nonlinearity=sigma(5))
    latents = dictionary.encode(rows)
    indices, offsets = latents.layout
    assert len(set(zip(latents.row.tolist(), indices.tolist(), strict=True))) == len(indices)
    assert latents.n == 50 and len(set(offsets.diff().tolist())) > 1 and (latents.values > 0).all()
    torch.testing.assert_close(dictionary.decode(latents), dictionary.decode(latents.dense()))
    with torch.no_grad():
        assert not torch.isclose(latents.values, dictionary.pre(rows)[latents.row, indices]).all()  # hence masks_only = False
    assert not sigma.masks_only


@pytest.mark.parametrize("sigma", BOTH)
def test_gradients_are_those_of_the_codes(sigma):
    """Finite differences in float64, through the encoder rows and the bias."""
    W, rows = atoms(8, 6, unit=False).double(), torch.randn(5, 6, generator=generator(5)).double()
    b = 0.1 * torch.randn(8, generator=generator(7)).double()

    def recon(W_enc, b_enc):
        indices, values = sigma(3).pursue(rows, W_enc, b_enc)
        return (values[:, :, None] * W[indices]).sum(dim=1)

    assert torch.autograd.gradcheck(recon, (W.clone().requires_grad_(), b.clone().requires_grad_()), eps=1e-7, atol=1e-5)


# on a trained dictionary ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("subtract", [True, False])
def test_with_pursuit_codes_over_the_decoder(subtract, orthogonal):
    """An encoder of noise around true decoder rows: the pursuit finds the planted codes that TopK cannot read."""
    W = atoms(20, 60, unit=False)
    codes, rows = planted(W, 3)
    b_dec = torch.randn(60, generator=generator(8))
    trained = SparseDictionary(
        torch.randn(20, 60, generator=generator(9)), W, None, b_dec, TopKSelection(3), subtract_b_dec=subtract
    ).eval()
    pursued = with_pursuit(trained, 3, orthogonal)
    found = pursued.encode(rows + b_dec).dense().detach()
    if orthogonal:
        torch.testing.assert_close(found, codes, rtol=1e-3, atol=1e-3)
    assert ((found > 0.3) == (codes > 0)).float().mean() > 0.98
    assert not torch.equal(trained.encode(rows + b_dec).dense() > 0, codes > 0)
    assert isinstance(trained.nonlinearity, TopKSelection) and not pursued.training


def test_omp_explains_more_than_the_trained_encoder_at_the_same_l0():
    W, rows = atoms(48, 16), torch.randn(300, 16, generator=generator(5))
    topk = SparseDictionary(W, W, nonlinearity=TopKSelection(4))
    with torch.no_grad():
        error = lambda d: float((d(rows).reconstruction - rows).square().sum(dim=1).mean())
        assert error(with_pursuit(topk, 4)) < error(with_pursuit(topk, 4, orthogonal=False)) < error(topk)


def test_with_pursuit_refuses_what_has_no_atoms():
    with pytest.raises(ValueError, match="widths 6 to 5"):
        with_pursuit(SparseDictionary(torch.randn(8, 6), torch.randn(8, 5)), 2)
    transcoder = SparseDictionary(torch.randn(8, 6), torch.randn(8, 6))
    transcoder.provenance = {"kind": "transcoder"}
    with pytest.raises(ValueError, match="this is a transcoder"):
        with_pursuit(transcoder, 2)
    with pytest.raises(ValueError, match="k is 9 and n_latents 8"):
        with_pursuit(SparseDictionary(torch.randn(8, 6), torch.randn(8, 6)), 9)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_a_pursuit_round_trips(tmp_path, orthogonal):
    rows = torch.randn(20, D, generator=generator(5))
    before = with_pursuit(SparseDictionary(atoms(), atoms(), None, torch.ones(D)), 3, orthogonal)
    before.save(tmp_path / "pursuit")
    after = SparseDictionary.load(tmp_path / "pursuit")
    assert type(after.nonlinearity) is type(before.nonlinearity) and after.nonlinearity.k == 3
    assert torch.equal(after.encode(rows).dense(), before.encode(rows).dense())


# as a method ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sae", "transcoder", "crosscoder"])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_pursuit_trains(kind, orthogonal):
    source = LinearBench(n_features=24, d_in=16, sparsity=0.9, max_interference=0.7, kind=kind)
    method = Pursuit(k=3, orthogonal=orthogonal)
    dictionary = method.build(source.width_in, source.width_out, 32, generator())
    state = TrainState.start(dictionary, Schedule(lr=1e-2))
    losses = [float(s.losses["error"]) for s in itertools.islice(train(state, method, source, batch_size=64), 80)]
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:20])
    for rows in (dictionary.W_enc, dictionary.W_dec):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(32))


def test_pursuit_checks_k():
    with pytest.raises(ValueError, match="Pursuit: k is 9 and n_latents 8"):
        Pursuit(k=9).build(4, 4, 8, generator())


def test_more_atoms_than_dimensions_are_fitted_not_refused():
    atoms = torch.nn.functional.normalize(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    atoms[7] = atoms[3]
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    dictionary = SparseDictionary(atoms, atoms, nonlinearity=OMP(12))
    codes = dictionary.encode(x).dense()
    best = torch.stack([torch.from_numpy(nnls(atoms.T.double().numpy(), row.double().numpy())[0]) for row in x])
    ours, theirs = ((x.double() - c.double() @ atoms.double()).norm(dim=1) for c in (codes.detach(), best))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
