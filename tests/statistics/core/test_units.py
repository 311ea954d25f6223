from __future__ import annotations

import numpy as np

from rlgen_stats.toolkit.statistics.core.units import cluster_codes, unit_means


def test_unit_means_in_any_order_of_prompts():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 5, 40)
    values = rng.normal(0, 1, (40, 3))
    slow = np.array([[values[codes == c, k].mean() for k in range(3)] for c in range(5)])
    np.testing.assert_allclose(unit_means(values, codes), slow)
    np.testing.assert_array_equal(unit_means(values, None), values)


def test_clusters_of_one_are_prompts(make_features):
    assert cluster_codes(make_features(np.ones((1, 10, 2)), ["base@0"]), "cluster") is None
    codes = cluster_codes(make_features(np.ones((1, 10, 2)), ["base@0"], per_cluster=5), "cluster")
    assert codes.tolist() == [0] * 5 + [1] * 5
