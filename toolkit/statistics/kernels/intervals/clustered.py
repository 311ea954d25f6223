"""Standard error of a mean over units that are dependent within clusters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray
from rlgen_stats.toolkit.statistics.kernels.unit_tables import as_units, cluster_totals


@dataclass(frozen=True)
class ClusterResult:
    """Mean with a cluster-robust standard error."""

    mean: FloatArray
    """[feature]."""
    standard_error: FloatArray
    """[feature]."""
    n_clusters: int
    """Independent units."""


def cluster_se(values: Any, clusters: Any, *, kind: Literal["CR0", "CR1"] = "CR1") -> ClusterResult:
    """Standard error of a mean whose units are dependent within clusters.

    Parameters
    ----------
    values
        [unit] or [unit, feature].
    clusters
        Labels [unit].
    kind
        CR0 (sandwich) or CR1 (times sqrt(G / (G - 1)) for G clusters).

    Raises
    ------
    InputError
        If there are fewer than two clusters, or the kind is unknown.

    References
    ----------
    Liang and Zeger 1986; Cameron and Miller 2015, doi:10.3368/jhr.50.2.317, section II.
    """
    if kind not in ("CR0", "CR1"):
        raise InputError(f"kind must be CR0 or CR1, got {kind!r}.")
    x, single = as_units(values)
    mean = x.mean(axis=0)
    totals = cluster_totals(x - mean, clusters)
    g = len(totals)
    if g < 2:
        raise InputError(f"a clustered standard error needs at least two clusters, got {g}.")
    error = np.sqrt(np.square(totals).sum(axis=0)) / len(x)
    if kind == "CR1":
        error = error * np.sqrt(g / (g - 1))
    return ClusterResult(mean[0], error[0], g) if single else ClusterResult(mean, error, g)
