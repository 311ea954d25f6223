"""Whose a store is, which models it holds and of which dictionary, against the record of the stage that wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rlgen_stats.stores.activation_store import stored_groups
from rlgen_stats.stores.atomic import ZARR_JSON
from rlgen_stats.stores.crosscoder_weights import SPEC, WEIGHTS, weights_hash
from rlgen_stats.stores.digests import COMMITTED_MODELS, attributes_of, read_document
from rlgen_stats.stores.labels import has_labels
from rlgen_stats.stores.stage_records import read_record

CROSSCODER: Final = "crosscoder"
"""Attribute of features, and of results made from one dictionary's: SHA-256 of the crosscoder's weights."""


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
        return sorted({model for model, site in groups if attributes_of(path / model / site).get("complete")})
    return sorted(map(str, read_document(path).get("attributes", {}).get(COMMITTED_MODELS, [])))


def foreign_stores(root: Path, record: Mapping[str, Any]) -> list[str]:
    """Stores below ``root`` that are not those a finished stage left.

    They are of another study or key, lack some of its models, or are of another dictionary.

    Parameters
    ----------
    root
        Study folder.
    record
        The stage's record, with ``study_id``, ``key``, ``stores`` (path -> models) and ``dictionaries`` (path -> folder
        of the crosscoder); records of older releases have none, and nothing is said about them.

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
    return faults + of_other_dictionaries(root, record.get("dictionaries", {}), stage=stage)


def is_outdated(root: Path, record: Mapping[str, Any]) -> bool:
    """Whether a stage that a finished one needed has begun anew under another key since; of older records, False."""
    files = {root / "stages" / f"{name}.json": key for name, key in dict(record.get("needs", {})).items()}
    return any(file.exists() and read_record(file)["key"] != key for file, key in files.items())


def of_other_dictionaries(root: Path, dictionaries: Mapping[str, str], *, stage: str) -> list[str]:
    """Stores below ``root`` that were not made with the weights of their dictionary, as they are now.

    Parameters
    ----------
    root
        Study folder.
    dictionaries
        Store -> folder of its crosscoder, both below ``root``. Stores that name no weights, and crosscoders that are
        not there, are passed over.
    stage
        The stage that wrote the stores.

    Returns
    -------
    list of str
        One clause a store.
    """
    faults = []
    for name, folder in dictionaries.items():
        trained = all((root / folder / file).exists() for file in (SPEC, WEIGHTS))
        written = read_document(root / name).get("attributes", {}).get(CROSSCODER) if owner(root / name) else None
        expected = weights_hash(root / folder) if trained and written else written
        if written != expected:
            faults.append(
                f"{name}: made with the crosscoder weights {str(written)[:12]}, but {folder} holds "
                f"{str(expected)[:12]}; restore what was moved, or run stage {stage} again with --force"
            )
    return faults
