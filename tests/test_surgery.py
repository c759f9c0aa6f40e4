"""Prune, Split and Unabsorb: planted damage with a known answer, and rows that nobody named stay as they are."""

import pytest
import torch
from torch.nn.functional import normalize

from sdl_explorer.data.activations import Activations
from sdl_explorer.data.bench import LinearBench, random_rotation
from sdl_explorer.data.hierarchy import HierarchyBench
from sdl_explorer.data.sources import stream
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import BatchTopK, Gated, JumpReLU, ReLU, TopK, TopKAux
from sdl_explorer.training.firings import Firings, copies
from sdl_explorer.training.prune import Prune
from sdl_explorer.training.split import Split, two_lines
from sdl_explorer.training.state import TrainState
from sdl_explorer.training.unabsorb import Unabsorb

FLAT = LinearBench(n_features=8, d_in=8, sparsity=0.85, interference="bounded", max_interference=0.0)
TREE = HierarchyBench(parents=2, children=2, independent=4, d_in=12, parent_probability=0.3, child_probability=0.3)
N = 3_000


def rows_of(source, noise=0.0) -> Activations:
    rows = source.sample(N, stream("choose"), "choose")
    if not noise:
        return rows
    noisy = rows.inputs + noise * torch.randn(rows.inputs.shape, generator=stream("noise"))
    return Activations(noisy, noisy, rows.truth)


def features(source):
    return source.sample(1, torch.Generator()).truth.input_features


def merged(order=None) -> SparseDictionary:
    """The truth, but features 0 and 1 share latent 0 and latent 1 is silent."""
    W = features(FLAT).clone()
    W[0] = normalize(W[0] + W[1], dim=0)
    W[1] = 0
    order = torch.arange(8) if order is None else order
    return SparseDictionary(W[order], W[order], nonlinearity=TopK(k=4).nonlinearity(8))


def absorbed(order=None) -> SparseDictionary:
    """The truth, but each child's latent writes its parent too, and the parent's latent avoids the child."""
    truth = TREE.sample(1, torch.Generator()).truth
    W_enc, W_dec = truth.input_features.clone(), truth.input_features.clone()
    for child, parent in enumerate(truth.parents):
        if parent is not None:
            W_dec[child] = normalize(truth.input_features[parent] + truth.input_features[child], dim=0)
            W_enc[child] = 2**0.5 * truth.input_features[child]
            W_enc[parent] -= truth.input_features[child]
    order = torch.arange(len(W_enc)) if order is None else order
    return SparseDictionary(W_enc[order], W_dec[order], nonlinearity=lambda pre: pre * (pre > 0.2))


def recovered(dictionary, source, side="W_dec", tau=0.99) -> int:
    cosines = normalize(getattr(dictionary, side).detach(), dim=1) @ features(source).T
    return int((cosines.max(dim=0).values > tau).sum())


def applied(intervention, dictionary, rows) -> tuple[TrainState, object]:
    state = TrainState.start(dictionary)
    before = [p.detach().clone() for p in dictionary.parameters()]
    plan = intervention.plan(state, rows, stream(0))
    assert all(torch.equal(a, b) for a, b in zip(before, dictionary.parameters(), strict=True)), "planning changes nothing"
    plan.apply(state)
    others = [i for i in range(dictionary.n_latents) if i not in plan.latents.tolist()]
    for old, new in zip(before[:3], list(dictionary.parameters())[:3], strict=True):
        if old.ndim and len(old) == dictionary.n_latents:
            assert torch.equal(old[others], new.detach()[others])
    return state, plan


# prune ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [ReLU(), JumpReLU(), TopK(k=3), BatchTopK(k=3), Gated(), TopKAux(k=3)], ids=lambda m: type(m).__name__)
def test_a_pruned_latent_never_fires_and_writes_nothing(method):
    dictionary, rows = method.build(8, 8, 12, stream("weights")), rows_of(FLAT)
    _, plan = applied(Prune(latents=[2, 9]), dictionary, rows)
    with torch.no_grad():
        codes = dictionary.eval().encode(rows.inputs).dense()
    assert not codes[:, [2, 9]].any() and codes.any()
    assert plan.python == "session.prune([2, 9])" and plan.expected["error after"] >= 0


def test_a_prune_names_its_latents():
    with pytest.raises(ValueError, match="no latents named"):
        Prune().plan(TrainState.start(merged()), rows_of(FLAT), stream(0))


# split ---------------------------------------------------------------------------------------------------------------


def test_two_lines_of_rows_that_lie_on_two():
    axes = torch.eye(5)[[1, 3]]
    place = torch.rand(400, generator=stream(1)) < 0.4
    rows = axes[place.long()] * (0.5 + torch.rand(400, 1, generator=stream(2)))
    found = two_lines(rows)
    assert found.two == pytest.approx(1.0) and found.one < 0.75
    assert normalize(found.directions, dim=1).matmul(axes.T).max(dim=1).values.tolist() == pytest.approx([1.0, 1.0])
    same = (found.place == place.long()).float().mean()
    assert same in (0.0, 1.0)
    alone = two_lines(axes[:1] * torch.rand(100, 1, generator=stream(3)))
    assert alone.one == pytest.approx(1.0) and alone.two == pytest.approx(1.0)


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_merged_pair_is_split_and_no_other(noise, shuffled):
    order = torch.randperm(8, generator=stream(5)) if shuffled else torch.arange(8)
    dictionary, rows = merged(order), rows_of(FLAT, noise)
    place = order.argsort().tolist()
    assert recovered(dictionary, FLAT) == 6
    _, plan = applied(Split(), dictionary, rows)
    assert plan.latents.tolist() == [place[0], place[1]]
    assert recovered(dictionary, FLAT) == recovered(dictionary, FLAT, "W_enc") == 8
    assert plan.expected["error after"] < 0.5 * plan.expected["error before"]


def test_a_split_needs_two_directions_and_a_spare():
    W = features(FLAT)
    with pytest.raises(ValueError, match="none of 8 latents has two directions"):
        Split().plan(TrainState.start(SparseDictionary(W, W, nonlinearity=TopK(k=4).nonlinearity(8))), rows_of(FLAT), stream(0))
    full = merged()
    with torch.no_grad():
        full.W_enc[1] = full.W_dec[1] = normalize(W[1] - 0.7 * W[2], dim=0)  # alive, and nobody's copy
    with pytest.raises(ValueError, match="no latent is spare"):
        Split(latents=[0], gain=0.0).plan(TrainState.start(full), rows_of(FLAT), stream(0))
    _, plan = applied(Split(latents=[0], spares=[1], gain=0.0), full, rows_of(FLAT))
    assert plan.latents.tolist() == [0, 1]


def test_copies_and_firings():
    W = features(FLAT).clone()
    W[5], W[7] = 3 * W[2], W[2]
    assert copies(SparseDictionary(W, W)) == [5, 7]
    assert copies(SparseDictionary(W, features(FLAT))) == []
    rows = rows_of(FLAT)
    with torch.no_grad():
        dictionary = merged()
        firings, codes = Firings(dictionary, rows), dictionary.encode(rows.inputs).dense()
    assert firings.count.tolist() == (codes > 0).sum(dim=0).tolist()
    at, value = firings.of(3)
    assert torch.equal(at, codes[:, 3].nonzero().flatten()) and torch.equal(value, codes[at, 3])
    assert firings.share(3, torch.tensor([3, 4])).tolist() == pytest.approx([1.0, float((codes[at, 4] > 0).float().mean())])


# unabsorb ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("shuffled", [False, True])
def test_absorbed_children_give_their_parents_back(noise, shuffled):
    order = torch.randperm(10, generator=stream(5)) if shuffled else torch.arange(10)
    dictionary, rows = absorbed(order), rows_of(TREE, noise)
    assert recovered(dictionary, TREE) == 6
    _, plan = applied(Unabsorb(), dictionary, rows)
    assert sorted(order[plan.latents].tolist()) == [0, 1, 2, 3, 4, 5]
    assert recovered(dictionary, TREE) == recovered(dictionary, TREE, "W_enc") == 10
    if not noise:
        assert plan.expected["error before"] < 1e-10 and plan.expected["error after"] < 1e-9, "both are exact: the loss cannot tell"


def test_named_pairs_and_what_is_refused():
    dictionary, rows = absorbed(), rows_of(TREE)
    _, plan = applied(Unabsorb(latents=[1, 2], parents=[0, 0]), dictionary, rows)
    assert plan.latents.tolist() == [1, 2, 0] and plan.python == "session.unabsorb([1, 2], parents=[0, 0])"
    assert recovered(dictionary, TREE) == 8
    truth = features(TREE)
    healthy = TrainState.start(SparseDictionary(truth, truth))
    for wrong, why in (({}, "no latent has a neighbour"), ({"latents": [1], "parents": [0, 3]}, "give one parent for each"),
                       ({"latents": [1], "parents": [1]}, "no latent on both sides")):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            Unabsorb(**wrong).plan(healthy, rows, stream(0))


def test_a_transcoder_splits_on_both_sides():
    turn = random_rotation(8, stream(9)).float()
    rows = rows_of(FLAT)
    there = Activations(rows.inputs, rows.inputs @ turn)
    dictionary = merged()
    with torch.no_grad():
        dictionary.W_dec.copy_(dictionary.W_dec @ turn)
    applied(Split(), dictionary, there)
    cosines = normalize(dictionary.W_dec.detach(), dim=1) @ (features(FLAT) @ turn).T
    assert (cosines.max(dim=0).values > 0.99).all()
    assert recovered(dictionary, FLAT, "W_enc", tau=0.9) == 8
