"""Joint maximum tests over all features with the same flips (Westfall and Young)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.resampling import (
    BLOCK_FEATURES,
    MAX_EXACT_UNITS,
    SPARSE_DENSITY,
    TIE_SLACK,
    FlipTable,
    FloatArray,
    column_sums,
    flip_table,
    flip_units,
)

__all__ = ["MAX_EXACT_UNITS", "MaxTResult", "flip_statistics", "joint_p", "max_t", "max_t_p_value"]


@dataclass(frozen=True)
class MaxTResult:
    """Family-wise sign-flip test."""

    statistic: FloatArray
    """|sum d| / sqrt(sum d^2), [feature], signed if one-sided; NaN for untestable features."""
    p_single_step: FloatArray
    """Single-step joint p-value [feature]."""
    p_step_down: FloatArray
    """Step-down joint p-value [feature]; NaN everywhere if not asked for."""
    p_raw: FloatArray
    """Unadjusted p-value of the same flips [feature]."""
    maxima: FloatArray
    """Largest statistic of each flip over all features [flip]: combine blocks of features by their maximum."""
    exact: bool
    """Whether every flip was used."""


def flip_statistics(differences: FloatArray, flips: FloatArray, *, two_sided: bool = True) -> FloatArray:
    """|sum of flipped differences| / sqrt(sum d^2), [flip, feature], signed if one-sided; 0 for all-zero features.

    A sparse product is taken where less than 15% of the differences are nonzero.
    """
    scale = np.sqrt(column_sums(np.square(differences)))
    scaled = np.divide(differences, scale, out=np.zeros_like(differences), where=scale > 0)
    if np.count_nonzero(scaled) < SPARSE_DENSITY * scaled.size:
        sums = np.asarray(sparse.csr_array(scaled.T) @ flips.T).T
    else:
        sums = flips @ scaled
    return np.asarray(np.abs(sums) if two_sided else sums)


def max_t(
    differences: Any,
    *,
    n_resamples: int = 999,
    seed: int = 0,
    step_down: bool = True,
    clusters: Any = None,
    alternative: Literal["two-sided", "greater", "less"] = "two-sided",
) -> MaxTResult:
    """Family-wise p-values over all features from the same sign flips.

    Parameters
    ----------
    differences
        [unit, feature]. A feature that is NaN in every unit is untestable.
    n_resamples, seed
        Random flips and their seed; with at most 12 units every flip is used.
    step_down
        Whether to compute the step-down p-values too.
    clusters
        Labels [unit]; whole clusters are flipped.
    alternative
        ``two-sided``, ``greater`` or ``less``.

    Raises
    ------
    InputError
        If differences are not finite.
    RefusedError
        If there are fewer than six clusters.

    Notes
    -----
    p = (1 + #) / (P + 1), or # / 2^N when every flip is used. Untestable features get NaN and enter no maximum.
    Memory is one block of 1,024 flips x 1,024 features, and one bit per flip and unit.

    Features in several calls: call with the same units, seed and n_resamples (``step_down=False``), take the maximum of
    ``maxima`` over the calls, and give it to ``max_t_p_value``. Step-down needs all features in one call, or that
    procedure repeated on the features not rejected yet, which rejects the same.

    References
    ----------
    Westfall and Young 1993; step-down: algorithm 4.1, the same ordering for every flip.
    """
    units = flip_units(differences, clusters)
    d, two_sided = (-units.values if alternative == "less" else units.values), alternative == "two-sided"
    if alternative not in ("two-sided", "greater", "less"):
        raise InputError(f"alternative must be two-sided, greater or less, got {alternative!r}.")
    table = flip_table(len(d), n_resamples, seed=seed)
    norm, total = np.sqrt(column_sums(np.square(d))), column_sums(d)
    observed = np.full(d.shape[1], np.nan)
    np.divide(np.abs(total) if two_sided else total, norm, out=observed, where=norm > 0)
    order = np.argsort(observed, kind="stable")[: int(np.isfinite(observed).sum())]
    raw, down, maxima = _sweep(d, observed, order, table, two_sided)
    if step_down:  # enforce monotonicity from the largest statistic down
        down[order[::-1]] = np.maximum.accumulate(down[order[::-1]])
    else:
        down[:] = np.nan
    single = max_t_p_value(observed, maxima, exact=table.exact)
    return MaxTResult(-observed if alternative == "less" else observed, single, down, raw, maxima, table.exact)


def _sweep(
    d: FloatArray, observed: FloatArray, order: NDArray[np.int64], table: FlipTable, two_sided: bool
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Raw and step-down p-values and the maxima, going up from the smallest statistic so that the maxima grow."""
    maxima = np.full(len(table), 0.0 if two_sided else -np.inf)
    raw, down = np.full(len(observed), np.nan), np.full(len(observed), np.nan)
    for start in range(0, len(order), BLOCK_FEATURES):
        part = order[start : start + BLOCK_FEATURES]
        block, needed = np.take(d, part, axis=1), _needed(observed[part])
        reached, reached_running = np.zeros(len(part)), np.zeros(len(part))
        for here, flips in table.blocks():
            found = flip_statistics(block, flips, two_sided=two_sided)
            reached += (found >= needed).sum(axis=0)
            running = np.maximum(np.maximum.accumulate(found, axis=1), maxima[here, None])
            reached_running += (running >= needed).sum(axis=0)
            maxima[here] = running[:, -1]
        raw[part], down[part] = table.p_value(reached), table.p_value(reached_running)
    return raw, down, maxima


def _needed(observed: FloatArray) -> FloatArray:
    """What a flip must reach; relative slack for large statistics, absolute where the sum cancels to zero."""
    return observed - TIE_SLACK * (1.0 + np.abs(observed))


def joint_p(observed: FloatArray, null: FloatArray, exact: bool) -> FloatArray:
    """P-value of statistics [feature] against those of the flips [flip, feature], ties included."""
    reached = (null >= _needed(observed)).sum(axis=0)
    return np.asarray(reached / len(null) if exact else (1 + reached) / (len(null) + 1))


def max_t_p_value(statistic: Any, maxima: Any, *, exact: bool) -> FloatArray:
    """Single-step joint p-value of statistics [any shape] against the maxima over all features [flip]; NaN stays NaN.

    Parameters
    ----------
    statistic, maxima
        As in ``MaxTResult``; ``maxima`` may be the maximum over several calls with the same flips.
    exact
        Whether ``maxima`` holds every flip once.
    """
    observed, ranked = np.asarray(statistic, dtype=np.float64), np.sort(np.asarray(maxima, dtype=np.float64))
    reached = len(ranked) - np.searchsorted(ranked, _needed(np.nan_to_num(observed)), side="left")
    p = reached / len(ranked) if exact else (1 + reached) / (len(ranked) + 1)
    return np.where(np.isfinite(observed), p, np.nan)
