"""Both senses of Matryoshka, nested prefixes and several k: each against its formula, dense and sparse alike, trained and saved."""

import json

import pytest
import torch

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.bench import LinearBench
from sdl_explorer.models import kernels
from sdl_explorer.models.dictionary import Latents, SparseDictionary
from sdl_explorer.models.methods import BatchTopK, Context, Matryoshka, MultiTopK, TopK
from sdl_explorer.models.methods.matryoshka import NestedSelection, nested_reconstructions
from sdl_explorer.models.methods.topk import BatchTopKSelection, TopKSelection
from sdl_explorer.session import Session
from sdl_explorer.training.loop import train
from sdl_explorer.training.state import Schedule, TrainState

D_IN, D_OUT, N_LATENTS, K = 7, 6, 32, 3
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def planted(sigma, d_in=D_IN) -> SparseDictionary:
    """No weight is special: norms that are not 1 and biases that are not 0."""
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    return SparseDictionary(draw(N_LATENTS, d_in), draw(N_LATENTS, D_OUT), draw(N_LATENTS), draw(D_OUT), sigma).train()


def rows(n=24) -> Activations:
    return Activations(torch.randn(n, D_IN), torch.randn(n, D_OUT))


def context(n_latents=N_LATENTS) -> Context:
    return Context(0, torch.zeros(n_latents, dtype=torch.int64), None, torch.Generator())


def losses_of(method, dictionary, batch) -> dict:
    return method.objective(dictionary, dictionary(batch.inputs), batch, context())


def gradients(dictionary, loss) -> dict:
    dictionary.zero_grad()
    loss.backward()
    return {name: getattr(dictionary, name).grad.clone() for name in NAMES}


def sparse(codes) -> Latents:
    """The entries that are not zero, by row, with gradient; rows differ in count and one is empty."""
    row, latent = codes.detach().nonzero(as_tuple=True)
    offsets = torch.searchsorted(row, torch.arange(len(codes) + 1))
    return Latents(codes[row, latent], latent, offsets, codes.shape[1])


def batch_top(pre, k):
    """BatchTopK by one threshold of the batch."""
    kth = pre.flatten().sort(descending=True).values[k * len(pre) - 1]
    return torch.where(pre >= kth, pre, 0.0).relu()


def row_top(pre, k):
    """TopK by one threshold a row."""
    kth = pre.sort(dim=1, descending=True).values[:, k - 1 : k]
    return torch.where(pre >= kth, pre, 0.0).relu()


# nested prefixes -----------------------------------------------------------------------------------------------------


def test_nested_loss_and_gradients_are_the_published_formula():
    """sum over m of mean |x_r - (z[:, :m] @ W_dec[:m] + b_dec)|^2, written with masks and one decode a prefix."""
    method, batch = Matryoshka(k=K, prefixes=[5, 0.5, 20]), rows()
    dictionary = planted(method.nonlinearity(N_LATENTS))
    losses = losses_of(method, dictionary, batch)
    found = gradients(dictionary, sum(losses.values()))

    codes = batch_top(batch.inputs @ dictionary.W_enc.T + dictionary.b_enc, K)
    errors = [
        ((codes * (torch.arange(N_LATENTS) < m)) @ dictionary.W_dec + dictionary.b_dec - batch.targets).square().sum(1).mean()
        for m in (5, 16, 20, 32)
    ]
    assert losses.keys() == {"error", "aux", "nested"}
    torch.testing.assert_close(losses["error"], errors[-1])
    torch.testing.assert_close(losses["nested"], sum(errors[:-1]))
    expected = gradients(dictionary, sum(errors))
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("widths", [[1], [5, 6, 31], [16, 32]])
def test_sparse_and_dense_latents_give_the_same_reconstructions_and_gradients(widths):
    dictionary, up = planted(None), torch.randn(len(widths), 24, D_OUT)
    codes = batch_top(torch.randn(24, N_LATENTS) - 0.1 * torch.arange(24)[:, None], K).requires_grad_()
    assert (codes == 0).all(dim=1).any() and (codes != 0).sum(1).unique().numel() > 2
    kinds = {}
    for latents in (Latents(codes), sparse(codes)):
        dictionary.zero_grad()
        codes.grad = None
        levels = nested_reconstructions(dictionary, latents, widths)
        (levels * up).sum().backward()
        at_entries = torch.where(codes != 0, codes.grad, 0.0)  # sparse latents have no gradient elsewhere
        kinds[latents.is_sparse] = (levels.detach(), at_entries, dictionary.W_dec.grad.clone(), dictionary.b_dec.grad.clone())
    for dense_one, sparse_one in zip(kinds[False], kinds[True], strict=True):
        torch.testing.assert_close(sparse_one, dense_one, rtol=1e-4, atol=1e-5)
    if widths[-1] == N_LATENTS:
        torch.testing.assert_close(kinds[True][0][-1], dictionary.decode(codes))


@pytest.mark.parametrize("method", [Matryoshka(k=1, prefixes=[0.25, 20]), MultiTopK(k=1, multiples=[2, 0.5], weights=[0.3, 0.7])])
def test_the_kernels_give_the_same_loss_and_gradients(method, monkeypatch):
    """The sparse path of large sizes, on a small one."""
    batch, found = rows(), {}
    for path, pays in (("dense", lambda *_: False), ("sparse", lambda *_: True)):
        for module in ("topk", "matryoshka"):
            monkeypatch.setattr(f"sdl_explorer.models.methods.{module}.pays", pays)
        dictionary = planted(method.nonlinearity(N_LATENTS))
        encoding = dictionary(batch.inputs)
        assert (encoding.pre is None) == (path == "sparse")
        losses = method.objective(dictionary, encoding, batch, context())
        found[path] = losses | gradients(dictionary, sum(losses.values()))
    assert kernels.pays is not None and found["dense"].keys() == found["sparse"].keys()
    for name, value in found["dense"].items():
        torch.testing.assert_close(found["sparse"][name], value, rtol=1e-4, atol=1e-5)


def test_several_k_where_the_larger_one_is_too_dense_for_the_kernels(monkeypatch):
    batch, method = rows(), MultiTopK(k=1)
    expected = losses_of(method, planted(method.nonlinearity(N_LATENTS)), batch)
    for module in ("topk", "matryoshka"):
        monkeypatch.setattr(f"sdl_explorer.models.methods.{module}.pays", lambda n, dictionary, entries: entries <= n)
    found = losses_of(method, planted(method.nonlinearity(N_LATENTS)), batch)
    assert {n: float(v.detach()) for n, v in found.items()} == pytest.approx({n: float(v.detach()) for n, v in expected.items()}, rel=1e-5)


def test_widths_are_shares_or_sizes_and_the_whole_is_always_there():
    assert Matryoshka().widths(1600) == [100, 200, 400, 800, 1600]
    assert Matryoshka().widths(8) == [1, 2, 4, 8], "shares that round to one width count once"
    assert Matryoshka(prefixes=[20, 0.5, 5]).widths(32) == [5, 16, 20, 32]
    assert Matryoshka(prefixes=[32]).widths(32) == [32]


@pytest.mark.parametrize("prefix", [0, -1, 1.5, 33, float("inf")])
def test_prefixes_that_are_no_widths_are_refused(prefix):
    with pytest.raises(ValueError, match=r"Matryoshka: a prefix is .* and n_latents 32; give shares below 1, or whole sizes"):
        Matryoshka(k=K, prefixes=[4, prefix]).build(4, 4, 32, torch.Generator())


def test_without_inner_prefixes_it_is_batch_topk():
    batch, whole, plain = rows(), Matryoshka(k=K, prefixes=[]), BatchTopK(k=K)
    found = losses_of(whole, planted(whole.nonlinearity(N_LATENTS)), batch)
    assert found["nested"] == 0
    assert torch.equal(found["error"], losses_of(plain, planted(plain.nonlinearity(N_LATENTS)), batch)["error"])


@pytest.mark.slow
def test_early_latents_explain_more_than_those_of_batch_topk():
    """What the nesting is for: the first eighth of the latents, alone, at one training for both."""
    source, explained = LinearBench(n_features=32, d_in=16, sparsity=0.9, max_interference=0.7), {}
    for method in (Matryoshka(k=4, prefixes=[0.125, 0.25, 0.5]), BatchTopK(k=4)):
        dictionary = method.build(16, 16, 64, torch.Generator().manual_seed(0))
        steps = train(TrainState.start(dictionary, Schedule(lr=1e-2)), method, source, batch_size=64)
        for _ in range(150):
            next(steps)
        x = source.batch(1_000, 512).inputs
        with torch.no_grad():
            first = nested_reconstructions(dictionary, dictionary.encode(x), [8])[0]
            explained[type(method)] = float(1 - (x - first).square().sum() / (x - x.mean(0)).square().sum())
    assert explained[Matryoshka] > explained[BatchTopK] + 0.1


# several k -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("multiples", "weights"), [([4], [1 / 8]), ([0.4, 2, 100], [0.5, 0.25, 2.0]), ([], [])])
def test_multi_k_loss_and_gradients_are_equation_9(multiples, weights):
    method, batch = MultiTopK(k=K, multiples=multiples, weights=weights), rows()
    dictionary = planted(method.nonlinearity(N_LATENTS))
    losses = losses_of(method, dictionary, batch)
    found = gradients(dictionary, sum(losses.values()))

    pre = batch.inputs @ dictionary.W_enc.T + dictionary.b_enc
    ks = [K] + [min(max(round(multiple * K), 1), N_LATENTS) for multiple in multiples]
    assert multiples != [0.4, 2, 100] or ks == [3, 1, 6, 32]
    errors = [(row_top(pre, k) @ dictionary.W_dec + dictionary.b_dec - batch.targets).square().sum(1).mean() for k in ks]
    expected = errors[0] + sum(weight * error for weight, error in zip(weights, errors[1:], strict=True))
    assert losses.keys() == {"error", "further"}
    torch.testing.assert_close(losses["error"], errors[0])
    torch.testing.assert_close(sum(losses.values()), expected)
    expected = gradients(dictionary, expected)
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_all_k_are_cut_from_one_encoder_product(monkeypatch):
    method, batch, products = MultiTopK(k=K, multiples=[4, 2], weights=[0.5, 0.5]), rows(), []
    for module in ("topk", "matryoshka"):
        monkeypatch.setattr(f"sdl_explorer.models.methods.{module}.pays", lambda *_: True)
    select = kernels.select_rows
    monkeypatch.setattr(kernels, "select_rows", lambda *arguments: products.append(1) or select(*arguments))
    dictionary = planted(method.nonlinearity(N_LATENTS))
    losses = losses_of(method, dictionary, batch)
    assert len(products) == 1 and losses["further"] > 0
    assert dictionary.eval().encode(batch.inputs).indices.shape == (K * batch.n,), "codes are those of k, and so is their cost"
    plain = SparseDictionary(dictionary.W_enc, dictionary.W_dec, dictionary.b_enc, dictionary.b_dec, TopKSelection(K))
    assert method.objective(plain, plain(batch.inputs), batch, context()).keys() == losses.keys(), "a file from before"
    method.k = K + 1
    method.retune(dictionary.nonlinearity)
    assert dictionary.nonlinearity.settings() == {"k": K + 1, "most": 4 * (K + 1)}


def test_codes_of_several_k_are_those_of_k():
    dictionary = MultiTopK(k=K).build(D_IN, D_IN, N_LATENTS, torch.Generator().manual_seed(0))
    assert (dictionary.encode(torch.randn(20, D_IN)).dense() > 0).sum(1).max() == K


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"multiples": [2, 4], "weights": [1]}, "2 multiples and 1 weights"),
        ({"multiples": [0]}, "a multiple is 0"),
        ({"weights": [-1]}, "a weight is -1"),
    ],
)
def test_multiples_and_weights_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ValueError, match=f"MultiTopK: {words}"):
        MultiTopK(k=K, **settings).build(4, 4, 32, torch.Generator())


@pytest.mark.slow
def test_several_k_are_better_than_one_when_read_at_another_k():
    """What it is for: trained at k=2, read at 8."""
    source, errors = LinearBench(n_features=32, d_in=16, sparsity=0.9, max_interference=0.7), {}
    for method in (MultiTopK(k=2), TopK(k=2)):
        dictionary = method.build(16, 16, 64, torch.Generator().manual_seed(0))
        steps = train(TrainState.start(dictionary, Schedule(lr=1e-2)), method, source, batch_size=64)
        for _ in range(150):
            next(steps)
        x = source.batch(1_000, 512).inputs
        dictionary.nonlinearity.k = 8
        with torch.no_grad():
            errors[type(method)] = float((dictionary(x).reconstruction - x).square().sum(1).mean())
    assert errors[MultiTopK] < 0.8 * errors[TopK]


# both: training, files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sae", "transcoder", "crosscoder"])
@pytest.mark.parametrize("method", [Matryoshka(k=3), MultiTopK(k=3)], ids=lambda method: type(method).__name__)
def test_the_loss_falls_on_every_kind_of_data(method, kind):
    source = LinearBench(n_features=20, d_in=12, sparsity=0.85, max_interference=0.7, kind=kind, d_out=9 if kind == "transcoder" else None)
    dictionary = method.build(source.width_in, source.width_out, 40, torch.Generator().manual_seed(0))
    steps = train(TrainState.start(dictionary, Schedule(lr=1e-2)), method, source, batch_size=64)
    totals = [float(sum(next(steps).losses.values())) for _ in range(80)]
    assert sum(totals[-10:]) < 0.6 * sum(totals[:10])


@pytest.mark.parametrize(
    "method",
    [Matryoshka(k=2, prefixes=[3, 0.5]), MultiTopK(k=2, multiples=[2, 3], weights=[0.5, 0.1])],
    ids=lambda method: type(method).__name__,
)
def test_a_run_goes_on_from_its_folder_as_if_it_had_not_stopped(method, tmp_path):
    source = LinearBench(n_features=12, d_in=8, sparsity=0.8, max_interference=0.7)
    settings = {"method": method, "n_latents": 24, "batch_size": 32, "dead_after": 64, "lr": 1e-2}
    with_break, without = Session(source, **settings), Session(source, **settings)
    try:
        with_break.train(10).save(tmp_path / "run")
        with_break.close()
        with_break = Session.open(tmp_path / "run")
        assert repr(with_break.method) == repr(method)
        a, b = with_break.train(10).dictionary, without.train(20).dictionary
        assert a.nonlinearity.settings() == b.nonlinearity.settings()
        a, b = a.state_dict(), b.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    finally:
        with_break.close(), without.close()


def nested_dictionary() -> SparseDictionary:
    dictionary = planted(NestedSelection(K, [4, 16, 32]), d_in=D_OUT)
    dictionary.nonlinearity.threshold.fill_(0.8)
    dictionary.nonlinearity.n_averaged.fill_(3)
    return dictionary.eval()


def test_a_file_keeps_widths_and_threshold(tmp_path):
    dictionary, x = nested_dictionary(), torch.randn(30, D_OUT)
    back = SparseDictionary.load(dictionary.save(tmp_path / "d.safetensors"))
    assert type(back.nonlinearity) is NestedSelection and back.nonlinearity.settings() == {"k": K, "widths": [4, 16, 32]}
    assert torch.equal(back(x).reconstruction, dictionary(x).reconstruction)


def test_saelens_gets_a_jumprelu_that_says_what_it_was(tmp_path):
    dictionary, x = nested_dictionary(), torch.randn(30, D_OUT)
    config = json.loads((dictionary.save(tmp_path / "s", "saelens") / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu"
    assert config["metadata"]["training_architecture"] == "matryoshka_batchtopk"
    assert config["metadata"]["training_architecture_details"] == {"k": K, "matryoshka_widths": [4, 16, 32]}
    back = SparseDictionary.load(tmp_path / "s")
    assert 0 < (back.encode(x).dense() > 0).float().mean() < 1
    assert torch.equal(back.encode(x).dense(), dictionary.encode(x).dense())


def test_changed_prefixes_reach_a_live_sigma():
    method = Matryoshka(k=K)
    sigma = method.nonlinearity(N_LATENTS)
    method.param.update(k=5, prefixes=[7])
    method.retune(sigma)
    assert sigma.settings() == {"k": 5, "widths": [7, 32]}
    foreign = BatchTopKSelection(K)
    method.retune(foreign)
    assert foreign.k == 5, "a dictionary from elsewhere can be trained on with prefixes"
    assert MultiTopK(k=K).nonlinearity(N_LATENTS).settings() == {"k": K, "most": 4 * K}


def test_a_session_refuses_prefixes_that_outgrow_its_dictionary():
    session = Session(LinearBench(n_features=12, d_in=8, sparsity=0.8, max_interference=0.7), method=Matryoshka(k=2), n_latents=24)
    try:
        session.method.prefixes = [4, 30]
        with pytest.raises(ValueError, match="a prefix is 30 and n_latents 24"):
            session.train(1)
        session.method.prefixes = [4]
        assert session.train(1).dictionary.nonlinearity.widths == [4, 24]
    finally:
        session.close()
