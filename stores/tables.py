"""Stores that grow by one model at a time: outcomes and feature summaries.

Plain Zarr v3 with every chunk checksummed (crc32c) and present, even if it holds nothing but fill values. A model
counts once its name is in the root attribute ``committed_models``, which is written after the model's data; a
half-written model is cut off before the next append.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from rlgen_stats.schemas.declaring import PROVENANCE_ATTRS
from rlgen_stats.schemas.dims import FEATURE, MODEL, PROMPT
from rlgen_stats.schemas.errors import StoreCorruptError, StoreError
from rlgen_stats.schemas.layout import LAYOUT_VERSION, validate
from rlgen_stats.stores.atomic import ZARR_JSON, explain_damage, explain_full_disk, remove_leftovers, replacing
from rlgen_stats.stores.digests import (
    COMMITTED_MODELS,
    CONSOLIDATED,
    arrays_of,
    read_checked,
    read_document,
    zarr_nodes,
)
from rlgen_stats.stores.folder import StudyFolder, store_of
from rlgen_stats.stores.locations import explain_access_errors, is_remote, place, zarr_store
from rlgen_stats.stores.locks import exclusive
from rlgen_stats.stores.prompt_index import with_prompt_index
from rlgen_stats.stores.provenance import Provenance
from rlgen_stats.stores.seals import Seal, commit, sealed_chunks, sealed_store

FEATURE_BLOCK: Final = 512
"""Features per chunk: one block x all prompts x one model is one read (4 MB at 2,000 prompts, float32)."""
COMPRESSORS: Final = (ZstdCodec(level=1), Crc32cCodec())
"""Summaries are sparse and compress well at the fastest level; the checksum covers the compressed bytes."""

RENDERED_PROMPTS: Final = "rendered_prompts"
"""Attribute of outcomes: JSON, see :func:`rendered_prompts`."""


def as_strings(dataset: xr.Dataset) -> xr.Dataset:
    """Fixed-width text as variable-length text, the only text type with a Zarr v3 name.

    Always in C order: zarr-python 3.1 writes text of another memory order scrambled, without an error.
    """
    changed = {
        name: variable.copy(data=np.asarray(variable.data).astype(np.dtypes.StringDType(), order="C"))
        for name, variable in dataset.variables.items()
        if variable.dtype.kind in "UO"
    }
    coords = {name: variable for name, variable in changed.items() if name in dataset.coords}
    data = {name: variable for name, variable in changed.items() if name in dataset.data_vars}
    return dataset.assign(data).assign_coords(coords)


def fixed_width(text: NDArray[Any]) -> NDArray[Any]:
    """Text of variable length as ordinary fixed-width numpy text."""
    if text.dtype.kind != "T":
        return text.astype(np.str_)
    # numpy makes no fixed-width text of its variable-length one by itself, and the way through objects takes 10 times
    # as long.
    return text.astype(f"U{max(1, int(np.strings.str_len(text).max(initial=1)))}")


def open_unread(path: Path, **options: Any) -> xr.Dataset:
    """A Zarr group as it is, without indexes; a variable is read when it is used and then kept."""
    consolidated = CONSOLIDATED in read_checked(path)
    options = {"chunks": None, "create_default_indexes": False} | options
    for node in () if consolidated else zarr_nodes(path):
        read_document(node)  # names the file that is damaged
    with explain_damage(path / ZARR_JSON):
        dataset: xr.Dataset = xr.open_zarr(sealed_store(path), consolidated=consolidated, **options)
    return dataset


def open_lazily(path: Path, *, dask: bool = True) -> xr.Dataset:
    """A Zarr group with lazy data and its labels in memory, text as ordinary fixed-width numpy text.

    Data have a dask chunk for each stored one; without dask a variable is read whole when it is used, and then kept.
    """
    plain = open_unread(path)  # labels never go through dask: they are loaded at once
    labels, dataset = plain.reset_coords(), open_unread(path, chunks={}) if dask else plain
    loaded = {name: labels[name].drop_vars(labels[name].coords).load() for name in dataset.coords}
    text = {
        name: label.copy(data=fixed_width(label.values)) for name, label in loaded.items() if label.dtype.kind in "TO"
    }
    # numpy's StringDType cannot hold the missing values that ``where`` and ``reindex`` put in; object can.
    text_data = {name: data.astype(object) for name, data in dataset.data_vars.items() if data.dtype.kind == "T"}
    labelled: xr.Dataset = dataset.assign(text_data).assign_coords(loaded | text)
    return with_prompt_index(labelled)


def encoding(dataset: xr.Dataset, chunks: dict[str, int] | None = None) -> dict[Any, dict[str, Any]]:
    """Zarr encoding of every variable: checksummed, compressed, whole along dimensions not in ``chunks``."""
    chunks = chunks or {}
    return {
        name: {
            "compressors": COMPRESSORS,
            "chunks": tuple(
                max(1, min(chunks.get(str(dim), size), size))
                for dim, size in zip(variable.dims, variable.shape, strict=True)
            ),
        }
        for name, variable in dataset.variables.items()
        if variable.ndim
    } | {name: {"compressors": COMPRESSORS} for name, variable in dataset.variables.items() if not variable.ndim}


def committed_models(path: Path | str) -> list[str]:
    """Models wholly in the store, in order; empty when there is no store yet."""
    path = place(path)
    with explain_access_errors(path):
        if not (path / ZARR_JSON).exists():
            return []
    return [str(model) for model in read_document(path).get("attributes", {}).get(COMMITTED_MODELS, [])]


def append_model(path: Path | str, layout: str, dataset: xr.Dataset, *, provenance: Provenance) -> None:
    """Append one model to an outcome or feature store; after return it is committed, before it is invisible.

    Parameters
    ----------
    path
        Store folder, created on the first append.
    layout
        ``"outcomes"`` or ``"features"``.
    dataset
        One model: dimension ``model`` of size 1.
    provenance
        Origin; a store of another study or spec is refused.

    Raises
    ------
    StoreError
        If the dataset has not the declared layout, or the store is another's, or the model is already there,
        or its prompts are not the store's.
    OutOfSpaceError
        If the disk is full; what was committed stays.
    """
    path = place(path)
    dataset = as_strings(validate(dataset.assign_attrs(provenance.attrs()), layout).drop_encoding())
    if dataset.sizes[MODEL] != 1:
        raise StoreError(f"append_model takes one model at a time, got {dataset.sizes[MODEL]}; split the dataset.")
    model = str(dataset[MODEL].item())
    with exclusive(path), explain_access_errors(path), explain_full_disk(path):
        remove_leftovers(path)
        done = committed_models(path)
        if not done:
            with replacing(path) as temporary:
                _write_models(dataset, temporary)
        else:
            _check_fits(path, dataset, model, done, provenance)
            # Data first, then the list of committed models: until that is replaced, readers see the models before.
            known = sealed_chunks(Seal.of(path))
            _grow(path, dataset, len(done))
            commit(path, {COMMITTED_MODELS: [*done, model]}, known=known)


def rewrite_models(path: Path, layout: str, dataset: xr.Dataset, *, provenance: Provenance) -> None:
    """Put these models in place of all that a store holds, atomically.

    Parameters
    ----------
    path
        Store of :func:`append_model`.
    layout
        ``"outcomes"`` or ``"features"``.
    dataset
        One or more models, in memory.
    provenance
        Origin of the store from now on.

    Raises
    ------
    StoreError
        If the dataset has not the declared layout.
    """
    dataset = as_strings(validate(dataset.assign_attrs(provenance.attrs()), layout).drop_encoding())
    with exclusive(path), replacing(path) as temporary:
        _write_models(dataset, temporary)


def _write_models(dataset: xr.Dataset, path: Path) -> None:
    write_zarr(dataset, path, mode="w", encoding=encoding(dataset, {MODEL: 1, FEATURE: FEATURE_BLOCK}))
    commit(path, {COMMITTED_MODELS: [str(model) for model in dataset[MODEL].values]})


def write_zarr(dataset: xr.Dataset, path: Path, **options: Any) -> None:
    """``to_zarr`` as this project writes: Zarr v3, every chunk, metadata not consolidated (it would go stale)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Zarr V3 specification.*")
        dataset.to_zarr(zarr_store(path), zarr_format=3, consolidated=False, write_empty_chunks=True, **options)


def _check_fits(path: Path, dataset: xr.Dataset, model: str, done: list[str], provenance: Provenance) -> None:
    """Refuse a model that is stored already, or whose variables or prompts are not those of the store."""
    check_owner(path, provenance)
    if model in done:
        raise StoreError(f"model {model!r} is already in {path}; expected a new one: delete the store to redo it.")
    check_store_version(path, read_document(path)["attributes"])
    # From the arrays' metadata: to open the store would read a chunk of every label for every model in it.
    stored = {
        name: dict(zip(array.get("dimension_names") or (), array["shape"], strict=False))
        for name, array in arrays_of(path, len(done)).items()
    }
    for name, sizes in stored.items():
        if MODEL in sizes and name not in dataset.variables:
            raise StoreError(f"{path} holds {name!r} for every model, {model!r} comes without it; compute it too.")
    for named, variable in dataset.variables.items():
        known = stored.get(str(named))
        if known is None or any(known.get(dim) != n for dim, n in variable.sizes.items() if dim != MODEL):
            raise StoreError(
                f"{model!r} comes with {named!r} of {dict(variable.sizes)}, {path} holds "
                f"{'none' if known is None else known}; expected what the store's models have, or another store."
            )
    if not np.array_equal(zarr.open_array(sealed_store(path), path=PROMPT)[:], dataset[PROMPT].values):
        raise StoreError(
            f"{path} holds {stored[PROMPT][PROMPT]} other prompts than the {dataset.sizes[PROMPT]} of {model!r}; "
            "expected the same prompts in the same order."
        )


def check_owner(path: Path, provenance: Provenance) -> None:
    """Refuse a store that another study or another spec wrote.

    Raises
    ------
    StoreError
        Naming both hashes; nothing is overwritten.
    """
    attrs = read_document(path).get("attributes", {})
    for key, expected in (("study_id", provenance.study_id), ("spec_hash", provenance.spec_hash)):
        if attrs.get(key) != expected:
            raise StoreError(
                f"{path} was written for another study or settings ({key} {str(attrs.get(key))[:12]}, "
                f"expected {expected[:12]}); use another folder or move the store away."
            )


def _grow(path: Path, dataset: xr.Dataset, n_models: int) -> None:
    """Write one model behind the committed ones, over what an interrupted append left there.

    Not ``to_zarr(append_dim=...)``: that rewrites the root metadata before the data are there, and readers with it.
    """
    for name, array in arrays_of(path).items():
        dims = array.get("dimension_names") or []
        if MODEL in dims:
            target = zarr.open_array(zarr_store(path / name), mode="r+").with_config({"write_empty_chunks": True})
            axis = dims.index(MODEL)
            target.resize(tuple(n_models + 1 if i == axis else size for i, size in enumerate(target.shape)))
            target[(slice(None),) * axis + (slice(n_models, n_models + 1),)] = dataset[name].values


def open_table(path: Path | str, layout: str) -> xr.Dataset:
    """Open a store of :func:`append_model` lazily: only committed models, layout checked.

    Raises
    ------
    StoreError
        If there is no store, it is of a newer version, or its layout is another.
    """
    path = place(path)
    check_is_store(path)
    done = committed_models(path)
    check_store_version(path, read_document(path).get("attributes", {}))
    dataset = open_lazily(path)
    if dataset.sizes.get(MODEL, 0) < len(done):
        raise StoreCorruptError(
            f"{path} announces {len(done)} models but holds {dataset.sizes.get(MODEL, 0)}; "
            "restore it or compute it again."
        )
    dataset = validate(dataset.isel({MODEL: slice(0, len(done))}, missing_dims="ignore"), layout)
    if dataset[MODEL].values.tolist() != done:
        raise StoreCorruptError(
            f"{path} announces the models {', '.join(done)}, but the data are labelled "
            f"{', '.join(dataset[MODEL].values.tolist())}; restore it or compute it again."
        )
    return dataset


def check_is_store(path: Path) -> None:
    """Refuse a path that holds no Zarr v3 group, or that cannot be reached."""
    with explain_access_errors(path):
        if (path / ZARR_JSON).exists():
            return
        hint = "the folder is there but has no zarr.json" if path.exists() else "no such folder"
    if is_remote(path):
        hint = "no zarr.json below this URL"
    raise StoreError(f"{path} is not a Zarr v3 store ({hint}); run the stage that writes it, or check the path.")


def check_not_newer(path: Path, version: int) -> None:
    """Refuse a store of a layout that only later releases know.

    Raises
    ------
    StoreError
    """
    if version > LAYOUT_VERSION:
        raise StoreError(
            f"{path} has layout version {version}, this release reads up to {LAYOUT_VERSION}; upgrade rlgen-stats."
        )


def check_store_version(path: Path, attrs: dict[Any, Any]) -> None:
    """Refuse a store of another layout version, or one that carries none.

    Raises
    ------
    StoreError
        Naming both versions and the way out: upgrade the package, or migrate the store.
    """
    missing = [name for name in PROVENANCE_ATTRS if name not in attrs]
    if missing:
        raise StoreError(f"{path} is not a store of this toolkit: attribute {missing[0]!r} is missing.")
    version = int(attrs["schema_version"])
    check_not_newer(path, version)
    if version < LAYOUT_VERSION:
        raise StoreError(
            f"{path} has layout version {version}, this release reads {LAYOUT_VERSION}; raise it in place with "
            f"'rlgen-stats migrate {path}'."
        )


def open_outcomes(path: StudyFolder | Path | str) -> xr.Dataset:
    """Graded completions: ``correct[model, prompt, sample]``, ``greedy_correct[model, prompt]`` and labels, lazily.

    Parameters
    ----------
    path
        Study folder or outcome store.

    Examples
    --------
    >>> outcomes = open_outcomes("runs/demo")  # doctest: +SKIP
    >>> outcomes.greedy_correct.groupby("task").mean("prompt").compute()  # doctest: +SKIP
    """
    return open_table(store_of(path, "outcomes"), "outcomes")


def rendered_prompts(path: Path | str) -> list[dict[str, Any]]:
    """The first prompt of every task as the models of an outcomes store read it: models, task, prompt, text, n_tokens.

    Empty without a store, or if it does not say.
    """
    path = place(path)
    if not committed_models(path):
        return []
    with explain_damage(path / ZARR_JSON):
        return list(json.loads(read_document(path).get("attributes", {}).get(RENDERED_PROMPTS, "[]")))


def open_features(path: StudyFolder | Path | str) -> xr.Dataset:
    """Prompt summaries of features: ``mean``, ``firing``, ``max`` [model, prompt, feature] and labels, lazily.

    Parameters
    ----------
    path
        Study folder (the first dictionary's features) or feature store.

    Examples
    --------
    >>> features = open_features("runs/demo")  # doctest: +SKIP
    >>> features["mean"].sel(model="rl@80").isel(feature=3)  # doctest: +SKIP
    """
    return open_table(store_of(path, "features"), "features")
