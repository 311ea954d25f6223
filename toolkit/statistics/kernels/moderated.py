"""Moderated t: few replicates, many features, one shared prior on the variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special, stats

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.resampling import FloatArray


@dataclass(frozen=True)
class ModeratedResult:
    """Empirical-Bayes t tests of means."""

    statistic: FloatArray
    """Moderated t [feature]."""
    p_value: FloatArray
    """Two-sided [feature]."""
    prior_variance: float
    """s0^2."""
    prior_dof: float
    """d0; infinite where the variances differ no more than chance."""


def moderated_t(x: Any) -> ModeratedResult:
    """Test mean = 0 over units with variances shrunk to a common prior, [unit, feature].

    Raises
    ------
    InputError
        If there are fewer than two units or features.

    References
    ----------
    Smyth 2004, doi:10.2202/1544-6115.1027, section 6.2.
    """
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or min(x.shape) < 2:
        raise InputError(f"x must be [unit, feature] with at least two of each, got shape {x.shape}.")
    dof = len(x) - 1
    variance = x.var(axis=0, ddof=1)
    prior_variance, prior_dof = _fit_prior(variance, dof)
    if np.isinf(prior_dof):
        posterior = np.full_like(variance, prior_variance)
    else:
        posterior = (prior_dof * prior_variance + dof * variance) / (prior_dof + dof)
    statistic = x.mean(axis=0) / np.sqrt(posterior / len(x))
    p = 2 * stats.t.sf(np.abs(statistic), min(prior_dof + dof, x.shape[1] * dof))
    return ModeratedResult(statistic, p, prior_variance, prior_dof)


def _fit_prior(variance: FloatArray, dof: int) -> tuple[float, float]:
    """Moments of log variances: s0^2 and d0."""
    e = np.log(variance) - special.digamma(dof / 2) + np.log(dof / 2)
    excess = e.var(ddof=1) - special.polygamma(1, dof / 2)
    if excess <= 0:
        return float(np.exp(e.mean())), float("inf")
    d0 = 2 * _trigamma_inverse(float(excess))
    return float(np.exp(e.mean() + special.digamma(d0 / 2) - np.log(d0 / 2))), d0


def _trigamma_inverse(value: float) -> float:
    """Solve trigamma(y) = value by Newton on 1/trigamma, which is convex and nearly linear."""
    y = 0.5 + 1 / value
    for _ in range(50):
        trigamma = float(special.polygamma(1, y))
        step = trigamma * (1 - trigamma / value) / float(special.polygamma(2, y))
        y += step
        if -step / y < 1e-15:
            break
    return y
