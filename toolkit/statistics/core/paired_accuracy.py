"""The difference of two models' scores on the same prompts: its p-value and its interval; the unit is the cluster."""

from __future__ import annotations

from typing import Final

import numpy as np

from rlgen_stats.toolkit.statistics.core.units import cluster_sums
from rlgen_stats.toolkit.statistics.kernels import bounded_interval, mcnemar, sign_flip_test
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray
from rlgen_stats.toolkit.statistics.kernels.unit_tables import MIN_CLUSTERS

MCNEMAR: Final = "exact McNemar"
CLUSTER_FLIP: Final = "sign flip of clusters"
PROMPT_FLIP: Final = "sign flip of prompts"
INTERVAL: Final = "t with CR2 errors, or what clusters that were not seen leave possible, whichever is farther"
"""What :func:`difference_interval` is, in words."""


def shares_clusters(groups: IntArray) -> bool:
    """Whether some prompts depend on one another."""
    return len(np.unique(groups)) < len(groups)


def paired_test(differences: FloatArray, groups: IntArray) -> str:
    """Which test :func:`paired_p_value` makes: McNemar's where prompts are the units and scores are 0 or 1."""
    if shares_clusters(groups):
        return CLUSTER_FLIP
    return MCNEMAR if np.isin(differences, (-1.0, 0.0, 1.0)).all() else PROMPT_FLIP


def paired_p_value(differences: FloatArray, groups: IntArray) -> float:
    """Two-sided p of "the two models are exchangeable on every prompt".

    Parameters
    ----------
    differences
        [prompt] score of the second model minus that of the first, in [-1, 1].
    groups
        [prompt] cluster; unique where prompts are the units.

    Returns
    -------
    float
        Exact McNemar where prompts are the units and scores are 0 or 1; else the sign flip of cluster sums, which it
        equals for clusters of one. 1 where nothing differs, NaN below six clusters or without prompts.

    References
    ----------
    McNemar 1947, doi:10.1007/BF02295996.

    Examples
    --------
    >>> paired_p_value(np.repeat([1.0, -1.0, 0.0], [33, 59, 8]), np.arange(100))
    0.008780930806...
    """
    test = paired_test(differences, groups)
    if not len(differences) or (test == CLUSTER_FLIP and len(np.unique(groups)) < MIN_CLUSTERS):
        return float("nan")
    if test == MCNEMAR:
        return float(mcnemar((differences > 0).sum(), (differences < 0).sum()).p_value)
    if not differences.any():
        return 1.0
    return float(np.asarray(sign_flip_test(cluster_sums(differences[:, None], groups)).p_value).item())


def difference_interval(differences: FloatArray, groups: IntArray, alpha: float) -> tuple[float, float]:
    """Interval of the mean difference over prompts (:func:`bounded_interval`); NaN with one cluster.

    Parameters
    ----------
    differences
        [prompt] in [-1, 1].
    groups
        [prompt] cluster.
    alpha
        1 - coverage.
    """
    _, low, high = bounded_interval(differences[:, None], groups, alpha=alpha)
    return float(low[0]), float(high[0])
