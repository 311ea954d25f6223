"""How much of the change of a model's activations is one constant vector: the shift of their mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import xarray as xr

from rlgen_stats.schemas.dims import BASE_MODEL, CHANNEL, MODEL, PROMPT
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.core.coordinates import compared_models, model_coords
from rlgen_stats.toolkit.statistics.core.feature_blocks import in_prompt_order
from rlgen_stats.toolkit.statistics.core.units import cluster_codes, jackknife_groups, unit_attrs
from rlgen_stats.toolkit.statistics.kernels import delete_group_jackknife
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray

N_GROUPS: Final = 20
"""Groups of units that the jackknife leaves out in turn."""


def mean_shift(
    activations: xr.Dataset,
    *,
    models: Sequence[str] | None = None,
    reference: str = BASE_MODEL,
    clusters: str | None = None,
    alpha: float = 0.05,
    seed: int = 0,
) -> xr.Dataset:
    """Share of the difference between a model's activations and the reference's that one constant vector explains.

    Parameters
    ----------
    activations
        ``activation[model, prompt, channel]``: means over each prompt's tokens, NaN for prompts without tokens. May be
        lazy; two models are in memory at a time.
    models, reference
        Model ids; default all but the reference.
    clusters
        Label of the prompts whose values stay together, default the prompt itself.
    alpha, seed
        1 - coverage of the intervals; seed of the jackknife's groups.

    Returns
    -------
    xr.Dataset
        Over ``model``: ``share`` with ``share_low`` and ``share_high``; ``norm_ratio`` = ||mean d|| / rms ||d||; ``n``
        (prompts). NaN where nothing differs, and for intervals where there are fewer than two units.

    Raises
    ------
    InputError
        If a model is unknown, or none is left to compare with the reference.

    Notes
    -----
    With d_i = a_model,i - a_reference,i of prompt i, ``share`` = ||mu||^2 / mean ||d||^2, mu the mean of d. The squared
    norm of a sample mean exceeds ||mu||^2 by the trace of its covariance, which is subtracted (between units, CR1), so
    that differences without a common direction give 0 on average, and may give less. ``norm_ratio`` is not corrected:
    its floor is about 1 / sqrt(units). Intervals: delete-group jackknife over 20 groups of whole units.

    References
    ----------
    Difference of means as an edit: Rimsky et al. 2024, arXiv:2312.06681. Jackknife: Kott 2001.

    Examples
    --------
    >>> mean_shift(prompt_means, models=["rl@80"], clusters="cluster")  # doctest: +SKIP
    """
    activations = in_prompt_order(activations)
    reference, compared = compared_models(activations, reference, models)
    codes = cluster_codes(activations, clusters)
    values = activations["activation"].transpose(MODEL, PROMPT, CHANNEL)
    base = np.asarray(values.sel({MODEL: reference}).values, dtype=np.float64)
    table = np.full((5, len(compared)), np.nan)
    for j, model in enumerate(compared):
        d = np.asarray(values.sel({MODEL: model}).values, dtype=np.float64) - base
        table[:, j] = _measure(d, codes, alpha, derive_seed(seed, "mean shift"))
    return xr.Dataset(
        {name: (MODEL, table[i]) for i, name in enumerate(("share", "share_low", "share_high", "norm_ratio"))}
        | {"n": (MODEL, table[4].astype(np.int64))},
        coords=model_coords(activations, compared),
        attrs=unit_attrs("prompt", clusters, codes)
        | {"reference": reference, "interval": f"delete-group jackknife, {N_GROUPS} groups, t"}
        | {"alpha": alpha, "seed": seed},
    )


def _measure(d: FloatArray, codes: IntArray | None, alpha: float, seed: int) -> FloatArray:
    """Share, its interval, ratio of norms and number of prompts; ``d`` [prompt, channel], NaN rows left out."""
    there = np.isfinite(d).all(axis=1)
    unit = (np.arange(len(d)) if codes is None else codes)[there]
    d = d[there]
    if not len(d) or not d.any():
        return np.array([np.nan, np.nan, np.nan, np.nan, len(d)])
    ratio = float(np.linalg.norm(d.mean(axis=0)) / np.sqrt(np.square(d).sum(axis=1).mean()))
    groups = jackknife_groups(unit, N_GROUPS, seed)
    n_groups = int(groups.max()) + 1
    low = high = np.nan
    if n_groups > 2:  # without a group there must still be two units
        replicates = [_share(d[groups != g], unit[groups != g]) for g in range(n_groups)]
        interval = delete_group_jackknife(np.array(replicates), _share(d, unit), alpha=alpha)
        low, high = float(interval.low), float(interval.high)
    return np.array([_share(d, unit), low, high, ratio, len(d)])


def _share(d: FloatArray, unit: IntArray) -> float:
    n, mean, power = len(d), d.mean(axis=0), float(np.square(d).sum(axis=1).mean())
    names, codes = np.unique(unit, return_inverse=True)
    n_units = len(names)
    if n_units < 2 or power == 0:
        return float("nan")
    sums = np.zeros((n_units, d.shape[1]))
    np.add.at(sums, codes, d - mean)
    excess = n_units / (n_units - 1) * float(np.square(sums).sum()) / n**2
    return (float(mean @ mean) - excess) / power
