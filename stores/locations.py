"""Where a store lies: a local folder or any fsspec URL, behind the one path interface of pathlib."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from upath import UPath
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore, WrapperStore

from rlgen_stats.schemas.errors import InputError, StoreCorruptError, StoreError

_LOCAL = ("", "file", "local")


def place(path: Path | str) -> Path:
    """A path object for a local path or an fsspec URL such as ``s3://bucket/run``.

    Remote places are ``upath.UPath`` objects: they answer the same questions as :class:`pathlib.Path`.

    Raises
    ------
    InputError
        If no filesystem is known or installed for the URL's protocol.
    """
    if not isinstance(path, str) or "://" not in path:
        return Path(path) if isinstance(path, str) else path
    try:
        found = UPath(path)
        if found.protocol in _LOCAL:
            return Path(found.path)
        found.fs  # noqa: B018 - loads the filesystem now, so that a missing package is reported here
    except (ValueError, ImportError) as error:
        raise InputError(
            f"{path} cannot be opened ({error}); expected a local path or an fsspec URL whose filesystem is installed, "
            "for s3:// install 'rlgen-stats[s3]'."
        ) from error
    return cast(Path, found)


def is_remote(path: Path) -> bool:
    """Whether ``path`` is behind a protocol and not in the local file system."""
    return not isinstance(path, Path)


def filesystem(path: Path) -> Any:
    """The fsspec filesystem of a remote place."""
    return cast(UPath, path).fs


def store_of(path: Path, *, strict: bool = False) -> Store:
    """A Zarr store rooted at ``path``; a ``strict`` one refuses to take a missing chunk for fill values."""
    store: Store
    if is_remote(path):
        store = FsspecStore.from_url(str(path), storage_options=dict(cast(UPath, path).storage_options))
    else:
        store = LocalStore(path)
    return _Complete(store) if strict else store


class _Complete(WrapperStore[Store]):  # type: ignore[misc]
    """A store in which every chunk must exist, as it does in the stores written here."""

    async def get(self, key: str, *args: Any, **kwargs: Any) -> Any:
        """Bytes of ``key``; a missing chunk raises instead of standing for fill values."""
        value = await self._store.get(key, *args, **kwargs)
        if value is None and any(part.split(".")[0] == "c" for part in key.split("/")):
            raise StoreCorruptError(f"{self._store} lacks the chunk {key}; restore it or compute it again.")
        return value


@contextmanager
def reaching(path: Path) -> Iterator[None]:
    """Turn what a filesystem says of missing rights, credentials or servers into one sentence."""
    try:
        yield
    except PermissionError as error:
        if not is_remote(path):
            raise StoreError(
                f"{path} cannot be written or read (permission denied for {error.filename or path}); use a folder you "
                "own."
            ) from error
        raise StoreError(
            f"{path} refuses these credentials ({_said(error)}); expected ones that may read and write it: check the "
            "access key, its rights, and the endpoint."
        ) from error
    except Exception as error:
        if not is_remote(path) or isinstance(error, StoreError | InputError):
            raise
        if "credential" in type(error).__name__.lower() or "credential" in str(error).lower():
            raise StoreError(
                f"{path} needs credentials and none were found ({_said(error)}); set them in the environment or the "
                "credentials file of that service."
            ) from error
        if isinstance(error, OSError) or "endpoint" in type(error).__name__.lower():
            raise StoreError(f"{path} cannot be reached ({_said(error)}); check the URL and the endpoint.") from error
        raise


def _said(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160].rstrip(".")
