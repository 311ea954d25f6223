"""Joint maximum tests over all features with the same flips (Westfall and Young)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from scipy import sparse

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.resampling import (
    BLOCK_FEATURES,
    SPARSE_DENSITY,
    TIE_SLACK,
    FloatArray,
    all_flips,
    as_units,
    cluster_totals,
    sign_flips,
)

MAX_EXACT_UNITS: Final = 12
"""Units up to which all 4,096 flips are used instead of random ones."""


@dataclass(frozen=True)
class MaxTResult:
    """Family-wise sign-flip test."""

    statistic: FloatArray
    """|sum d| / sqrt(sum d^2), [feature]; NaN for all-zero features."""
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


def flip_statistics(differences: FloatArray, flips: FloatArray) -> FloatArray:
    """|sum of flipped differences| / sqrt(sum d^2), [flip, feature]; 0 for all-zero features.

    A sparse product is taken where less than 15% of the differences are nonzero.
    """
    scale = np.sqrt(np.square(differences).sum(axis=0))
    scaled = np.divide(differences, scale, out=np.zeros_like(differences), where=scale > 0)
    if np.count_nonzero(scaled) < SPARSE_DENSITY * scaled.size:
        return np.asarray(np.abs(np.asarray(sparse.csr_array(scaled.T) @ flips.T).T))
    return np.asarray(np.abs(flips @ scaled))


def max_t(
    differences: Any, *, n_resamples: int = 999, seed: int = 0, step_down: bool = True, clusters: Any = None
) -> MaxTResult:
    """Family-wise p-values over all features from the same sign flips.

    Parameters
    ----------
    differences
        [unit, feature].
    n_resamples, seed
        Random flips and their seed; with at most 12 units every flip is used.
    step_down
        Whether to compute the step-down p-values too.
    clusters
        Labels [unit]; whole clusters are flipped.

    Raises
    ------
    InputError
        If differences are not finite.

    Notes
    -----
    Features are processed in blocks; the state is one maximum a flip. p = (1 + #) / (P + 1), or # / 2^N when every
    flip is used. All-zero features get NaN and enter no maximum.

    References
    ----------
    Westfall and Young 1993; step-down: algorithm 4.1, the same ordering for every flip.
    """
    d, _ = as_units(differences)
    if not np.isfinite(d).all():
        raise InputError(
            f"differences must be finite, got {int((~np.isfinite(d)).sum())} NaN or infinite; drop those units."
        )
    if clusters is not None:
        d = cluster_totals(d, clusters)
    exact = len(d) <= MAX_EXACT_UNITS
    flips = all_flips(len(d)) if exact else sign_flips(len(d), 0, n_resamples, seed=seed)
    norm = np.sqrt(np.square(d).sum(axis=0))
    observed = np.divide(np.abs(d.sum(axis=0)), norm, out=np.full(d.shape[1], np.nan), where=norm > 0)
    order = np.argsort(observed, kind="stable")[: int(np.isfinite(observed).sum())]
    maxima = np.zeros(len(flips))
    raw, down = np.full(d.shape[1], np.nan), np.full(d.shape[1], np.nan)
    for start in range(0, len(order), BLOCK_FEATURES):
        part = order[start : start + BLOCK_FEATURES]
        found = flip_statistics(d[:, part], flips)
        raw[part] = joint_p(observed[part], found, exact)
        if step_down:
            running = np.maximum(np.maximum.accumulate(found, axis=1), maxima[:, None])
            down[part] = joint_p(observed[part], running, exact)
            maxima = running[:, -1]
        else:
            maxima = np.maximum(maxima, found.max(axis=1))
    if step_down:  # enforce monotonicity from the largest statistic down
        down[order[::-1]] = np.maximum.accumulate(down[order[::-1]])
    single = np.where(np.isfinite(observed), _against(observed, maxima, exact), np.nan)
    return MaxTResult(observed, single, down, raw, maxima, exact)


def joint_p(observed: FloatArray, null: FloatArray, exact: bool) -> FloatArray:
    """Share of flips [flip, feature] that reach the observed statistic [feature], ties included."""
    reached = (null >= observed * (1 - TIE_SLACK)).sum(axis=0)
    return np.asarray(reached / len(null) if exact else (1 + reached) / (len(null) + 1))


def _against(observed: FloatArray, maxima: FloatArray, exact: bool) -> FloatArray:
    ranked = np.sort(maxima)
    reached = len(maxima) - np.searchsorted(ranked, np.nan_to_num(observed) * (1 - TIE_SLACK), side="left")
    return np.asarray(reached / len(maxima) if exact else (1 + reached) / (len(maxima) + 1))
