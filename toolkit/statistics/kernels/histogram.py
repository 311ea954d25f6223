"""Differences of whole distributions, unit by unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.resampling import TIE_SLACK, FloatArray, flip_table


@dataclass(frozen=True)
class HistogramResult:
    """Sign-flip test of a distribution distance."""

    statistic: float
    """Observed distance, in histogram units (bins for Wasserstein)."""
    p_value: float
    """Exact up to 12 units, else Monte-Carlo; never 0."""


def histogram_flip_test(
    hist_a: Any,
    hist_b: Any,
    *,
    statistic: Literal["ks", "wasserstein"] | str,
    n_resamples: int = 9999,
    seed: int = 0,
) -> HistogramResult:
    """Test whether units' histograms in two conditions are exchangeable; the two are swapped unit by unit.

    Parameters
    ----------
    hist_a, hist_b
        Counts or masses [unit, bin]; every unit is given weight one.
    statistic
        ``ks`` (largest) or ``wasserstein`` (summed) distance of the mean cumulative histograms.
    n_resamples, seed
        Flips and their seed; with at most 12 units every flip is used.

    Raises
    ------
    InputError
        If shapes differ, a unit is empty or negative, or the statistic is unknown.

    Notes
    -----
    Swapping the two histograms of a unit turns the sign of its difference, so all swaps are one matrix product.
    """
    a, b = (np.asarray(h, dtype=np.float64) for h in (hist_a, hist_b))
    if a.shape != b.shape or a.ndim != 2 or not len(a):
        raise InputError(f"histograms must be [unit, bin] of one shape, got {a.shape} and {b.shape}.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or (a < 0).any() or (b < 0).any():
        raise InputError("a histogram holds counts or masses; got negative or missing ones.")
    if (a.sum(axis=1) <= 0).any() or (b.sum(axis=1) <= 0).any():
        raise InputError("a unit's histogram is empty; drop that unit.")
    if statistic not in ("ks", "wasserstein"):
        raise InputError(f"statistic must be ks or wasserstein, got {statistic!r}.")
    share = np.cumsum(b / b.sum(axis=1, keepdims=True) - a / a.sum(axis=1, keepdims=True), axis=1)[:, :-1]
    observed = float(_distance(np.ones((1, len(a))), share, statistic)[0])
    table = flip_table(len(a), n_resamples, seed=seed)
    needed = observed - TIE_SLACK * (1.0 + observed)
    reached = np.zeros(())
    for _, flips in table.blocks():
        reached += (_distance(flips, share, statistic) >= needed).sum()
    return HistogramResult(observed, float(table.p_value(reached)))


def _distance(flips: FloatArray, share: FloatArray, statistic: str) -> FloatArray:
    """Distance under each flip, [flip]."""
    gaps = np.abs(flips @ share) / len(share)
    return np.asarray(gaps.max(axis=1, initial=0.0) if statistic == "ks" else gaps.sum(axis=1))
