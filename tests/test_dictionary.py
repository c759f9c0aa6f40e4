"""One module for every model: sparse and dense codes say the same, and row i depends on row i alone."""

import pytest
import torch
from torch.nn.functional import one_hot

from sdl_explorer.models.dictionary import Latents, Nonlinearity, SparseDictionary
from sdl_explorer.models.methods.topk import BatchTopKSelection, TopKSelection
from sdl_explorer.models.terms import squared_error, weighted_l1


def ragged(device="cpu") -> tuple[Latents, torch.Tensor]:
    """Rows of 2, 0, 3 and 1 entries over 5 latents, and the same codes written out."""
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 6.0], device=device)
    indices = torch.tensor([4, 0, 1, 3, 2, 0], device=device)
    dense = torch.tensor([[2.0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 3, 0, 4, 0], [6, 0, 0, 0, 0]], device=device)
    return Latents(values, indices, torch.tensor([0, 2, 2, 5, 6], device=device), 5), dense


def some_dictionary(n_latents=5, d_in=4, d_out=3, sigma=None, **settings) -> SparseDictionary:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    return SparseDictionary(draw(n_latents, d_in), draw(n_latents, d_out), draw(n_latents), draw(d_out), sigma, **settings)


def test_sparse_codes_read_as_the_dense_ones(device):
    sparse, dense = ragged(device)
    written = Latents(dense)
    assert torch.equal(sparse.dense(), dense)
    assert (sparse.n, sparse.n_latents) == (written.n, written.n_latents) == (4, 5)
    assert sparse.l0.item() == written.l0.item() == 5 / 4  # the stored zero does not count
    assert torch.equal(sparse.fired(), written.fired())
    assert sparse.fired().tolist() == [True, True, False, True, True]
    assert torch.equal(sparse.by_latent([3, 0, 2]), dense[:, [3, 0, 2]])
    assert torch.equal(written.by_latent([3, 0, 2]), dense[:, [3, 0, 2]])
    triples = lambda latents, *a: sorted(zip(*(t.tolist() for t in latents.entries(*a)), strict=True))
    assert triples(sparse) == triples(written) == [(0, 0, 2.0), (0, 4, 1.0), (2, 1, 3.0), (2, 3, 4.0), (3, 0, 6.0)]
    above = torch.tensor([[1.5], [0], [3.5], [9]], device=device)
    assert triples(sparse, above) == triples(written, above) == [(0, 0, 2.0), (2, 3, 4.0)]


def test_sparse_codes_decode_as_the_dense_ones_with_the_same_gradients():
    sparse, dense = ragged()
    grads = []
    for codes in (sparse, Latents(dense)):
        dictionary = some_dictionary()
        values = codes.values = codes.values.clone().requires_grad_(True)
        out = dictionary.decode(codes)
        torch.testing.assert_close(out, dense @ dictionary.W_dec + dictionary.b_dec)
        loss = out.square().sum() + weighted_l1(codes, dictionary)
        loss.backward()
        rows = values.grad if not codes.is_sparse else torch.zeros(4, 5).index_put((codes.row, codes.indices), values.grad)
        grads.append((loss, dictionary.W_dec.grad, dictionary.b_dec.grad, rows * (dense > 0)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_dense_codes_have_no_layout():
    with pytest.raises(TypeError, match="dense codes have no indices"):
        _ = Latents(torch.zeros(2, 3)).row


def test_forward_is_the_equation():
    dictionary = some_dictionary()
    x = torch.randn(6, 4)
    encoding = dictionary(x)
    pre = x @ dictionary.W_enc.T + dictionary.b_enc
    torch.testing.assert_close(encoding.pre, pre)
    torch.testing.assert_close(encoding.latents.dense(), pre.relu())
    torch.testing.assert_close(encoding.reconstruction, pre.relu() @ dictionary.W_dec + dictionary.b_dec)
    torch.testing.assert_close(dictionary.pre(x, [3, 1]), pre[:, [3, 1]])


def test_subtracting_the_decoder_bias():
    dictionary = some_dictionary(d_out=4, subtract_b_dec=True)
    x = torch.randn(6, 4)
    torch.testing.assert_close(dictionary(x).pre, (x - dictionary.b_dec) @ dictionary.W_enc.T + dictionary.b_enc)


def test_missing_biases_are_zeros_and_any_function_is_a_nonlinearity():
    dictionary = SparseDictionary(torch.eye(3), torch.eye(3), nonlinearity=torch.sin)
    assert torch.equal(dictionary.b_enc, torch.zeros(3)) and torch.equal(dictionary.b_dec, torch.zeros(3))
    x = torch.randn(2, 3)
    torch.testing.assert_close(dictionary.encode(x).dense(), x.sin())


@pytest.mark.parametrize("sigma", [None, TopKSelection(2), BatchTopKSelection(2)])
def test_in_eval_mode_row_i_depends_on_row_i_alone(sigma):
    dictionary = some_dictionary(n_latents=12, sigma=sigma).eval()
    if isinstance(sigma, BatchTopKSelection):
        sigma.threshold.fill_(0.3)
    x = torch.randn(7, 4)
    together = dictionary(x)
    for i in range(7):
        torch.testing.assert_close(dictionary(x[i : i + 1]).reconstruction[0], together.reconstruction[i])
        torch.testing.assert_close(dictionary.encode(x[i : i + 1]).dense()[0], together.latents.dense()[i])


def test_select_is_called_instead_of_making_pre():
    class First(Nonlinearity):
        def select(self, inputs, dictionary):
            return Latents.rows_of(inputs[:, :1], torch.zeros(len(inputs), 1, dtype=torch.long), dictionary.n_latents)

    dictionary = some_dictionary(sigma=First())
    encoding = dictionary(torch.ones(3, 4))
    assert encoding.pre is None
    assert torch.equal(encoding.latents.dense(), one_hot(torch.zeros(3, dtype=torch.long), 5).float())


def test_parameters_with_a_row_per_latent_are_known():
    from sdl_explorer.models.methods.jumprelu import JumpRectified

    assert list(some_dictionary(sigma=JumpRectified(5)).per_latent()) == ["threshold"]
    assert some_dictionary(sigma=BatchTopKSelection(2)).per_latent() == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 2), torch.zeros(4, 2)), "W_enc has 3 rows and W_dec 4"),
        ((torch.zeros(0, 2), torch.zeros(0, 2)), "n_latents is 0"),
        ((torch.zeros(3), torch.zeros(3, 2)), "W_enc is .* of shape"),
        ((torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2)), "W_enc is torch.int64 of shape"),
        ((torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(2)), "b_enc has shape"),
        ((torch.zeros(3, 2), torch.zeros(3, 4), None, torch.zeros(2)), "b_dec has shape"),
    ],
)
def test_wrong_shapes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseDictionary(*arguments)


def test_subtracting_needs_one_width():
    with pytest.raises(ValueError, match="needs d_in = d_out"):
        some_dictionary(subtract_b_dec=True)


def test_inputs_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"7 columns .* d_in=4"):
        some_dictionary()._encode(torch.zeros(2, 7))


def test_squared_error_is_a_sum_over_coordinates_and_a_mean_over_rows():
    assert squared_error(torch.zeros(2, 3), torch.tensor([[1.0, 2, 3], [0, 0, 2]])).item() == (14 + 4) / 2
