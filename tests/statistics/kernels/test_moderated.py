"""Moderated t of two groups: formulas feature by feature, scipy at the limits, calibration with few runs, refusals."""

import numpy as np
import pytest
from scipy import special, stats

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels import (
    moderated_t,
)


def prior(variances: np.ndarray, dof: int) -> tuple[float, float]:
    """d0 and s0^2 by the moments of log s^2 (Smyth 2004, section 6.2), trigamma inverted by bisection."""
    e = np.log(variances) - special.digamma(dof / 2) + np.log(dof / 2)
    expected = e.var(ddof=1) - special.polygamma(1, dof / 2)
    low, high = 1e-6, 1e6
    for _ in range(200):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if special.polygamma(1, middle) > expected else (low, middle)
    return 2 * low, float(np.exp(e.mean() + special.digamma(low) - np.log(low)))


def test_two_groups_equal_the_formulas() -> None:
    random = np.random.default_rng(1)
    scale = np.sqrt(6 / random.chisquare(6, 80))
    x, y = random.normal(size=(4, 80)) * scale + 1, random.normal(size=(3, 80)) * scale
    result = moderated_t(x, y)
    pooled = (
        np.array([((x[:, k] - x[:, k].mean()) ** 2).sum() + ((y[:, k] - y[:, k].mean()) ** 2).sum() for k in range(80)])
        / 5
    )
    d0, s0 = prior(pooled, 5)
    assert (result.prior_dof, result.prior_variance) == pytest.approx((d0, s0), rel=1e-6)
    shrunk = (d0 * s0 + 5 * pooled) / (d0 + 5)
    t = (x.mean(axis=0) - y.mean(axis=0)) / np.sqrt(shrunk * (1 / 4 + 1 / 3))
    np.testing.assert_allclose(result.statistic, t, rtol=1e-6)
    np.testing.assert_allclose(result.p_value, 2 * stats.t.sf(np.abs(t), d0 + 5), rtol=1e-5)
    np.testing.assert_allclose(result.effect, x.mean(axis=0) - y.mean(axis=0))
    np.testing.assert_allclose(moderated_t(y, x).statistic, -result.statistic)


def test_without_a_prior_it_is_students_t() -> None:
    """Variances over eight orders of magnitude: hardly any prior left, small beside the larger half."""
    random = np.random.default_rng(2)
    scale = 10.0 ** random.uniform(-2, 2, 60)
    x, y = random.normal(size=(2, 5, 60)) * scale
    result = moderated_t(x, y)
    assert result.prior_dof < 0.5
    student = stats.ttest_ind(x, y).statistic
    np.testing.assert_allclose(result.statistic[scale > 1], student[scale > 1], rtol=0.05)


def test_few_runs_gain_power_and_keep_the_level() -> None:
    random = np.random.default_rng(3)
    scale = np.sqrt(8 / random.chisquare(8, 6000))
    x, y = random.normal(size=(2, 3, 6000)) * scale
    x[:, :1000] += 3
    p, plain = moderated_t(x, y).p_value, stats.ttest_ind(x, y).pvalue
    assert (p[1000:] <= 0.05).mean() == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / 5000))
    assert (p[:1000] <= 0.001).mean() > 3 * (plain[:1000] <= 0.001).mean()


def test_order_and_untestable_features() -> None:
    random = np.random.default_rng(4)
    x, y = random.normal(size=(2, 3, 30))
    result = moderated_t(x, y)
    np.testing.assert_allclose(moderated_t(x[:, ::-1], y[:, ::-1]).statistic[::-1], result.statistic, rtol=1e-12)
    wide = moderated_t(np.c_[x, np.zeros(3), [0, np.nan, 1]], np.c_[y, np.zeros(3), np.ones(3)])
    np.testing.assert_array_equal(wide.p_value[:30], result.p_value)
    assert np.isnan([wide.p_value[30:], wide.effect[30:]]).all()


def test_refusals() -> None:
    x = np.random.default_rng(5).normal(size=(3, 4))
    for a, b in ((x, x[:, :3]), (x[:1], x[:1]), (x[0], x)):
        with pytest.raises(InputError, match="same features and at least three units together"):
            moderated_t(a, b)


def test_moderation_shrinks_towards_one_variance() -> None:
    random = np.random.default_rng(6)
    equal = moderated_t(random.normal(size=(4, 3000)))
    assert equal.prior_dof > 50
    varied = moderated_t(random.normal(size=(4, 3000)) * np.sqrt(4 / random.chisquare(4, 3000)))
    assert 3 < varied.prior_dof < 5.5
    assert stats.kstest(varied.p_value, "uniform").pvalue > 0.001
    ordinary = stats.ttest_1samp(random.normal(size=(4, 3000)), 0).statistic
    assert np.abs(ordinary).max() > np.abs(equal.statistic).max()


def test_dead_features_do_not_spoil_the_moderation() -> None:
    random = np.random.default_rng(56)
    x = random.normal(size=(6, 40)) * np.sqrt(5 / random.chisquare(5, 40))
    alone = moderated_t(x)
    result = moderated_t(np.column_stack([x[:, :9], np.zeros(6), np.full(6, np.nan), x[:, 9:]]))
    for name in ("statistic", "p_value"):
        np.testing.assert_array_equal(np.delete(getattr(result, name), [9, 10]), getattr(alone, name))
        assert np.isnan(getattr(result, name)[9:11]).all()
    assert (result.prior_dof, result.prior_variance) == (alone.prior_dof, alone.prior_variance)
    constant = moderated_t(np.column_stack([x, np.ones(6)]))
    assert np.isfinite(constant.statistic).all()
    with pytest.raises(InputError, match="two testable features, got 1 of 2"):
        moderated_t(np.column_stack([x[:, 0], np.zeros(6)]))
