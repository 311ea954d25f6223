"""Simultaneous bounds on the false discovery proportion beyond every threshold, from the flips of ``max_t``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.numerics import TIE_SLACK, FloatArray


@dataclass(frozen=True)
class FdpResult:
    """Simultaneous confidence bounds, [threshold]."""

    n_beyond: NDArray[np.int64]
    """Features whose statistic reaches the threshold."""
    false_upper: NDArray[np.int64]
    """Upper bound on the number of true nulls among them."""
    fdp_upper: FloatArray
    """``false_upper`` as a share of ``n_beyond``; 0 where that is 0."""


def exceedance_counts(statistics: Any, thresholds: Any) -> NDArray[np.int64]:
    """Count the features that reach each threshold under each flip.

    Parameters
    ----------
    statistics
        [flip, feature].
    thresholds
        [threshold].

    Returns
    -------
    array of int
        [threshold, flip]; counts of several blocks of features may be added.

    Examples
    --------
    >>> exceedance_counts([[1.0, 3.0], [0.5, 2.0]], [2.0, 1.0]).tolist()
    [[1, 1], [2, 1]]
    """
    table, limits = np.asarray(statistics), np.asarray(thresholds, dtype=np.float64)
    order = np.argsort(limits)
    needed = limits[order] - TIE_SLACK * (1.0 + np.abs(limits[order]))
    flip, feature = np.nonzero(table >= needed[0]) if len(limits) else (np.empty(0, dtype=int), np.empty(0, dtype=int))
    level = np.searchsorted(needed, table[flip, feature], side="right")
    width = len(limits) + 1
    counted = np.bincount(flip * width + level, minlength=len(table) * width).reshape(len(table), width)
    reached = np.cumsum(counted[:, ::-1], axis=1)[:, ::-1][:, 1:]
    out = np.empty((len(limits), len(table)), dtype=np.int64)
    out[order] = reached.T
    return out


def fdp_bound(exceedances: Any, thresholds: Any, *, alpha: float = 0.05) -> FdpResult:
    """Bound the number of true nulls beyond every threshold, all bounds together with confidence 1 - alpha.

    Parameters
    ----------
    exceedances
        [threshold, flip]: features that reach each threshold under each flip (``exceedance_counts``); flip 0 is the
        identity, and all flips form a group (``max_t``).
    thresholds
        [threshold], fixed before seeing the data.
    alpha
        1 - confidence.

    Raises
    ------
    InputError
        If shapes do not fit or alpha is not in (0, 1).

    Notes
    -----
    At one threshold the bound is the (1 - a) quantile over flips of the number of features that reach it. The count of
    true nulls alone is exchangeable over the group of flips, so it stays below its own quantile with probability 1 - a
    under any dependence, and counts over all features are at least as large. The level is shared equally between the
    thresholds (a = alpha / number of thresholds), so that all bounds hold at once and the threshold may be chosen after
    seeing the data. They are then tightened by logic alone: there are no more nulls beyond t than beyond a lower
    threshold, nor than those beyond a higher one plus all features in between.

    Choosing one envelope for all thresholds from the flips themselves would be tighter, but false nulls among the
    features can make that choice too small.

    References
    ----------
    Hemerik and Goeman 2018, doi:10.1111/rssb.12238; simultaneous over thresholds: Hemerik, Solari and Goeman 2019,
    doi:10.1093/biomet/asz021.

    Examples
    --------
    >>> fdp_bound([[9, 1, 2, 0, 1, 0, 1, 2]], [3.0], alpha=0.25).false_upper.tolist()
    [2]
    """
    counts, limits = np.asarray(exceedances, dtype=np.int64), np.asarray(thresholds, dtype=np.float64)
    if counts.ndim != 2 or limits.shape != (len(counts),) or not counts.size:
        raise InputError(f"expected counts [threshold, flip] for {limits.size} thresholds, got shape {counts.shape}.")
    if not 0 < alpha < 1:
        raise InputError(f"alpha must lie between 0 and 1, got {alpha}.")
    ranked = np.sort(counts, axis=1)
    kept = int(np.ceil((1 - alpha / len(limits)) * counts.shape[1] - TIE_SLACK))
    observed = counts[:, 0]
    order = np.argsort(limits)
    upper = np.minimum(ranked[:, kept - 1], observed)[order]
    n_beyond = observed[order]
    upper = np.minimum.accumulate(upper)
    between = upper - n_beyond  # nulls beyond t <= nulls beyond s > t, plus all features in between
    upper = n_beyond + np.minimum.accumulate(between[::-1])[::-1]
    out = np.empty_like(upper)
    out[order] = np.maximum(upper, 0)
    share = np.divide(out, observed, out=np.zeros(len(out)), where=observed > 0)
    return FdpResult(observed, out, share)
