"""Shards of activations: one checksummed file each, written and checked as a whole, memory-mapped when read.

A shard is one chunk of a plain Zarr v3 array with the codecs ``bytes`` (little endian) and ``crc32c``: C-ordered values
followed by four checksum bytes, in a file of its own. Any Zarr reader opens it; reading and writing such a file
directly, through a memory map, avoids the copies that make general readers two to ten times slower
(benchmarks/README.md).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from rlgen_stats.schemas.errors import StoreCorruptError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.stores.atomic import ZARR_JSON, explain_damage, sync
from rlgen_stats.stores.digests import read_document
from rlgen_stats.stores.locations import check_regular, explain_access_errors, is_remote
from rlgen_stats.stores.seals import CHECKSUM_BYTES, Seal, carried_checksum

PARTIAL: Final = ".partial"
"""Suffix of a chunk that is being written; no Zarr reader looks at it, and the next attempt overwrites it."""
FLOATS: Final = ("float32", "float16", "bfloat16")
"""Types of activations."""
BFLOAT16: Final = "bfloat16"
"""Kept as its 16 bits in a uint16 array with the attribute ``bits_of: bfloat16``: Zarr v3 names no such type."""
_EXPONENT: Final = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}
FILL: Final = {"float32": float("nan"), "float16": float("nan"), "bfloat16": 0x7FC0}
"""Values of rows beyond the last token (the last shard is padded to full length): NaN."""


def stored_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy type in which values of ``dtype`` are stored."""
    return np.dtype(np.uint16 if dtype == BFLOAT16 else dtype)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even; lossless for values that came from bfloat16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # Adding half of the last kept bit, less one where that bit is 0, rounds to nearest with ties to even.
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    # The addition could carry a NaN over to another number: NaN keeps its sign and payload, and gets the quiet bit.
    return np.where(np.isnan(values), np.uint16(0x7FC0) | (bits >> 16).astype(np.uint16), rounded)


def to_float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Stored values as float32; exact for every stored type."""
    if dtype == BFLOAT16:
        exact: NDArray[np.float32] = np.left_shift(values, 16, dtype=np.uint32).view(np.float32)
        return exact
    return np.asarray(values, dtype=np.float32)


def nonfinite_rows(values: NDArray[Any], dtype: str) -> NDArray[np.bool_] | None:
    """[row] whether a row of stored values has NaN or infinity; None if none has.

    One pass over the bits: a number is NaN or infinite exactly if all its exponent bits are set.
    """
    bits = values.view(np.uint32 if dtype == "float32" else np.uint16)
    exponent = bits.dtype.type(_EXPONENT[dtype])
    magnitude = np.bitwise_and(bits, bits.dtype.type(0x7FFFFFFF if dtype == "float32" else 0x7FFF))
    if not magnitude.size or magnitude.max() < exponent:
        return None
    nonfinite: NDArray[np.bool_] = np.any(magnitude >= exponent, axis=1)
    return nonfinite


def array_document(
    shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str, dims: tuple[str, ...], attributes: dict[str, Any]
) -> str:
    """``zarr.json`` of an array of shards, made by zarr itself."""
    scratch = zarr.storage.MemoryStore()
    zarr.create_array(
        scratch,
        shape=shape,
        chunks=chunk,
        dtype=stored_dtype(dtype),
        fill_value=FILL.get(dtype, 0),
        compressors=[Crc32cCodec()],
        dimension_names=dims,
        attributes=attributes | ({"bits_of": BFLOAT16} if dtype == BFLOAT16 else {}),
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    return bytes(scratch._store_dict[ZARR_JSON].to_bytes()).decode()


def chunk_name(index: int, ndim: int) -> str:
    """Name of the file of a shard, in the folder of its array."""
    return ".".join(["c", str(index)] + ["0"] * (ndim - 1))


def write_chunk(folder: Path, index: int, values: NDArray[Any], *, ndim: int) -> int:
    """Write one whole chunk durably and atomically; return its crc32c.

    Local: a partial file is synced, then renamed. Remote: one object, which appears whole or not at all.
    """
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    checksum = int(google_crc32c.value(raw))
    path = folder / chunk_name(index, ndim)
    tail = checksum.to_bytes(CHECKSUM_BYTES, "little")
    if is_remote(path):
        with explain_access_errors(path):
            path.write_bytes(raw.tobytes() + tail)
        return checksum
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb", buffering=0) as handle:
        view = memoryview(raw.data)
        while len(view):  # an unbuffered write may take only a part of the bytes
            view = view[handle.write(view) :]
        handle.write(tail)
        os.fsync(handle.fileno())  # before the rename, so that the final name never stands for missing bytes
    partial.replace(path)
    sync(folder)  # makes the rename durable
    return checksum


def written_chunks(folder: Path) -> set[int]:
    """Indices of the chunks on disk, by their names; nothing is opened."""
    if not folder.exists():
        return set()
    files = (file.name for file in folder.iterdir()) if is_remote(folder) else os.listdir(folder)
    names = (file.split(".") for file in files)
    return {int(name[1]) for name in names if name[0] == "c" and name[-1].isdigit()}


@dataclass(frozen=True)
class ShardArray:
    """One array of shards, read shard by shard; a shard that is missing, cut, changed or another's raises.

    Behaves as a two-dimensional numpy array for slices along the first axis, and pickles to its path alone.
    """

    path: Path
    """Folder of the array."""
    shape: tuple[int, ...]
    """[row, column]."""
    rows: int
    """Rows of a shard."""
    stored_type: str
    """``float32``, ``float16`` or ``bfloat16``; other types by their numpy name."""
    decoded: bool = True
    """Whether bfloat16 is read as float32 (else as its bits)."""
    seal: Seal | None = None
    """Of the group it is in, if that has one: each shard must be the one committed in its place."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type that reading returns."""
        return np.dtype(np.float32) if self.decoded and self.stored_type == BFLOAT16 else stored_dtype(self.stored_type)

    @property
    def ndim(self) -> int:
        """Two, or one for records."""
        return len(self.shape)

    @property
    def n_shards(self) -> int:
        """Shards of the whole array."""
        return -(-self.shape[0] // self.rows)

    def shard(self, index: int) -> NDArray[Any]:
        """Rows of one shard in their stored type: read-only, checked, mapped from the file where it is local.

        Raises
        ------
        StoreCorruptError
            If the chunk is missing, has another size, fails its checksum, or is not the one committed in its place.
        """
        values = self._checked(index).view(stored_dtype(self.stored_type)).reshape(-1, *self.shape[1:])
        return values[: self.shape[0] - index * self.rows]

    def _checked(self, index: int) -> NDArray[np.uint8]:
        name = f"shard {index} (rows {index * self.rows} to {min((index + 1) * self.rows, self.shape[0]) - 1})"
        path = self.path / chunk_name(index, self.ndim)
        expected = self.rows * int(np.prod(self.shape[1:])) * stored_dtype(self.stored_type).itemsize + CHECKSUM_BYTES
        try:
            raw = _read_bytes(path)
        except (FileNotFoundError, ValueError) as error:
            raise StoreCorruptError(
                f"{self.path}: {name} is missing or empty; restore it or compute it again."
            ) from error
        if len(raw) != expected:
            raise StoreCorruptError(
                f"{self.path}: {name} has {len(raw)} bytes, expected {expected}; restore it or compute it again."
            )
        if int(google_crc32c.value(raw[:-CHECKSUM_BYTES])) != carried_checksum(raw):
            raise StoreCorruptError(f"{self.path}: {name} fails its crc32c checksum; restore it or compute it again.")
        if self.seal:
            self.seal.check(self.path.name, (index,) + (0,) * (self.ndim - 1), carried_checksum(raw))
        return raw[:-CHECKSUM_BYTES]

    def checksum(self, index: int) -> int:
        """The checksum a shard carries, after checking it."""
        self._checked(index)
        return carried_checksum(_read_bytes(self.path / chunk_name(index, self.ndim)))

    def pieces(self, start: int, stop: int) -> Iterator[NDArray[Any]]:
        """Stored values of the rows [start, stop), shard by shard."""
        for index in range(start // self.rows, -(-stop // self.rows) if stop > start else start // self.rows):
            first = index * self.rows
            yield self.shard(index)[max(0, start - first) : stop - first]

    def __getitem__(self, key: Any) -> NDArray[Any]:
        key = key if isinstance(key, tuple) else (key,)
        start, stop, step = key[0].indices(self.shape[0])
        parts = [self._decode(piece[(slice(None), *key[1:])]) for piece in self.pieces(start, stop)]
        if not parts:
            return np.empty((0, *self.shape[1:]), self.dtype)[(slice(None), *key[1:])]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts))[::step]

    def _decode(self, values: NDArray[Any]) -> NDArray[Any]:
        return to_float32(values, self.stored_type) if self.decoded and self.stored_type == BFLOAT16 else values


@dataclass(frozen=True)
class PerturbedShards(ShardArray):
    """Base with noise: to every row is added a vector of random direction, as long as another model's row is distant.

    Nothing is stored. The noise is a function of the label in ``path`` and the shard, so that every reader has the
    same.
    """

    base: ShardArray = field(kw_only=True)
    other: ShardArray = field(kw_only=True)

    def shard(self, index: int) -> NDArray[Any]:
        """Rows of one shard in their stored type."""
        base, other = (to_float32(array.shard(index), array.stored_type) for array in (self.base, self.other))
        random = np.random.default_rng([derive_seed(0, *self.path.parts[-3:]), index])
        noise = random.standard_normal(base.shape, dtype=np.float32)
        noise *= (np.linalg.norm(other - base, axis=1) / np.linalg.norm(noise, axis=1))[:, None]
        values = base + noise
        return to_bfloat16(values) if self.stored_type == BFLOAT16 else values.astype(stored_dtype(self.stored_type))


def _read_bytes(path: Path) -> NDArray[np.uint8]:
    if is_remote(path):
        with explain_access_errors(path):
            return np.frombuffer(path.read_bytes(), np.uint8)
    with check_regular(path).open("rb") as handle:
        if not hasattr(mmap, "MAP_POPULATE"):
            return np.frombuffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        # Every byte is checked at once, so the whole file is brought in by one call and not by a fault per page.
        populate = mmap.MAP_SHARED | mmap.MAP_POPULATE
        return np.frombuffer(mmap.mmap(handle.fileno(), 0, flags=populate, prot=mmap.PROT_READ), np.uint8)


def open_shards(path: Path, *, decoded: bool = True) -> ShardArray:
    """The array of shards at ``path``, from its ``zarr.json``.

    Raises
    ------
    StoreCorruptError
        If that does not describe one.
    """
    document = read_document(path)
    with explain_damage(path / ZARR_JSON):
        chunk = document["chunk_grid"]["configuration"]["chunk_shape"]
        stored_type = str(document["attributes"].get("bits_of", document["data_type"]))
        stored_dtype(stored_type)
        return ShardArray(path, tuple(document["shape"]), int(chunk[0]), stored_type, decoded, Seal.of(path.parent))
