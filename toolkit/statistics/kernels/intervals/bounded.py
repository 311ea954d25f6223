"""Interval of a mean of bounded values over few clusters, most of which may not have changed at all."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.intervals.clustered import cluster_se
from rlgen_stats.toolkit.statistics.kernels.numerics import TIE_SLACK, FloatArray
from rlgen_stats.toolkit.statistics.kernels.unit_tables import cluster_totals

ENOUGH_BEYOND: Final = 5
"""Clusters beyond the mean on one side from which on the most extreme of them says how far one can lie there."""
N_DRAWS: Final = 4000
"""Random weights of the clusters: the Monte-Carlo error of a 2.5% quantile's level is then .0025."""
BLOCK: Final = 2**22
"""Random weights held at once (32 MB)."""


def bounded_interval(
    values: Any, clusters: Any, *, alpha: float, limit: float = 1.0
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mean of values in [-limit, limit] over clustered units, and its interval.

    Parameters
    ----------
    values
        [unit, column].
    clusters
        [unit] labels; clusters are independent.
    alpha
        1 - coverage; each side misses at most about half of it.
    limit
        Largest absolute value possible; infinite where there is none, and the interval then is the first one below.

    Returns
    -------
    tuple of array
        Mean, low and high [column]; the bounds are NaN with fewer than two clusters.

    Raises
    ------
    InputError
        If a value lies outside the limits.

    Notes
    -----
    Each bound is the farther of two. The first is the t-interval with the CR2 variance and Satterthwaite's degrees of
    freedom (:func:`cluster_se`), which suits many changed clusters. Where few changed, the variance does not know of
    those that were not seen: the second is the alpha / 2 quantile of the mean over randomly (exponentially) weighted
    clusters and one further cluster of average size, which lies as far on that side as any observed, or at the limit
    while fewer than ``ENOUGH_BEYOND`` lie beyond the mean on that side. For one prompt a cluster and changes of one
    sign this is Clopper and Pearson's bound, and clusters that are all equal, such as an edit without any effect, have
    the exact binomial bound on clusters: limit (1 - (alpha / 2)^(1/G)).

    Worst one-sided miss of a nominal 5% over 10 to 200 clusters of one, six, or one to twelve prompts (intracluster
    correlation .05 and .2), 0 to 95% of prompts changed, in one direction or both (2,000 tables each): t with CR1 or
    CR2 .60, bootstrap-t .35, here .09, and above .075 in none but that cell (20 single prompts, 10% changed, three in
    four of them to the better). Two invented clusters at +-1, the rule of earlier releases: .08, at up to twice the
    width where clusters hold several prompts (docs/calibration.md).

    References
    ----------
    Gaffke 2005, "Three test statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative variable",
    Math. Methods Stat. 14, 451-467; Learned-Miller and Thomas, arXiv 1905.06208, eq. 3.

    Examples
    --------
    >>> mean, low, high = bounded_interval(np.zeros((59, 1)), np.arange(59), alpha=0.1)
    >>> round(float(low[0]), 4), round(float(high[0]), 4)
    (-0.0495, 0.0495)
    """
    x = np.asarray(values, dtype=np.float64)
    if np.abs(x).max(initial=0.0) > limit + TIE_SLACK:
        raise InputError(f"expected values within +-{limit:g}, got {float(np.abs(x).max()):.3g}.")
    codes = np.unique(np.asarray(clusters), return_inverse=True)[1]
    sizes = np.bincount(codes).astype(np.float64)
    mean = np.asarray(x.mean(axis=0), dtype=np.float64)
    if len(sizes) < 2:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    fit = cluster_se(x, codes, kind="CR2")
    half = stats.t.ppf(1 - alpha / 2, fit.df) * fit.standard_error
    if np.isinf(limit):
        return mean, mean - half, mean + half
    totals = cluster_totals(x, codes)
    each = totals / sizes[:, None]
    above, below = ((sign * (each - mean) > TIE_SLACK).sum(axis=0) >= ENOUGH_BEYOND for sign in (1.0, -1.0))
    top, bottom = np.where(above, each.max(axis=0), limit), np.where(below, each.min(axis=0), -limit)
    low, high = _with_one_more(totals, sizes, bottom, top, alpha / 2)
    unseen = 1 - (alpha / 2) ** (1 / len(sizes))  # largest share of clusters of which none may have been seen
    equal = np.ptp(each, axis=0) <= TIE_SLACK
    low = np.where(equal, mean - unseen * (limit + mean), np.minimum(mean - half, low))
    high = np.where(equal, mean + unseen * (limit - mean), np.maximum(mean + half, high))
    return mean, np.maximum(low, -limit), np.minimum(high, limit)


def _with_one_more(
    totals: FloatArray, sizes: FloatArray, bottom: FloatArray, top: FloatArray, level: float
) -> tuple[FloatArray, FloatArray]:
    """Lower and upper quantile of the weighted mean with one more cluster at the bottom, and at the top."""
    lows, highs = [], []
    for weights in _random_weights(len(sizes) + 1):
        of_one_more = (weights[:, -1] * sizes.mean())[:, None]
        total, weight = weights[:, :-1] @ totals, (weights[:, :-1] @ sizes)[:, None] + of_one_more
        lows.append((total + of_one_more * bottom) / weight)
        highs.append((total + of_one_more * top) / weight)
    return (
        np.asarray(np.quantile(np.concatenate(lows), level, axis=0)),
        np.asarray(np.quantile(np.concatenate(highs), 1 - level, axis=0)),
    )


def _random_weights(n: int) -> Iterator[NDArray[np.float64]]:
    """``N_DRAWS`` rows of n exponential weights, in blocks; always the same ones."""
    if N_DRAWS * n <= BLOCK:
        yield _few_weights(n)
        return
    draw, rows = np.random.default_rng(0), max(BLOCK // n, 1)
    for start in range(0, N_DRAWS, rows):
        yield draw.standard_exponential((min(rows, N_DRAWS - start), n))


@lru_cache(maxsize=4)
def _few_weights(n: int) -> NDArray[np.float64]:
    """All rows at once, kept: a trial asks for the same number of clusters again and again."""
    return np.random.default_rng(0).standard_exponential((N_DRAWS, n))
