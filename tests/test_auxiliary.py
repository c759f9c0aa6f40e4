"""The auxiliary loss on dead latents: the published formula, who gets gradient from it, and that latents come back."""

import pytest
import torch
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.bench import LinearBench
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import BatchTopK, BatchTopKAux, Context, TopK, TopKAux
from sdl_explorer.models.methods.auxiliary import dead_error
from sdl_explorer.models.methods.topk import BatchTopKSelection, TopKSelection
from sdl_explorer.session import Session
from sdl_explorer.training.loop import train
from sdl_explorer.training.state import Schedule, TrainState

D_IN, D_OUT, N_LATENTS, K = 7, 6, 20, 3
DEAD = torch.tensor([1, 4, 5, 9, 13, 18])
METHODS = [TopKAux, BatchTopKAux]


def planted(subtract_b_dec=False, d_out=D_OUT, sigma=None) -> SparseDictionary:
    """No weight is special: norms that are not 1 and biases that are not 0."""
    d_in = d_out if subtract_b_dec else D_IN
    W_enc, W_dec = torch.randn(N_LATENTS, d_in), torch.randn(N_LATENTS, d_out)
    sigma = TopKSelection(K) if sigma is None else sigma
    return SparseDictionary(W_enc, W_dec, torch.randn(N_LATENTS), torch.randn(d_out), sigma, subtract_b_dec=subtract_b_dec).train()


def rows(n=32, d_in=D_IN, d_out=D_OUT) -> Activations:
    return Activations(torch.randn(n, d_in), torch.randn(n, d_out))


def context(dead=DEAD, n_latents=N_LATENTS) -> Context:
    silent = torch.zeros(n_latents, dtype=torch.int64)
    silent[dead] = 50
    return Context(0, silent, None, torch.Generator(), dead_after=50)


def losses_of(method, dictionary, batch, dead=DEAD) -> dict:
    return method.objective(dictionary, dictionary(batch.inputs), batch, context(dead, dictionary.n_latents))


@torch.no_grad()
def published(inputs, targets, reconstruction, weights, dead, k_aux, rectified):
    """e and e_hat of Gao et al. 2024, appendix A.2, row by row and without a tensor of the implementation."""
    residual = targets - reconstruction
    errors, centred = [], residual - residual.mean(0)
    for x, e in zip(inputs, residual, strict=True):
        scores = sorted(((float(weights["W_enc"][i] @ x + weights["b_enc"][i]), int(i)) for i in dead), reverse=True)[:k_aux]
        rebuilt = sum((max(z, 0.0) if rectified else z) * weights["W_dec"][i] for z, i in scores)
        errors.append(((e - rebuilt) ** 2).sum())
    return torch.stack(errors).mean() / (centred**2).sum(1).mean()


# the loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", ["signed", "rectified"])
@pytest.mark.parametrize("k_aux", [1, 4, 6, 50, None])
@pytest.mark.parametrize("cls", METHODS)
def test_the_loss_is_the_published_formula(cls, k_aux, sign):
    dictionary = planted(sigma=TopKSelection(K) if cls is TopKAux else BatchTopKSelection(K))
    batch = rows()
    found = losses_of(cls(k=K, aux=0.7, k_aux=k_aux, sign=sign), dictionary, batch)
    reconstruction = dictionary(batch.inputs).reconstruction
    expected = published(
        batch.inputs, batch.targets, reconstruction, dict(dictionary.named_parameters()), DEAD, k_aux or D_OUT // 2, sign == "rectified"
    )
    assert found.keys() == {"error", "aux"}
    torch.testing.assert_close(found["aux"], 0.7 * expected)
    torch.testing.assert_close(found["error"], (reconstruction - batch.targets).square().sum(1).mean())


def test_the_default_weight_is_the_published_one_and_a_latent_that_only_rests_is_left_alone():
    assert TopKAux().aux == BatchTopKAux().aux == 1 / 32
    assert TopKAux().sign == "signed"
    dictionary, batch = planted(), rows()
    resting = Context(0, torch.full((N_LATENTS,), 49), None, torch.Generator(), dead_after=50)
    assert TopKAux(k=K).objective(dictionary, dictionary(batch.inputs), batch, resting)["aux"] == 0


@pytest.mark.parametrize("cls", METHODS)
def test_without_dead_latents_it_is_the_method_itself(cls):
    plain = TopK(k=K) if cls is TopKAux else BatchTopK(k=K)
    dictionary, batch = planted(sigma=plain.nonlinearity(N_LATENTS)), rows()
    none = torch.zeros(0, dtype=torch.int64)
    losses = losses_of(cls(k=K), dictionary, batch, none)
    assert losses["aux"] == 0
    sum(losses.values()).backward()
    found = {name: p.grad.clone() for name, p in dictionary.named_parameters()}
    dictionary.zero_grad()
    losses_of(plain, dictionary, batch, none)["error"].backward()
    assert all(torch.equal(found[name], p.grad) for name, p in dictionary.named_parameters())


def test_a_residual_without_variance_gives_zero_and_no_nan():
    dictionary, one = planted(), rows(1)
    loss = losses_of(TopKAux(k=K, aux=1.0), dictionary, one)["aux"]
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in dictionary.parameters())


def test_weight_zero_leaves_it_out():
    losses = losses_of(TopKAux(k=K, aux=0.0), planted(), rows())
    assert losses["aux"] == 0 and not losses["aux"].requires_grad


def test_no_pre_activations_of_all_latents_are_needed():
    """Sparse kernels keep none: the dead rows' are made anew."""
    dictionary, batch = planted(), rows()
    encoding = dictionary(batch.inputs)
    with_pre, without = (TopKAux(k=K).objective(dictionary, e, batch, context()) for e in (encoding, encoding._replace(pre=None)))
    assert torch.equal(with_pre["aux"], without["aux"])


# gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", ["signed", "rectified"])
@pytest.mark.parametrize("subtract_b_dec", [False, True])
def test_dead_latents_alone_get_gradient(sign, subtract_b_dec):
    dictionary = planted(subtract_b_dec)
    batch = rows(d_in=dictionary.d_in)
    losses_of(TopKAux(k=K, k_aux=len(DEAD), sign=sign), dictionary, batch)["aux"].backward()
    dead = torch.zeros(N_LATENTS, dtype=torch.bool).index_fill(0, DEAD, True)
    for name in ("W_enc", "b_enc", "W_dec"):
        moved = getattr(dictionary, name).grad.reshape(N_LATENTS, -1).abs().sum(1) > 0
        assert torch.equal(moved, dead), name
    assert dictionary.b_dec.grad is None


def test_a_tied_encoder_gets_the_gradient_of_both_sides():
    method, batch = TopKAux(k=K, tie="tied", k_aux=len(DEAD)), rows(d_in=D_OUT)
    dictionary = method.build(D_OUT, D_OUT, N_LATENTS, torch.Generator().manual_seed(0))
    untied = SparseDictionary(dictionary.W_dec.detach(), dictionary.W_dec.detach(), nonlinearity=TopKSelection(K))
    for one in (dictionary, untied):
        losses_of(method, one, batch)["aux"].backward()
    torch.testing.assert_close(dictionary.W_dec.grad, untied.W_enc.grad + untied.W_dec.grad)
    assert dictionary.W_enc is dictionary.W_dec and untied.W_enc.grad.any()


@pytest.mark.parametrize(("sign", "reached"), [("signed", True), ("rectified", False)])
def test_where_every_pre_activation_is_negative_only_signed_candidates_reach_the_encoder(sign, reached):
    dictionary, batch = planted(), rows()
    with torch.no_grad():
        dictionary.b_enc[DEAD] = -30
    losses_of(TopKAux(k=K, k_aux=len(DEAD), sign=sign), dictionary, batch)["aux"].backward()
    assert (dictionary.pre(batch.inputs, DEAD) < 0).all()
    assert bool((dictionary.W_enc.grad[DEAD].abs().sum(1) > 0).all()) is reached
    assert bool(dictionary.W_enc.grad.any()) is reached
    if reached:
        dictionary.zero_grad()
        losses_of(TopKAux(k=K, sign=sign), dictionary, batch, DEAD[:1])["aux"].backward()
        assert dictionary.b_enc.grad[DEAD[0]] < 0, "descent raises the bias"


@pytest.mark.parametrize("sign", ["signed", "rectified"])
def test_gradients_agree_with_finite_differences(sign):
    dictionary, batch = planted().double(), rows()
    inputs, residual = batch.inputs.double(), torch.randn(32, D_OUT, dtype=torch.float64)
    loss = lambda: dead_error(dictionary, inputs, residual, DEAD, 4, sign)
    loss().backward()
    for name in ("W_enc", "b_enc", "W_dec"):
        p = getattr(dictionary, name)
        direction = torch.randn_like(p)
        with torch.no_grad():
            ahead = p.add_(1e-6 * direction) is p and loss()
            behind = p.sub_(2e-6 * direction) is p and loss()
            p.add_(1e-6 * direction)
        torch.testing.assert_close((ahead - behind) / 2e-6, (p.grad * direction).sum(), rtol=1e-5, atol=1e-8)


def test_the_residual_is_detached():
    dictionary, batch = planted(), rows()
    residual = (batch.targets - dictionary(batch.inputs).reconstruction).requires_grad_()
    residual.retain_grad()
    dead_error(dictionary, batch.inputs, residual, DEAD, 4).backward()
    assert residual.grad is None


# training ------------------------------------------------------------------------------------------------------------


def dead_in_training(method, kind="sae") -> float:
    """Half of the latents start far below zero; how many are dead in the mean of the last 50 of 150 steps."""
    source = LinearBench(n_features=24, d_in=12, sparsity=0.85, max_interference=0.7, kind=kind, d_out=9 if kind == "transcoder" else None)
    dictionary = method.build(source.width_in, source.width_out, 48, torch.Generator().manual_seed(0))
    with torch.no_grad():
        dictionary.b_enc[24:] = -4.0
    state = TrainState.start(dictionary, Schedule(lr=2e-2), dead_after=1280)
    steps = train(state, method, source, batch_size=64)
    path = [next(steps) for _ in range(150)]
    assert all(torch.stack(list(step.losses.values())).isfinite().all() for step in path)
    return sum(float(step.dead) for step in path[-50:]) / 50


@pytest.mark.parametrize(
    ("cls", "plain", "kind"), [(TopKAux, TopK, "sae"), (TopKAux, TopK, "crosscoder"), (BatchTopKAux, BatchTopK, "transcoder")]
)
@pytest.mark.slow
def test_dead_latents_come_back_and_those_of_the_control_do_not(cls, plain, kind):
    stayed, left = dead_in_training(plain(k=4), kind), dead_in_training(cls(k=4), kind)
    assert stayed > 20, "they stay dead without help"
    assert left < 0.65 * stayed


def test_rectified_candidates_do_not_revive_latents_that_are_negative_on_every_row():
    assert dead_in_training(TopKAux(k=4, sign="rectified")) > 20


def test_training_descends_the_sum_of_the_terms_it_reports():
    """Guards against a loss that is computed, plotted and not trained."""
    method, source = TopKAux(k=3, aux=0.5), LinearBench(n_features=12, d_in=8, sparsity=0.8, max_interference=0.7)
    dictionary = method.build(8, 8, 16, torch.Generator().manual_seed(0))
    state = TrainState.start(dictionary, Schedule(lr=0.0), dead_after=64)
    steps = train(state, method, source, batch_size=64)
    while not next(steps).dead:
        assert state.step < 5
    dead = state.dead.nonzero().flatten()
    step = next(steps)
    trained = {name: p.grad.clone() for name, p in dictionary.named_parameters()}
    assert step.losses["aux"] > 0

    batch = source.batch(step.index, 64)
    dictionary.zero_grad()
    losses = losses_of(method, dictionary, batch, dead)
    sum(losses.values()).backward()
    method.constrain_gradients(dictionary)
    for name, p in dictionary.named_parameters():
        torch.testing.assert_close(trained[name], p.grad)
    assert {name: float(loss.detach()) for name, loss in losses.items()} == pytest.approx({n: float(v) for n, v in step.losses.items()})


@pytest.mark.parametrize("cls", METHODS)
def test_a_run_goes_on_from_its_folder_as_if_it_had_not_stopped(cls, tmp_path):
    source = LinearBench(n_features=12, d_in=8, sparsity=0.8, max_interference=0.7)
    settings = {"method": cls(k=2, k_aux=3, sign="rectified"), "n_latents": 24, "batch_size": 32, "dead_after": 64, "lr": 1e-2}
    with_break, without = Session(source, **settings), Session(source, **settings)
    try:
        with_break.train(10).save(tmp_path / "run")
        with_break.close()
        with_break = Session.open(tmp_path / "run")
        assert with_break.method.k_aux == 3 and with_break.method.sign == "rectified"
        a, b = with_break.train(10).dictionary.state_dict(), without.train(20).dictionary.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    finally:
        with_break.close(), without.close()


def test_unit_rows_of_dead_latents_stay_unit_rows():
    method, batch = TopKAux(k=K), rows()
    dictionary = method.build(D_IN, D_OUT, N_LATENTS, torch.Generator().manual_seed(0))
    losses_of(method, dictionary, batch)["aux"].backward()
    with torch.no_grad():
        method.constrain_gradients(dictionary)
        along = (dictionary.W_dec.grad * normalize(dictionary.W_dec, dim=1)).sum(1)
    assert along.abs().max() < 1e-6 < dictionary.W_dec.grad.abs().max()
