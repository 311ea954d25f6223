"""Multiple-comparison correction over a whole family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray

AdjustMethod = Literal["bonferroni", "holm", "hommel", "bh", "by", "bky", "storey"]

_STATSMODELS: Final = {
    "bonferroni": "bonferroni",
    "bh": "fdr_bh",
    "by": "fdr_by",
    "bky": "fdr_tsbky",
}
METHODS: Final = ("bonferroni", "holm", "hommel", "bh", "by", "bky", "storey")
DEFAULT_LAMBDA: Final = 0.5
"""Storey's lambda: p-values above it estimate the null share; 1/2 balances bias and variance."""


@dataclass(frozen=True)
class StoreyResult:
    """Storey's q-values."""

    pi0: float
    """Estimated share of true nulls, never 0."""
    q_value: FloatArray
    """Same shape as the p-values; NaN where they are."""


@dataclass(frozen=True)
class FamilySize:
    """Number of p-values a correction over an array spans."""

    n_tested: int
    """Finite p-values: the family."""
    n_missing: int
    """NaN: left out of the family."""


def family_size(p: Any) -> FamilySize:
    """Count the p-values a correction spans, and the missing ones it leaves out."""
    finite = np.isfinite(_checked(p))
    return FamilySize(int(finite.sum()), int((~finite).sum()))


def adjust(p: Any, *, method: AdjustMethod | str, alpha: float = 0.05) -> FloatArray:
    """Adjusted p-values (or q-values) over all finite entries of ``p`` as one family, whatever its shape.

    Parameters
    ----------
    p
        P-values; NaN is outside the family and stays NaN (``family_size`` counts both).
    method
        bonferroni, holm, hommel (family-wise); bh, by, bky, storey (false discovery rate).
    alpha
        Level of the first stage of bky.

    Raises
    ------
    InputError
        If a p-value lies outside [0, 1] or the method is unknown.

    References
    ----------
    Benjamini and Hochberg 1995; Benjamini and Yekutieli 2001; Benjamini, Krieger and Yekutieli 2006; Hommel 1988;
    Storey 2002, doi:10.1111/1467-9868.00346.

    Examples
    --------
    >>> adjust([[0.01, 0.04], [0.03, float("nan")]], method="bh").round(4).tolist()
    [[0.03, 0.04], [0.04, nan]]
    """
    if method not in METHODS:
        raise InputError(f"no correction is called {method!r}; expected one of {list(METHODS)}.")
    if method == "storey":
        return storey(p).q_value
    p = _checked(p)
    finite = np.isfinite(p)
    adjusted = np.full(p.shape, np.nan)
    if finite.any():
        fast = {"holm": _holm, "hommel": _hommel}.get(method)
        adjusted[finite] = fast(p[finite]) if fast else _by_statsmodels(p[finite], method, alpha)
    return adjusted


def _by_statsmodels(p: FloatArray, method: str, alpha: float) -> FloatArray:
    from statsmodels.stats.multitest import multipletests  # takes longer to import than scipy

    return np.asarray(multipletests(p, alpha=alpha, method=_STATSMODELS[method])[1])


def _holm(p: FloatArray) -> FloatArray:
    """Step-down Bonferroni (statsmodels' routine collects garbage on every call, a quarter of a second each)."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def _hommel(p: FloatArray) -> FloatArray:
    """Adjusted p-values of the closed Simes test in n log n (quadratic routines take minutes at 10^5 p-values).

    H_i is rejected at level a iff h(a) p_i <= a, h(a) the largest m whose m largest p-values pass Simes at a. With s_m
    the Simes p-value of the m largest, which falls as m grows, the adjusted p is min_m max(s_{m+1}, m p_i): one falling
    and one rising sequence, so a binary search finds where they cross.
    """
    n = len(p)
    simes = np.append(_simes_of_largest(np.sort(p)), 0.0)  # simes[m] = s_{m+1}, m = 0..n
    low, high = np.zeros(n, dtype=np.int64), np.full(n, n)
    while (low < high).any():  # smallest m with m p >= s_{m+1}
        middle = (low + high) // 2
        crossed = middle * p >= simes[middle]
        low, high = np.where(crossed, low, middle + 1), np.where(crossed, middle, high)
    return np.asarray(np.minimum(np.minimum(low * p, simes[np.maximum(low - 1, 0)]), 1.0))


def _simes_of_largest(ordered: FloatArray) -> FloatArray:
    """Simes p-value min_j m p_(n-m+j) / j of the m largest, m = 1..n: the least slope from (n - m, 0) to the points
    (k, p_(k)) to its right, which touches their lower convex hull. Each step adds one point at the left of the hull.
    """
    values = ordered.tolist()
    n = len(values)
    hull: list[int] = []  # ranks k, from right to left
    simes = np.empty(n)
    for m in range(1, n + 1):
        k = n - m + 1
        height = values[k - 1]
        while len(hull) > 1 and (values[hull[-1] - 1] - height) * (hull[-2] - k) >= (values[hull[-2] - 1] - height) * (
            hull[-1] - k
        ):
            hull.pop()
        hull.append(k)
        low, high = 0, len(hull) - 1  # slopes from (n - m, 0) fall, then rise along the hull
        while low < high:
            middle = (low + high) // 2
            right, left = hull[middle], hull[middle + 1]
            if values[right - 1] * (left - n + m) <= values[left - 1] * (right - n + m):
                high = middle
            else:
                low = middle + 1
        simes[m - 1] = m * values[hull[low] - 1] / (hull[low] - n + m)
    return simes


def storey(p: Any, *, threshold: float = DEFAULT_LAMBDA) -> StoreyResult:
    """Storey's estimate of the null share at ``threshold`` and q = pi0 * BH (never above 1).

    Raises
    ------
    InputError
        If a p-value lies outside [0, 1], or the threshold is not in (0, 1).

    Notes
    -----
    Where no p-value lies above the threshold the estimate and every q would be 0; one p-value is counted there instead
    (the finite-sample form of Storey, Taylor and Siegmund 2004). Valid for independent or
    weakly dependent p-values; in families of 70 in blocks of 10 that correlate .5 the false discovery rate was .13 at a
    nominal .10, where ``bh`` kept it.

    References
    ----------
    Storey 2002, doi:10.1111/1467-9868.00346, equations 4 and 11.
    """
    if not 0 < threshold < 1:
        raise InputError(f"the threshold must lie in (0, 1), got {threshold}.")
    p = _checked(p)
    finite = p[np.isfinite(p)]
    if not len(finite):
        return StoreyResult(float("nan"), np.full(p.shape, np.nan))
    pi0 = min(1.0, max(1.0, float((finite > threshold).sum())) / (len(finite) * (1 - threshold)))
    return StoreyResult(pi0, np.asarray(pi0 * adjust(p, method="bh")))


def _checked(p: Any) -> FloatArray:
    array = np.asarray(p, dtype=np.float64)
    if (array < 0).any() or (array > 1).any():
        raise InputError(f"p-values lie in [0, 1], got {np.nanmin(array):g} to {np.nanmax(array):g}.")
    return array
