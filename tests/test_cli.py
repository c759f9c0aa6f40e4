"""The command line: a headless run that resumes, and one clear message for bad input."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from sdl_explorer import __version__, cli
from sdl_explorer.data.bench import LinearBench

SMALL = ["--n-latents=32", "--batch-size=64", "--set=n_features=24", "--set=d_in=12", "--set=sparsity=0.9", "--method-set=k=3"]


@pytest.fixture
def call():
    """`call(*arguments) -> Result`, in this process."""
    runner = CliRunner()
    return lambda *arguments: runner.invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def serving(monkeypatch):
    """What `serve` would have been called with; nothing is served."""
    import sdl_explorer.app.serve as served

    calls = []
    monkeypatch.setattr(served, "serve", lambda what=None, **options: calls.append((what, options)))
    return calls


def test_help_loads_neither_torch_nor_panel():
    program = "import sys; from sdl_explorer import cli; print(*{n.partition('.')[0] for n in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "panel", "holoviews", "bokeh"}.intersection(loaded)


def test_version_and_help(call):
    assert call("--version").output.strip() == f"sdl-explorer {__version__}"
    helped = call("--help")
    assert helped.exit_code == 0
    for command in ("open", "serve", "run", "doctor"):
        assert command in helped.output


def test_run_trains_resumes_and_prints_the_scoreboard(call, tmp_path):
    folder = tmp_path / "run"
    first = call("run", "--folder", folder, "--steps", 12, *SMALL)
    assert first.exit_code == 0, first.output
    assert "step=12" in first.output
    assert "Recovered, decoder" in first.output
    resumed = call("run", "--folder", folder, "--steps", 20, *SMALL)
    assert resumed.exit_code == 0, resumed.output
    assert "Resumed at step 12" in resumed.output
    assert "step=20" in resumed.output

    whole = call("run", "--folder", tmp_path / "whole", "--steps", 20, *SMALL)
    assert whole.exit_code == 0, whole.output
    from sdl_explorer.session import Session

    with Session.open(folder) as a, Session.open(tmp_path / "whole") as b:
        assert a.step == b.step == 20
        assert all(bool((p == q).all()) for p, q in zip(a.dictionary.parameters(), b.dictionary.parameters(), strict=True))


def test_resuming_with_other_settings_is_refused(call, tmp_path):
    folder = tmp_path / "run"
    assert call("run", "--folder", folder, "--steps", 2, *SMALL).exit_code == 0
    for other in (["--method", "ReLU"], ["--n-latents", "8"], ["--set", "n_features=25"], ["--seed", "4"]):
        refused = call("run", "--folder", folder, "--steps", 4, *other)
        assert refused.exit_code == 1, refused.output
        assert "says otherwise" in refused.output
    assert call("run", "--folder", folder, "--steps", 4).exit_code == 0, "the folder was given up again"


def test_rows_from_a_file(call, tmp_path):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(200, 6)).astype("float32"))
    done = call(
        "run", "--folder", tmp_path / "run", "--source", tmp_path / "rows.npy", "--steps", 3, "--n-latents", 8, "--method-set", "k=2"
    )
    assert done.exit_code == 0, done.output
    assert "Unexplained variance" in done.output
    assert "Recovered" not in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "Topk"], "'Topk' is no method. There are:"),
        (["--method-set", "q=1"], "TopK has no setting 'q'"),
        (["--method-set", "k"], "a setting is written key=value"),
        (["--method-set", "k=0"], "k"),
        (["--method-set", "k=99"], "k is 99"),
        (["--source", "nowhere.npy"], "nowhere.npy: there is no such file"),
        (["--source", "LinearBnch"], "'LinearBnch' is no source. There are:"),
        (["--set", "kind=other"], "kind"),
    ],
)
def test_bad_input_is_one_message_and_leaves_no_folder(call, tmp_path, arguments, message):
    folder = tmp_path / "run"
    done = call("run", "--folder", folder, "--steps", 1, "--n-latents", 16, "--set", "d_in=8", "--set", "n_features=12", *arguments)
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output
    assert not folder.exists()


def test_a_folder_of_other_files_is_left_alone(call, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    done = call("run", "--folder", tmp_path, "--steps", 1)
    assert done.exit_code == 1
    assert "holds files and no run" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_settings_are_literals_or_text():
    parsed = cli.parse_settings(LinearBench, ["n_features=10", "kind=transcoder", "d_out=None", "sparsity=0.9"], "--set")
    assert parsed == {"n_features": 10, "kind": "transcoder", "d_out": None, "sparsity": 0.9}
    assert json.dumps(parsed)


def test_serve_and_open_hand_over_what_they_are_given(call, serving, tmp_path, monkeypatch):
    monkeypatch.delenv("PORT", raising=False)
    assert call("serve", "--port", 0, "--no-show").exit_code == 0
    assert call("open", tmp_path, "--port", 0, "--show", "--device", "cpu").exit_code == 0
    [(nothing, first), (what, second)] = serving
    assert nothing is None
    assert first == {"port": 0, "address": "127.0.0.1", "show": False, "device": "auto", "activations": None}
    assert what == tmp_path
    assert (second["show"], second["device"]) == (True, "cpu")


def test_port_comes_from_the_environment(call, serving, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("PORT", str(port))
    assert call("serve", "--no-show").exit_code == 0
    assert serving[0][1]["port"] == port


def test_a_taken_port_names_the_next(call, serving):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = call("serve", "--port", port, "--no-show")
    assert done.exit_code == 1
    assert f"--port {port + 1}" in done.output
    assert not serving


def test_opening_nothing_says_so(call, serving):
    done = call("open", "no/such/folder")
    assert done.exit_code == 1
    assert "there is nothing at no/such/folder" in done.output.replace("\\", "/")
    assert not serving


def test_no_browser_without_a_display(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    assert not cli._has_display()
    monkeypatch.setenv("DISPLAY", ":0")
    assert cli._has_display()
    monkeypatch.setenv("SSH_CONNECTION", "a b")
    assert not cli._has_display()


def test_a_traceback_is_shown_when_asked_for(call, monkeypatch):
    monkeypatch.setenv("SDL_EXPLORER_TRACEBACK", "1")
    assert isinstance(call("open", "no/such/folder").exception, FileNotFoundError)
