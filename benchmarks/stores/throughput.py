"""Sequential write and read of the same bytes: numpy.memmap, this package, zarr-python, zarrs, tensorstore.

Every store holds float16 values in blocks of 8,192 rows. The page cache is warm; checksums are on wherever there are
any (numpy.memmap has none). Reads are delivered block by block and must equal what was written.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from common import Case, interleaved, read_options, scratch, spread
from peers import BASELINE, BLOCK, OURS, PEERS, WIDTH, Block, Peer
from reports import Goal, report

BLOCKS: Final = {False: 64, True: 3}
"""Blocks of a store: 2.1 GB; 100 MB with ``--quick``."""
SOURCES: Final = 8
"""Different blocks, written over and over: 268 MB, more than any cache of a processor."""
GOALS: Final = {"write": 0.8, "read": 0.5}
"""Of the speed of numpy.memmap (reading: into one buffer)."""


def check(folder: Path, blocks: list[Block], n_blocks: int) -> None:
    """Every reader delivers what was written, in order."""
    for peer in PEERS:
        for how, read in peer.readers.items() if peer.installed else ():
            seen: list[bool] = []

            def compare(block: Block, seen: list[bool] = seen) -> None:
                seen.append(np.array_equal(block.view(np.uint16), blocks[len(seen) % len(blocks)].view(np.uint16)))

            read(folder / peer.name, n_blocks, compare)
            if len(seen) != n_blocks or not all(seen):
                raise SystemExit(f"{peer.name} ({how}) does not deliver what was written.")


def cases(folder: Path, blocks: list[Block], n_blocks: int) -> tuple[list[Case], list[Case]]:
    """What to time: one write a peer, one read a reader."""

    def emptied(peer: Peer) -> Path:
        path = folder / peer.name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        peer.prepare(path, n_blocks)
        return path

    there = [peer for peer in PEERS if peer.installed]
    writes = [
        Case(peer.name, lambda path, peer=peer: peer.write(path, blocks, n_blocks), lambda peer=peer: emptied(peer))
        for peer in there
    ]
    reads = [
        Case(_name(peer.name, how), lambda _, peer=peer, read=read: read(folder / peer.name, n_blocks, lambda _: None))
        for peer in there
        for how, read in peer.readers.items()
    ]
    return writes, reads


def main() -> None:
    options = read_options(__doc__ or "")
    n_blocks = BLOCKS[options.quick]
    generator = np.random.default_rng(0)
    blocks = [
        generator.standard_normal((BLOCK, WIDTH), dtype=np.float32).astype(np.float16)
        for _ in range(min(SOURCES, n_blocks))
    ]
    size = n_blocks * BLOCK * WIDTH * 2 / 1e6
    with scratch(options) as folder:
        writes, reads = cases(folder, blocks, n_blocks)
        wrote = _speeds(size, interleaved(writes, options.repetitions))
        check(folder, blocks, n_blocks)
        read = _speeds(size, interleaved(reads, options.repetitions))
        rows = [_row("write", peer, "", wrote.get(peer.name), wrote[BASELINE]) for peer in PEERS]
        copied = read[_name(BASELINE, "copied")]
        rows += [
            _row("read", peer, how, read.get(_name(peer.name, how)), copied) for peer in PEERS for how in peer.readers
        ]
        goals = [
            Goal(f"{row['direction']} {row['how'] or 'by ActivationWriter'}, of {BASELINE}", row["of memmap"], bound)
            for row in rows
            for bound in [GOALS[row["direction"]]]
            if row["store"] == OURS
        ]
        settings = {"bytes": f"{size:,.0f} MB", "width": WIDTH, "type": "float16", "rows a block": BLOCK}
        report(options, folder, "throughput", settings=settings, rows=rows, goals=goals)


def _name(peer: str, how: str) -> str:
    return f"{peer}, {how}"


def _speeds(size: float, seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {name: spread([size / s for s in values]) for name, values in seconds.items()}


def _row(
    direction: str, peer: Peer, how: str, found: dict[str, float] | None, first: dict[str, float]
) -> dict[str, Any]:
    row: dict[str, Any] = {"direction": direction, "store": peer.name, "how": how}
    if found is None:
        return row | {"MB/s": "not installed"}
    row |= {"MB/s": found["median"], "low": found["low"], "high": found["high"]}
    row |= {"of memmap": found["median"] / first["median"]}
    return row | ({"synced": peer.synced} if direction == "write" else {})


if __name__ == "__main__":
    main()
