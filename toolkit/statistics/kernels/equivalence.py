"""Equivalence: showing that a difference is smaller than a margin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.resampling import FloatArray


@dataclass(frozen=True)
class TostChainResult:
    """Equivalence of every checkpoint with the last."""

    p_value: FloatArray
    """[checkpoint(, feature)]; 0 for the last, which equals itself."""
    stabilized_at: Any
    """Index of the first checkpoint of the accepted chain (, feature); NaN where it does not reach back far enough."""


def tost_paired(x: Any, y: Any = 0.0, *, low: float, high: float) -> FloatArray:
    """P-value of two one-sided paired t tests that low < mean(x - y) < high, over axis 0.

    References
    ----------
    Schuirmann 1987, doi:10.1007/BF01068419.
    """
    if not low < high:
        raise InputError(f"the lower margin must be below the upper one, got {low} and {high}.")
    d = np.asarray(x, dtype=np.float64) - np.asarray(y, dtype=np.float64)
    return _tost(d.mean(axis=0), d.std(axis=0, ddof=1) / np.sqrt(len(d)), low, high, len(d) - 1)


def _tost(mean: Any, error: Any, low: Any, high: Any, dof: int) -> FloatArray:
    room = np.minimum(mean - low, high - mean)  # the nearer margin has the larger of the two p-values
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(error > 0, room / error, np.where(room > 0, np.inf, -np.inf))
    return np.asarray(stats.t.sf(t, dof))


def tost_chain(
    x: Any, *, margin: Any, alpha: float = 0.05, relative: bool = False, persist: int = 0
) -> TostChainResult:
    """Find from when on a series stays within a margin of its end.

    Parameters
    ----------
    x
        [unit, checkpoint(, feature)].
    margin
        Largest difference called none, in units of x (a number or [feature]); with ``relative`` a share of the total
        change |mean(first - last)|.
    alpha
        Level; no correction over checkpoints is needed, because they are tested in a fixed order from the end.
    persist
        A chain that lies within the last ``persist`` checkpoints alone proves nothing: NaN.

    Returns
    -------
    TostChainResult
        P-values per checkpoint and the accepted chain's first index.

    Raises
    ------
    InputError
        If there are fewer than two units or checkpoints, or a margin is not positive.

    References
    ----------
    Fixed-sequence testing: Westfall and Krishen 2001, doi:10.1016/S0378-3758(01)00077-5.
    """
    x = np.asarray(x, dtype=np.float64)
    if x.ndim < 2 or x.shape[0] < 2 or x.shape[1] < 2:
        raise InputError(f"x must be [unit, checkpoint(, feature)] with at least two of each, got shape {x.shape}.")
    if not np.all(np.asarray(margin) > 0):
        raise InputError(f"the margin must be positive, got {np.min(margin)}.")
    d = x - x[:, -1:]
    mean, error = d.mean(axis=0), d.std(axis=0, ddof=1) / np.sqrt(len(d))
    room = np.broadcast_to(np.asarray(margin, dtype=np.float64) * (np.abs(mean[0]) if relative else 1.0), mean.shape)
    p = _tost(mean, error, -room, room, len(d) - 1)
    p[-1] = 0.0
    accepted = np.logical_and.accumulate((p <= alpha)[::-1], axis=0)[::-1]
    first = len(p) - accepted.sum(axis=0)
    at = np.where(first > len(p) - 1 - persist, np.nan, first) if persist else first.astype(np.float64)
    return TostChainResult(p, at if x.ndim > 2 else float(at))
