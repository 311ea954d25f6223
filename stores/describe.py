"""What is inside a store, the way a person asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import zarr

from rlgen_stats.schemas.dims import MODEL
from rlgen_stats.stores.activations import stored_models
from rlgen_stats.stores.results import result_groups
from rlgen_stats.stores.tables import COMMITTED, check_is_store


def describe(path: Path | str) -> dict[str, dict[str, Any]]:
    """Facts about every store below ``path`` (a store, or a study folder): sizes, models, dimensions, provenance.

    Raises
    ------
    StoreError
        If there is none.
    """
    path = Path(path)
    stores = [path] if (path / "zarr.json").exists() else sorted(path.glob("*.zarr")) if path.is_dir() else []
    if not stores:
        check_is_store(path)
    found: dict[str, dict[str, Any]] = {}
    for store in stores:
        groups = result_groups(store) if not zarr.open_group(store, mode="r").attrs.get("study_id") else []
        if groups:
            found |= {f"{store.name}/{group}": _facts(store / group) for group in groups}
        else:
            found[store.name] = _facts(store)
    return found


def _facts(store: Path) -> dict[str, Any]:
    group = zarr.open_group(store, mode="r")
    attrs = dict(group.attrs)
    sizes = {
        str(name): int(size)
        for _, array in group.arrays()
        for name, size in zip(array.metadata.dimension_names or (), array.shape, strict=False)
    }
    files = [file for file in store.rglob("*") if file.is_file()]
    facts: dict[str, Any] = {"dimensions": sizes} if sizes else {}
    if (store / "tokens").exists():
        n_tokens = int(attrs["n_tokens"])
        facts["tokens"] = n_tokens
        facts["models"] = {
            f"{model}/{site}": "complete" if n == n_tokens else f"{n} of {n_tokens} tokens"
            for (model, site), n in stored_models(store).items()
        }
    elif COMMITTED in attrs:
        facts["models"] = attrs[COMMITTED]
    elif MODEL in sizes:
        facts["models"] = sizes[MODEL]
    facts["arrays"] = sorted(str(name) for name, _ in group.arrays())
    facts["bytes"], facts["files"] = sum(file.stat().st_size for file in files), len(files)
    keep = (
        "schema_version",
        "study_id",
        "spec_hash",
        "text_mode",
        "readout",
        "scale",
        "test",
        "null",
        "family",
        "seed",
    )
    return facts | {name: attrs[name] for name in keep if name in attrs}
