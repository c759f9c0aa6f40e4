"""`sdl-explorer doctor`: what is wrong is named, with the next step."""

import socket
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from sdl_explorer import cli, doctor

STATED = [
    "param>=2",
    "nowhere-to-be-found>=1",
    "numpy>=999",
    "pytest>=8; extra == 'jupyter'",
    "absent-extra>=1; extra == 'jupyter'",
    "hypothesis; extra == 'test'",
]


@pytest.fixture
def stated(monkeypatch):
    versions = {"sdl-explorer": "0.1.0"}
    real = metadata.version
    monkeypatch.setattr(metadata, "requires", lambda name: STATED)
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or real(name))


def test_packages_are_held_against_their_bounds(stated):
    checks = {check.name: check for check in doctor.check_packages()}
    assert checks["param"].ok
    assert not checks["nowhere-to-be-found"].ok
    assert "missing" in checks["nowhere-to-be-found"].found
    assert not checks["numpy"].ok
    assert metadata.version("numpy") in checks["numpy"].found
    assert checks["numpy"].next_step == 'pip install "numpy>=999"'
    assert set(checks) == {"sdl-explorer", "param", "nowhere-to-be-found", "numpy"}, "an extra is not required"


def test_extras_are_notes(stated):
    checks = {check.name: check for check in doctor.check_extras()}
    assert set(checks) == {"pytest", "absent-extra"}
    assert checks["pytest"].ok
    assert not checks["absent-extra"].ok
    assert not checks["absent-extra"].required
    assert "sdl-explorer[jupyter]" in checks["absent-extra"].next_step


def test_running_from_source_is_said(monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    [check] = doctor.check_packages()
    assert not check.ok
    assert check.next_step == "pip install -e ."
    assert doctor.check_extras() == []


def test_bounds_count_as_pip_counts_them():
    assert not doctor.check_package(Requirement("pytest<1")).ok
    assert doctor.check_package(Requirement(f"pytest=={metadata.version('pytest')}")).ok


def test_a_taken_port_is_a_note_and_names_the_next():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        check = doctor.check_port(port)
    assert not check.ok
    assert not check.required
    assert f"--port {port + 1}" in check.next_step
    assert doctor.check_port(port).ok, "it is free again"


def test_a_data_folder_that_cannot_be_written_fails(tmp_path):
    assert doctor.check_data_folder(tmp_path / "new" / "folder").ok
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    check = doctor.check_data_folder(in_the_way / "folder")
    assert not check.ok
    assert check.required
    assert str(in_the_way) in check.next_step


def test_device_and_threads_are_found():
    device, threads = doctor.check_device()
    assert device.found.startswith(("cpu", "cuda"))
    assert threads.ok


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (doctor.Check("a", True, "1"), 0),
        (doctor.Check("a", False, "1", "mend it"), 1),
        (doctor.Check("a", False, "1", "mend it", required=False), 0),
    ],
)
def test_exit_code_follows_the_required_checks(monkeypatch, check, code):
    monkeypatch.setattr(doctor, "examine", lambda port: [check])
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == code
    assert ("next: mend it" in result.output) == (not check.ok)


def test_examine_runs_here():
    names = [check.name for check in doctor.examine(port=0)]
    assert {"python", "sdl-explorer", "device", "threads", "port", "data folder"} <= set(names)
    assert doctor.report(doctor.examine(port=0)).count("\n") >= len(names) - 1
