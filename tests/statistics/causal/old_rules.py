"""Rules of earlier releases, as they were: what tests and calibration show to fail."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rlgen_stats.toolkit.intervention import OutcomeTable, Settings
from rlgen_stats.toolkit.statistics.causal.criteria import NEW_FAILURE_SHARE
from rlgen_stats.toolkit.statistics.causal.outcome_table import paired_effect
from rlgen_stats.toolkit.statistics.kernels import cluster_se


def invented_clusters(x: NDArray[np.float64], codes: NDArray[np.int64], *, alpha: float) -> tuple[float, float]:
    """Interval of a mean of one column after adding a cluster that gained everywhere and one that lost everywhere."""
    n_clusters = len(np.unique(codes))
    size = max(round(len(x) / n_clusters), 1)
    padded = np.concatenate([x, np.repeat([1.0, -1.0], size)])
    labels = np.concatenate([codes, np.repeat([codes.max() + 1, codes.max() + 2], size)])
    half = stats.t.ppf(1 - alpha / 2, n_clusters - 1) * cluster_se(padded, labels).standard_error
    return float(padded.mean() - half), float(padded.mean() + half)


def matching_shares(table: OutcomeTable, settings: Settings) -> bool:
    """V6 by the divergence and by shares of endings, wherever they are."""
    i, unedited, target = table.chosen, table.unedited, table.target
    nearer = (table.kl_to_base[i] - table.kl_to_base[unedited])[target][:, None]
    effect = paired_effect(nearer, table.cluster[target], alpha=settings.alpha, seed=0, n_resamples=99, limit=np.inf)
    before, after, other = (shares(e[target]) for e in (table.ending[unedited], table.ending[i], table.other_ending))
    closer = np.abs(after - other).sum() < np.abs(before - other).sum()
    new = np.maximum(after - np.maximum(before, other), 0.0)[1:].sum()
    broke = new > NEW_FAILURE_SHARE * abs(float(table.change(target)[..., i].mean()))
    return bool(effect.mean[0] < 0 and effect.p_value[0] <= settings.alpha and closer and not broke)


def shares(ending: Any) -> Any:
    """Share of each ending."""
    return np.bincount(ending.ravel(), minlength=6) / ending.size
