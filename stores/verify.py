"""Does a store still hold what was written? Every chunk is read, every count compared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from rlgen_stats.schemas.errors import StoreError
from rlgen_stats.stores.activations import ARRAY, stored_models
from rlgen_stats.stores.tables import check_is_store


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` found."""

    path: str
    """Store."""
    n_arrays: int
    """Arrays read."""
    n_chunks: int
    """Chunks read; chunks never written (fill value) included."""
    problems: tuple[str, ...]
    """One sentence a fault, the first fault first; empty if the store is sound."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(path: Path | str) -> VerifyReport:
    """Read every chunk of a store and compare its checksum, and the activations' commit records with the data.

    Parameters
    ----------
    path
        Any Zarr store of a study, or a study folder (all its stores).

    Returns
    -------
    VerifyReport
        Names the array, the chunk and, for activations, model, site and token range of every fault.

    Raises
    ------
    StoreError
        If ``path`` holds no store.
    """
    path = Path(path)
    if not (path / "zarr.json").exists():
        stores = sorted(path.glob("*.zarr")) if path.is_dir() else []
        if not stores:
            check_is_store(path)
        reports = [verify(store) for store in stores]
        return VerifyReport(
            str(path),
            sum(r.n_arrays for r in reports),
            sum(r.n_chunks for r in reports),
            tuple(f"{Path(r.path).name}: {problem}" for r in reports for problem in r.problems),
        )
    problems: list[str] = []
    n_arrays = n_chunks = 0
    for metadata in sorted(path.rglob("zarr.json")):
        try:
            node = zarr.open(metadata.parent, mode="r")
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{metadata.relative_to(path)} is not readable metadata ({error})")
            continue
        if isinstance(node, zarr.Array):
            n_arrays += 1
            for region in _regions(node):
                n_chunks += 1
                if fault := _fault(node, region):
                    problems.append(f"{_place(metadata.parent.relative_to(path), region)}: {fault}")
    problems += _uncommitted(path)
    return VerifyReport(str(path), n_arrays, n_chunks, tuple(problems))


def _regions(array: Any) -> Iterator[tuple[slice, ...]]:
    starts = [range(0, size, chunk) for size, chunk in zip(array.shape, array.chunks, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(
            slice(at, min(at + chunk, size)) for at, chunk, size in zip(corner, array.chunks, array.shape, strict=True)
        )


def _fault(array: Any, region: tuple[slice, ...]) -> str | None:
    try:
        array[region]
    except (ValueError, OSError, RuntimeError, IndexError, StoreError) as error:
        return f"unreadable ({str(error).splitlines()[0][:120]})"
    return None


def _place(array: Path, region: tuple[slice, ...]) -> str:
    span = ", ".join(f"{part.start}:{part.stop}" for part in region)
    if array.name == ARRAY and len(array.parts) == 3:
        model, site, _ = array.parts
        return f"model {model}, site {site}, tokens {region[0].start} to {region[0].stop - 1}"
    return f"{array}[{span}]"


def _uncommitted(path: Path) -> list[str]:
    """Activation shards that are announced but not on the disk."""
    if not (path / "tokens").exists():
        return []
    found = []
    for model, site in stored_models(path):
        folder = path / model / site
        committed = np.flatnonzero(np.asarray(zarr.open_array(folder / "committed", mode="r")[:]))
        found += [
            f"model {model}, site {site}, shard {i}: committed, but its chunk is missing"
            for i in committed
            if not (folder / ARRAY / "c" / str(i) / "0").exists()
        ]
    return found
