"""The ways to store blocks of activations that are compared, each with its writer and its readers.

zarrs and tensorstore are no dependencies of the package; where they are missing the rows say so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from rlgen_stats.stores import ActivationWriter, PairedReader, create_activations, open_activations

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from common import PROVENANCE, SITE, Texts

try:
    import zarrs
except ImportError:
    zarrs = None
try:
    import tensorstore
except ImportError:
    tensorstore = None

WIDTH: Final = 2048
BLOCK: Final = 8192
"""Rows of a batch, a shard and a chunk: 33.6 MB."""
MODEL: Final = "base@0"
BASELINE: Final = "numpy.memmap"
OURS: Final = "this package"
ZARR_PYTHON: Final = "zarr.core.codec_pipeline.BatchedCodecPipeline"
ZARRS: Final = "zarrs.ZarrsCodecPipeline"

Block = NDArray[np.float16]
Take = Callable[[Block], object]


@dataclass(frozen=True)
class Peer:
    """A way to store blocks: ``prepare(path)`` is not timed; each reader delivers every block to a function."""

    name: str
    write: Callable[[Path, list[Block], int], None]
    readers: dict[str, Callable[[Path, int, Take], None]]
    synced: str
    """Whether the data are on the disk when writing returns."""
    prepare: Callable[[Path, int], None] = lambda path, n_blocks: None
    installed: bool = True


def _rows(n_blocks: int) -> Iterator[slice]:
    return (slice(i * BLOCK, (i + 1) * BLOCK) for i in range(n_blocks))


# -- numpy.memmap ----------------------------------------------------------------------------------------------------
def write_memmap(path: Path, blocks: list[Block], n_blocks: int) -> None:
    array = np.memmap(path, dtype=np.float16, mode="w+", shape=(n_blocks * BLOCK, WIDTH))
    for i, rows in enumerate(_rows(n_blocks)):
        array[rows] = blocks[i % len(blocks)]
    array.flush()


def copy_memmap(path: Path, n_blocks: int, take: Take) -> None:
    array = np.memmap(path, dtype=np.float16, mode="r", shape=(n_blocks * BLOCK, WIDTH))
    buffer = np.empty((BLOCK, WIDTH), np.float16)
    for rows in _rows(n_blocks):
        np.copyto(buffer, array[rows])
        take(buffer)


def touch_memmap(path: Path, n_blocks: int, take: Take) -> None:
    """One byte of every page is read."""
    array = np.memmap(path, dtype=np.float16, mode="r", shape=(n_blocks * BLOCK, WIDTH))
    for rows in _rows(n_blocks):
        np.asarray(array[rows]).reshape(-1).view(np.uint8)[::4096].sum()
        take(array[rows])


# -- this package ----------------------------------------------------------------------------------------------------
def prepare_ours(path: Path, n_blocks: int) -> None:
    texts = Texts(prompts=64, sources=n_blocks, tokens=BLOCK // 64)
    create_activations(path, texts.token_tables(), texts.prompt_table(), provenance=PROVENANCE, shard_tokens=BLOCK)


def write_ours(path: Path, blocks: list[Block], n_blocks: int) -> None:
    with ActivationWriter(path, model=MODEL, site=SITE, width=WIDTH, dtype="float16") as writer:
        for i in range(n_blocks):
            writer.append(blocks[i % len(blocks)])


def read_paired(path: Path, n_blocks: int, take: Take) -> None:
    for block in PairedReader(path, [MODEL], SITE, batch_size=BLOCK, seed=0, dtype="stored").sequential(BLOCK):
        take(block[:, 0])


def copy_paired(path: Path, n_blocks: int, take: Take) -> None:
    buffer = np.empty((BLOCK, WIDTH), np.float16)
    for block in PairedReader(path, [MODEL], SITE, batch_size=BLOCK, seed=0, dtype="stored").sequential(BLOCK):
        np.copyto(buffer, block[:, 0])
        take(buffer)


def read_dask(path: Path, n_blocks: int, take: Take) -> None:
    data = open_activations(path, models=[MODEL], site=SITE)["activation"].data[0]
    for i in range(data.numblocks[0]):
        take(data.blocks[i].compute(scheduler="synchronous"))


# -- zarr-python, with its own and with the zarrs pipeline -----------------------------------------------------------
def _pipeline(path: str) -> Any:
    checked = {"codec_pipeline.validate_checksums": True} if path == ZARRS else {}
    return zarr.config.set({"codec_pipeline.path": path} | checked)


def write_zarr(pipeline: str) -> Callable[[Path, list[Block], int], None]:
    def write(path: Path, blocks: list[Block], n_blocks: int) -> None:
        with _pipeline(pipeline):
            array = zarr.create_array(
                path,
                shape=(n_blocks * BLOCK, WIDTH),
                chunks=(BLOCK, WIDTH),
                dtype="float16",
                compressors=[Crc32cCodec()],
            )
            for i, rows in enumerate(_rows(n_blocks)):
                array[rows] = blocks[i % len(blocks)]

    return write


def read_zarr(pipeline: str) -> Callable[[Path, int, Take], None]:
    def read(path: Path, n_blocks: int, take: Take) -> None:
        with _pipeline(pipeline):
            array = zarr.open_array(path, mode="r")
            for rows in _rows(n_blocks):
                take(array[rows])

    return read


# -- tensorstore -----------------------------------------------------------------------------------------------------
def write_tensorstore(path: Path, blocks: list[Block], n_blocks: int) -> None:
    metadata = {
        "shape": [n_blocks * BLOCK, WIDTH],
        "data_type": "float16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [BLOCK, WIDTH]}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
    array = tensorstore.open({**_tensorstore(path), "metadata": metadata}, create=True).result()
    for i, rows in enumerate(_rows(n_blocks)):
        array[rows].write(blocks[i % len(blocks)]).result()


def read_tensorstore(path: Path, n_blocks: int, take: Take) -> None:
    array = tensorstore.open(_tensorstore(path), open=True, read=True).result()
    for rows in _rows(n_blocks):
        take(array[rows].read().result())


def _tensorstore(path: Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}


PEERS: Final = (
    Peer(BASELINE, write_memmap, {"copied": copy_memmap, "every page touched": touch_memmap}, "yes"),
    Peer(
        OURS,
        write_ours,
        {"PairedReader": read_paired, "PairedReader, copied": copy_paired, "open_activations": read_dask},
        "yes",
        prepare_ours,
    ),
    Peer("zarr-python", write_zarr(ZARR_PYTHON), {"": read_zarr(ZARR_PYTHON)}, "no"),
    Peer("zarrs", write_zarr(ZARRS), {"": read_zarr(ZARRS)}, "no", installed=zarrs is not None),
    Peer("tensorstore", write_tensorstore, {"": read_tensorstore}, "yes", installed=tensorstore is not None),
)
