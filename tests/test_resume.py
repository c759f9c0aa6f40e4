"""A process that is killed in the middle of training, followed from here, and gone on with bit for bit."""

import itertools
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from sdl_explorer.data.bench import LinearBench
from sdl_explorer.models.methods import TopK
from sdl_explorer.session import Session

SOURCE = {"n_features": 12, "d_in": 8, "sparsity": 0.8, "max_interference": 0.7}
SETTINGS = {"batch_size": 16, "dead_after": 400}

WRITER = """
    import sys
    import torch
    torch.set_num_threads(1)
    from sdl_explorer.data.bench import LinearBench
    from sdl_explorer.models.methods import TopK
    from sdl_explorer.session import Session
    from sdl_explorer.training import run

    run.COMMIT_EVERY = 20
    session = Session(LinearBench(**{source}), TopK(k=2), 16, device="cpu", **{settings}).train(5)
    session.resample([1, 4])
    session.lr = 2e-3
    session.save(sys.argv[1])
    print("training", flush=True)
    session.train(10**9)
"""


@pytest.fixture
def writer(tmp_path):
    """A process that trains in a folder for ever."""
    code = textwrap.dedent(WRITER).format(source=SOURCE, settings=SETTINGS)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, env=environment, text=True)
    assert process.stdout.readline() == "training\n"
    yield process, tmp_path / "run"
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.slow
def test_a_killed_run_is_followed_and_goes_on_bit_for_bit(writer):
    process, folder = writer
    with Session.open(folder, device="cpu") as follower:
        assert not follower.writable and f"process {process.pid} " in follower.writer
        for seen in itertools.count(follower.step):
            if follower.step >= 125:
                break
            time.sleep(0.02)
            assert seen < 3_000, "the writer does not get on"
        with pytest.raises(PermissionError, match=f"follows .* process {process.pid} "):
            follower.train(1)
        process.kill()  # no handler runs: SIGKILL, or TerminateProcess on Windows
        process.wait()
        stopped_at = follower.step

    with Session.open(folder, device="cpu") as session:
        assert session.writable and session.step >= stopped_at and session.step % 20 == 0
        assert not list((folder / "commits").glob(".*.tmp"))
        thinned = next(c for c in session.commits if c.kind == "auto")
        total = session.step + 30
        session.train(30)
        with Session(LinearBench(**SOURCE), TopK(k=2), 16, device="cpu", **SETTINGS) as whole:
            whole.train(5)
            whole.resample([1, 4])
            whole.lr = 2e-3
            whole.train(total - 5)
            same = lambda: all(map(torch.equal, session.dictionary.state_dict().values(), whole.dictionary.state_dict().values()))
            assert session.step == whole.step and same()
            assert torch.equal(torch.from_numpy(session.snapshot.samples_since_fired), torch.from_numpy(whole.snapshot.samples_since_fired))
            session.revert(thinned).train(total - thinned.step)
            assert same()
