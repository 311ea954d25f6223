"""A digest in every group, so that a change in metadata is detected as reliably as one in data.

Chunks carry checksums; ``zarr.json`` files do not. The attribute ``digest`` of a group is the hash of its other
attributes and of the metadata of its arrays, and is written in the same atomic replacement of ``zarr.json``.

A finished group carries its arrays' metadata in that file too (Zarr's consolidated metadata), of a store that grows by
models as of the last committed one: whatever an append has reached, every reader sees arrays of one length.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from rlgen_stats.schemas.dims import MODEL
from rlgen_stats.schemas.errors import StoreCorruptError
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.stores.atomic import ZARR_JSON, write_json
from rlgen_stats.stores.locations import explain_access_errors

DIGEST: Final = "digest"
CONSOLIDATED: Final = "consolidated_metadata"
SEAL: Final = "seal"
"""Hash of the checksums of a group's chunks (``seals``)."""
COMMITTED_MODELS: Final = "committed_models"
"""Models wholly in an outcome or feature store; an append writes it last."""
_KINDS: Final[dict[str, type]] = dict.fromkeys(("n_tokens", "shard_tokens", "schema_version"), int) | {
    COMMITTED_MODELS: list,
    DIGEST: str,
    SEAL: str,
    "groups": dict,
    "complete": bool,
}
"""Types of the attributes on which reading depends."""


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes (hex); for files that carry no digest of their own."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_document(path: Path) -> dict[str, Any]:
    """``zarr.json`` of the group or array at ``path``.

    Raises
    ------
    StoreCorruptError
        If it is missing, not JSON, no Zarr v3 metadata, or has an attribute of ours that is of another type.
    """
    try:
        with explain_access_errors(path):
            document = json.loads((path / ZARR_JSON).read_text(encoding="utf-8"))
        if document["zarr_format"] != 3 or document["node_type"] not in ("group", "array"):
            raise KeyError("node_type")
        shape = document["shape"] if document["node_type"] == "array" else []
        if not isinstance(shape, list) or any(type(size) is not int for size in shape):
            raise TypeError("shape is of another type")
        attributes = document.setdefault("attributes", {})
        if not isinstance(attributes, dict):
            raise TypeError("attributes is of another type")
        for name in _KINDS.keys() & attributes.keys():
            if not isinstance(attributes[name], _KINDS[name]):
                raise TypeError(f"{name} is of another type")
    except (ValueError, KeyError, TypeError, RecursionError, FileNotFoundError, NotADirectoryError) as error:
        raise StoreCorruptError(f"{path / ZARR_JSON} is not Zarr v3 metadata ({error}); restore it.") from error
    return dict(document)


def attributes_of(path: Path) -> dict[str, Any]:
    """Attributes of the group or array at ``path``; errors as :func:`read_document`."""
    return dict(read_document(path).get("attributes", {}))


def n_committed(attributes: dict[str, Any]) -> int | None:
    """Committed models of a group that grows by models; None of others."""
    return len(attributes[COMMITTED_MODELS]) if COMMITTED_MODELS in attributes else None


def write_digest(path: Path, attributes: dict[str, Any] | None = None) -> None:
    """Set attributes of a group and its digest in one atomic replacement; an absent group is created empty."""
    if not (path / ZARR_JSON).exists():
        path.mkdir(parents=True, exist_ok=True)
    write_json(path / ZARR_JSON, with_digest(path, attributes))


def with_digest(path: Path, attributes: dict[str, Any] | None = None) -> dict[str, Any]:
    """What :func:`write_digest` writes."""
    document: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    if (path / ZARR_JSON).exists():
        document = read_document(path)
    document["attributes"] = document.get("attributes", {}) | (attributes or {})
    if {COMMITTED_MODELS, SEAL} & document["attributes"].keys():
        metadata = arrays_of(path, n_committed(document["attributes"]))
        document[CONSOLIDATED] = {"kind": "inline", "must_understand": False, "metadata": metadata}
    # Last, because the digest covers everything above.
    document["attributes"][DIGEST] = metadata_digest(path, document)
    return document


def metadata_digest(path: Path, document: dict[str, Any]) -> str:
    """The digest of a group: a hash of its attributes and of the metadata of its arrays."""
    attributes = {name: value for name, value in document.get("attributes", {}).items() if name != DIGEST}
    rest = {name: value for name, value in document.items() if name != "attributes"}
    return content_hash([rest, attributes, arrays_of(path, n_committed(attributes))])


def arrays_of(path: Path, n_models: int | None = None) -> dict[str, dict[str, Any]]:
    """Metadata of the arrays directly in a group; an append that was not committed grew none beyond ``n_models``."""
    if not path.exists():  # an object store has no empty folders
        return {}
    documents = {child.name: read_document(child) for child in zarr_nodes(path)}
    return {name: _without_uncommitted(doc, n_models) for name, doc in documents.items() if doc["node_type"] == "array"}


def zarr_nodes(path: Path) -> list[Path]:
    """Groups and arrays directly in a group, by name; hidden folders are locks and unfinished writes."""
    children = sorted(path.iterdir(), key=lambda child: child.name)
    return [child for child in children if not child.name.startswith(".") and (child / ZARR_JSON).exists()]


def _without_uncommitted(array: dict[str, Any], n_models: int | None) -> dict[str, Any]:
    names = array.get("dimension_names") or []
    if n_models is None or MODEL not in names:
        return array
    shape = list(array["shape"])
    shape[names.index(MODEL)] = n_models
    return array | {"shape": shape}
