"""Checkpoints against sae-lens itself: both libraries in one process, the same latents, the same support, the same output."""

import json

import pytest
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig, JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.transcoder import JumpReLUTranscoder, JumpReLUTranscoderConfig, Transcoder, TranscoderConfig
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file

from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods.gated import GatedRectified
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.methods.relu import Rectified
from sdl_explorer.models.methods.topk import BatchTopKSelection, TopKSelection

D, D_OUT, K = 12, 7, 4
WIDTHS = [32, D]  # F = D: a transposed matrix would load without an error


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rows(d_in=D):
    """Ordinary rows, small ones with fewer than K positive pre-activations, and the zero row."""
    return torch.cat([torch.randn(200, d_in), torch.randn(50, d_in) * 0.02, torch.zeros(1, d_in)])


def agree(ours, theirs, x):
    """Latents to 1e-6 of their scale with the same support, outputs to 1e-5."""
    with torch.no_grad():
        mine, yours = ours.encode(x).dense(), theirs.encode(x)
        pre = ours.pre(x)
        output = theirs.decode(theirs.encode(x))
        assert (pre < 0).any()
        assert ((pre > 0).sum(dim=1) < K).any(), "no row has fewer than k positive pre-activations"
        assert 0 < (yours > 0).float().mean() < 1
        assert torch.equal(mine > 0, yours > 0)
        torch.testing.assert_close(mine, yours, rtol=1e-6, atol=1e-6 * float(yours.max()))
        torch.testing.assert_close(ours(x).reconstruction, output, rtol=1e-5, atol=1e-5 * float(output.abs().max()))


# ours -> sae-lens -------------------------------------------------------------------------------------------------------


def sigma(name, n_latents):
    if name == "topk":
        return TopKSelection(K)
    if name == "batchtopk":
        chosen = BatchTopKSelection(K)
        chosen.threshold.fill_(0.8)
        chosen.n_averaged.fill_(3)
        return chosen
    if name == "jumprelu":
        chosen = JumpRectified(n_latents)
        chosen.threshold.data = torch.rand(n_latents)
        return chosen
    if name == "gated":
        chosen = GatedRectified(n_latents)
        chosen.r.data, chosen.b_mag.data = torch.randn(n_latents) * 0.3, torch.randn(n_latents) * 0.3
        return chosen
    return Rectified()


def ours(name, n_latents, d_out=D, centred=False, kind=None):
    """Norms that are not 1, biases that are not 0, mostly negative encoder biases."""
    W_dec = torch.randn(n_latents, d_out) * (torch.rand(n_latents, 1) * 3 + 0.05)
    W_enc, b_enc = torch.randn(n_latents, D), torch.randn(n_latents) * 0.5 - 1.5
    dictionary = SparseDictionary(W_enc, W_dec, b_enc, torch.randn(d_out) * 0.1, sigma(name, n_latents), subtract_b_dec=centred)
    dictionary.provenance = {"kind": kind, "metadata": {"our own key": {"a": [1, None]}, "model_name": "tiny"}}
    return dictionary.eval()


@pytest.mark.parametrize("name", ["relu", "topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("n_latents", WIDTHS)
def test_our_saes_load_in_sae_lens(tmp_path, name, centred, n_latents):
    dictionary = ours(name, n_latents, centred=centred)
    dictionary.save(tmp_path / "s", "saelens")
    theirs = SAE.load_from_disk(tmp_path / "s")
    assert theirs.cfg.metadata.sae_lens_training_version is None
    assert theirs.cfg.metadata["our own key"] == {"a": [1, None]}
    agree(dictionary, theirs, rows())


@pytest.mark.parametrize("name", ["relu", "topk", "batchtopk", "jumprelu", "gated"])
@pytest.mark.parametrize("centred", [False, True])
def test_a_normalised_sae_reads_raw_rows_in_sae_lens(tmp_path, name, centred):
    """Its scales are folded into the weights, so the owner's library needs no scaler."""
    dictionary, x = ours(name, WIDTHS[0], centred=centred), 37 * rows()
    dictionary.input_scale = dictionary.target_scale = 1 / 37
    dictionary.save(tmp_path / "s", "saelens")
    theirs = SAE.load_from_disk(tmp_path / "s")
    with torch.no_grad():
        codes = dictionary.encode(x).dense()
        assert (codes > 0).any()
        torch.testing.assert_close(theirs.encode(x), codes, rtol=1e-5, atol=1e-5 * float(codes.max()))
        expected = dictionary(x).reconstruction
        torch.testing.assert_close(theirs(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["relu", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("n_latents", WIDTHS)
@pytest.mark.parametrize(("d_out", "centred"), [(D_OUT, False), (D, False), (D, True)])
def test_our_transcoders_load_in_sae_lens(tmp_path, name, n_latents, d_out, centred):
    dictionary = ours(name, n_latents, d_out, centred, kind="transcoder")
    dictionary.save(tmp_path / "s", "saelens")
    theirs = SAE.load_from_disk(tmp_path / "s")
    assert isinstance(theirs, Transcoder)
    agree(SparseDictionary.load(tmp_path / "s"), theirs, rows())
    with torch.no_grad():
        torch.testing.assert_close(dictionary(rows()).reconstruction.shape, theirs(rows()).shape)
        x = rows()
        torch.testing.assert_close(dictionary(x).reconstruction, theirs(x), rtol=1e-5, atol=1e-4)


# sae-lens -> ours -------------------------------------------------------------------------------------------------------

_COMMON = {"d_in": D, "dtype": "float32", "device": "cpu"}


def randomised(sae, shift=-1.5):
    """Random weights with non-unit norms and non-zero biases in a SAE of theirs."""
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn_like(sae.W_enc))
        sae.W_dec.copy_(torch.randn_like(sae.W_dec) * (torch.rand(len(sae.W_dec), 1) * 3 + 0.05))
        sae.b_enc.copy_(torch.randn_like(sae.b_enc) * 0.5 + shift)
        sae.b_dec.copy_(torch.randn_like(sae.b_dec) * 0.1)
        if hasattr(sae, "threshold") and isinstance(sae.threshold, torch.nn.Parameter):
            sae.threshold.copy_(torch.rand_like(sae.threshold))
        if hasattr(sae, "log_threshold"):
            sae.log_threshold.copy_(torch.rand_like(sae.log_threshold) - 1)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.8)
    return sae.eval()


def inference(name, n_latents, **changes):
    members = {
        "standard": (StandardSAE, StandardSAEConfig, {}),
        "topk": (TopKSAE, TopKSAEConfig, {"k": K}),
        "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
        "transcoder": (Transcoder, TranscoderConfig, {"d_out": D_OUT, "apply_b_dec_to_input": False}),
        "jumprelu_transcoder": (JumpReLUTranscoder, JumpReLUTranscoderConfig, {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    }
    member, config, settings = members[name]
    metadata = SAEMetadata(hook_name="blocks.3.hook_mlp_in", hook_name_out="blocks.3.hook_mlp_out", odd=[1, 2])
    return randomised(member(config(**_COMMON, d_sae=n_latents, metadata=metadata, **(settings | changes))))


def training(name, n_latents, **changes):
    members = {
        "standard": (StandardTrainingSAE, StandardTrainingSAEConfig, {}),
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": K}),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": float(K)}),
        "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig, {"k": K, "matryoshka_widths": [5, n_latents]}),
        "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, {}),
    }
    member, config, settings = members[name]
    return randomised(member(config(**_COMMON, d_sae=n_latents, **(settings | changes))))


CENTRING = [{"apply_b_dec_to_input": True}, {"apply_b_dec_to_input": False}]
RESCALING = [{"rescale_acts_by_decoder_norm": True}, {"rescale_acts_by_decoder_norm": False}]
INFERENCE = [
    *[(name, c) for name in ("standard", "jumprelu") for c in CENTRING],
    *[("topk", c | r) for c in CENTRING for r in RESCALING],
    *[(name, {"d_out": d_out}) for name in ("transcoder", "jumprelu_transcoder") for d_out in (D_OUT, D)],
]


@pytest.mark.parametrize(("name", "changes"), INFERENCE)
@pytest.mark.parametrize("n_latents", WIDTHS)
def test_their_saes_load_here(tmp_path, name, changes, n_latents):
    theirs = inference(name, n_latents, **changes)
    theirs.save_model(tmp_path / "s")
    loaded = SparseDictionary.load(tmp_path / "s")
    agree(loaded, theirs, rows())
    assert loaded.provenance["library"] == "sae_lens"
    assert loaded.provenance["hook_name_out"] == "blocks.3.hook_mlp_out"
    assert loaded.provenance["metadata"]["odd"] == [1, 2]


TRAINING = [
    *[("standard", c) for c in CENTRING],
    *[("jumprelu", c) for c in CENTRING],
    *[(name, c | r) for name in ("topk", "batchtopk", "matryoshka") for c in CENTRING for r in RESCALING],
]


@pytest.mark.parametrize(("name", "changes"), TRAINING)
@pytest.mark.parametrize("n_latents", WIDTHS)
def test_their_training_checkpoints_load_here(tmp_path, name, changes, n_latents):
    """Both kinds of save: the checkpoint of a trainer, and the export that they call inference."""
    theirs = training(name, n_latents, **changes)
    theirs.save_model(tmp_path / "checkpoint")
    theirs.save_inference_model(tmp_path / "inference")
    exported = SAE.load_from_disk(tmp_path / "inference")
    agree(SparseDictionary.load(tmp_path / "inference"), exported, rows())
    x = rows()
    checkpoint = SparseDictionary.load(tmp_path / "checkpoint")
    with torch.no_grad():
        expected = exported.decode(exported.encode(x))
        torch.testing.assert_close(checkpoint(x).reconstruction, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        assert torch.equal(checkpoint.encode(x).dense() > 0, exported.encode(x) > 0)
    if name == "batchtopk":
        assert isinstance(checkpoint.nonlinearity, BatchTopKSelection)
        assert checkpoint.nonlinearity.k == K


# there and back ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("centred", [False, True])
def test_through_sae_lens_and_back_nothing_changes(tmp_path, name, centred):
    dictionary = ours(name, 32, centred=centred)
    dictionary.save(tmp_path / "a", "saelens")
    SAE.load_from_disk(tmp_path / "a").save_model(tmp_path / "b")
    first, second = load_file(tmp_path / "a" / "sae_weights.safetensors"), load_file(tmp_path / "b" / "sae_weights.safetensors")
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
    back = SparseDictionary.load(tmp_path / "b")
    assert torch.equal(back.W_enc, dictionary.W_enc)
    assert back.provenance["metadata"]["our own key"] == {"a": [1, None]}
    assert back.provenance["metadata"]["sae_lens_training_version"] is None
    assert back.provenance["metadata"]["sdl_explorer"]["nonlinearity"] == type(dictionary.nonlinearity).__name__
    assert back.provenance["library"] == "sdl_explorer"


# unfinished checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "changes"), TRAINING)
@pytest.mark.parametrize("s", [7.3, 0.1])
def test_an_unfinished_checkpoint_is_folded_as_they_do(tmp_path, name, changes, s):
    theirs = training(name, 32, normalize_activations="expected_average_only_in", **changes)
    theirs.save_model(tmp_path / "s")
    with pytest.raises(ValueError, match="unfinished"):
        SparseDictionary.load(tmp_path / "s")
    scaler = ActivationScaler(scaling_factor=s)
    scaler.save(str(tmp_path / "s" / "activation_scaler.json"))
    loaded = SparseDictionary.load(tmp_path / "s")
    theirs.fold_activation_norm_scaling_factor(s)
    theirs.save_inference_model(tmp_path / "folded")
    finished, x = SAE.load_from_disk(tmp_path / "folded"), rows() / s
    with torch.no_grad():
        mine, yours = loaded.encode(x).dense(), finished.encode(x)
        assert torch.equal(mine > 0, yours > 0)
        expected = finished.decode(yours)
        torch.testing.assert_close(loaded(x).reconstruction, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert any("input scale" in sentence for sentence in loaded.provenance["assumptions"])


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale", "covariance_whitening"])
def test_row_norms_and_whitening_are_refused(tmp_path, kind):
    training("standard", 32, normalize_activations=kind).save_model(tmp_path / "s")
    assert json.loads((tmp_path / "s" / "cfg.json").read_text())["normalize_activations"] == kind
    with pytest.raises(ValueError, match=r"normalize_activations|whitening"):
        SparseDictionary.load(tmp_path / "s")


def test_a_training_checkpoint_of_theirs_keeps_its_threshold(tmp_path):
    theirs = training("batchtopk", 32)
    theirs.save_model(tmp_path / "s")
    again = TrainingSAE.load_from_disk(tmp_path / "s")
    loaded = SparseDictionary.load(tmp_path / "s")
    assert float(loaded.nonlinearity.threshold) == pytest.approx(float(again.topk_threshold), rel=1e-6)
