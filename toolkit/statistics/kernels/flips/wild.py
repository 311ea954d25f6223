"""Wild cluster bootstrap: test of a mean over few clusters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.statistics.kernels.draws import stream
from rlgen_stats.toolkit.statistics.kernels.numerics import ROUNDING, TIE_SLACK, FloatArray
from rlgen_stats.toolkit.statistics.kernels.unit_tables import MIN_CLUSTERS, as_units, cluster_codes, cluster_totals

WEBB: Final = np.array([-np.sqrt(1.5), -1.0, -np.sqrt(0.5), np.sqrt(0.5), 1.0, np.sqrt(1.5)])
"""Webb's weights, equally likely, mean 0 and variance 1: 6^G distinct draws over G clusters, against 2^G of signs."""
BLOCK_ELEMENTS: Final = 2**20
"""Draw x feature elements per block (8 MB)."""


@dataclass(frozen=True)
class WildResult:
    """Wild-bootstrap test that a mean is zero."""

    statistic: Any
    """Mean over its cluster-robust (CR1) standard error [feature]; NaN where nothing varies."""
    p_value: Any
    """Two-sided [feature]; never 0."""
    n_clusters: int


def wild_cluster_bootstrap(values: Any, clusters: Any = None, *, n_resamples: int = 9999, seed: int = 0) -> WildResult:
    """Test mean = 0 over 6 to about 11 clusters by the wild bootstrap of its t statistic.

    Parameters
    ----------
    values
        [unit] or [unit, feature].
    clusters
        Labels [unit]; None if every unit is a cluster of its own.
    n_resamples, seed
        Draws and their seed.

    Raises
    ------
    RefusedError
        If there are fewer than six clusters.
    InputError
        If values are not finite or n_resamples is not positive.

    Notes
    -----
    The null mean is imposed: a draw is w_g x_i with Webb's six-point weight w_g of the unit's cluster, and its mean is
    divided by its own CR1 error. Tests the weak null E[x] = 0 (the sign flip tests symmetry) and has no smallest
    p-value of 2^(1-G), but is not exact: it is asymptotic in the number of clusters. From 12 clusters on the sign flip
    over clusters has a smallest p-value below .0005 and is exact; prefer it.

    References
    ----------
    Cameron, Gelbach and Miller 2008, doi:10.1162/rest.90.3.414; Webb 2023, doi:10.1111/caje.12661.

    Examples
    --------
    >>> round(float(wild_cluster_bootstrap([2.1, 1.9, 2.4, 1.5, 2.2, 1.8], seed=1).p_value), 3) < 0.05
    True
    """
    x, single = as_units(values)
    if not np.isfinite(x).all() or n_resamples < 1:
        raise InputError(
            f"expected finite values and n_resamples >= 1, got {int((~np.isfinite(x)).sum())} NaN or infinite and "
            f"{n_resamples}."
        )
    codes = np.arange(len(x)) if clusters is None else cluster_codes(clusters, len(x))
    size = np.bincount(codes).astype(np.float64)
    if len(size) < MIN_CLUSTERS:
        raise RefusedError(
            f"a wild cluster bootstrap needs at least {MIN_CLUSTERS} clusters, got {len(size)}; use more clusters, or "
            "a lower level if its units are independent."
        )
    totals = x if clusters is None else cluster_totals(x, codes)
    statistic = _t(np.ones((1, len(size))), totals, size)[0]
    spread = np.abs(totals - x.mean(axis=0) * size[:, None]).max(axis=0) > ROUNDING * np.abs(totals).max(axis=0)
    statistic = np.where(spread, statistic, np.nan)
    weights = np.stack([WEBB[stream(seed, draw).integers(0, len(WEBB), len(size))] for draw in range(n_resamples)])
    p = np.full(x.shape[1], np.nan)
    step = max(1, BLOCK_ELEMENTS // n_resamples)
    for start in range(0, x.shape[1], step):
        part = slice(start, start + step)
        drawn = np.abs(_t(weights, totals[:, part], size))
        observed = np.abs(statistic[part])
        reached = (drawn >= observed - TIE_SLACK * (1.0 + observed)).sum(axis=0)
        p[part] = (1 + reached) / (n_resamples + 1)
    p = np.where(np.isfinite(statistic), p, np.nan)
    return WildResult(statistic[0] if single else statistic, p[0] if single else p, len(size))


def _t(weights: FloatArray, totals: FloatArray, size: FloatArray) -> FloatArray:
    """Mean over CR1 error of weighted clusters, [draw, feature], from products of weights and cluster sums."""
    # sum_g (w_g T_g - mean n_g)^2, expanded so that no [draw, cluster, feature] array is needed.
    n, g = size.sum(), len(size)
    mean = weights @ totals / n
    squares = np.square(weights) @ np.square(totals)
    cross = weights @ (totals * size[:, None])
    residual = np.maximum(squares - 2 * mean * cross + np.square(mean) * np.square(size).sum(), 0.0)
    error = np.sqrt(residual * g / (g - 1)) / n
    huge = np.where(mean > 0, np.inf, np.where(mean < 0, -np.inf, 0.0))
    varies = error > ROUNDING * np.abs(totals).max(axis=0, initial=0.0)
    return np.asarray(np.divide(mean, error, out=huge, where=varies))
