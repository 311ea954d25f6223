"""Bootstrap-t intervals of a mean over units."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.draws import stream
from rlgen_stats.toolkit.statistics.kernels.numerics import ROUNDING, FloatArray, column_sums
from rlgen_stats.toolkit.statistics.kernels.unit_tables import as_units, cluster_totals

BLOCK_COUNTS: Final = 2**19
"""Resample x unit counts converted to floats per block (4 MB)."""
MIN_NONZERO: Final = 10
"""Nonzero units below which no interval is given: coverage falls well below nominal (docs/method.md 4a)."""
BLOCK_ELEMENTS: Final = 2**20
"""Resample x feature elements per block (8 MB)."""
HUGE: Final = 1e100
"""Replaces infinity inside quantiles, whose interpolation between neighbours would give NaN."""


@dataclass(frozen=True)
class BootstrapResult:
    """Interval of a mean."""

    mean: Any
    """[feature]."""
    low: Any
    """Lower bound [feature]; NaN where fewer than ten units (or clusters) are not zero, or nothing varies."""
    high: Any
    """Upper bound [feature]."""
    standard_error: Any
    """[feature]."""


def bootstrap_t(
    x: Any, *, alpha: float = 0.05, n_resamples: int = 999, seed: int = 0, clusters: Any = None
) -> BootstrapResult:
    """Studentised bootstrap interval of the mean over units, for all features at once.

    Parameters
    ----------
    x
        [unit] or [unit, feature].
    alpha
        1 - coverage.
    n_resamples, seed
        Resamples (the same units for all features) and their seed.
    clusters
        Labels [unit] of dependent units: clusters are resampled, the mean stays that over units.

    Raises
    ------
    InputError
        If there are fewer than two units or values are not finite.

    Notes
    -----
    t* = (mean* - mean) / se*, bounds mean - se * t*_(1-a/2) and mean - se * t*_(a/2). Resampling is a matrix product
    with counts of units, one block of features at a time. With clusters the units are the influences
    mean + (G / N) * sum(x - mean within the cluster), whose standard error is CR1; large and small clusters then keep
    the weight they have in the mean.

    References
    ----------
    Efron 1981; Hall 1988, doi:10.1214/aos/1176350933.
    """
    x, single = as_units(x)
    if not np.isfinite(x).all():
        raise InputError(
            f"values must be finite, got {int((~np.isfinite(x)).sum())} NaN or infinite; drop those units."
        )
    if not 0 < alpha < 1 or n_resamples < 1:
        raise InputError(f"expected 0 < alpha < 1 and n_resamples >= 1, got alpha={alpha}, n_resamples={n_resamples}.")
    mean = column_sums(x) / len(x)
    centred, n_nonzero = x - mean, np.count_nonzero(x, axis=0)
    if clusters is not None:
        n_nonzero = np.count_nonzero(cluster_totals(np.abs(x), clusters), axis=0)
        centred = cluster_totals(centred, clusters)
        centred *= len(centred) / len(x)
    n = len(centred)
    if n < 2:
        raise InputError(f"a bootstrap interval needs at least two units, got {n}.")
    error = np.sqrt(column_sums(np.square(centred)) / (n - 1) / n)
    low, high = np.full(x.shape[1], np.nan), np.full(x.shape[1], np.nan)
    error[error <= ROUNDING * np.abs(x).max(axis=0)] = 0.0  # rounding of a constant feature's mean is not spread
    tested = np.flatnonzero((n_nonzero >= MIN_NONZERO) & (error > 0))
    size = max(1, BLOCK_ELEMENTS // n_resamples)
    for start in range(0, len(tested), size):
        part = tested[start : start + size]
        low[part], high[part] = _interval(np.take(centred, part, axis=1), error[part], alpha, n_resamples, seed)
    low, high = mean + low, mean + high
    table = (mean, low, high, error)
    return BootstrapResult(*((value[0] for value in table) if single else table))


def _interval(
    centred: FloatArray, error: FloatArray, alpha: float, n_resamples: int, seed: int
) -> tuple[FloatArray, FloatArray]:
    """Bounds relative to the mean; values are centred first, so that the variance of a resample does not cancel."""
    n, squares = len(centred), np.square(centred)
    shift, resampled = np.empty((n_resamples, len(error))), np.empty((n_resamples, len(error)))
    for rows, counts in bootstrap_blocks(n, n_resamples, seed=seed):
        weights = counts / n
        shift[rows] = weights @ centred
        resampled[rows] = np.sqrt(np.maximum(weights @ squares - np.square(shift[rows]), 0.0) / (n - 1))
    # A resample of one repeated value has no spread: its t is infinite, with the sign of its shift.
    t = np.divide(shift, resampled, out=np.where(shift == 0, 0.0, np.sign(shift) * HUGE), where=resampled > 0)
    upper, lower = np.quantile(t, [1 - alpha / 2, alpha / 2], axis=0, method="median_unbiased")
    upper, lower = (np.where(np.abs(q) > HUGE / 1e6, np.sign(q) * np.inf, q) for q in (upper, lower))
    return -error * upper, -error * lower


def bootstrap_weights(n_units: int, n_resamples: int, *, seed: int) -> FloatArray:
    """How often each unit enters each bootstrap sample, [n_resamples, n_units]; rows sum to n_units."""
    return _bootstrap_counts(n_units, n_resamples, seed).astype(np.float64)


def bootstrap_blocks(n_units: int, n_resamples: int, *, seed: int) -> Iterator[tuple[slice, FloatArray]]:
    """``bootstrap_weights`` in blocks of at most 4 MB, with the slice of draws of each block."""
    counts, step = _bootstrap_counts(n_units, n_resamples, seed), max(16, BLOCK_COUNTS // n_units)
    for start in range(0, n_resamples, step):
        rows = slice(start, min(start + step, n_resamples))
        yield rows, counts[rows].astype(np.float64)


@lru_cache(maxsize=2)
def _bootstrap_counts(n_units: int, n_resamples: int, seed: int) -> NDArray[np.uint8]:
    """Counts of ``bootstrap_weights``, cached because all blocks of features use the same draws."""
    # One byte per count: a unit is drawn once on average, and more than 255 times practically never.
    table = np.empty((n_resamples, n_units), dtype=np.uint8)
    for draw in range(n_resamples):
        table[draw] = np.bincount(stream(seed, draw).integers(0, n_units, n_units), minlength=n_units)
    table.flags.writeable = False
    return table
