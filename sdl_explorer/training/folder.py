"""Run folders: who may write, and what a run remembers of its source and method.

    run.json       format_version, source, method and constant settings
    head.json      the checked-out commit
    history.json   the recorded curves
    lock.json      host, pid and heartbeat of the writer, while there is one
    commits/       see `sdl_explorer.training.commits`
    data/          rows that were given in memory, up to 1 GB

JSON and safetensors only: class names resolve among members already registered; nothing is imported or unpickled
because a file says so.
"""

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import param
from filelock import FileLock

from sdl_explorer.data.sources import Generated, Source
from sdl_explorer.data.spikes import SpikeIn
from sdl_explorer.data.store import Stored
from sdl_explorer.models.atomic import write_file
from sdl_explorer.registry import member

FORMAT_VERSION = 1
HEARTBEAT = 5.0
KEEP_DATA = 1_000_000_000


class RunLock:
    """One writer a folder. The operating system's lock ends with its process; `lock.json` names the holder.

    A lock of another host is taken only with `take_over`. `held` says whether this process writes.
    """

    def __init__(self, folder: Path, take_over: bool = False):
        self.folder = Path(folder)
        self._file = FileLock(str(self.folder / ".lock"), thread_local=False)
        self._record = self.folder / "lock.json"
        self._stop = threading.Event()
        self.held = self._acquire(take_over)
        if self.held:
            self._beating = threading.Thread(target=self._beat, name="sdl-heartbeat", daemon=True)
            self._beating.start()

    @property
    def writer(self) -> str:
        """Who writes, in words."""
        record = self._read()
        if record is None:
            return "nobody"
        age = time.time() - record["heartbeat"]
        return f"process {record['pid']} on {record['host']} (last heard {age:.0f} s ago)"

    def release(self) -> None:
        if not self.held:
            return
        self._stop.set()
        self._beating.join()
        self.held = False
        self._record.unlink(missing_ok=True)
        self._file.release()

    def _acquire(self, take_over: bool) -> bool:
        record = self._read()
        foreign = record is not None and record["host"] != socket.gethostname()
        if foreign and not take_over:
            return False
        try:
            self._file.acquire(timeout=0)
        except OSError:  # somebody holds it (filelock.Timeout), or the folder is read-only
            return False
        try:
            self._write()
        except OSError:
            self._file.release()
            raise
        return True

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            with contextlib.suppress(OSError):  # a full disk only ages the heartbeat
                if self.folder.exists():
                    self._write()

    def _write(self) -> None:
        record = {"host": socket.gethostname(), "pid": os.getpid(), "heartbeat": time.time()}
        write_file(self._record, json.dumps(record).encode(), durable=False)

    def _read(self) -> dict[str, Any] | None:
        try:
            return read_json(self._record, "host", "pid", "heartbeat")
        except (FileNotFoundError, ValueError):  # the operating system's lock decides, with or without a name
            return None


def write_json(path: Path, record: dict[str, Any], indent: int | None = 1) -> None:
    write_file(path, json.dumps({"format_version": FORMAT_VERSION, **record}, indent=indent).encode())


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """A record with at least these keys."""
    try:
        record = json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{Path(path).parent} is not a run folder: it has no {Path(path).name}. Give the folder that session.save wrote."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); the folder is damaged or not a run folder.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds a JSON {type(record).__name__}; the folder is damaged or not a run folder.")
    if record.get("format_version", 0) > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version is {record['format_version']}, this sdl_explorer reads up to {FORMAT_VERSION}; upgrade it."
        )
    if missing := sorted(set(keys) - set(record)):
        raise ValueError(f"{path}: {missing[0]!r} is missing; the folder is damaged or not a run folder.")
    return record


def source_record(source: Source, folder: Path) -> dict[str, Any]:
    """What a run folder keeps of its source. Rows in memory are written to `data/`, up to 1 GB."""
    record: dict[str, Any] = {"class": type(source).__name__, "fingerprint": source.fingerprint()}
    if isinstance(source, Generated):
        record["settings"] = settings_of(source)
    elif isinstance(source, SpikeIn):
        settings = settings_of(source)
        record |= {"settings": settings | {"source": None}, "inside": source_record(settings["source"], folder)}
    elif isinstance(source, Stored):
        if source.origin is None and source.nbytes <= KEEP_DATA:
            source.save(folder / "data")
            record["path"] = "data"
        elif source.origin is not None:
            record["path"] = str(Path(source.origin).resolve())
    return record


def restore_source(record: dict[str, Any], folder: Path, given: Source | None) -> Source:
    """The run's source: the given one if its fingerprint agrees, else rebuilt from the record."""
    source = given if given is not None else _rebuilt(record, folder)
    if source.fingerprint() != record["fingerprint"]:
        raise ValueError(
            f"{folder}: the run was trained on data {record['fingerprint']} and this source is {source.fingerprint()}; "
            "pass the original data as source=, or start a new Session on the new data."
        )
    return source


def _rebuilt(record: dict[str, Any], folder: Path) -> Source:
    if "inside" in record:
        return SpikeIn(**record["settings"] | {"source": _rebuilt(record["inside"], folder)})
    if "settings" in record:
        return member(Source, record["class"])(**record["settings"])
    if record.get("path") is None:
        raise ValueError(f"{folder}: the run does not hold its data ({record['class']}, over 1 GB in memory); pass it as source=.")
    path = folder / record["path"]  # an absolute path stays itself
    if not path.exists():
        raise FileNotFoundError(f"{folder}: the run's data at {path} is gone; pass it as source=.")
    return Stored(path)


def settings_of(member: param.Parameterized) -> dict[str, Any]:
    return {k: v for k, v in member.param.values().items() if k != "name"}
