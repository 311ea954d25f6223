"""Is a difference smaller than a margin, and from which checkpoint on; or is it larger than one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray


@dataclass(frozen=True)
class TostChainResult:
    """Equivalence of every checkpoint with the last."""

    p_value: FloatArray
    """[checkpoint(, feature)]; 0 for the last checkpoint, which is compared with itself; NaN for features with NaN."""
    stabilized_at: Any
    """Index of the first checkpoint of the accepted chain (, feature); NaN where it is too short (``persist``)."""
    p_beyond: FloatArray
    """[checkpoint(, feature)]: minimal-effect test that the checkpoint differs from the last by more than the margin; 1
    for the last."""


@dataclass(frozen=True)
class MinimumEffectResult:
    """Paired differences beside the spread of what is compared."""

    effect: FloatArray
    """Mean difference in spreads (, feature); NaN where nothing varies."""
    p_value: FloatArray
    """That the mean difference lies within the margin (, feature)."""


def minimum_effect_test(x: Any, reference: Any, *, margin: float) -> MinimumEffectResult:
    """Test whether the mean of x - reference is farther from zero than a share of the units' spread.

    Parameters
    ----------
    x, reference
        [unit(, feature)], paired.
    margin
        Smallest effect that counts, in spreads: standard deviations over units of the reference, or of both pooled
        where that is larger. A feature that never fires in the reference has a spread, too.

    Returns
    -------
    MinimumEffectResult

    Raises
    ------
    InputError
        If the two differ in shape, there are fewer than two units, or the margin is negative.

    Notes
    -----
    P-value of the nearer and the farther bound together, P(T >= (|mean| - margin s) / error) + P(T >= (|mean| +
    margin s) / error), as ``p_beyond`` of :func:`tost_chain`. The spread s comes from the same units, so that the error
    is that of |mean| - margin s (delta method: of sign(mean) d - margin q / (2 s), q being a unit's share of s^2).
    Exactly at the margin, 60 to 800 units that are exponential where they fire reject 1 to 11% at a nominal 5% (0 to
    14% if the spread is taken as known). Lognormal ones, whose largest unit decides the spread, reject 15 to 28% where
    they are shifted, 23 to 42% where they are multiplied (100 to 1,500 units; at three quarters of the margin, none).
    So this is approximate near the margin, and to be used beside an exact test that the mean differs at all.

    References
    ----------
    Minimal-effect tests: Murphy and Myors 1999, doi:10.1037/0021-9010.84.2.234.

    Examples
    --------
    >>> before = np.sin(np.arange(50.0))
    >>> [float(minimum_effect_test(before + by, before, margin=0.2).p_value.round(3)) for by in (0.1, 0.2)]
    [1.0, 0.0]
    """
    x, reference = np.asarray(x, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if x.shape != reference.shape or not x.ndim or len(x) < 2:
        raise InputError(f"expected two [unit(, feature)] of two units or more, got {x.shape} and {reference.shape}.")
    if not margin >= 0:
        raise InputError(f"the margin must not be negative, got {margin}.")
    d = x - reference
    mean, squares = d.mean(axis=0), np.square(reference - reference.mean(axis=0))
    both = (squares + np.square(x - x.mean(axis=0))) / 2
    squares = np.where(both.sum(axis=0) > squares.sum(axis=0), both, squares)
    spread = np.sqrt(squares.sum(axis=0) / (len(x) - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        effect = mean / spread
    own = np.divide(squares, 2 * spread, out=np.zeros_like(squares), where=spread > 0)
    error = (np.where(mean < 0, -d, d) - margin * own).std(axis=0, ddof=1) / np.sqrt(len(x))
    near, far = (_beyond(np.abs(mean) - side * margin * spread, error, len(x) - 1) for side in (1, -1))
    return MinimumEffectResult(np.where(np.isfinite(effect), effect, np.nan), np.minimum(near + far, 1.0))


def tost_paired(x: Any, y: Any = 0.0, *, low: float, high: float) -> FloatArray:
    """P-value of two one-sided paired t tests that low < mean(x - y) < high.

    Parameters
    ----------
    x, y
        [unit, ...], paired; ``y`` may be a number.
    low, high
        Equivalence margins, in units of x.

    Returns
    -------
    array
        [...]: the larger of the two one-sided p-values.

    Raises
    ------
    InputError
        If the lower margin is not below the upper one.

    References
    ----------
    Schuirmann 1987, doi:10.1007/BF01068419.

    Examples
    --------
    >>> float(tost_paired([1.1, -0.4, 2.3, 0.7, -1.2, 3.1, 0.2, 1.9], low=-2.5, high=2.5).round(6))
    0.009585
    """
    if not low < high:
        raise InputError(f"the lower margin must be below the upper one, got {low} and {high}.")
    d = np.asarray(x, dtype=np.float64) - np.asarray(y, dtype=np.float64)
    return _tost(d.mean(axis=0), d.std(axis=0, ddof=1) / np.sqrt(len(d)), low, high, len(d) - 1)


def _tost(mean: Any, error: Any, low: Any, high: Any, dof: int) -> FloatArray:
    room = np.minimum(mean - low, high - mean)  # the nearer margin has the larger of the two one-sided p-values
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(error == 0, np.where(room > 0, np.inf, -np.inf), room / error)
    return np.asarray(stats.t.sf(t, dof))


def tost_chain(
    x: Any, *, margin: Any, alpha: float = 0.05, relative: bool = False, persist: int = 0
) -> TostChainResult:
    """Find the checkpoint from which a series stays within a margin of its end.

    Parameters
    ----------
    x
        [unit, checkpoint(, feature)].
    margin
        Largest difference that counts as equivalent, in units of x (a number or [feature]); with ``relative`` a share
        below 1 of the total change |mean(first - last)|.
    alpha
        Level; no correction over checkpoints is needed, because they are tested in a fixed order from the end.
    relative
        Whether ``margin`` is a share of the total change.
    persist
        A chain within the last ``persist`` checkpoints is too short to count: NaN.

    Returns
    -------
    TostChainResult
        P-values per checkpoint and the accepted chain's first index; NaN for features with NaN.

    Raises
    ------
    InputError
        If there are fewer than two units or checkpoints, a margin is not positive, or a share is not below 1.

    Notes
    -----
    A relative margin is estimated from the same units, so it is not treated as known (at a share of one half that
    rejects 12% of the time at a nominal 5%). With r the share, D_c = x_c - x_C and the sign of the mean of D_0 taken as
    up, both mean(r D_0 - D_c) > 0 and mean(r D_0 + D_c) > 0 are tested by paired t tests.

    ``p_beyond`` is the other side of the same margin: the chance, at the margin, of a mean at least as far from zero,
    P(T >= (|mean| - margin) / error) + P(T >= (|mean| + margin) / error). It does not become one half where the margin
    is small compared with the error, as a one-sided test against the nearer bound would. At most one of the two
    p-values is below one half.

    References
    ----------
    Fixed-sequence testing: Westfall and Krishen 2001, doi:10.1016/S0378-3758(01)00077-5. Margins that are a share of
    another mean: Fieller 1954; as two linear contrasts, Hauschke, Kieser and Hothorn 1999. Minimal-effect tests: Murphy
    and Myors 1999, doi:10.1037/0021-9010.84.2.234.
    """
    x = np.asarray(x, dtype=np.float64)
    if x.ndim < 2 or x.shape[0] < 2 or x.shape[1] < 2:
        raise InputError(f"x must be [unit, checkpoint(, feature)] with at least two of each, got shape {x.shape}.")
    margin = np.asarray(margin, dtype=np.float64)
    if not np.all(margin > 0):
        raise InputError(f"the margin must be positive, got {np.min(margin)}.")
    if relative and not np.all(margin < 1):
        raise InputError(f"a relative margin is a share below 1 of the total change, got {np.max(margin)}.")
    d = x - x[:, -1:]
    p, beyond = _relative(d, margin) if relative else _absolute(d, margin)
    complete = np.isfinite(x).all(axis=(0, 1))
    p[-1], beyond[-1] = np.where(complete, 0.0, np.nan), np.where(complete, 1.0, np.nan)
    accepted = np.logical_and.accumulate((p <= alpha)[::-1], axis=0)[::-1]
    first = (len(p) - accepted.sum(axis=0)).astype(np.float64)
    stabilized_at = np.where(first > len(p) - 1 - persist, np.nan, first)
    return TostChainResult(p, stabilized_at if x.ndim > 2 else float(stabilized_at), beyond)


def _absolute(d: FloatArray, margin: FloatArray) -> tuple[FloatArray, FloatArray]:
    mean, error = d.mean(axis=0), d.std(axis=0, ddof=1) / np.sqrt(len(d))
    room = np.broadcast_to(margin, mean.shape)
    far = [_beyond(np.abs(mean) + side, error, len(d) - 1) for side in (-room, room)]
    return _tost(mean, error, -room, room, len(d) - 1), np.minimum(far[0] + far[1], 1.0)


def _relative(d: FloatArray, share: FloatArray) -> tuple[FloatArray, FloatArray]:
    up = share * d[:, :1] * np.sign(d[:, :1].mean(axis=0))
    root = np.sqrt(len(d))
    sides = [(y.mean(axis=0), y.std(axis=0, ddof=1) / root) for y in (up - d, up + d)]
    within = np.maximum(*(_tost(mean, error, 0.0, np.inf, len(d) - 1) for mean, error in sides))
    above = d.mean(axis=0) >= 0  # then the first contrast belongs to the nearer bound, the second to the farther one
    (near, near_error), (far, far_error) = (
        tuple(np.where(above, a, b) for a, b in zip(one, other, strict=True)) for one, other in (sides, sides[::-1])
    )
    beyond = _beyond(-near, near_error, len(d) - 1) + _beyond(far, far_error, len(d) - 1)
    return within, np.minimum(beyond, 1.0)


def _beyond(excess: FloatArray, error: FloatArray, dof: int) -> FloatArray:
    """One-sided p-value that a mean is above zero; one half where mean and error are zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        certain = np.where(excess == 0, 0.0, np.sign(excess) * np.inf)
        t = np.where(error == 0, certain, excess / error)
    return np.asarray(stats.t.sf(t, dof))
