"""Tables [unit, feature]: checked on entry, cut into blocks of features, summed within clusters of units."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray

BLOCK_UNITS: Final = 2**19
"""Unit x feature elements per block (4 MB)."""
MIN_CLUSTERS: Final = 6
"""Least number of clusters: with five the smallest two-sided sign-flip p-value is 1/16, above .05."""


def as_table(values: Any) -> tuple[NDArray[Any], bool]:
    """``values`` as [unit, feature] in their own dtype, and whether they were given as one feature [unit].

    Raises
    ------
    InputError
        If there is no unit, or another number of axes than one or two.
    """
    array = np.asarray(values)
    if array.ndim not in (1, 2) or not array.shape[0]:
        raise InputError(f"expected [unit] or [unit, feature] with at least one unit, got shape {array.shape}.")
    return array[:, None] if array.ndim == 1 else array, array.ndim == 1


def as_units(values: Any) -> tuple[FloatArray, bool]:
    """``as_table`` in float64 with contiguous rows."""
    table, single = as_table(values)
    return np.ascontiguousarray(table, dtype=np.float64), single


def feature_blocks(n_units: int, n_features: int) -> Iterator[slice]:
    """Slices of features so small that [unit, slice] stays near the cache."""
    step = max(64, BLOCK_UNITS // max(1, n_units))
    for start in range(0, n_features, step):
        yield slice(start, start + step)


def cluster_codes(clusters: Any, n_units: int) -> NDArray[np.int64]:
    """Cluster of each unit as 0, 1, ... in sorted order of the labels.

    Raises
    ------
    InputError
        If there is not one label per unit.
    """
    labels = np.asarray(clusters)
    if labels.shape != (n_units,):
        raise InputError(f"clusters must name one label per unit ({n_units}), got shape {labels.shape}.")
    return np.asarray(np.unique(labels, return_inverse=True)[1], dtype=np.int64)


def cluster_totals(values: FloatArray, clusters: Any) -> FloatArray:
    """Sums within clusters, [cluster, feature], clusters in sorted order of their labels.

    Raises
    ------
    InputError
        If there is not one label per unit.
    """
    codes = cluster_codes(clusters, len(values))
    totals = np.zeros((int(codes.max()) + 1, *values.shape[1:]))
    np.add.at(totals, codes, values)
    return totals
