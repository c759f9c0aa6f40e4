"""Losses of ReLU, JumpReLU and Gated against sae-lens on the same weights and rows: values and gradients."""

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig, GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file

from sdl_explorer.data.activations import Activations
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import Context, Gated, JumpReLU, ReLU

D, N_LATENTS = 12, 40
DEAD = torch.arange(N_LATENTS) % 4 == 0
COMMON = {"d_in": D, "d_sae": N_LATENTS, "dtype": "float32", "device": "cpu"}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomised(theirs):
    """Norms that are not 1, biases that are not 0, thresholds above 0."""
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(torch.rand_like(p) if name == "threshold" else 0.5 * torch.randn_like(p))
    return theirs.train()


def ours(theirs, method, b_enc, **per_latent) -> SparseDictionary:
    sigma = method.nonlinearity(N_LATENTS)
    with torch.no_grad():
        for name, value in per_latent.items():
            getattr(sigma, name).copy_(value)
    centred = theirs.cfg.apply_b_dec_to_input
    return SparseDictionary(theirs.W_enc.T, theirs.W_dec, b_enc, theirs.b_dec, sigma, subtract_b_dec=centred).train()


def both_losses(theirs, coefficients, method, dictionary, x):
    output = theirs.training_forward_pass(TrainStepInput(x, coefficients, DEAD, 0, False))
    context = Context(0, DEAD.long() * 10, None, torch.Generator(), dead_after=10)
    return output.losses, method.objective(dictionary, dictionary(x), Activations(x, x), context)


def agree(mine, yours, what):
    scale = float(yours.abs().max())
    assert scale > 0, what
    torch.testing.assert_close(mine, yours, rtol=1e-4, atol=2e-6 * scale, msg=what)


@pytest.mark.parametrize("centred", [False, True])
def test_relu_with_l1(centred):
    theirs = randomised(StandardTrainingSAE(StandardTrainingSAEConfig(**COMMON, apply_b_dec_to_input=centred)))
    method = ReLU(l1=0.7)
    dictionary = ours(theirs, method, theirs.b_enc)
    expected, found = both_losses(theirs, {"l1": 0.7}, method, dictionary, torch.randn(300, D))
    agree(found["error"], expected["mse_loss"], "error")
    agree(found["l1"], expected["l1_loss"], "l1")
    sum(expected.values()).backward()
    sum(found.values()).backward()
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        yours = getattr(theirs, name).grad
        agree(getattr(dictionary, name).grad, yours.T if name == "W_enc" else yours, name)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("penalty", "pre_loss"), [("step", 0.0), ("tanh", 0.0), ("step", 0.3), ("tanh", 0.3)])
def test_jumprelu_penalties_and_pre_activation_loss(penalty, pre_loss, centred):
    """Bandwidth wide enough that many pre-activations lie in the rectangle."""
    settings = {"jumprelu_sparsity_loss_mode": penalty, "jumprelu_bandwidth": 0.3, "jumprelu_tanh_scale": 2.0}
    config = JumpReLUTrainingSAEConfig(**COMMON, **settings, pre_act_loss_coefficient=pre_loss or None, apply_b_dec_to_input=centred)
    theirs = randomised(JumpReLUTrainingSAE(config))
    method = JumpReLU(l0=0.6, penalty=penalty, tanh_scale=2.0, bandwidth=0.3, pre_loss=pre_loss)
    dictionary = ours(theirs, method, theirs.b_enc, threshold=theirs.threshold)
    expected, found = both_losses(theirs, {"l0": 0.6}, method, dictionary, torch.randn(300, D))
    for mine, yours in {"error": "mse_loss", "l0": "l0_loss", "pre": "pre_act_loss"}.items():
        assert (mine in found) == (yours in expected)
        if mine in found:
            agree(found[mine], expected[yours], mine)
    sum(expected.values()).backward()
    sum(found.values()).backward()
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        yours = getattr(theirs, name).grad
        agree(getattr(dictionary, name).grad, yours.T if name == "W_enc" else yours, name)
    agree(dictionary.nonlinearity.threshold.grad, theirs.threshold.grad, "threshold")


@pytest.mark.parametrize("centred", [False, True])
def test_gated(centred):
    """Equal codes, losses and gradients, but for one difference: theirs trains the decoder through the gate path too,
    which the paper freezes (Rajamanoharan et al. 2024a, eq. 8). That part is added to ours here."""
    theirs = randomised(GatedTrainingSAE(GatedTrainingSAEConfig(**COMMON, apply_b_dec_to_input=centred)))
    method = Gated(l1=0.7)
    dictionary = ours(theirs, method, theirs.b_gate, r=theirs.r_mag, b_mag=theirs.b_mag)
    x = torch.randn(300, D)
    torch.testing.assert_close(dictionary.encode(x).dense(), theirs.encode(x), rtol=1e-5, atol=1e-5)
    expected, found = both_losses(theirs, {"l1": 0.7}, method, dictionary, x)
    for mine, yours in {"error": "mse_loss", "l1": "l1_loss", "gate": "auxiliary_reconstruction_loss"}.items():
        agree(found[mine], expected[yours], mine)
    sum(expected.values()).backward()
    gate = dictionary(x).pre.relu().detach()
    through = (gate @ dictionary.W_dec + dictionary.b_dec - x).square().sum(1).mean()
    (sum(found.values()) + through).backward()
    agree(dictionary.W_enc.grad, theirs.W_enc.grad.T, "W_enc")
    for mine, yours in {"W_dec": "W_dec", "b_dec": "b_dec", "b_enc": "b_gate"}.items():
        agree(getattr(dictionary, mine).grad, getattr(theirs, yours).grad, mine)
    agree(dictionary.nonlinearity.r.grad, theirs.r_mag.grad, "r")
    agree(dictionary.nonlinearity.b_mag.grad, theirs.b_mag.grad, "b_mag")


# gated checkpoints ------------------------------------------------------------------------------------------------------


def their_gated(centred, **settings):
    theirs = GatedSAE(GatedSAEConfig(**COMMON, apply_b_dec_to_input=centred, **settings))
    return randomised(theirs).eval()


@pytest.mark.parametrize("centred", [False, True])
def test_their_gated_saes_load_here_and_ours_there(tmp_path, centred):
    theirs, x = their_gated(centred), torch.randn(300, D)
    theirs.save_model(tmp_path / "theirs")
    loaded = SparseDictionary.load(tmp_path / "theirs")
    loaded.save(tmp_path / "ours", "saelens")
    back = SAE.load_from_disk(tmp_path / "ours")
    assert isinstance(back, GatedSAE) and loaded.subtract_b_dec == centred
    with torch.no_grad():
        codes = theirs.encode(x)
        assert 0 < (codes > 0).float().mean() < 0.5
        for made in (loaded.encode(x).dense(), back.encode(x)):
            assert torch.equal(made > 0, codes > 0)
            torch.testing.assert_close(made, codes, rtol=1e-5, atol=1e-6 * float(codes.max()))
        torch.testing.assert_close(loaded(x).reconstruction, theirs(x), rtol=1e-5, atol=1e-5)
    first, second = load_file(tmp_path / "theirs" / "sae_weights.safetensors"), load_file(tmp_path / "ours" / "sae_weights.safetensors")
    assert first.keys() == second.keys() == {"W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"}
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_unfinished_gated_checkpoint_is_folded_as_they_do(tmp_path):
    config = GatedTrainingSAEConfig(**COMMON, normalize_activations="expected_average_only_in")
    theirs = randomised(GatedTrainingSAE(config))
    theirs.save_model(tmp_path / "s")
    ActivationScaler(scaling_factor=3.3).save(str(tmp_path / "s" / "activation_scaler.json"))
    loaded, x = SparseDictionary.load(tmp_path / "s"), torch.randn(300, D) / 3.3
    theirs.fold_activation_norm_scaling_factor(3.3)
    theirs.save_inference_model(tmp_path / "folded")
    finished = SAE.load_from_disk(tmp_path / "folded")
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode(x).dense(), finished.encode(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loaded(x).reconstruction, finished.decode(finished.encode(x)), rtol=1e-4, atol=1e-5)


def test_a_gated_transcoder_is_refused(tmp_path):
    dictionary = Gated().build(D, 5, N_LATENTS, torch.Generator())
    with pytest.raises(ValueError, match="SAELens has no gated transcoder"):
        dictionary.save(tmp_path / "s", "saelens")
