"""Partial conjunction: evidence that a feature has an effect in at least u tasks."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from scipy import stats

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray


def partial_conjunction(p: Any, *, u: int, combine: Literal["bonferroni", "simes", "fisher"] | str) -> FloatArray:
    """P-value that fewer than ``u`` of the tasks have an effect, [feature].

    Parameters
    ----------
    p
        [feature, task]; a feature with a missing p-value gets NaN.
    u
        Tasks that must show the effect; the number of tasks is the intersection.
    combine
        ``bonferroni`` (any dependence), ``simes`` (positive dependence), ``fisher`` (independent tasks).

    Raises
    ------
    InputError
        If ``p`` is no table of p-values, ``u`` is not between 1 and the number of tasks, or the rule is unknown.

    References
    ----------
    Benjamini and Heller 2008, doi:10.1111/j.1541-0420.2007.00984.x, equations 5 to 7.
    """
    p = np.asarray(p, dtype=np.float64)
    if p.ndim != 2 or (p < 0).any() or (p > 1).any():
        raise InputError(f"expected p-values in [0, 1] as [feature, task], got shape {p.shape}.")
    n = p.shape[1]
    if not 1 <= u <= n:
        raise InputError(f"u must be between 1 and the number of tasks {n}, got {u}.")
    upper = np.sort(p, axis=1)[:, u - 1 :]
    if combine == "bonferroni":
        joint = (n - u + 1) * upper[:, 0]
    elif combine == "simes":
        joint = ((n - u + 1) / np.arange(1, n - u + 2) * upper).min(axis=1)
    elif combine == "fisher":
        with np.errstate(divide="ignore"):
            joint = stats.chi2.sf(-2 * np.log(upper).sum(axis=1), 2 * (n - u + 1))
    else:
        raise InputError(f"combine must be bonferroni, simes or fisher, got {combine!r}.")
    return np.asarray(np.where(np.isnan(p).any(axis=1), np.nan, np.minimum(1.0, joint)))
