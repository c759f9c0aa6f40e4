"""Commits: whole or not at all, exact, thinned to a budget, and replayed bit for bit."""

import errno
import itertools
import json
import os
import stat
from pathlib import Path

import pytest
import torch

from sdl_explorer.data.anchors import Anchors
from sdl_explorer.data.bench import LinearBench
from sdl_explorer.models.methods import BatchTopK, JumpReLU, ReLU, TopK
from sdl_explorer.session import Session
from sdl_explorer.training import run as run_module
from sdl_explorer.training.commits import BudgetError, CommitStore

SOURCE = LinearBench(n_features=12, d_in=8, sparsity=0.8, max_interference=0.7)


pytestmark = pytest.mark.usefixtures("few_rows")


@pytest.fixture
def make(monkeypatch):
    """Tiny sessions that commit every 10 steps, closed at the end."""
    monkeypatch.setattr(run_module, "COMMIT_EVERY", 10)
    made = []

    def make(method=None, **settings) -> Session:
        made.append(Session(SOURCE, method or TopK(k=2), 16, **({"batch_size": 16, "dead_after": 100} | settings)))
        return made[-1]

    yield make
    for session in made:
        session.close()


def everything(session: Session) -> dict[str, torch.Tensor]:
    """Weights, moments with their step counts, silence, pins; copied."""
    state = session._run.state
    names = {id(p): name for name, p in state.dictionary.named_parameters()}
    moments = {f"{names[id(p)]}/{k}": v for p, slots in state.optimiser.state.items() for k, v in slots.items()}
    found = dict(state.dictionary.state_dict()) | moments | {"silent": state.samples_since_fired, "step": torch.tensor(state.step)}
    if state.pins is not None:
        found |= {"pins": state.pins.latents, "pinned to": state.pins.anchors.inputs}
    return {name: t.detach().cpu().clone() for name, t in found.items()}


def same(a, b, device="cpu") -> bool:
    equal = torch.equal if device == "cpu" else (lambda x, y: torch.allclose(x.float(), y.float(), rtol=1e-4, atol=1e-5))
    return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)


# what a commit holds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [ReLU(l1=0.01, l0_target=2), JumpReLU(l0=0.01), TopK(k=2), BatchTopK(k=2)], ids=lambda m: type(m).__name__
)
def test_after_revert_training_replays_bit_for_bit(make, method, device):
    session = make(method, device=device).train(7)
    session.anchor(Anchors.from_truth(SOURCE.sample(1, torch.Generator()), [3, 4]))
    here = session.commit("here")
    at_commit = everything(session)
    session.train(9)
    later, losses = everything(session), session.history.losses["total"]
    session.lr = 0.5
    session.train(5).resample([1, 2])
    session.revert(here)
    assert same(everything(session), at_commit), "a commit is exact on any device"
    assert session.lr == 1e-3 and session.head == here and session.pins.anchors.features == (3, 4)
    session.train(9)
    assert same(everything(session), later, device)
    if device == "cpu":
        assert session.history.losses["total"].tolist() == losses.tolist()


def test_commits_tell_their_story(make):
    session = make(TopK(k=2)).train(25)
    session.resample([3, 1])
    session.lr = 2e-3
    session.method.k = 3
    session.train(1)
    manual = session.commit("good")
    kinds = [c.kind for c in session.commits]
    assert kinds == ["start", "auto", "auto", "run", "resample", "settings", "manual"]
    assert [c.step for c in session.commits] == [0, 10, 20, 25, 25, 25, 26]
    assert [c.parent for c in session.commits[1:]] == [c.id for c in session.commits[:-1]]
    resample, changed = session.commits[4:6]
    assert resample.latents == (3, 1) and resample.python == "session.resample([3, 1])"
    assert changed.message == "settings: lr 0.001 to 0.002, method.k 2 to 3"
    assert changed.python == "session.lr = 0.002; session.method.k = 3"
    assert manual.message == "good" and manual.metrics["error"] > 0 and manual.created > 1e9
    assert len({c.id for c in session.commits}) == len(kinds)


def test_a_commit_is_named_by_itself_its_id_or_its_beginning(make):
    session = make().train(3)
    commit = session.commit()
    for name in (commit, commit.id, commit.id[:6]):
        assert session.revert(name).head == commit
    with pytest.raises(ValueError, match=r"commit 'nope': 0 commits .* match; the newest are .*step 3"):
        session.revert("nope")
    with pytest.raises(ValueError, match="0 commits"):
        session.revert("")


def test_a_run_of_a_hundred_steps_ends_in_a_commit(make):
    session = make()
    session.train(99)
    assert session.head.kind == "auto"
    session.train(100)
    assert session.head.kind == "run" and session.head.step == 199 and session.head.python == "session.train(100)"


# thinning ------------------------------------------------------------------------------------------------------------


def test_only_the_newest_automatic_commit_keeps_moments_and_the_others_replay(make, device):
    session, seen = make(device=device), {}
    session.train(3)
    for step in (10, 20, 30, 35):
        session.train(step - session.step)
        seen[step] = everything(session)
    auto = {c.step: c for c in session.commits if c.kind == "auto"}
    assert not auto, "a run that ends at the step itself commits at its end only"
    session.restart()
    session.train(35)
    auto = {c.step: c for c in session.commits if c.kind == "auto"}
    has = session._run.store.has_moments
    assert {step: has(c) for step, c in auto.items()} == {10: False, 20: False, 30: True}
    for step in (10, 20, 30):
        session.revert(auto[step])
        assert same(everything(session), seen[step], device), step
    session.train(5)
    assert same(everything(session), seen[35], device)


def test_a_thinned_commit_of_training_some_latents_alone_replays_them_alone(make):
    session, seen = make().train(5), {}
    session.train(28, only=[2, 7])
    auto = {c.step: c for c in session.commits if c.kind == "auto"}
    assert {step: session._run.store.has_moments(c) for step, c in auto.items()} == {10: False, 20: False, 30: True}
    other = make().train(5)
    for step in (10, 20):
        other.train(step - other.step, only=[2, 7])
        seen[step] = everything(other)
    for step in (20, 10):
        assert same(everything(session.revert(auto[step])), seen[step])


def test_training_alone_from_an_automatic_commit_replays_from_there(make):
    """stop() can leave a run exactly at an automatic commit, which will lose its moments."""
    session = make()
    session.pulses.append(lambda: None)
    session.train(10)
    session._run.commit("auto", "step 10")
    session.train(21, only=[4])
    thinned = next(c for c in session.commits if c.kind == "auto" and c.step == 20)
    other = make().train(10).train(10, only=[4])
    assert same(everything(session.revert(thinned)), everything(other))


def test_an_automatic_commit_that_an_intervention_starts_from_keeps_its_moments(make):
    session = make()
    session.train(10)
    session._run.commit("auto", "step 10")
    session.resample([1])
    session.train(31)
    assert session._run.store.has_moments(session.commits[1])


def size_of_one(session) -> int:
    before = session.disk_used
    session.commit()
    return session.disk_used - before


def test_the_budget_is_never_exceeded_and_names_its_setting(make):
    session = make()
    one = size_of_one(session)
    session.budget = session.disk_used + 2 * one + 10_000
    first = session.commit("first")
    before, known = everything(session), [c.id for c in session.commits]
    second = session.commit("second")
    with pytest.raises(BudgetError, match=r"session\.budget is 0\.\d MB\. Raise session\.budget"):
        session.commit()
    known += [second.id]
    assert session.disk_used <= session.budget
    assert [c.id for c in session.commits] == known and same(everything(session), before)
    session.budget *= 2
    assert session.commit("room again").parent == known[-1]
    session.revert(first)


def test_automatic_commits_make_room_but_only_where_that_is_enough(make):
    session = make()
    one = size_of_one(session)
    session.train(95)
    autos = [c.id for c in session.commits if c.kind == "auto"]
    assert len(autos) == 9
    session.budget = session.disk_used + one // 2
    kept = session.commit("fits once one has gone")
    assert session.disk_used <= session.budget
    assert kept.parent == autos[-1] and autos[-1] in [c.id for c in session.commits], "what it starts from stays"
    gone = [a for a in autos if a not in [c.id for c in session.commits]]
    assert gone == autos[: len(gone)] and gone, "the oldest go first"
    ids = {c.id for c in session.commits}
    assert all(c.parent in ids for c in session.commits[1:]), "children follow their grandparents"

    left = [c.id for c in session.commits]
    session.budget = session.disk_used - 3 * one
    with pytest.raises(BudgetError):
        session.commit()
    assert [c.id for c in session.commits] == left, "nothing goes in vain"


def test_forgotten_parents_still_replay(make):
    session = make().train(35)
    third = [c for c in session.commits if c.kind == "auto"][1]
    expected = everything(make().train(20))
    session._run.store.forget(session.commits[1])
    assert same(everything(session.revert(third)), expected)


# a disk that is full -------------------------------------------------------------------------------------------------

SYNC = os.fsync
DATA = [(os, "fsync"), (Path, "write_bytes"), (Path, "write_text")]
NAMES = [(os, "replace"), (os, "rename")]


class FullDisk:
    """The n-th write fails with ENOSPC, and with `for_good` every later write of data too."""

    def __init__(self, monkeypatch, n: int, for_good: bool):
        self.n, self.for_good, self.count = n, for_good, 0
        for owner, name in DATA + NAMES:
            monkeypatch.setattr(owner, name, self.guarded(getattr(owner, name), (owner, name) in DATA))

    def guarded(self, function, is_data: bool):
        def guarded(*arguments, **named):
            if function is SYNC and stat.S_ISDIR(os.fstat(arguments[0]).st_mode):
                return function(*arguments)  # names are synced where the operating system can, and not counted on
            self.count += 1
            if self.count == self.n or (is_data and self.for_good and self.count > self.n):
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **named)

        return guarded


def change_settings(session):
    session.lr = session.lr * 2
    session.method.k = 5 - session.method.k
    session.commit("with other settings")


COMMANDS = {
    "commit": lambda session, folder: session.commit(),
    "apply": lambda session, folder: session.resample([3, 5]),
    "settings": lambda session, folder: change_settings(session),
    "revert": lambda session, folder: session.revert(session.commits[0]),
    "save": lambda session, folder: session.save(folder),
}


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_at_any_write_leaves_everything_as_it_was(make, tmp_path, monkeypatch, command, for_good):
    session = make().train(12)
    session.resample([1])
    session.train(3)
    before = everything(session)
    for n in itertools.count(1):
        known = {c.id: c for c in session.commits}
        with monkeypatch.context() as patch:
            disk, failure = FullDisk(patch, n, for_good), None
            try:
                COMMANDS[command](session, tmp_path / "run")
            except OSError as error:
                failure = error
        if failure is None:
            assert disk.count < n, "a failure that nobody heard of"
            break
        assert failure.errno == errno.ENOSPC and "Writing" in str(failure) and "make room" in str(failure)
        assert same(everything(session), before)
        in_force, state = session._run.settings, session._run.state
        assert in_force == session._run.store.settings(session.head)
        assert (state.schedule.lr, state.dictionary.nonlinearity.k) == (in_force["lr"], in_force["method"]["settings"]["k"])
        assert known.items() <= {c.id: c for c in session.commits}.items()
        assert session.head.step <= session.step and session.folder is None
        store = CommitStore(session._run.store.folder, 10**9)
        assert [c.id for c in store] == [c.id for c in session.commits]
        for commit in store:
            store.load_dictionary(commit)
        assert not [p for p in store.folder.parent.rglob(".*") if p.name.endswith(".tmp")], "no litter"
        session._show_settings()
    assert n > 8, "the disk was full at several places"
    assert not session.stale


def test_a_run_that_cannot_commit_ends_with_the_reason_and_goes_on_later(make, monkeypatch):
    session = make().train(3)
    expected = everything(make().train(20))
    with monkeypatch.context() as patch:
        FullDisk(patch, 1, for_good=True)
        with pytest.raises(OSError, match="No space left"):
            session.train(17)
    assert session.step == 10 and "No space left" in session.snapshot.error and not session.snapshot.running
    assert [c.kind for c in session.commits] == ["start"]
    session.train(10)
    assert same(everything(session), expected) and session.snapshot.error is None


def test_a_model_that_is_not_finite_is_not_committed(make):
    session = make().train(2)
    with torch.no_grad():
        session._run.state.dictionary.W_enc[0, 0] = torch.nan
    with pytest.raises(ValueError, match="W_enc is not finite; revert to an earlier commit"):
        session.commit()
    assert len(session.commits) == 1


# what lies on the disk -----------------------------------------------------------------------------------------------


def test_files_are_json_and_safetensors_with_a_version(make, tmp_path):
    session = make().train(5)
    folder = session.save(tmp_path / "run")
    names = {p.name for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "run.json",
        "head.json",
        "history.json",
        "lock.json",
        ".lock",
        "commit.json",
        "dictionary.safetensors",
        "training.safetensors",
    }
    for path in folder.rglob("*.json"):
        if path.name != "lock.json":
            assert json.loads(path.read_text())["format_version"] == 1


def test_what_a_killed_writer_left_is_swept_and_never_read(make):
    store = make().train(12)._run.store
    litter = store.folder / ".abcdef.0123.tmp"
    litter.mkdir()
    (litter / "commit.json").write_text("{")
    store.refresh()
    assert len(store) == 2
    store.sweep()
    assert not litter.exists() and len(CommitStore(store.folder, 10**9)) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("commit.json", b"{", "is not JSON"),
        ("commit.json", b"", "is empty"),
        ("commit.json", b"[1]", "must hold an object"),
        ("commit.json", b'{"format_version": 1}', "'commit' is missing"),
        ("commit.json", b'{"format_version": 7}', "format_version is 7 and this sdl_explorer reads up to 1; upgrade"),
        ("training.safetensors", b"abc", "truncated|not a safetensors"),
        ("training.safetensors", b"\x80\x04pickle.........", "pickle"),
        ("dictionary.safetensors", b"", "is empty"),
    ],
)
def test_damaged_commits_are_named(make, name, content, message):
    session = make().train(2)
    commit = session.commit()
    session.train(1)
    folder = session._run.store.folder / commit.id
    (folder / name).write_bytes(content)
    before = everything(session)
    read = lambda: (CommitStore(folder.parent, 10**9), session.revert(commit))
    with pytest.raises(ValueError, match=message) as caught:
        read()
    assert str(folder / name) in str(caught.value)
    assert same(everything(session), before)
