"""Sparse kernels against the dense formula: the same choice, loss and gradients, and nothing of size n x n_latents kept."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.bench import LinearBench
from sdl_explorer.data.hierarchy import HierarchyBench
from sdl_explorer.models import kernels, products
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import BatchTopK, Context, JumpReLU, ReLU, TopK
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.methods.relu import Rectified
from sdl_explorer.models.methods.topk import BatchTopKSelection, TopKSelection
from sdl_explorer.models.terms import squared_error
from sdl_explorer.session import Session
from sdl_explorer.training.loop import train
from sdl_explorer.training.state import Schedule, TrainState


@pytest.fixture(params=["float32", "bfloat16"])
def candidates(request, monkeypatch):
    """Where candidates come from, whatever the machine has."""
    monkeypatch.setenv(products.CANDIDATES, request.param)
    monkeypatch.setattr(products, "ROWS", 0)
    return request.param


@pytest.fixture
def path(monkeypatch, candidates):
    """Sends every size down one path, in several blocks and tiles."""

    def choose(sparse: bool):
        monkeypatch.setattr(products, "TILE", 600 * 32)
        monkeypatch.setattr(kernels, "SMALL", 0)
        monkeypatch.setattr(kernels, "DENSITY", 1.0 if sparse else 0.0)

    return choose


def distinct(*shape, seed=0):
    """No two alike, a third of them negative."""
    numbers = torch.randperm(int(torch.Size(shape).numel()), generator=torch.Generator().manual_seed(seed))
    return (numbers.float() - len(numbers) // 3).view(shape) / 7


def random_dictionary(nonlinearity, d_in=10, d_out=10, n_latents=96, dtype=torch.float32, **kwargs) -> SparseDictionary:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    W_dec = torch.linspace(0.5, 2, n_latents, dtype=dtype)[:, None] * normalize(draw(n_latents, d_out), dim=1)
    return SparseDictionary(draw(n_latents, d_in), W_dec, 0.1 * draw(n_latents), 0.1 * draw(d_out), nonlinearity, **kwargs).train()


# selection ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 20),
    m=st.integers(1, 40).flatmap(lambda j: st.sampled_from([j, 16 * j])),
    k=st.integers(1, 12),
    seed=st.integers(0, 99),
)
@example(n=3, m=16 * 40, k=10, seed=0)
@example(n=3, m=16 * 40 + 1, k=10, seed=0)
def test_largest_is_topk(n, m, k, seed):
    k = min(k, m)
    scores = distinct(n, m, seed=seed)
    values, indices = kernels.largest(scores, k)
    expected = scores.topk(k, dim=1)
    assert torch.equal(values.sort(dim=1, descending=True).values, expected.values)
    assert torch.equal(indices.sort(dim=1).values, expected.indices.sort(dim=1).values)
    assert torch.equal(scores.gather(1, indices), values)


def test_largest_with_ties_infinities_and_nan_keeps_the_values_that_topk_keeps():
    scores = torch.randint(0, 4, (30, 640)).float()
    scores[0, 5], scores[1, 7], scores[2, :], scores[3, 9] = torch.inf, torch.nan, -torch.inf, -torch.inf
    values, indices = kernels.largest(scores, 10)
    ordered = lambda v: v.sort(dim=1, descending=True).values
    torch.testing.assert_close(ordered(values), ordered(scores.topk(10, dim=1).values), equal_nan=True, rtol=0, atol=0)
    assert all(len(set(row)) == 10 for row in indices.tolist())


@pytest.mark.parametrize("n_latents", [90, 96])
@pytest.mark.parametrize("count", [1, 37, 640, 64 * 90])
def test_batch_selection_is_topk_of_the_whole_batch(monkeypatch, candidates, n_latents, count):
    monkeypatch.setattr(products, "TILE", 64 * 32)
    dictionary, x = random_dictionary(BatchTopKSelection(1), n_latents=n_latents), torch.randn(64, 10)
    x[30:] *= torch.linspace(0.1, 5, 34)[:, None]
    values, where = kernels.select_batch(x, dictionary, count)
    pre = dictionary.pre(x).detach().flatten()
    expected = pre.topk(count)
    assert torch.equal(where, where.sort().values)
    torch.testing.assert_close(values.sort(descending=True).values, expected.values)
    assert set(where.tolist()) == set(expected.indices.tolist())


def test_batch_selection_tells_of_nan(monkeypatch, candidates):
    monkeypatch.setattr(products, "TILE", 64 * 32)
    dictionary, x = random_dictionary(BatchTopKSelection(1)), torch.randn(64, 10)
    x[50] = torch.nan
    assert kernels.select_batch(x, dictionary, 200)[0].isnan().sum() == dictionary.n_latents


def test_the_path_is_a_rule_of_sizes():
    toy, large = (random_dictionary(TopKSelection(4), d, d, m) for d, m in ((64, 256), (128, 4096)))
    assert not kernels.pays(1024, toy, 4 * 1024)
    assert kernels.pays(1024, large, 4 * 1024)
    assert not kernels.pays(1024, large, 1024 * 1024), "a quarter of all codes is dense"


# loss and gradients ---------------------------------------------------------------------------------------------------

SHAPES = {"SAE": (10, 10, {}), "pre-bias": (10, 10, {"subtract_b_dec": True}), "transcoder": (10, 6, {}), "crosscoder": (15, 15, {})}
METHODS = {
    "TopK": TopK(k=3),
    "BatchTopK": BatchTopK(k=3),
    "BatchTopK by contribution": BatchTopK(k=3, by="contribution"),
    "ReLU": ReLU(),
    "JumpReLU": JumpReLU(bandwidth=2.0, threshold=1.5),
}
SELECTING = ("TopK", "BatchTopK", "BatchTopK by contribution")


def loss_and_gradients(name, shape, x, y, device="cpu"):
    d_in, d_out, kwargs = SHAPES[shape]
    method = METHODS[name]
    dictionary = random_dictionary(method.nonlinearity(96), d_in, d_out, **kwargs).to(device)
    x = x.to(device).requires_grad_()
    encoding = dictionary(x)
    context = Context(0, torch.zeros(96), None, torch.Generator())
    loss = sum(method.objective(dictionary, encoding, Activations(x, y.to(device)), context).values())
    loss.backward()
    return encoding, [loss, x.grad, *(p.grad for p in dictionary.parameters())]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_are_those_of_the_dense_path(path, device, name, shape):
    d_in, d_out, _ = SHAPES[shape]
    x, y = torch.randn(600, d_in), torch.randn(600, d_out)  # two blocks
    path(sparse=True)
    sparse, ours = loss_and_gradients(name, shape, x, y, device)
    path(sparse=False)
    dense, expected = loss_and_gradients(name, shape, x, y, device)
    assert dense.pre is not None
    assert (sparse.pre is None) == (name in SELECTING or device == "cpu")
    torch.testing.assert_close(sparse.latents.dense(), dense.latents.dense(), rtol=1e-6, atol=1e-5)
    for one, other in zip(ours, expected, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("sigma", [TopKSelection(3), BatchTopKSelection(3), Rectified()])
def test_gradients_agree_with_finite_differences(path, sigma):
    path(sparse=True)
    dictionary = random_dictionary(sigma, dtype=torch.float64, subtract_b_dec=True)
    x = torch.randn(9, 10, dtype=torch.float64)
    names = [name for name, _ in dictionary.named_parameters()]

    def reconstruction(x, *weights):
        return torch.func.functional_call(dictionary, dict(zip(names, weights, strict=True)), (x,)).reconstruction

    weights = [p.detach().clone().requires_grad_() for p in dictionary.parameters()]
    assert torch.autograd.gradcheck(reconstruction, (x.requires_grad_(), *weights), fast_mode=True)


def test_one_matrix_for_both_sides_gets_both_gradients(path):
    x, grads = torch.randn(40, 10), []
    for sparse in (True, False):
        path(sparse)
        W = torch.nn.Parameter(random_dictionary(TopKSelection(3)).W_dec.detach())
        dictionary = SparseDictionary(W, W, nonlinearity=TopKSelection(3))
        squared_error(dictionary(x).reconstruction, x).backward()
        grads.append(dictionary.W_dec.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("method", [TopK(k=3), BatchTopK(k=3)], ids=lambda m: type(m).__name__)
def test_nothing_of_the_size_of_the_codes_is_kept_for_backward(path, method):
    path(sparse=True)
    n, n_latents = 512, 256
    dictionary = method.build(8, 8, n_latents, torch.Generator().manual_seed(0)).train()
    x, saved = torch.randn(n, 8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.untyped_storage().nbytes() // 4) or t, lambda t: t):
        encoding = dictionary(x)
        losses = method.objective(dictionary, encoding, Activations(x, x), Context(0, torch.zeros(n_latents), None, torch.Generator()))
    sum(losses.values()).backward()
    assert saved and max(saved) < n * n_latents / 8


@pytest.mark.parametrize("name", METHODS)
def test_the_same_step_gives_the_same_bits(path, name):
    path(sparse=True)
    x = torch.randn(600, 10)
    first, second = (loss_and_gradients(name, "SAE", x, x)[1] for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_relu_is_sparse_only_where_its_codes_are(monkeypatch):
    """By the density of the first rows; the codes are the same either way."""
    monkeypatch.setattr(kernels, "SMALL", 0)
    x = torch.randn(200, 10)
    for bias, sparse in ((-8.0, True), (-1.0, False)):
        dictionary = random_dictionary(Rectified())
        dictionary.b_enc.data.fill_(bias)
        encoding = dictionary(x)
        assert encoding.latents.is_sparse == sparse == (encoding.pre is None)
        torch.testing.assert_close(encoding.latents.dense(), dictionary.pre(x).relu())


def test_jumprelu_keeps_what_its_straight_through_gradient_reads_below_the_threshold(path):
    path(sparse=True)
    sigma = JumpRectified(96, bandwidth=1.0)
    sigma.threshold.data.fill_(1.5)
    dictionary, x = random_dictionary(sigma), torch.randn(50, 10)
    encoding, pre = dictionary(x), dictionary.pre(x)
    assert len(encoding.latents.values) == (pre >= 1.0).sum() > (encoding.latents.values > 0).sum() == (pre > 1.5).sum()
    assert encoding.latents.l0 == sigma.l0(encoding)


# training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [TopK(k=2), BatchTopK(k=2)], ids=lambda m: type(m).__name__)
def test_sessions_on_both_paths_agree(path, method):
    weights = []
    for sparse in (True, False):
        path(sparse)
        with Session(
            LinearBench(n_features=12, d_in=8, sparsity=0.8, max_interference=0.7), method, 32, device="cpu", batch_size=64
        ) as session:
            weights.append(session.train(60).dictionary.state_dict())
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-4)


def test_training_some_rows_leaves_the_others_bit_identical(path):
    path(sparse=True)
    method = TopK(k=2)
    state = TrainState.start(method.build(8, 8, 32, torch.Generator().manual_seed(0)), Schedule(lr=1e-2))
    before = state.dictionary.W_dec.detach().clone()
    steps = train(state, method, HierarchyBench(parents=2, children=2, independent=2, d_in=8), batch_size=64, only=range(16))
    for _ in range(5):
        next(steps)
    moved = (state.dictionary.W_dec != before).any(dim=1).nonzero().flatten().tolist()
    assert moved and set(moved) <= set(range(16))


def test_evaluation_of_batch_topk_goes_by_its_threshold(path):
    path(sparse=True)
    dictionary, x = random_dictionary(BatchTopKSelection(3)).eval(), torch.randn(40, 10)
    dictionary.nonlinearity.threshold.fill_(1.5)
    pre = dictionary.pre(x)
    torch.testing.assert_close(dictionary.encode(x).dense(), torch.where(pre > 1.5, pre, 0.0))


def test_projected_gradients_are_tangent_whatever_the_rows_norm(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 7)
    rows, grad = 3 * torch.randn(40, 6), torch.randn(40, 6)
    rows[5] = 0
    free = grad.clone()
    kernels.project_rows(grad, rows)
    unit = normalize(rows, dim=1)
    torch.testing.assert_close(grad, free - (free * unit).sum(dim=1, keepdim=True) * unit)
