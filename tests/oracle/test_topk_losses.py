"""One training loss of theirs and of ours on the same weights and rows: value and gradients."""

import pytest
import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

from sdl_explorer.data.activations import Activations
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import BatchTopK, BatchTopKAux, Context, Matryoshka, TopK, TopKAux

D, N_LATENTS, K = 12, 40, 4
DEAD = [0, 3, 4, 7, 11, 12, 20, 31, 39]
THEIRS = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {}),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {}),
    "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig, {"matryoshka_widths": [5, 20, N_LATENTS]}),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pair(name, centred):
    """Theirs and ours with the same weights: norms that are not 1, biases that are not 0."""
    member, config, settings = THEIRS[name]
    common = {"d_in": D, "d_sae": N_LATENTS, "k": K, "dtype": "float32", "device": "cpu", "rescale_acts_by_decoder_norm": False}
    theirs = member(config(**common, apply_b_dec_to_input=centred, **settings)).train()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p))
    method = {"topk": TopK(k=K), "batchtopk": BatchTopK(k=K), "matryoshka": Matryoshka(k=K, prefixes=[5, 20])}[name]
    sigma = method.nonlinearity(N_LATENTS)
    weights = [p.detach().clone() for p in (theirs.W_enc.T, theirs.W_dec, theirs.b_enc, theirs.b_dec)]
    return theirs, SparseDictionary(*weights, sigma, subtract_b_dec=centred).train(), method


def their_losses(theirs, x, dead=None):
    output = theirs.training_forward_pass(TrainStepInput(x, {}, dead, 0, False))
    return output.losses, output


def our_losses(method, dictionary, x, dead=()):
    silent = torch.zeros(N_LATENTS, dtype=torch.int64)
    silent[list(dead)] = 10
    context = Context(0, silent, None, torch.Generator(), dead_after=10)
    return method.objective(dictionary, dictionary(x), Activations(x, x), context)


def agree(theirs, dictionary, factor=1.0):
    """Gradients; `factor` is what their loss lacks to ours."""
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        expected, found = getattr(theirs, name).grad, getattr(dictionary, name).grad
        if expected is None or found is None:
            assert found is None or not found.any(), name
            assert expected is None or not expected.any(), name
            continue
        expected = expected.T if name == "W_enc" else expected
        torch.testing.assert_close(found, expected * factor, rtol=1e-4, atol=1e-5 * float(found.abs().max()))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("name", THEIRS)
def test_losses_and_gradients_are_theirs(name, centred):
    theirs, dictionary, method = pair(name, centred)
    x = torch.randn(64, D)
    expected, output = their_losses(theirs, x)
    found = our_losses(method, dictionary, x)
    torch.testing.assert_close(found["error"], expected["mse_loss"])
    if name == "matryoshka":
        torch.testing.assert_close(found["nested"], expected["inner_mse_loss_5"] + expected["inner_mse_loss_20"])
    torch.testing.assert_close(sum(found.values()), output.loss)
    output.loss.backward()
    sum(found.values()).backward()
    agree(theirs, dictionary)


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
@pytest.mark.parametrize("n_dead", [2, 9])
def test_auxiliary_loss_is_theirs_divided_by_the_variance(name, n_dead):
    """They weigh a squared error by min(n_dead / k_aux, 1); we divide it by the residual's variance."""
    theirs, dictionary, _ = pair(name, centred=False)
    method = (TopKAux if name == "topk" else BatchTopKAux)(k=K, aux=1.0, k_aux=D // 2, sign="signed")
    x, dead = torch.randn(64, D), DEAD[:n_dead]
    mask = torch.zeros(N_LATENTS, dtype=torch.bool).index_fill(0, torch.tensor(dead), True)
    expected, _ = their_losses(theirs, x, mask)
    found = our_losses(method, dictionary, x, dead)["aux"]
    residual = x - dictionary(x).reconstruction.detach()
    factor = float(1 / (residual - residual.mean(0)).square().sum(1).mean() / min(n_dead / (D // 2), 1.0))
    torch.testing.assert_close(found, expected["auxiliary_reconstruction_loss"] * factor)
    expected["auxiliary_reconstruction_loss"].backward()
    found.backward()
    agree(theirs, dictionary, factor)
    assert dictionary.b_dec.grad is None
