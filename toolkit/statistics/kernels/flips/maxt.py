"""Joint maximum tests: family-wise p-values over all features from the same flips (Westfall and Young)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.flips.flip_table import BLOCK_SUMS, FlipTable, Workspace, flip_table
from rlgen_stats.toolkit.statistics.kernels.flips.flip_units import flip_units
from rlgen_stats.toolkit.statistics.kernels.multiplicity.fdp import exceedance_counts
from rlgen_stats.toolkit.statistics.kernels.numerics import ROUNDING, TIE_SLACK, FloatArray, column_sums
from rlgen_stats.toolkit.statistics.kernels.unit_tables import as_table, cluster_codes, feature_blocks

SPARSE_DENSITY: Final = 0.15
"""Share of nonzeros below which a sparse product is faster than a dense one."""
SAMPLED_ROWS: Final = 16
"""Rows whose nonzeros are counted first, to recognise a dense block without reading it all."""


@dataclass(frozen=True, kw_only=True)
class MaxTResult:
    """Family-wise sign-flip test."""

    statistic: FloatArray
    """|sum d| / sqrt(sum d^2), [feature], signed if one-sided; NaN for untestable features."""
    p_single_step: FloatArray
    """Single-step joint p-value [feature]."""
    p_step_down: FloatArray
    """Step-down joint p-value [feature]; all NaN without ``step_down``."""
    p_raw: FloatArray
    """Unadjusted p-value from the same flips [feature]; all NaN without ``unadjusted``."""
    maxima: FloatArray
    """Largest statistic of each flip over all features [flip]; several blocks of features combine by their maximum."""
    exact: bool
    """Whether every flip was used."""
    exceedances: NDArray[np.int64]
    """Features that reach each of ``thresholds`` under each flip [threshold, flip]; blocks of features add up."""


def max_t(
    differences: Any,
    *,
    n_resamples: int = 999,
    seed: int = 0,
    step_down: bool = True,
    clusters: Any = None,
    alternative: Literal["two-sided", "greater", "less"] = "two-sided",
    thresholds: Sequence[float] = (),
    unadjusted: bool = True,
) -> MaxTResult:
    """Family-wise p-values over all features from the same sign flips.

    Parameters
    ----------
    differences
        [unit, feature]. A feature that is NaN in every unit is untestable.
    n_resamples, seed
        Random flips, rounded up to 2^m - 1, and their seed; with at most 12 units every flip is used.
    step_down
        Whether to compute the step-down p-values too.
    clusters
        Labels [unit]; whole clusters are flipped.
    alternative
        ``two-sided``, ``greater`` or ``less``.
    thresholds
        Values of the statistic at which features are counted under every flip, for ``fdp_bound``.
    unadjusted
        Whether to compute the unadjusted p-values too.

    Raises
    ------
    InputError
        If differences are not finite.
    RefusedError
        If there are fewer than six clusters.

    Notes
    -----
    The flips are a random group of 2^m patterns (``FlipTable``): the test is exact, its Monte-Carlo error that of
    independent flips, and all sums of a feature are one Walsh-Hadamard transform. p is the share of patterns, counting
    the identity, that reach the statistic. Untestable features get NaN and enter no maximum. Memory is one block of
    sums: at least 16 features x 2^m.

    Features may be split over several calls: call with the same units, seed and n_resamples (``step_down=False``), take
    the maximum of ``maxima`` over the calls, and pass it to ``max_t_p_value``. Step-down needs all features in one
    call, or single steps repeated on the features not rejected yet, which reject the same features.

    References
    ----------
    Westfall and Young 1993; step-down: algorithm 4.1, the same ordering for every flip.
    """
    if alternative not in ("two-sided", "greater", "less"):
        raise InputError(f"alternative must be two-sided, greater or less, got {alternative!r}.")
    d, _ = as_table(differences)
    codes = None if clusters is None else cluster_codes(clusters, len(d))
    n_units = len(d) if codes is None else int(codes.max()) + 1
    table = flip_table(n_units, n_resamples, seed=seed)
    flips = _Flips(d, codes, table, alternative, Workspace(len(table)))
    if step_down:
        observed = np.concatenate([flips.statistics(part)[0] for part in feature_blocks(*d.shape)])
        ranked = np.argsort(observed, kind="stable")[: int(np.isfinite(observed).sum())]
        parts: Iterable[Any] = (ranked[part] for part in table.feature_blocks(len(ranked)))
    else:
        observed = np.full(d.shape[1], np.nan)
        parts = table.feature_blocks(d.shape[1])
    features, raw, down = np.arange(d.shape[1]), np.full(d.shape[1], np.nan), np.full(d.shape[1], np.nan)
    maxima = np.full(len(table), 0.0 if alternative == "two-sided" else -np.inf)
    beyond = np.zeros((len(thresholds), len(maxima)), dtype=np.int64)
    running = np.full((len(maxima), 0 if step_down else BLOCK_SUMS // len(maxima) + 16), maxima[0])
    for part in parts:
        observed[part], flipped = flips.statistics(part, with_sums=True)
        tested = features[part][np.isfinite(observed[part])]
        if len(thresholds):
            beyond += exceedance_counts(flipped, thresholds)
        if unadjusted:
            raw[tested] = table.p_value(np.count_nonzero(flipped >= _needed(observed[tested]), axis=0))
        if step_down:
            # Features come in rising order: the running maximum is the one over all features ranked no higher.
            np.maximum(flipped[:, 0], maxima, out=flipped[:, 0])
            np.maximum.accumulate(flipped, axis=1, out=flipped)
            down[tested] = table.p_value(np.count_nonzero(flipped >= _needed(observed[tested]), axis=0))
            maxima = flipped[:, -1].copy()
        elif len(tested):  # a running maximum per column of the block is ten times faster than one over its columns
            np.maximum(running[:, : len(tested)], flipped, out=running[:, : len(tested)])
    maxima = np.maximum(maxima, running.max(axis=1, initial=-np.inf))
    if step_down:  # p-values must not fall as the statistic falls
        down[ranked[::-1]] = np.maximum.accumulate(down[ranked[::-1]])
    return MaxTResult(
        statistic=-observed if alternative == "less" else observed,
        p_single_step=max_t_p_value(observed, maxima),
        p_step_down=down,
        p_raw=raw,
        maxima=maxima,
        exact=table.exhaustive,
        exceedances=beyond,
    )


@dataclass(frozen=True)
class _Flips:
    """Statistics of blocks of features, observed and under every flip."""

    d: NDArray[Any]
    codes: NDArray[np.int64] | None
    table: FlipTable
    alternative: str
    work: Workspace

    def statistics(self, part: Any, *, with_sums: bool = False) -> tuple[FloatArray, FloatArray]:
        """Observed [feature], NaN where untestable; with ``with_sums`` also of the testable under every flip."""
        block = self.d[:, part]
        nonzeros = _nonzeros(block) if self.codes is None else None
        if nonzeros is None:
            values = flip_units(block, self.codes).values
            total, norm = column_sums(values), np.sqrt(column_sums(np.square(values)))
        else:
            unit, feature, values = nonzeros
            total = np.asarray(np.bincount(feature, values, block.shape[1]), dtype=np.float64)
            norm = np.sqrt(np.bincount(feature, np.square(values), block.shape[1]))
        if self.alternative == "less":
            total = -total
        tested = norm > 0
        observed = np.full(len(norm), np.nan)
        observed[tested] = (np.abs(total) if self.alternative == "two-sided" else total)[tested] / norm[tested]
        if not with_sums:
            return observed, observed[:0]
        scale = np.where(tested, -norm if self.alternative == "less" else norm, 1.0)
        if nonzeros is None:
            sums = self.table.sums(values / scale, self.work)
        else:
            sums = self.table.sparse_sums(unit, feature, values / scale[feature], len(norm), self.work)
        sums = sums if tested.all() else sums[:, tested]
        return observed, np.abs(sums, out=sums) if self.alternative == "two-sided" else sums


def _nonzeros(d: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64], FloatArray] | None:
    """Unit, feature and value of the nonzeros, cleaned as by ``flip_units``; None if too many or not finite."""
    sampled = d[:: max(1, len(d) // SAMPLED_ROWS)]
    if np.count_nonzero(sampled) > 2 * SPARSE_DENSITY * sampled.size:
        return None
    is_nonzero = d != 0
    if np.count_nonzero(is_nonzero) >= SPARSE_DENSITY * d.size:
        return None
    place = np.flatnonzero(is_nonzero)  # on a Boolean array many times faster than np.nonzero(d)
    unit = place // d.shape[1]
    feature = place - unit * d.shape[1]
    values = d[unit, feature].astype(np.float64)
    if not np.isfinite(values).all():
        return None
    largest = np.zeros(d.shape[1])
    np.maximum.at(largest, feature, np.abs(values))
    kept = np.abs(values) > ROUNDING * largest[feature]
    return (unit, feature, values) if kept.all() else (unit[kept], feature[kept], values[kept])


def _needed(observed: FloatArray) -> FloatArray:
    """Value a flip must reach: slack is relative for large statistics, absolute where the sum cancels to zero."""
    return observed - TIE_SLACK * (1.0 + np.abs(observed))


def max_t_p_value(statistic: Any, maxima: Any) -> FloatArray:
    """Single-step joint p-value of statistics [any shape] against the maxima over all features [flip]; NaN stays NaN.

    Parameters
    ----------
    statistic, maxima
        As in ``MaxTResult``; ``maxima`` may be the maximum over several calls with the same flips.
    """
    observed, ranked = np.asarray(statistic, dtype=np.float64), np.sort(np.asarray(maxima, dtype=np.float64))
    reached = len(ranked) - np.searchsorted(ranked, _needed(np.nan_to_num(observed)), side="left")
    return np.where(np.isfinite(observed), reached / len(ranked), np.nan)
