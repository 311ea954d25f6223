"""Labels of models, runs, features and splits: checked, looked up, and put on results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import ARM, FEATURE, MODEL, RUN, SPLIT, STEP, split_model_id, stored_model
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.numerics import IntArray


def find_models(features: xr.Dataset, models: Sequence[str]) -> list[str]:
    """Ids of models in the data; ``rl@final`` is the last checkpoint of that run.

    Raises
    ------
    InputError
        If one is unknown, which lists the known ones, or named twice.
    """
    known = [str(model) for model in features[MODEL].values]
    found = [stored_model(str(model), known) for model in models]
    unknown = [model for model in found if model not in known]
    if unknown:
        raise InputError(f"model {unknown[0]!r} is not in the data; expected one of {known}.")
    if len(set(found)) != len(found) or not found:
        raise InputError(f"name at least one model and each only once, got {list(models)}.")
    return found


def compared_models(features: xr.Dataset, reference: str, models: Sequence[str] | None) -> tuple[str, list[str]]:
    """The reference and the models compared with it, by default all others.

    Raises
    ------
    InputError
        If one is unknown or named twice, the reference among them, or nothing is left to compare.
    """
    (reference,) = find_models(features, [reference])
    every = [str(model) for model in features[MODEL].values if model != reference]
    compared = every if models is None else find_models(features, models) if models else []
    if not compared or reference in compared:
        raise InputError(f"name at least one model beside the reference {reference!r}, got {compared}.")
    return reference, compared


def run_models(features: xr.Dataset, run: str) -> list[str]:
    """Checkpoints of ``run`` in order of step.

    Raises
    ------
    InputError
        If the run has no checkpoint in ``features``.
    """
    models = [str(model) for model in features[MODEL].values]
    of_run = [model for model in models if split_model_id(model)[0] == run]
    if not of_run:
        raise InputError(
            f"run {run!r} has no checkpoint in the data; the runs are {sorted({split_model_id(m)[0] for m in models})}."
        )
    return sorted(of_run, key=lambda model: split_model_id(model)[1])


def model_coords(source: xr.Dataset, models: Sequence[str]) -> dict[str, tuple[str, NDArray[Any]]]:
    """Coordinates model, run, step and arm of ``models``; a run without a recorded arm is an arm of its own."""
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
    """Coordinate ``feature``: that of ``features``, or 0..F-1 where it has none."""
    size = features.sizes[FEATURE]
    values = np.asarray(features[FEATURE].values) if FEATURE in features.coords else np.arange(size)
    return {FEATURE: (FEATURE, values)}


def feature_ranks(features: xr.Dataset) -> IntArray:
    """Rank of each feature's label, to break ties between features independently of their order."""
    labels = feature_coord(features)[FEATURE][1]
    ranks: IntArray = np.argsort(np.argsort(labels, kind="stable"), kind="stable").astype(np.int64)
    return ranks


def in_split(dataset: xr.Dataset, split: str) -> NDArray[np.bool_]:
    """Which prompts belong to ``split``."""
    labels = np.asarray(dataset[SPLIT].values).astype(np.str_)
    return np.asarray(labels == split)
