"""Two groups of units, labels permuted: the RL-specific contrast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.resampling import BLOCK_FEATURES, TIE_SLACK, FloatArray, stream

MIN_COUNT: Final = 20
"""Units of each kind below which the contrast is not estimable (METHOD.md 4c)."""


@dataclass(frozen=True)
class ContrastResult:
    """Difference of group means with a permutation p-value."""

    statistic: FloatArray
    """mean(plus) - mean(minus), [feature]."""
    p_value: FloatArray
    """[feature]; NaN where a group is too small or the feature is constant."""
    n_plus: int
    """Units in the first group."""
    n_minus: int
    """Units in the second group."""


def permutation_contrast(
    plus: Any,
    minus: Any,
    *,
    alternative: Literal["two-sided", "greater", "less"] = "two-sided",
    n_resamples: int = 9999,
    seed: int = 0,
    min_count: int = 1,
) -> ContrastResult:
    """Test mean(plus) = mean(minus) by permuting which unit is in which group, all features with the same permutations.

    Parameters
    ----------
    plus, minus
        [unit, feature] of each group.
    alternative
        ``two-sided``, ``greater`` or ``less``.
    n_resamples, seed
        Permutations and their seed.
    min_count
        Fewest units a group may have; below it every p-value is NaN.

    Raises
    ------
    InputError
        If the groups have different features or values are not finite.

    Notes
    -----
    Null: given the units, group membership is exchangeable. p = (1 + #{T_b >= T}) / (P + 1), never 0.
    """
    a, b = (np.atleast_2d(np.asarray(x, dtype=np.float64)) for x in (plus, minus))
    if a.shape[1] != b.shape[1]:
        raise InputError(f"groups must have the same features, got {a.shape[1]} and {b.shape[1]}.")
    pooled = np.concatenate([a, b])
    if not np.isfinite(pooled).all():
        raise InputError("values must be finite; drop units with NaN or infinite values.")
    n_plus, n = len(a), len(pooled)
    p = np.full(pooled.shape[1], np.nan)
    if min(n_plus, n - n_plus) < max(1, min_count):
        return ContrastResult(np.full(pooled.shape[1], np.nan), p, n_plus, n - n_plus)
    statistic = a.mean(axis=0) - b.mean(axis=0)
    sign = {"greater": 1.0, "less": -1.0}.get(alternative)
    weights = np.full((n_resamples, n), -1.0 / (n - n_plus))
    for draw in range(n_resamples):
        weights[draw, stream(seed, draw).permutation(n)[:n_plus]] = 1.0 / n_plus
    varies = np.flatnonzero(np.ptp(pooled, axis=0) > 0)
    centred = pooled - pooled.mean(axis=0)
    for start in range(0, len(varies), BLOCK_FEATURES):
        part = varies[start : start + BLOCK_FEATURES]
        null, seen = weights @ centred[:, part], statistic[part]
        if sign is None:
            null, seen = np.abs(null), np.abs(seen)
        else:
            null, seen = sign * null, sign * seen
        slack = TIE_SLACK * np.abs(centred[:, part]).max(axis=0)
        p[part] = (1 + (null >= seen - slack).sum(axis=0)) / (n_resamples + 1)
    return ContrastResult(statistic, p, n_plus, n - n_plus)
