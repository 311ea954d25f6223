"""Seals: which chunk belongs in which place, so that a sound chunk in the wrong place is noticed.

A chunk's own checksum says that its bytes are those that were written, not that they were written for this place and
last: chunks that are swapped, copied over another or kept from an earlier state are sound in themselves. So a group
that is committed lists the checksums of its chunks by name in ``seals.json``; its attribute ``seal`` is the hash of
that list, and is written in the same replacement of ``zarr.json`` as the commit. A store of several groups lists their
digests in its root, so that a whole group put back is noticed too.

Stores of earlier releases carry no seals and are read as before. Readers other than this package's check none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.storage import LocalStore, WrapperStore

from rlgen_stats.schemas.errors import StoreCorruptError
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.stores.atomic import ZARR_JSON, read_json, write_json
from rlgen_stats.stores.digests import (
    DIGEST,
    SEAL,
    arrays_of,
    attributes_of,
    n_committed,
    read_document,
    with_digest,
    write_digest,
    zarr_nodes,
)
from rlgen_stats.stores.locations import check_regular, explain_access_errors, filesystem, is_remote, zarr_store

CHECKSUM_BYTES: Final = 4
"""Every chunk ends with the crc32c of what comes before, little-endian."""
SEALS: Final = "seals.json"
GROUPS: Final = "groups"
"""Attribute of a store of several groups: group -> its digest; two of them while it is being replaced."""
_RESTORE: Final = "restore it or compute it again."


# -- checking --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Seal:
    """The chunks of a group as it was when it was opened."""

    group: Path
    hash: str
    n_models: int | None
    """Committed models, for groups that grow by them: what an append has added since is not looked at."""

    @classmethod
    def of(cls, group: Path) -> Seal | None:
        """The seal of a group; None if it has none."""
        attributes = attributes_of(group)
        return cls(group, str(attributes[SEAL]), n_committed(attributes)) if SEAL in attributes else None

    def check(self, array: str, chunk: tuple[int, ...], checksum: int) -> None:
        """Refuse a chunk that is not the one committed in this place.

        Raises
        ------
        StoreCorruptError
            Naming the chunk; or if the seals are damaged.
        """
        sealed = checksums(self).get(array)
        inside = sealed is not None and len(chunk) == sealed.ndim and all(map(int.__lt__, chunk, sealed.shape))
        expected = int(sealed[chunk]) if sealed is not None and inside else None
        if checksum != expected:
            committed = "none was committed there" if expected is None else f"{expected:08x} was committed there"
            raise StoreCorruptError(
                f"{self.group / array}: chunk {list(chunk)} has the checksum {checksum:08x}, but {committed}: another "
                f"chunk lies in its place, or an older one, or the group was written anew since it was opened; "
                f"{_RESTORE}"
            )


@lru_cache(maxsize=256)
def checksums(seal: Seal) -> dict[str, NDArray[np.uint32]]:
    """Checksum of every chunk of every array of a group, in the shape of the array's chunk grid.

    Raises
    ------
    StoreCorruptError
        If the list of seals is missing, damaged, or not the one that was committed.
    """
    sealed = iter(sealed_chunks(seal).values())
    grids = {name: _grid(array)[0] for name, array in arrays_of(seal.group, seal.n_models).items()}
    return {
        name: np.array([int(next(sealed), 16) for _ in np.ndindex(grid)], np.uint32).reshape(grid)
        for name, grid in grids.items()
    }


def sealed_chunks(seal: Seal | None) -> dict[str, str]:
    """Chunk (``mean/c/0/1``) -> its checksum as hexadecimal digits, array by array; none without a seal.

    Raises
    ------
    StoreCorruptError
        As :func:`checksums`; here the list is read anew.
    """
    if seal is None:
        return {}
    file = seal.group / SEALS
    found = read_json(file) if file.exists() else None
    if not isinstance(found, dict):
        raise StoreCorruptError(f"{file} is missing or damaged; restore it.")
    sealed = {name: str(found.get(name)) for name in _chunks_in(seal.group, seal.n_models)}
    if content_hash(sealed) != seal.hash:
        raise StoreCorruptError(
            f"{file} does not list the chunks that were committed, or the metadata of an array is gone; restore it and "
            "the group."
        )
    return sealed


def _chunks_in(group: Path, n_models: int | None) -> list[str]:
    """Names of the chunks of all arrays of a group, array by array: mean/c/0/1, or activation/c.3.0."""
    names = []
    for array, metadata in arrays_of(group, n_models).items():
        grid, separator = _grid(metadata)
        names += [f"{array}/{separator.join(('c', *map(str, corner)))}" for corner in np.ndindex(grid)]
    return names


def _grid(array: Mapping[str, Any]) -> tuple[tuple[int, ...], str]:
    """Number of chunks along every axis of an array, and what stands between their numbers in a chunk's name."""
    chunk = array["chunk_grid"]["configuration"]["chunk_shape"]
    grid = tuple(-(-size // part) for size, part in zip(array["shape"], chunk, strict=True))
    return grid, array["chunk_key_encoding"].get("configuration", {}).get("separator", "/")


def sealed_store(group: Path, *, seal: bool = True) -> Store:
    """A Zarr store rooted at a group, in which every chunk must exist, be sound and be the committed one.

    Parameters
    ----------
    group
        Folder or URL.
    seal
        Whether seals are checked, where the group has them.
    """
    return _CheckedChunks(zarr_store(group), Seal.of(group) if seal else None)


class _CheckedChunks(WrapperStore[Store]):  # type: ignore[misc]
    """A store that raises for a chunk that is missing, damaged or another's.

    All stores written here hold every chunk (``write_empty_chunks``): a missing one does not stand for fill values.
    """

    def __init__(self, store: Store, seal: Seal | None = None) -> None:
        super().__init__(store)
        self._seal = seal

    def _with_store(self, store: Store) -> _CheckedChunks:
        return type(self)(store, self._seal)

    async def get(self, key: str, *args: Any, **kwargs: Any) -> Any:
        """Bytes of ``key``."""
        if isinstance(self._store, LocalStore):
            check_regular(self._store.root / key)
        value = await self._store.get(key, *args, **kwargs)
        array, _, chunk = key.rpartition("/c")  # of mean/c/0/1, and of c.0.1 in shards
        if not re.fullmatch(r"([/.]\d+)*", chunk) or not array:
            return value
        if value is None:
            raise StoreCorruptError(f"{self._store} lacks the chunk {key}; {_RESTORE}")
        raw = value.as_numpy_array()
        checksum = carried_checksum(raw)
        if checksum != google_crc32c.value(raw[:-CHECKSUM_BYTES].tobytes()):
            raise StoreCorruptError(f"{self._store}: the chunk {key} fails its crc32c checksum; {_RESTORE}")
        if self._seal:
            self._seal.check(array, tuple(map(int, re.findall(r"\d+", chunk))), checksum)
        return value


def carried_checksum(raw: NDArray[np.uint8]) -> int:
    """The checksum at the end of a chunk's bytes."""
    return int.from_bytes(raw[-CHECKSUM_BYTES:].tobytes(), "little")


def check_listed(root: Path, group: str) -> None:
    """Refuse a group that is not the one its store lists.

    Raises
    ------
    StoreCorruptError
        If it is another or an older one.
    """
    listed = attributes_of(root).get(GROUPS, {}).get(group)
    # A link leads to another study's group, which that one's root lists.
    linked = not is_remote(root) and (root / group).is_symlink()
    if listed is not None and not linked and attributes_of(root / group).get(DIGEST) not in listed:
        raise StoreCorruptError(
            f"{root / group} is not the group that {root / ZARR_JSON} lists under this name, but another or an older "
            f"one; {_RESTORE}"
        )


def check_present(root: Path, *, removable: bool = False) -> None:
    """Refuse a store of which a listed group is gone.

    Parameters
    ----------
    root
        Store.
    removable
        Whether groups are removed in the ordinary course of things, folder and all.

    Raises
    ------
    StoreCorruptError
        Naming the groups.
    """
    listed = [root / name for name in attributes_of(root).get(GROUPS, {})]
    gone = [group for group in listed if not (group / ZARR_JSON).exists() and (group.exists() or not removable)]
    if gone:
        names = ", ".join(group.relative_to(root).as_posix() for group in gone)
        raise StoreCorruptError(f"{root} lists the group(s) {names}, of which {ZARR_JSON} is missing; {_RESTORE}")


def is_unsealed(group: Path) -> bool:
    """Whether a group has finished arrays and no seal: an earlier release wrote it."""
    attributes = attributes_of(group)
    return bool(SEAL not in attributes and attributes.get("complete", True) and arrays_of(group))


# -- committing ------------------------------------------------------------------------------------------------------
def commit(
    group: Path,
    attributes: dict[str, Any] | None = None,
    *,
    known: Mapping[str, str] | None = None,
    root: Path | None = None,
) -> str:
    """Seal a group's chunks, then set attributes, seal and digest in one replacement of its ``zarr.json``.

    Parameters
    ----------
    group
        Folder or URL.
    attributes
        To set; ``committed_models`` says how many models count.
    known
        Checksums of chunks, as of :func:`sealed_chunks`, that are known; those of others are read back.
    root
        Store that lists the group, if one does and it lies in its place.

    Returns
    -------
    str
        The group's digest.
    """
    attributes, known = attributes_of(group) | (attributes or {}), known or {}
    names = _chunks_in(group, n_committed(attributes))
    seals = {name: known[name] if name in known else _carried_by(group / name) for name in names}
    write_json(group / SEALS, seals)  # what was committed before is in it too: a crash here changes nothing
    document = with_digest(group, attributes | {SEAL: content_hash(seals)})
    digest = str(document["attributes"][DIGEST])
    if root is not None:
        list_group(root, group, coming=digest)
    write_json(group / ZARR_JSON, document)
    if root is not None:
        list_group(root, group)
    return digest


def seal_store(store: Path) -> None:
    """Seal every finished group of a store as it is now, list them in its root, and give all groups digests."""
    groups = list(groups_in(store))
    for group in groups:
        if is_unsealed(group):
            commit(group)
        else:
            write_digest(group)
    for group in groups[1:]:
        if SEAL in attributes_of(group):
            list_group(store, group)


def groups_in(path: Path) -> Iterator[Path]:
    """The group at ``path`` and all below it."""
    yield path
    for child in zarr_nodes(path):
        if read_document(child)["node_type"] == "group":
            yield from groups_in(child)


def list_group(root: Path, group: Path, *, coming: str | None = None) -> None:
    """Note in the root of a store which digest one of its groups has.

    Parameters
    ----------
    root, group
        Store, and the group below it.
    coming
        Digest of what is about to take the group's place: both count until this is called again without it, so that a
        writer that is killed in between leaves a sound store.
    """
    name = group.relative_to(root).as_posix()
    listed = {
        other: [digest for digest in digests if len(digests) == 1 or digest == _digest(root / other)] or digests
        for other, digests in attributes_of(root).get(GROUPS, {}).items()
    }  # of two digests that a killed writer left, the one that counts now
    digests = [digest for digest in (_digest(group), coming) if digest is not None]
    write_digest(root, {GROUPS: listed | {name: digests}})


def _digest(group: Path) -> str | None:
    digest: str | None = attributes_of(group).get(DIGEST) if (group / ZARR_JSON).exists() else None
    return digest


def _carried_by(chunk: Path) -> str:
    """The checksum that a chunk on the disk carries, as hexadecimal digits."""
    with explain_access_errors(chunk):
        if is_remote(chunk):
            tail = filesystem(chunk).cat_file(chunk.path, start=-CHECKSUM_BYTES)  # type: ignore[attr-defined]
        else:
            with check_regular(chunk).open("rb", buffering=0) as handle:
                handle.seek(-CHECKSUM_BYTES, os.SEEK_END)
                tail = handle.read()
    return bytes(tail)[::-1].hex()
