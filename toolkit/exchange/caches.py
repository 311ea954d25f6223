"""Activation caches made elsewhere, read block by block from memory-mapped files as one table [token, channel]."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.stores.locations import is_remote, place
from rlgen_stats.stores.shards import BFLOAT16, FLOATS, stored_dtype, to_bfloat16, to_float32
from rlgen_stats.toolkit.exchange.formats import (
    TensorFile,
    open_memmap_shard,
    open_npy,
    open_safetensors,
    open_torch,
)

BLOCK_ROWS: Final = 8192
"""Rows of a block: 128 MB at width 4,096 in float32."""
MEMMAP: Final = "memmap"

_SUFFIXES: Final = {
    ".safetensors": "safetensors",
    ".npy": "npy",
    ".pt": "pt",
    ".pth": "pt",
    ".memmap": MEMMAP,
}
_OPENERS: Final[dict[str, Callable[[Path, str | None], TensorFile]]] = {
    "safetensors": open_safetensors,
    "npy": open_npy,
    "pt": open_torch,
    MEMMAP: open_memmap_shard,
}
_COMPANIONS: Final = ("mean.pt", "std.pt", "M2.pt", "count.pt", "tokens.pt", "sequence_ranges.pt")
"""What crosscoder_learning writes beside its shards; not activations."""


@dataclass(frozen=True)
class Cache:
    """Activations in files of one format, type and width, in file order.

    Examples
    --------
    >>> cache = open_cache("caches/rl-200/block12")  # doctest: +SKIP
    >>> for block in cache.blocks():  # doctest: +SKIP
    ...     print(block.shape)
    """

    format: str
    """``safetensors``, ``npy``, ``pt`` or ``memmap``."""
    dtype: str
    """Type of the blocks: ``float32``, ``float16`` or ``bfloat16`` (bits in uint16)."""
    parts: tuple[TensorFile, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """Files in the order in which they are read."""
        return tuple(part.file for part in self.parts)

    @property
    def width(self) -> int:
        """Channels of every row."""
        return self.parts[0].shape[-1]

    @property
    def n_tokens(self) -> int:
        """Rows of all files."""
        return sum(part.n_rows for part in self.parts)

    def blocks(self, start: int = 0, max_rows: int = BLOCK_ROWS) -> Iterator[NDArray[Any]]:
        """Arrays [n, width] in file order; none spans two files.

        Parameters
        ----------
        start
            First row; files before it are not touched.
        max_rows
            Largest n.

        Raises
        ------
        InputError
            If ``start`` lies outside the cache or ``max_rows`` is not positive.

        Notes
        -----
        Blocks may be read-only views of a file. Values too large for the type a cast asks for become infinite.
        """
        if not 0 <= start <= self.n_tokens or max_rows < 1:
            raise InputError(
                f"blocks start at a row from 0 to {self.n_tokens} and have a row or more, got start={start} and "
                f"max_rows={max_rows}; change them."
            )
        first = 0  # row of the cache at which the part begins
        for part in self.parts:
            if part.n_rows and start < first + part.n_rows:
                values = part.values()
                for begin in range(max(0, start - first), part.n_rows, max_rows):
                    rows = _rows(values, begin, min(begin + max_rows, part.n_rows))
                    yield _cast(rows, part.dtype, self.dtype)
            first += part.n_rows


def _rows(values: NDArray[Any], start: int, stop: int) -> NDArray[Any]:
    """Rows of [n, width], or of [batch, sequence, width] with the first two axes as one; never copies it all."""
    if values.ndim == 2:
        return np.asarray(values[start:stop])
    sequence = values.shape[1]
    first = start // sequence
    touched = np.asarray(values[first : -(-stop // sequence)]).reshape(-1, values.shape[2])
    return touched[start - first * sequence : stop - first * sequence]


def _cast(rows: NDArray[Any], dtype: str, target: str) -> NDArray[Any]:
    if dtype == target:
        return np.asarray(rows, dtype=stored_dtype(target))  # other byte orders become the machine's
    with np.errstate(over="ignore"):  # too large a value becomes infinite, which the writer refuses
        if dtype == BFLOAT16:
            rows = to_float32(np.asarray(rows, dtype=np.uint16), dtype)
        if target == BFLOAT16:
            return to_bfloat16(np.asarray(rows, dtype=np.float32))
        return rows.astype(target)


def open_cache(path: Path | str, *, tensor: str | None = None, dtype: str | None = None) -> Cache:
    """Open a cache made elsewhere; headers are read and checked, values are not.

    Parameters
    ----------
    path
        A folder with files of one format, or one file: ``*.safetensors``, ``*.npy``, ``*.pt``/``*.pth``, or the
        ``shard_<i>.memmap`` with ``shard_<i>.meta`` of crosscoder_learning and dictionary_learning. Files are read in
        natural order: part-2 before part-10.
    tensor
        Name of the tensor, where a file holds several.
    dtype
        Cast to ``float32``, ``float16`` or ``bfloat16``; default the type of the files. Needed for float64.

    Returns
    -------
    Cache
        [n_tokens, width]; tensors [batch, sequence, width] count as batch x sequence rows, padding included.

    Raises
    ------
    InputError
        If nothing is recognised, formats, widths, types or tensor names differ, a file is cut or broken, a pickle would
        be needed, the tensor or a ``.meta`` is missing, or the shards were shuffled when they were written.

    Examples
    --------
    >>> open_cache("caches/rl-200/block12").n_tokens  # doctest: +SKIP
    """
    path = place(path)
    if is_remote(path):
        raise InputError(f"caches are mapped from local files, got {path}; copy the folder to this machine first.")
    if dtype is not None and dtype not in FLOATS:
        raise InputError(f"activations are stored as {', '.join(FLOATS)}, got {dtype!r}; choose one of them.")
    files = _tensor_files(path)
    kind = _SUFFIXES[files[0].suffix]
    if kind == MEMMAP and path.is_dir():
        _check_shards(path, files)
    parts = tuple(_OPENERS[kind](file, tensor) for file in files)
    for part in parts[1:]:
        _check_alike(part, parts[0])
    if parts[0].dtype not in FLOATS and dtype is None:
        raise InputError(
            f"{parts[0].file.name} holds {parts[0].dtype}, expected one of {', '.join(FLOATS)}; ask for a cast with "
            "dtype='float32' (--dtype float32)."
        )
    return Cache(kind, dtype or parts[0].dtype, parts)


def _natural(file: Path) -> tuple[list[Any], str]:
    """Sort key: digits count as numbers."""
    pieces = re.split(r"([0-9]+)", file.name)
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], file.name


def _tensor_files(path: Path) -> list[Path]:
    """Files of the one format a folder holds, in natural order."""
    if path.is_file():
        files = [path] if path.suffix in _SUFFIXES else []
    elif path.is_dir():
        files = [f for f in path.iterdir() if f.suffix in _SUFFIXES and f.is_file() and not f.name.startswith(".")]
    else:
        raise InputError(f"{path} does not exist; expected a folder of tensor files or one such file: check the path.")
    if any(file.suffix == ".memmap" for file in files):
        files = [file for file in files if file.name not in _COMPANIONS]
    if not files:
        raise InputError(
            f"{path} holds no tensor files; expected {', '.join('*' + s for s in _SUFFIXES)} directly in it: name the "
            "folder of one model and site."
        )
    files.sort(key=_natural)
    other = next((file for file in files if _SUFFIXES[file.suffix] != _SUFFIXES[files[0].suffix]), None)
    if other is not None:
        raise InputError(
            f"{path} mixes formats, {files[0].name} and {other.name}; expected one: move the others away or name one "
            "file."
        )
    return files


def _check_shards(path: Path, files: list[Path]) -> None:
    """Refuse shards that are missing or that were shuffled, after which no label table can fit them."""
    names = [f"shard_{index}.memmap" for index in range(len(files))]
    missing = [name for name in names if name not in {file.name for file in files}]
    if missing:
        raise InputError(
            f"{path} lacks {missing[0]} though it has {files[-1].name}; expected shards numbered from 0 without a gap: "
            "copy the cache again."
        )
    config = path / "config.json"
    if not config.is_file():
        return
    try:
        entry = json.loads(config.read_text(encoding="utf-8"))
        n_shards, shuffled = entry.get("shard_count", len(files)), entry.get("shuffle_shards", False)
    except (ValueError, AttributeError) as error:
        raise InputError(f"{config.name} cannot be read: expected a JSON object; restore or remove it.") from error
    if shuffled:
        raise InputError(
            f"{path} was written with shuffle_shards, so its rows are in no known order; expected rows in the order of "
            "the texts: collect it again without shuffling."
        )
    if n_shards != len(files):
        raise InputError(
            f"{path} has {len(files)} shards, its config.json says {n_shards}; remove left-overs or copy it again."
        )


def _check_alike(part: TensorFile, first: TensorFile) -> None:
    for what, value, expected, fix in (
        ("width", part.shape[-1], first.shape[-1], "import files of one width at a time"),
        ("type", part.dtype, first.dtype, "import files of one type at a time"),
        ("tensor", part.key, first.key, "name one that all files have with tensor= (--tensor)"),
    ):
        if value != expected:
            raise InputError(
                f"{part.file.name} has {what} {value}, expected {expected} as in {first.file.name}; {fix}."
            )
