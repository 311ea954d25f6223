"""One writer at a time, for a whole store or for a range of its shards; a dead writer's lock is free.

On a local disk the operating system keeps the lock (a byte range of a lock file) and drops it when its process dies.
In an object store a lock is a lease: a small object that its holder renews; one not renewed for ``LEASE_SECONDS``, or
whose holder is a dead process of this host, is removed by the next writer.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

from rlgen_stats.schemas.errors import StoreLockedError
from rlgen_stats.stores.locations import filesystem, is_remote, reaching

WHOLE: Final = (0, 1 << 62)
"""The range of a lock that leaves room for no other."""
LEASE_SECONDS: Final = 60.0
"""A lease older than this is dead; holders renew four times as often."""
_TAKE: Final = getattr(fcntl, "F_OFD_SETLK", fcntl.F_SETLK)
"""Open-file-description locks hold between threads of one process too; where there are none, process locks."""


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
    """
    with reaching(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    held = _leased if is_remote(path) else _locked
    until = time.monotonic() + patience
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(held(path, span))
                break
            except StoreLockedError:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.05)
        yield


def _refused(path: Path, holder: str) -> StoreLockedError:
    return StoreLockedError(
        f"{path} is being written by process {holder}; expected one writer at a time: wait for it, or stop it."
    )


@contextmanager
def _locked(path: Path, span: tuple[int, int]) -> Iterator[None]:
    first, stop = span
    with reaching(path), path.with_name(f".{path.name}.lock").open("a+", encoding="utf-8") as handle:
        try:
            fcntl.fcntl(handle, _TAKE, struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, first, stop - first, 0))
        except (BlockingIOError, PermissionError) as error:
            raise _refused(path, _holder(handle, span)) from error
        if span == WHOLE:
            handle.truncate(0)
        handle.write(f"{os.getpid()} {first} {stop}\n")
        handle.flush()
        yield


def _holder(handle: IO[str], span: tuple[int, int]) -> str:
    """The last process that wrote itself down for an overlapping range."""
    handle.seek(0)
    lines = [line.split() for line in handle.read().splitlines()]
    found = [int(line[0]) for line in lines if len(line) == 3 and int(line[1]) < span[1] and span[0] < int(line[2])]
    return str(found[-1]) if found else "unknown"


@contextmanager
def _leased(path: Path, span: tuple[int, int]) -> Iterator[None]:
    folder = path.with_name(f".{path.name}.locks")
    mine = folder / f"{span[0]}-{span[1]}-{uuid.uuid4().hex[:8]}.json"
    facts = json.dumps({"host": platform.node(), "pid": os.getpid()})
    with reaching(path):
        mine.write_text(facts)
    stopped = threading.Event()
    renewal = threading.Thread(target=_renew, args=(mine, facts, stopped), daemon=True)
    try:
        with reaching(path):
            for other in folder.iterdir():
                if other.name != mine.name and _overlap(other.name, span) and (holder := _alive(other, mine)):
                    raise _refused(path, holder)
        renewal.start()
        yield
    finally:
        stopped.set()
        if renewal.is_alive():
            renewal.join()
        with suppress(OSError):
            mine.unlink()


def _renew(mine: Path, facts: str, stopped: threading.Event) -> None:
    while not stopped.wait(LEASE_SECONDS / 4):
        with suppress(OSError):  # the next renewal is soon enough; a lease outlives three missed ones
            mine.write_text(facts)


def _overlap(name: str, span: tuple[int, int]) -> bool:
    first, stop, _ = name.split("-")
    return int(first) < span[1] and span[0] < int(stop)


def _alive(lease: Path, mine: Path) -> str:
    """Who holds ``lease``, or "" after removing it if its holder is dead. Ages are told by the store's clock."""
    system = filesystem(lease)
    system.invalidate_cache()
    try:
        facts: dict[str, Any] = json.loads(lease.read_text())
        age = (system.modified(mine.path) - system.modified(lease.path)).total_seconds()  # type: ignore[attr-defined]
    except FileNotFoundError:
        return ""
    here = facts.get("host") == platform.node()
    if age > LEASE_SECONDS or (here and not _runs(int(facts["pid"]))):
        lease.unlink(missing_ok=True)
        return ""
    return f"{facts['pid']} on {facts['host']}"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
