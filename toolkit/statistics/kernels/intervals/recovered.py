"""Intervals of combinations of estimates of which only the estimate and its interval are known."""

from __future__ import annotations

from typing import Any

import numpy as np


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
