"""Export: a selection of a store as files that other tools read, written block by block."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import TOKEN
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.stores import open_tokens, place, replacing, select_tokens
from rlgen_stats.stores.activation_store import shard_arrays
from rlgen_stats.stores.atomic import sync
from rlgen_stats.stores.labels import positions_in
from rlgen_stats.stores.locations import is_remote
from rlgen_stats.stores.shards import BFLOAT16, ShardArray, stored_dtype, to_float32
from rlgen_stats.toolkit.exchange.label_table import COLUMNS, LABEL_ROWS
from rlgen_stats.toolkit.progress import SILENT, Progress

FORMATS: Final = ("safetensors", "npy")
"""What arrays are written as; labels are always parquet."""
LABELS_FILE: Final = "labels.parquet"
TENSOR: Final = "activation"
"""Name of the tensor in a safetensors file."""

_SAFETENSORS: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ALIGNMENT: Final = 8
"""Values of a safetensors file start at a multiple of this."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    folder: str
    models: tuple[str, ...]
    site: str
    n_tokens: int
    files: tuple[str, ...]


def export_activations(
    store: Path | str,
    out: Path | str,
    *,
    models: Sequence[str] | None = None,
    site: str | None = None,
    where: Mapping[str, object] | None = None,
    formats: Sequence[str] = ("safetensors",),
    progress: Progress = SILENT,
) -> Exported:
    """Write the activations and labels of selected tokens, in store order, into a new folder.

    Parameters
    ----------
    store
        Activation store; folder or URL.
    out
        Folder that does not exist or is empty; it appears whole or not at all. ``labels.parquet`` has one row a token;
        ``<model>.safetensors`` has the tensor ``activation`` and the metadata model, site and spec_hash;
        ``<model>.npy`` the same array [token, channel].
    models
        Model ids; default all complete ones at the site.
    site
        Name of the site; default the only one.
    where
        Labels of the tokens to keep, each with a value or several, e.g. ``{"segment": "completion"}``; default all.
    formats
        Any of ``safetensors`` and ``npy``.
    progress
        Receiver of progress, in tokens.

    Raises
    ------
    InputError
        If a format or label is unknown, no token is selected, or the folder holds something.
    StoreError
        If a model is absent or unfinished, or several sites need a choice.
    StoreCorruptError
        If a shard is missing or fails its checksum.

    Notes
    -----
    One shard of one model is in memory at a time. bfloat16 stays bfloat16 in safetensors and becomes float32 in npy,
    which holds it exactly. :func:`import_activations` reads the result back to identical arrays and labels.

    Examples
    --------
    >>> export_activations("runs/demo/activations.zarr", "out", models=["rl@80"],
    ...                    where={"segment": "completion"})  # doctest: +SKIP
    """
    path, folder = place(store), _new_folder(place(out))
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise InputError(f"arrays are exported as {' or '.join(FORMATS)}, got {unknown or 'nothing'}; name one.")
    tokens = open_tokens(path)
    site, named = shard_arrays(path, models, site, decoded=False)
    ranges = select_tokens(path, **(where or {}))
    n_tokens = int((ranges[:, 1] - ranges[:, 0]).sum())
    if not n_tokens:
        raise InputError(f"no token of {path} has the labels {dict(where or {})}; ask for fewer at once.")
    facts = {"site": site, "spec_hash": str(tokens.attrs["spec_hash"])}
    with replacing(folder) as temporary:
        temporary.mkdir()
        with progress.task("export labels", total=n_tokens, unit="tokens") as task:
            for rows in _write_labels(temporary / LABELS_FILE, tokens, ranges):
                task.advance(rows)
        for model, array in named:
            with progress.task(f"export {model}", total=n_tokens, unit="tokens") as task:
                files = [(temporary / f"{model}.{name}", name) for name in dict.fromkeys(formats)]
                for rows in _write_array(files, array, ranges, n_tokens, {"model": model} | facts):
                    task.advance(rows)
        written = sorted(temporary.iterdir())
        for file in written:
            sync(file)
    exported = tuple(model for model, _ in named)
    return Exported(str(folder), exported, site, n_tokens, tuple(file.name for file in written))


def _new_folder(folder: Path) -> Path:
    if is_remote(folder):
        raise InputError(f"exports are written to a local folder, got {folder}; export here, then copy it there.")
    if not folder.name:
        raise InputError(f"an export takes the place of a folder, which {str(folder)!r} does not name; name a new one.")
    if folder.is_dir() and not any(folder.iterdir()):
        return folder
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} exists and is not empty; expected a new folder: name another or move it.")
    return folder


def _pieces(ranges: NDArray[np.int64], total: int, size: int) -> Iterator[tuple[int, slice | NDArray[np.int64]]]:
    """(block, its selected rows) for every block of ``size`` tokens that has any, in order."""
    first = np.searchsorted(ranges[:, 1], np.arange(0, total, size), side="right")
    for block, start in enumerate(range(0, total, size)):
        stop = min(start + size, total)
        last = int(np.searchsorted(ranges[:, 0], stop, side="left"))
        inside = np.clip(ranges[first[block] : last], start, stop) - start
        if len(inside) == 1:
            yield block, slice(int(inside[0, 0]), int(inside[0, 1]))
        elif len(inside):
            yield block, positions_in(inside)


def _write_labels(file: Path, tokens: xr.Dataset, ranges: NDArray[np.int64]) -> Iterator[int]:
    """Write the labels; yields the rows of each block."""
    kinds = {name: pa.string() if tokens[name].dtype.kind == "U" else pa.int32() for name in COLUMNS}
    with pq.ParquetWriter(file, pa.schema(kinds.items())) as writer:
        for block, rows in _pieces(ranges, tokens.sizes[TOKEN], LABEL_ROWS):
            part = tokens.isel({TOKEN: slice(block * LABEL_ROWS, (block + 1) * LABEL_ROWS)})
            columns = {name: part[name].values[rows] for name in COLUMNS}
            table = pa.table({name: pa.array(column, kinds[name]) for name, column in columns.items()})
            writer.write_table(table)
            yield table.num_rows


def _write_array(
    files: Sequence[tuple[Path, str]],
    array: ShardArray,
    ranges: NDArray[np.int64],
    n_tokens: int,
    metadata: dict[str, str],
) -> Iterator[int]:
    """Write one model's selected rows to every file, a shard at a time; yields the rows of each shard."""
    shape = (n_tokens, array.shape[1])
    with ExitStack() as stack:
        handles = [(stack.enter_context(file.open("wb")), name) for file, name in files]
        for handle, name in handles:
            if name == "npy":
                _npy_header(handle, _npy_dtype(array.stored_type), shape)
            else:
                _safetensors_header(handle, array.stored_type, shape, metadata)
        for shard, rows in _pieces(ranges, array.shape[0], array.rows):
            stored = array.shard(shard)[rows]
            for handle, name in handles:
                values = to_float32(stored, BFLOAT16) if name == "npy" and array.stored_type == BFLOAT16 else stored
                little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
                handle.write(little.reshape(-1).view(np.uint8).data)
            yield len(stored)


def _npy_dtype(stored_type: str) -> np.dtype[Any]:
    return np.dtype(np.float32) if stored_type == BFLOAT16 else stored_dtype(stored_type)


def _npy_header(handle: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, int]) -> None:
    description = np.lib.format.dtype_to_descr(dtype.newbyteorder("<"))
    np.lib.format.write_array_header_1_0(handle, {"descr": description, "fortran_order": False, "shape": shape})


def _safetensors_header(handle: BinaryIO, stored_type: str, shape: tuple[int, int], metadata: dict[str, str]) -> None:
    size = shape[0] * shape[1] * stored_dtype(stored_type).itemsize
    entry = {"dtype": _SAFETENSORS[stored_type], "shape": list(shape), "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": metadata, TENSOR: entry}).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    handle.write(len(text).to_bytes(8, "little") + text)
