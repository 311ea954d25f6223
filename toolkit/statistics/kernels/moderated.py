"""Moderated t: few replicates, many features, one shared prior on the variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from scipy import special, stats

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.resampling import FloatArray

LEAST_VARIANCE: Final = 1e-5
"""Floor of a variance, as a share of the median variance (the value limma uses)."""


@dataclass(frozen=True)
class ModeratedResult:
    """Empirical-Bayes t tests of means."""

    statistic: FloatArray
    """Moderated t [feature]; NaN for untestable features."""
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
        If there are fewer than two units or testable features.

    Notes
    -----
    Features that are all zero or hold a NaN are untestable: NaN, and no part of the prior. Where other features do not
    vary at all, their variance counts as 1e-5 of the median, lest its logarithm decide the prior.

    References
    ----------
    Smyth 2004, doi:10.2202/1544-6115.1027, section 6.2.
    """
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or min(x.shape) < 2:
        raise InputError(f"x must be [unit, feature] with at least two of each, got shape {x.shape}.")
    tested = np.isfinite(x).all(axis=0) & (x != 0).any(axis=0)
    if tested.sum() < 2:
        raise InputError(f"a prior needs at least two testable features, got {int(tested.sum())} of {len(tested)}.")
    dof, n_tested = len(x) - 1, int(tested.sum())
    variance = np.full(x.shape[1], np.nan)
    variance[tested] = x[:, tested].var(axis=0, ddof=1)
    variance = np.maximum(variance, LEAST_VARIANCE * np.median(variance[tested]))
    if not np.median(variance[tested]) > 0:
        raise InputError("most features are the same in every unit, so that no prior variance can be estimated.")
    prior_variance, prior_dof = _fit_prior(variance[tested], dof)
    if np.isinf(prior_dof):
        posterior = np.where(tested, prior_variance, np.nan)
    else:
        posterior = (prior_dof * prior_variance + dof * variance) / (prior_dof + dof)
    statistic = x.mean(axis=0) / np.sqrt(posterior / len(x))
    statistic = np.where(tested, statistic, np.nan)
    p = 2 * stats.t.sf(np.abs(statistic), min(prior_dof + dof, n_tested * dof))
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
