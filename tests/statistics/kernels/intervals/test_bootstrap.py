"""Bootstrap-t: coverage, clusters, determinism, constant features."""

import numpy as np
import pytest
from scipy import stats

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels import (
    bootstrap_t,
    bootstrap_weights,
    cluster_se,
)


@pytest.mark.parametrize("n_nonzero", [10, 25, 100])
def test_coverage_of_a_sparse_mean(n_nonzero: int) -> None:
    """200 units of which about ``n_nonzero`` differ, skewed: intervals cover, where there is one."""
    random = np.random.default_rng(50)
    share = n_nonzero / 200
    x = (random.random((200, 1500)) < share) * random.gamma(4.0, 0.25, size=(200, 1500))
    result = bootstrap_t(x, n_resamples=399, seed=1)
    few = (x != 0).sum(axis=0) < 10
    assert np.isnan(result.low[few]).all()
    assert np.isfinite(result.low[~few]).all()
    covered = ((result.low <= share) & (result.high >= share))[~few].mean()
    low, high = (0.90, 0.99) if n_nonzero == 10 else (0.93, 0.97)
    assert low < covered < high


def test_clusters_keep_the_mean_and_widen_the_interval() -> None:
    random = np.random.default_rng(51)
    clusters = np.repeat(np.arange(25), random.integers(1, 9, 25))
    x = random.normal(1, size=25)[clusters][:, None] + 0.3 * random.normal(size=(len(clusters), 4))
    result, plain = bootstrap_t(x, clusters=clusters), bootstrap_t(x)
    np.testing.assert_allclose(result.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(result.standard_error, cluster_se(x, clusters).standard_error, rtol=1e-12)
    assert ((result.high - result.low) > 1.5 * (plain.high - plain.low)).all()
    alone = bootstrap_t(x, clusters=np.arange(len(x)))
    np.testing.assert_allclose([alone.low, alone.high], [plain.low, plain.high], rtol=1e-9)
    nine = np.where(clusters[:, None] < 9, x, 0.0)  # many units, but nine clusters that are not zero
    assert np.isnan(bootstrap_t(nine, clusters=clusters).low).all()


def test_bootstrap_is_a_function_of_seed_and_units_alone() -> None:
    x = np.random.default_rng(52).gamma(2.0, size=(30, 2100))
    whole = bootstrap_t(x, n_resamples=700, seed=3)  # more than one block of features
    part = bootstrap_t(x[:, 1490:1510], n_resamples=700, seed=3)
    np.testing.assert_allclose(part.low, whole.low[1490:1510], rtol=1e-12)
    assert not np.allclose(bootstrap_t(x[:, :5], n_resamples=700, seed=4).low, whole.low[:5])
    assert (bootstrap_weights(30, 5, seed=3).sum(axis=1) == 30).all()
    shifted, scaled = (
        bootstrap_t(x[:, :5] + 100, n_resamples=700, seed=3),
        bootstrap_t(-2 * x[:, :5], n_resamples=700, seed=3),
    )
    np.testing.assert_allclose(shifted.low, whole.low[:5] + 100, rtol=1e-9)
    np.testing.assert_allclose(scaled.high, -2 * whole.low[:5], rtol=1e-9)
    with pytest.raises(InputError, match="0 < alpha < 1"):
        bootstrap_t(x, alpha=0)


def test_resamples_without_spread_do_not_make_nan() -> None:
    """Ten equal values among eleven units: many resamples repeat one value, whose t is infinite."""
    result = bootstrap_t(np.r_[np.zeros(1), np.ones(10)], n_resamples=200)
    assert not np.isnan([result.low, result.high]).any()
    assert result.low <= result.mean <= result.high


@pytest.mark.parametrize("clusters", [None, np.repeat(np.arange(20), 2)])
def test_a_constant_feature_has_no_interval(clusters: np.ndarray | None) -> None:
    """The mean of forty .1 is not .1 to the last bit; that is no spread, and no reason for an infinite bound."""
    x = np.column_stack([np.full(40, value) for value in (0.1, 0.3, 0.5, 0.7, 1e-200)])
    result = bootstrap_t(x, n_resamples=199, clusters=clusters)
    np.testing.assert_allclose(result.mean, x[0])
    assert np.isnan(result.low).all()
    assert np.isnan(result.high).all()
    assert (result.standard_error == 0).all()


@pytest.mark.parametrize("n", [15, 60])
def test_bootstrap_t_covers_a_skewed_mean(n: int) -> None:
    x = np.random.default_rng(11).exponential(size=(n, 1500))
    result = bootstrap_t(x, n_resamples=400)
    covered = ((result.low <= 1) & (result.high >= 1)).mean()
    assert 0.91 < covered < 0.975
    normal = np.abs(x.mean(axis=0) - 1) <= stats.t.ppf(0.975, n - 1) * x.std(axis=0, ddof=1) / np.sqrt(n)
    assert covered > normal.mean()


def test_bootstrap_t_equals_a_slow_one_and_refuses_sparse_features() -> None:
    x = np.random.default_rng(12).gamma(2.0, size=25)
    result = bootstrap_t(x, n_resamples=300, seed=5)
    draws = []
    for draw in range(300):
        generator = np.random.Generator(np.random.Philox(key=np.array([5, draw], dtype=np.uint64)))
        sample = x[generator.integers(0, 25, 25)]
        draws.append((sample.mean() - x.mean()) / (sample.std(ddof=1) / 5))
    error = x.std(ddof=1) / 5
    np.testing.assert_allclose(result.low, x.mean() - error * np.quantile(draws, 0.975, method="median_unbiased"))
    np.testing.assert_allclose(result.high, x.mean() - error * np.quantile(draws, 0.025, method="median_unbiased"))
    sparse = np.zeros(50)
    sparse[:9] = 1.0
    assert np.isnan(bootstrap_t(sparse).low)
