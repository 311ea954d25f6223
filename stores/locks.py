"""Locks: one writer at a time for a whole store or for a range of its shards; a dead writer holds none.

On a local disk the operating system keeps the lock (a byte range of a lock file) and drops it when its process dies.
In an object store a lock is a lease: a small object that its holder renews; one not renewed for ``LEASE_SECONDS``, or
whose holder is a dead process of this host, is removed by the next writer.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

from rlgen_stats.schemas.errors import StoreError, StoreLockedError
from rlgen_stats.stores.locations import explain_access_errors, filesystem, is_remote

WHOLE: Final = (0, 1 << 62)
"""Range that covers every shard: the lock of a whole store."""
LEASE_SECONDS: Final = 60.0
"""A lease older than this is dead; holders renew four times as often."""
_SET_LOCK: Final = getattr(fcntl, "F_OFD_SETLK", fcntl.F_SETLK)
"""Open-file-description locks (Linux) exclude other threads of one process too; elsewhere, process locks."""

_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems say that have no locks: network ones mounted without their lock service, some of containers."""


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


def _locked_error(path: Path, holder: str) -> StoreLockedError:
    return StoreLockedError(
        f"{path} is being written by process {holder}; expected one writer at a time: wait for it, or stop it."
    )


@contextmanager
def _hold_file_lock(path: Path, span: tuple[int, int]) -> Iterator[None]:
    first, stop = span
    with (
        explain_access_errors(path),
        path.with_name(f".{path.name}.lock").open("a+", encoding="utf-8", errors="replace") as handle,
    ):
        try:
            # struct flock as 64-bit Linux lays it out: type, whence, start, length, process (0 for descriptor locks)
            fcntl.fcntl(handle, _SET_LOCK, struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, first, stop - first, 0))
        except (BlockingIOError, PermissionError) as error:
            raise _locked_error(path, _last_holder(handle, span)) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise StoreError(
                f"the file system of {path.parent} offers no file locks ({error.strerror}), and without them two "
                "writers could spoil a store; mount it with locks (NFS with its lock service, Lustre with flock), or "
                "work on a local disk."
            ) from error
        if span == WHOLE:  # nobody else holds a part of it, so earlier notes are all of the dead
            handle.truncate(0)
        handle.write(f"{os.getpid()} {first} {stop}\n")
        handle.flush()
        yield


def _last_holder(handle: IO[str], span: tuple[int, int]) -> str:
    """Process id last noted in the lock file for an overlapping range, for the message only."""
    handle.seek(0)
    notes = [re.fullmatch(r"(\d+) (\d+) (\d+)", line, re.ASCII) for line in handle.read().splitlines()]
    pids = [note[1] for note in notes if note and int(note[2]) < span[1] and span[0] < int(note[3])]
    return pids[-1] if pids else "unknown"


@contextmanager
def _hold_lease(path: Path, span: tuple[int, int]) -> Iterator[None]:
    folder = path.with_name(f".{path.name}.locks")
    own_lease = folder / f"{span[0]}-{span[1]}-{uuid.uuid4().hex[:8]}.json"
    facts = json.dumps({"host": platform.node(), "pid": os.getpid()})
    # The own lease is written before others are looked for: of two that start at once, at least one sees the other.
    with explain_access_errors(path):
        own_lease.write_text(facts)
    stopped = threading.Event()
    renewal = threading.Thread(target=_renew, args=(own_lease, facts, stopped), daemon=True)
    try:
        with explain_access_errors(path):
            for other in folder.iterdir():
                if other.name == own_lease.name or not _overlap(other.name, span):
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
            own_lease.write_text(facts)


def _overlap(name: str, span: tuple[int, int]) -> bool:
    lease = re.fullmatch(r"(\d+)-(\d+)-[0-9a-f]+\.json", name, re.ASCII)  # what is no lease of ours bars nobody
    return lease is not None and int(lease[1]) < span[1] and span[0] < int(lease[2])


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
        facts = json.loads(lease.read_text())
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def process_exists(pid: int) -> bool:
    """Whether a process of this host has this number."""
    try:
        os.kill(pid, 0)  # sends nothing, only asks whether the process exists
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it exists and is another user's
        return True
    return True
