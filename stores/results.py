"""The results store: one Zarr group per analysis, each replaced whole or not at all."""

from __future__ import annotations

from pathlib import Path

import xarray as xr

from rlgen_stats.schemas.dims import FEATURE, check_name, of_dictionary, split_dictionary
from rlgen_stats.schemas.errors import StoreError
from rlgen_stats.schemas.layout import RESULT_GROUPS, validate
from rlgen_stats.stores.atomic import ZARR_JSON, remove_leftovers, replacing
from rlgen_stats.stores.digests import read_document, write_digest, zarr_nodes
from rlgen_stats.stores.folder import StudyFolder, store_of
from rlgen_stats.stores.locations import explain_access_errors, place
from rlgen_stats.stores.locks import exclusive
from rlgen_stats.stores.provenance import Provenance
from rlgen_stats.stores.seals import check_listed, commit, list_group
from rlgen_stats.stores.tables import (
    FEATURE_BLOCK,
    as_strings,
    check_is_store,
    check_store_version,
    encoding,
    open_lazily,
    write_zarr,
)


def write_results(path: Path | str, group: str, dataset: xr.Dataset, *, provenance: Provenance) -> None:
    """Write one analysis below ``path``; a reader sees the old group or the new one, never half of it.

    Raises
    ------
    StoreError
        If ``group`` has a declared layout and the dataset does not follow it.
    """
    root = place(path)
    check_name(group, "a results group")
    _validated(dataset, group)
    dataset = as_strings(dataset.assign_attrs(provenance.attrs()).drop_encoding())
    with exclusive(root), explain_access_errors(root):
        if not (root / ZARR_JSON).exists():
            write_digest(root, {"schema_version": provenance.attrs()["schema_version"]})
        remove_leftovers(root / group)  # safe: the lock is ours, so no other process is replacing the group
        with replacing(root / group) as temporary:
            write_zarr(dataset, temporary, mode="w", encoding=encoding(dataset, {FEATURE: FEATURE_BLOCK}))
            list_group(root, root / group, coming=commit(temporary))
        list_group(root, root / group)


def result_groups(path: StudyFolder | Path | str) -> list[str]:
    """Names of the analyses in a study or results store."""
    root = store_of(path, "results")
    with explain_access_errors(root):
        if not (root / ZARR_JSON).exists():
            return []
        return [group.name for group in zarr_nodes(root)]


def open_results(path: StudyFolder | Path | str, group: str) -> xr.Dataset:
    """One analysis; a variable is read when it is used, and then kept.

    Parameters
    ----------
    path
        Study folder or results store.
    group
        Name of the analysis; of another dictionary than the first ``group.2``, ``group.3``, ...

    Raises
    ------
    StoreError
        If the store or the group is not there; the message lists what is.

    Examples
    --------
    >>> drift = open_results("runs/demo", "drift")  # doctest: +SKIP
    >>> drift.sel(model="rl@80").where(lambda d: d.q_value < 0.05, drop=True)  # doctest: +SKIP
    """
    root = store_of(path, "results")
    check_is_store(root)
    if group not in result_groups(root):
        raise StoreError(f"{root} has no results {group!r}; it has {', '.join(result_groups(root)) or 'none yet'}.")
    check_store_version(root / group, read_document(root / group).get("attributes", {}))
    check_listed(root, group)
    dataset = open_lazily(root / group, dask=False)  # small: graphs would cost more than the reading
    try:
        return _validated(dataset, group)
    except StoreError as error:
        raise StoreError(f"{error} If an earlier release computed it, run its stage again.") from error


def open_by_dictionary(path: StudyFolder | Path | str, group: str) -> dict[int, xr.Dataset]:
    """One analysis of every dictionary it was made with, by the dictionary's number, lazily; empty if there is none."""
    numbers = sorted(number for stem, number in map(split_dictionary, result_groups(path)) if stem == group)
    return {number: open_results(path, of_dictionary(group, number)) for number in numbers}


def _validated(dataset: xr.Dataset, group: str) -> xr.Dataset:
    layout = split_dictionary(group)[0]
    return validate(dataset, layout) if layout in RESULT_GROUPS else dataset
