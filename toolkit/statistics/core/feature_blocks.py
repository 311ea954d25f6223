"""Feature blocks: every statistic sees all prompts of a few features at a time.

A statistic is a plain function of numpy blocks; :func:`map_features` runs it over the feature chunks of lazy arrays and
puts the pieces together again, so that the numbers do not depend on the chunking and memory is set by the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import dask
import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import ARM, FEATURE, MODEL, PROMPT, RUN, SPLIT, STEP, split_model_id
from rlgen_stats.schemas.errors import InputError, RefusedError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Block = dict[str, NDArray[Any]]

FEATURE_BLOCK: Final = 512
"""Features per block when the input has no chunks of its own (the chunk size of features.zarr)."""

DEFAULT_MIN_FIRING: Final = 10
"""Prompts, pooled over the compared models, on which a testable feature fires (METHOD.md section 3, rule 4)."""

MIN_CLUSTERS: Final = 6
"""Clusters below which a sign flip over clusters cannot reach p = .05 (2 / 2^5 = .0625)."""

SOURCE_ATTRS: Final = ("readout", "text_mode", "crosscoder", "scale")
"""What a table of numbers must say about the features it was computed from, copied to every result."""

TOKEN_WARNING: Final = (
    "rows are tokens taken as independent: at ICC .05 and 64 tokens a prompt a nominal 5% test rejects 32% of true "
    "nulls"
)
"""Stands in the attributes of every result whose caller overrode the refusal of ``unit='token'``."""

_REMEDIES: Final = {
    "readout": "encode both with the same readout",
    "text_mode": "summarise both on the same text mode (forced or onpolicy)",
    "crosscoder": "encode both with the same crosscoder, or match features across dictionaries first",
    "scale": "encode both in the same scale",
    "study_id": "use stores of one study",
}


@dataclass(frozen=True)
class Mapped:
    """Result of :func:`map_features`: per-feature arrays and states folded over blocks, all lazy."""

    features: dict[str, da.Array]
    states: dict[str, da.Array]


def map_features(
    function: Callable[..., Block],
    arrays: Sequence[da.Array],
    *,
    outputs: Mapping[str, tuple[int, ...]],
    states: Mapping[str, tuple[tuple[int, ...], Callable[..., da.Array]]] | None = None,
    **options: Any,
) -> Mapped:
    """Run ``function(*blocks, **options)`` on every feature block; nothing is computed yet.

    Parameters
    ----------
    function
        Takes one numpy block [..., prompt, feature] per array, returns float64 arrays by name.
    arrays
        Dask arrays chunked alike along the last axis (feature) and whole along all others.
    outputs
        Name -> leading shape of each per-feature result [..., feature].
    states
        Name -> (shape, reduction over a new first axis), for results that are folded over blocks, e.g. ``da.max``.
    """
    sizes = arrays[0].chunks[-1]
    columns = [array.to_delayed().reshape(-1) for array in arrays]
    call = dask.delayed(function, pure=True)
    parts = [call(*blocks, **options) for blocks in zip(*columns, strict=True)]
    features = {
        name: da.concatenate(
            [
                da.from_delayed(part[name], (*shape, size), dtype=np.float64)
                for part, size in zip(parts, sizes, strict=True)
            ],
            axis=-1,
        )
        for name, shape in outputs.items()
    }
    folded = {
        name: reduce(da.stack([da.from_delayed(part[name], shape, dtype=np.float64) for part in parts]), axis=0)
        for name, (shape, reduce) in (states or {}).items()
    }
    return Mapped(features, folded)


def feature_arrays(
    features: xr.Dataset, variables: Sequence[str], models: Sequence[str], prompts: NDArray[np.bool_] | None = None
) -> tuple[list[da.Array], bool]:
    """Arrays [model, prompt, feature] of ``variables``, chunked over features only, and whether the input was lazy.

    Raises
    ------
    InputError
        If a variable or a model is not in ``features``.
    """
    missing = [name for name in variables if name not in features]
    if missing:
        raise InputError(f"the features have no variable {missing[0]!r}; they have {sorted(map(str, features))}.")
    check_models(features, models)
    chosen = features[list(variables)].sel({MODEL: list(models)})
    if prompts is not None:
        chosen = chosen.isel({PROMPT: np.flatnonzero(prompts)})
    lazy = any(chosen[name].chunks is not None for name in variables)
    first = chosen[variables[0]].transpose(MODEL, PROMPT, FEATURE)
    width = first.chunks[-1] if first.chunks is not None else FEATURE_BLOCK
    arrays = []
    for name in variables:
        values = chosen[name].transpose(MODEL, PROMPT, FEATURE).data
        array = values if isinstance(values, da.Array) else da.from_array(values, chunks=(-1, -1, FEATURE_BLOCK))
        arrays.append(array.rechunk((-1, -1, width)))
    return arrays, lazy


def check_models(features: xr.Dataset, models: Sequence[str]) -> None:
    """Refuse model ids that are not there, and repeated ones.

    Raises
    ------
    InputError
        Naming the unknown or repeated model and what there is.
    """
    there = [str(model) for model in features[MODEL].values]
    unknown = [model for model in models if model not in there]
    if unknown:
        raise InputError(f"model {unknown[0]!r} is not in the data; expected one of {there}.")
    if len(set(models)) != len(models) or not models:
        raise InputError(f"name at least one model and each only once, got {list(models)}.")


def canonical(dataset: xr.Dataset, *, repeated: bool = False) -> xr.Dataset:
    """``dataset`` with its prompts in order of their ids, lazily: what is random is keyed by prompt, not by position.

    Parameters
    ----------
    dataset
        With dimension ``prompt``; returned as it is where prompts have no ids or are in order.
    repeated
        Whether one id may stand on several rows (tokens as units); such rows keep their order.

    Raises
    ------
    RefusedError
        If an id stands on several rows: rows of one prompt are not independent.
    """
    if PROMPT not in dataset.coords:
        return dataset
    ids = np.asarray(dataset[PROMPT].values).astype(np.str_)
    order = np.argsort(ids, kind="stable")
    twice = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if len(twice) and not repeated:
        raise RefusedError(
            f"prompt {str(ids[order][twice[0]])!r} stands on several rows, which would count as independent units; "
            "summarise each prompt into one row (or unit='token', allow_token_unit=True)."
        )
    if np.array_equal(order, np.arange(len(order))):
        return dataset
    # Prompts are joined before they are re-ordered: else every new piece would be cut from every old one.
    joined = {
        name: variable.chunk({PROMPT: -1})
        for name, variable in dataset.variables.items()
        if PROMPT in variable.dims and variable.chunks is not None
    }
    labels = {name: variable for name, variable in joined.items() if name in dataset.coords}
    values = {name: variable for name, variable in joined.items() if name not in labels}
    return dataset.assign(values).assign_coords(labels).isel({PROMPT: order})


def check_unit(unit: str, allow_token_unit: bool = False) -> None:
    """Refuse tests that count tokens as independent.

    Raises
    ------
    RefusedError
        For ``unit="token"`` without ``allow_token_unit``.
    InputError
        For anything else that is not ``"prompt"``.
    """
    if unit == "token" and not allow_token_unit:
        raise RefusedError(
            "unit='token' would count dependent tokens as independent evidence (at ICC .05 a nominal 5% test rejects "
            "32% of true nulls); use unit='prompt', and clusters='cluster' where prompts share a template, or, if rows "
            "are tokens known to be independent, allow_token_unit=True."
        )
    if unit not in ("prompt", "token"):
        raise InputError(f"unit must be 'prompt', got {unit!r}; name a coarser unit with clusters=.")


def unit_attrs(unit: str, clusters: str | None, codes: IntArray | None) -> dict[str, str]:
    """Attribute ``unit`` of a result, and ``warning`` where tokens were taken as units."""
    if codes is not None and clusters is not None:
        return {"unit": clusters}
    return {"unit": unit} | ({"warning": TOKEN_WARNING} if unit == "token" else {})


def check_comparable(*datasets: xr.Dataset | xr.DataArray, keys: Sequence[str] = tuple(_REMEDIES)) -> None:
    """Refuse to combine datasets whose attributes say that their numbers mean different things.

    Parameters
    ----------
    datasets
        Features, outcomes or results; an attribute that one of them lacks is not compared.
    keys
        Attributes that must agree; by default readout, text_mode, crosscoder, scale and study_id.

    Raises
    ------
    RefusedError
        Naming the attribute, both values and the remedy.
    """
    for key in keys:
        values = list(dict.fromkeys(str(d.attrs[key]) for d in datasets if d.attrs.get(key) is not None))
        if len(values) > 1:
            raise RefusedError(
                f"datasets with {key} {values[0]!r} and {values[1]!r} cannot be combined: their numbers are not "
                f"comparable; {_REMEDIES.get(key, 'compute each apart')}."
            )


def check_gauge(features: xr.Dataset, what: str) -> None:
    """Refuse to rank raw activations of different features against each other.

    Raises
    ------
    RefusedError
        Unless ``features`` are in contribution scale.
    """
    scale = features.attrs.get("scale")
    if scale != "contribution":
        raise RefusedError(
            f"{what} of different features can be compared only in contribution scale (f ||d||), these features have "
            f"scale={scale!r}; encode them with scale='contribution'."
        )


def source_attrs(features: xr.Dataset) -> dict[str, Any]:
    """Attributes of ``features`` that every number computed from them must carry."""
    return {name: features.attrs[name] for name in SOURCE_ATTRS if name in features.attrs}


def cluster_codes(dataset: xr.Dataset, clusters: str | None) -> IntArray | None:
    """Integer code of each prompt's cluster; None when prompts are the units (no clusters, or each its own).

    Raises
    ------
    InputError
        If the coordinate is not there.
    """
    if clusters is None:
        return None
    if clusters not in dataset.coords or dataset[clusters].dims != (PROMPT,):
        raise InputError(
            f"clusters={clusters!r} is no label of the prompts; expected one of "
            f"{sorted(str(name) for name, c in dataset.coords.items() if c.dims == (PROMPT,))}."
        )
    codes: IntArray = np.unique(np.asarray(dataset[clusters].values).astype(np.str_), return_inverse=True)[1]
    return None if len(np.unique(codes)) == len(codes) else codes.reshape(-1).astype(np.int64)


def cluster_sums(values: FloatArray, codes: IntArray | None) -> FloatArray:
    """Sums over the prompts (axis 0) of each cluster; ``values`` itself when prompts are the units."""
    if codes is None:
        return values
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    sums: FloatArray = np.add.reduceat(values[order], starts, axis=0)
    return sums


def unit_means(values: FloatArray, codes: IntArray | None) -> FloatArray:
    """Means over the prompts (axis 0) of each cluster: one row a unit, every unit with the same weight."""
    if codes is None:
        return values
    sizes = np.unique(codes, return_counts=True)[1].astype(np.float64)
    means: FloatArray = cluster_sums(values, codes) / sizes.reshape(-1, *[1] * (values.ndim - 1))
    return means


def check_clusters(codes: IntArray | None) -> None:
    """Refuse tests on fewer than six clusters.

    Raises
    ------
    RefusedError
        With the number there is.
    """
    n = None if codes is None else len(np.unique(codes))
    if n is not None and n < MIN_CLUSTERS:
        raise RefusedError(
            f"{n} clusters cannot carry a test (the smallest two-sided sign-flip p is {2.0 ** (1 - n):.3g}); give "
            f"at least {MIN_CLUSTERS} clusters, or clusters=None if the prompts are independent."
        )


def present_prompts(features: xr.Dataset, models: Sequence[str]) -> NDArray[np.bool_]:
    """Prompts with at least one summarised token in every one of ``models``."""
    if "n_tokens" not in features:
        return np.ones(features.sizes[PROMPT], dtype=bool)
    counts = features["n_tokens"].sel({MODEL: list(models)}).transpose(MODEL, PROMPT).values
    return np.asarray((counts > 0).all(axis=0))


def in_split(dataset: xr.Dataset, split: str) -> NDArray[np.bool_]:
    """Which prompts belong to ``split``."""
    labels = np.asarray(dataset[SPLIT].values).astype(np.str_)
    return np.asarray(labels == split)


def run_models(features: xr.Dataset, run: str) -> list[str]:
    """Checkpoints of ``run`` in order of step.

    Raises
    ------
    InputError
        If the run has no checkpoint in ``features``.
    """
    models = [str(model) for model in features[MODEL].values]
    own = sorted((model for model in models if split_model_id(model)[0] == run), key=lambda m: split_model_id(m)[1])
    if not own:
        raise InputError(
            f"run {run!r} has no checkpoint in the data; the runs are {sorted({split_model_id(m)[0] for m in models})}."
        )
    return own


def model_coords(source: xr.Dataset, models: Sequence[str]) -> dict[str, tuple[str, NDArray[Any]]]:
    """Coordinates model, run, step and arm of ``models``; where no arm is recorded each run is its own."""
    parts = [split_model_id(model) for model in models]
    arms = (
        np.asarray(source[ARM].sel({MODEL: list(models)}).values).astype(np.str_)
        if ARM in source.coords
        else np.array([run for run, _ in parts], dtype=np.str_)
    )
    return {
        MODEL: (MODEL, np.array(list(models), dtype=np.str_)),
        RUN: (MODEL, np.array([run for run, _ in parts], dtype=np.str_)),
        STEP: (MODEL, np.array([step for _, step in parts], dtype=np.int64)),
        ARM: (MODEL, arms),
    }


def feature_coord(features: xr.Dataset) -> dict[str, tuple[str, NDArray[Any]]]:
    """Coordinate feature: the one of ``features``, else 0..F-1."""
    size = features.sizes[FEATURE]
    values = np.asarray(features[FEATURE].values) if FEATURE in features.coords else np.arange(size)
    return {FEATURE: (FEATURE, values)}


def feature_ranks(features: xr.Dataset) -> IntArray:
    """Rank of each feature's label: breaks ties between features in the same way whatever their order."""
    labels = feature_coord(features)[FEATURE][1]
    ranks: IntArray = np.argsort(np.argsort(labels, kind="stable"), kind="stable").astype(np.int64)
    return ranks


def finish(dataset: xr.Dataset, lazy: bool) -> xr.Dataset:
    """Lazy in, lazy out, each variable one chunk (results are small, and stores chunk as they like)."""
    if not lazy:
        return dataset.compute()
    whole = {name: array.variable.chunk(dict.fromkeys(array.dims, -1)) for name, array in dataset.data_vars.items()}
    return dataset.assign(whole)
