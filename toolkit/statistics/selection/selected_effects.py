"""Effects of the features that a selection chose, on the prompts that did not help to choose them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import BASE_MODEL, FEATURE, MODEL, TASK
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.core.comparability import source_attrs
from rlgen_stats.toolkit.statistics.core.coordinates import compared_models, model_coords
from rlgen_stats.toolkit.statistics.core.feature_blocks import (
    Block,
    feature_arrays,
    finish,
    in_prompt_order,
    map_features,
)
from rlgen_stats.toolkit.statistics.core.units import cluster_codes, present_prompts, unit_attrs, unit_means
from rlgen_stats.toolkit.statistics.kernels.numerics import ROUNDING, FloatArray, IntArray
from rlgen_stats.toolkit.statistics.selection.discordance import mean_interval, n_units
from rlgen_stats.toolkit.statistics.selection.members import Members, selected_members, selection_unit

MEASURES: Final = ("effect", "effect_low", "effect_high", "d_z", "firing_change")
"""What is computed for every group of prompts, in this order."""


def selected_effects(
    features: xr.Dataset,
    selection: xr.Dataset,
    *,
    models: Sequence[str] | None = None,
    reference: str = BASE_MODEL,
    variable: str = "mean",
    split: str = "verification",
    members: Members = "selected",
    alpha: float = 0.05,
    n_bootstrap: int = 999,
    seed: int = 0,
) -> xr.Dataset:
    """Describe how the selected features of any models differ from the reference, on verification prompts only.

    Parameters
    ----------
    features
        Layout ``features`` of the prompts the selection was made from. Lazy in, lazy out.
    selection
        Result of ``select_features``.
    models, reference
        Model ids; default all but the reference.
    variable
        Summary compared: mean, firing or max.
    split
        Only ``"verification"``; anything else is refused.
    members
        ``selected``, ``candidate`` (CONFIRMED and CANDIDATE), ``paper`` (the paper's set) or ``stable``.
    alpha, n_bootstrap, seed
        1 - coverage, draws of the bootstrap-t, seed.

    Returns
    -------
    xr.Dataset
        Features in order of rank. [model, feature], over the tasks selected on: ``effect`` (mean difference),
        ``effect_low``, ``effect_high`` (bootstrap-t; NaN below ten differences), ``d_z`` (mean / sd over units),
        ``firing_change`` (points); the same by task as ``task_effect`` and so on [model, task, feature], also for tasks
        not selected on; ``n`` [model] and ``n_task`` [model, task] (units); ``tier`` and ``rank`` [feature].

    Raises
    ------
    RefusedError
        If effects are asked for on prompts that chose the features, the split is not the one recorded in the
        selection, crosscoder, readout, text mode or scale differ, or there is no such feature.
    InputError
        If a model or variable is unknown, or ``selection`` is not a selection.

    Notes
    -----
    Units are those of the selection (prompts, or its clusters: unit means). Intervals are for one feature, model and
    task each, not simultaneous. The CONFIRMED passed a test on the same prompts, so that their effects are a little
    too large; ``members="candidate"`` is free of that (attribute ``conditioned``). For another model than the
    selection's target these are descriptions of features chosen for the target.

    References
    ----------
    Selection then inference on held-out data: Cox 1975, doi:10.1093/biomet/62.2.441; bootstrap-t: Hall 1988,
    doi:10.1214/aos/1176350933.

    Examples
    --------
    >>> selected_effects(open_features(f), open_results(r, "selection"), models=["sft@80"])  # doctest: +SKIP
    """
    if not 0 < alpha < 1 or n_bootstrap < 1:
        raise InputError(f"expected 0 < alpha < 1 and n_bootstrap >= 1, got {alpha} and {n_bootstrap}.")
    unit, clusters = selection_unit(selection)
    features = in_prompt_order(features, repeated=unit == "token")
    chosen = selected_members(features, selection, split, members)
    reference, compared = compared_models(features, reference, models)
    codes = cluster_codes(features, clusters)
    (values, firing), lazy = feature_arrays(
        features.isel({FEATURE: chosen.features}), [variable, "firing"], [reference, *compared]
    )
    groups = [
        _groups(features, selection, chosen.prompts & present_prompts(features, [reference, m])) for m in compared
    ]
    measures = map_features(
        _block,
        [values.rechunk(-1), firing.rechunk(-1)],  # a few features: one block
        outputs={"measures": (len(MEASURES), len(compared), 1 + selection.sizes[TASK])},
        groups=groups,
        codes=codes,
        alpha=alpha,
        n_bootstrap=n_bootstrap,
        seed=derive_seed(seed, "selected_effects"),
    ).features["measures"]
    n = np.array([[n_units(index, codes) for index in row] for row in groups], dtype=np.int64)
    out = xr.Dataset(
        {name: ((MODEL, FEATURE), measures[i, :, 0]) for i, name in enumerate(MEASURES)}
        | {f"task_{name}": ((MODEL, TASK, FEATURE), measures[i, :, 1:]) for i, name in enumerate(MEASURES)}
        | {"n": (MODEL, n[:, 0]), "n_task": ((MODEL, TASK), n[:, 1:])}
        | {name: (FEATURE, selection[name].values[chosen.rows]) for name in ("tier", "rank")},
        coords=model_coords(features, compared)
        | {FEATURE: (FEATURE, chosen.labels), TASK: (TASK, selection[TASK].values.astype(np.str_))},
        attrs=source_attrs(features)
        | unit_attrs(unit, clusters, codes)
        | {"reference": reference, "variable": variable, "split": split, "split_hash": selection.attrs["split_hash"]}
        | {"members": members, "conditioned": chosen.conditioned, "interval": "bootstrap-t, each alone"}
        | {"alpha": alpha, "n_bootstrap": n_bootstrap, "seed": seed, "n_features": len(chosen.features)},
    )
    return finish(out, lazy)


def _groups(features: xr.Dataset, selection: xr.Dataset, inside: NDArray[np.bool_]) -> list[IntArray]:
    """Prompts of the tasks selected on together, then of each task of the selection, among those ``inside``."""
    of_prompt = np.asarray(features[TASK].values).astype(np.str_)
    tasks = selection[TASK].values.astype(np.str_)
    pooled = np.isin(of_prompt, tasks[np.asarray(selection["used"].values, dtype=bool)])
    return [np.flatnonzero(inside & pooled), *(np.flatnonzero(inside & (of_prompt == task)) for task in tasks)]


def _block(
    values: NDArray[Any],
    firing: NDArray[Any],
    *,
    groups: list[list[IntArray]],
    codes: IntArray | None,
    alpha: float,
    n_bootstrap: int,
    seed: int,
) -> Block:
    """[measure, model, group, feature]; ``values`` and ``firing`` [reference + models, prompt, feature]."""
    rows = []
    for model, groups_of_model in enumerate(groups, start=1):
        d = values[model].astype(np.float64) - values[0]
        firing_change = 100.0 * (firing[model].astype(np.float64) - firing[0])
        rows.append([_measures(d, firing_change, i, codes, alpha, n_bootstrap, seed) for i in groups_of_model])
    return {"measures": np.moveaxis(np.array(rows), 2, 0)}


def _measures(
    d: FloatArray,
    firing_change: FloatArray,
    index: IntArray,
    codes: IntArray | None,
    alpha: float,
    n_bootstrap: int,
    seed: int,
) -> FloatArray:
    """The measures of one model and group, [measure, feature]; NaN where there are too few units."""
    out = np.full((len(MEASURES), d.shape[1]), np.nan)
    if not len(index):
        return out
    group_codes = None if codes is None else codes[index]
    x = unit_means(d[index], group_codes)
    out[0] = x.mean(axis=0)
    out[1:3] = mean_interval(d[index], group_codes, alpha, n_bootstrap, seed)
    if len(x) > 1:
        sd = x.std(axis=0, ddof=1)
        varies = sd > ROUNDING * np.abs(x).max(axis=0)  # a constant difference has a spread of rounding errors
        out[3] = np.divide(out[0], sd, out=out[3], where=varies)
    out[4] = unit_means(firing_change[index], group_codes).mean(axis=0)
    return out
