"""Sizes of a change: of a whole distribution, and of its parts (how often, and how much)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray


@dataclass(frozen=True)
class HurdleResult:
    """A change of mean in two parts that add up to it, [feature]."""

    from_firing: FloatArray
    """Part due to firing more or less often."""
    from_magnitude: FloatArray
    """Part due to firing more or less strongly."""
    magnitude_change: FloatArray
    """Change of the mean where it fires; NaN where one of the two never fires."""


def paired_wasserstein(a: Any, b: Any) -> FloatArray:
    """Wasserstein-1 distance between the distributions of two samples of equal size, [unit, feature] -> [feature].

    Notes
    -----
    The mean absolute difference of order statistics. Unlike a mean difference it sees changes that cancel in the mean;
    it is never negative, so sampling noise alone makes it positive: a size, not a test.

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
    """Split a change of mean into firing more often and firing more strongly.

    Parameters
    ----------
    mean_a, mean_b
        Means before and after, zeros included, [feature].
    firing_a, firing_b
        Share of tokens on which the feature fires before and after, [feature], averaged over units as the means are.

    Notes
    -----
    With m = mean / firing, the mean where it fires, mean = firing m on both sides, and exactly
    change = (change of firing) x (average m) + (change of m) x (average firing). Where one side never fires it has no
    m; the other's stands for it, so that all of the change is due to firing. NaN where a mean is not 0 although the
    feature never fires: the two are not of the same tokens.

    References
    ----------
    Hurdle models: Cragg 1971, doi:10.2307/1909582; symmetric decomposition: Kitagawa 1955, doi:10.2307/2281213.
    """
    a, b, p, q = (np.asarray(values, dtype=np.float64) for values in (mean_a, mean_b, firing_a, firing_b))
    before = np.divide(a, p, out=np.full_like(a, np.nan), where=p > 0)
    after = np.divide(b, q, out=np.full_like(b, np.nan), where=q > 0)
    change = after - before
    m = np.where(np.isnan(before), after, before), np.where(np.isnan(after), before, after)
    wrong = ((p == 0) & (a != 0)) | ((q == 0) & (b != 0))
    firing = np.where(wrong, np.nan, np.nan_to_num((m[0] + m[1]) / 2) * (q - p))
    return HurdleResult(firing, np.where(wrong, np.nan, np.nan_to_num(m[1] - m[0]) * (p + q) / 2), change)
