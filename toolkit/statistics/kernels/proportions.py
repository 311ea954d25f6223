"""Proportions: McNemar's test, Wilson's interval, pass@k."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from rlgen_stats.schemas.errors import InputError


@dataclass(frozen=True)
class McNemarResult:
    """McNemar's test of paired right/wrong outcomes."""

    p_value: Any
    """Exact two-sided p-value; 1 without discordant pairs."""
    mid_p: Any
    """Mid-p version: less conservative, not guaranteed."""


def mcnemar(gained: Any, lost: Any) -> McNemarResult:
    """Exact and mid-p McNemar test of paired right/wrong outcomes, from the counts of discordant pairs.

    Parameters
    ----------
    gained, lost
        Pairs wrong in the first and right in the second condition, and the reverse; numbers or arrays.

    Raises
    ------
    InputError
        If a count is negative.

    References
    ----------
    McNemar 1947; mid-p: Fagerland, Lydersen and Laake 2013, doi:10.1186/1471-2288-13-91.

    Examples
    --------
    >>> round(float(mcnemar(33, 59).p_value), 6)
    0.008781
    """
    b, c = np.asarray(gained), np.asarray(lost)
    if (b < 0).any() or (c < 0).any():
        raise InputError("discordant counts cannot be negative.")
    least, n = np.minimum(b, c), b + c
    tail = stats.binom.cdf(least, n, 0.5)
    return McNemarResult(np.minimum(1.0, 2 * tail), np.minimum(1.0, 2 * tail - stats.binom.pmf(least, n, 0.5)))


def wilson_interval(successes: Any, n: Any, *, alpha: float = 0.05) -> tuple[Any, Any]:
    """Wilson score interval of a proportion.

    Parameters
    ----------
    successes, n
        Successes and trials; numbers or arrays.
    alpha
        1 - coverage.

    Returns
    -------
    low, high
        Numbers or arrays; NaN where n is 0.

    Raises
    ------
    InputError
        If there are more successes than trials, or fewer than none.

    References
    ----------
    Wilson 1927, doi:10.1080/01621459.1927.10502953.

    Examples
    --------
    >>> low, high = wilson_interval(7, 20)
    >>> round(low, 4), round(high, 4)
    (0.1812, 0.5671)
    """
    from statsmodels.stats.proportion import proportion_confint  # takes longer to import than scipy

    k, trials = np.asarray(successes, dtype=np.float64), np.asarray(n, dtype=np.float64)
    if (k < 0).any() or (k > trials).any():
        raise InputError(f"successes must lie between 0 and the number of trials, got {successes} of {n}.")
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = proportion_confint(k, trials, alpha=alpha, method="wilson")
    return (low, high) if np.ndim(low) else (float(low), float(high))


def pass_at_k(right: Any, n: Any, k: Any) -> Any:
    """Unbiased estimate of the chance that at least one of k completions is right.

    Parameters
    ----------
    right, n
        Right completions and completions of each prompt; numbers or arrays.
    k
        Completions that are tried, at most ``n``.

    Returns
    -------
    number or array
        1 - C(n - right, k) / C(n, k): the share of subsets of k completions that hold a right one.

    Raises
    ------
    InputError
        If k is no count from 1 to n, or more completions are right than there are.

    References
    ----------
    Chen et al. 2021, arXiv 2107.03374, eq. 1.

    Examples
    --------
    >>> round(float(pass_at_k(1, 4, 2)), 6)
    0.5
    """
    c, trials, tries = np.broadcast_arrays(right, n, k)
    if (c < 0).any() or (c > trials).any():
        raise InputError(f"right completions must lie between 0 and their number, got {right} of {n}.")
    if (tries < 1).any() or (tries > trials).any():
        raise InputError(f"pass@k needs 1 <= k <= completions of every prompt, got k = {k} of {n}.")
    return stats.hypergeom.sf(0, trials, c, tries)
