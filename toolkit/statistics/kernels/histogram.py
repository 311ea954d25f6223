"""Differences of whole distributions, unit by unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.resampling import TIE_SLACK, sign_flips


@dataclass(frozen=True)
class HistogramResult:
    """Sign-flip test of a distribution distance."""

    statistic: float
    """Observed distance, in histogram units (bins for Wasserstein)."""
    p_value: float
    """Monte-Carlo p-value, never 0."""


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
        Flips and their seed.

    Raises
    ------
    InputError
        If shapes differ, a unit is empty, or the statistic is unknown.
    """
    a, b = (np.asarray(h, dtype=np.float64) for h in (hist_a, hist_b))
    if a.shape != b.shape or a.ndim != 2:
        raise InputError(f"histograms must be [unit, bin] of one shape, got {a.shape} and {b.shape}.")
    if (a.sum(axis=1) <= 0).any() or (b.sum(axis=1) <= 0).any():
        raise InputError("a unit's histogram is empty; drop that unit.")
    if statistic not in ("ks", "wasserstein"):
        raise InputError(f"statistic must be ks or wasserstein, got {statistic!r}.")
    share = np.cumsum(b / b.sum(axis=1, keepdims=True) - a / a.sum(axis=1, keepdims=True), axis=1)[:, :-1]
    flips = np.vstack([np.ones((1, len(a))), sign_flips(len(a), 0, n_resamples, seed=seed)])
    gaps = np.abs(flips @ share) / len(a)
    distance = gaps.max(axis=1, initial=0.0) if statistic == "ks" else gaps.sum(axis=1)
    reached = (distance[1:] >= distance[0] * (1 - TIE_SLACK)).sum()
    return HistogramResult(float(distance[0]), float((1 + reached) / (n_resamples + 1)))
