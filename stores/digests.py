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
from rlgen_stats.schemas.errors import StoreCorruptError, StoreError
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.stores.atomic import UNREADABLE, ZARR_JSON, write_json
from rlgen_stats.stores.locations import check_regular, explain_access_errors

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
    with check_regular(file).open("rb") as handle:
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
            document = json.loads(check_regular(path / ZARR_JSON).read_text(encoding="utf-8"))
        if document["zarr_format"] != 3 or document["node_type"] not in ("group", "array"):
            raise KeyError("node_type")
        arrays = dict(document.get(CONSOLIDATED) or {}).get("metadata", {})
        for array in [document] if document["node_type"] == "array" else arrays.values():
            _check_array(array)
        attributes = document.setdefault("attributes", {})
        if not isinstance(attributes, dict):
            raise TypeError("attributes is of another type")
        for name in _KINDS.keys() & attributes.keys():
            if type(attributes[name]) is not _KINDS[name]:
                raise TypeError(f"{name} is of another type")
    except (*UNREADABLE, FileNotFoundError, NotADirectoryError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreCorruptError(f"{path / ZARR_JSON} is not Zarr v3 metadata ({error}); restore it.") from error
    return dict(document)


def _check_array(metadata: dict[str, Any]) -> None:
    """Refuse what no array here has, and on which readers of Zarr fail in many ways."""
    shape, chunk = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
    for sizes, least in ((shape, 0), (chunk, 1)):
        if not isinstance(sizes, list) or any(type(size) is not int or not least <= size < 1 << 63 for size in sizes):
            raise TypeError(f"a size of an array is no whole number from {least} on")
    names = metadata.get("dimension_names") or [None] * len(shape)
    if not isinstance(names, list) or {len(names), len(chunk)} != {len(shape)}:
        raise TypeError("sizes, chunks and names of the dimensions are not as many")
    if metadata["chunk_key_encoding"].get("configuration", {}).get("separator", "/") not in ("/", "."):
        raise TypeError("separator is neither / nor .")


def read_checked(path: Path) -> dict[str, Any]:
    """:func:`read_document` of a group, refused where the document alone shows that it was changed.

    Raises
    ------
    StoreCorruptError
        Also if a finished group's digest is not that of its attributes and of the metadata that readers use.
    """
    document = read_document(path)
    attributes = document["attributes"]
    arrays = dict(document.get(CONSOLIDATED) or {}).get("metadata")
    if arrays is not None and DIGEST in attributes and attributes[DIGEST] != _digest_of(document, arrays):
        raise StoreCorruptError(
            f"{path / ZARR_JSON} was changed since it was written (the digest differs); restore it or compute it again."
        )
    return document


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
    return _digest_of(document, arrays_of(path, n_committed(document.get("attributes", {}))))


def _digest_of(document: dict[str, Any], arrays: dict[str, Any]) -> str:
    attributes = {name: value for name, value in document.get("attributes", {}).items() if name != DIGEST}
    rest = {name: value for name, value in document.items() if name != "attributes"}
    return content_hash([rest, attributes, arrays])


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
    if shape[names.index(MODEL)] < n_models:
        raise StoreCorruptError(f"an array has {shape[names.index(MODEL)]} of {n_models} committed models; restore it.")
    shape[names.index(MODEL)] = n_models
    return array | {"shape": shape}
