"""Matrix products in bfloat16 with float32 weights: the same training to rounding, for every method."""

import param
import pytest
import torch

from sdl_explorer.data.bench import LinearBench
from sdl_explorer.data.sources import stream
from sdl_explorer.models import kernels, products
from sdl_explorer.models.methods import Method, TopK
from sdl_explorer.registry import members
from sdl_explorer.session import Session
from sdl_explorer.training.loop import train
from sdl_explorer.training.state import Schedule, TrainState

BENCH = LinearBench(n_features=24, d_in=16, sparsity=0.9)


def small(method):
    return method(k=4) if isinstance(method.param.objects().get("k"), param.Integer) else method()


def trained(method, precision, steps, n_latents=48):
    dictionary = method.build(BENCH.width_in, BENCH.width_out, n_latents, stream(0, "weights")).requires_grad_(True)
    state = TrainState.start(dictionary, Schedule(lr=3e-3, warmup_steps=0))
    state.precision = precision
    losses = [sum(next(loop).losses.values()).item() for loop in [train(state, method, BENCH, batch_size=256)] for _ in range(steps)]
    return state, losses


@pytest.mark.parametrize("method", members(Method).values(), ids=lambda m: m.__name__)
def test_a_step_is_that_of_float32_to_rounding(method):
    (one, first), (other, second) = (trained(small(method), precision, 1) for precision in ("float32", "bfloat16"))
    assert second[0] == pytest.approx(first[0], rel=0.03)
    for (name, p), q in zip(one.dictionary.named_parameters(), other.dictionary.parameters(), strict=True):
        assert (q.dtype == torch.float32 and q.grad is None) or q.grad.dtype == torch.float32
        if p.grad is not None and name in ("W_enc", "W_dec") and p.grad.norm() > 0:
            cosine = torch.nn.functional.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0)
            assert cosine > 0.97, name
    for moments in other.optimiser.state.values():
        assert all(t.dtype == torch.float32 for t in moments.values())


@pytest.mark.parametrize("method", members(Method).values(), ids=lambda m: m.__name__)
def test_loss_falls_as_in_float32(method):
    (_, exact), (_, mixed) = (trained(small(method), precision, 40) for precision in ("float32", "bfloat16"))
    assert mixed[-1] < 0.9 * mixed[0] or exact[-1] >= 0.9 * exact[0]
    assert mixed[-1] == pytest.approx(exact[-1], rel=0.1)


def test_products_are_rounded_where_asked_alone():
    dictionary, x = TopK(k=4).build(16, 16, 48, stream(0, "weights")), torch.randn(64, 16, generator=stream(0, "x"))
    exact = dictionary.pre(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = dictionary.pre(x)
    assert rounded.dtype == torch.float32 and torch.equal(rounded, rounded.bfloat16().float())
    assert 0 < (rounded - exact).abs().amax() < 0.02 * exact.abs().amax()


def test_auto_is_float32_on_the_cpu(device):
    state = TrainState.start(TopK(k=4).build(16, 16, 48, stream(0, "weights")).to(device))
    assert state.mixed is (device == "cuda")
    for precision, mixed in (("float32", False), ("bfloat16", True)):
        state.precision = precision
        assert state.mixed is mixed


@pytest.mark.parametrize("select", ["rows", "batch"])
def test_the_accelerators_selection_gives_float32_values_of_what_bfloat16_ranks(monkeypatch, select):
    monkeypatch.setattr(kernels, "in_mixed_precision", lambda inputs: True)
    dictionary, x = TopK(k=4).build(64, 64, 640, stream(0, "weights")), torch.randn(100, 64, generator=stream(0, "x"))
    pre = dictionary.pre(x)
    if select == "rows":
        values, indices = kernels.select_rows(x, dictionary, 4)
        chosen, truly = torch.zeros_like(pre).scatter(1, indices, 1.0), pre >= pre.topk(4, dim=1).values[:, -1:]
        torch.testing.assert_close(values, pre.gather(1, indices))
    else:
        values, where = kernels.select_batch(x, dictionary, 400)
        chosen, truly = torch.zeros_like(pre).view(-1).index_fill(0, where, 1.0).view_as(pre), pre >= pre.flatten().topk(400).values[-1]
        torch.testing.assert_close(values, pre.flatten()[where])
    shared = (chosen.bool() & truly).sum() / truly.sum()
    assert shared > 0.9, "bfloat16 ranks near ties otherwise"


def test_certified_candidates_do_not_heed_autocast(monkeypatch):
    monkeypatch.setenv(products.CANDIDATES, "bfloat16")
    monkeypatch.setattr(products, "ROWS", 0)
    dictionary, x = TopK(k=4).build(64, 64, 640, stream(0, "weights")), 5 + torch.randn(100, 64, generator=stream(0, "x"))
    outside = kernels.select_rows(x, dictionary, 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = kernels.select_rows(x, dictionary, 4)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


def test_a_run_keeps_its_precision(tmp_path):
    with Session(BENCH, TopK(k=4), n_latents=48, batch_size=64, precision="bfloat16") as session:
        session.train(10)
        session.save(tmp_path / "run")
        weights = session.dictionary.W_dec.detach().clone()
    with Session.open(tmp_path / "run") as again:
        assert again.precision == "bfloat16" and torch.equal(again.dictionary.W_dec, weights)
        again.precision = "float32"
        again.train(5)
        assert "precision bfloat16 to float32" in " ".join(c.message for c in again.commits)
