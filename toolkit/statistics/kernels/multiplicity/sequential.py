"""The sign-flip test that stops drawing once a feature is plainly no finding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.flips.resampling import (
    BLOCK_DRAWS,
    BLOCK_SIGNS,
    TIE_SLACK,
    FloatArray,
    as_table,
    cluster_codes,
    column_sums,
    flip_units,
    sign_flips,
)
from rlgen_stats.toolkit.statistics.kernels.flips.signflip import Alternative

BLOCK_ELEMENTS: Final = 2**22
"""Unit x feature elements that share the drawing of signs (32 MB)."""
FIRST_DRAWS: Final = 32
"""Draws of the first block, which every feature takes; half of the null features stop within twice as many."""


@dataclass(frozen=True)
class SequentialResult:
    """Sequential Monte-Carlo test of every feature; scalars in shape when one feature was given."""

    p_value: Any
    """P-value [feature]; NaN for untestable features, never 0."""
    n_resamples: Any
    """Flips drawn [feature]; 0 for untestable features."""
    n_exceeded: Any
    """Flips that reached the statistic [feature]."""
    stopped: Any
    """Whether the feature stopped at its h-th such flip [feature]."""


def sequential_flip_test(
    differences: Any,
    *,
    alternative: Alternative = "two-sided",
    max_resamples: int = 9999,
    exceedances: int = 10,
    seed: int = 0,
    clusters: Any = None,
) -> SequentialResult:
    """Test that paired differences are symmetric about zero, drawing few flips where there is nothing to find.

    Parameters
    ----------
    differences
        [unit] or [unit, feature]. A feature that is NaN in every unit, or zero in every unit, is untestable.
    alternative
        ``two-sided``, ``greater`` or ``less``.
    max_resamples
        Most flips a feature takes.
    exceedances
        h: a feature stops at the h-th flip whose sum reaches its own.
    seed
        Of the flips, which all features share.
    clusters
        Labels [unit]; whole clusters are flipped.

    Returns
    -------
    SequentialResult
        [feature], or scalars for one feature.

    Raises
    ------
    InputError
        If differences are not finite or an option is out of range.
    RefusedError
        If there are fewer than six clusters.

    Notes
    -----
    p = h / L where the h-th flip to reach the statistic is the L-th drawn, else (g + 1) / (max_resamples + 1). Valid at
    every size: P(p <= a) <= a, exactly a at the values p can take. Null as in ``sign_flip_test``. The relative error
    of a p-value is about 1/sqrt(h) wherever it stopped. Flips are independent, because a random group of them cannot
    stop early; so ``sign_flip_test`` and ``max_t`` are faster where all flips are wanted anyway. Stopped features leave
    the matrix product. Do not use the p-values of stopped features as a joint null: there is none; use ``max_t``.

    References
    ----------
    Besag and Clifford 1991, doi:10.1093/biomet/78.2.301, section 3.

    Examples
    --------
    >>> found = sequential_flip_test([1.1, -0.4, 2.3, 0.7, -1.2, 3.1, 0.2, 1.9], exceedances=200)
    >>> bool(found.stopped), abs(float(found.p_value) - 0.109375) < 0.02
    (True, True)
    """
    if alternative not in ("two-sided", "greater", "less"):
        raise InputError(f"alternative must be two-sided, greater or less, got {alternative!r}.")
    _check_limits(exceedances, max_resamples)
    d, single = as_table(differences)
    codes = None if clusters is None else cluster_codes(clusters, len(d))
    step = max(64, BLOCK_ELEMENTS // len(d))
    parts = []
    for start in range(0, d.shape[1], step):
        values = flip_units(d[:, start : start + step], codes).values
        parts.append(_drawn(values, alternative, exceedances, max_resamples, seed))
    if not parts:
        parts = [_drawn(np.zeros((1, 0)), alternative, exceedances, max_resamples, seed)]
    at: Any = 0 if single else slice(None)
    return SequentialResult(*(np.concatenate(found)[at] for found in zip(*parts, strict=True)))


def besag_clifford(exceeded: Any, drawn: Any, *, exceedances: int = 10, max_resamples: int = 9999) -> Any:
    """P-value of a sequential Monte-Carlo test from its counts so far; NaN while the test must go on.

    Parameters
    ----------
    exceeded
        Draws that reach the observed statistic [...]: at most ``exceedances``, since the test ends there.
    drawn
        Draws taken [...], that of the last exceedance included where the test has ended.
    exceedances, max_resamples
        h, and the most draws.

    Returns
    -------
    float or array
        [...]: h / drawn where h is reached, (exceeded + 1) / (max_resamples + 1) where all draws are taken, else NaN.

    Raises
    ------
    InputError
        If the counts do not fit one another.

    Notes
    -----
    Stops random control sets of an intervention early: an effect that ten of the first thirty random sets match will
    not become specific. The draws must be exchangeable with the observed one under the null. Where several draws come
    at once, hand in the count at each draw: the number drawn at the h-th exceedance decides.

    References
    ----------
    Besag and Clifford 1991, doi:10.1093/biomet/78.2.301, section 3.

    Examples
    --------
    >>> besag_clifford(10, 40), besag_clifford(3, 9999), besag_clifford(3, 500)
    (0.25, 0.0004, nan)
    """
    _check_limits(exceedances, max_resamples)
    g, n = np.broadcast_arrays(np.asarray(exceeded), np.asarray(drawn))
    if not ((g >= 0) & (g <= n) & (n <= max_resamples)).all():
        raise InputError(f"expected 0 <= exceeded <= drawn <= max_resamples, got {exceeded}, {drawn}, {max_resamples}.")
    if (g > exceedances).any():
        raise InputError(
            f"the test ends at exceedance {exceedances}, got {int(g.max())}; pass the number drawn at that one."
        )
    with np.errstate(divide="ignore"):
        ended = exceedances / np.asarray(n, dtype=np.float64)
    p = np.where(g == exceedances, ended, np.where(n == max_resamples, (g + 1) / (max_resamples + 1), np.nan))
    return p if p.ndim else float(p)


def _check_limits(exceedances: int, max_resamples: int) -> None:
    if not 1 <= exceedances <= max_resamples:
        raise InputError(
            f"expected 1 <= exceedances <= max_resamples, got exceedances={exceedances} and "
            f"max_resamples={max_resamples}."
        )


def _draw_blocks(n_units: int, max_resamples: int) -> Iterator[tuple[int, int]]:
    """Consecutive blocks of draws, each twice as long as the last until it fills the cache."""
    most = min(BLOCK_DRAWS, max(FIRST_DRAWS, BLOCK_SIGNS // n_units))
    start, step = 0, FIRST_DRAWS
    while start < max_resamples:
        stop = min(start + step, max_resamples)
        yield start, stop
        start, step = stop, min(2 * step, most)


def _drawn(
    values: FloatArray, alternative: Alternative, exceedances: int, max_resamples: int, seed: int
) -> tuple[FloatArray, NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """P-value, flips drawn, flips that reached the statistic, and whether they were enough, of a block of features."""
    n_features = values.shape[1]
    scale = column_sums(np.abs(values))
    going = np.flatnonzero(scale > 0)
    p = np.full(n_features, np.nan)
    drawn, reached = np.zeros(n_features, dtype=np.int64), np.zeros(n_features, dtype=np.int64)
    left = np.take(values if alternative != "less" else -values, going, axis=1)
    total = column_sums(left)
    needed = (np.abs(total) if alternative == "two-sided" else total) - TIE_SLACK * scale[going]
    for start, stop in _draw_blocks(len(values), max_resamples):
        if not len(going):
            break
        sums = sign_flips(len(values), start, stop, seed=seed) @ left
        hits = reached[going] + np.cumsum((np.abs(sums) if alternative == "two-sided" else sums) >= needed, axis=0)
        ended = hits[-1] >= exceedances
        last = np.argmax(hits >= exceedances, axis=0)  # the first draw of the block at which there are enough
        drawn[going] = np.where(ended, start + last + 1, stop)
        reached[going] = np.minimum(hits[-1], exceedances)
        going, left, needed = going[~ended], left[:, ~ended], needed[~ended]
    tested = scale > 0
    p[tested] = besag_clifford(reached[tested], drawn[tested], exceedances=exceedances, max_resamples=max_resamples)
    return p, drawn, reached, tested & (reached == exceedances)
