"""Each loss term against its formula in plain numpy, on dense and on sparse latents, and what its gradient reaches."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.hierarchy import HierarchyBench
from sdl_explorer.models import terms
from sdl_explorer.models.dictionary import Latents, SparseDictionary
from sdl_explorer.models.methods import Context, JumpReLU, ReLU
from sdl_explorer.training.loop import train
from sdl_explorer.training.state import Schedule, TrainState

N, N_LATENTS, D = 40, 7, 4


def codes() -> torch.Tensor:
    """Rows with 0 to 7 active latents; the first is silent, and so is latent 2 everywhere."""
    z = torch.rand(N, N_LATENTS) * (torch.rand(N, N_LATENTS) < torch.linspace(0, 1, N)[:, None]) * 3
    z[0], z[:, 2] = 0.0, 0.0
    return z


def dictionary(n_latents=N_LATENTS, d=D) -> SparseDictionary:
    return SparseDictionary(torch.randn(n_latents, d), torch.randn(n_latents, d) * (torch.rand(n_latents, 1) + 0.3))


def dense(z: torch.Tensor) -> Latents:
    return Latents(z)


def sparse(z: torch.Tensor) -> Latents:
    """A different number of entries in each row, none in some."""
    row, latent = z.nonzero(as_tuple=True)
    return Latents(z[row, latent], latent, torch.cat([torch.zeros(1, dtype=torch.long), (z > 0).sum(1).cumsum(0)]), z.shape[1])


def padded(z: torch.Tensor) -> Latents:
    """As many entries in each row, some of them zero, as the top k give."""
    values, indices = z.topk(z.shape[1], dim=1)
    return Latents.rows_of(values, indices, z.shape[1])


KINDS = [dense, sparse, padded]


def numbers(*tensors):
    return [np.asarray(t.detach().double()) for t in tensors]


OF_LATENTS = {  # the term, and its formula in numpy
    "plain_l1": (lambda z, d: terms.plain_l1(z), lambda z, W: np.abs(z).sum(1).mean()),
    "weighted_l1": (
        terms.weighted_l1,
        lambda z, W: np.mean([sum(z[r, i] * math.hypot(*W[i]) for i in range(len(W))) for r in range(len(z))]),
    ),
    "smooth_l0": (
        lambda z, d: terms.smooth_l0(z, d, 2.5),
        lambda z, W: np.mean([sum(math.tanh(2.5 * z[r, i] * math.hypot(*W[i])) for i in range(len(W))) for r in range(len(z))]),
    ),
    "hoyer": (
        lambda z, d: terms.hoyer(z),
        lambda z, W: np.mean([np.abs(row).sum() / math.hypot(*row) if row.any() else 0.0 for row in z]),
    ),
    "dead_penalty": (lambda z, d: terms.dead_penalty(z, 0.8), lambda z, W: np.maximum(0.8 - z.mean(0), 0).mean()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OF_LATENTS)
def test_terms_of_latents_are_their_formulas(name, kind):
    term, formula = OF_LATENTS[name]
    z, d = codes(), dictionary()
    expected = formula(*numbers(z, d.W_dec))
    assert abs(expected) > 0.01
    assert term(kind(z), d).shape == ()
    assert term(kind(z), d).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", OF_LATENTS)
def test_sparse_and_dense_latents_give_the_same_gradients(name):
    term = OF_LATENTS[name][0]
    d, gradients = dictionary(), []
    for kind in KINDS:
        z = codes().requires_grad_(True) if not gradients else gradients[0][0].clone().requires_grad_(True)
        d.zero_grad()
        term(kind(z), d).backward()
        assert z.grad.isfinite().all()
        gradients.append((z.detach(), z.grad, None if d.W_dec.grad is None else d.W_dec.grad.clone()))
    active = gradients[0][0] > 0  # a sparse latent has no gradient where it has no entry
    for _, of_codes, of_decoder in gradients[1:]:
        torch.testing.assert_close(of_codes[active], gradients[0][1][active])
        if of_decoder is not None:
            torch.testing.assert_close(of_decoder, gradients[0][2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OF_LATENTS)
def test_terms_of_latents_are_means_over_the_batch(name, kind):
    z, d = codes(), dictionary()
    term = OF_LATENTS[name][0]
    torch.testing.assert_close(term(kind(torch.cat([z, z])), d), term(kind(z), d))


def test_squared_error():
    recon, x = torch.randn(N, D), torch.randn(N, D)
    a, b = numbers(recon, x)
    assert terms.squared_error(recon, x).item() == pytest.approx(((a - b) ** 2).sum() / N, rel=1e-5)


# Hoyer ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_hoyer_is_one_for_one_hot_codes_and_the_root_of_n_for_dense_ones(kind):
    one_hot, constant = torch.eye(N_LATENTS) * 3.7, torch.full((5, N_LATENTS), 0.2)
    torch.testing.assert_close(terms.hoyer(kind(one_hot)), torch.tensor(1.0))
    torch.testing.assert_close(terms.hoyer(kind(constant)), torch.tensor(N_LATENTS**0.5))
    z = codes()
    torch.testing.assert_close(terms.hoyer(kind(9 * z)), terms.hoyer(kind(z)))


def test_descending_hoyer_makes_codes_sparser():
    z = torch.rand(6, N_LATENTS, requires_grad=True)
    before = terms.hoyer(Latents(z)).item()
    for _ in range(200):
        (gradient,) = torch.autograd.grad(terms.hoyer(Latents(z)), z)
        with torch.no_grad():
            z.sub_(gradient).clamp_(min=0)
    assert before > 2 and terms.hoyer(Latents(z)).item() < 1.05
    assert ((z > 0).sum(1) == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_hoyer_of_silent_rows_is_zero_with_a_finite_gradient(kind):
    z = torch.zeros(4, N_LATENTS, requires_grad=True)
    latents = kind(z)
    loss = terms.hoyer(latents)
    assert loss.item() == 0.0
    loss.backward()
    assert z.grad is not None and not z.grad.any()


# dead latents ----------------------------------------------------------------------------------------------------------


def half_silent(n=60):
    """A dictionary in which latents 0 to 2 never fire on x, and x."""
    d, x = dictionary(), torch.randn(n, D)
    with torch.no_grad():
        d.b_enc[:3] = -100.0
    return d, x


def test_the_dead_penalty_revives_nothing():
    """It sees the silent latents and its gradient does not: no step of any size changes their encoder."""
    d, x = half_silent()
    loss = terms.dead_penalty(d.encode(x), floor=50.0)
    assert loss.item() > 3 * 50.0 / N_LATENTS - 1e-3, "the dead latents are in the loss"
    loss.backward()
    assert not d.W_enc.grad[:3].any() and not d.b_enc.grad[:3].any()
    assert (d.W_enc.grad[3:].abs().sum(1) > 0).all() and (d.b_enc.grad[3:] < 0).all()
    before = d.b_enc.detach().clone()
    with torch.no_grad():
        d.b_enc.sub_(1e3 * d.b_enc.grad)
    assert torch.equal(d.b_enc[:3], before[:3])


def test_pre_activation_loss_is_its_formula():
    d, pre, threshold = dictionary(), torch.randn(N, N_LATENTS), torch.rand(N_LATENTS)
    p, t, W = numbers(pre, threshold, d.W_dec)
    each = np.array([[max(t[i] - p[r, i], 0) * math.hypot(*W[i]) for i in range(N_LATENTS)] for r in range(N)])
    assert terms.pre_activation_loss(pre, d, threshold).item() == pytest.approx(each.sum(1).mean(), rel=1e-5)
    among = torch.arange(N_LATENTS) % 2 == 0
    assert terms.pre_activation_loss(pre, d, threshold, among).item() == pytest.approx(each[:, ::2].sum(1).mean(), rel=1e-5)
    assert terms.pre_activation_loss(pre, d, threshold, among & ~among).item() == 0.0


def test_pre_activation_loss_revives_dead_latents():
    d, x = half_silent()
    optimiser = torch.optim.Adam([d.W_enc, d.b_enc], lr=2.0)
    dead = ~d.encode(x).fired()
    assert dead.tolist() == [True] * 3 + [False] * (N_LATENTS - 3)
    others = d.W_enc.detach()[3:].clone()
    for _ in range(60):
        optimiser.zero_grad()
        terms.pre_activation_loss(d.pre(x), d, torch.zeros(()), dead).backward()
        assert not d.W_enc.grad[3:].any(), "only those it is asked for"
        optimiser.step()
    assert d.encode(x).fired().all()
    assert torch.equal(d.W_enc[3:], others)


# the decoder -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_latents", "d"), [(7, 4), (3, 9), (5, 5), (1, 4)])
def test_decoder_diversity_is_the_mean_squared_cosine_of_pairs(n_latents, d):
    made = dictionary(n_latents, d)
    (W,) = numbers(made.W_dec)
    pairs = [np.dot(a, b) ** 2 / (a @ a) / (b @ b) for i, a in enumerate(W) for j, b in enumerate(W) if i != j]
    assert terms.decoder_diversity(made).item() == pytest.approx(np.mean(pairs) if pairs else 0.0, rel=1e-4, abs=1e-7)


def test_decoder_diversity_of_orthogonal_equal_and_missing_rows():
    of = lambda W: terms.decoder_diversity(SparseDictionary(W, W)).item()
    assert of(3 * torch.eye(4)) == pytest.approx(0.0, abs=1e-6)
    assert of(torch.ones(9, 4)) == pytest.approx(1.0, abs=1e-5)
    assert of(torch.tensor([[1.0, 0], [2.0, 0], [0, 0]])) == pytest.approx(2 / 6, abs=1e-6)


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation gives back."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_decoder_diversity_makes_nothing_of_size_n_latents_squared():
    made = dictionary(2_000, 16)
    with Sizes() as sizes:
        terms.decoder_diversity(made).backward()
    assert sizes.largest == 2_000 * 16


def test_decoder_diversity_gradient():
    made = dictionary(9, 4).double()
    terms.decoder_diversity(made).backward()
    again = made.W_dec.detach().clone().requires_grad_(True)
    cosines = torch.cosine_similarity(again[:, None], again[None], dim=2)
    (cosines.square().sum() - 9).div(72).backward()
    torch.testing.assert_close(made.W_dec.grad, again.grad)


def test_tie_distance():
    made = dictionary()
    W_enc, W_dec = numbers(made.W_enc, made.W_dec)
    loss = terms.tie_distance(made)
    assert loss.item() == pytest.approx(((W_enc - W_dec) ** 2).sum(), rel=1e-5)
    loss.backward()
    torch.testing.assert_close(made.W_enc.grad, -made.W_dec.grad)
    torch.testing.assert_close(made.W_enc.grad, 2 * (made.W_enc - made.W_dec).detach())


# as options of methods -------------------------------------------------------------------------------------------------


def one_step(method, silent=0):
    """A dictionary of the method, its encoding of some rows, and its losses after `silent` samples of silence."""
    made = method.build(D, D, N_LATENTS, torch.Generator().manual_seed(0)).train()
    with torch.no_grad():
        made.W_dec.mul_(torch.rand(N_LATENTS, 1) + 0.5)
    x = torch.randn(N, D)
    encoding = made(x)
    dead = torch.zeros(N_LATENTS, dtype=torch.long)
    dead[:3] = silent
    return made, encoding, method.objective(made, encoding, Activations(x, x), Context(0, dead, None, torch.Generator(), dead_after=100))


def test_relu_penalty_is_weighted_or_plain():
    made, encoding, losses = one_step(ReLU(l1=0.7))
    torch.testing.assert_close(losses["l1"], 0.7 * terms.weighted_l1(encoding.latents, made))
    made, encoding, losses = one_step(ReLU(l1=0.7, penalty="plain"))
    torch.testing.assert_close(losses["l1"], 0.7 * encoding.latents.dense().sum(1).mean())
    assert not torch.allclose(terms.plain_l1(encoding.latents), terms.weighted_l1(encoding.latents, made))
    assert ReLU().penalty == "weighted"


def test_relu_penalties_are_one_with_unit_norm():
    made = ReLU(unit_norm=True).build(D, D, N_LATENTS, torch.Generator().manual_seed(0))
    latents = made.encode(torch.randn(N, D))
    torch.testing.assert_close(terms.plain_l1(latents), terms.weighted_l1(latents, made))


def test_jumprelu_penalty_is_a_step_or_a_tanh_of_which_l0_target_is_the_target():
    assert JumpReLU().penalty == "step"
    made, encoding, losses = one_step(JumpReLU(l0=2.0))
    torch.testing.assert_close(losses["l0"], 2 * encoding.latents.l0)
    assert set(losses) == {"error", "l0"}
    made, encoding, losses = one_step(JumpReLU(l0=2.0, penalty="tanh", tanh_scale=1.5))
    codes, norms = encoding.latents.dense(), made.W_dec.norm(dim=1)
    smooth = torch.tanh(1.5 * codes * norms).sum(1).mean()
    torch.testing.assert_close(losses["l0"], 2 * smooth)
    losses["l0"].backward()
    assert made.W_enc.grad.any() and made.W_dec.grad.any(), "it reaches the encoder and the decoder norms"
    made, encoding, losses = one_step(JumpReLU(l0=2.0, penalty="tanh", tanh_scale=1.5, l0_target=2.0))
    torch.testing.assert_close(losses["l0"], 2 * (terms.smooth_l0(encoding.latents, made, 1.5) / 2 - 1) ** 2)


def test_jumprelu_lifts_dead_latents_alone():
    made, encoding, losses = one_step(JumpReLU(pre_loss=0.5, threshold=2.0), silent=100)
    each = (2.0 - encoding.pre).relu() * made.W_dec.norm(dim=1)
    torch.testing.assert_close(losses["pre"], 0.5 * each[:, :3].sum(1).mean())
    losses["pre"].backward()
    assert (made.b_enc.grad[:3] < 0).all() and not made.b_enc.grad[3:].any()
    assert (made.nonlinearity.threshold.grad[:3] > 0).all() and not made.nonlinearity.threshold.grad[3:].any()
    assert one_step(JumpReLU(pre_loss=0.5), silent=99)[2]["pre"] == 0.0


@pytest.mark.slow
def test_jumprelu_brings_dead_latents_back_in_training():
    """The same run with and without the pre-activation loss, from a start with a quarter of the latents far below."""

    def still_dead(pre_loss: float) -> int:
        source = HierarchyBench(parents=2, children=2, independent=2, d_in=8)
        method = JumpReLU(l0=1e-3, bandwidth=0.1, pre_loss=pre_loss)
        made = method.build(8, 8, 16, torch.Generator().manual_seed(0))
        with torch.no_grad():
            made.b_enc[:4] = -1.5
        state = TrainState.start(made, Schedule(lr=1e-2), dead_after=500)
        steps = train(state, method, source, batch_size=64)
        for _ in range(300):
            next(steps)
        return int(state.dead[:4].sum())

    assert still_dead(0.0) == 4
    assert still_dead(0.1) == 0
