"""Sign-flip tests of whole distributions: a histogram per unit and condition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.flips.flip_table import BLOCK_SUMS, FlipTable, flip_table
from rlgen_stats.toolkit.statistics.kernels.numerics import TIE_SLACK, FloatArray


@dataclass(frozen=True)
class HistogramResult:
    """Sign-flip test of a distance between distributions; numbers if units have one histogram each."""

    statistic: Any
    """Observed distance [feature], in histogram units (bins for Wasserstein); NaN for untestable features."""
    p_value: Any
    """[feature]; exact up to 12 units, else Monte-Carlo; NaN for untestable features, never 0."""


def histogram_flip_test(
    hist_a: Any,
    hist_b: Any,
    *,
    statistic: Literal["ks", "wasserstein"] | str,
    n_resamples: int = 9999,
    seed: int = 0,
) -> HistogramResult:
    """Test whether units' histograms in two conditions are exchangeable, by swapping the two of each unit.

    Parameters
    ----------
    hist_a, hist_b
        Counts or masses [unit, bin] or [unit, feature, bin]; every unit has weight one. With a feature axis, a
        feature with an empty histogram is untestable.
    statistic
        ``ks`` (largest) or ``wasserstein`` (summed) distance of the mean cumulative histograms.
    n_resamples, seed
        Flips and their seed; with at most 12 units every flip is used.

    Returns
    -------
    HistogramResult
        Numbers for [unit, bin], else [feature].

    Raises
    ------
    InputError
        If shapes differ, a count is negative or missing, a [unit, bin] histogram is empty, or the statistic is unknown.

    Notes
    -----
    Swapping the two histograms of a unit flips the sign of its difference, so the cumulative gaps of a block of
    features under all swaps are one Walsh-Hadamard transform (``FlipTable.sums``). Memory is one block of at
    least 16 bins, or one feature, x the number of flips.

    Examples
    --------
    >>> before, after = np.eye(4)[[0, 0, 1, 0, 1, 0, 0]], np.eye(4)[[2, 3, 2, 2, 3, 3, 2]]
    >>> result = histogram_flip_test(before, after, statistic="wasserstein")
    >>> round(result.statistic, 6), result.p_value
    (2.142857, 0.015625)
    """
    a, b = np.asarray(hist_a), np.asarray(hist_b)
    if a.shape != b.shape or a.ndim not in (2, 3) or not len(a):
        raise InputError(
            f"histograms must be [unit, bin] or [unit, feature, bin] of one shape, got {a.shape} and {b.shape}."
        )
    if statistic not in ("ks", "wasserstein"):
        raise InputError(f"statistic must be ks or wasserstein, got {statistic!r}.")
    single = a.ndim == 2
    if single:
        a, b = a[:, None], b[:, None]
    n_units, n_features, n_bins = a.shape
    table = flip_table(n_units, n_resamples, seed=seed)
    observed, p = np.full(n_features, np.nan), np.full(n_features, np.nan)
    step = max(1, max(16, BLOCK_SUMS // len(table)) // max(1, n_bins - 1))
    for start in range(0, n_features, step):
        part = slice(start, start + step)
        gaps, tested = _gaps(a[:, part], b[:, part], single)
        observed[part][tested], p[part][tested] = _tested(gaps, table, statistic)
    return HistogramResult(float(observed[0]), float(p[0])) if single else HistogramResult(observed, p)


def _gaps(a: Any, b: Any, single: bool) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Cumulative differences of shares [unit, tested feature, bin - 1], and which features have no empty histogram."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or (a < 0).any() or (b < 0).any():
        raise InputError("a histogram holds counts or masses; got negative or missing ones.")
    tested = ((a.sum(axis=-1) > 0) & (b.sum(axis=-1) > 0)).all(axis=0)
    if single and not tested.all():
        raise InputError("a unit's histogram is empty; drop that unit.")
    a, b = a[:, tested], b[:, tested]
    shares = b / b.sum(axis=-1, keepdims=True) - a / a.sum(axis=-1, keepdims=True)
    return np.asarray(np.cumsum(shares, axis=-1)[..., :-1]), tested


def _tested(gaps: FloatArray, table: FlipTable, statistic: str) -> tuple[FloatArray, FloatArray]:
    """Distance and p-value of a block of features."""
    n_units, n_features, n_gaps = gaps.shape
    sums = np.abs(table.sums(np.ascontiguousarray(gaps).reshape(n_units, n_features * n_gaps)))
    sums = sums.reshape(len(table), n_features, n_gaps) / n_units
    distance = sums.max(axis=-1, initial=0.0) if statistic == "ks" else sums.sum(axis=-1)
    observed = distance[0]  # pattern 0 is the identity
    return observed, table.p_value(np.count_nonzero(distance >= observed - TIE_SLACK * (1.0 + observed), axis=0))
