"""Scales that a dictionary holds: a function of raw rows, trained in units of its own, folded where a format has no place for them."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from sdl_explorer import Anchors, Gated, HierarchyBench, Realign, ReLU, Resample, Session, SparseDictionary, Stored, TopK, registry, sweep
from sdl_explorer.data.activations import Activations, Block
from sdl_explorer.data.sources import Source, stream
from sdl_explorer.diagnosis.continuation import continued_method
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.diagnosis.preflight import preflight
from sdl_explorer.models import kernels
from sdl_explorer.models.formats.native import build_dictionary, dictionary_record, dictionary_tensors
from sdl_explorer.models.methods import Method
from sdl_explorer.models.methods.classical import Lasso
from sdl_explorer.models.methods.pursuit import OMP, MatchingPursuit, with_pursuit
from sdl_explorer.models.rewrites import as_jumprelu, folded, scaled, shifted, uncentred
from sdl_explorer.models.start import geometric_median, started_on, unit_scale
from sdl_explorer.training.interventions import Anchor
from sdl_explorer.training.loop import train
from sdl_explorer.training.state import Schedule, TrainState

D, D_OUT, F, K = 6, 5, 16, 2
METHODS = [cls for cls in registry.members(Method).values() if cls.__module__.startswith("sdl_explorer.")]
KINDS = ["sae", "transcoder", "crosscoder"]


def method_of(cls) -> Method:
    return cls(**({"k": K} if "k" in cls.param else {}))


def data(kind="sae", factor=1.0, n=96) -> Activations:
    """Rows with a mean and with directions of unequal size, in float64; the transcoder's targets have a scale of their own."""
    x = torch.randn(n, D, generator=stream(0), dtype=torch.float64) * torch.linspace(0.5, 3, D).double() + 2
    y = 0.01 * torch.tanh(x) @ torch.randn(D, D_OUT, generator=stream(1), dtype=torch.float64) - 0.04
    if kind == "transcoder":
        return Activations(factor * x, factor * y)
    halves = (Block("a", slice(0, 3), slice(0, 3)), Block("b", slice(3, D), slice(3, D))) if kind == "crosscoder" else ()
    x = factor * x
    return Activations(x, x, blocks=halves)


class Fixed(Source):
    """Batches of 24 that go round and round in the same rows."""

    __abstract = True

    def __init__(self, rows: Activations):
        super().__init__()
        self.rows = rows

    def batch(self, index, size, order=0):
        return self.rows.take((torch.arange(24) + 24 * index) % self.rows.n)


def built(cls=TopK, d_out=D, **settings) -> SparseDictionary:
    """New weights in float64 whose biases are not zero."""
    dictionary = (cls(**settings) if settings else method_of(cls)).build(D, d_out, F, stream(2)).double()
    with torch.no_grad():
        dictionary.b_enc.copy_(0.1 * torch.randn(F, generator=stream(3)))
        dictionary.b_dec.copy_(0.1 * torch.randn(d_out, generator=stream(4)))
    return dictionary


def trained(method, dictionary, rows, n=6):
    state = TrainState.start(dictionary.requires_grad_(True), Schedule(lr=1e-2), dead_after=24)
    steps = islice(train(state, method, Fixed(rows), batch_size=24), n)
    return [{name: float(loss) for name, loss in step.losses.items()} for step in steps]


def same_weights(a, b, **tolerance):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


def same_function(a, b, x, **tolerance):
    with torch.no_grad():
        torch.testing.assert_close(a(x).latents.dense(), b(x).latents.dense(), **tolerance)
        torch.testing.assert_close(a(x).reconstruction, b(x).reconstruction, **tolerance)


# the dictionary ---------------------------------------------------------------------------------------------------------


def test_the_scales_are_the_equation():
    W_enc, W_dec, b_enc, b_dec = torch.randn(F, D), torch.randn(F, D_OUT), torch.randn(F), torch.randn(D_OUT)
    dictionary, x = SparseDictionary(W_enc, W_dec, b_enc, b_dec, input_scale=3.0, target_scale=0.25), torch.randn(9, D)
    codes = (3.0 * x @ W_enc.T + b_enc).relu()
    torch.testing.assert_close(dictionary.encode(x).dense(), codes)
    torch.testing.assert_close(dictionary(x).reconstruction, (codes @ W_dec + b_dec) * 4)
    core = dictionary.core
    assert core.W_enc is dictionary.W_enc and core.nonlinearity is dictionary.nonlinearity and core.core is core
    torch.testing.assert_close(core(3.0 * x).reconstruction, 0.25 * dictionary(x).reconstruction)
    assert (dictionary.input_scale, dictionary.target_scale) == (3.0, 0.25) and "input_scale=3" in repr(dictionary)


def test_subtracting_the_decoder_bias_happens_in_units_of_the_weights():
    W, b = torch.randn(F, D), torch.randn(D)
    dictionary, x = SparseDictionary(W, W, None, b, subtract_b_dec=True, input_scale=3.0, target_scale=3.0), torch.randn(9, D)
    torch.testing.assert_close(dictionary.pre(x), (3 * x - b) @ W.T)
    with pytest.raises(ValueError, match="subtract_b_dec needs one scale for both sides; they are 3 and 1"):
        SparseDictionary(W, W, subtract_b_dec=True, input_scale=3.0)


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan")])
def test_a_scale_is_positive_and_finite(scale):
    with pytest.raises(ValueError, match=r"target_scale is .*positive finite"):
        SparseDictionary(torch.randn(F, D), torch.randn(F, D), target_scale=scale)


def test_without_scales_rows_are_not_even_copied():
    dictionary, rows = built(), data()
    assert dictionary.core is dictionary and dictionary.normalised(rows) is rows and dictionary.centred(rows.inputs) is rows.inputs


def test_normalised_rows_stay_what_they_are():
    for kind in KINDS:
        rows = data(kind)
        made = started_on(built(d_out=rows.targets.shape[1]), rows, normalise=True)
        normal = made.normalised(rows)
        assert normal.kind == kind and (normal.targets is normal.inputs) == (kind != "transcoder")
        for side, width in ((normal.inputs, D), (normal.targets, made.d_out)):
            assert (side - side.mean(dim=0)).square().sum(dim=1).mean() == pytest.approx(width, rel=1e-9)


@pytest.mark.parametrize("name", ["topk", "relu"])
def test_the_kernels_know_the_scales(name, monkeypatch):
    """Sparse and dense paths agree, gradients too."""
    n_latents, x = 256, torch.randn(40, D)
    W, b_enc = torch.randn(n_latents, D), torch.full((n_latents,), -10.0 if name == "relu" else 0.0)
    sigma = TopK(k=K).nonlinearity(n_latents) if name == "topk" else ReLU().nonlinearity(n_latents)
    make = lambda: SparseDictionary(W, W, b_enc, torch.ones(D), sigma, subtract_b_dec=True, input_scale=1.5, target_scale=1.5)
    results = []
    for small in (0.0, float("inf")):
        monkeypatch.setattr(kernels, "SMALL", small)
        dictionary = make()
        encoding = dictionary(x)
        assert encoding.latents.is_sparse == (small == 0 or name == "topk")
        (encoding.reconstruction - x).square().sum().backward()
        results.append([encoding.reconstruction, *(p.grad for p in dictionary.parameters())])
    for sparse, dense in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)


# training ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", METHODS)
def test_every_method_trains_alike_whatever_the_units_of_the_data(cls, kind):
    """Rows times 37 give the same weights and losses, which are those of rows that were normalised by hand."""
    made, losses = [], []
    for factor in (1.0, 37.0):
        rows = data(kind, factor)
        made.append(started_on(built(cls, rows.targets.shape[1]), rows, normalise=True))
        losses.append(trained(method_of(cls), made[-1], rows))
    rows, one = data(kind), made[0]
    inputs = one.input_scale * rows.inputs
    by_hand = replace(rows, inputs=inputs, targets=inputs if rows.targets is rows.inputs else one.target_scale * rows.targets)
    made.append(started_on(built(cls, rows.targets.shape[1]), by_hand))
    losses.append(trained(method_of(cls), made[-1], by_hand))
    for other, curve in zip(made[1:], losses[1:], strict=True):
        same_weights(other, one, rtol=1e-5, atol=1e-7)
        for step, first in zip(curve, losses[0], strict=True):
            assert step == pytest.approx(first, rel=1e-5, abs=1e-9)
    assert not torch.equal(one.W_dec, built(cls, one.d_out).W_dec), "nothing was trained"
    assert made[1].input_scale == pytest.approx(one.input_scale / 37)
    torch.testing.assert_close(made[1](37 * rows.inputs).reconstruction, 37 * one(rows.inputs).reconstruction, rtol=1e-5, atol=1e-5)


def test_without_normalisation_the_units_matter():
    """What the test above would miss if training went on in raw units."""
    curves = [trained(ReLU(), started_on(built(ReLU), data(factor=c)), data(factor=c))[-1] for c in (1.0, 37.0)]
    assert curves[1]["error"] > 100 * curves[0]["error"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [Resample(latents=[1, 4]), Resample(latents=[1, 4], target="residual"), Realign(least=5)],
    ids=["resample from inputs", "resample from residuals", "realign"],
)
def test_interventions_plan_in_units_of_the_weights(change, kind):
    plans = []
    for factor in (1.0, 37.0):
        rows = data(kind, factor, n=400)
        names = tuple(block.name for block in rows.blocks)
        source = Stored(rows.inputs.float(), rows.targets.float() if kind == "transcoder" else None, blocks=names)
        with Session(source, TopK(k=K), n_latents=F, normalise=True, batch_size=32).train(20) as session:
            assert session.kind == kind
            plans.append(session.plan(change))
    one, other = plans
    assert torch.equal(one.latents, other.latents)
    torch.testing.assert_close(other.W_enc, one.W_enc, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other.b_enc, one.b_enc, rtol=1e-3, atol=1e-3)
    assert other.expected == pytest.approx(one.expected, rel=1e-3)


def test_a_plan_says_the_error_that_training_descends():
    with Session(Stored(50 * data(n=400).inputs.float()), TopK(k=K), n_latents=F, normalise=True, batch_size=64).train(100) as session:
        expected = session.plan(Resample(latents=[0])).expected["error before"]
        assert expected == pytest.approx(session.history.losses["error"][-1], rel=0.3)
        raw = check_health(session.dictionary, session.source.sample(400, stream(0), "choose")).mse
        assert raw > 50 * expected
        session.anchor(Anchors.from_rows(torch.eye(D)[:2]), latents=[0, 1], hard=True)
        session.train(3)
        torch.testing.assert_close(session.dictionary.W_dec[:2], torch.eye(D)[:2])
        assert Anchor().weight == 0.1


# reading ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [1e-4, 1e4])
def test_findings_are_those_of_the_folded_dictionary(s):
    """Rounding is told from firing at any scale."""
    rows, made = data(), built(ReLU)
    inputs = rows.inputs.float() / s
    rows = Activations(inputs, inputs)
    made = scaled(made, s).float()
    one, other = check_health(made, rows), check_health(folded(made), rows)
    assert one.mse == pytest.approx(other.mse, rel=1e-4) and one.l0 == other.l0 > 0
    np.testing.assert_allclose(one.firing_rate, other.firing_rate)
    np.testing.assert_allclose(one.encoder_response, other.encoder_response, atol=1e-5)
    a, b = preflight(made, rows), preflight(folded(made), rows)
    assert a.l0 == b.l0 and a.unexplained_variance == pytest.approx(b.unexplained_variance, rel=1e-4)


@pytest.mark.parametrize("cls", [ReLU, Gated])
def test_a_checkpoint_goes_on_with_penalties_in_its_own_units(cls):
    rows, made = data(), built(cls).eval()
    raw = replace(rows, inputs=rows.inputs / 40, targets=rows.targets / 40)
    one, other = continued_method(made, rows), continued_method(scaled(made, 40.0), raw)
    assert other.l1 == pytest.approx(one.l1, rel=1e-6) and other.unit_norm == one.unit_norm


# rewrites ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [7.3, 0.1])
@pytest.mark.parametrize("cls", METHODS)
def test_scaled_is_exact_for_every_method(cls, s):
    """Pursuits and their unit atoms too, whose codes a scaled W_enc would change."""
    dictionary, x = built(cls).eval(), data().inputs
    raw = scaled(dictionary, s)
    with torch.no_grad():
        expected = dictionary(s * x)
        assert (expected.latents.dense() > 0).any()
        torch.testing.assert_close(raw(x).latents.dense(), expected.latents.dense())
        torch.testing.assert_close(raw(x).reconstruction, expected.reconstruction / s)
    assert torch.equal(raw.W_enc, dictionary.W_enc) and dictionary.input_scale == 1
    assert scaled(raw, 2).input_scale == pytest.approx(2 * s)


@pytest.mark.parametrize("cls", [cls for cls in METHODS if not method_of(cls).nonlinearity(F).explains_rows])
@pytest.mark.parametrize("scales", [(3.0, 3.0), (3.0, 0.25)])
@pytest.mark.parametrize("tie", ["untied", "tied"])
def test_folded_is_the_same_function_without_scales(cls, scales, tie):
    method = method_of(cls)
    method.tie = tie
    dictionary, x = method.build(D, D, F, stream(2)).double().eval(), data().inputs
    dictionary.input_scale, dictionary.target_scale = scales
    plain = folded(dictionary)
    assert (plain.input_scale, plain.target_scale) == (1, 1) and (dictionary.input_scale, dictionary.target_scale) == scales
    assert not plain.tied and dictionary.tied == (tie == "tied")
    same_function(plain, dictionary, x)
    assert dictionary.encode(x).l0 > 0


def test_folding_a_pre_bias():
    dictionary, x = built(), data().inputs
    dictionary.subtract_b_dec, dictionary.input_scale, dictionary.target_scale = True, 3.0, 3.0
    same_function(folded(dictionary), dictionary, x)
    same_function(uncentred(dictionary), dictionary, x)
    assert folded(dictionary).subtract_b_dec and not uncentred(dictionary).subtract_b_dec


@pytest.mark.parametrize("sigma", [MatchingPursuit(K), OMP(K), Lasso(0.1)], ids=lambda sigma: type(sigma).__name__)
def test_a_sigma_that_explains_rows_is_not_folded(sigma):
    """Atoms of another length give other codes; a pursuit of scaled rows is exact by keeping the scales."""
    W, x = torch.nn.functional.normalize(torch.randn(F, D, generator=stream(2)), dim=1), data().inputs.float()
    plain = SparseDictionary(W, W, nonlinearity=sigma)
    made = scaled(plain, 3.0)
    with pytest.raises(TypeError, match=rf"{type(sigma).__name__} explains rows .* \(3, 3\) stay\. Save it as native"):
        folded(made)
    by_hand = SparseDictionary(3 * W, W / 3, nonlinearity=sigma)
    with torch.no_grad():
        assert not torch.allclose(by_hand.encode(x).dense(), plain.encode(3 * x).dense(), rtol=1e-2)
        torch.testing.assert_close(made(x).reconstruction, plain(3 * x).reconstruction / 3)
    assert folded(plain).nonlinearity is not None


def test_a_pursuit_over_a_scaled_decoder_explains_the_targets():
    """Noise in the encoder's own scale does not matter: the atoms are the decoder's."""
    W = torch.nn.functional.normalize(torch.randn(F, D, generator=stream(2), dtype=torch.float64), dim=1)
    codes = torch.rand(50, F, generator=stream(5), dtype=torch.float64) * torch.nn.functional.one_hot(torch.arange(50) % F)
    x = (codes @ W + 0.3) / 4
    trained = SparseDictionary(torch.randn(F, D).double(), W, None, torch.full((D,), 0.3).double(), input_scale=9.0, target_scale=4.0)
    with torch.no_grad():
        torch.testing.assert_close(with_pursuit(trained, 1)(x).reconstruction, x)


@pytest.mark.parametrize("centre", [False, True])
def test_shifted_knows_the_scales(centre):
    dictionary, x = scaled(built(), 3.0), data().inputs
    dictionary.subtract_b_dec = centre
    mean = torch.linspace(-1, 2, D).double()
    moved = shifted(dictionary, mean, mean)
    with torch.no_grad():
        torch.testing.assert_close(moved(x).latents.dense(), dictionary(x - mean).latents.dense())
        torch.testing.assert_close(moved(x).reconstruction, dictionary(x - mean).reconstruction + mean)


def test_a_conversion_keeps_the_scales():
    dictionary, x = scaled(built().eval(), 3.0), data().inputs
    converted = as_jumprelu(dictionary, x)
    assert converted.input_scale == 3 and converted.encode(x).l0 == pytest.approx(float(dictionary.encode(x).l0), rel=0.05)


# files ------------------------------------------------------------------------------------------------------------------


def test_native_files_hold_the_scales_and_older_readers_refuse_them(tmp_path):
    dictionary, x = started_on(built(ReLU), data(), normalise=True).float().eval(), data().inputs.float()
    dictionary.save(tmp_path / "d.safetensors")
    loaded = SparseDictionary.load(tmp_path / "d.safetensors")
    assert (loaded.input_scale, loaded.target_scale) == (dictionary.input_scale, dictionary.target_scale)
    same_function(loaded, dictionary, x, rtol=0, atol=0)
    assert dictionary_record(dictionary)["format_version"] == 2
    assert dictionary_record(folded(dictionary))["format_version"] == 1, "files without scales stay readable where they were"


def test_native_files_from_before_scales_and_damaged_ones():
    record, tensors = dictionary_record(built().float()), dictionary_tensors(built().float())
    old = {k: v for k, v in record.items() if k not in ("input_scale", "target_scale")}
    assert build_dictionary(old, tensors).input_scale == 1
    for bad in (0, -2.0, "1", None, True, float("nan")):
        with pytest.raises(ValueError, match=r"input_scale is .* must be a positive number"):
            build_dictionary(record | {"input_scale": bad}, tensors)


SAELENS = [
    (name, "sae", pre_bias) for name in ("ReLU", "JumpReLU", "TopK", "MultiTopK", "BatchTopK", "Gated") for pre_bias in (False, True)
]


@pytest.mark.parametrize(("name", "kind", "pre_bias"), [*SAELENS, *((n, "transcoder", False) for n in ("ReLU", "JumpReLU", "BatchTopK"))])
def test_saelens_gets_folded_weights(tmp_path, name, kind, pre_bias):
    cls, rows = registry.members(Method)[name], data(kind, 37.0)
    made = started_on(built(cls, rows.targets.shape[1]), rows, normalise=True, pre_bias=pre_bias)
    trained(method_of(cls), made, rows)
    made, x = made.float().eval(), rows.inputs.float()
    made.provenance = {"kind": kind}
    made.save(tmp_path / "s", "saelens")
    loaded = SparseDictionary.load(tmp_path / "s")
    assert loaded.input_scale == 1 and made.input_scale != 1
    with torch.no_grad():
        assert (made.encode(x).dense() > 0).any()
        torch.testing.assert_close(loaded(x).reconstruction, made(x).reconstruction, rtol=1e-5, atol=1e-5 * float(x.abs().max()))


# where new weights start ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [2, 6, 40])
def test_the_geometric_median_is_the_minimiser(d):
    x = torch.distributions.Exponential(1.0).sample((301, d)).double() * torch.linspace(1, 5, d)
    cost = lambda y: float((x - torch.as_tensor(y)).norm(dim=1).sum())
    slope = lambda y: (torch.nn.functional.normalize(torch.as_tensor(y) - x, dim=1)).sum(dim=0).numpy()
    best = minimize(cost, x.mean(dim=0).numpy(), jac=slope, method="BFGS", options={"gtol": 1e-9}).x
    found = geometric_median(x)
    scale = float((x - found).norm(dim=1).mean())
    assert np.abs(found.numpy() - best).max() < 1e-6 * scale
    assert cost(found) <= cost(best) * (1 + 1e-12)
    assert float((found - x.mean(dim=0)).norm()) > 0.01 * scale, "skewed rows: the mean is elsewhere"


def test_an_outlier_moves_the_mean_and_not_the_median():
    x = torch.randn(200, D, generator=stream(6)) + 3
    bad = torch.cat([x, torch.full((5, D), 1e4)])
    assert float((geometric_median(bad) - geometric_median(x)).norm()) < 0.2
    assert float((bad.mean(dim=0) - x.mean(dim=0)).norm()) > 100


def test_the_median_of_rows_that_coincide():
    point = torch.tensor([1.0, -2.0])
    assert torch.equal(geometric_median(point.expand(7, 2)), point)
    assert torch.equal(geometric_median(point[None]), point)
    most = torch.cat([point.expand(6, 2), torch.randn(5, 2)])  # more than half in one place: that place
    torch.testing.assert_close(geometric_median(most), point, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("centre", ["mean", "median", "none"])
def test_new_weights_start_where_they_are_told(kind, normalise, centre):
    rows = data(kind)
    given = built(d_out=rows.targets.shape[1])
    made = started_on(given, rows, centre=centre, normalise=normalise)
    find = {"mean": lambda x: x.mean(dim=0), "median": geometric_median, "none": lambda x: torch.zeros(x.shape[1]).double()}[centre]
    mu_in, mu_out = find(rows.inputs), find(rows.targets)
    s, t = (unit_scale(rows.inputs), unit_scale(rows.targets)) if normalise else (1.0, 1.0)
    with torch.no_grad():
        expected = given((rows.inputs - mu_in) * s)
        torch.testing.assert_close(made(rows.inputs).latents.dense(), expected.latents.dense())
        torch.testing.assert_close(made(rows.inputs).reconstruction, expected.reconstruction / t + mu_out)


@pytest.mark.parametrize("centre", ["mean", "median", "none"])
def test_a_pre_bias_centres_both_sides(centre):
    rows, given = data(factor=5.0), built()
    start = lambda: started_on(given, rows, centre=centre, normalise=True, pre_bias=True)
    made = start()
    assert made.subtract_b_dec and torch.equal(made.b_enc, given.b_enc)
    expected = (made.input_scale * rows.inputs - made.b_dec) @ given.W_enc.T + given.b_enc
    torch.testing.assert_close(made.pre(rows.inputs), expected)
    trained(TopK(k=K), made, rows, 2)
    assert not torch.equal(made.b_dec, start().b_dec), "the pre-bias learns"


def test_what_the_data_cannot_give_is_refused():
    with pytest.raises(ValueError, match="pre_bias is on and these are a transcoder's rows"):
        started_on(built(d_out=D_OUT), data("transcoder"), pre_bias=True)
    same = torch.ones(20, D).double()
    with pytest.raises(ValueError, match="mean squared distance of 20 inputs from their mean is 0"):
        started_on(built(), Activations(same, same), normalise=True)
    with pytest.raises(ValueError, match="centre is 'middle'; it is one of mean, median, none"):
        started_on(built(), data(), centre="middle")


# a session --------------------------------------------------------------------------------------------------------------


def stored(kind="sae", factor=1.0) -> Stored:
    rows = data(kind, factor, n=400)
    return Stored(
        rows.inputs.float(), rows.targets.float() if kind == "transcoder" else None, blocks=tuple(block.name for block in rows.blocks)
    )


def test_by_itself_a_session_starts_as_it_did():
    for source in (stored(), stored("transcoder"), HierarchyBench()):
        with Session(source, TopK(k=K), n_latents=F, seed=3) as session:
            given = TopK(k=K).build(source.width_in, source.width_out, F, stream(3, "weights"))
            if source.n is not None:
                rows = source.sample(8_192, stream(3, "centre"), "train")
                given = shifted(given, rows.inputs.mean(dim=0), rows.targets.mean(dim=0))
            same_weights(session.dictionary, given, rtol=0, atol=0)
            assert (session.normalise, session.centre, session.pre_bias) == (False, "auto", False)
            assert session.dictionary.input_scale == 1 and not session.dictionary.subtract_b_dec


@pytest.mark.parametrize(
    "source", [stored(factor=37.0), stored("transcoder", 37.0), stored("crosscoder"), HierarchyBench()], ids=[*KINDS, "bench"]
)
def test_a_normalised_session_learns_and_reconstructs_raw_rows(source):
    settings = {"method": TopK(k=3), "n_latents": 32, "normalise": True, "lr": 1e-2, "batch_size": 64}
    with Session(source, **settings) as session:
        before = session.find(check_health).unexplained_variance
        session.train(60)
        after = session.find(check_health)
        assert after.unexplained_variance < 0.6 * before
        rows = session.source.sample(2_000, stream(0), "train")
        assert session.dictionary.input_scale == pytest.approx(unit_scale(rows.inputs), rel=0.1)
        assert session.history.losses["error"][0] < 10 * source.width_out, "the loss is in units of the weights"


@pytest.mark.parametrize("kind", KINDS)
def test_a_normalised_run_goes_on_bit_for_bit(kind, tmp_path):
    settings = {"method": TopK(k=K), "n_latents": F, "batch_size": 32, "normalise": True, "centre": "median", "pre_bias": kind == "sae"}
    with_break, without = Session(stored(kind), **settings), Session(stored(kind), **settings)
    try:
        with_break.train(10).save(tmp_path / "run")
        with_break.close()
        with_break = Session.open(tmp_path / "run")
        constant = (with_break.normalise, with_break.centre, with_break.pre_bias)
        assert constant == (True, "median", kind == "sae")
        with pytest.raises(TypeError):
            with_break.normalise = False
        a, b = with_break.train(10).dictionary, without.train(20).dictionary
        same_weights(a, b, rtol=0, atol=0)
        assert (a.input_scale, a.target_scale, a.subtract_b_dec) == (b.input_scale, b.target_scale, kind == "sae") and a.input_scale != 1
        with without.branch() as twin:
            assert twin.normalise and twin.dictionary.input_scale == a.input_scale
            same_weights(twin.train(2).dictionary, without.train(2).dictionary, rtol=0, atol=0)
        saved = SparseDictionary.load(tmp_path / "run")
        assert saved.input_scale == a.input_scale
    finally:
        with_break.close(), without.close()


def test_a_folder_from_before_opens(tmp_path):
    with Session(stored(), TopK(k=K), n_latents=F) as session:
        session.save(tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    for name in ("normalise", "centre", "pre_bias"):
        del record[name]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with Session.open(tmp_path / "run") as session:
        assert (session.normalise, session.centre, session.pre_bias) == (False, "auto", False)


@pytest.mark.parametrize("setting", [{"normalise": True}, {"centre": "median"}, {"pre_bias": True}])
def test_a_given_dictionary_brings_its_own(setting):
    with pytest.raises(ValueError, match=rf"{next(iter(setting))} is .*given dictionary has its own centre and scales\. Leave"):
        Session(stored(), dictionary=built().float(), **setting)


def test_a_normalised_checkpoint_is_trained_on_in_its_units(tmp_path):
    source = stored(factor=37.0)
    with Session(source, TopK(k=3), n_latents=32, normalise=True, lr=1e-2, batch_size=64).train(80) as first:
        path = first.dictionary.save(tmp_path / "d.safetensors")
        error = first.history.losses["error"][-1]
        with Session(source, dictionary=SparseDictionary.load(path)) as second:
            assert second.preflight.verdict == "fits" and second.method.unit_norm
            assert second.dictionary.input_scale == first.dictionary.input_scale
            second.train(2)
            assert second.history.losses["error"][0] == pytest.approx(error, rel=0.5)


def test_a_pre_bias_needs_inputs_as_targets():
    with pytest.raises(ValueError, match="pre_bias is on and these are a transcoder's rows"):
        Session(stored("transcoder"), TopK(k=K), n_latents=F, pre_bias=True)


def test_expansion_factor():
    size = lambda *args, **settings: Session(stored(), TopK(k=K), *args, **settings)
    with size(expansion_factor=2.5) as a, size() as b, size(15, expansion_factor=2.5) as c, size(9) as d:
        assert [s.n_latents for s in (a, b, c, d)] == [15, 24, 15, 9]
        assert [s.expansion_factor for s in (a, b, c, d)] == [2.5, 4, 2.5, 1.5]
    with pytest.raises(ValueError, match=r"n_latents is 9, and 2\.5 \(expansion_factor\) times 6 is 15; give one of them"):
        size(9, expansion_factor=2.5)
    for bad in (0, -1, float("inf"), True, "4"):
        with pytest.raises(ValueError, match=r"expansion_factor is .* give a positive number"):
            size(expansion_factor=bad)


def test_a_sweep_keeps_what_the_session_says(tmp_path):
    with Session(stored(factor=37.0), TopK(k=K), n_latents=F, normalise=True, batch_size=32) as session:
        table = sweep(session, {"centre": ["mean", "median"]}, [0], steps=2, folder=tmp_path)
    assert not table["failed"].any()
    for centre in ("mean", "median"):
        with Session.open(next(tmp_path.glob(f"{centre}*")) / "run") as cell:
            assert cell.normalise and cell.centre == centre and cell.dictionary.input_scale != 1
