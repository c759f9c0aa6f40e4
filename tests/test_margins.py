"""How often a silent latent may be expected to fire, where it is known: exponential and normal pre-activations, planted thresholds."""

from math import exp

import numpy as np
import pytest
import torch

from sdl_explorer.data.activations import Activations
from sdl_explorer.diagnosis.margins import FLOOR, LARGEST, MOST_ROWS, Margins
from sdl_explorer.diagnosis.observe import Accumulator, finding, observe
from sdl_explorer.diagnosis.redundancy import find_redundant
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods.gated import GatedRectified
from sdl_explorer.models.methods.jumprelu import JumpRectified
from sdl_explorer.models.methods.topk import BatchTopKSelection, TopKSelection

N, COPIES = 10_000, 24
EACH = torch.tensor([2.0, 11.5, 14.0, 500.0])  # a latent fires with probability exp(-bar): often, 1 in 99,000, 1 in 1.2 million, never
BARS = EACH.repeat_interleave(COPIES)
M = len(BARS)


class _Told(Accumulator):
    def __init__(self, stream):
        super().__init__(stream)
        self.margins = stream.share(Margins)

    def add(self, rows):
        pass

    def result(self):
        return self.margins.rates()


@finding(_Told)
def rates(dictionary, activations):
    return observe(dictionary, activations, [rates])[0]


def exponential(n=N, seed=0) -> Activations:
    """A coordinate for each latent, Exp(1)."""
    x = torch.empty(n, M).exponential_(generator=torch.Generator().manual_seed(seed))
    return Activations(x, x)


def geometric_means(found: np.ndarray) -> list[float]:
    """Of the copies of each bar; of those that never fired."""
    return [float(np.exp(np.log(part[part < 1]).mean())) if (part < 1).any() else 1.0 for part in found.reshape(-1, COPIES)]


def dictionary_of(sigma=None, bias=None) -> SparseDictionary:
    return SparseDictionary(torch.eye(M), torch.eye(M), bias, nonlinearity=sigma).eval()


def relu():
    return dictionary_of(bias=-BARS)


def with_sigma(kind: str) -> SparseDictionary:
    """Latents of the same bars by other means."""
    if kind == "jump":
        sigma = JumpRectified(M)
        sigma.threshold.data.copy_(BARS)
    elif kind == "batch":
        sigma = BatchTopKSelection(1, M)
        sigma.threshold.copy_(BARS)
    else:
        sigma = GatedRectified(M)
        sigma.r.data.fill_(0.7)
        sigma.b_mag.data.copy_(-BARS * exp(0.7))
    return dictionary_of(sigma)


def test_an_exponential_tail_is_extrapolated_to_the_planted_rates():
    fires, rare, rarer, never = geometric_means(rates(relu(), exponential()))
    assert fires == 1  # nothing to expect
    assert 1 / 3 < rare / exp(-11.5) < 3 and 1 / 3 < rarer / exp(-14.0) < 3 and never == pytest.approx(FLOOR)


@pytest.mark.parametrize("kind", ["jump", "batch", "gated"])
def test_every_kind_of_threshold_is_the_bar(kind):
    np.testing.assert_allclose(rates(with_sigma(kind), rows := exponential()), rates(relu(), rows), rtol=1e-3)


def test_a_topk_latent_is_measured_against_the_last_that_is_kept():
    x = exponential().inputs[:, :COPIES].clamp_max(11)
    rows = torch.cat([x, torch.full((N, 1), 11.5), torch.full((N, 1), 12.0)], dim=1)
    eye = torch.eye(COPIES + 2)
    found = rates(SparseDictionary(eye, eye, nonlinearity=TopKSelection(2)), Activations(rows, rows))
    assert (found[-2:] == 1).all()
    by_bias = rates(SparseDictionary(eye, eye, torch.full((COPIES + 2,), -11.5)), Activations(rows, rows))
    np.testing.assert_allclose(found[:-2], by_bias[:-2], rtol=1e-3)
    few = SparseDictionary(eye, eye, torch.full((COPIES + 2,), -11.5), nonlinearity=TopKSelection(2))
    np.testing.assert_allclose(rates(few, Activations(rows, rows))[:-2], by_bias[:-2], rtol=1e-3)  # one is above zero: so is the bar


def test_a_normal_tail_falls_faster_and_is_overrated():
    x = torch.randn(N, M, generator=torch.Generator().manual_seed(1))
    found = rates(dictionary_of(bias=torch.full((M,), -4.265)), Activations(x, x))  # 1 in 100,000
    assert 1e-5 < np.exp(np.log(found[found < 1]).mean()) < 20e-5


@pytest.mark.parametrize("block", [1037, 4000])
def test_blocks_of_any_size_and_inverse_scaling_give_the_same(block):
    rows, scale = exponential(), torch.tensor([1, 3, 0.2, 7]).repeat(COPIES)
    one = rates(relu(), rows)
    np.testing.assert_allclose(observe(relu(), rows, [rates], block=block)[0], one, rtol=1e-3)
    scaled = SparseDictionary(torch.diag(scale), torch.diag(1 / scale), -BARS * scale)
    np.testing.assert_allclose(rates(scaled, rows), one, rtol=1e-2)


def test_nothing_is_known_of_few_rows_and_of_functions_that_have_no_bar():
    assert (rates(relu(), exponential(15)) == 1).all() and (rates(relu(), exponential(20))[COPIES:] < 1).all()
    assert LARGEST < 0.1 * N < MOST_ROWS
    silent = dictionary_of(lambda pre: 0 * pre)
    assert (rates(silent, exponential(400)) == 1).all()
    np.testing.assert_allclose(find_redundant(silent, exponential(400)).expected_rate, 1 / 401)


def test_margins_that_never_vary_come_no_nearer():
    x = torch.zeros(500, M)
    assert (rates(relu(), Activations(x, x)) == FLOOR).all()


def test_the_expected_rate_counts_silence_too():
    rows, since = exponential(), torch.where(BARS > 2, 70_000, 0)
    told, bare, tail = find_redundant(relu(), rows, samples_since_fired=since), find_redundant(relu(), rows), rates(relu(), rows)
    silent = ~told.live
    assert silent.sum() > 2 * COPIES
    np.testing.assert_array_equal(told.expected_rate[~silent], told.firing_rate[~silent])
    np.testing.assert_allclose(bare.expected_rate[silent], 1 / (1 / tail[silent] + N))
    np.testing.assert_allclose(told.expected_rate[silent], 1 / (1 / tail[silent] + N + 70_000))
    often, rare, rarer, never = (part.max() for part in told.expected_rate.reshape(-1, COPIES))
    assert often > rare > rarer > never
