"""A summary of what a store contains."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import xarray as xr

from rlgen_stats.schemas.dims import DOMAIN, MODEL, PROMPT, SEGMENT, SPLIT, TASK, split_dictionary, split_model_id
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.stores.activation_store import ARRAY, root_attributes, stored_groups, stored_models
from rlgen_stats.stores.atomic import ZARR_JSON, explain_damage
from rlgen_stats.stores.digests import COMMITTED_MODELS, arrays_of, read_document
from rlgen_stats.stores.labels import TokenLabels, has_labels
from rlgen_stats.stores.locations import filesystem, is_remote, place
from rlgen_stats.stores.results import result_groups
from rlgen_stats.stores.shards import open_shards
from rlgen_stats.stores.tables import check_not_newer, open_lazily
from rlgen_stats.stores.verify import stores_below

_VALUES: Final = 8
"""Values of a variable that a summary counts, the most frequent ones."""
_SHOWN_ATTRS: Final = (
    "schema_version",
    "study_id",
    "spec_hash",
    "text_mode",
    "readout",
    "scale",
    "test",
    "null",
    "unit",
    "family",
    "family_size",
    "seed",
)


def describe(path: Path | str, names: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Facts about every store at ``path`` (a store, or a study folder; local or a URL).

    Parameters
    ----------
    path
        Where they are.
    names
        Only these, by name or pattern: ``features.zarr``, ``results.zarr/drift*``, or an analysis alone, ``drift``.

    Returns
    -------
    dict
        Store, or ``results.zarr/<analysis>`` -> its facts: ``models`` (run, step, site, tokens, dtype, width,
        completeness), ``tokens``, ``segments``, ``prompts`` per task, domain and split, ``arrays`` with shapes and
        types, ``bytes`` on disk and uncompressed, ``files``, ``compression``, and provenance. Of an analysis that is
        named or stands alone also ``summary``: what its variables hold.

    Raises
    ------
    StoreError
        If there is none.
    InputError
        If a name is none of theirs.
    """
    found: dict[str, Path] = {}
    analyses: set[str] = set()
    for name, store in stores_below(place(path)).items():
        groups = [] if read_document(store).get("attributes", {}).get("study_id") else result_groups(store)
        found |= {f"{name}/{group}": store / group for group in groups} if groups else {name: store}
        analyses |= {f"{name}/{group}" for group in groups}
    for pattern in names:
        if not any(_is_named(name, pattern) for name in found):
            known = dict.fromkeys(split_dictionary(name.rpartition("/")[2])[0] for name in found)
            near = get_close_matches(pattern.rpartition("/")[2], known, cutoff=0.5)
            close = f", but {' and '.join(map(repr, near))}" if near else ""
            raise InputError(
                f"{path} has no {pattern!r}{close}; list its {len(found)} stores and analyses with: rlgen-stats "
                f"inspect {path}."
            )
    chosen = [name for name in found if not names or any(_is_named(name, pattern) for pattern in names)]
    facts = {name: _facts(found[name]) for name in chosen}
    for name in analyses & set(chosen) if names or len(chosen) == 1 else ():
        facts[name]["summary"] = _summary(open_lazily(found[name]))
    return facts


def _is_named(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition("/")[2], pattern)


def _summary(dataset: xr.Dataset) -> dict[str, dict[str, Any]]:
    """Variable -> how often each of its values occurs, of texts and truths; else least, mean, largest and missing."""
    summary: dict[str, dict[str, Any]] = {}
    for name, variable in dataset.data_vars.items():
        values = np.asarray(variable.values).ravel()
        if values.dtype.kind in "iuf":
            there = values[np.isfinite(values)]
            facts = {"least": there.min(), "mean": there.mean(), "largest": there.max()} if len(there) else {}
            summary[str(name)] = {key: float(value) for key, value in facts.items()}
            summary[str(name)] |= {"missing": len(values) - len(there)}
        else:
            counts = Counter(map(str, values.tolist())).most_common(_VALUES)
            summary[str(name)] = dict(counts) | (
                {"others": len(values) - sum(n for _, n in counts)} if len(counts) == _VALUES else {}
            )
    return summary


def _facts(store: Path) -> dict[str, Any]:
    attrs = read_document(store).get("attributes", {})
    check_not_newer(store, attrs.get("schema_version", 0))
    with explain_damage(store):
        facts = _activation_facts(store) if has_labels(store) else _table_facts(store, attrs)
    sizes = _files(store)
    facts["bytes"], facts["files"] = sum(sizes), len(sizes)
    if facts.get("uncompressed_bytes"):
        facts["compression"] = round(facts["uncompressed_bytes"] / max(1, facts["bytes"]), 2)
    facts |= {name: attrs[name] for name in _SHOWN_ATTRS if name in attrs}
    return facts | _provenance(store, attrs)


def _provenance(store: Path, attrs: dict[str, Any]) -> dict[str, Any]:
    if "provenance" not in attrs:
        return {}
    with explain_damage(store / ZARR_JSON):
        provenance = json.loads(attrs["provenance"])
        return {"written_by": {"git_commit": provenance.get("git_commit"), **provenance.get("packages", {})}}


def _files(store: Path) -> list[int]:
    """Bytes of every file."""
    if is_remote(store):
        listed = filesystem(store).find(store.path, detail=True)  # type: ignore[attr-defined]
        return [int(entry["size"]) for entry in listed.values()]
    return [os.stat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(store) for name in names]


def _activation_facts(store: Path) -> dict[str, Any]:
    attrs = root_attributes(store)
    n_tokens = int(attrs["n_tokens"])
    labels = TokenLabels(store)
    committed = stored_models(store)
    models, uncompressed = [], 0
    for model, site in stored_groups(store):
        array = open_shards(store / model / site / ARRAY, decoded=False)
        run, step = split_model_id(model)
        done = committed[model, site]
        size = done * array.shape[1] * array.dtype.itemsize
        uncompressed += size
        array_facts = {"width": array.shape[1], "dtype": array.stored_type, "uncompressed_bytes": size}
        progress = {"tokens": done, "complete": done == n_tokens}
        models.append({"model": model, "run": run, "step": step, "site": site} | array_facts | progress)
    length = np.diff(np.append(labels.spans["start"].values, n_tokens))
    segments = labels.spans[SEGMENT].values
    return {
        "tokens": n_tokens,
        "shard_tokens": int(attrs["shard_tokens"]),
        "segments": {
            name: int(length[segments == code].sum()) for code, name in enumerate(labels.spans.attrs["segments"])
        },
        "prompts": _prompts(labels.prompts),
        "models": models,
        "uncompressed_bytes": uncompressed,
    }


def _table_facts(store: Path, attrs: dict[str, Any]) -> dict[str, Any]:
    arrays = arrays_of(store, len(attrs[COMMITTED_MODELS]) if COMMITTED_MODELS in attrs else None)
    facts: dict[str, Any] = {
        "dimensions": {
            str(name): int(size)
            for array in arrays.values()
            for name, size in zip(array.get("dimension_names") or (), array["shape"], strict=False)
        },
        "arrays": {
            name: {"dims": array.get("dimension_names") or [], "dtype": _type(array), "shape": array["shape"]}
            for name, array in sorted(arrays.items())
        },
    }
    if COMMITTED_MODELS in attrs:
        facts["models"] = [{"model": model, "complete": True} for model in attrs[COMMITTED_MODELS]]
    dataset = open_lazily(store)
    if COMMITTED_MODELS not in attrs and MODEL in dataset.coords:
        facts["models"] = [{"model": str(model)} for model in dataset[MODEL].values]
    if TASK in dataset.coords and dataset[TASK].dims == (PROMPT,):
        facts["prompts"] = _prompts(dataset)
    facts["uncompressed_bytes"] = int(sum(v.nbytes for v in dataset.variables.values() if v.dtype.kind != "O"))
    return facts


def _type(array: dict[str, Any]) -> str:
    kind = array["data_type"]
    return str(kind["name"]) if isinstance(kind, dict) else str(kind)


def _prompts(labels: Any) -> dict[str, Any]:
    """Number of prompts in all and per task, with domain and splits."""
    table = pd.DataFrame({name: np.asarray(labels[name].values) for name in (TASK, DOMAIN, SPLIT)})
    per_task = table.groupby([TASK, DOMAIN, SPLIT]).size()
    tasks: dict[str, Any] = {}
    for task, domain, split, n in per_task.reset_index(name="n").itertuples(index=False):
        entry = tasks.setdefault(str(task), {"domain": str(domain), "prompts": 0, "splits": {}})
        entry["prompts"] += int(n)
        entry["splits"][str(split)] = entry["splits"].get(str(split), 0) + int(n)
    return {"total": len(table), "tasks": tasks}
