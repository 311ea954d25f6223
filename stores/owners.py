"""Whose a store is and which models it holds, held against the record of the stage that wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlgen_stats.stores.activation_store import stored_groups
from rlgen_stats.stores.atomic import ZARR_JSON
from rlgen_stats.stores.digests import COMMITTED_MODELS, read_document
from rlgen_stats.stores.labels import has_labels


def owner(path: Path) -> tuple[str, str] | None:
    """Study id and key (``spec_hash``) that a store or a group of results was written under; None without a store."""
    if not (path / ZARR_JSON).exists():
        return None
    attrs = read_document(path).get("attributes", {})
    return str(attrs.get("study_id", "")), str(attrs.get("spec_hash", ""))


def models_in(path: Path) -> list[str]:
    """Models that a store holds whole, sorted; none for stores of another kind and where there is no store."""
    if not (path / ZARR_JSON).exists():
        return []
    if has_labels(path):
        groups = stored_groups(path)
        return sorted({model for model, site in groups if read_document(path / model / site)["attributes"]["complete"]})
    return sorted(map(str, read_document(path).get("attributes", {}).get(COMMITTED_MODELS, [])))


def foreign_stores(root: Path, record: Mapping[str, Any]) -> list[str]:
    """Stores below ``root`` that are not those a finished stage left: of another study or key, or without its models.

    Parameters
    ----------
    root
        Study folder.
    record
        The stage's record, with ``study_id``, ``key`` and ``stores`` (path -> models); records of older releases have
        no stores, and nothing is said about them.

    Returns
    -------
    list of str
        One clause a store.
    """
    stage, own, faults = record["stage"], (record["study_id"], record["key"]), []
    for name, models in record.get("stores", {}).items():
        found = owner(root / name)
        if found is None:  # gone: the stage runs again
            continue
        if found != own:
            study, key = (part[:12] or "unknown" for part in found)
            faults.append(
                f"{name}: not what stage {stage} wrote, but of study {study}, key {key}; restore it or move it away"
            )
        elif missing := sorted(set(models) - set(models_in(root / name))):
            faults.append(f"{name}: lacks {', '.join(missing)}, which stage {stage} wrote; restore it or run the stage")
    return faults
