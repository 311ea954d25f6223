"""Locks on a disk: ranges, threads, processes that die, file systems that cannot lock."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from rlgen_stats.schemas.errors import StoreError, StoreLockedError
from rlgen_stats.stores.locks import exclusive, writer_of

HOLDER = """
import sys, time
from pathlib import Path
from rlgen_stats.stores.locks import exclusive
with exclusive(Path(sys.argv[1]), (0, 4)):
    print("held", flush=True)
    time.sleep(600)
"""


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_overlapping_ranges_exclude_one_another_and_others_do_not(tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    with exclusive(store, (0, 4)):
        with exclusive(store, (4, 8)):
            pass
        for span in ((3, 4), (0, 1), (0, 1 << 62)):
            with pytest.raises(StoreLockedError, match=f"process {os.getpid()};"), exclusive(store, span):
                raise AssertionError("two writers")
        with exclusive(tmp_path / "b.zarr"), exclusive(tmp_path / "a.zarr.seal"):
            pass
    with exclusive(store):
        pass
    assert files(tmp_path) == [".a.zarr.lock", ".a.zarr.seal.lock", ".b.zarr.lock"]


def test_threads_exclude_one_another(tmp_path: Path) -> None:
    inside, most = [], []

    def write() -> None:
        for _ in range(5):
            with exclusive(tmp_path / "a.zarr", patience=60):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 20


def test_a_living_process_bars_its_range_and_a_killed_one_nothing(tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    with subprocess.Popen([sys.executable, "-P", "-c", HOLDER, store], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(StoreLockedError, match=rf"written by process {holder.pid};"), exclusive(store):
                raise AssertionError("two writers")
            with exclusive(store, (4, 8)):
                assert writer_of(store) == holder.pid
            assert writer_of(tmp_path / "b.zarr") is None
            (lock,) = tmp_path.glob(".a.zarr.*-*.lock")
            os.utime(lock, (0, 0))
            assert writer_of(store) is None, "its number was another process's when that was written"
            os.utime(lock)
        finally:
            holder.kill()
    assert len(files(tmp_path)) == 2, "the dead process could not remove its file"
    assert writer_of(store) is None
    with exclusive(store):
        pass
    assert files(tmp_path) == [".a.zarr.lock"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", refuse)
    message = rf"the file system of {tmp_path} offers no file locks \({os.strerror(number)}\).* work on a local disk"
    with pytest.raises(StoreError, match=message), exclusive(tmp_path / "a.zarr"):
        raise AssertionError("the block must not run")


def test_other_faults_of_a_lock_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", fail)
    with pytest.raises(OSError, match="input/output error"), exclusive(tmp_path / "a.zarr"):
        raise AssertionError("the block must not run")
