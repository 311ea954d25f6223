"""Bootstrap-t intervals of a mean over units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.resampling import (
    BLOCK_FEATURES,
    FloatArray,
    as_units,
    bootstrap_weights,
    cluster_totals,
)

MIN_NONZERO: Final = 10
"""Nonzero differences below which no interval is given: coverage falls well under nominal (METHOD.md 4a)."""


@dataclass(frozen=True)
class BootstrapResult:
    """Interval of a mean."""

    mean: Any
    """[feature]."""
    low: Any
    """Lower bound [feature]; NaN where fewer than ten values are not zero."""
    high: Any
    """Upper bound [feature]."""
    standard_error: Any
    """[feature]."""


def bootstrap_t(
    x: Any, *, alpha: float = 0.05, n_resamples: int = 999, seed: int = 0, clusters: Any = None
) -> BootstrapResult:
    """Studentised bootstrap interval of the mean over units, all features at once.

    Parameters
    ----------
    x
        [unit] or [unit, feature].
    alpha
        1 - coverage.
    n_resamples, seed
        Resamples (the same units for all features) and their seed.
    clusters
        Labels [unit]: cluster means are resampled, each cluster one unit.

    Raises
    ------
    InputError
        If there are fewer than two units or values are not finite.

    Notes
    -----
    t* = (mean* - mean) / se*, bounds mean - se * t*_(1-a/2) and mean - se * t*_(a/2). Resampling is a matrix product
    with counts of units, one block of features at a time.

    References
    ----------
    Efron 1981; Hall 1988, doi:10.1214/aos/1176350933.
    """
    x, single = as_units(x)
    if not np.isfinite(x).all():
        raise InputError(
            f"values must be finite, got {int((~np.isfinite(x)).sum())} NaN or infinite; drop those units."
        )
    n_nonzero = np.count_nonzero(x, axis=0)
    if clusters is not None:
        x = cluster_totals(x, clusters) / cluster_totals(np.ones((len(x), 1)), clusters)
    n = len(x)
    if n < 2:
        raise InputError(f"a bootstrap interval needs at least two units, got {n}.")
    weights = bootstrap_weights(n, n_resamples, seed=seed) / n
    mean, error = x.mean(axis=0), x.std(axis=0, ddof=1) / np.sqrt(n)
    low, high = np.full(x.shape[1], np.nan), np.full(x.shape[1], np.nan)
    tested = np.flatnonzero((n_nonzero >= MIN_NONZERO) & (error > 0))
    for start in range(0, len(tested), BLOCK_FEATURES):
        part = tested[start : start + BLOCK_FEATURES]
        low[part], high[part] = _interval(x[:, part] - mean[part], weights, error[part], alpha)
    low, high = mean + low, mean + high
    table = (mean, low, high, error)
    return BootstrapResult(*((value[0] for value in table) if single else table))


def _interval(
    centred: FloatArray, weights: FloatArray, error: FloatArray, alpha: float
) -> tuple[FloatArray, FloatArray]:
    """Bounds relative to the mean; centring first keeps the variance of a resample from cancelling."""
    shift = weights @ centred
    variance = np.maximum(weights @ np.square(centred) - np.square(shift), 0.0)
    resampled = np.sqrt(variance / (len(centred) - 1))
    t = np.divide(shift, resampled, out=np.sign(shift) * np.inf, where=resampled > 0)
    t = np.nan_to_num(t, nan=0.0)
    upper, lower = np.quantile(t, [1 - alpha / 2, alpha / 2], axis=0, method="median_unbiased")
    return -error * upper, -error * lower
