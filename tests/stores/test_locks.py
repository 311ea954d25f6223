"""File systems that cannot lock."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from rlgen_stats.schemas.errors import StoreError
from rlgen_stats.stores.locks import exclusive


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    message = rf"the file system of {tmp_path} offers no file locks \({os.strerror(number)}\).* work on a local disk"
    with pytest.raises(StoreError, match=message), exclusive(tmp_path / "a.zarr"):
        raise AssertionError("the block must not run")


def test_other_faults_of_a_lock_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(fcntl, "fcntl", fail)
    with pytest.raises(OSError, match="input/output error"), exclusive(tmp_path / "a.zarr"):
        raise AssertionError("the block must not run")
