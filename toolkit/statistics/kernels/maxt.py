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
    ROUNDING,
    SPARSE_DENSITY,
    TIE_SLACK,
    FlipTable,
    FloatArray,
    as_table,
    cluster_codes,
    column_sums,
    feature_blocks,
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
    scaled = np.ascontiguousarray(np.divide(differences, scale, out=np.zeros_like(differences), where=scale > 0).T)
    few = np.count_nonzero(scaled) < SPARSE_DENSITY * scaled.size
    return _sums(sparse.csr_array(scaled) if few else scaled, flips, two_sided).T


def _sums(scaled: Any, flips: FloatArray, two_sided: bool) -> FloatArray:
    sums = np.asarray(scaled @ flips.T)
    return np.abs(sums, out=sums) if two_sided else sums


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
    Memory is the differences (only their nonzeros, if fewer than 15% are), one block of at most 1,024 flips x 1,024
    features, and one bit per flip and unit.

    Features in several calls: call with the same units, seed and n_resamples (``step_down=False``), take the maximum of
    ``maxima`` over the calls, and give it to ``max_t_p_value``. Step-down needs all features in one call, or that
    procedure repeated on the features not rejected yet, which rejects the same.

    References
    ----------
    Westfall and Young 1993; step-down: algorithm 4.1, the same ordering for every flip.
    """
    if alternative not in ("two-sided", "greater", "less"):
        raise InputError(f"alternative must be two-sided, greater or less, got {alternative!r}.")
    two_sided = alternative == "two-sided"
    scaled, observed = _scaled(differences, clusters, alternative)
    table = flip_table(scaled.shape[1], n_resamples, seed=seed)
    order = np.flatnonzero(np.isfinite(observed))
    if step_down:
        rank = np.argsort(observed[order], kind="stable")
        scaled, order = scaled[rank], order[rank]
    raw, down = np.full(len(observed), np.nan), np.full(len(observed), np.nan)
    raw[order], running, maxima = _sweep(scaled, observed[order], table, two_sided, step_down)
    if step_down:  # enforce monotonicity from the largest statistic down
        down[order[::-1]] = np.maximum.accumulate(running[::-1])
    single = max_t_p_value(observed, maxima, exact=table.exact)
    return MaxTResult(-observed if alternative == "less" else observed, single, down, raw, maxima, table.exact)


def _scaled(differences: Any, clusters: Any, alternative: str) -> tuple[Any, FloatArray]:
    """Testable features over their norm, [feature, unit], a CSR array where few values are nonzero; all statistics."""
    d, _ = as_table(differences)
    codes = None if clusters is None else cluster_codes(clusters, len(d))
    few = np.count_nonzero(d) < SPARSE_DENSITY * d.size
    blocks: list[Any] = []
    total, norm = np.zeros(d.shape[1]), np.zeros(d.shape[1])
    for part in feature_blocks(*d.shape):
        rows = _nonzeros(d[:, part]) if few and codes is None else None
        if rows is None:
            values = flip_units(d[:, part], codes).values
            total[part], norm[part] = column_sums(values), np.sqrt(column_sums(np.square(values)))
            rows = np.ascontiguousarray(values.T)
            rows = sparse.csr_array(rows) if few else rows
        else:
            row = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
            total[part] = np.bincount(row, rows.data, rows.shape[0])
            norm[part] = np.sqrt(np.bincount(row, np.square(rows.data), rows.shape[0]))
        blocks.append(rows)
    tested = np.flatnonzero(norm > 0)
    signed = -total if alternative == "less" else np.abs(total) if alternative == "two-sided" else total
    observed = np.full(len(norm), np.nan)
    observed[tested] = signed[tested] / norm[tested]
    factor = (-1.0 if alternative == "less" else 1.0) / norm[tested]
    if not few:
        return np.concatenate(blocks)[tested] * factor[:, None], observed
    whole = sparse.vstack(blocks, format="csr")[tested]
    whole.data *= np.repeat(factor, np.diff(whole.indptr))
    return (whole if whole.nnz < SPARSE_DENSITY * np.prod(whole.shape) else whole.toarray()), observed


def _nonzeros(d: NDArray[Any]) -> Any:
    """Differences [unit, feature] as a CSR array [feature, unit], as ``flip_units`` cleans them; None if not finite."""
    turned = np.ascontiguousarray(d.T)
    row, column = np.nonzero(turned)
    values = turned[row, column].astype(np.float64)
    if not np.isfinite(values).all():
        return None
    magnitude = np.abs(values)
    starts = np.searchsorted(row, np.arange(len(turned)))
    largest = np.maximum.reduceat(np.append(magnitude, 0.0), starts) if len(turned) else magnitude
    kept = magnitude > ROUNDING * largest[row]
    if not kept.all():
        row, column, values = row[kept], column[kept], values[kept]
    ends = np.cumsum(np.bincount(row, minlength=len(turned)))
    return sparse.csr_array((values, column.astype(np.int32), np.append(0, ends)), shape=turned.shape)


def _sweep(
    scaled: Any, observed: FloatArray, table: FlipTable, two_sided: bool, step_down: bool
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Raw and step-down p-values and the maxima; step-down goes up from the smallest, so that the maxima grow."""
    maxima = np.full(len(table), 0.0 if two_sided else -np.inf)
    reached, reached_running = np.zeros(len(observed)), np.zeros(len(observed))
    needed = _needed(observed)[:, None]
    parts = [slice(at, at + BLOCK_FEATURES) for at in range(0, len(observed), BLOCK_FEATURES)]
    blocks = [(part, scaled[part]) for part in parts]
    for here, flips in table.blocks():
        for part, block in blocks:
            found = _sums(block, flips, two_sided)
            reached[part] += np.count_nonzero(found >= needed[part], axis=1)
            if step_down:
                np.maximum(found[0], maxima[here], out=found[0])
                np.maximum.accumulate(found, axis=0, out=found)
                reached_running[part] += np.count_nonzero(found >= needed[part], axis=1)
                maxima[here] = found[-1]
            else:
                np.maximum(maxima[here], found.max(axis=0), out=maxima[here])
    return table.p_value(reached), table.p_value(reached_running), maxima


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
