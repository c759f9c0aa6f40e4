"""Bounds in bfloat16: never below the exact number, and selections by them are those of float64."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sdl_explorer.models import kernels, products
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods.topk import BatchTopKSelection, TopKSelection


@pytest.fixture
def in_bfloat16(monkeypatch):
    monkeypatch.setenv(products.CANDIDATES, "bfloat16")
    monkeypatch.setattr(products, "ROWS", 0)
    monkeypatch.setattr(products, "BLOCK", 50)
    monkeypatch.setattr(products, "TILE", 120 * 160)
    monkeypatch.setattr(kernels, "SMALL", 0)


def draw(seed=0, n=120, d=48, m=640, mean=0.0, bias=0.1, spread=0.0, sigma=None) -> tuple[SparseDictionary, torch.Tensor]:
    """A dictionary and rows; `spread` is that of the logarithms of the norms of both."""
    g = torch.Generator().manual_seed(seed)
    lengths = lambda size: torch.exp(spread * torch.randn(size, 1, generator=g))
    W = torch.randn(m, d, generator=g) * lengths(m) / d**0.5
    x = torch.randn(n, d, generator=g) * lengths(n) + mean * torch.randn(d, generator=g)
    b = bias * torch.randn(m, generator=g) - mean * (W @ x.mean(dim=0)) / max(mean, 1)
    return SparseDictionary(W, W.clone(), b, nonlinearity=sigma), x


def exactly(dictionary, x):
    return x.double() @ dictionary.W_enc.detach().double().T + dictionary.b_enc.detach().double()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    mean=st.sampled_from([0.0, 1.0, 30.0]),
    bias=st.sampled_from([0.0, 1.0, 100.0]),
    spread=st.floats(0, 2),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
@example(seed=0, mean=0.0, bias=0.0, spread=0.0, scale=0.0)
def test_no_number_is_above_its_bound(seed, mean, bias, spread, scale):
    dictionary, x = draw(seed, n=30, m=96, mean=mean, bias=bias, spread=spread)
    x = x * scale
    floor = torch.linspace(-1, 1, 96)
    exact = products.Exact.of(x, dictionary)
    rounding = 1e-6 * (exact.x.norm(dim=1).amax() * dictionary.W_enc.norm(dim=1).amax() + dictionary.b_enc.abs().amax() + 1).item()
    for bounds, true in (
        (products.Upper(exact), exactly(dictionary, x)),
        (products.Upper(exact, 0.5), exactly(dictionary, x) - 0.5),
        (products.Upper(exact, floor), exactly(dictionary, x) - floor),
    ):
        upper = torch.cat([products.ceiling(scores) for _, scores in products.tiles(bounds)], dim=1)
        assert (upper.double() >= true - rounding).all()


def test_bounds_are_close_even_where_data_lie_far_from_zero():
    for mean in (0.0, 100.0):
        dictionary, x = draw(d=256, mean=mean)
        exact = products.Exact.of(x, dictionary)
        upper = torch.cat([products.ceiling(scores) for _, scores in products.tiles(products.Upper(exact))], dim=1)
        true = exactly(dictionary, x)
        assert (upper - true).mean() < 0.15 * true.std(), "of the spread of the pre-activations"


CASES = {
    "plain": {},
    "far from zero": {"mean": 50.0},
    "large biases": {"bias": 3.0},
    "uneven norms": {"spread": 1.0},
    "close calls": {"m": 640, "d": 4},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_that_of_float64(in_bfloat16, case, seed):
    dictionary, x = draw(seed, **CASES[case])
    true = exactly(dictionary, x)
    near = 1e-5 * true.abs().amax()

    values, indices = kernels.select_rows(x, dictionary, 7)
    least = true.topk(7, dim=1).values.amin(dim=1, keepdim=True)
    assert all(len(set(row)) == 7 for row in indices.tolist())
    assert (true.gather(1, indices) >= least - near).all()
    torch.testing.assert_close(values.double(), true.gather(1, indices), rtol=1e-4, atol=near.item())

    values, where = kernels.select_batch(x, dictionary, 7 * len(x))
    assert torch.equal(where, where.unique()) and len(where) == 7 * len(x)
    assert (true.flatten()[where] >= true.flatten().topk(7 * len(x)).values[-1] - near).all()
    torch.testing.assert_close(values.double(), true.flatten()[where], rtol=1e-4, atol=near.item())


@pytest.mark.parametrize("floor", ["a number", "one each"])
def test_all_that_reach_a_floor_are_found(in_bfloat16, monkeypatch, floor):
    dictionary, x = draw()
    true = exactly(dictionary, x)
    floor = true.quantile(0.98).float() if floor == "a number" else true.quantile(0.98, dim=0).float()
    values, where = kernels.select_above(x, dictionary, floor)
    expected = (true >= floor).flatten().nonzero().flatten()
    missed = set(expected.tolist()) ^ set(where.tolist())
    assert all(abs((true - floor).flatten()[at]) < 1e-5 for at in missed)
    torch.testing.assert_close(values.double(), true.flatten()[where], rtol=1e-4, atol=1e-5)


def count_products(monkeypatch) -> list:
    made = []
    into = products.Exact.into
    monkeypatch.setattr(products.Exact, "into", lambda self, *args: made.append(self.n) or into(self, *args))
    return made


def test_float32_takes_only_what_is_uncertain(in_bfloat16, monkeypatch):
    made = count_products(monkeypatch)
    dictionary, x = draw(d=256)
    kernels.select_rows(x, dictionary, 7)
    kernels.select_batch(x, dictionary, 7 * len(x))
    assert sum(made) < 0.2 * len(x)

    made.clear()
    W = dictionary.W_enc.detach()
    twins = SparseDictionary(W[:1].repeat(640, 1) * torch.linspace(1, 1.001, 640)[:, None], W, nonlinearity=TopKSelection(7))
    assert sorted(set(kernels.select_rows(x, twins, 7)[1][(x @ W[0]) > 1].flatten().tolist())) == list(range(633, 640))
    assert sum(made) >= len(x), "no bound tells these latents apart"
    made.clear()
    kernels.select_batch(x, twins, 7 * len(x))
    assert made


def test_rows_of_nan_or_infinity_are_kept_as_float32_keeps_them(in_bfloat16):
    dictionary, x = draw()
    x[3], x[60, 0] = torch.nan, torch.inf
    values, _ = kernels.select_rows(x, dictionary, 7)
    assert values[3].isnan().all() and not values[60].isfinite().any() and values[4].isfinite().all()


@pytest.mark.parametrize("sigma", [TopKSelection(7), BatchTopKSelection(7)])
def test_the_machine_decides_unless_it_is_told(monkeypatch, sigma):
    dictionary, x = draw(n=products.ROWS, sigma=sigma)
    assert not products.in_bfloat16(x[1:], dictionary), "few rows do not pay for the rounding of the weights"
    for has in (False, True):
        monkeypatch.setattr(products, "machine_has_bfloat16", lambda has=has: has)
        monkeypatch.delenv(products.CANDIDATES, raising=False)
        assert products.in_bfloat16(x, dictionary) is has
        assert not products.in_bfloat16(x.double(), dictionary)
        monkeypatch.setenv(products.CANDIDATES, "float32")
        assert not products.in_bfloat16(x, dictionary)
        monkeypatch.setenv(products.CANDIDATES, "bfloat16")
        assert products.in_bfloat16(x, dictionary)
    monkeypatch.setenv(products.CANDIDATES, "float16")
    with pytest.raises(ValueError, match="'float32' or 'bfloat16'"):
        products.in_bfloat16(x, dictionary)
