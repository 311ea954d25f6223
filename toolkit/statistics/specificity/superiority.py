"""Probability that one of two groups has the larger value, without a threshold, for weighted and resampled members."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray

BLOCK_ENTRIES: Final = 1 << 22
"""Weights in memory at once: draws times members."""


def superiority(a: FloatArray, b: FloatArray, weights_a: FloatArray, weights_b: FloatArray) -> FloatArray:
    """P(a > b) + P(a = b) / 2 for a member of each group drawn by weight.

    Parameters
    ----------
    a, b
        [n], [m]: finite or infinite values.
    weights_a, weights_b
        [draw, n], [draw, m]: non-negative; rows need not sum to one.

    Returns
    -------
    ndarray [draw]
        0.5 where the groups do not differ; NaN where a group has no weight.

    References
    ----------
    Mann and Whitney 1947, doi:10.1214/aoms/1177730491; the effect size: McGraw and Wong 1992,
    doi:10.1037/0033-2909.111.2.361.

    Examples
    --------
    >>> superiority(np.array([1.0, 3.0]), np.array([1.0, 2.0]), np.ones((1, 2)), np.ones((1, 2))).tolist()
    [0.625]
    """
    order = np.argsort(b, kind="stable")
    ordered = b[order]
    below = np.concatenate([np.zeros((len(weights_b), 1)), np.cumsum(weights_b[:, order], axis=1)], axis=1)
    first, last = (np.searchsorted(ordered, a, side=side) for side in ("left", "right"))
    beaten = (below[:, first] + below[:, last]) / 2
    with np.errstate(invalid="ignore"):
        found: FloatArray = np.einsum("bn,bn->b", weights_a, beaten) / (weights_a.sum(axis=1) * below[:, -1])
    return found


def cluster_draws(n_clusters: int, n_draws: int, seed: int, *, rows: int | None = None) -> Iterator[IntArray]:
    """How often each cluster is drawn, with replacement: blocks of [draw, cluster], the same for any block size."""
    random = np.random.default_rng(seed)
    rows = rows or block_rows(n_clusters)
    for start in range(0, n_draws, rows):
        n = min(rows, n_draws - start)
        drawn = random.integers(0, n_clusters, (n, n_clusters)) + np.arange(n)[:, None] * n_clusters
        yield np.bincount(drawn.ravel(), minlength=n * n_clusters).reshape(n, n_clusters)


def block_rows(n_members: int) -> int:
    """Draws of so many members that are in memory at once."""
    return max(1, BLOCK_ENTRIES // max(n_members, 1))
