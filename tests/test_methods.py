"""Every method by reflection, each against its formula, and four that only this file has: the contract carries them."""

from copy import deepcopy

import param
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Anchors, Pins
from sdl_explorer.data.hierarchy import HierarchyBench
from sdl_explorer.data.sources import stream
from sdl_explorer.models.dictionary import Latents, Nonlinearity, SparseDictionary
from sdl_explorer.models.methods import BatchTopK, Context, Gated, JumpReLU, Method, ReLU, TopK
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.terms import anchor_distance, squared_error
from sdl_explorer.training.loop import train
from sdl_explorer.training.state import Schedule, TrainState

OURS = [cls for cls in param.descendents(Method, concrete=True) if cls.__module__.startswith("sdl_explorer.")]
D_IN, D_OUT, N_LATENTS = 5, 4, 12


def small(cls):
    return cls(k=3) if "k" in cls.param else cls()


def built(method, d_in=D_IN, d_out=D_OUT, n_latents=N_LATENTS) -> SparseDictionary:
    dictionary = method.build(d_in, d_out, n_latents, torch.Generator().manual_seed(0))
    with torch.no_grad():
        dictionary.b_enc.copy_(0.1 * torch.randn(n_latents, generator=torch.Generator().manual_seed(1)))
    return dictionary.train()


def rows(n=16, d_in=D_IN, d_out=D_OUT) -> Activations:
    inputs = torch.randn(n, d_in)
    return Activations(inputs, torch.randn(n, d_out) if d_out != d_in else inputs)


def context(n_latents=N_LATENTS) -> Context:
    return Context(0, torch.zeros(n_latents, dtype=torch.long), None, torch.Generator())


def losses_of(method, dictionary, batch) -> dict:
    return method.objective(dictionary, dictionary(batch.inputs), batch, context(dictionary.n_latents))


# the family ----------------------------------------------------------------------------------------------------------


def test_the_family():
    assert {cls.__name__ for cls in OURS} >= {"ReLU", "JumpReLU", "TopK", "BatchTopK"}


@pytest.mark.parametrize("cls", OURS)
def test_a_method_needs_no_argument_and_says_its_equation(cls):
    method = cls()
    assert cls.__doc__ and all(method.param[name].doc for name in method.param if name != "name")
    assert eval(repr(method), {cls.__name__: cls}).param.values() | {"name": ""} == method.param.values() | {"name": ""}


@pytest.mark.parametrize("cls", OURS)
def test_twice_the_batch_is_the_same_loss(cls):
    method, batch = small(cls), rows()
    dictionary = built(method)
    twice = Activations(batch.inputs.repeat(2, 1), batch.targets.repeat(2, 1))
    once, doubled = losses_of(method, dictionary, batch), losses_of(method, dictionary, twice)
    assert once.keys() == doubled.keys()
    for name in once:
        assert once[name].shape == ()
        torch.testing.assert_close(once[name], doubled[name])


@pytest.mark.parametrize("cls", OURS)
def test_weights_are_a_function_of_the_generator_with_unit_decoder_rows(cls):
    method = small(cls)
    build = lambda seed, d_out: method.build(6, d_out, 9, torch.Generator().manual_seed(seed))
    a, b = build(1, 6), build(1, 6)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.W_dec, build(2, 6).W_dec)
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.ones(9))
    assert torch.equal(a.W_enc, a.W_dec)
    assert build(1, 4).W_dec.shape == (9, 4)


@pytest.mark.parametrize("cls", OURS)
def test_sigma_has_the_properties_that_theory_reads(cls):
    method = small(cls)
    dictionary, x = built(method, 6, 6), torch.randn(20, 6)
    with torch.no_grad():
        encoding = dictionary(x)
        codes = encoding.latents.dense()
        if method.masks_only:
            assert torch.equal(codes, torch.where(codes != 0, encoding.pre, 0.0))
        if method.homogeneous:
            dictionary.b_enc.zero_()
            torch.testing.assert_close(dictionary.encode(3 * x).dense(), 3 * dictionary.encode(x).dense())


@pytest.mark.parametrize("cls", OURS)
def test_gradients_agree_with_finite_differences(cls):
    """In float64, everywhere but at the edges; JumpReLU's threshold has its own test."""
    method, batch = small(cls), rows()
    batch = Activations(batch.inputs.double(), batch.targets.double())
    dictionary = built(method).double()
    loss = lambda: sum(losses_of(method, dictionary, batch).values())
    loss().backward()
    frozen = ("W_dec", "b_dec") if cls is Gated else ()  # a stopped gradient is not the loss's own: test_gated.py
    for name in {"W_enc", "W_dec", "b_enc", "b_dec"}.difference(frozen):
        p = getattr(dictionary, name)
        direction = torch.randn_like(p)
        with torch.no_grad():
            ahead = p.add_(1e-6 * direction) is p and loss()
            behind = p.sub_(2e-6 * direction) is p and loss()
            p.add_(1e-6 * direction)
        torch.testing.assert_close((ahead - behind) / 2e-6, (p.grad * direction).sum(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cls", OURS)
def test_no_latents_are_refused(cls):
    with pytest.raises(ValueError, match="n_latents is 0"):
        cls().build(4, 4, 0, torch.Generator())


@pytest.mark.parametrize("cls", [TopK, BatchTopK])
def test_k_above_n_latents_is_refused(cls):
    with pytest.raises(ValueError, match=f"{cls.__name__}: k is 9 and n_latents 8"):
        cls(k=9).build(4, 4, 8, torch.Generator())
    assert cls(k=8).build(4, 4, 8, torch.Generator()).n_latents == 8


@pytest.mark.parametrize("cls", OURS)
def test_changed_settings_reach_a_live_sigma(cls):
    method = small(cls)
    dictionary = built(method)
    changed = {"k": 5, "bandwidth": 0.5}
    method.param.update(**{name: changed[name] for name in method.tuned})
    method.retune(dictionary.nonlinearity)
    fresh = method.nonlinearity(N_LATENTS)
    assert dictionary.nonlinearity.settings() == fresh.settings()


# TopK ----------------------------------------------------------------------------------------------------------------


def test_topk_sparse_path_is_the_dense_one():
    method, batch = TopK(k=3), rows()
    dictionary, reference = built(method), built(method)
    losses_of(method, dictionary, batch)["error"].backward()

    pre = batch.inputs @ reference.W_enc.T + reference.b_enc
    kth = pre.topk(3, dim=1).values[:, -1:]
    codes = torch.where(pre >= kth, pre, 0.0).relu()
    (codes @ reference.W_dec + reference.b_dec - batch.targets).square().sum(dim=1).mean().backward()
    torch.testing.assert_close(dictionary(batch.inputs).latents.dense(), codes)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        torch.testing.assert_close(getattr(dictionary, name).grad, getattr(reference, name).grad)


def test_topk_never_keeps_a_negative_value():
    dictionary = built(TopK(k=12))
    assert (dictionary.encode(torch.randn(30, D_IN)).dense() >= 0).all()


def test_batch_topk_keeps_k_times_n_of_the_batch():
    dictionary = built(BatchTopK(k=2))
    x = torch.cat([10 * torch.randn(4, D_IN), 0.01 * torch.randn(12, D_IN)])
    with torch.no_grad():
        dictionary.b_enc.zero_()
        codes = dictionary.encode(x).dense()
        pre = dictionary.pre(x).relu()
    assert int((codes > 0).sum()) == min(2 * 16, int((pre > 0).sum()))
    kept, left = pre[codes > 0], pre[(codes == 0) & (pre > 0)]
    assert kept.min() >= left.max()
    assert (codes[:4] > 0).sum() > 2 * 4, "the loud rows take more than k"


def test_batch_topk_threshold_is_the_running_mean_of_the_smallest_kept_value():
    method = BatchTopK(k=2, threshold_rate=0.25)
    dictionary = built(method)
    sigma, expected = dictionary.nonlinearity, None
    for n in range(3):
        encoding = dictionary(torch.randn(16, D_IN) * (n + 1))
        codes = encoding.latents.dense().detach()
        smallest = codes[codes > 0].min()
        expected = smallest if expected is None else 0.75 * expected + 0.25 * smallest
        with torch.no_grad():
            method.after_step(dictionary, encoding, context())
        torch.testing.assert_close(sigma.threshold, expected)
    assert int(sigma.n_averaged) == 3
    with torch.no_grad():
        method.after_step(dictionary, dictionary(torch.zeros(4, D_IN) - 1e9 * dictionary.W_enc.sum(0)), context())
        before = sigma.threshold.clone()
        sigma.average(Latents(torch.zeros(4, N_LATENTS)), dictionary, 0.5)
    assert torch.equal(sigma.threshold, before), "a batch in which nothing fires says nothing about the threshold"

    dictionary.eval()
    pre = dictionary.pre(x := torch.randn(50, D_IN)).relu()
    torch.testing.assert_close(dictionary.encode(x).dense(), torch.where(pre > sigma.threshold, pre, 0.0))


def test_contributions_compete_whatever_the_lengths_of_the_two_rows():
    """z_i |W_dec_i| is what a latent writes: stretching W_enc_i and b_enc_i by s_i and shrinking W_dec_i by it changes nothing."""
    method = BatchTopK(k=2, by="contribution", unit_norm=False)
    plain = built(method)
    stretched = deepcopy(plain)
    s = torch.linspace(0.2, 5, N_LATENTS)
    with torch.no_grad():
        stretched.W_enc.mul_(s[:, None]), stretched.b_enc.mul_(s), stretched.W_dec.div_(s[:, None])
    for n in range(3):
        x = torch.randn(16, D_IN) * (n + 1)
        encodings = [dictionary(x) for dictionary in (plain, stretched)]
        torch.testing.assert_close(encodings[0].reconstruction, encodings[1].reconstruction)
        for dictionary, encoding in zip((plain, stretched), encodings, strict=True):
            with torch.no_grad():
                method.after_step(dictionary, encoding, context())
    torch.testing.assert_close(stretched.nonlinearity.threshold, s * plain.nonlinearity.threshold)
    x = torch.randn(50, D_IN)
    found = [dictionary.eval()(x) for dictionary in (plain, stretched)]
    torch.testing.assert_close(found[0].reconstruction, found[1].reconstruction)
    assert 0 < found[0].latents.l0 == found[1].latents.l0 < N_LATENTS / 2


def test_with_unit_rows_contributions_are_codes():
    x = torch.randn(32, D_IN)
    found = []
    for by in ("code", "contribution"):
        method = BatchTopK(k=2, by=by)
        dictionary = built(method)
        encoding = dictionary(x)
        with torch.no_grad():
            dictionary.W_dec.copy_(torch.nn.functional.normalize(dictionary.W_dec, dim=1))
            method.after_step(dictionary, dictionary(x), context())
        found.append((dictionary(x).latents.dense(), dictionary.eval()(x).latents.dense()))
        assert encoding.reconstruction.isfinite().all()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_rows_start_at_the_norm_that_is_asked_for():
    dictionary = TopK(k=2, unit_norm=False, init_norm=0.1).build(D_IN, D_OUT, N_LATENTS, torch.Generator().manual_seed(0))
    for rows in (dictionary.W_enc, dictionary.W_dec):
        torch.testing.assert_close(rows.norm(dim=1), torch.full((N_LATENTS,), 0.1))
    with pytest.raises(ValueError, match=r"init_norm is 0\.1 and unit_norm"):
        TopK(k=2, init_norm=0.1).build(D_IN, D_OUT, N_LATENTS, torch.Generator())


# JumpReLU ------------------------------------------------------------------------------------------------------------


def test_jumprelu_straight_through_gradients_are_the_published_ones():
    """d z / d theta = -(theta / eps) K((pre - theta) / eps), d H / d theta = -(1 / eps) K(...), K = rectangle of width 1."""
    eps = 0.4
    sigma = JumpRectified(3, bandwidth=eps)
    with torch.no_grad():
        sigma.threshold.copy_(torch.tensor([0.5, 1.0, 0.1]))
    theta = sigma.threshold.detach()
    pre = torch.randn(200, 3, requires_grad=True)
    up = torch.randn(200, 3)
    inside = ((pre - theta).abs() < eps / 2).float()
    assert inside.sum() > 20

    z = sigma(pre, inputs=None, dictionary=None)
    torch.testing.assert_close(z, torch.where(pre > theta, pre, 0.0))
    (z * up).sum().backward()
    torch.testing.assert_close(pre.grad, up * (pre > theta))
    torch.testing.assert_close(sigma.threshold.grad, -(up * inside * theta / eps).sum(0))

    pre.grad, sigma.threshold.grad = None, None
    (sigma.active(pre) * up).sum().backward()
    assert pre.grad is None or not pre.grad.any()
    torch.testing.assert_close(sigma.threshold.grad, -(up * inside / eps).sum(0))


def test_jumprelu_penalty():
    dictionary, batch = built(JumpReLU(l0=2.0)), rows()
    l0 = dictionary(batch.inputs).latents.l0
    torch.testing.assert_close(losses_of(JumpReLU(l0=2.0), dictionary, batch)["l0"], 2 * l0)
    torch.testing.assert_close(losses_of(JumpReLU(l0=2.0, l0_target=3.0), dictionary, batch)["l0"], 2 * (l0 / 3 - 1) ** 2)


def test_jumprelu_threshold_stays_at_or_above_zero():
    method = JumpReLU()
    dictionary = built(method)
    with torch.no_grad():
        dictionary.nonlinearity.threshold.copy_(torch.linspace(-1, 1, N_LATENTS))
        method.after_step(dictionary, dictionary(torch.randn(3, D_IN)), context())
    assert dictionary.nonlinearity.threshold.min() == 0 and dictionary.nonlinearity.threshold.max() == 1


# ReLU, unit norm, targets, anchors -----------------------------------------------------------------------------------


def test_relu_penalty_cannot_be_shrunk_by_growing_the_decoder():
    method, batch = ReLU(l1=0.7), rows()
    dictionary = built(method)
    before = losses_of(method, dictionary, batch)
    codes = dictionary(batch.inputs).latents.dense()
    torch.testing.assert_close(before["l1"], 0.7 * (codes * dictionary.W_dec.norm(dim=1)).sum(1).mean())
    with torch.no_grad():
        for p, s in ((dictionary.W_enc, 0.1), (dictionary.b_enc, 0.1), (dictionary.W_dec, 10.0)):
            p.mul_(s)
    after = losses_of(method, dictionary, batch)
    torch.testing.assert_close(before["l1"], after["l1"])
    torch.testing.assert_close(before["error"], after["error"])


@pytest.mark.parametrize("cls", OURS)
def test_unit_norm_stays_on_the_sphere_and_moves_along_it(cls, device):
    method = small(cls)
    method.unit_norm = True
    source = HierarchyBench(parents=2, children=2, independent=2, d_in=8)
    dictionary = method.build(8, 8, 12, torch.Generator().manual_seed(0)).to(device)
    state = TrainState.start(dictionary, Schedule(lr=0.05))
    steps = train(state, method, source, batch_size=32)
    before = dictionary.W_dec.detach().clone()
    for _ in range(10):
        next(steps)
        torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(12, device=device))
    assert not torch.allclose(before, dictionary.W_dec)

    dictionary.W_dec.grad = torch.randn_like(dictionary.W_dec)
    free = dictionary.W_dec.grad.clone()
    with torch.no_grad():
        method.constrain_gradients(dictionary)
        rest = free - dictionary.W_dec.grad
        torch.testing.assert_close((dictionary.W_dec.grad * dictionary.W_dec).sum(1), torch.zeros(12, device=device), atol=1e-6, rtol=0)
        torch.testing.assert_close(normalize(rest, dim=1).mul(dictionary.W_dec).sum(1).abs(), torch.ones(12, device=device))


def test_unit_norm_is_an_option():
    assert not ReLU().unit_norm and not JumpReLU().unit_norm and TopK().unit_norm
    dictionary = built(ReLU())
    dictionary.W_dec.grad = torch.randn_like(dictionary.W_dec)
    before = dictionary.W_dec.grad.clone()
    ReLU().constrain_gradients(dictionary)
    assert torch.equal(before, dictionary.W_dec.grad)


@pytest.mark.parametrize(
    "method", [ReLU(l1=0.02, l0_target=6.0, l0_rate=0.05), JumpReLU(l0=60.0, l0_target=6.0, bandwidth=0.1, threshold=0.05)]
)
@pytest.mark.slow
def test_l0_is_held_at_its_target(method):
    source = HierarchyBench(parents=0, independent=20, d_in=20, independent_probability=0.3, magnitude_std=0.3)
    dictionary = method.build(20, 20, 40, torch.Generator().manual_seed(0))
    state = TrainState.start(dictionary, Schedule(lr=5e-3))
    steps = train(state, method, source, batch_size=128)
    first = next(steps).l0.item()
    reached = [next(steps).l0.item() for _ in range(250)][-50:]
    assert first > 10, "the test starts away from the target"
    assert sum(reached) / 50 == pytest.approx(6.0, rel=0.05)


def test_anchor_pull_is_the_sum_of_squares_of_soft_pins():
    dictionary = built(ReLU())
    g = torch.Generator().manual_seed(1)
    anchors = Anchors.from_rows(torch.randn(3, D_IN, generator=g), torch.randn(3, D_OUT, generator=g))
    pins = Pins(anchors, torch.tensor([7, 2, 4]), torch.tensor([0.1, 5.0, 0.5]), torch.tensor([False, True, False]))
    expected = sum(
        w * ((dictionary.W_enc[i] - a) ** 2).sum() + w * ((dictionary.W_dec[i] - b) ** 2).sum()
        for i, w, a, b in [(7, 0.1, anchors.inputs[0], anchors.targets[0]), (4, 0.5, anchors.inputs[2], anchors.targets[2])]
    )
    torch.testing.assert_close(anchor_distance(dictionary, pins), expected)


# methods that only this file has --------------------------------------------------------------------------------------


class GatedSelection(Nonlinearity):
    """1[W x + b > 0] * ReLU(exp(r) * W x + c): two vectors beside the dictionary's own (Rajamanoharan et al. 2024a)."""

    def __init__(self, n_latents: int):
        super().__init__()
        self.r, self.c = nn.Parameter(torch.zeros(n_latents)), nn.Parameter(torch.zeros(n_latents))

    def settings(self):
        return {"n_latents": len(self.r)}

    def forward(self, pre, *, inputs, dictionary):
        linear = pre - dictionary.b_enc
        return (pre > 0) * (self.r.exp() * linear + self.c).relu()


class TinyGated(Method):
    """error + l1 * |ReLU(gate)| + the gate path's error through a frozen decoder."""

    masks_only = False
    l1 = param.Number(0.05, bounds=(0, None), doc="Weight of the L1 penalty.")

    def nonlinearity(self, n_latents):
        return GatedSelection(n_latents)

    def objective(self, dictionary, encoding, batch, context):
        gate = encoding.pre.relu()
        through = gate @ dictionary.W_dec.detach() + dictionary.b_dec.detach()
        return {
            "error": squared_error(encoding.reconstruction, batch.targets),
            "l1": self.l1 * gate.sum(dim=1).mean(),
            "gate": squared_error(through, batch.targets),
        }


class TinyTied(ReLU):
    """W_enc = W_dec throughout: one gradient for both sides, so that a reloaded pair stays tied too."""

    def constrain_gradients(self, dictionary):
        both = dictionary.W_enc.grad + dictionary.W_dec.grad
        dictionary.W_enc.grad, dictionary.W_dec.grad = both, both.clone()

    def after_step(self, dictionary, encoding, context):
        super().after_step(dictionary, encoding, context)
        dictionary.W_enc.copy_(dictionary.W_dec)


class TinyAuxK(TopK):
    """TopK + aux * |residual - its reconstruction from the dead latents|^2 (Gao et al. 2024)."""

    aux = param.Number(1 / 32, bounds=(0, None), doc="Weight of the auxiliary error.")

    def objective(self, dictionary, encoding, batch, context):
        losses = super().objective(dictionary, encoding, batch, context)
        dead = (context.samples_since_fired >= 100).nonzero().flatten()
        if len(dead) == 0:
            return losses | {"aux": losses["error"].new_zeros(())}
        residual = (batch.targets - encoding.reconstruction).detach()
        rebuilt = dictionary.pre(batch.inputs, dead).relu() @ dictionary.W_dec[dead]
        return losses | {"aux": self.aux * squared_error(rebuilt, residual)}


class Pursuit(Nonlinearity):
    """Orthogonal matching pursuit: k times the decoder row nearest to the residual, then least squares on all of them."""

    def __init__(self, k: int):
        super().__init__()
        self.k = int(k)

    def settings(self):
        return {"k": self.k}

    def select(self, inputs, dictionary):
        x = inputs - dictionary.b_dec
        residual, chosen = x, []
        with torch.no_grad():
            for _ in range(self.k):
                scores = residual @ dictionary.W_dec.T
                if chosen:
                    scores.scatter_(1, torch.stack(chosen, 1), -torch.inf)
                chosen.append(scores.argmax(dim=1))
                rows = dictionary.W_dec[torch.stack(chosen, 1)]
                values = torch.linalg.lstsq(rows.transpose(1, 2), x[:, :, None]).solution[..., 0]
                residual = x - (values[..., None] * rows).sum(1)
        return Latents.rows_of(values, torch.stack(chosen, 1), dictionary.n_latents)


class TinyOMP(TopK):
    """The error alone; codes come from a pursuit in the decoder."""

    def nonlinearity(self, n_latents):
        return Pursuit(self.k)


@pytest.mark.parametrize("method", [TinyGated(), TinyTied(), TinyAuxK(k=2), TinyOMP(k=2)], ids=lambda m: type(m).__name__)
def test_the_contract_carries_other_methods(method, tmp_path):
    """In one class each: they train, descend, and come back from a file with the same codes."""
    source = HierarchyBench(parents=2, children=2, independent=2, d_in=8)
    dictionary = method.build(8, 8, 16, torch.Generator().manual_seed(0))
    state = TrainState.start(dictionary, Schedule(lr=1e-2), dead_after=100)
    steps = train(state, method, source, batch_size=64)
    losses = [next(steps).losses["error"].item() for _ in range(80)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    batch = source.sample(20, stream(1))
    saved = SparseDictionary.load(dictionary.eval().save(tmp_path / "d.safetensors"))
    torch.testing.assert_close(saved(batch.inputs).reconstruction, dictionary(batch.inputs).reconstruction)


def test_a_tied_encoder_stays_tied():
    method = TinyTied()
    dictionary = method.build(8, 8, 16, torch.Generator().manual_seed(0))
    state = TrainState.start(dictionary, Schedule(lr=1e-2))
    steps = train(state, method, HierarchyBench(parents=2, children=2, independent=2, d_in=8), batch_size=64)
    start = dictionary.W_dec.detach().clone()
    for _ in range(5):
        next(steps)
    assert torch.equal(dictionary.W_enc, dictionary.W_dec) and not torch.equal(start, dictionary.W_dec)


def test_aux_gradients_reach_dead_latents_alone():
    method = TinyAuxK(k=1, aux=1.0)
    dictionary, batch = built(method), rows()
    with torch.no_grad():
        dictionary.b_enc[:3] = -50  # silent in the top k, and in the auxiliary path
        dictionary.b_enc[3:6] = 0.0
    silent = torch.zeros(N_LATENTS, dtype=torch.long)
    silent[3:6] = 1_000
    encoding = dictionary(batch.inputs)
    method.objective(dictionary, encoding, batch, Context(0, silent, None, torch.Generator()))["aux"].backward()
    moved = dictionary.W_dec.grad.abs().sum(1) > 0
    assert moved.tolist() == [i in (3, 4, 5) for i in range(N_LATENTS)]


def test_a_pursuit_explains_at_least_as_much_as_its_first_pick():
    dictionary = SparseDictionary(torch.zeros(9, 4), normalize(torch.randn(9, 4), dim=1), nonlinearity=Pursuit(3))
    x = torch.randn(30, 4)
    errors = []
    for k in (1, 2, 3):
        dictionary.nonlinearity.k = k
        encoding = dictionary(x)
        errors.append(squared_error(encoding.reconstruction, x).item())
        residual = (x - encoding.reconstruction)[:, None] @ dictionary.W_dec[encoding.latents.indices.view(30, k)].transpose(1, 2)
        assert residual.abs().max() < 1e-4, "orthogonal to every row it uses"
    assert errors[0] > errors[1] > errors[2]
