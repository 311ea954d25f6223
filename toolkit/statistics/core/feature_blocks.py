"""Feature blocks: a statistic is computed from all prompts of a few features at a time.

A statistic is a plain function of numpy blocks; :func:`map_features` runs it over the feature chunks of lazy arrays and
concatenates the results, so that the numbers do not depend on the chunking and memory is that of one block.
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

from rlgen_stats.schemas.dims import FEATURE, MODEL, PROMPT
from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.stores.tables import FEATURE_BLOCK
from rlgen_stats.toolkit.statistics.core.coordinates import find_models

Block = dict[str, NDArray[Any]]


DEFAULT_MIN_FIRING: Final = 10
"""Fewest prompts, pooled over the compared models, on which a testable feature fires (docs/method.md 3, rule 4)."""


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
    chosen = features[list(variables)].sel({MODEL: find_models(features, models)})
    if prompts is not None:
        chosen = chosen.isel({PROMPT: np.flatnonzero(prompts)})
    lazy = any(chosen[name].chunks is not None for name in variables)
    first = chosen[variables[0]].transpose(MODEL, PROMPT, FEATURE)
    width = first.chunks[-1] if first.chunks is not None else FEATURE_BLOCK  # without chunks, those of features.zarr
    arrays = []
    for name in variables:
        values = chosen[name].transpose(MODEL, PROMPT, FEATURE).data
        array = values if isinstance(values, da.Array) else da.from_array(values, chunks=(-1, -1, FEATURE_BLOCK))
        arrays.append(array.rechunk((-1, -1, width)))
    return arrays, lazy


def in_prompt_order(dataset: xr.Dataset, *, repeated: bool = False) -> xr.Dataset:
    """``dataset`` with its prompts sorted by id, lazily, so that random draws belong to prompts and not to positions.

    Parameters
    ----------
    dataset
        With dimension ``prompt``; returned unchanged where prompts have no ids or are sorted.
    repeated
        Whether several rows may have one id (tokens as units); such rows keep their order.

    Raises
    ------
    RefusedError
        If several rows have one id: rows of one prompt are not independent.
    """
    if PROMPT not in dataset.coords:
        return dataset
    ids = np.asarray(dataset[PROMPT].values).astype(np.str_)
    order = np.argsort(ids, kind="stable")
    repeats = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if len(repeats) and not repeated:
        raise RefusedError(
            f"prompt {str(ids[order][repeats[0]])!r} has several rows, which would count as independent units; "
            "summarise each prompt into one row (or unit='token', allow_token_unit=True)."
        )
    if np.array_equal(order, np.arange(len(order))):
        return dataset
    # One chunk over all prompts before sorting: otherwise every sorted chunk would take a piece of every old chunk.
    joined = {
        name: variable.chunk({PROMPT: -1})
        for name, variable in dataset.variables.items()
        if PROMPT in variable.dims and variable.chunks is not None
    }
    labels = {name: variable for name, variable in joined.items() if name in dataset.coords}
    values = {name: variable for name, variable in joined.items() if name not in labels}
    return dataset.assign(values).assign_coords(labels).isel({PROMPT: order})


def finish(dataset: xr.Dataset, lazy: bool) -> xr.Dataset:
    """Computed, or where the input was lazy still lazy with one chunk a variable (results are small)."""
    if not lazy:
        return dataset.compute()
    whole = {name: array.variable.chunk(dict.fromkeys(array.dims, -1)) for name, array in dataset.data_vars.items()}
    return dataset.assign(whole)
