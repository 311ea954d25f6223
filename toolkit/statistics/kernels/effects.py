"""Effect sizes: Wasserstein distance, and a change of mean split into firing rate and magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray


@dataclass(frozen=True)
class HurdleResult:
    """A change of mean as the sum of two parts, [feature]."""

    from_firing: FloatArray
    """Part due to a change of firing rate."""
    from_magnitude: FloatArray
    """Part due to a change of magnitude when firing."""
    magnitude_change: FloatArray
    """Change of the mean over tokens on which the feature fires; NaN where it never fires on one side."""


def paired_wasserstein(a: Any, b: Any) -> FloatArray:
    """Wasserstein-1 distance between the distributions of two samples of equal size, [unit, feature] -> [feature].

    Notes
    -----
    The mean absolute difference of order statistics. Unlike a mean difference it shows changes that cancel in the mean;
    it is never negative, so sampling noise alone makes it positive: an effect size, not a test.

    References
    ----------
    Vallender 1974, doi:10.1137/1118101.

    Examples
    --------
    >>> paired_wasserstein([[0.0], [1.0]], [[1.0], [2.0]]).tolist()
    [1.0]
    """
    x, y = (np.asarray(values, dtype=np.float64) for values in (a, b))
    if x.shape != y.shape or x.ndim != 2 or not len(x):
        raise InputError(f"expected two samples [unit, feature] of one shape, got {x.shape} and {y.shape}.")
    return np.asarray(np.abs(np.sort(x, axis=0) - np.sort(y, axis=0)).mean(axis=0))


def hurdle(mean_a: Any, mean_b: Any, firing_a: Any, firing_b: Any) -> HurdleResult:
    """Split a change of mean into a change of firing rate and a change of magnitude (hurdle model).

    Parameters
    ----------
    mean_a, mean_b
        Means before and after, zeros included, [feature].
    firing_a, firing_b
        Share of tokens on which the feature fires before and after, [feature], averaged over units as the means are.

    Notes
    -----
    With m = mean / firing, the mean where the feature fires, mean = firing x m on both sides, and exactly
    change = (change of firing) x (average m) + (change of m) x (average firing). A side that never fires has no m; the
    other side's m replaces it, so that all of the change is due to firing. NaN where a mean is not 0 although the
    feature never fires: mean and firing are then not of the same tokens.

    References
    ----------
    Hurdle models: Cragg 1971, doi:10.2307/1909582; symmetric decomposition: Kitagawa 1955, doi:10.2307/2281213.
    """
    a, b, p, q = (np.asarray(values, dtype=np.float64) for values in (mean_a, mean_b, firing_a, firing_b))
    before = np.divide(a, p, out=np.full_like(a, np.nan), where=p > 0)
    after = np.divide(b, q, out=np.full_like(b, np.nan), where=q > 0)
    change = after - before
    m = np.where(np.isnan(before), after, before), np.where(np.isnan(after), before, after)
    inconsistent = ((p == 0) & (a != 0)) | ((q == 0) & (b != 0))
    firing = np.where(inconsistent, np.nan, np.nan_to_num((m[0] + m[1]) / 2) * (q - p))
    return HurdleResult(firing, np.where(inconsistent, np.nan, np.nan_to_num(m[1] - m[0]) * (p + q) / 2), change)
