"""Saddlepoint approximation of sign-flip tails, for all features at once."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rlgen_stats.toolkit.statistics.kernels.flips.flip_table import all_flips
from rlgen_stats.toolkit.statistics.kernels.numerics import SMALLEST_P, TIE_SLACK, FloatArray, column_sums

MAX_ITERATIONS: Final = 60
"""Newton steps at most; ten are usual."""
TOLERANCE: Final = 1e-10
"""Relative error of K'(theta) = s at which iteration stops; the tail depends on it to second order."""
SMALL_W: Final = 1e-3
"""Below this signed root the correction log(v/w)/w is 0/0; the normal tail is exact to the same order there."""
MAX_KURTOSIS: Final = 0.2
"""Share sum d^4 / (sum d^2)^2 up to which the flips' sum is smooth enough; above it p was off by up to .6."""
MAX_CONDITIONED: Final = 6
"""Largest |d| whose flips are enumerated (64 patterns); p then stays within 5% even on Cauchy data."""
BLOCK_ELEMENTS: Final = 2**20
"""Unit x feature x pattern elements per block (8 MB)."""


def flip_tail(magnitudes: FloatArray, total: FloatArray) -> FloatArray:
    """P(S >= s) for S = sum of +-|d_i| with fair signs: dominant |d_i| are enumerated, the rest by saddlepoint.

    Parameters
    ----------
    magnitudes
        |d|, [unit, feature], some nonzero in every feature.
    total
        s, [feature], of either sign.

    Returns
    -------
    ndarray [feature]
        Tail probability, never below 2**-n_nonzero, the chance of the most extreme flip.

    Notes
    -----
    The saddlepoint assumes a smooth distribution of S. Where a few differences carry most of sum d^4, S has separate
    modes, one per sign pattern of those few; conditional on the pattern the rest is smooth. Not covered are differences
    nearly, but not exactly, on a common lattice: the error is then up to half the probability of one lattice point.
    """
    ranked = -np.sort(-magnitudes, axis=0)
    ranked = ranked[: max(1, int(np.count_nonzero(ranked, axis=0).max(initial=0)))]
    unit = ranked[0]
    ranked, target = ranked / unit, total / unit  # fourth powers then neither overflow nor underflow
    n_top = _dominant(ranked)
    tail = np.empty(len(target))
    for m in np.unique(n_top):
        same = np.flatnonzero(n_top == m)
        size = max(1, BLOCK_ELEMENTS // (len(ranked) * 2 ** int(m)))
        for start in range(0, len(same), size):
            part = same[start : start + size]
            tail[part] = _conditional(np.take(ranked, part, axis=1), target[part], int(m))
    floor = np.maximum(0.5 ** np.count_nonzero(ranked, axis=0), SMALLEST_P)
    return np.asarray(np.clip(tail, floor, 1.0))


def _dominant(ranked: FloatArray) -> NDArray[np.int64]:
    """Number of the largest |d| to enumerate so that the rest is smooth, [feature]."""
    square = np.square(ranked)
    second = np.cumsum(square[::-1], axis=0)[::-1][: MAX_CONDITIONED + 1]
    fourth = np.cumsum(np.square(square)[::-1], axis=0)[::-1][: MAX_CONDITIONED + 1]
    smooth = fourth <= MAX_KURTOSIS * np.square(second)
    first = np.where(smooth.any(axis=0), smooth.argmax(axis=0), MAX_CONDITIONED)
    return np.asarray(np.minimum(first, np.count_nonzero(ranked, axis=0) // 2))


def _conditional(ranked: FloatArray, total: FloatArray, m: int) -> FloatArray:
    """Mean, over the 2**m sign patterns of the largest m, of the tail of the rest beyond the remaining total."""
    remaining = np.tile(total, (2**m, 1))
    # Term by term, not as a matrix product, whose last bits depend on its shape.
    for sign, top in zip(all_flips(m).T, ranked[:m], strict=True):
        remaining -= sign[:, None] * top
    rest = ranked[m:]
    limit = column_sums(rest)
    inside = np.abs(remaining) <= limit * (1 + TIE_SLACK)
    tail = np.where(remaining < 0, 1.0, 0.0)
    pattern, feature = np.nonzero(inside)
    signed = remaining[pattern, feature]
    beyond = saddlepoint_tail(np.take(rest, feature, axis=1), np.minimum(np.abs(signed), limit[feature]))
    tail[pattern, feature] = np.where(signed >= 0, beyond, 1.0 - beyond)
    return column_sums(tail) / len(tail)


def saddlepoint_tail(magnitudes: FloatArray, total: FloatArray) -> FloatArray:
    """P(S >= s) for S = sum of +-|d_i| with fair signs and s >= 0, where no |d_i| dominates.

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
    floor = np.maximum(0.5 ** np.count_nonzero(magnitudes, axis=0), SMALLEST_P)
    limit = column_sums(magnitudes)
    spread = np.sqrt(column_sums(np.square(magnitudes)))
    extreme = total >= limit * (1 - TIE_SLACK)
    theta = _solve(magnitudes, np.where(extreme, 0.0, total), spread)
    z = theta * magnitudes
    cumulant = column_sums(z + np.log1p(np.exp(-2 * z)) - np.log(2.0))
    curvature = column_sums(np.square(magnitudes) / np.square(np.cosh(np.minimum(z, 350.0))))
    w = np.sqrt(np.maximum(2 * (theta * total - cumulant), 0.0))
    v = theta * np.sqrt(curvature)
    with np.errstate(divide="ignore", invalid="ignore"):
        corrected = np.where(w > SMALL_W, w + np.log(v / w) / w, total / spread)
    tail = stats.norm.sf(np.where(np.isfinite(corrected), corrected, np.inf))
    return np.asarray(np.where(extreme, floor, np.clip(tail, floor, 1.0)))


def _solve(magnitudes: FloatArray, total: FloatArray, spread: FloatArray) -> FloatArray:
    """Theta with K'(theta) = total, by Newton's method from s / sum d^2.

    The start lies below the root because tanh(x) <= x, and K' is concave, so steps rise monotonically to the root.
    """
    theta = total / np.square(spread)
    unsolved = np.flatnonzero(total > 0)
    for _ in range(MAX_ITERATIONS):
        if not len(unsolved):
            break
        d = np.take(magnitudes, unsolved, axis=1)
        tanh = np.tanh(theta[unsolved] * d)
        short = total[unsolved] - column_sums(d * tanh)
        slope = column_sums(np.square(d) * (1 - np.square(tanh)))
        theta[unsolved] += np.divide(short, slope, out=np.zeros_like(short), where=slope > 0)
        unsolved = unsolved[short > TOLERANCE * total[unsolved]]
    return theta
