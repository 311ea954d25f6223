"""The difference of two models' scores on the same prompts: its p-value and its interval; the unit is the cluster."""

from __future__ import annotations

from typing import Final

import numpy as np
from scipy import stats

from rlgen_stats.toolkit.statistics.core.units import cluster_sums
from rlgen_stats.toolkit.statistics.kernels import cluster_se, mcnemar, sign_flip_test, wilson_interval
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray
from rlgen_stats.toolkit.statistics.kernels.unit_tables import MIN_CLUSTERS

MCNEMAR: Final = "exact McNemar"
CLUSTER_FLIP: Final = "sign flip of clusters"
PROMPT_FLIP: Final = "sign flip of prompts"


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
    """Interval of the mean difference over prompts; NaN with one cluster.

    Parameters
    ----------
    differences
        [prompt] in [-1, 1].
    groups
        [prompt] cluster.
    alpha
        1 - coverage.

    Notes
    -----
    Student t with the CR1 cluster error and G - 1 degrees of freedom. Where every prompt changed alike, the interval
    that one more discordant cluster could not leave: another value has at most Wilson's upper share of clusters.
    """
    n, mean = len(np.unique(groups)), float(differences.mean()) if len(differences) else float("nan")
    error = cluster_error(differences, groups)
    if not np.isfinite(error):
        return float("nan"), float("nan")
    if error > 0:
        half = float(stats.t.ppf(1 - alpha / 2, n - 1)) * error
        return max(-1.0, mean - half), min(1.0, mean + half)
    other = wilson_interval(0.0, n, alpha=alpha)[1]
    return mean - (mean + 1) * other, mean + (1 - mean) * other


def cluster_error(values: FloatArray, groups: IntArray) -> float:
    """CR1 standard error of the mean over prompts; NaN below two clusters."""
    if len(np.unique(groups)) < 2:
        return float("nan")
    return float(np.asarray(cluster_se(values[:, None], groups, kind="CR1").standard_error).item())
