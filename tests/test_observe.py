"""The one pass: blocks do not matter, shared work is done once, and bad input is refused."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.anchors import Anchors
from sdl_explorer.diagnosis import observe as observing
from sdl_explorer.diagnosis.alignment import align
from sdl_explorer.diagnosis.examples import find_examples
from sdl_explorer.diagnosis.health import check_health
from sdl_explorer.diagnosis.observe import Moments, declared_settings, encoded, evaluating, observe
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import BatchTopK, ReLU, TopK


def random_pair(n=50, d=6, n_latents=10, transcoder=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, d, generator=g) + 1.0
    targets = torch.randn(n, d + 1, generator=g) if transcoder else inputs
    W_enc, W_dec = torch.randn(n_latents, d, generator=g), torch.randn(n_latents, targets.shape[1], generator=g)
    return SparseDictionary(W_enc, W_dec, b_enc=2 + torch.randn(n_latents, generator=g)), Activations(inputs, targets)


def test_blocks_do_not_matter(device):
    dictionary, activations = random_pair(transcoder=True)
    dictionary.to(device)
    whole, split = (observe(dictionary, activations, [check_health, find_examples], block=b) for b in (50, 7))
    for a, b in zip(whole, split, strict=True):
        for name in set(vars(a)) - {"dead_after"}:
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("method", [ReLU(), TopK(k=3)])
@pytest.mark.parametrize("transcoder", [False, True])
def test_sums_over_entries_equal_dense_products(monkeypatch, device, method, transcoder):
    _, activations = random_pair(transcoder=transcoder)
    dictionary = method.build(6, activations.targets.shape[1], 10, torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        dictionary.b_enc[2] = -1e4
    findings = []
    for share in (0.0, 2.0):
        monkeypatch.setattr("sdl_explorer.diagnosis.rows.SPARSE", share)
        findings.append(check_health(dictionary, activations))
    for name in set(vars(findings[0])) - {"dead_after"}:
        np.testing.assert_allclose(*(getattr(f, name) for f in findings), rtol=1e-5, atol=1e-6, err_msg=name)
    assert findings[0].dead[2]


def test_rows_on_which_nothing_fires(monkeypatch):
    monkeypatch.setattr("sdl_explorer.diagnosis.rows.SPARSE", 2.0)
    dictionary, activations = random_pair()
    with torch.no_grad():
        dictionary.b_enc.fill_(-1e4)
    health, found = observe(dictionary, activations, [check_health, find_examples])
    assert health.n_dead == 10
    assert (health.l0, health.encoder_response.any()) == (0, False)
    assert len(found.rows) == 0


def test_several_findings_from_one_pass_equal_each_alone_and_encode_once(monkeypatch):
    dictionary, activations = random_pair()
    alone = check_health(dictionary, activations, dead_after=10)
    calls, feeds = [], []
    forward, add = SparseDictionary.forward, Moments.add
    monkeypatch.setattr(SparseDictionary, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    monkeypatch.setattr(Moments, "add", lambda self, rows: feeds.append(rows.n) or add(self, rows))
    anchors = Anchors.from_rows(torch.eye(6)[:3])
    together, found, _ = observe(
        dictionary, activations, [(check_health, {"dead_after": 10}), (align, {"anchors": anchors}), find_examples], block=20
    )
    assert calls == [20, 20, 10]
    assert feeds == [20, 20, 10]
    np.testing.assert_allclose(together.encoder_response, alone.encoder_response, atol=1e-6)
    assert found.n_features == 3


def test_moments_give_the_response_of_a_double_precision_mean_despite_a_large_common_mean():
    dictionary, activations = random_pair(n=300)
    far = Activations(*(activations.inputs + 1000.0,) * 2)
    shifted = SparseDictionary(dictionary.W_enc, dictionary.W_dec, dictionary.b_enc - 1000.0 * dictionary.W_enc.sum(dim=1))
    stream = observing.Stream(shifted, far)
    moments = stream.share(Moments)
    with evaluating(shifted):
        for rows in encoded(shifted, far, 64):
            moments.add(rows)
        z = torch.relu(far.inputs @ shifted.W_enc.T + shifted.b_enc).double()
    x = far.inputs.double()
    response = (z.T @ x) / z.sum(0)[:, None] - x.mean(0)
    measured = moments.input_moment.double() / moments.total[:, None]
    assert (z > 0).any(0).all()
    assert_close(measured, response, rtol=1e-3, atol=1e-3)


def test_firing_ignores_rounding_at_an_exact_zero():
    dictionary = SparseDictionary(torch.tensor([[3.0, 0.0], [0.0, 3.0]]), torch.eye(2))
    x = torch.tensor([[2.0, 1e-7], [2.0, 1e-5]])
    with evaluating(dictionary):
        (rows,) = encoded(dictionary, Activations(x, x))
    assert rows.fired.tolist() == [[True, False], [True, True]]
    assert rows.codes[0, 1] == 0
    assert rows.codes[1, 1] > 0


@pytest.mark.parametrize("method", [TopK(k=3), BatchTopK(k=3)])
def test_codes_are_those_of_eval_mode_and_the_mode_comes_back(method):
    _, activations = random_pair()
    dictionary = method.build(6, 6, 10, torch.Generator().manual_seed(0)).train()
    with evaluating(dictionary):
        assert not dictionary.training
        (rows,) = encoded(dictionary, activations)
        expected = dictionary.eval()(activations.inputs).latents.dense()
        assert not rows.codes.requires_grad
    assert_close(rows.codes, expected)
    dictionary.train()
    check_health(dictionary, activations)
    assert dictionary.training


def test_a_block_of_pre_activations_stays_within_its_bytes():
    for widest in (100, 4_096, 131_072, 50_000_000):
        rows = observing.block_rows(widest)
        assert 1 <= rows <= observing.MOST_ROWS
        assert rows == 1 or rows * widest * 4 <= observing.BLOCK_BYTES


def test_progress_reaches_one_and_cancels():
    dictionary, activations = random_pair()
    seen = []
    observe(dictionary, activations, [check_health], progress=seen.append, block=20)
    assert seen == [0.4, 0.8, 1.0]

    class Enough(Exception):
        pass

    def stop(done):
        raise Enough

    dictionary.train()
    with pytest.raises(Enough):
        observe(dictionary, activations, [check_health], progress=stop)
    assert dictionary.training


def test_declared_settings():
    assert declared_settings(check_health) == ("samples_since_fired", "dead_after")
    assert {"anchors", "pins"} <= set(declared_settings(align))
    assert declared_settings(find_examples) == ("n_each", "seed")


def test_what_is_refused():
    dictionary, activations = random_pair()
    with pytest.raises(TypeError, match="not a finding"):
        observe(dictionary, activations, [len])
    with pytest.raises(TypeError, match=r"no setting 'tau'; it takes samples_since_fired, dead_after"):
        observe(dictionary, activations, [(check_health, {"tau": 1})])
    with pytest.raises(ValueError, match="0 rows"):
        check_health(dictionary, activations.take(slice(0, 0)))
    with pytest.raises(ValueError, match=r"5 and 5 columns.*reads 6"):
        check_health(dictionary, Activations(*(activations.inputs[:, :5],) * 2))
    bad = activations.inputs.clone()
    bad[33, 2] = torch.nan
    with pytest.raises(ValueError, match="row 33 of the inputs is not finite"):
        observe(dictionary, Activations(bad, bad), [check_health], block=10)
    with torch.no_grad():
        dictionary.W_dec[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"W_dec.*not finite"):
        check_health(dictionary, activations)
