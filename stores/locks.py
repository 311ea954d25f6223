"""Locks: one writer at a time for a whole store or for a range of its shards; a dead writer holds none.

On a disk the operating system keeps the lock, on a file named after the range and the process that holds it, and drops
it when that process dies. In an object store a lock is a lease: a small object that its holder renews; one not renewed
for ``LEASE_SECONDS``, or whose holder is a dead process of this host, is removed by the next writer.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import psutil
from filelock import BaseFileLock, FileLock, Timeout

from rlgen_stats.schemas.errors import StoreError, StoreLockedError
from rlgen_stats.stores.locations import explain_access_errors, filesystem, is_remote

WHOLE: Final = (0, 1 << 62)
"""Range that covers every shard: the lock of a whole store."""
LEASE_SECONDS: Final = 60.0
"""A lease older than this is dead; holders renew four times as often."""
LOOK_SECONDS: Final = 10.0
"""Within which whoever looks for other holders on a disk must have seen them all."""

_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems say that have no locks: network ones mounted without their lock service, some of containers."""
_LOCK_FILE: Final = re.compile(r"(?P<first>\d+)-(?P<stop>\d+)-(?P<holder>\d+)-[0-9a-f]+\.lock", re.ASCII)
_LEASE: Final = re.compile(r"(?P<first>\d+)-(?P<stop>\d+)-[0-9a-f]+\.json", re.ASCII)
"""Files of holders; what has another name is no lock of ours and bars nobody."""


@contextmanager
def exclusive(path: Path, span: tuple[int, int] = WHOLE, *, patience: float = 0.0) -> Iterator[None]:
    """Hold the writer's lock of ``path``, or of the shards ``[first, stop)`` of it.

    Parameters
    ----------
    path
        What is written; it need not exist.
    span
        Range of shards; default everything.
    patience
        Seconds to wait for another holder.

    Raises
    ------
    StoreLockedError
        If a living writer holds it, or a part of it.
    StoreError
        If the file system has no locks.
    """
    with explain_access_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    hold = _hold_lease if is_remote(path) else _hold_file_lock
    deadline = time.monotonic() + patience
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold(path, span))
                break
            except StoreLockedError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.05)
        yield


def writer_of(path: Path) -> int | None:
    """Another process of this host that holds a lock of ``path`` on a disk; nothing is opened for it, let alone locked.

    Returns
    -------
    int or None
        Its process id. None also for a holder on another host.
    """
    for file in path.parent.glob(f".{path.name}.*.lock"):
        held = _LOCK_FILE.fullmatch(file.name.removeprefix(f".{path.name}."))
        holder = int(held["holder"]) if held else os.getpid()
        if holder != os.getpid() and began_before(holder, file):
            return holder
    return None


def began_before(process: int, file: Path) -> bool:
    """Whether a process of this number runs and is old enough to have written a file: numbers are used again."""
    with suppress(OSError, OverflowError, psutil.Error):
        return bool(psutil.Process(process).create_time() <= file.stat().st_mtime + 1)
    return False


def _locked_error(path: Path, holder: str) -> StoreLockedError:
    return StoreLockedError(
        f"{path} is being written by process {holder}; expected one writer at a time: wait for it, or stop it."
    )


@contextmanager
def _hold_file_lock(path: Path, span: tuple[int, int]) -> Iterator[None]:
    prefix = f".{path.name}."
    own = path.with_name(f"{prefix}{span[0]}-{span[1]}-{os.getpid()}-{uuid.uuid4().hex[:8]}.lock")
    lock = _file_lock(own)
    with explain_access_errors(path), _explain_no_locks(path):
        try:
            with _file_lock(path.with_name(f"{prefix}lock"), timeout=LOOK_SECONDS):  # one at a time looks for others
                for other in path.parent.iterdir():
                    held = _LOCK_FILE.fullmatch(other.name.removeprefix(prefix))
                    if held and _overlap(held, span) and not _remove_if_dead(other):
                        raise _locked_error(path, held["holder"])
                lock.acquire()
        except Timeout as error:
            raise _locked_error(path, "unknown") from error
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):  # on Windows, while another looks at it; the next one removes it
            own.unlink()


def _file_lock(path: Path, timeout: float = 0.0) -> BaseFileLock:
    return FileLock(path, timeout=timeout, thread_local=False, fallback_to_soft=False)


def _remove_if_dead(lock_file: Path) -> bool:
    """Whether the process that made a lock file is dead; the file goes then."""
    try:
        with _file_lock(lock_file):
            pass
    except Timeout:
        return False
    lock_file.unlink(missing_ok=True)
    return True


@contextmanager
def _explain_no_locks(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise StoreError(
            f"the file system of {path.parent} offers no file locks ({error.strerror}), and without them two "
            "writers could spoil a store; mount it with locks (NFS with its lock service, Lustre with flock), or "
            "work on a local disk."
        ) from error


@contextmanager
def _hold_lease(path: Path, span: tuple[int, int]) -> Iterator[None]:
    folder = path.with_name(f".{path.name}.locks")
    own_lease = folder / f"{span[0]}-{span[1]}-{uuid.uuid4().hex[:8]}.json"
    facts = json.dumps({"host": platform.node(), "pid": os.getpid()})
    # The own lease is written before others are looked for: of two that start at once, at least one sees the other.
    with explain_access_errors(path):
        own_lease.write_text(facts, encoding="utf-8")
    stopped = threading.Event()
    renewal = threading.Thread(target=_renew, args=(own_lease, facts, stopped), daemon=True)
    try:
        with explain_access_errors(path):
            for other in folder.iterdir():
                lease = _LEASE.fullmatch(other.name)
                if other.name == own_lease.name or not lease or not _overlap(lease, span):
                    continue
                if holder := _living_holder(other, own_lease):
                    raise _locked_error(path, holder)
        renewal.start()
        yield
    finally:
        stopped.set()
        if renewal.is_alive():
            renewal.join()
        with suppress(OSError):
            own_lease.unlink()


def _renew(own_lease: Path, facts: str, stopped: threading.Event) -> None:
    while not stopped.wait(LEASE_SECONDS / 4):
        with suppress(OSError):  # the next renewal is soon enough; a lease outlives three missed ones
            own_lease.write_text(facts, encoding="utf-8")


def _overlap(name: re.Match[str], span: tuple[int, int]) -> bool:
    return int(name["first"]) < span[1] and span[0] < int(name["stop"])


def _living_holder(lease: Path, own_lease: Path) -> str:
    """Who holds ``lease``, or "" after removing it if its holder is dead.

    The age of a lease is taken relative to the own one, both by the store's clock: clocks of hosts may differ.
    """
    system = filesystem(lease)
    system.invalidate_cache()
    try:
        facts = _facts(lease)
        age = (system.modified(own_lease.path) - system.modified(lease.path)).total_seconds()  # type: ignore[attr-defined]
    except FileNotFoundError:
        return ""
    host, pid = facts.get("host"), facts.get("pid")
    if age > LEASE_SECONDS or (host == platform.node() and isinstance(pid, int) and not process_exists(pid)):
        lease.unlink(missing_ok=True)
        return ""
    return f"{pid} on {host}"


def _facts(lease: Path) -> dict[str, Any]:
    """What a lease says; nothing, if it is damaged: then its age decides alone."""
    try:
        facts = json.loads(lease.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def process_exists(pid: int) -> bool:
    """Whether a process of this host has this number."""
    try:
        return bool(psutil.pid_exists(pid))
    except OverflowError:
        return False
