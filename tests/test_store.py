"""Stored: every form reads the same rows; parts, batches and errors."""

import json
import pickle
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sdl_explorer.data import store
from sdl_explorer.data.activations import Block, Examples
from sdl_explorer.data.shards import Table, open_contents
from sdl_explorer.data.sources import PARTS, stream
from sdl_explorer.data.store import Stored


def numbered(n: int, d: int = 3) -> torch.Tensor:
    """Row i starts with i, so that rows can be told apart."""
    return torch.cat([torch.arange(n).float()[:, None], torch.randn(n, d - 1, generator=stream("rows", n))], dim=1)


def row_ids(activations) -> list[int]:
    return activations.inputs[:, 0].long().tolist()


def documents_of(lengths) -> Examples:
    document = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(k) for k in lengths])
    return Examples(tuple(tuple(f"d{i}p{p}" for p in range(k)) for i, k in enumerate(lengths)), document, position)


def write_forms(folder, x) -> dict:
    np.save(folder / "x.npy", x.numpy())
    torch.save(x, folder / "x.pt")
    torch.save({"inputs": x}, folder / "dict.pt")
    save_file({"activations": x}, folder / "x.safetensors")
    Stored(x).save(folder / "shards")
    return {name: folder / name for name in ("x.npy", "x.pt", "dict.pt", "x.safetensors", "shards")}


def test_every_form_gives_the_same_rows_fingerprint_and_batches(tmp_path):
    x = numbered(60)
    memory = Stored(x)
    for form in [x.numpy(), *write_forms(tmp_path, x).values()]:
        stored = Stored(form)
        assert (stored.n, stored.width_in, stored.width_out) == (60, 3, 3)
        assert stored.fingerprint() == memory.fingerprint()
        assert torch.equal(stored.batch(3, 17, order=1).inputs, memory.batch(3, 17, order=1).inputs)
        sampled = stored.sample(4, stream("s"), "choose")
        assert torch.equal(sampled.inputs, memory.sample(4, stream("s"), "choose").inputs)
        assert sampled.targets is sampled.inputs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_precisions_come_back_as_float32(tmp_path, dtype):
    x = numbered(20).to(dtype)
    save_file({"inputs": x}, tmp_path / "x.safetensors")
    stored = Stored(Stored(tmp_path / "x.safetensors").save(tmp_path / "again"))
    rows = stored.sample(99, stream(0), "train")
    assert rows.inputs.dtype == torch.float32
    assert torch.equal(rows.inputs, x[torch.from_numpy(stored.part("train"))].float())
    assert stored.nbytes == 20 * 3 * dtype.itemsize


def test_the_origin_is_the_file_and_none_in_memory(tmp_path):
    np.save(tmp_path / "x.npy", numbered(20).numpy())
    assert Stored(tmp_path / "x.npy").origin == tmp_path / "x.npy"
    assert Stored(numbered(20)).origin is None


@settings(max_examples=40, deadline=None)
@given(n=st.integers(10, 300), size=st.integers(1, 70), order=st.integers(0, 3), window=st.integers(1, 400))
def test_each_epoch_visits_each_training_row_once(n, size, order, window):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "WINDOW", window)
        stored = Stored(numbered(n))
        train = stored.part("train")
        seen = [i for index in range(2 * len(train) // size + 1) for i in row_ids(stored.batch(index, size, order))]
        for epoch in range(2):
            visited = seen[epoch * len(train) : (epoch + 1) * len(train)]
            assert sorted(visited) == train.tolist()


@settings(max_examples=40, deadline=None)
@given(n=st.integers(10, 400), lengths=st.lists(st.integers(1, 30), min_size=0, max_size=12))
def test_parts_are_disjoint_and_cover_the_rows(n, lengths):
    lengths = (lengths or [1]) + [10]
    n = max(n, sum(lengths))
    lengths += [1] * (n - sum(lengths))
    for examples in (None, documents_of(lengths)):
        stored = Stored(numbered(n), examples=examples)
        parts = [stored.part(p) for p in PARTS]
        assert sorted(np.concatenate(parts).tolist()) == list(range(n))
        assert all(len(p) for p in parts)
        if stored.split_by == "document":
            owners = [set(examples.document[p]) for p in parts]
            assert not (owners[0] & owners[1] or owners[0] & owners[2] or owners[1] & owners[2])


def test_rows_are_split_80_10_10():
    assert Stored(numbered(200)).part_sizes == {"train": 160, "choose": 20, "judge": 20}
    documents = Stored(numbered(400), examples=documents_of([4] * 100))
    assert documents.split_by == "document"
    assert documents.part_sizes == {"train": 320, "choose": 40, "judge": 40}


def test_a_document_larger_than_a_part_goes_to_train():
    stored = Stored(numbered(200), examples=documents_of([100] + [5] * 20))
    assert set(range(100)) <= set(stored.part("train").tolist())


def test_a_batch_is_a_function_of_its_arguments():
    stored, fresh = Stored(numbered(50)), Stored(numbered(50))
    for index in (7, 0, 3, 7):
        assert row_ids(stored.batch(index, 11)) == row_ids(fresh.batch(index, 11))
    assert row_ids(stored.batch(0, 11, order=1)) != row_ids(stored.batch(0, 11, order=0))
    assert row_ids(stored.batch(0, 40, order=0)) != row_ids(stored.batch(1, 40, order=0))  # one epoch each: 40 training rows


def test_windows_keep_reads_local(monkeypatch):
    monkeypatch.setattr(store, "WINDOW", 50)
    stored = Stored(numbered(500))
    ids = [i for index in range(8) for i in row_ids(stored.batch(index, 50))]
    windows = [i // 50 for i in ids]
    assert len([1 for a, b in pairwise(windows) if a != b]) == 9
    assert windows != sorted(windows)


def test_samples_have_no_repeats_and_stop_at_the_part():
    stored = Stored(numbered(100))
    ids = row_ids(stored.sample(7, stream(1), "judge"))
    assert len(set(ids)) == 7
    assert set(ids) <= set(stored.part("judge").tolist())
    assert row_ids(stored.sample(1000, stream(1), "judge")) == stored.part("judge").tolist()
    with pytest.raises((ValueError, TypeError), match="test"):
        stored.sample(3, stream(1), "test")


def test_labels_examples_and_targets_follow_their_rows(tmp_path):
    x, y = numbered(40), numbered(40, 5)
    labels = ["even" if i % 2 == 0 else "odd" for i in range(40)]
    stored = Stored(x, y, labels=labels, examples=Examples.from_strings(range(40)), hooks=("a", "b"))
    again = Stored(stored.save(tmp_path / "saved"))
    assert again.fingerprint() == stored.fingerprint()
    assert again.hooks == ("a", "b")
    for source in (stored, again):
        batch = source.batch(1, 20)
        assert batch.kind == "transcoder"
        assert batch.targets[:, 0].tolist() == batch.inputs[:, 0].tolist()
        for i, row in enumerate(row_ids(batch)):
            assert batch.examples.piece(i) == str(row)
            assert batch.label_names[batch.labels[i]] == labels[row]


def test_keep_leaves_rows_out_and_says_how_much_variance(tmp_path):
    x = torch.randn(50, 4, generator=stream(2)) + 100
    x[7] += 30
    keep = torch.ones(50, dtype=torch.bool)
    keep[[7, 9]] = False
    stored = Stored(x, labels=list(range(50)), keep=keep)
    spread, spread_kept = ((rows - rows.mean(dim=0)).square().sum() for rows in (x, x[keep]))
    assert stored.n == 48
    assert stored.removed.rows == 2
    assert stored.removed.reasons == {"keep": 2}
    assert stored.removed.variance == pytest.approx(1 - float(spread_kept / spread), rel=1e-4)
    everything = torch.cat([stored.sample(99, stream(0), p).labels for p in PARTS])
    assert sorted(everything.tolist()) == [i for i in range(50) if keep[i]]
    again = Stored(stored.save(tmp_path / "kept"))
    assert (again.n, again.removed, again.fingerprint()) == (48, stored.removed, stored.fingerprint())
    assert Stored(x[keep], labels=torch.arange(50)[keep]).fingerprint() == stored.fingerprint()


def test_keep_narrows_a_folder_further(tmp_path):
    folder = Stored(numbered(40)).save(tmp_path / "all")
    narrowed = Stored(folder, keep=np.arange(40) >= 5)
    assert (narrowed.n, narrowed.removed.rows) == (35, 5)
    assert min(row_ids(narrowed.sample(99, stream(0), "train"))) >= 5


def test_fingerprint_changes_with_rows_targets_and_labels():
    x = numbered(20)
    changed = x.clone()
    changed[3, 1] += 1e-3
    sources = [Stored(x), Stored(changed), Stored(x, x), Stored(x, labels=[0] * 20), Stored(x, labels=[0] * 19 + [1]), Stored(x.double())]
    assert len({s.fingerprint() for s in sources}) == len(sources)


def test_shards_are_read_across_their_borders(tmp_path, monkeypatch):
    monkeypatch.setattr("sdl_explorer.data.shards.SHARD_ROWS", 7)
    x = numbered(40)
    folder = Stored(x).save(tmp_path / "shards")
    assert len(list(folder.glob("shard-*.safetensors"))) == 6
    stored = Stored(folder)
    assert stored.fingerprint() == Stored(x).fingerprint()
    assert torch.equal(stored.batch(0, 32).inputs, Stored(x).batch(0, 32).inputs)
    assert Stored(folder, keep=np.arange(40) != 6).n == 39  # scanned again, block by block


def test_a_table_reads_its_pieces_like_one():
    x = numbered(30)
    table = Table([x[:4], x[4:20], x[20:]])
    rows = np.array([29, 0, 4, 3, 20, 4])
    assert torch.equal(table.read(rows), x[torch.from_numpy(rows)])
    assert torch.equal(table.slice(2, 25), x[2:25])
    spans = list(table.spans(4 * 3 * 8))
    assert spans[0] == (0, 8)
    assert spans[-1] == (24, 30)


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files")
def test_files_larger_than_memory_are_mapped(tmp_path):
    rows, width = 2**31, 64  # 512 GB of zeros that take no space
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, width)})
        file.truncate(file.tell() + 4 * rows * width)
    header = json.dumps({"inputs": {"dtype": "BF16", "shape": [rows, width], "data_offsets": [0, 2 * rows * width]}}).encode()
    with open(tmp_path / "x.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + 2 * rows * width)
    for name in ("x.npy", "x.safetensors"):
        table = open_contents(tmp_path / name).inputs
        assert table.n == rows
        assert torch.equal(table.read(np.array([rows - 1, 5, rows // 2])), torch.zeros(3, width))


def test_crosscoder_blocks(tmp_path):
    x = numbered(20, 6)
    stored = Stored(x, blocks=("early", "late"))
    assert stored.blocks == (Block("early", slice(0, 3), slice(0, 3)), Block("late", slice(3, 6), slice(3, 6)))
    assert Stored(stored.save(tmp_path / "b")).blocks == stored.blocks
    assert stored.batch(0, 4).kind == "crosscoder"
    with pytest.raises(ValueError, match="cover 3 columns of 6"):
        Stored(x, blocks=[Block("early", slice(0, 3), slice(0, 3))])


def test_dead_after_is_an_epoch_of_training_rows():
    assert Stored(numbered(100)).dead_after == 80


def test_saving_twice_is_safe_and_other_data_is_refused(tmp_path):
    Stored(numbered(20)).save(tmp_path / "x")
    Stored(numbered(20)).save(tmp_path / "x")
    with pytest.raises(ValueError, match="already holds other activations"):
        Stored(numbered(21)).save(tmp_path / "x")


def test_an_interrupted_save_is_not_a_folder_of_activations(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "write_folder", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        Stored(numbered(20)).save(tmp_path / "x")
    with pytest.raises(ValueError, match=r"no activations\.json"):
        Stored(tmp_path / "x")


class Posing:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_pickle_posing_as_a_checkpoint_is_refused_and_not_run(tmp_path, capsys):
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Posing()))
    with pytest.raises(ValueError, match="does not hold plain tensors"):
        Stored(tmp_path / "x.pt")
    torch.save(Posing(), tmp_path / "y.pt")
    with pytest.raises(ValueError, match="weights_only=True"):
        Stored(tmp_path / "y.pt")
    assert "code ran" not in capsys.readouterr().out


def test_broken_files_are_named(tmp_path):
    x = numbered(20)
    save_file({"inputs": x}, tmp_path / "x.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-50])
    torch.save(x, tmp_path / "x.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:-50])
    np.save(tmp_path / "x.npy", x.numpy())
    (tmp_path / "cut.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-50])
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    for suffix in (".npy", ".pt", ".safetensors"):
        (tmp_path / f"empty{suffix}").touch()
        with pytest.raises(ValueError, match="is empty"):
            Stored(tmp_path / f"empty{suffix}")
    for name in ("cut.safetensors", "cut.pt", "cut.npy", "objects.npy"):
        with pytest.raises(ValueError, match=name):
            Stored(tmp_path / name)
    (tmp_path / "x.txt").write_text("1 2 3")
    with pytest.raises(ValueError, match=r"ending '\.txt'"):
        Stored(tmp_path / "x.txt")
    with pytest.raises(FileNotFoundError, match=r"nothing\.npy does not exist"):
        Stored(tmp_path / "nothing.npy")
    with pytest.raises(ValueError, match=r"no activations\.json"):
        Stored(tmp_path)
    save_file({"a": x, "b": x.clone()}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"holds \['a', 'b'\]"):
        Stored(tmp_path / "two.safetensors")


def test_bad_rows_are_named():
    x = numbered(20)
    for bad in (float("nan"), float("inf")):
        broken = x.clone()
        broken[13, 2] = bad
        with pytest.raises(ValueError, match="row 13 is not finite"):
            Stored(broken)
        with pytest.raises(ValueError, match="targets: row 13"):
            Stored(x, broken)
        assert Stored(broken, keep=torch.arange(20) != 13).removed == store.Removed(1, 0.0, {"keep": 1})
    with pytest.raises(ValueError, match=r"shape \(20,\)"):
        Stored(x[:, 0])
    with pytest.raises(ValueError, match="Flatten"):
        Stored(x[None])
    with pytest.raises(TypeError, match=r"torch\.int64"):
        Stored(x.long())
    with pytest.raises(TypeError, match="int64"):
        Stored(x.long().numpy())
    with pytest.raises(TypeError, match="list is not a tensor"):
        Stored([[1.0]])
    with pytest.raises(ValueError, match="at least one column"):
        Stored(torch.zeros(20, 0))
    with pytest.raises(ValueError, match="9 rows; at least 10"):
        Stored(x[:9])
    with pytest.raises(ValueError, match="20 rows of inputs and 19 of targets"):
        Stored(x, x[:19])
    with pytest.raises(ValueError, match="20 rows of inputs and 3 of labels"):
        Stored(x, labels=[1, 2, 3])
    with pytest.raises(ValueError, match="20 rows of inputs and 4 of keep"):
        Stored(x, keep=[True] * 4)
    with pytest.raises(TypeError, match="keep"):
        Stored(x, keep=list(range(20)))
    with pytest.raises(ValueError, match="label_names"):
        Stored(x, labels=list(range(20)), label_names=("a", "b"))
