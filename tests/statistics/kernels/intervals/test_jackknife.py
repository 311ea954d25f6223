"""Delete-a-group jackknife: the mean's own error, coverage of a ratio, shapes, refusals."""

import numpy as np
import pytest
from scipy import stats

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.intervals.jackknife import delete_group_jackknife


def test_of_a_mean_it_is_the_error_of_the_mean() -> None:
    x = np.random.default_rng(1).gamma(2, size=(17, 5))
    result = delete_group_jackknife((x.sum(axis=0) - x) / 16, x.mean(axis=0), alpha=0.1)
    np.testing.assert_allclose(result.standard_error, x.std(axis=0, ddof=1) / np.sqrt(17), rtol=1e-12)
    low, high = stats.ttest_1samp(x, 0).confidence_interval(0.9)
    np.testing.assert_allclose([result.low, result.high], [low, high], rtol=1e-12)
    np.testing.assert_allclose(
        result.lower, stats.ttest_1samp(x, 0, alternative="greater").confidence_interval(0.9).low, rtol=1e-12
    )
    np.testing.assert_allclose(
        result.upper, stats.ttest_1samp(x, 0, alternative="less").confidence_interval(0.9).high, rtol=1e-12
    )


def test_intervals_of_a_ratio_cover_it() -> None:
    """200 units in 10 groups, y = 3 x + noise: one interval in twenty misses 3; so does each one-sided bound."""
    random = np.random.default_rng(2)
    x = random.gamma(2, size=(2000, 10, 20))
    y = 3 * x + random.normal(size=x.shape)
    sums = np.stack([x.sum(axis=2), y.sum(axis=2)])
    without = sums.sum(axis=2, keepdims=True) - sums
    result = delete_group_jackknife((without[1] / without[0]).T, sums[1].sum(axis=1) / sums[0].sum(axis=1))
    error = 3 * np.sqrt(0.05 * 0.95 / 2000)
    assert ((result.low > 3) | (result.high < 3)).mean() == pytest.approx(0.05, abs=error)
    assert (result.lower > 3).mean() == pytest.approx(0.05, abs=error)
    assert (result.upper < 3).mean() == pytest.approx(0.05, abs=error)
    naive = 1.96 * (sums[1] / sums[0]).std(axis=1) / 10  # groups taken for units, and a normal quantile
    assert (np.abs(result.estimate - 3) > naive).mean() > 0.2


def test_shapes_order_and_missing() -> None:
    r = np.random.default_rng(3).normal(size=(6, 2, 3))
    result = delete_group_jackknife(r)
    assert result.low.shape == (2, 3)
    np.testing.assert_allclose(result.estimate, r.mean(axis=0))
    np.testing.assert_allclose(delete_group_jackknife(r[::-1]).high, result.high, rtol=1e-12)
    assert delete_group_jackknife(r[:, 1, 2]).standard_error == pytest.approx(result.standard_error[1, 2])
    r[2, 0, 0] = np.nan
    result = delete_group_jackknife(r, np.zeros((2, 3)))
    assert np.isnan([result.estimate[0, 0], result.standard_error[0, 0], result.lower[0, 0]]).all()
    assert np.isfinite(result.upper.ravel()[1:]).all()


@pytest.mark.parametrize(
    ("replicates", "estimate", "alpha", "message"),
    [
        (np.zeros((1, 3)), None, 0.05, r"at least 2 groups, got shape \(1, 3\)"),
        (1.0, None, 0.05, "at least 2 groups"),
        (np.zeros((4, 3)), np.zeros(2), 0.05, r"shape of one replicate, \(3,\), got \(2,\)"),
        (np.zeros(4), None, 0.0, "between 0 and 1, got 0.0"),
    ],
)
def test_refusals(replicates, estimate, alpha: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        delete_group_jackknife(replicates, estimate, alpha=alpha)
