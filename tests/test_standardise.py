"""Centring and scaling of the data, folded into the weights."""

import pytest
import torch

from sdl_explorer import BatchTopK, HierarchyBench, JumpReLU, ReLU, Session, SparseDictionary, Stored, TopK, check_health
from sdl_explorer.data.sources import stream
from sdl_explorer.models.rewrites import scaled, shifted

METHODS = [TopK(k=3), BatchTopK(k=3), ReLU(), JumpReLU()]


def rows(n=64, d=6, seed=0):
    return torch.randn(n, d, generator=stream(seed, "rows"), dtype=torch.float64) * 3 + torch.linspace(-4, 9, d, dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("d_out", [6, 4])
def test_made_for_standardised_rows_then_folded_is_the_same_function(method, d_out):
    x, y, s = rows(), rows(d=d_out, seed=1), 0.37
    mean_in, mean_out = x.mean(dim=0), y.mean(dim=0)
    dictionary = method.build(6, d_out, 20, stream(0, "weights")).double().eval()
    torch.nn.init.normal_(dictionary.b_enc, generator=stream(1))
    torch.nn.init.normal_(dictionary.b_dec, generator=stream(2))
    raw = shifted(scaled(dictionary, s), mean_in, mean_out)
    before, after = dictionary((x - mean_in) * s), raw(x)
    torch.testing.assert_close(after.latents.dense(), before.latents.dense())
    torch.testing.assert_close(after.reconstruction, before.reconstruction / s + mean_out)
    assert before.latents.l0 > 0


def test_a_dictionary_that_subtracts_b_dec_is_shifted_by_b_dec_alone():
    x = rows()
    mean = x.mean(dim=0)
    W = torch.randn(20, 6, generator=stream(3), dtype=torch.float64)
    dictionary = SparseDictionary(W, W, b_dec=torch.ones(6, dtype=torch.float64), subtract_b_dec=True)
    raw = shifted(dictionary, mean, mean)
    torch.testing.assert_close(raw.encode(x).dense(), dictionary.encode(x - mean).dense())
    torch.testing.assert_close(raw(x).reconstruction, dictionary(x - mean).reconstruction + mean)
    with pytest.raises(ValueError, match="use uncentred first"):
        shifted(dictionary, mean, mean + 1)


@pytest.mark.parametrize("mean", [torch.zeros(5), torch.full((6,), torch.nan)], ids=["width", "NaN"])
def test_a_mean_that_does_not_fit_is_refused(mean):
    with pytest.raises(ValueError, match="mean of the inputs"):
        shifted(TopK(k=1).build(6, 6, 8, stream(0)), mean, torch.zeros(6))


def test_a_session_on_stored_rows_starts_at_their_mean():
    inputs, targets = rows(400, 6).float(), rows(400, 4, seed=1).float()
    with Session(Stored(inputs, targets), TopK(k=2), n_latents=16) as session:
        start, train = session.dictionary, session.source.sample(400, stream(0), "train")
    torch.testing.assert_close(start.b_dec, train.targets.mean(dim=0))
    centred = (train.inputs - train.inputs.mean(dim=0)) @ start.W_enc.T
    torch.testing.assert_close(start.pre(train.inputs), centred, rtol=1e-4, atol=1e-3)


def test_generated_rows_are_left_where_they_are():
    with Session(HierarchyBench(), TopK(k=2), n_latents=16) as session:
        assert session.dictionary.b_dec.eq(0).all()


@pytest.mark.filterwarnings("ignore:Preflight")  # random weights fit nothing
@pytest.mark.slow
def test_centring_trains_better_on_rows_with_a_large_mean():
    """Random unit rows, moved far from zero: the centred start reconstructs them, a start at zero spends its latents on the mean."""
    truth = torch.nn.functional.normalize(torch.randn(24, 12, generator=stream(0)), dim=1)
    codes = (torch.rand(4_000, 24, generator=stream(1)) < 0.06) * torch.rand(4_000, 24, generator=stream(2))
    source = Stored(codes @ truth + 8)
    plain = TopK(k=3).build(12, 12, 32, stream(0, "weights"))
    errors = []
    for settings in ({"n_latents": 32}, {"dictionary": plain}):
        with Session(source, TopK(k=3), batch_size=256, **settings) as session:
            errors.append(session.train(300).find(check_health).unexplained_variance)
    assert errors[0] < 0.5 * errors[1]
