"""Anchors from truth, labels and rows; pins on latents; activations and examples as values."""

import numpy as np
import pytest
import torch

from sdl_explorer.data.activations import Activations, Examples, Truth
from sdl_explorer.data.anchors import Anchors, Pins
from sdl_explorer.data.bench import LinearBench
from sdl_explorer.data.sources import stream


def labelled():
    """Two classes far from the origin, apart along the first axis."""
    inputs = torch.randn(200, 3, generator=stream(0)) * 0.1 + torch.tensor([0.0, 10.0, 0.0])
    labels = torch.arange(200) % 2
    inputs[labels == 1, 0] += 2
    return Activations(inputs, inputs, labels=labels, label_names=("left", "right"))


def pins(latents, weight=1.0, hard=False):
    k = len(latents)
    return Pins(Anchors.from_rows(torch.eye(4)[:k]), torch.tensor(latents), torch.full((k,), weight), torch.full((k,), hard))


def test_from_truth_gives_the_chosen_features_on_both_sides():
    data = LinearBench(n_features=10, d_in=12, kind="transcoder", d_out=9).batch(0, 3)
    anchors = Anchors.from_truth(data, features=[7, 2])
    torch.testing.assert_close(anchors.inputs, data.truth.input_features[[7, 2]])
    torch.testing.assert_close(anchors.targets, data.truth.target_features[[7, 2]])
    assert (anchors.names, anchors.features) == (("feature 7", "feature 2"), (7, 2))
    assert len(Anchors.from_truth(data.truth)) == 10
    with pytest.raises(ValueError, match="feature 10 does not exist"):
        Anchors.from_truth(data, features=[10])
    with pytest.raises(ValueError, match="no truth"):
        Anchors.from_truth(labelled())


def test_from_labels_gives_centred_class_means():
    anchors = Anchors.from_labels(labelled())
    assert anchors.names == ("left", "right")
    torch.testing.assert_close(anchors.inputs, torch.tensor([[-1.0, 0, 0], [1, 0, 0]]), atol=0.02, rtol=0)
    uncentred = Anchors.from_labels(labelled(), centre=False)
    assert uncentred.inputs[0] @ uncentred.inputs[1] > 0.95
    assert Anchors.from_labels(labelled(), labels=["right"]).names == ("right",)
    with pytest.raises(ValueError, match="no row has label 5"):
        Anchors.from_labels(labelled(), labels=[5])
    with pytest.raises(ValueError, match="no labels"):
        Anchors.from_labels(LinearBench(n_features=4, d_in=4).batch(0, 3))


def test_from_rows_normalises_and_names():
    anchors = Anchors.from_rows([3.0, 0.0, 4.0])
    torch.testing.assert_close(anchors.inputs, torch.tensor([[0.6, 0, 0.8]]))
    assert anchors.names == ("anchor 0",)
    assert torch.equal(anchors.targets, anchors.inputs)
    with pytest.raises(ValueError, match=r"row 1 .* has no direction"):
        Anchors(torch.tensor([[1.0, 0], [0, 0]]), torch.eye(2), ("a", "b"))
    with pytest.raises(ValueError, match="1 rows and 2 names"):
        Anchors.from_rows([1.0, 0], names=("a", "b"))


def test_pins_merge_and_release():
    merged = pins([3, 5]).merged(pins([5, 8], weight=2.0))
    assert merged.latents.tolist() == [3, 5, 8]
    assert merged.weight.tolist() == [1.0, 2.0, 2.0]
    assert merged.without([3, 8]).latents.tolist() == [5]
    assert merged.without([3, 5, 8]) is None
    assert not merged.any_hard
    assert pins([1], hard=True).any_hard
    with pytest.raises(ValueError, match="pinned twice"):
        pins([2, 2])


def test_taking_rows_keeps_every_part_in_step():
    data = LinearBench(n_features=6, d_in=8).batch(0, 10)
    part = data.take([4, 1])
    assert part.targets is part.inputs
    assert torch.equal(part.inputs, data.inputs[[4, 1]])
    assert torch.equal(part.truth.codes, data.truth.codes[[4, 1]])
    assert len(data.take(slice(2, 5))) == 3
    with pytest.raises(ValueError, match=r"truth\.codes"):
        Activations(torch.zeros(2, 8), torch.zeros(2, 8), truth=data.truth)


def test_examples_show_a_piece_in_its_context():
    examples = Examples((("the", "cat", "sat", "down"), ("ok",)), np.array([0, 0, 1]), np.array([0, 2, 0]))
    assert [examples.piece(i) for i in range(3)] == ["the", "sat", "ok"]
    assert examples.context(1, width=1) == (("cat", "sat", "down"), 1, (1, 2, 3))
    assert examples.take([2]).piece(0) == "ok"


def test_a_document_of_one_piece_describes_all_its_rows():
    examples = Examples((("cat.png",),), np.zeros(3, dtype=int), np.arange(3), np.zeros((1, 2, 2, 3), dtype=np.uint8))
    assert examples.piece(2) == "cat.png"
    assert examples.context(2) == (("cat.png",), 0, (2,))
    assert examples.thumbnail(2).shape == (2, 2, 3)


def test_truth_names_features():
    truth = Truth(torch.zeros(1, 2), torch.eye(2), torch.eye(2), names=("red", "blue"))
    assert truth.name(1) == "blue"
