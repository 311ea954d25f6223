"""A contrast of group means as a sum of contributions that flip sign under the null hypothesis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.numerics import ROUNDING, FloatArray, IntArray


def contrast_contributions(values: Any, groups: Sequence[IntArray], weights: Sequence[float]) -> FloatArray:
    """What each row contributes to sum_g w_g mean_g; sign flips of the contributions test that this sum is zero.

    Parameters
    ----------
    values
        [row, feature].
    groups
        Rows of each group; none is in two.
    weights
        Weight w_g of each group's mean.

    Returns
    -------
    FloatArray
        [row, feature], zero for rows of no group; the sum over rows is the contrast. With dependent rows, sum them
        within clusters before flipping.

    Raises
    ------
    InputError
        If there is a weight too few or too many, or a group is empty.

    Notes
    -----
    c_i = w_g / n_g (x_i - m_g), with m_g the least-squares group means under "the contrast is zero". These are score
    contributions: their flips keep the level whatever the variances of the groups, asymptotically in the number of
    units (of 6 and 6 units .058 at .05, of 20 and 20 .053; few units of a skewed group stay off by up to a factor 2).

    References
    ----------
    Hemerik, Goeman and Finos 2020, doi:10.1111/rssb.12369, theorem 1 and section 3.2 (effective scores).

    Examples
    --------
    >>> x = np.array([[3.0], [5.0], [1.0], [1.0]])
    >>> contrast_contributions(x, [np.array([0, 1]), np.array([2, 3])], [1, -1]).ravel().tolist()
    [0.25, 1.25, 0.75, 0.75]
    """
    x = np.asarray(values, dtype=np.float64)
    w, n = np.asarray(weights, dtype=np.float64), np.array([len(rows) for rows in groups], dtype=np.float64)
    if len(w) != len(n) or not (n > 0).all():
        raise InputError(f"expected one weight a group and no empty group, got {len(w)} weights for {n.tolist()} rows.")
    means = np.stack([x[rows].mean(axis=0) for rows in groups])
    null_means = means - np.outer(w / n, w @ means) / np.sum(w * w / n)
    contributions, scale = np.zeros_like(x), np.abs(x).max(axis=0, initial=0.0)
    for rows, weight, size, mean in zip(groups, w, n, null_means, strict=True):
        residual = x[rows] - mean
        residual[np.abs(residual) <= ROUNDING * scale] = 0.0  # a feature that never varies gives no evidence
        contributions[rows] = weight / size * residual
    return contributions
