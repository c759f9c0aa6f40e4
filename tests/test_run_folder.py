"""Run folders: one writer, followers that say who writes, and nothing believed that a file says."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch

from sdl_explorer.data.anchors import Anchors
from sdl_explorer.data.bench import LinearBench
from sdl_explorer.data.store import Stored
from sdl_explorer.models.dictionary import SparseDictionary
from sdl_explorer.models.methods import ReLU, TopK
from sdl_explorer.session import Session
from sdl_explorer.training import folder as folder_module
from sdl_explorer.training import run as run_module
from sdl_explorer.training.folder import RunLock

SOURCE = LinearBench(n_features=12, d_in=8, sparsity=0.8, max_interference=0.7)


pytestmark = pytest.mark.usefixtures("few_rows")


@pytest.fixture
def keep():
    """Sessions and locks, closed at the end."""
    kept = []

    def keep(thing):
        kept.append(thing)
        return thing

    yield keep
    for thing in kept:
        thing.close() if isinstance(thing, Session) else thing.release()


@pytest.fixture
def saved(keep, tmp_path) -> Session:
    """A writer with a folder, at step 7."""
    session = keep(Session(SOURCE, TopK(k=2), 16, batch_size=16, dead_after=100, seed=3)).train(7)
    session.save(tmp_path / "run")
    return session


def weights(session) -> dict:
    return session.dictionary.state_dict()


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# saving and opening --------------------------------------------------------------------------------------------------


def test_a_session_comes_back_as_it_was(saved, keep):
    saved.anchor(Anchors.from_truth(SOURCE.sample(1, torch.Generator()), [2]), weight=0.7)
    saved.lr, saved.method.k = 5e-4, 3
    saved.train(2)
    saved.commit("here")
    here, folder = weights(saved), saved.folder
    saved.close()
    session = keep(Session.open(folder))
    assert session.writable and session.writer.startswith(f"process {os.getpid()} on {socket.gethostname()}")
    assert same(weights(session), here) and session.step == 9 and session.head.message == "here"
    assert (session.lr, session.method.k, session.seed, session.n_latents, session.batch_size) == (5e-4, 3, 3, 16, 16)
    assert session.pins.weight.tolist() == pytest.approx([0.7]) and session.pins.anchors.features == (2,)
    assert session.source.fingerprint() == SOURCE.fingerprint() and not session.stale
    assert session.history.steps.tolist() == list(range(9))
    assert [c.kind for c in session.commits] == ["start", "manual", "anchor", "settings", "manual"]
    loaded = SparseDictionary.load(folder)
    assert same(loaded.state_dict(), here)


def test_save_commits_only_if_the_step_moved(saved):
    n = len(saved.commits)
    assert saved.save(saved.folder) == saved.folder and len(saved.commits) == n
    saved.train(1).save(saved.folder)
    assert len(saved.commits) == n + 1 and saved.head.step == 8


def test_saving_elsewhere_moves_the_session(saved, keep, tmp_path):
    first = saved.folder
    saved.train(2).save(tmp_path / "deep" / "er" / "run")
    assert saved.folder == (tmp_path / "deep" / "er" / "run").resolve() and saved.writable
    other = keep(Session.open(first))
    assert other.writable and other.step == 9, "the former folder is free, and whole"
    assert not same(weights(other.train(1)), weights(saved))


def test_a_folder_that_holds_a_run_is_not_overwritten(saved, keep):
    other = keep(Session(SOURCE, TopK(k=2), 8))
    with pytest.raises(ValueError, match="already holds a run"):
        other.save(saved.folder)
    assert other.folder is None and saved.writable


def test_rows_given_in_memory_come_back_from_the_folder(keep, tmp_path):
    rows = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    session = keep(Session(Stored(rows), ReLU(), 8, batch_size=16)).train(3)
    folder = session.save(tmp_path / "run")
    assert (folder / "data").is_dir()
    session.close()
    again, expected = keep(Session.open(folder)).train(2), keep(Session(Stored(rows), ReLU(), 8, batch_size=16)).train(5)
    assert same(weights(again), weights(expected))
    again.close()
    shutil.rmtree(folder / "data")
    with pytest.raises(FileNotFoundError, match=r"data at .* is gone; pass it as source="):
        Session.open(folder)
    assert keep(Session.open(folder, source=Stored(rows))).writable


def test_rows_of_a_file_are_referred_to_and_checked(keep, tmp_path):
    import numpy as np

    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(100, 6)).astype("float32"))
    session = keep(Session(Stored(tmp_path / "rows.npy"), ReLU(), 8, batch_size=16))
    folder = session.save(tmp_path / "run")
    session.close()
    assert not (folder / "data").exists() and keep(Session.open(folder)).close() is None
    np.save(tmp_path / "rows.npy", np.zeros((100, 6), "float32") + 1)
    with pytest.raises(ValueError, match=r"was trained on data .* and this source is"):
        Session.open(folder)


def test_another_source_is_refused(saved):
    saved.close()
    with pytest.raises(ValueError, match=r"trained on data LinearBench:.* pass the original data"):
        Session.open(saved.folder, source=LinearBench(n_features=12, d_in=8, sparsity=0.5))


def test_a_changed_budget_is_remembered(saved, keep):
    saved.budget = 3_000_000
    saved.commit()
    saved.close()
    assert keep(Session.open(saved.folder)).budget == 3_000_000


# one writer ----------------------------------------------------------------------------------------------------------


def test_a_second_opener_follows_and_cannot_write(saved, keep):
    follower = keep(Session.open(saved.folder))
    assert not follower.writable and f"process {os.getpid()}" in follower.writer
    commands = {
        "train": lambda: follower.train(1),
        "apply": lambda: follower.resample([1]),
        "commit": follower.commit,
        "save": lambda: follower.save(saved.folder),
        "revert": lambda: follower.revert(follower.commits[0]),
        "control": lambda: follower.control(1),
    }
    for verb, command in commands.items():
        with pytest.raises(PermissionError, match=f"{verb}: this session follows .* process {os.getpid()} .* writes"):
            command()
    before = follower.version
    saved.lr = 0.25
    saved.train(3).commit("news")
    assert follower.step == 10 and follower.head.message == "news" and follower.lr == 0.25
    assert same(weights(follower), weights(saved)) and follower.version > before
    assert [c.id for c in follower.commits] == [c.id for c in saved.commits]
    assert len(follower.history) == 10
    with follower.branch() as twin:
        assert same(weights(twin.train(2)), weights(saved.train(2)))


def test_a_follower_keeps_up_with_thinning(saved, keep, monkeypatch):
    monkeypatch.setattr(run_module, "COMMIT_EVERY", 5)
    follower = keep(Session.open(saved.folder))
    saved.pulses.append(lambda: (follower.step, follower.dictionary, follower.commits))
    saved.train(60)
    assert follower.head.step == 65
    saved.commit()
    assert same(weights(follower), weights(saved))
    follower.close()
    reader = keep(Session.open(saved.folder))
    thinned = reader.commits[2]
    assert thinned.kind == "auto"
    with reader.branch(thinned) as twin:
        assert twin.step == thinned.step


def test_close_gives_the_folder_up_and_ends_the_session(saved, keep):
    folder = saved.folder
    saved.close()
    saved.close()
    assert not saved.writable and not (folder / "lock.json").exists()
    for command in (lambda: saved.train(1), saved.commit, lambda: saved.save(folder), lambda: saved.resample([1])):
        with pytest.raises(PermissionError, match=r"this session is closed. Open its folder again"):
            command()
    assert saved.step == 7 and saved.dictionary.n_latents == 16 and len(saved.commits) == 2, "reading goes on"
    assert keep(Session.open(folder)).train(1).step == 8
    assert saved.step == 7


def test_a_closed_session_in_memory_leaves_nothing(keep):
    session = keep(Session(SOURCE, TopK(k=2), 8))
    temporary = session._run.store.folder.parent
    assert temporary.exists()
    with session:
        pass
    assert not temporary.exists() and session.step == 0
    with pytest.raises(PermissionError, match="closed"):
        session.train(1)


def test_a_lock_of_another_host_is_taken_only_when_asked_for(saved, keep):
    folder = saved.folder
    saved.close()
    (folder / "lock.json").write_text(json.dumps({"host": "elsewhere", "pid": 7, "heartbeat": 0.0}))
    follower = keep(Session.open(folder))
    assert not follower.writable and follower.writer.startswith("process 7 on elsewhere (last heard ")
    with pytest.raises(PermissionError, match="take_over=True"):
        follower.train(1)
    writer = keep(Session.open(folder, take_over=True))
    assert writer.writable and writer.train(1).step == 8
    assert json.loads((folder / "lock.json").read_text())["host"] == socket.gethostname()


def test_a_lock_whose_process_is_gone_is_taken(saved, keep):
    folder = saved.folder
    saved.close()
    (folder / "lock.json").write_text(json.dumps({"host": socket.gethostname(), "pid": 999_999, "heartbeat": 0.0}))
    assert keep(Session.open(folder)).writable


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "elsewhere"}'])
def test_a_damaged_lock_names_nobody_and_the_operating_system_decides(saved, keep, content):
    (saved.folder / "lock.json").write_text(content)
    assert not keep(Session.open(saved.folder)).writable
    saved.close()
    (saved.folder / "lock.json").write_text(content)
    assert keep(Session.open(saved.folder)).writable


def test_take_over_does_not_break_a_lock_that_is_held_here(saved, keep):
    assert not keep(Session.open(saved.folder, take_over=True)).writable


def test_the_heartbeat_beats_and_ends_with_the_lock(tmp_path, keep, monkeypatch):
    monkeypatch.setattr(folder_module, "HEARTBEAT", 0.01)
    lock = keep(RunLock(tmp_path))
    read = lambda: json.loads((tmp_path / "lock.json").read_text())["heartbeat"]
    first = read()
    for _ in range(500):
        if read() > first:
            break
        lock._stop.wait(0.01)
    assert read() > first and "last heard 0 s ago" in lock.writer
    lock.release()
    assert not lock._beating.is_alive() and not (tmp_path / "lock.json").exists() and lock.writer == "nobody"
    assert keep(RunLock(tmp_path)).held


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_write_permission_is_followed(saved, keep):
    saved.close()
    (saved.folder / ".lock").chmod(0o400)
    saved.folder.chmod(0o500)
    assert not keep(Session.open(saved.folder)).writable
    saved.folder.chmod(0o700)


# damaged folders -----------------------------------------------------------------------------------------------------


def unknown_method(folder):
    record = json.loads((folder / "run.json").read_text())
    edit(folder / "run.json", session=record["session"] | {"method": {"class": "os.system", "settings": {}}})


def unknown_source(folder):
    record = json.loads((folder / "run.json").read_text())
    edit(folder / "run.json", source=record["source"] | {"class": "Popen"})


def no_commits(folder):
    shutil.rmtree(folder / "commits")


def no_head(folder):
    edit(folder / "head.json", commit="gone")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "run.json").unlink(), FileNotFoundError, "is not a run folder: it has no run.json"),
        (lambda f: (f / "run.json").write_text(""), ValueError, "run.json is not JSON"),
        (lambda f: (f / "run.json").write_text("[]"), ValueError, "run.json holds a JSON list"),
        (lambda f: (f / "run.json").write_text("{}"), ValueError, "run.json: 'budget' is missing"),
        (lambda f: edit(f / "run.json", format_version=2), ValueError, r"format_version is 2, .* reads up to 1; upgrade"),
        (lambda f: (f / "head.json").unlink(), FileNotFoundError, "it has no head.json"),
        (lambda f: (f / "head.json").write_text("{"), ValueError, "head.json is not JSON"),
        (lambda f: (f / "history.json").write_text("nonsense"), ValueError, "history.json is not JSON"),
        (no_head, ValueError, "commit 'gone': 0 commits"),
        (no_commits, ValueError, "0 commits .* match; the newest are none"),
        (unknown_method, ValueError, "'os.system' is no method. There are: .*TopK"),
        (unknown_source, ValueError, "'Popen' is no source. There are: .*LinearBench"),
    ],
)
def test_a_damaged_folder_says_what_is_wrong_and_stays_free(saved, keep, tmp_path, damage, error, message):
    saved.close()
    broken = shutil.copytree(saved.folder, tmp_path / "broken")
    damage(broken)
    with pytest.raises(error, match=message):
        Session.open(broken)
    lock = keep(RunLock(broken))
    assert lock.held, "a failed open does not keep the lock"


def test_a_file_that_is_no_folder():
    with pytest.raises((FileNotFoundError, NotADirectoryError)):
        Session.open(__file__)
