"""Moderated t: few replicates, many features, variances shrunk towards a common prior (limma)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from scipy import special, stats

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray

LEAST_VARIANCE: Final = 1e-5
"""Smallest variance, as a share of the median variance (limma's value)."""


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
    effect: FloatArray
    """Mean, or difference of the two means [feature]; NaN for untestable features."""


def moderated_t(x: Any, y: Any = None) -> ModeratedResult:
    """Test that means over units, or differences of two groups' means, are zero, with empirical-Bayes variances.

    Parameters
    ----------
    x
        [unit, feature]; a unit is a replicate, such as a training run.
    y
        [unit, feature] of a second, independent group; None to test the mean of ``x`` against zero.

    Returns
    -------
    ModeratedResult
        [feature].

    Raises
    ------
    InputError
        If there are fewer than two units (three in two groups) or testable features, or the groups' features differ.

    Notes
    -----
    Features that are all zero or hold a NaN are untestable: NaN, and left out of the prior. A constant feature's
    variance is raised to 1e-5 of the median, because the logarithm of 0 would dominate the prior.

    Two groups: mean(x) - mean(y) over the pooled variance with n1 + n2 - 2 degrees of freedom, which assumes equal
    variances: with unequal sizes and variances prefer ``permutation_contrast`` over runs. Not for pairs: pass their
    differences as ``x``. Assumes normal replicates, which three against three runs cannot check.

    References
    ----------
    Smyth 2004, doi:10.2202/1544-6115.1027, sections 2 and 6.2.

    Examples
    --------
    >>> runs = np.random.default_rng(0).normal(size=(6, 50))
    >>> result = moderated_t(runs[:3] + 4.0 * (np.arange(50) == 7), runs[3:])
    >>> int(np.argmin(result.p_value)), bool(result.p_value[7] < 0.001)
    (7, True)
    """
    x = np.asarray(x, dtype=np.float64)
    y = None if y is None else np.asarray(y, dtype=np.float64)
    _check(x, y)
    groups = (x,) if y is None else (x, y)
    pooled = np.concatenate(groups)
    tested = np.isfinite(pooled).all(axis=0) & (pooled != 0).any(axis=0)
    if tested.sum() < 2:
        raise InputError(f"a prior needs at least two testable features, got {int(tested.sum())} of {len(tested)}.")
    dof, n_tested = len(pooled) - len(groups), int(tested.sum())
    variance = np.full(x.shape[1], np.nan)
    if y is None:
        variance[tested] = x[:, tested].var(axis=0, ddof=1)
    else:
        variance[tested] = sum(len(g) * g[:, tested].var(axis=0) for g in groups) / dof
    variance = np.maximum(variance, LEAST_VARIANCE * np.median(variance[tested]))
    if not np.median(variance[tested]) > 0:
        raise InputError("most features are the same in every unit, so that no prior variance can be estimated.")
    prior_variance, prior_dof = _fit_prior(variance[tested], dof)
    if np.isinf(prior_dof):
        posterior = np.where(tested, prior_variance, np.nan)
    else:
        posterior = (prior_dof * prior_variance + dof * variance) / (prior_dof + dof)
    if y is None:
        effect, error = x.mean(axis=0), np.sqrt(posterior / len(x))
    else:
        effect, error = x.mean(axis=0) - y.mean(axis=0), np.sqrt(posterior * (1 / len(x) + 1 / len(y)))
    effect = np.where(tested, effect, np.nan)
    statistic = effect / error
    # The prior adds degrees of freedom, but no more than all features hold together (limma's cap).
    p = 2 * stats.t.sf(np.abs(statistic), min(prior_dof + dof, n_tested * dof))
    return ModeratedResult(statistic, p, prior_variance, prior_dof, effect)


def _check(x: FloatArray, y: FloatArray | None) -> None:
    if y is None and (x.ndim != 2 or min(x.shape) < 2):
        raise InputError(f"x must be [unit, feature] with at least two of each, got shape {x.shape}.")
    if y is not None and (
        x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 1 or len(x) + len(y) < 3
    ):
        raise InputError(
            "two groups must be [unit, feature] with the same features and at least three units together, got shapes "
            f"{x.shape} and {y.shape}."
        )


def _fit_prior(variance: FloatArray, dof: int) -> tuple[float, float]:
    """Prior variance s0^2 and degrees of freedom d0 from the moments of the log variances."""
    e = np.log(variance) - special.digamma(dof / 2) + np.log(dof / 2)
    excess = e.var(ddof=1) - special.polygamma(1, dof / 2)
    if excess <= 0:
        return float(np.exp(e.mean())), float("inf")
    d0 = 2 * _trigamma_inverse(float(excess))
    return float(np.exp(e.mean() + special.digamma(d0 / 2) - np.log(d0 / 2))), d0


def _trigamma_inverse(value: float) -> float:
    """Solve trigamma(y) = value by Newton's method on 1/trigamma, which is convex and nearly linear."""
    y = 0.5 + 1 / value
    for _ in range(50):
        trigamma = float(special.polygamma(1, y))
        step = trigamma * (1 - trigamma / value) / float(special.polygamma(2, y))
        y += step
        if -step / y < 1e-15:
            break
    return y
