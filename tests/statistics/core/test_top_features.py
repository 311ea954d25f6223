from __future__ import annotations

from itertools import pairwise

import dask.array as da
import numpy as np
import pytest

from rlgen_stats.toolkit.statistics.core.top_features import fold_leading, leading_features


def rankings(n: int, *, distinct: int, seed: int) -> np.ndarray:
    """Columns key, tie-breaker and id of seven rankings of n features; keys repeat, some features are not ranked."""
    random = np.random.default_rng(seed)
    keys = random.integers(0, distinct, (7, n)).astype(float)
    keys[random.random(keys.shape) < 0.2] = np.inf
    keys[0] = np.inf
    keys[1, 2:] = np.inf
    return np.stack([keys, random.random(keys.shape), np.broadcast_to(random.permutation(n), keys.shape)])


def slow(columns: np.ndarray, k: int) -> list[list[float]]:
    """Ids by sorting whole rows of tuples."""
    found = []
    for row in columns.transpose(1, 2, 0).tolist():
        ids = [one[-1] for one in sorted(map(tuple, row)) if np.isfinite(one[0])][:k]
        found.append(ids + [-1.0] * (k - len(ids)))
    return found


@pytest.mark.parametrize("distinct", [2, 20, 10**9])
@pytest.mark.parametrize("n", [3, 10, 60])
def test_against_sorting_whole_rankings(n: int, distinct: int) -> None:
    columns = rankings(n, distinct=distinct, seed=n)
    top = leading_features(columns, 10)
    assert top.shape == (3, 7, 10)
    assert top[-1].tolist() == slow(columns, 10)


def test_the_id_may_decide_between_equal_keys() -> None:
    columns = rankings(60, distinct=3, seed=1)[[0, 2]]
    assert leading_features(columns, 10)[-1].tolist() == slow(columns, 10)


@pytest.mark.parametrize("sizes", [(60,), (7, 20, 33), (1,) * 60])
def test_blocks_change_nothing(sizes: tuple[int, ...]) -> None:
    columns = rankings(60, distinct=20, seed=2)
    edges = np.cumsum((0, *sizes))
    parts = [leading_features(columns[:, :, a:b], 10) for a, b in pairwise(edges)]
    folded = fold_leading(da.stack([da.from_array(part) for part in parts]), axis=0).compute()
    assert folded[-1].tolist() == slow(columns, 10)
