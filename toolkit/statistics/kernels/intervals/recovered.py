"""Intervals and p-values of combinations of estimates of which only the estimate and its interval are known."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np


def mover_difference(
    first: tuple[float, float, float], second: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Difference ``first - second`` of two (estimate, low, high), with its interval recovered from theirs (MOVER).

    Treats the two as independent, which is conservative when they share prompts and so correlate positively.

    References
    ----------
    Zou & Donner (2008), doi:10.1002/sim.3095, eq. 5.

    Examples
    --------
    >>> mover_difference((4.0, 1.0, 7.0), (0.0, -4.0, 4.0))
    (4.0, -1.0, 9.0)
    """
    (a, a_low, a_high), (b, b_low, b_high) = first, second
    return a - b, a - b - math.hypot(a - a_low, b_high - b), a - b + math.hypot(a_high - a, b - b_low)


def mover_weighted_sum(estimates: Any, lows: Any, highs: Any, *, weights: Any) -> tuple[float, float, float]:
    """Weighted sum of independent estimates with its interval recovered from theirs (MOVER).

    Parameters
    ----------
    estimates, lows, highs
        Estimates and the ends of their intervals, all at one level [term].
    weights
        Non-negative weights [term].

    Returns
    -------
    tuple of float
        Sum, low, high; NaN where a term is NaN. Too narrow if the estimates correlate positively.

    References
    ----------
    Zou & Donner (2008), doi:10.1002/sim.3095, eq. 6.

    Examples
    --------
    >>> mover_weighted_sum([0.5, 0.5], [0.4, 0.4], [0.6, 0.6], weights=[1.0, 0.0])
    (0.5, 0.4, 0.6)
    """
    estimates, lows, highs, weights = (np.asarray(values, dtype=float) for values in (estimates, lows, highs, weights))
    total = float(weights @ estimates)
    below, above = (
        float(np.sqrt(np.square(weights * distance).sum())) for distance in (estimates - lows, highs - estimates)
    )
    return total, total - below, total + above


def p_from_interval(estimate: float, low: float, high: float, *, alpha: float) -> float:
    """Two-sided p-value of "zero" implied by a 1 - alpha interval (normal approximation).

    The half-width on the side of zero gives the standard error, so asymmetric intervals keep p <= alpha exactly
    when they exclude zero.

    References
    ----------
    Altman & Bland (2011), doi:10.1136/bmj.d2304.
    """
    half = estimate - low if estimate > 0 else high - estimate
    if math.isnan(estimate) or math.isnan(half):
        return math.nan
    if half <= 0:
        return 1.0 if estimate == 0 else math.nan
    normal = NormalDist()
    error = half / normal.inv_cdf(1 - alpha / 2)
    return 2 * normal.cdf(-abs(estimate) / error)
