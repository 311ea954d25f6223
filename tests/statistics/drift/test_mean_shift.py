"""The share of a difference that one constant vector explains: planted shares, no direction, clusters, order."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics import mean_shift


def activations(d: np.ndarray, *, per_cluster: int = 1) -> xr.Dataset:
    """Base, and one model that differs by ``d`` [prompt, channel]."""
    n = len(d)
    base = np.random.default_rng(9).normal(0, 5, d.shape)
    return xr.Dataset(
        {"activation": (("model", "prompt", "channel"), np.stack([base, base + d]))},
        coords={
            "model": ["base@0", "rl@10"],
            "prompt": [f"p{i:04d}" for i in range(n)],
            "cluster": ("prompt", [f"c{i // per_cluster:04d}" for i in range(n)]),
        },
    )


def test_one_vector_explains_all_of_a_constant_difference() -> None:
    out = mean_shift(activations(np.ones((60, 8))))
    for name in ("share", "share_low", "share_high", "norm_ratio"):
        assert float(out[name][0]) == pytest.approx(1.0, abs=1e-9)
    assert out.n.values.tolist() == [60]


def test_the_planted_share_is_found_and_covered() -> None:
    """||mu||^2 = 8 .5^2 = 2 in noise of 8: share 2 / 10; its interval covers in 95 of 100 worlds, give or take."""
    covered, shares = 0, []
    for seed in range(100):
        d = 0.5 + np.random.default_rng(seed).normal(0, 1, (80, 8))
        out = mean_shift(activations(d), seed=seed)
        shares.append(float(out["share"][0]))
        covered += float(out.share_low[0]) <= 0.2 <= float(out.share_high[0])
    assert np.mean(shares) == pytest.approx(0.2, abs=0.01)
    assert 88 <= covered <= 100


def test_differences_without_a_common_direction_give_zero_on_average_and_the_ratio_its_floor() -> None:
    shares, ratios = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        d = np.repeat(rng.normal(0, 1, (20, 8)), 5, axis=0)  # prompts of a cluster move alike
        out = mean_shift(activations(d, per_cluster=5), clusters="cluster")
        shares.append(float(out["share"][0]))
        ratios.append(float(out.norm_ratio[0]))
    assert np.mean(shares) == pytest.approx(0.0, abs=3 * np.std(shares) / np.sqrt(200))
    assert np.mean(ratios) == pytest.approx(1 / np.sqrt(20), rel=0.1)


def test_ratio_equals_the_definition_and_order_does_not_matter() -> None:
    d = 0.5 + np.random.default_rng(3).normal(0, 1, (50, 4))
    data = activations(d, per_cluster=2)
    out = mean_shift(data, clusters="cluster")
    assert float(out.norm_ratio[0]) == pytest.approx(
        np.linalg.norm(d.mean(axis=0)) / np.sqrt(np.mean(np.linalg.norm(d, axis=1) ** 2))
    )
    lazy = data.isel(prompt=slice(None, None, -1)).chunk({"prompt": 7})
    xr.testing.assert_allclose(mean_shift(lazy, clusters="cluster"), out, rtol=1e-9)


def test_prompts_without_tokens_are_left_out_and_what_does_not_differ_is_not_estimable() -> None:
    d = np.random.default_rng(3).normal(1, 1, (50, 4))
    data = activations(d)
    gaps = data.activation.values.copy()
    gaps[1, 7] = np.nan
    out = mean_shift(data.assign(activation=(data.activation.dims, gaps)))
    assert out.n.values.tolist() == [49]
    assert np.isfinite(out["share"]).all()
    assert np.isnan(mean_shift(activations(np.zeros((50, 4))))["share"]).all()
    assert np.isnan(mean_shift(activations(d[:2]))["share_low"]).all()


def test_refusals() -> None:
    data = activations(np.ones((50, 4)))
    with pytest.raises(InputError, match="model 'rl@99' is not in the data"):
        mean_shift(data, models=["rl@99"])
    with pytest.raises(InputError, match="name at least one model beside the reference"):
        mean_shift(data, models=[])
