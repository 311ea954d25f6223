"""Locations of stores: a local folder or any fsspec URL, behind the one path interface of pathlib."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from upath import UPath
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore

from rlgen_stats.schemas.errors import InputError, StoreCorruptError, StoreError

_LOCAL = ("", "file", "local")
_URL = re.compile(r"[\w+.:-]{2,}://")
"""How a URL begins; one letter before a colon is a drive of Windows."""


def place(path: Path | str) -> Path:
    """A path object for a local path or an fsspec URL such as ``s3://bucket/run``.

    Remote locations are ``upath.UPath`` objects, which have the methods of ``pathlib.Path``.

    Raises
    ------
    InputError
        If no filesystem is known or installed for the URL's protocol.
    """
    if not isinstance(path, str) or not _URL.match(path):
        return Path(path) if isinstance(path, str) else path
    try:
        location = UPath(path)
        if location.protocol in _LOCAL:
            return Path(location.path)
        location.fs  # noqa: B018 - loads the filesystem now, so that a missing package is reported here
    except (ValueError, ImportError) as error:
        raise InputError(
            f"{path} cannot be opened ({error}); expected a local path or an fsspec URL whose filesystem is installed, "
            "for s3:// install 'rlgen-stats[s3]'."
        ) from error
    return cast(Path, location)


def check_regular(path: Path) -> Path:
    """``path``, unless it is a pipe, a socket or a device, of which reading may never end.

    Raises
    ------
    StoreCorruptError
        Naming it.
    """
    if not is_remote(path) and path.exists() and not (path.is_file() or path.is_dir()):
        raise StoreCorruptError(f"{path} is a pipe, a socket or a device, expected a file; correct or restore it.")
    return path


def is_remote(path: Path) -> bool:
    """Whether ``path`` is a URL and not in the local file system."""
    return not isinstance(path, Path)


def filesystem(path: Path) -> Any:
    """The fsspec filesystem of a remote location."""
    return cast(UPath, path).fs


def zarr_store(path: Path) -> Store:
    """A Zarr store rooted at ``path``; ``seals.sealed_store`` gives one that checks what it reads."""
    if is_remote(path):
        remote: Store = FsspecStore.from_url(str(path), storage_options=dict(cast(UPath, path).storage_options))
        return remote
    return LocalStore(path)


@contextmanager
def explain_access_errors(path: Path) -> Iterator[None]:
    """Turn errors of a filesystem (missing rights or credentials, no such server) into one sentence; others pass."""
    try:
        yield
    except PermissionError as error:
        if not is_remote(path):
            raise StoreError(
                f"{path} cannot be written or read (permission denied for {error.filename or path}); use a folder you "
                "own."
            ) from error
        raise StoreError(
            f"{path} refuses these credentials ({_first_line(error)}); expected ones that may read and write it: check "
            "the access key, its rights, and the endpoint."
        ) from error
    except Exception as error:
        if not is_remote(path) or isinstance(error, StoreError | InputError):
            raise
        if "credential" in type(error).__name__.lower() or "credential" in str(error).lower():
            raise StoreError(
                f"{path} needs credentials and none were found ({_first_line(error)}); set them in the environment or "
                "the credentials file of that service."
            ) from error
        if isinstance(error, OSError | NotImplementedError) or "endpoint" in type(error).__name__.lower():
            raise StoreError(
                f"{path} cannot be reached ({_first_line(error)}); check the URL and the endpoint."
            ) from error
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160].rstrip(".")
