"""Proportions: McNemar's test and Wilson's interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from rlgen_stats.schemas.errors import InputError


@dataclass(frozen=True)
class McNemarResult:
    """McNemar's test of paired right/wrong outcomes."""

    p_value: Any
    """Exact two-sided p-value; 1 without discordant pairs."""
    mid_p: Any
    """Mid-p version: less conservative, not guaranteed."""


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
    """Wilson score interval of a proportion (numbers or arrays); NaN where n is 0.

    Raises
    ------
    InputError
        If there are more successes than trials, or fewer than none.

    References
    ----------
    Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    k, trials = np.asarray(successes, dtype=np.float64), np.asarray(n, dtype=np.float64)
    if (k < 0).any() or (k > trials).any():
        raise InputError(f"successes must lie between 0 and the number of trials, got {successes} of {n}.")
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = proportion_confint(k, np.where(trials > 0, trials, np.nan), alpha=alpha, method="wilson")
    return (low, high) if np.ndim(low) else (float(low), float(high))
