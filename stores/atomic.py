"""Atomic and durable writes: a reader finds the old content or the new, and what was announced survives a crash."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from rlgen_stats.schemas.errors import OutOfSpaceError, RlgenStatsError, StoreCorruptError
from rlgen_stats.stores.locations import check_regular, explain_access_errors, filesystem, is_remote
from rlgen_stats.stores.locks import began_before

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
ZARR_JSON: Final = "zarr.json"
"""The file that makes a folder a Zarr v3 group or array."""
_LEFTOVER: Final = re.compile(
    r"\.(?P<of>.+)\.(?:(?:(?P<process>\d{1,9})-)?[0-9a-f]{8}\.(?P<kind>partial|old)|removed)", re.ASCII
)
"""Names of what a process writes, has moved aside or deletes; earlier releases named no process."""


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn "no space left" into a sentence that names the path; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL and not isinstance(error, OutOfSpaceError):
            free = shutil.disk_usage(_nearest_existing(path)).free / 1e6
            raise OutOfSpaceError(
                error.errno,
                f"the disk or quota holding {path} is full ({free:.0f} MB free); everything committed so far is kept: "
                "free some space and run the same command again.",
            ) from error
        raise


def _nearest_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def sync(path: Path) -> None:
    """Flush a file or folder to the disk; Windows opens no folders, and keeps renames in its journal."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # it flushes only what it may write
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of ``path``, atomically, if the block succeeds.

    Works for a file and for a folder (an existing folder is moved aside first and removed last). What killed processes
    left of replacing the same path is removed. For a remote
    ``path`` the temporary one is local and is uploaded: a file is replaced atomically; of a folder, the old
    ``zarr.json`` is removed first and the new one written last, so that a reader sees the old group, none, or the new.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="rlgen-stats-") as folder:
            yield Path(folder) / path.name
            with explain_access_errors(path):
                _upload(Path(folder) / path.name, path)
        return
    with explain_access_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in _leftovers(path):
        if not _is_alive(leftover):
            _put_right(leftover)
    temporary = _beside(path, "partial")
    try:
        with explain_access_errors(path), explain_full_disk(path):
            yield temporary
            if temporary.is_dir():
                _replace_folder(temporary, path)
            else:
                sync(temporary)  # before the rename: else a power cut could leave the new name on an empty file
                os.replace(temporary, path)
            sync(path.parent)  # makes the rename itself durable
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Delete a folder so that a crash half way leaves nothing that looks like it."""
    condemned = path.with_name(f".{path.name}.removed")
    shutil.rmtree(condemned, ignore_errors=True)
    path.replace(condemned)  # one rename, after which no reader finds the folder any more
    shutil.rmtree(condemned)


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of :func:`replacing` ``path``, and of files in it that were being written.

    The caller must hold the writer's lock. An old folder that was moved aside, and whose replacement was never moved
    in, is moved back.
    """
    if is_remote(path):
        return
    for leftover in _leftovers(path):
        _put_right(leftover)
    for partial in path.rglob("*.partial"):
        partial.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left anywhere below a folder; what other living ones of this host write is kept.

    The caller must hold the lock of the folder, and write nothing in it yet. Chunks of Zarr arrays are not looked
    through: who writes them next overwrites or removes what was begun.
    """
    if is_remote(folder):
        return
    for parent, folders, files in os.walk(folder):
        for leftover in (Path(parent) / name for name in (*folders, *files) if _LEFTOVER.fullmatch(name)):
            if not _is_alive(leftover, itself=False):
                _put_right(leftover)
        folders[:] = [name for name in folders if not (name == "c" and ZARR_JSON in files)]


def is_leftover(path: Path) -> bool:
    """Whether it was being written, moved aside or deleted, so that nothing counts on it."""
    return _LEFTOVER.fullmatch(path.name) is not None


def _leftovers(path: Path) -> list[Path]:
    """What lies beside ``path`` and was to become it, or was it."""
    siblings = path.parent.iterdir() if path.parent.exists() else ()
    return [one for one in siblings if (found := _LEFTOVER.fullmatch(one.name)) and found["of"] == path.name]


def _is_alive(leftover: Path, *, itself: bool = True) -> bool:
    """Whether the process that wrote it runs on this host; of this process ``itself``: in containers all are one."""
    found = _LEFTOVER.fullmatch(leftover.name)
    process = int(found["process"] or 0) if found else 0
    return itself if process == os.getpid() else process > 0 and began_before(process, leftover)


def _put_right(leftover: Path) -> None:
    """Delete a leftover; an old folder whose replacement never came goes back to its place."""
    found = _LEFTOVER.fullmatch(leftover.name)
    original = leftover.with_name(found["of"]) if found and found["kind"] == "old" else leftover
    if not original.exists():
        os.replace(leftover, original)
    elif leftover.is_dir():
        shutil.rmtree(leftover, ignore_errors=True)  # no reader looks at it: it is in nobody's way
    else:
        leftover.unlink(missing_ok=True)


def _upload(local: Path, path: Path) -> None:
    if local.is_file():
        path.write_bytes(local.read_bytes())
        return
    # Object stores rename nothing. Without zarr.json readers see no group, so it goes first and comes back last.
    (path / ZARR_JSON).unlink(missing_ok=True)
    if path.exists():
        filesystem(path).rm(path.path, recursive=True)  # type: ignore[attr-defined]
    for file in sorted(local.rglob("*"), key=lambda file: file == local / ZARR_JSON):
        if file.is_file():
            (path / file.relative_to(local).as_posix()).write_bytes(file.read_bytes())


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.{kind}")


def _replace_folder(new: Path, path: Path) -> None:
    if not path.exists():
        os.replace(new, path)
        return
    # A folder cannot be replaced in one step; killed between the renames, remove_leftovers moves the old one back.
    old = _beside(path, "old")
    os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically and durably."""
    with replacing(path) as temporary:
        temporary.write_text(
            json.dumps(value, indent=1, sort_keys=True, default=str) + "\n", encoding="utf-8", newline="\n"
        )


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises
    ------
    StoreCorruptError
        If the file is not JSON.
    """
    try:
        return json.loads(check_regular(path).read_text(encoding="utf-8"))
    except StoreCorruptError:
        raise
    except (ValueError, RecursionError) as error:
        raise StoreCorruptError(
            f"{path} is not readable JSON ({error}); restore it or delete it and run again."
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    StoreCorruptError
        If the file is not JSON, or JSON of another type.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise StoreCorruptError(
            f"{path} must hold a JSON object, got {type(found).__name__}; restore it or delete it and run again."
        )
    return found


UNREADABLE: Final = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What json, zarr, xarray and codecs raise on damaged content."""


@contextmanager
def explain_damage(path: Path) -> Iterator[None]:
    """Turn what readers raise on damaged content of ``path`` into one sentence that names it; our own errors pass.

    Raises
    ------
    StoreCorruptError
    """
    try:
        yield
    except RlgenStatsError:
        raise
    except (*UNREADABLE, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the file system's; decoders give no number
            raise
        line = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise StoreCorruptError(f"{path} cannot be read ({line}); restore it or compute it again.") from error
