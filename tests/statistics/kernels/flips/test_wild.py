"""The wild cluster bootstrap: the definition in loops, planted truth, calibration, order, refusals."""

import numpy as np
import pytest

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.statistics.kernels import cluster_se, sign_flip_test
from rlgen_stats.toolkit.statistics.kernels.draws import stream
from rlgen_stats.toolkit.statistics.kernels.flips.wild import WEBB, wild_cluster_bootstrap


def slow_p(x: np.ndarray, codes: np.ndarray, n_resamples: int, seed: int) -> float:
    """Draw by draw, with the errors of ``cluster_se``."""

    def t(values: np.ndarray) -> float:
        result = cluster_se(values, codes)
        return float(result.mean / result.standard_error)

    observed, reached = abs(t(x)), 0
    for draw in range(n_resamples):
        weights = WEBB[stream(seed, draw).integers(0, 6, codes.max() + 1)]
        reached += abs(t(x * weights[codes])) >= observed - 1e-9
    return (1 + reached) / (n_resamples + 1)


def test_equals_the_definition() -> None:
    random = np.random.default_rng(1)
    codes = np.repeat(np.arange(7), [3, 1, 4, 2, 5, 3, 2])
    x = random.normal(0.4, 1, size=(20, 3)) + random.normal(size=(7, 1))[codes]
    result = wild_cluster_bootstrap(x, np.array(list("gfedcba"))[codes][::1], n_resamples=199, seed=4)
    labels = np.unique(np.array(list("gfedcba"))[codes], return_inverse=True)[1]
    for k in range(3):
        assert result.p_value[k] == pytest.approx(slow_p(x[:, k], labels, 199, 4), abs=1e-12)
        quantile = cluster_se(x[:, k], codes)
        assert result.statistic[k] == pytest.approx(float(quantile.mean / quantile.standard_error), rel=1e-12)
    assert result.n_clusters == 7


def test_weights_have_mean_zero_and_variance_one() -> None:
    assert WEBB.mean() == pytest.approx(0, abs=1e-15)
    assert np.square(WEBB).mean() == pytest.approx(1)
    assert np.power(WEBB, 3).mean() == pytest.approx(0, abs=1e-15)


def test_planted_effects_are_found_below_the_floor_of_flips() -> None:
    x = np.random.default_rng(2).normal(3, 0.3, size=(7, 20))
    result = wild_cluster_bootstrap(x, n_resamples=1999)
    assert np.median(result.p_value) < 2**-6  # two-sided flips of seven units end at 1/64
    assert sign_flip_test(x).p_value.min() == pytest.approx(2**-6)


def test_calibrated_over_clusters_where_the_prompt_level_is_not() -> None:
    random = np.random.default_rng(3)
    codes = np.repeat(np.arange(9), 6)
    x = random.normal(size=(9, 1500))[codes] + random.normal(size=(54, 1500))
    guarded = wild_cluster_bootstrap(x, codes, n_resamples=399).p_value
    naive = sign_flip_test(x).p_value
    assert abs((guarded <= 0.05).mean() - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 1500) + 0.01  # asymptotic, not exact
    assert (naive <= 0.05).mean() > 0.25


def test_blocks_order_and_features_that_do_not_vary() -> None:
    x = np.random.default_rng(4).normal(size=(8, 30))
    x[:, 3] = 0
    x[:, 4] = 2
    whole = wild_cluster_bootstrap(x, n_resamples=99, seed=1)
    assert np.isnan(whole.p_value[3])
    assert np.isnan(whole.statistic[4])
    part = wild_cluster_bootstrap(x[:, 10:12], n_resamples=99, seed=1)
    np.testing.assert_array_equal(part.p_value, whole.p_value[10:12])
    one = wild_cluster_bootstrap(x[:, 10], n_resamples=99, seed=1)
    assert one.p_value == whole.p_value[10]


def test_bad_input_is_explained() -> None:
    with pytest.raises(RefusedError, match="at least 6 clusters, got 5"):
        wild_cluster_bootstrap(np.ones((10, 2)), np.repeat(np.arange(5), 2))
    with pytest.raises(InputError, match="got 1 NaN or infinite"):
        wild_cluster_bootstrap([1.0, np.nan, 2, 3, 4, 5, 6])
