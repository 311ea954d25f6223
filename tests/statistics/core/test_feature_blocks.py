from __future__ import annotations

import dask.array as da
import numpy as np

from rlgen_stats.toolkit.statistics.core.feature_blocks import feature_arrays, map_features


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
