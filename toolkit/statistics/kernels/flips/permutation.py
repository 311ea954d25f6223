"""Permutation test of two groups of units: the RL-specific contrast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.draws import stream
from rlgen_stats.toolkit.statistics.kernels.numerics import TIE_SLACK, FloatArray, column_sums

BLOCK_FEATURES: Final = 1024
"""Features per matrix product: with 1,024 draws the block of statistics is 8 MB and stays near the cache."""
BLOCK_DRAWS: Final = 1024
"""Draws per matrix product, for the same reason; memory does not grow with the number of draws."""
MIN_COUNT: Final = 20
"""Units per group below which the contrast is not estimable (docs/method.md 4c)."""


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
        If the groups have different features, values are not finite, or an option is unknown.

    Notes
    -----
    Null: given the units, group membership is exchangeable. p = (1 + #{T_b >= T}) / (P + 1), never 0. Unlike in
    ``scipy.stats.permutation_test``, permutation b depends on (seed, b) alone, whatever the block of features.

    In the RL-specific contrast of docs/method.md 4c a unit is a discordant prompt, with value D* = x(right model)
    - x(wrong model); ``plus`` are the prompts base got wrong and RL right, ``minus`` the reverse;
    ``min_count=MIN_COUNT``.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (plus, minus))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise InputError(f"groups must be [unit, feature] with the same features, got {a.shape} and {b.shape}.")
    if alternative not in ("two-sided", "greater", "less") or n_resamples < 1:
        raise InputError(
            f"alternative must be two-sided, greater or less and n_resamples at least 1, got {alternative!r} and "
            f"{n_resamples}."
        )
    pooled = np.concatenate([a, b])
    if not np.isfinite(pooled).all():
        raise InputError("values must be finite; drop units with NaN or infinite values.")
    n_plus, n = len(a), len(pooled)
    p = np.full(pooled.shape[1], np.nan)
    if min(n_plus, n - n_plus) < max(1, min_count):
        return ContrastResult(np.full(pooled.shape[1], np.nan), p, n_plus, n - n_plus)
    statistic = column_sums(a) / n_plus - column_sums(b) / (n - n_plus)
    chosen = np.zeros((n_resamples, n), dtype=bool)
    for draw in range(n_resamples):
        chosen[draw, stream(seed, draw).permutation(n)[:n_plus]] = True
    varies = np.flatnonzero(np.ptp(pooled, axis=0) > 0)
    for start in range(0, len(varies), BLOCK_FEATURES):
        part = varies[start : start + BLOCK_FEATURES]
        p[part] = _permuted(np.take(pooled, part, axis=1), statistic[part], chosen, alternative)
    return ContrastResult(statistic, p, n_plus, n - n_plus)


def _permuted(pooled: FloatArray, statistic: FloatArray, chosen: NDArray[np.bool_], alternative: str) -> FloatArray:
    """P-values of one block of features."""
    # Of centred values the sums over plus and minus are opposite, so one product gives the difference of means:
    # mean(plus) - mean(minus) = (1/n+ + 1/n-) x the sum over plus.
    centred = pooled - column_sums(pooled) / len(pooled)
    n_plus = int(chosen[0].sum())
    scale = 1.0 / n_plus + 1.0 / (len(pooled) - n_plus)
    sign = {"greater": 1.0, "less": -1.0}.get(alternative)
    needed = (np.abs(statistic) if sign is None else sign * statistic) - TIE_SLACK * np.abs(centred).max(axis=0)
    reached = np.zeros(len(statistic))
    for start in range(0, len(chosen), BLOCK_DRAWS):
        null = scale * (chosen[start : start + BLOCK_DRAWS].astype(np.float64) @ centred)
        reached += ((np.abs(null) if sign is None else sign * null) >= needed).sum(axis=0)
    return (1.0 + reached) / (len(chosen) + 1.0)
