"""Tied, softly tied and untied encoders: what training, interventions, commits and files keep of a tie, bit for bit."""

import copy

import pytest
import torch

from sdl_explorer import registry
from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Anchors
from sdl_explorer.data.bench import LinearBench
from sdl_explorer.data.hierarchy import HierarchyBench
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.formats.native import build_dictionary, dictionary_record, dictionary_tensors
from sdl_explorer.models.methods import BatchTopK, Context, Method, ReLU, TopK
from sdl_explorer.models.methods.topk import TopKSelection
from sdl_explorer.models.rewrites import folded, scaled, shifted, uncentred, untied
from sdl_explorer.session import Session
from sdl_explorer.training.interventions import Anchor, Resample
from sdl_explorer.training.loop import train
from sdl_explorer.training.state import Schedule, TrainState

METHODS = [cls for cls in registry.members(Method).values() if cls.__module__.startswith("sdl_explorer.")]
SETTINGS = {"device": "cpu", "batch_size": 32, "dead_after": 400}
D, N_LATENTS = 8, 16


def source():
    return HierarchyBench(parents=2, children=2, independent=2, d_in=D)


def small(cls, **settings):
    return cls(**({"k": 3} if "k" in cls.param else {}), **settings)


def built(method, n_latents=N_LATENTS) -> SparseDictionary:
    return method.build(D, D, n_latents, torch.Generator().manual_seed(0)).train()


def trained(method, n=20, lr=1e-2) -> TrainState:
    state = TrainState.start(built(method), Schedule(lr=lr), dead_after=400)
    steps = train(state, method, source(), batch_size=32)
    for _ in range(n):
        next(steps)
    return state


def same(a, b) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(p == q and torch.equal(v, w) for (p, v), (q, w) in pairs)


# training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", METHODS)
def test_every_method_ties(cls):
    """One parameter; it starts where the untied one starts, moves, and the optimiser knows it once."""
    method = small(cls, tie="tied")
    start = built(method)
    assert start.tied and torch.equal(start.W_enc, built(small(cls)).W_enc)
    names = [name for name, _ in start.named_parameters()]
    assert "W_dec" not in names and len(names) == len(list(built(small(cls)).parameters())) - 1
    state = trained(method, 4)
    assert state.dictionary.tied and state.dictionary.W_enc.data_ptr() == state.dictionary.W_dec.data_ptr()
    assert not torch.equal(state.dictionary.W_enc, start.W_enc)
    assert sum(p is state.dictionary.W_dec for group in state.optimiser.param_groups for p in group["params"]) == 1
    if method.unit_norm:
        torch.testing.assert_close(state.dictionary.W_enc.norm(dim=1), torch.ones(N_LATENTS))


@pytest.mark.parametrize("cls", METHODS)
def test_every_method_ties_softly_or_not(cls):
    """A soft tie of a large weight ends nearer to a tie than none; its term is the published square, and no other method has it."""
    free, soft = trained(small(cls), 15), trained(small(cls, tie="soft", tie_weight=10.0), 15)
    gap = lambda state: (state.dictionary.W_enc - state.dictionary.W_dec).norm().item()
    assert not free.dictionary.tied and not soft.dictionary.tied
    assert gap(soft) < 0.5 * gap(free)
    method = small(cls, tie="soft", tie_weight=0.3)
    d = soft.dictionary
    torch.testing.assert_close(method.weight_terms(d), {"tie": 0.3 * ((d.W_enc - d.W_dec) ** 2).sum()})
    assert small(cls).weight_terms(d) == {} == small(cls, tie="tied").weight_terms(d)


def test_a_soft_tie_is_a_loss_of_the_step():
    method = TopK(k=3, tie="soft", tie_weight=0.2)
    state = trained(method, 3)
    distance = (state.dictionary.W_enc - state.dictionary.W_dec).square().sum().item()
    step = next(train(state, method, source(), batch_size=32))
    assert step.losses["tie"].item() == pytest.approx(0.2 * distance, rel=1e-5)
    assert "tie" not in next(train(trained(TopK(k=3), 1), TopK(k=3), source(), batch_size=32)).losses


def test_the_tied_gradient_is_the_sum_of_both_sides():
    method = ReLU(tie="tied")
    tied, free = built(method), built(ReLU())
    x = torch.randn(30, D)
    for d in (tied, free):
        context = Context(0, torch.zeros(N_LATENTS, dtype=torch.long), None, torch.Generator())
        sum(method.objective(d, d(x), Activations(x, x), context).values()).backward()
    torch.testing.assert_close(tied.W_enc.grad, free.W_enc.grad + free.W_dec.grad)


@pytest.mark.slow
def test_a_tied_topk_recovers_in_the_encoder_what_an_untied_one_does_not():
    """The known answer on the bench: a tied encoder follows the features, an untied one leans away from their interference."""
    bench = LinearBench(n_features=24, d_in=16, sparsity=0.9, max_interference=0.6)
    features = bench.sample(1, torch.Generator().manual_seed(0)).truth.input_features

    def encoder_cosine(tie: str) -> float:
        method = TopK(k=3, tie=tie)
        state = TrainState.start(method.build(16, 16, 48, torch.Generator().manual_seed(0)), Schedule(lr=5e-3))
        steps = train(state, method, bench, batch_size=128)
        for _ in range(250):
            next(steps)
        rows = torch.nn.functional.normalize(state.dictionary.W_enc.detach(), dim=1)
        return (features @ rows.T).amax(dim=1).mean().item()

    assert encoder_cosine("tied") > encoder_cosine("untied") + 0.05


# refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", ["tied", "soft"])
def test_two_widths_cannot_tie(tie):
    with pytest.raises(ValueError, match=rf"TopK: tie is '{tie}'.*one width; they have 8 and 5.*untied"):
        TopK(k=3, tie=tie).build(8, 5, 16, torch.Generator())
    with pytest.raises(ValueError, match="one width"):
        Session(LinearBench(n_features=12, d_in=8, d_out=6, kind="transcoder", sparsity=0.8), TopK(k=2, tie=tie), 16, device="cpu")


@pytest.mark.filterwarnings("ignore:.*misfit")
def test_a_dictionary_and_settings_that_disagree_are_refused():
    tied, free = built(TopK(k=3, tie="tied")), built(TopK(k=3))
    with pytest.raises(ValueError, match=r"is tied, one parameter for both sides.*untied\(dictionary\)"):
        Session(source(), TopK(k=3), dictionary=tied, **SETTINGS)
    with pytest.raises(ValueError, match="has an encoder of its own, which would be lost"):
        Session(source(), TopK(k=3, tie="tied"), dictionary=free, **SETTINGS)
    with Session(source(), TopK(k=3), N_LATENTS, **SETTINGS) as session:
        session.train(2)
        session.method.tie = "tied"
        with pytest.raises(ValueError, match="encoder of its own"):
            session.train(1)
        session.method.tie = "soft"
        session.train(1)
        assert session.step == 3 and "tie" in session.snapshot.losses
        assert "method.tie untied to soft" in session.head.message


@pytest.mark.filterwarnings("ignore:.*misfit")
def test_a_tied_checkpoint_goes_on_tied():
    state = trained(TopK(k=3, tie="tied"), 100)
    with Session(source(), dictionary=state.dictionary, **SETTINGS) as session:
        assert session.method.tie == "tied" and session.dictionary.tied
        assert session.train(2).dictionary.tied


# interventions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"target": "residual"}, {"scale": 2.0, "noise": 0.1}])
def test_resampling_writes_one_row_which_is_the_plan(settings):
    """What the preview shows is what both sides get; moments of exactly these rows are cleared."""
    state = trained(TopK(k=3, tie="tied"))
    before = copy.deepcopy(state)
    choose = source().sample(200, torch.Generator().manual_seed(1), "choose")
    plan = Resample(latents=[2, 7], **settings).plan(state, choose, torch.Generator().manual_seed(2))
    assert same(state.dictionary, before.dictionary), "a plan changes nothing"
    assert torch.equal(plan.W_enc, plan.W_dec)
    assert [row.encoder_scale for row in plan.rows] == pytest.approx([1.0, 1.0])
    plan.apply(state)
    assert state.dictionary.tied and torch.equal(state.dictionary.W_enc[[2, 7]], plan.W_dec)
    others = [i for i in range(N_LATENTS) if i not in (2, 7)]
    assert torch.equal(state.dictionary.W_enc[others], before.dictionary.W_enc[others])
    moments, former = state.moments(state.dictionary.W_dec), before.moments(before.dictionary.W_dec)
    assert len(moments) == 2
    for moment, old in zip(moments, former, strict=True):
        assert not moment[[2, 7]].any() and torch.equal(moment[others], old[others]) and old[[2, 7]].any()


def test_the_decoder_wins_where_a_plan_names_both_sides():
    state = trained(TopK(k=3, tie="tied"), 2)
    choose = source().sample(50, torch.Generator().manual_seed(1), "choose")
    plan = Resample(latents=[3]).plan(state, choose, torch.Generator().manual_seed(2))
    object.__setattr__(plan, "W_enc", 5 * torch.ones(1, D))
    plan.apply(state)
    assert torch.equal(state.dictionary.W_enc[3:4], plan.W_dec) and state.dictionary.tied
    object.__setattr__(plan, "W_dec", None)
    plan.apply(state)
    assert torch.equal(state.dictionary.W_dec[3], 5 * torch.ones(D))


@pytest.mark.parametrize("hard", [False, True])
def test_anchors_hold_a_tied_latent(hard):
    method = TopK(k=3, tie="tied")
    state = trained(method)
    anchors = Anchors.from_rows(torch.randn(2, D, generator=torch.Generator().manual_seed(3)))
    choose = source().sample(100, torch.Generator().manual_seed(1), "choose")
    plan = Anchor(anchors=anchors, latents=[4, 9], weight=10.0, hard=hard).plan(state, choose, torch.Generator())
    assert torch.equal(plan.W_enc, plan.W_dec)
    plan.apply(state)
    steps = train(state, method, source(), batch_size=32)
    for _ in range(100):
        next(steps)
    rows = state.dictionary.W_enc.detach()[[4, 9]]
    assert state.dictionary.tied
    if hard:
        assert torch.equal(rows, anchors.targets)
    assert (torch.cosine_similarity(rows, anchors.inputs) > 0.95).all()


def test_training_some_latents_alone_leaves_the_others_and_their_moments():
    method = TopK(k=3, tie="tied")
    state = trained(method)
    before = copy.deepcopy(state)
    steps = train(state, method, source(), batch_size=32, only=[5])
    for _ in range(3):
        next(steps)
    others = [i for i in range(N_LATENTS) if i != 5]
    assert state.dictionary.tied
    assert torch.equal(state.dictionary.W_enc[others], before.dictionary.W_enc[others])
    assert not torch.equal(state.dictionary.W_enc[5], before.dictionary.W_enc[5])
    for moment, old in zip(state.moments(state.dictionary.W_enc), before.moments(before.dictionary.W_enc), strict=True):
        assert torch.equal(moment[others], old[others])


# sessions and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [TopK(k=3, tie="tied"), BatchTopK(k=3, tie="soft"), ReLU(tie="tied")], ids=lambda m: f"{type(m).__name__} {m.tie}"
)
@pytest.mark.slow
def test_a_session_goes_on_bit_for_bit(method, tmp_path):
    """Trained, resampled, anchored, reverted, branched, saved and opened, against the same commands in one go."""
    anchors = Anchors.from_rows(torch.eye(D)[:2])

    def begin() -> Session:
        session = Session(source(), method, N_LATENTS, **SETTINGS)
        session.train(6)
        session.resample([1, 4])
        session.anchor(anchors, latents=[2, 3])
        return session.train(5)

    def finish(session: Session) -> Session:
        session.release([2])
        return session.train(15)

    with begin() as session:
        session.save(tmp_path / "run")
    with Session.open(tmp_path / "run", device="cpu") as opened, begin() as whole:
        assert opened.dictionary.tied == whole.dictionary.tied == (method.tie == "tied")
        assert opened.method.tie == method.tie
        head = opened.commit("here")
        finish(opened), finish(whole)
        assert opened.step == whole.step == 26 and same(opened.dictionary, whole.dictionary)
        assert opened.dictionary.tied == (method.tie == "tied")
        with opened.branch(head) as branch:
            assert same(finish(branch).dictionary, whole.dictionary)
        opened.revert(head)
        assert opened.dictionary.tied == (method.tie == "tied")
        assert same(finish(opened).dictionary, whole.dictionary)
    assert SparseDictionary.load(tmp_path / "run").tied == (method.tie == "tied")


def test_native_files_keep_the_tie(tmp_path):
    tied, free = built(TopK(k=3, tie="tied")), built(TopK(k=3))
    for dictionary in (tied, free):
        loaded = SparseDictionary.load(dictionary.save(tmp_path / f"{dictionary.tied}.safetensors"))
        assert loaded.tied == dictionary.tied and same(loaded, dictionary)
        assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in dictionary.named_parameters()]
    loaded = SparseDictionary.load(tmp_path / "True.safetensors")
    with torch.no_grad():
        loaded.W_enc += 1
    assert torch.equal(loaded.W_enc, loaded.W_dec)


def test_native_files_from_before_ties_and_damaged_ones():
    tied = built(TopK(k=3, tie="tied"))
    record, tensors = dictionary_record(tied), dictionary_tensors(tied)
    assert record["tied"] is True and torch.equal(tensors["W_enc"], tensors["W_dec"])
    old = {key: value for key, value in record.items() if key != "tied"}
    assert not build_dictionary(old, tensors).tied, "what a file does not say is not tied, also where rows agree"
    with pytest.raises(ValueError, match="tied is 1; it must be true or false"):
        build_dictionary(record | {"tied": 1}, tensors)
    with pytest.raises(ValueError, match="tied is true and W_enc differs from W_dec"):
        build_dictionary(record, tensors | {"W_enc": tensors["W_enc"] + 1})


def test_saelens_gets_both_matrices(tmp_path):
    tied = built(TopK(k=3, tie="tied")).eval()
    loaded = SparseDictionary.load(tied.save(tmp_path / "s", "saelens"))
    assert not loaded.tied and torch.equal(loaded.W_enc, tied.W_enc) and torch.equal(loaded.W_dec, tied.W_dec)


def test_copies_and_conversions_keep_the_tie(device):
    tied = built(TopK(k=3, tie="tied"))
    for made in (copy.deepcopy(tied), copy.deepcopy(tied).double(), copy.deepcopy(tied).to(device), copy.deepcopy(tied).bfloat16().float()):
        assert made.tied and made.W_enc is not tied.W_enc
        with torch.no_grad():
            made.W_enc.zero_()
        assert not made.W_dec.any()
    assert tied.W_dec.any()


def test_only_the_same_parameter_ties():
    W = torch.randn(5, 3)
    assert not SparseDictionary(W, W).tied
    parameter = torch.nn.Parameter(W.clone())
    assert SparseDictionary(parameter, parameter).tied
    assert SparseDictionary(parameter, parameter, nonlinearity=TopKSelection(2), subtract_b_dec=True).tied


def test_rewrites_of_a_tied_dictionary():
    """A mean is folded into the biases and keeps the tie, and so does a scale that is held; folded it cannot, since it goes both ways."""
    tied = built(TopK(k=3, tie="tied")).eval()
    x, mean = torch.randn(40, D), torch.randn(D)
    with torch.no_grad():
        moved = shifted(tied, mean, mean)
        assert moved.tied
        torch.testing.assert_close(moved(x + mean).reconstruction, tied(x).reconstruction + mean)
        tied.b_dec.copy_(torch.randn(D))
        larger = scaled(tied, 4.0)
        assert larger.tied and not folded(larger).tied and tied.tied
        for made in (larger, folded(larger)):
            torch.testing.assert_close(made(x / 4).reconstruction, tied(x).reconstruction / 4)
        apart = untied(tied)
        assert not apart.tied and same(apart, tied)
        apart.W_enc.zero_()
        assert tied.W_enc.any()
        tied.subtract_b_dec = True
        assert uncentred(tied).tied
        torch.testing.assert_close(uncentred(tied)(x).reconstruction, tied(x).reconstruction)
