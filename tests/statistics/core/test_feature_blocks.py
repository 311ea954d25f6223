from __future__ import annotations

import dask.array as da
import numpy as np
import pytest

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.core.feature_blocks import (
    cluster_codes,
    feature_arrays,
    map_features,
    run_models,
    unit_means,
)


def test_unit_means_in_any_order_of_prompts():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 5, 40)
    values = rng.normal(0, 1, (40, 3))
    slow = np.array([[values[codes == c, k].mean() for k in range(3)] for c in range(5)])
    np.testing.assert_allclose(unit_means(values, codes), slow)
    np.testing.assert_array_equal(unit_means(values, None), values)


def test_map_features_stitches_blocks_and_folds_states():
    values = np.random.default_rng(1).normal(0, 1, (2, 6, 11))
    array = da.from_array(values, chunks=(-1, -1, 4))

    def block(x, *, scale):
        return {"total": scale * x.sum(axis=1), "largest": np.array(x.max())}

    mapped = map_features(block, [array], outputs={"total": (2,)}, states={"largest": ((), da.max)}, scale=3.0)
    np.testing.assert_allclose(mapped.features["total"].compute(), 3 * values.sum(axis=1))
    assert float(mapped.states["largest"].compute()) == values.max()


def test_arrays_keep_prompts_whole(make_features):
    features = make_features(np.ones((2, 10, 9)), ["base@0", "rl@5"], chunk=4).chunk({"prompt": 3})
    (mean,), lazy = feature_arrays(features, ["mean"], ["rl@5", "base@0"])
    assert lazy
    assert mean.chunks == ((2,), (10,), (4, 4, 1))


def test_clusters_of_one_are_prompts(make_features):
    assert cluster_codes(make_features(np.ones((1, 10, 2)), ["base@0"]), "cluster") is None
    codes = cluster_codes(make_features(np.ones((1, 10, 2)), ["base@0"], per_cluster=5), "cluster")
    assert codes.tolist() == [0] * 5 + [1] * 5


def test_runs_are_ordered_by_step(make_features):
    features = make_features(np.ones((4, 4, 2)), ["base@0", "rl@100", "rl@20", "sft@3"])
    assert run_models(features, "rl") == ["rl@20", "rl@100"]
    with pytest.raises(
        InputError, match=r"run 'dpo' has no checkpoint in the data; the runs are \['base', 'rl', 'sft'\]"
    ):
        run_models(features, "dpo")
