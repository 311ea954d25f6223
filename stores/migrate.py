"""Migration: a store's layout version is raised in place, one version at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import xarray as xr
import zarr

from rlgen_stats.schemas.dims import CHANNEL, PROMPT, PROMPT_LABELS, TOKEN
from rlgen_stats.schemas.errors import StoreCorruptError, StoreError
from rlgen_stats.schemas.layout import LAYOUT_VERSION
from rlgen_stats.stores.activation_store import ARRAY, COMMITTED, stored_groups
from rlgen_stats.stores.atomic import ZARR_JSON, write_json
from rlgen_stats.stores.creation import LABEL_BLOCK, TOKEN_DTYPES, TokenCoder, write_table
from rlgen_stats.stores.digests import read_document, write_digest
from rlgen_stats.stores.labels import PROMPTS_GROUP, SPANS_GROUP, TOKENS_GROUP, has_labels
from rlgen_stats.stores.locations import is_remote, place, zarr_store
from rlgen_stats.stores.locks import exclusive
from rlgen_stats.stores.seals import CHECKSUM_BYTES, carried_checksum, groups_in, is_unsealed, seal_store
from rlgen_stats.stores.shards import array_document, write_chunk, written_chunks
from rlgen_stats.stores.verify import stores_below, verify


def migrate(path: Path | str) -> dict[str, tuple[int, int]]:
    """Raise every store at ``path`` (a store or a study folder) to this release's layout version, in place.

    Stores without seals are verified and, if they are sound, sealed as they are.

    Returns
    -------
    dict
        Store name -> (version before, version now).

    Raises
    ------
    StoreError
        If there is no store, one is of a newer version than this release knows, or it is not on a local disk.
    StoreCorruptError
        If a store without seals is not sound; it stays as it is.

    Notes
    -----
    Activations are renamed, not rewritten. The version is raised last, so an interrupted migration is run again.
    """
    done = {}
    for name, store in stores_below(place(path)).items():
        with exclusive(store):
            before = version = _version(store)
            if is_remote(store) and version < LAYOUT_VERSION:
                raise StoreError(f"{store} is remote; migrate a local copy and upload that.")
            if version > LAYOUT_VERSION:
                raise StoreError(
                    f"{store} has layout version {version}, this release knows up to {LAYOUT_VERSION}; upgrade "
                    "rlgen-stats."
                )
            while version < LAYOUT_VERSION:
                _STEPS[version](store)
                version = _version(store)
            if any(map(is_unsealed, groups_in(store))):
                if problems := verify(store).problems:
                    raise StoreCorruptError(f"{store} is not sealed, because it is not sound: {problems[0]}")
                seal_store(store)
            done[name] = (before, version)
    return done


def _version(store: Path) -> int:
    """The lowest layout version in ``store``: groups of a results store carry their own."""
    versions = [read_document(store).get("attributes", {}).get("schema_version")]
    versions += [
        read_document(child).get("attributes", {}).get("schema_version")
        for child in store.iterdir()
        if (child / ZARR_JSON).exists()
    ]
    known = [int(version) for version in versions if version is not None]
    if not known:
        raise StoreError(f"{store} is not a store of this toolkit: attribute 'schema_version' is missing.")
    return min(known)


def _from_1(store: Path) -> None:
    """Layout 1 -> 2: flat shard files, checksums in commit records, spans, digests, and every chunk present."""
    attributes: dict[str, Any] = {"schema_version": 2}
    if has_labels(store):
        attributes |= _spans_from_1(store)
        root = read_document(store)["attributes"]
        for model, site in stored_groups(store):
            _shards_from_1(store / model / site, model, site, int(root["n_tokens"]), int(root["shard_tokens"]))
    for group in sorted(child for child in store.iterdir() if (child / ZARR_JSON).exists()):
        document = read_document(group)
        if "schema_version" in document.get("attributes", {}):
            document["attributes"]["schema_version"] = 2
            write_json(group / ZARR_JSON, document)
    for array in store.rglob(ZARR_JSON):
        if array.parent.name not in (ARRAY, COMMITTED) and read_document(array.parent)["node_type"] == "array":
            _fill_missing(array.parent)
    seal_store(store)
    write_digest(store, attributes)  # the version comes last, so that an interrupted migration is run again


def _spans_from_1(store: Path) -> dict[str, Any]:
    """Write the spans group from the tokens; the labels hash of version 2."""
    prompts = xr.open_zarr(zarr_store(store / PROMPTS_GROUP), consolidated=False, chunks=None)
    tokens = zarr.open_group(zarr_store(store / TOKENS_GROUP), mode="r")
    coder = TokenCoder(pd.DataFrame({name: prompts[name].values for name in (PROMPT, *PROMPT_LABELS)}))
    arrays = {name: tokens[name] for name in TOKEN_DTYPES}
    for start in range(0, arrays[PROMPT].shape[0], LABEL_BLOCK):
        coder.add({name: np.asarray(array[start : start + LABEL_BLOCK]) for name, array in arrays.items()})
    sources = [str(name) for name in tokens["source"].attrs["legend"]]
    write_table(store / SPANS_GROUP, SPANS_GROUP, coder.spans(sources))
    return {"labels_hash": coder.labels_hash(sources)}


def _shards_from_1(group: Path, model: str, site: str, n_tokens: int, shard: int) -> None:
    """Rename chunk files c/i/0 to c.i.0 and write records with checksums; the data stay as they are."""
    if "complete" in read_document(group)["attributes"]:
        return  # an interrupted migration came this far
    old = json.loads((group / ARRAY / ZARR_JSON).read_text(encoding="utf-8"))
    rows = int(old["chunk_grid"]["configuration"]["chunk_shape"][0])
    if rows != min(shard, n_tokens):
        raise StoreError(
            f"{group} has chunks of {rows} tokens, expected {min(shard, n_tokens)}; it cannot be migrated."
        )
    record = group / f"{COMMITTED}.new"
    record.mkdir(exist_ok=True)
    n_shards = -(-n_tokens // shard)
    (record / ZARR_JSON).write_text(
        array_document((n_shards, 2), (1, 2), "int64", ("shard", "record"), {}), encoding="utf-8"
    )
    committed = np.asarray(zarr.open_array(group / COMMITTED, mode="r")[:])
    for index in np.flatnonzero(committed).tolist():
        source, target = group / ARRAY / "c" / str(index) / "0", group / ARRAY / f"c.{index}.0"
        if source.exists():
            source.replace(target)
        raw = np.fromfile(target, np.uint8)[-CHECKSUM_BYTES:]
        write_chunk(record, index, np.array([[committed[index], carried_checksum(raw)]], dtype="<i8"), ndim=2)
    width = int(old["shape"][1])
    text = array_document((n_tokens, width), (rows, width), str(old["data_type"]), (TOKEN, CHANNEL), {})
    (group / ARRAY / ZARR_JSON).write_text(text, encoding="utf-8")
    _remove(group / ARRAY / "c")
    _remove(group / COMMITTED)
    record.replace(group / COMMITTED)
    done = len(written_chunks(group / COMMITTED)) == n_shards
    write_digest(group, {"model": model, "site": site, "complete": done})


def _remove(folder: Path) -> None:
    if folder.exists():
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        folder.rmdir()


def _fill_missing(path: Path) -> None:
    """Write the chunks that layout 1 left out because they held fill values only."""
    array = zarr.open_array(zarr_store(path), mode="r+")
    starts = [range(0, size, chunk) for size, chunk in zip(array.shape, array.chunks, strict=True)]
    for corner in np.ndindex(*(len(part) for part in starts)):
        if not (path / array.metadata.encode_chunk_key(corner)).exists():
            spans = zip(corner, array.chunks, array.shape, strict=True)
            region = tuple(slice(i * chunk, min((i + 1) * chunk, size)) for i, chunk, size in spans)
            with zarr.config.set({"array.write_empty_chunks": True}):
                zarr.open_array(zarr_store(path), mode="r+")[region] = array[region]


_STEPS: Final[dict[int, Callable[[Path], None]]] = {1: _from_1}
"""Version -> function that raises a store from it to the next."""
