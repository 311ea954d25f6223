"""Counts and clustered means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray
from rlgen_stats.toolkit.statistics.kernels.unit_tables import as_units, cluster_totals


@dataclass(frozen=True)
class McNemarResult:
    """McNemar's test of paired right/wrong outcomes."""

    p_value: Any
    """Exact two-sided p-value; 1 without discordant pairs."""
    mid_p: Any
    """Mid-p version: less conservative, not guaranteed."""


@dataclass(frozen=True)
class ClusterResult:
    """Mean with a cluster-robust standard error."""

    mean: FloatArray
    """[feature]."""
    standard_error: FloatArray
    """[feature]."""
    n_clusters: int
    """Independent units."""


def mcnemar(gained: Any, lost: Any) -> McNemarResult:
    """Exact and mid-p McNemar test from the two discordant counts (numbers or arrays).

    References
    ----------
    McNemar 1947; mid-p: Fagerland, Lydersen and Laake 2013, doi:10.1186/1471-2288-13-91.
    """
    b, c = np.asarray(gained), np.asarray(lost)
    if (b < 0).any() or (c < 0).any():
        raise InputError("discordant counts cannot be negative.")
    least, n = np.minimum(b, c), b + c
    tail = stats.binom.cdf(least, n, 0.5)
    return McNemarResult(np.minimum(1.0, 2 * tail), np.minimum(1.0, 2 * tail - stats.binom.pmf(least, n, 0.5)))


def wilson_interval(successes: Any, n: Any, *, alpha: float = 0.05) -> tuple[Any, Any]:
    """Wilson score interval of a proportion (numbers or arrays); NaN where nothing was tried.

    Raises
    ------
    InputError
        If there are more successes than tries, or negative ones.

    References
    ----------
    Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    k, tries = np.asarray(successes, dtype=np.float64), np.asarray(n, dtype=np.float64)
    if (k < 0).any() or (k > tries).any():
        raise InputError(f"successes must lie between 0 and the tries, got {successes} of {n}.")
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = proportion_confint(k, np.where(tries > 0, tries, np.nan), alpha=alpha, method="wilson")
    return (low, high) if np.ndim(low) else (float(low), float(high))


def cluster_se(values: Any, clusters: Any, *, kind: Literal["CR0", "CR1"] = "CR1") -> ClusterResult:
    """Standard error of a mean whose units are dependent within clusters.

    Parameters
    ----------
    values
        [unit] or [unit, feature].
    clusters
        Labels [unit].
    kind
        CR0 (sandwich) or CR1 (times sqrt(G / (G - 1)) for G clusters).

    Raises
    ------
    InputError
        If there are fewer than two clusters, or the kind is unknown.

    References
    ----------
    Liang and Zeger 1986; Cameron and Miller 2015, doi:10.3368/jhr.50.2.317, section II.
    """
    if kind not in ("CR0", "CR1"):
        raise InputError(f"kind must be CR0 or CR1, got {kind!r}.")
    x, single = as_units(values)
    mean = x.mean(axis=0)
    totals = cluster_totals(x - mean, clusters)
    g = len(totals)
    if g < 2:
        raise InputError(f"a clustered standard error needs at least two clusters, got {g}.")
    error = np.sqrt(np.square(totals).sum(axis=0)) / len(x)
    if kind == "CR1":
        error = error * np.sqrt(g / (g - 1))
    return ClusterResult(mean[0], error[0], g) if single else ClusterResult(mean, error, g)
