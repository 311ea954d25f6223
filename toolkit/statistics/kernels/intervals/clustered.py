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
    df: float
    """Degrees of freedom of the t quantile that belongs to this error."""


def cluster_se(values: Any, clusters: Any, *, kind: Literal["CR0", "CR1", "CR2"] = "CR1") -> ClusterResult:
    """Standard error of a mean whose units are dependent within clusters.

    Parameters
    ----------
    values
        [unit] or [unit, feature].
    clusters
        Labels [unit].
    kind
        CR0 (sandwich), CR1 (times sqrt(G / (G - 1)) for G clusters; both with G - 1 degrees of freedom), or CR2, which
        is unbiased for independent units whatever the sizes of the clusters, with Satterthwaite's degrees of freedom.

    Raises
    ------
    InputError
        If there are fewer than two clusters, or the kind is unknown.

    References
    ----------
    Liang and Zeger 1986; Cameron and Miller 2015, doi:10.3368/jhr.50.2.317, section II. CR2: Bell and McCaffrey 2002;
    Pustejovsky and Tipton 2018, doi:10.1080/07350015.2016.1247004, eqs. 5 and 11, for a model of an intercept only.
    """
    if kind not in ("CR0", "CR1", "CR2"):
        raise InputError(f"kind must be CR0, CR1 or CR2, got {kind!r}.")
    x, single = as_units(values)
    mean = x.mean(axis=0)
    totals = cluster_totals(x - mean, clusters)
    g = len(totals)
    if g < 2:
        raise InputError(f"a clustered standard error needs at least two clusters, got {g}.")
    df = float(g - 1)
    if kind == "CR2":
        sizes = np.unique(np.asarray(clusters), return_counts=True)[1].astype(np.float64)
        inflation = 1 / (1 - sizes / len(x))  # of a squared total, which the mean has taken part of
        totals = totals * np.sqrt(inflation)[:, None]
        # Of the quadratic form in the units: trace squared over the sum of squares of its matrix [cluster, cluster].
        cross = inflation * np.square(sizes)
        off_diagonal = (cross.sum() ** 2 - np.square(cross).sum()) / len(x) ** 2
        df = float(sizes.sum() ** 2 / (np.square(sizes).sum() + off_diagonal))
    error = np.sqrt(np.square(totals).sum(axis=0)) / len(x)
    if kind == "CR1":
        error = error * np.sqrt(g / (g - 1))
    return ClusterResult(mean[0], error[0], g, df) if single else ClusterResult(mean, error, g, df)
