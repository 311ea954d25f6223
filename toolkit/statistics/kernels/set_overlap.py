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
    """Rank-biased overlap of two rankings.

    Parameters
    ----------
    first, second
        Items from rank 1 on, none repeated; lengths may differ.
    persistence
        Weight of a depth relative to the one before it, in (0, 1); higher values weigh deeper ranks more.

    Raises
    ------
    InputError
        If the persistence is out of range or a ranking repeats an item.

    References
    ----------
    Webber, Moffat and Zobel 2010, doi:10.1145/1852102.1852106, equations 11 and 32.

    Examples
    --------
    >>> overlap = rbo("abcde", "bacef", 0.9)
    >>> round(overlap.truncated, 6), round(overlap.minimum, 6), round(overlap.extrapolated, 6)
    (0.278163, 0.488146, 0.750555)
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
    """Stability of repeated selections: 1 if the set is always the same, 0 on average by chance.

    Parameters
    ----------
    selected
        [repeat, feature] of 0 and 1.

    Returns
    -------
    float
        NaN where it is undefined: no feature selected in any repeat, or every feature in all of them.

    Raises
    ------
    InputError
        If there are fewer than two repeats.

    References
    ----------
    Nogueira, Sechidis and Brown 2018, JMLR 18(174), equation 4.

    Examples
    --------
    >>> round(nogueira([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]]), 6)
    0.333333
    """
    z = np.asarray(selected, dtype=np.float64)
    if z.ndim != 2 or len(z) < 2:
        raise InputError(f"selections must be [repeat, feature] with at least two repeats, got shape {z.shape}.")
    share = z.mean(axis=1).mean()
    if share in (0.0, 1.0):
        return float("nan")
    return float(1 - z.var(axis=0, ddof=1).mean() / (share * (1 - share)))


def set_overlap_pvalue(shared: Any, n_features: Any, size_a: Any, size_b: Any) -> Any:
    """Probability that two random sets share at least ``shared`` features (hypergeometric).

    Parameters
    ----------
    shared
        Features in both sets.
    n_features
        Features from which both sets are drawn.
    size_a, size_b
        Sizes of the sets; all arguments broadcast.

    Raises
    ------
    InputError
        If a set is larger than the number of features, or smaller than the number shared.

    Examples
    --------
    >>> round(float(set_overlap_pvalue(3, 32768, 50, 50)), 10)
    6.22882e-05
    """
    if np.any(np.maximum(size_a, size_b) > n_features):
        raise InputError(f"sets of {size_a} and {size_b} do not fit into {n_features} features.")
    if np.any(np.asarray(shared) > np.minimum(size_a, size_b)):
        raise InputError(f"sets of {size_a} and {size_b} cannot share {shared} features.")
    return stats.hypergeom.sf(np.asarray(shared) - 1, n_features, size_a, size_b)
