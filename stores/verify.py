"""Verification: every chunk of a store is read, every count, label and digest compared with what was written."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import zarr

from rlgen_stats.schemas.dims import MODEL, PROMPT, PROMPT_LABELS
from rlgen_stats.schemas.errors import RlgenStatsError, StoreCorruptError, StoreError
from rlgen_stats.stores.activation_store import ARRAY, COMMITTED, root_attributes, stored_groups
from rlgen_stats.stores.atomic import UNREADABLE, ZARR_JSON, read_object
from rlgen_stats.stores.creation import LABEL_BLOCK, TOKEN_DTYPES, TokenCoder
from rlgen_stats.stores.digests import (
    COMMITTED_MODELS,
    DIGEST,
    arrays_of,
    attributes_of,
    metadata_digest,
    n_committed,
    read_document,
    zarr_nodes,
)
from rlgen_stats.stores.folder import StudyFolder, linked_folders
from rlgen_stats.stores.labels import TokenLabels, has_labels
from rlgen_stats.stores.locations import is_remote, place
from rlgen_stats.stores.owners import foreign_stores, is_outdated
from rlgen_stats.stores.results import open_results
from rlgen_stats.stores.seals import (
    GROUPS,
    Seal,
    check_listed,
    check_present,
    groups_in,
    is_unsealed,
    sealed_chunks,
    sealed_store,
)
from rlgen_stats.stores.shards import ShardArray, open_shards, written_chunks
from rlgen_stats.stores.stage_records import read_record, read_times_forced
from rlgen_stats.stores.tables import check_is_store, check_store_version, open_table

WORKERS: Final = min(8, 2 * (os.cpu_count() or 1))
"""Threads that read chunks; reading waits for the disk and decoding frees the interpreter."""
_UNREADABLE: Final = (*UNREADABLE, OSError, RuntimeError)
"""What becomes a problem of the report, not a crash of it."""


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` found."""

    path: str
    """Store."""
    n_arrays: int
    """Arrays read."""
    n_chunks: int
    """Chunks read."""
    problems: tuple[str, ...]
    """One sentence a fault, the first fault first; empty if the store is sound."""
    notes: tuple[str, ...] = ()
    """What could not be checked, a sentence a store: earlier releases sealed no chunks."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(frozen=True)
class _Check:
    """One check: the place it is named by in a problem, and a function that raises if something is wrong there."""

    where: str
    run: Callable[[], object]
    chunk: bool = True
    """Whether it reads a chunk."""


def verify(path: Path | str, *, on_progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Check every chunk, label table, count, layout version and digest of a store.

    Parameters
    ----------
    path
        Any Zarr store of a study, or a study folder (all its stores, further layers and contrasts included); a folder
        or a URL.
    on_progress
        Called with (checks done, checks in all), from this thread.

    Returns
    -------
    VerifyReport
        Names the array, the chunk and, for activations, model, site, shard and token range of every fault.

    Raises
    ------
    StoreError
        If ``path`` holds no store.
    """
    root = place(path)
    stores = stores_below(root)
    problems: list[str] = []
    notes: list[str] = []
    checks = [
        _Check(file.relative_to(root).as_posix(), partial(_check_record, file.parent.parent, file), chunk=False)
        for file in _records(root)
    ]
    n_arrays = 0
    for name, store in stores.items():
        prefix = "" if store == root else f"{name}: "
        try:
            of_store, unsealed = list(_checks(store)), sum(map(is_unsealed, groups_in(store)))
        except _UNREADABLE as error:
            problems.append(f"{prefix}{_sentence(error)}")
            continue
        if unsealed:
            notes.append(
                f"{prefix}{unsealed} group(s) unsealed, as earlier releases wrote them: a chunk swapped for another "
                f"sound one would go unnoticed there; 'rlgen-stats migrate {store}' seals them as they are now."
            )
        checks += [_Check(prefix + check.where, check.run, check.chunk) for check in of_store]
        # Every array has one check of its zarr.json, beside those of its chunks.
        n_arrays += sum(1 for check in of_store if check.where.endswith(ZARR_JSON) and not check.chunk)
    with ThreadPoolExecutor(WORKERS) as pool:
        for done, problem in enumerate(pool.map(_problem, checks), start=1):
            problems += [problem] if problem else []
            if on_progress:
                on_progress(done, len(checks))
    return VerifyReport(str(path), n_arrays, sum(check.chunk for check in checks), tuple(problems), tuple(notes))


def stores_below(path: Path) -> dict[str, Path]:
    """The store at ``path``, or all stores of the study folder at ``path``, by their path below it.

    Stores at further layers and of further contrasts are among them, unless they are links to others.

    Raises
    ------
    StoreError
        If there is none, and no study that may have some later.
    """
    if path.exists() and not (path / ZARR_JSON).exists():
        stores: dict[str, Path] = {}
        for folder in (path, *linked_folders(path)):
            below = "" if folder == path else f"{folder.relative_to(path).as_posix()}/"
            own = (child for child in folder.iterdir() if child.name.endswith(".zarr") and not _is_link(child))
            stores |= {f"{below}{store.name}": store for store in sorted(own, key=lambda s: s.name)}
        if stores or StudyFolder(path).spec.exists():  # begun, or stopped before its first store
            return stores
    check_is_store(path)
    return {path.name: path}


def _is_link(path: Path) -> bool:
    return not is_remote(path) and path.is_symlink()


def _records(root: Path) -> list[Path]:
    """Records of the stages of a study folder, at every layer and for every contrast; none for a store."""
    if is_remote(root):
        return []
    files = (file for one in (root, *linked_folders(root)) for file in sorted(StudyFolder(one).stages.glob("*.json")))
    return [file for file in files if not file.is_symlink()]


def _check_record(root: Path, file: Path) -> None:
    """The stores that a finished stage left are there, and still those, with all their models."""
    folder = StudyFolder(root)
    if file in (folder.fingerprints, folder.forced):
        read_object(file) if file == folder.fingerprints else read_times_forced(file)
        return
    record = read_record(file)
    if not record.get("finished"):
        return
    if is_outdated(root, record):  # it runs again, and its dictionaries are of then
        record["dictionaries"] = {}
    of_dictionaries = record.get("dictionaries", {})
    left = dict.fromkeys([*record.get("stores", {}), *of_dictionaries, *of_dictionaries.values()])
    faults = [
        f"{name} is missing, which stage {record['stage']} left or used; restore it, or 'rlgen-stats run {root}' makes "
        "it again"
        for name in left
        if not (root / name).exists()
    ]
    faults += foreign_stores(root, record)
    if faults:
        raise StoreError("; ".join(faults))


def _problem(check: _Check) -> str | None:
    try:
        check.run()
    except _UNREADABLE as error:
        return f"{check.where}: {_sentence(error)}"
    return None


def _sentence(error: BaseException) -> str:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return text if isinstance(error, RlgenStatsError) else f"unreadable ({text[:160]})"


def _checks(store: Path) -> Iterator[_Check]:
    attrs = attributes_of(store)
    yield _Check("root", partial(_check_root, store, attrs), chunk=False)
    yield _Check("groups", partial(check_present, store, removable=not has_labels(store)), chunk=False)
    yield from _group_checks(store, store)
    if has_labels(store):
        yield _Check("labels", partial(_check_labels, store), chunk=False)
        for model, site in stored_groups(store):
            yield from _shard_checks(store / model / site, model, site)
    elif COMMITTED_MODELS in attrs:
        layout = "outcomes" if "correct" in arrays_of(store) else "features"
        yield _Check("layout", partial(open_table, store, layout), chunk=False)


def _check_root(store: Path, attrs: dict[str, Any]) -> None:
    if set(attrs) <= {
        "schema_version",
        DIGEST,
        GROUPS,
    }:  # a results store: every group below carries its own provenance
        for name in (child.name for child in zarr_nodes(store)):
            open_results(store, name)
        return
    check_store_version(store, attrs)
    if has_labels(store):
        root_attributes(store)


def _group_checks(store: Path, group: Path) -> Iterator[_Check]:
    """Digest and seals of a group, its arrays' metadata and chunks, and the same of every group below."""
    name = group.relative_to(store).as_posix() if group != store else "."
    yield _Check(f"group {name}", partial(_check_digest, group), chunk=False)
    if group != store:
        yield _Check(f"group {name}", partial(check_listed, store, name), chunk=False)
    attrs = attributes_of(group)
    sealed = True
    try:
        sealed_chunks(Seal.of(group))
    except _UNREADABLE as error:  # named once, and not for every chunk
        sealed = False
        yield _Check(f"group {name}", partial(_fail, error), chunk=False)
    for child in zarr_nodes(group):
        try:
            kind = read_document(child)["node_type"]
        except StoreCorruptError as error:
            yield _Check(f"{child.relative_to(store).as_posix()}/{ZARR_JSON}", partial(_fail, error), chunk=False)
            continue
        if kind == "group":
            yield from _group_checks(store, child)
        elif "complete" not in attrs:  # arrays of shards are checked with their commit records
            yield from _array_checks(store, child, n_committed(attrs), sealed=sealed)


def _fail(error: Exception) -> None:
    raise error


def _nothing_more() -> None:
    """The metadata was read when the check was made."""


def _check_digest(group: Path) -> None:
    document = read_document(group)
    stored = document.get("attributes", {}).get(DIGEST)
    if stored is None:
        raise StoreCorruptError("its digest is missing; restore zarr.json.")
    if stored != metadata_digest(group, document):
        raise StoreCorruptError(
            "its metadata or attributes changed since they were written (the digest differs); restore the zarr.json "
            "files of this group."
        )


def _array_checks(store: Path, path: Path, n_models: int | None, *, sealed: bool) -> Iterator[_Check]:
    name = path.relative_to(store).as_posix()
    try:
        array = zarr.open_array(sealed_store(path.parent, seal=sealed), path=path.name, mode="r")
        regions = list(_chunk_regions(array, n_models))
    except _UNREADABLE as error:
        yield _Check(f"{name}/{ZARR_JSON}", partial(_fail, error), chunk=False)
        return
    yield _Check(f"{name}/{ZARR_JSON}", _nothing_more, chunk=False)
    for region in regions:
        span = ", ".join(f"{part.start}:{part.stop}" for part in region)
        yield _Check(f"{name}[{span}]", partial(array.__getitem__, region))


def _chunk_regions(array: Any, n_models: int | None) -> Iterator[tuple[slice, ...]]:
    """The region of every chunk, without models that an append left uncommitted."""
    names = array.metadata.dimension_names or ("",) * array.ndim
    shape = tuple(
        n_models if n_models is not None and n == MODEL else s for n, s in zip(names, array.shape, strict=True)
    )
    starts = [range(0, size, chunk) for size, chunk in zip(shape, array.chunks, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(
            slice(start, min(start + chunk, size))
            for start, chunk, size in zip(corner, array.chunks, shape, strict=True)
        )


def _shard_checks(group: Path, model: str, site: str) -> Iterator[_Check]:
    """Every committed shard against its record; shards without a record were never announced and are not read."""
    title = f"model {model}, site {site}"
    try:
        data, record = open_shards(group / ARRAY, decoded=False), open_shards(group / COMMITTED)
        complete = bool(read_document(group).get("attributes", {}).get("complete"))
    except _UNREADABLE as error:
        yield _Check(title, partial(_fail, error), chunk=False)
        return
    for name in (ARRAY, COMMITTED):
        yield _Check(f"{model}/{site}/{name}/{ZARR_JSON}", _nothing_more, chunk=False)
    n_tokens, rows = data.shape[0], data.rows
    for index in range(data.n_shards) if complete else sorted(written_chunks(group / COMMITTED)):
        stop = min((index + 1) * rows, n_tokens)
        where = f"{title}, tokens {index * rows} to {stop - 1}"
        yield _Check(where, partial(_check_shard, data, record, index, stop - index * rows))


def _check_shard(data: ShardArray, record: ShardArray, index: int, size: int) -> None:
    n, checksum = (int(x) for x in record.shard(index)[0])
    actual = data.checksum(index)
    if (n, checksum) != (size, actual):
        raise StoreCorruptError(
            f"its commit record says {n} tokens with checksum {checksum:08x}, but it has {size} with {actual:08x}; "
            "restore it or compute it again."
        )


def _check_labels(store: Path) -> None:
    """Label tables against each other, the counts and the hash they were stored with."""
    attrs = root_attributes(store)
    labels = TokenLabels(store)
    coder = TokenCoder(pd.DataFrame({name: labels.prompts[name].values for name in (PROMPT, *PROMPT_LABELS)}))
    for start in range(0, labels.n_tokens, LABEL_BLOCK):
        block = {name: np.asarray(labels.codes[name][start : start + LABEL_BLOCK]) for name in TOKEN_DTYPES}
        if {len(values) for values in block.values()} != {min(LABEL_BLOCK, labels.n_tokens - start)}:
            raise StoreCorruptError(
                f"the store announces {labels.n_tokens} tokens, the label tables hold another number."
            )
        coder.add(block)
    sources = [str(name) for name in labels.spans.attrs["sources"]]
    spans = coder.spans(sources)
    if any(not np.array_equal(spans[name], labels.spans[name]) for name in spans.data_vars):
        raise StoreCorruptError("the spans are not those of the tokens; restore the spans group.")
    if coder.labels_hash(sources) != attrs["labels_hash"]:
        raise StoreCorruptError("the labels are not those the store was made with (their hash differs); restore them.")
