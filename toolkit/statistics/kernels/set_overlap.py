"""Agreement of sets and rankings: rank-biased overlap, Nogueira's stability, chance of an overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from rlgen_stats.schemas.errors import InputError


@dataclass(frozen=True)
class RboResult:
    """Rank-biased overlap of two finite rankings."""

    truncated: float
    """Sum over the observed depths alone, as if later ranks shared nothing; below every attainable overlap."""
    minimum: float
    """Smallest overlap of any continuation (Webber's minimum): items shared so far stay shared at every later depth."""
    extrapolated: float
    """Overlap if the observed agreement continues."""


def rbo(first: Sequence[Any], second: Sequence[Any], persistence: float = 0.9) -> RboResult:
    """Rank-biased overlap of two rankings without repeated items.

    References
    ----------
    Webber, Moffat and Zobel 2010, doi:10.1145/1852102.1852106, equations 11 and 32.
    """
    if not 0 < persistence < 1:
        raise InputError(f"persistence must lie in (0, 1), got {persistence}.")
    short, long_ = sorted((list(first), list(second)), key=len)
    if len(set(short)) < len(short) or len(set(long_)) < len(long_):
        raise InputError("a ranking lists every item once; an item is repeated.")
    s, n, p = len(short), len(long_), persistence
    if s == 0:
        return RboResult(0.0, 0.0, 0.0)
    overlap, seen_a, seen_b = [0], set(), set()
    for depth in range(n):
        seen_b.add(long_[depth])
        if depth < s:
            seen_a.add(short[depth])
        overlap.append(len(seen_a & seen_b))
    x = np.array(overlap, dtype=np.float64)
    d = np.arange(1, n + 1)
    weight = p**d / d
    at_s, at_n = x[s], x[n]
    depth_s = np.arange(1, s + 1)
    minimum = (1 - p) / p * (((x[1 : s + 1] - at_s) * p**depth_s / depth_s).sum() - at_s * np.log(1 - p))
    tail = np.arange(s + 1, n + 1)
    body = (x[1:] * weight).sum() + (at_s * (tail - s) / (s * tail) * p**tail).sum()
    extrapolated = (1 - p) / p * body + ((at_n - at_s) / n + at_s / s) * p**n
    truncated = (1 - p) / p * (x[1 : s + 1] * p**depth_s / depth_s).sum()
    return RboResult(float(truncated), float(minimum), float(extrapolated))


def nogueira(selected: Any) -> float:
    """Stability of repeated selections, [repeat, feature] of 0/1; 1 is always the same set, 0 is chance.

    NaN where it is undefined (nothing or everything selected each time).

    References
    ----------
    Nogueira, Sechidis and Brown 2018, JMLR 18(174), equation 4.
    """
    z = np.asarray(selected, dtype=np.float64)
    if z.ndim != 2 or len(z) < 2:
        raise InputError(f"selections must be [repeat, feature] with at least two repeats, got shape {z.shape}.")
    share = z.mean(axis=1).mean()
    if share in (0.0, 1.0):
        return float("nan")
    return float(1 - z.var(axis=0, ddof=1).mean() / (share * (1 - share)))


def set_overlap_pvalue(shared: Any, n_features: Any, size_a: Any, size_b: Any) -> Any:
    """Chance that two random sets of these sizes share at least ``shared`` features (hypergeometric; broadcasts).

    Raises
    ------
    InputError
        If a set is larger than the number of features, or than what is shared.
    """
    if np.any(np.maximum(size_a, size_b) > n_features):
        raise InputError(f"sets of {size_a} and {size_b} do not fit into {n_features} features.")
    if np.any(np.asarray(shared) > np.minimum(size_a, size_b)):
        raise InputError(f"sets of {size_a} and {size_b} cannot share {shared} features.")
    return stats.hypergeom.sf(np.asarray(shared) - 1, n_features, size_a, size_b)
