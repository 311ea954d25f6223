"""The leading features of many rankings at once, found block by block: only k of each block are kept."""

from __future__ import annotations

from typing import Final

import dask.array as da
import numpy as np
from numpy.typing import NDArray

from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray

NO_FEATURE: Final = -1.0
"""Stands in the last column where a ranking has fewer than k features."""


def leading_features(columns: FloatArray, k: int) -> FloatArray:
    """The k features of smallest key in every ranking, in order.

    Parameters
    ----------
    columns
        [column, ranking, feature]: first the key (infinite: not ranked), then what decides between equal keys
        (smallest first), and last the feature's id. Where the id itself decides there are two columns.
    k
        Features kept of each ranking.

    Returns
    -------
    ndarray, shape (column, ranking, k)
        The columns of the kept features; the id is ``NO_FEATURE`` where fewer than k features are ranked.
    """
    n_columns, n_rankings, n_features = columns.shape
    if n_features > k:
        near = _near(columns[0], k)
        columns = np.stack([np.take_along_axis(column, near, axis=1) for column in columns])
    order = np.lexsort((columns[1], columns[0]), axis=-1)[:, :k]
    top = np.full((n_columns, n_rankings, k), np.inf)
    top[:, :, : order.shape[1]] = [np.take_along_axis(column, order, axis=1) for column in columns]
    top[-1] = np.where(np.isfinite(top[0]), top[-1], NO_FEATURE)
    return top


def _near(keys: FloatArray, k: int) -> NDArray[np.int64]:
    """Places of at least the k smallest keys of every row and all that equal the k-th; the same number in each row.

    What lies beyond the k-th key cannot lead: only these few are sorted, not whole rows.
    """
    kth = np.partition(keys, k - 1, axis=1)[:, k - 1, None]
    near = (keys <= kth) & (keys < np.inf)
    n_near = near.sum(axis=1)
    if (n_near == k).all():  # no ties at the k-th place, as is usual
        return np.nonzero(near)[1].reshape(len(keys), k)
    width = max(k, int(n_near.max()))
    return np.argpartition(keys, width - 1, axis=1)[:, :width]


def fold_leading(stacked: da.Array, axis: int) -> da.Array:
    """Leading features of all blocks from those of each, [block, column, ranking, k] -> [column, ranking, k], lazily.

    A reduction for the states of ``map_features``.
    """
    return da.map_blocks(merge_leading, stacked.rechunk({0: -1}), drop_axis=axis, dtype=np.float64)


def merge_leading(stacked: FloatArray) -> FloatArray:
    """Leading features of all blocks, [block, column, ranking, k] -> [column, ranking, k]."""
    n_blocks, n_columns, n_rankings, k = stacked.shape
    if n_blocks == 1:
        return np.asarray(stacked[0])
    return leading_features(stacked.transpose(1, 2, 0, 3).reshape(n_columns, n_rankings, n_blocks * k), k)
