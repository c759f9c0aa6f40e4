"""Writing that either happens whole or not at all: a temporary sibling, synced, then renamed over the target.

A crash or a full disk leaves the former content as it was. With `durable` the data and the rename are
flushed to the disk before the call returns, where the operating system allows it.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def write_file(path: Path, data: bytes, durable: bool = True) -> Path:
    """Replace `path` by `data`; makes parents. Raises OSError with the former file intact."""
    path = Path(path).resolve()  # a link keeps pointing at the file, whose content is what changes
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        _sync_folder(path.parent)
    return path


def replace_directory(path: Path, writer: Callable[[Path], None], durable: bool = True) -> Path:
    """Replace the folder `path` by what `writer(folder)` puts into an empty one.

    The former folder stays in its place until the new one is complete, and comes back if the last rename fails.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, former = _sibling(path), _sibling(path)
    try:
        temporary.mkdir()
        writer(temporary)
        if durable:
            _sync_tree(temporary)
        if path.exists():
            os.rename(path, former)
        try:
            os.rename(temporary, path)
        except OSError:
            if former.exists():
                os.rename(former, path)
            raise
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if durable:
        _sync_folder(path.parent)
    shutil.rmtree(former, ignore_errors=True)
    return path


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _explained(error: OSError, path: Path) -> OSError:
    reason = error.strerror or str(error)
    return OSError(error.errno, f"Writing {path} failed: {reason}. What was there before is intact; make room or choose another place.")


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(Path(parent) / name, "rb+") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    """Flush the names in a folder; Windows and some network disks cannot open or sync one, and do without."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
