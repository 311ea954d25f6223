"""Tail of the sign-flip distribution by saddlepoint, for all features at once."""

from __future__ import annotations

from typing import Final

import numpy as np
from scipy import stats

from rlgen_stats.toolkit.statistics.kernels.resampling import TIE_SLACK, FloatArray

MAX_ITERATIONS: Final = 60
"""Newton steps kept inside a bracket; ten are usual."""
TOLERANCE: Final = 1e-12
"""Relative error of K'(theta) = s at which iteration stops."""
SMALL_W: Final = 1e-3
"""Below this signed root the correction log(v/w)/w is 0/0; the normal tail is exact to the same order there."""


def saddlepoint_tail(magnitudes: FloatArray, total: FloatArray) -> FloatArray:
    """P(S >= s) for S = sum of +-|d_i| with fair signs and s >= 0.

    Parameters
    ----------
    magnitudes
        |d|, [unit, feature], some nonzero in every feature.
    total
        s, [feature], between 0 and sum |d|.

    Returns
    -------
    ndarray [feature]
        Tail probability, never below the point mass 2**-n_nonzero of its extreme.

    References
    ----------
    Barndorff-Nielsen's r* form of Lugannani and Rice 1980, doi:10.2307/1426607; cumulant generating function
    K(t) = sum log cosh(t d_i).
    """
    n_nonzero = np.count_nonzero(magnitudes, axis=0)
    floor = 0.5**n_nonzero
    limit = magnitudes.sum(axis=0)
    spread = np.sqrt(np.square(magnitudes).sum(axis=0))
    extreme = total >= limit * (1 - TIE_SLACK)
    theta = _solve(magnitudes, np.where(extreme, 0.0, total), spread)
    z = theta * magnitudes
    cumulant = (np.logaddexp(z, -z) - np.log(2.0)).sum(axis=0)
    curvature = (np.square(magnitudes) / np.square(np.cosh(np.minimum(z, 350.0)))).sum(axis=0)
    w = np.sqrt(np.maximum(2 * (theta * total - cumulant), 0.0))
    v = theta * np.sqrt(curvature)
    with np.errstate(divide="ignore", invalid="ignore"):
        corrected = np.where(w > SMALL_W, w + np.log(v / w) / w, total / spread)
    tail = stats.norm.sf(np.nan_to_num(corrected, nan=np.inf, posinf=np.inf))
    return np.asarray(np.where(extreme, floor, np.clip(tail, floor, 1.0)))


def _solve(magnitudes: FloatArray, total: FloatArray, spread: FloatArray) -> FloatArray:
    """Theta with K'(theta) = total: Newton inside a bracket that is doubled until it holds the root."""
    low = np.zeros_like(total)
    high = np.maximum(total / np.square(spread), 1e-300) * 2
    for _ in range(80):
        short = (magnitudes * np.tanh(high * magnitudes)).sum(axis=0) < total
        if not short.any():
            break
        high = np.where(short, 2 * high, high)
    theta = total / np.square(spread)
    open_ = np.flatnonzero(total > 0)
    for _ in range(MAX_ITERATIONS):
        if not len(open_):
            break
        d, at = magnitudes[:, open_], theta[open_]
        tanh = np.tanh(at * d)
        value = (d * tanh).sum(axis=0) - total[open_]
        slope = (np.square(d) * (1 - np.square(tanh))).sum(axis=0)
        low[open_] = np.where(value < 0, at, low[open_])
        high[open_] = np.where(value >= 0, at, high[open_])
        with np.errstate(divide="ignore", invalid="ignore"):
            step = at - value / slope
        inside = (step > low[open_]) & (step < high[open_])
        theta[open_] = np.where(inside, step, 0.5 * (low[open_] + high[open_]))
        open_ = open_[np.abs(value) > TOLERANCE * total[open_]]
    return theta
