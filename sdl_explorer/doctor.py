"""What this machine has and lacks: one `Check` each, with the next step for what is wrong."""

import os
import platform
import shutil
import socket
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from platformdirs import user_data_path

MINIMUM_PYTHON = (3, 11)
EXTRAS = {"jupyter": "the explorer in notebooks", "models": "activations of transformers"}


@dataclass(frozen=True)
class Check:
    """`required`: the explorer does not work without it. `next_step` is said when it is not ok."""

    name: str
    ok: bool
    found: str
    next_step: str = ""
    required: bool = True


def examine(port: int = 5006) -> list[Check]:
    """Every check, in the order in which one would mend things."""
    return [
        check_python(),
        *check_packages(),
        *check_device(),
        check_port(port),
        check_data_folder(user_data_path("sdl_explorer")),
        *check_extras(),
    ]


def check_python() -> Check:
    wanted = ".".join(map(str, MINIMUM_PYTHON))
    return Check(
        "python",
        sys.version_info >= MINIMUM_PYTHON,
        f"{platform.python_version()} on {platform.platform(terse=True)}",
        f"install Python {wanted} or later",
    )


def check_packages() -> list[Check]:
    """Each dependency against its bounds, as the installed package states them."""
    try:
        requirements = [
            r for r in map(Requirement, metadata.requires("sdl-explorer") or []) if r.marker is None or r.marker.evaluate({"extra": ""})
        ]
    except metadata.PackageNotFoundError:
        return [Check("sdl-explorer", False, "runs from source, not installed, so its bounds are unknown", "pip install -e .")]
    return [Check("sdl-explorer", True, metadata.version("sdl-explorer")), *(check_package(r) for r in requirements)]


def check_package(requirement: Requirement, required: bool = True, install: str = "") -> Check:
    """One package against its bounds; `install` is the command that mends it."""
    install = f"pip install {install or _quoted(str(requirement).partition(';')[0].strip())}"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check(requirement.name, False, f"missing (wants {requirement.specifier or 'any version'})", install, required)
    ok = requirement.specifier.contains(version, prereleases=True)
    return Check(requirement.name, ok, f"{version} (wants {requirement.specifier or 'any version'})", install, required)


def check_device() -> list[Check]:
    """The device that is chosen automatically, and the threads of the CPU."""
    try:
        import torch
    except ImportError as error:
        return [Check("device", False, f"torch does not load: {error}", "pip install torch")]
    if torch.cuda.is_available():
        device = Check("device", True, f"cuda: {torch.cuda.get_device_name()}")
    else:
        driver = shutil.which("nvidia-smi") is not None
        found = f"cpu; torch {torch.__version__} sees no CUDA device" + (", though the machine has an NVIDIA driver" if driver else "")
        device = Check(
            "device", not driver, found, "install a CUDA build of torch: https://pytorch.org/get-started/locally", required=False
        )
    return [device, Check("threads", True, f"torch uses {torch.get_num_threads()} of {os.cpu_count()} cores at start")]


def check_port(port: int, address: str = "127.0.0.1") -> Check:
    """Whether the app could listen there."""
    with socket.socket() as probe:
        try:
            probe.bind((address, port))
        except OSError as error:
            step = f"choose another port: sdl-explorer serve --port {port + 1}, or make app PORT={port + 1}"
            return Check("port", False, f"{address}:{port} cannot be used ({error.strerror})", step, required=False)
    return Check("port", True, f"{address}:{port} is free")


def check_data_folder(folder: Path) -> Check:
    """Whether files can be written where the explorer keeps its own."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check("data folder", False, f"{folder}: {error.strerror}", f"make {folder} writable for this user")
    return Check("data folder", True, f"{folder}, {shutil.disk_usage(folder).free / 1e9:.1f} GB free")


def check_extras() -> list[Check]:
    """The optional packages, which only some ways in need."""
    try:
        stated = [Requirement(line) for line in metadata.requires("sdl-explorer") or []]
    except metadata.PackageNotFoundError:
        return []
    return [
        check_package(r, required=False, install=_quoted(f"sdl-explorer[{extra}]") + f"  # for {purpose}")
        for extra, purpose in EXTRAS.items()
        for r in stated
        if r.marker is not None and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})
    ]


def report(checks: list[Check]) -> str:
    """One line a check; below each that is not ok, what to do next."""
    width, lines = max(len(check.name) for check in checks), []
    for check in checks:
        mark = "ok  " if check.ok else "FAIL" if check.required else "note"
        lines.append(f"{mark}  {check.name:<{width}}  {check.found}")
        if not check.ok:
            lines.append(f"{'':<{width + 8}}next: {check.next_step}")
    return "\n".join(lines)


def _quoted(requirement: str) -> str:
    return f'"{requirement}"'
