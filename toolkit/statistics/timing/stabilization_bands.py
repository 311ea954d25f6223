"""Curves of how many features have settled, with bands, and the comparison of two arms at equal total change."""

from __future__ import annotations

from typing import Any, Final

import dask
import dask.array as da
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray
from rlgen_stats.toolkit.statistics.timing.stabilization_blocks import STRATA

FRACTIONS: Final = (0.25, 0.5, 0.75, 1.0)
"""Shares of a run's steps at which arms are compared: runs of other lengths and checkpoints meet there."""

MIN_RUNS: Final = 4
"""Runs per arm from which a permutation of runs can fall below .05 (2 / 70)."""

PERMUTATIONS: Final = 9999
"""Every way to share out up to eight against seven runs, random ones above."""


def curves(settled: da.Array, in_stratum: da.Array, alpha: float) -> tuple[da.Array, da.Array]:
    """Shares with bands: of all testable features [3, checkpoint], and of each stratum [3, checkpoint, stratum].

    ``settled`` [1 + draw, reference + checkpoint, stratum] counts features, the estimate in row 0.
    """
    n = settled.shape[1] - 1
    counts, sizes = _whole(settled), _whole(in_stratum)
    everyone = _lazy(_band, (3, n), counts, sizes, alpha=alpha, pooled=True)
    strata = _lazy(_band, (3, n, len(STRATA)), counts, sizes, alpha=alpha, pooled=False)
    return everyone, strata


def compared(arms: list[list[tuple[da.Array, da.Array, list[int]]]], alpha: float) -> da.Array:
    """First arm less second arm: share settled by each fraction of the steps, [4 (estimate, low, high, p), 4, stratum].

    Parameters
    ----------
    arms
        Two arms; of each run its ``settled``, ``in_stratum`` and steps (the reference's 0 first).
    alpha
        1 - coverage.
    """
    states = [[(_whole(settled), _whole(size)) for settled, size, _ in arm] for arm in arms]
    places = [[_places(steps) for _, _, steps in arm] for arm in arms]
    return _lazy(_difference, (4, len(FRACTIONS), len(STRATA)), states, places, alpha=alpha)


def _lazy(function: Any, shape: tuple[int, ...], *args: Any, **options: Any) -> da.Array:
    return da.from_delayed(dask.delayed(function, pure=True)(*args, **options), shape, dtype=np.float64)


def _whole(array: da.Array) -> Any:
    """The array as one delayed value; an array handed to a delayed call would be computed once more, apart."""
    return array.rechunk(-1).to_delayed(optimize_graph=False).reshape(-1)[0]


def _places(steps: list[int]) -> list[int]:
    """Last checkpoint (0: the reference) within each fraction of the steps."""
    return [int(np.searchsorted(steps, fraction * steps[-1] * (1 + 1e-9), side="right")) - 1 for fraction in FRACTIONS]


def _share(settled: NDArray[Any], size: NDArray[Any]) -> FloatArray:
    """Quotient; NaN where there is nothing to share."""
    return np.asarray(settled / np.where(size > 0, size, np.nan))


def _band(settled: NDArray[Any], size: NDArray[Any], *, alpha: float, pooled: bool) -> FloatArray:
    """Of the checkpoints (the reference is none), strata together or apart."""
    own = (settled.sum(axis=2), size.sum()) if pooled else (settled, size)
    return _interval(_share(own[0][:, 1:], own[1]), alpha, lowest=0.0)


def _interval(shares: FloatArray, alpha: float, *, lowest: float) -> FloatArray:
    """Estimate and re-centred percentile band, [3, ...]; row 0 of ``shares`` is the estimate, the others are draws."""
    estimate, draws = shares[0], shares[1:]
    low, high = np.quantile(draws, [alpha / 2, 1 - alpha / 2], axis=0) - draws.mean(axis=0)
    band = [estimate, estimate + np.minimum(low, 0.0), estimate + np.maximum(high, 0.0)]
    return np.asarray(np.clip(np.stack(band), lowest, 1.0))


def _difference(
    states: list[list[tuple[NDArray[Any], NDArray[Any]]]], places: list[list[list[int]]], *, alpha: float
) -> FloatArray:
    """Runs of an arm count alike; the draws of units are the same for both arms."""
    runs = [
        np.stack([_share(settled[:, at], size) for (settled, size), at in zip(arm, where, strict=True)])
        for arm, where in zip(states, places, strict=True)
    ]
    first, second = (arm.mean(axis=0) for arm in runs)
    band = _interval(first - second, alpha, lowest=-1.0)
    p = np.full(band.shape[1:], np.nan)
    if min(map(len, runs)) >= MIN_RUNS:
        found = stats.permutation_test([arm[:, 0] for arm in runs], _mean_difference, n_resamples=PERMUTATIONS, rng=0)
        p = np.where(np.isfinite(band[0]), found.pvalue, np.nan)
    return np.concatenate([band, p[None]])


def _mean_difference(first: FloatArray, second: FloatArray, axis: int) -> FloatArray:
    return np.asarray(first.mean(axis=axis) - second.mean(axis=axis))
