"""Clustered errors: sums over pairs, and tokens taken as units."""

import numpy as np
import pytest
from scipy import stats

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels import (
    cluster_se,
)
from tests.oracles import slow


def test_clustered_error_is_the_sum_over_pairs() -> None:
    random = np.random.default_rng(57)
    clusters = random.integers(0, 7, 40)
    y = random.normal(size=40) + clusters
    for kind in ("CR0", "CR1"):
        expected = slow.clustered_error(y.tolist(), clusters.tolist(), kind == "CR1")
        assert cluster_se(y, clusters, kind=kind).standard_error == pytest.approx(expected, rel=1e-12)  # type: ignore[arg-type]
    assert cluster_se(y, [f"c{c}" for c in clusters]).n_clusters == 7
    with pytest.raises(InputError, match="CR0, CR1 or CR2, got 'CR3'"):
        cluster_se(y, clusters, kind="CR3")  # type: ignore[arg-type]


def test_two_clusters_have_an_error_and_one_has_none() -> None:
    """Means 1 and 3 of two clusters of two units: totals of -2 and 2 about the mean, sqrt(8) / 4 times sqrt(2 / 1)."""
    y, clusters = np.array([1.0, 1.0, 3.0, 3.0]), np.array([0, 0, 1, 1])
    assert cluster_se(y, clusters, kind="CR0").standard_error == pytest.approx(np.sqrt(8) / 4)
    assert cluster_se(y, clusters).standard_error == pytest.approx(1.0)
    with pytest.raises(InputError, match="at least two clusters, got 1"):
        cluster_se(y, np.zeros(4))


def test_tokens_as_units_break_the_level_that_clusters_keep() -> None:
    """docs/method.md section 3: 64 tokens a prompt with ICC .05, a t test over tokens rejects far above its level."""
    random = np.random.default_rng(58)
    clusters = np.repeat(np.arange(60), 64)
    token, robust = [], []
    for _ in range(150):
        y = np.sqrt(0.05) * random.normal(size=60)[clusters] + np.sqrt(0.95) * random.normal(size=60 * 64)
        token.append(stats.ttest_1samp(y, 0).pvalue)
        result = cluster_se(y, clusters)
        robust.append(2 * stats.t.sf(abs(result.mean / result.standard_error), 59))
    assert np.mean(np.array(token) <= 0.05) > 0.2
    assert np.mean(np.array(robust) <= 0.05) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 150)


def test_clusters_of_one_unit_give_the_error_of_a_mean() -> None:
    x = np.random.default_rng(5).normal(size=(30, 2))
    error = cluster_se(x, np.arange(30)).standard_error
    np.testing.assert_allclose(error, x.std(axis=0, ddof=1) / np.sqrt(30))
    with pytest.raises(InputError, match="two clusters, got 1"):
        cluster_se(x, np.zeros(30))
