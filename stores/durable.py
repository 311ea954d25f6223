"""Writing so that a crash loses nothing that was announced."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from rlgen_stats.schemas.errors import OutOfSpaceError, StoreError, StoreLockedError

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn "no space left" into a sentence that names the place; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL and not isinstance(error, OutOfSpaceError):
            free = shutil.disk_usage(_existing(path)).free / 1e6
            raise OutOfSpaceError(
                error.errno,
                f"the disk or quota holding {path} is full ({free:.0f} MB free); everything committed so far is kept: "
                "free some space and run the same command again.",
            ) from error
        raise


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place, atomically, if the block succeeds.

    Works for a file and for a folder (an existing folder is moved aside first and removed last).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with explain_full_disk(path):
            yield temporary
            if temporary.is_dir():
                _replace_folder(temporary, path)
            else:
                sync(temporary)
                os.replace(temporary, path)
            sync(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _replace_folder(new: Path, path: Path) -> None:
    if not path.exists():
        os.replace(new, path)
        return
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
    os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically and durably."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True, default=str) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises
    ------
    StoreError
        If the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is not readable JSON ({error}); restore it or delete it and run again.") from error


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the writer's lock of ``path``; a dead writer's lock is free, because the system drops it.

    Raises
    ------
    StoreLockedError
        If a living process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            raise StoreLockedError(
                f"{path} is being written by process {holder}; expected one writer at a time: wait for it, or stop it."
            ) from error
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield
