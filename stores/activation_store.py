"""The activation store: labels once, one array a model and site, committed shard by shard.

Layout (plain Zarr v3, every chunk checksummed with crc32c, every group with a digest of its metadata)::

    activations.zarr/
      tokens/                 prompt, source, position, token_id, segment  [token]   codes
      prompts/                prompt, task, domain, split, cluster         [prompt]  text
      spans/                  start, prompt, source, segment               [span]    runs of equal labels; legends
      <model>/<site>/
        activation            [token, channel]   one chunk is one shard of ``shard_tokens`` tokens
        committed             [shard, record]    tokens and crc32c of a shard, written after its data
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import dask.array
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import (
    BASE_MODEL,
    CHANNEL,
    MODEL,
    RUN,
    STEP,
    TOKEN,
    check_name,
    split_model_id,
    stored_model,
)
from rlgen_stats.schemas.errors import StoreError
from rlgen_stats.schemas.layout import ACTIVATION_ATTRS
from rlgen_stats.schemas.null_views import HALVES_MODEL, noise_source
from rlgen_stats.stores.atomic import ZARR_JSON
from rlgen_stats.stores.digests import read_document
from rlgen_stats.stores.folder import StudyFolder, store_of
from rlgen_stats.stores.labels import TokenLabels
from rlgen_stats.stores.locations import place
from rlgen_stats.stores.seals import GROUPS, check_listed, check_present
from rlgen_stats.stores.shards import PerturbedShards, ShardArray, open_shards, written_chunks
from rlgen_stats.stores.tables import check_is_store, check_store_version

ARRAY: Final = "activation"
COMMITTED: Final = "committed"


def activation_group(model: str, site: str) -> str:
    """Path of one model's array inside the store."""
    split_model_id(model)
    return f"{model}/{check_name(site, 'a site')}"


def root_attributes(path: Path) -> dict[str, Any]:
    """Attributes of an activation store, after checking that it is one this release reads.

    Raises
    ------
    StoreError
        If it is not; the message says what is missing.
    """
    check_is_store(path)
    attrs = dict(read_document(path)["attributes"])
    check_store_version(path, attrs)
    attrs.pop(GROUPS, None)  # of no interest beside the data
    missing = [name for name in ACTIVATION_ATTRS if name not in attrs]
    if missing:
        raise StoreError(f"{path} is not an activation store: attribute {missing[0]!r} is missing.")
    return attrs


def stored_groups(path: Path) -> list[tuple[str, str]]:
    """(model, site) of every array in the store, finished or not."""
    models = sorted(child.name for child in path.iterdir() if "@" in child.name and not child.name.startswith("."))
    return [
        (model, site.name)
        for model in models
        for site in sorted((path / model).iterdir(), key=lambda child: child.name)
        if (site / ZARR_JSON).exists() and site.name != ZARR_JSON
    ]


def stored_models(path: Path | str) -> dict[tuple[str, str], int]:
    """(model, site) -> committed tokens, for everything in the store."""
    path = place(path)
    attrs = root_attributes(path)
    return {key: _committed_tokens(path / "/".join(key), attrs) for key in stored_groups(path)}


def _committed_tokens(group: Path, attrs: dict[str, Any]) -> int:
    """Tokens in the leading run of committed shards."""
    n_tokens, shard = int(attrs["n_tokens"]), int(attrs["shard_tokens"])
    if read_document(group)["attributes"].get("complete"):
        return n_tokens
    written = written_chunks(group / COMMITTED)
    first_missing = next((i for i in range(len(written) + 1) if i not in written), 0)
    return min(first_missing * shard, n_tokens)


def complete_models(path: Path | str, site: str | None = None) -> list[str]:
    """Models whose every token is committed (at ``site``, if given)."""
    n_tokens = int(root_attributes(place(path))["n_tokens"])
    return [m for (m, s), n in stored_models(path).items() if n == n_tokens and site in (None, s)]


def shard_arrays(
    path: Path, models: Sequence[str] | None, site: str | None, *, decoded: bool
) -> tuple[str, list[tuple[str, ShardArray]]]:
    """The site, and ``models`` with their complete arrays at it (default: the only site, all complete models).

    Raises
    ------
    StoreError
        If a model is absent or unfinished, or several sites need a choice.
    """
    n_tokens = int(root_attributes(path)["n_tokens"])
    check_present(path)
    stored = stored_models(path)
    sites = sorted({s for _, s in stored})
    if site is None:
        if len(sites) != 1:
            raise StoreError(f"{path} has the sites {sites}; name one with site=.")
        site = sites[0]
    complete = [m for (m, s), n in stored.items() if n == n_tokens and s == site]
    chosen = complete if models is None else [stored_model(model, complete) for model in models]
    absent = [model for one in chosen for model in _sources(one) if model not in complete]
    if absent or not chosen:
        raise StoreError(
            f"{path} has no complete activations of {absent or 'any model'} at {site!r}; it has {complete}: run the "
            "extract stage, or name others."
        )
    return site, [(model, _array(path, model, site, decoded=decoded)) for model in chosen]


def _sources(model: str) -> tuple[str, ...]:
    """The stored models whose activations make those of ``model``: itself, or base where it is a view of base."""
    source = noise_source(model)
    if source is not None:
        return BASE_MODEL, source
    return (BASE_MODEL if model == HALVES_MODEL else model,)


def _array(path: Path, model: str, site: str, *, decoded: bool) -> ShardArray:
    for one in _sources(model):
        check_listed(path, f"{one}/{site}")
    first, *others = (open_shards(path / one / site / ARRAY, decoded=decoded) for one in _sources(model))
    if not others:
        return first
    other, label = others[0], path / model / site / ARRAY
    if other.shape != first.shape:
        raise StoreError(
            f"{model!r} is base with noise as large as another model's distance from it and expects equal widths, got "
            f"{first.shape[1]} and {other.shape[1]} channels; leave that view out."
        )
    return PerturbedShards(label, first.shape, first.rows, first.stored_type, decoded, base=first, other=other)


def open_tokens(path: StudyFolder | Path | str) -> xr.Dataset:
    """Labels of every token, lazily: coordinates prompt, task, domain, split, cluster, source, position, token_id,
    segment on dimension ``token``; ``sel`` takes the ones made of text.
    """
    path = store_of(path, "activations")
    attrs = root_attributes(path)
    return xr.Dataset(coords=TokenLabels(path).coordinates(), attrs=attrs)


def select_tokens(path: StudyFolder | Path | str, **where: object) -> NDArray[np.int64]:
    """Sorted token ranges [k, 2] (start, stop) that have the given labels; no token is read.

    Parameters
    ----------
    path
        Study folder or activation store.
    **where
        prompt, task, domain, split, cluster, source, segment: a value or several.

    Raises
    ------
    InputError
        If a label or a value is unknown.

    Examples
    --------
    >>> wrong = outcomes.prompt[outcomes.greedy_correct.sel(model="base@0") == 0]  # doctest: +SKIP
    >>> select_tokens(path, segment="completion", domain="out", prompt=wrong)  # doctest: +SKIP
    """
    return TokenLabels(store_of(path, "activations")).ranges(where)


def open_activations(
    path: StudyFolder | Path | str, *, models: Sequence[str] | None = None, site: str | None = None
) -> xr.Dataset:
    """Activations of complete models with all labels: ``activation[model, token, channel]``, lazily.

    Parameters
    ----------
    path
        Study folder or activation store.
    models
        Model ids, ``rl@final`` for a run's last; default all complete ones at the site.
    site
        Site name; default the only one.

    Raises
    ------
    StoreError
        If a model is absent or unfinished, several sites need a choice, or widths differ (name models of one width).
    StoreCorruptError
        When values are computed, if a shard is missing or fails its checksum.

    Notes
    -----
    bfloat16 is returned as float32, which holds it exactly. Computed blocks may be read-only views of the file.

    Examples
    --------
    >>> acts = open_activations("runs/demo")  # doctest: +SKIP
    >>> acts.sel(model="rl@80", task="sciq", segment="completion").activation.mean("token")  # doctest: +SKIP
    """
    path = store_of(path, "activations")
    tokens = open_tokens(path)
    site, named = shard_arrays(path, models, site, decoded=True)
    names, arrays = [model for model, _ in named], [array for _, array in named]
    widths = {array.shape[1] for array in arrays}
    if len(widths) > 1:
        raise StoreError(f"the models have widths {sorted(widths)}; name models of one width with models=.")
    labels = {
        MODEL: (MODEL, np.array(names, dtype=np.str_)),
        RUN: (MODEL, np.array([split_model_id(m)[0] for m in names], dtype=np.str_)),
        STEP: (MODEL, np.array([split_model_id(m)[1] for m in names])),
    }
    dataset = tokens.assign({ARRAY: ((MODEL, TOKEN, CHANNEL), _lazy(arrays))})
    return dataset.assign_attrs(site=site).assign_coords(labels)


class _Stacked:
    """Arrays of several models as one array [model, token, channel]; dask reads one shard of one model at a time."""

    def __init__(self, arrays: list[ShardArray]) -> None:
        self._arrays = arrays
        self.shape = (len(arrays), *arrays[0].shape)
        self.dtype, self.ndim = np.result_type(*(array.dtype for array in arrays)), 3

    def __getitem__(self, key: tuple[slice, ...]) -> NDArray[Any]:
        chosen = self._arrays[key[0]]
        if len(chosen) == 1:
            return chosen[0][key[1:]][None].astype(self.dtype, copy=False)
        return np.stack([array[key[1:]] for array in chosen]).astype(self.dtype, copy=False)

    def __dask_tokenize__(self) -> object:
        return [(str(array.path), array.shape, array.stored_type) for array in self._arrays]


def _lazy(arrays: list[ShardArray]) -> dask.array.Array:
    stacked = _Stacked(arrays)
    chunks = (1, arrays[0].rows, arrays[0].shape[1])
    return dask.array.from_array(
        stacked, chunks=chunks, asarray=False, fancy=False, meta=np.empty((0, 0, 0), stacked.dtype)
    )
