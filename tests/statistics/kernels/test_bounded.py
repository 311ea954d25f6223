"""Intervals of bounded means: exact binomial where nothing or one sign changed, and coverage."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels import bounded_interval, cluster_se


def changes(gained: int, lost: int, n: int) -> NDArray[np.float64]:
    column = np.zeros((n, 1))
    column[:gained], column[gained : gained + lost] = 1.0, -1.0
    return column


@pytest.mark.parametrize(("n", "inside"), [(58, False), (59, True)])
def test_an_edit_that_changes_nothing_has_the_exact_binomial_bound(n: int, inside: bool) -> None:
    """Two invented clusters at +-1 gave +-.08 with 28 clusters and never came within .05 below 59 either."""
    mean, low, high = bounded_interval(changes(0, 0, n), np.arange(n), alpha=0.10)
    assert mean[0] == 0
    assert high[0] == -low[0] == pytest.approx(proportion_confint(0, n, alpha=0.10, method="beta")[1])
    assert (high[0] < 0.05) == inside


@pytest.mark.parametrize(("lost", "n"), [(1, 40), (3, 100), (12, 200)])
def test_losses_alone_have_clopper_and_pearsons_bound(lost: int, n: int) -> None:
    _, low, _ = bounded_interval(changes(0, lost, n), np.arange(n), alpha=0.10)
    exact = proportion_confint(lost, n, alpha=0.10, method="beta")[1]
    half = stats.t.ppf(0.95, n - 1) * stats.sem(changes(0, lost, n))[0]
    expected = max(exact, lost / n + half)
    assert -low[0] == pytest.approx(expected, rel=0.03), "the draws' Monte-Carlo error is 2-3%"
    _, _, high = bounded_interval(changes(lost, 0, n), np.arange(n), alpha=0.10)
    assert high[0] == pytest.approx(expected, rel=0.03), "gains are losses mirrored"


def test_clusters_that_all_changed_alike_leave_unseen_ones_up_to_either_limit() -> None:
    """Of 20 clusters at .3, 13.9% of all may be others unseen (.05^(1/20) = .861), at 1 or at -1."""
    mean, low, high = bounded_interval(np.full((20, 1), 0.3), np.arange(20), alpha=0.10)
    assert (mean[0], low[0], high[0]) == pytest.approx((0.3, 0.3 - 0.1391 * 1.3, 0.3 + 0.1391 * 0.7), abs=1e-4)


def test_a_cluster_of_equal_prompts_says_what_one_prompt_says() -> None:
    draw = np.random.default_rng(2)
    x = draw.choice([-1.0, 0.0, 0.0, 0.0, 1.0], (30, 3))
    alone = bounded_interval(x, np.arange(30), alpha=0.05)
    of_four = bounded_interval(np.repeat(x, 4, axis=0), np.repeat(np.arange(30), 4), alpha=0.05)
    twice = bounded_interval(2 * x, np.arange(30), alpha=0.05, limit=2.0)
    for one, other, doubled in zip(alone, of_four, twice, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-9)
        np.testing.assert_allclose(doubled, 2 * one, rtol=1e-9)


def test_two_clusters_are_the_fewest_that_have_an_interval() -> None:
    _, low, high = bounded_interval(np.array([[0.5], [0.1]]), [0, 1], alpha=0.05)
    assert (low[0], high[0]) == (-1.0, 1.0)


def test_many_changed_clusters_have_the_interval_of_cr2() -> None:
    draw = np.random.default_rng(0)
    codes = np.repeat(np.arange(80), 3)
    x = np.clip(0.3 * draw.standard_normal((80, 2))[codes] + 0.2 * draw.standard_normal((240, 2)), -1, 1)
    mean, low, high = bounded_interval(x, codes, alpha=0.05)
    fit = cluster_se(x, codes, kind="CR2")
    half = stats.t.ppf(0.975, fit.df) * fit.standard_error
    np.testing.assert_allclose(high - mean, half, rtol=0.1)
    assert np.all(high - mean >= half)
    assert np.all(mean - low >= half)
    unbounded = bounded_interval(10 * x, codes, alpha=0.05, limit=np.inf)
    np.testing.assert_allclose(unbounded[2] - unbounded[0], 10 * half)


@pytest.mark.parametrize(("n_lost", "to_the_limit"), [(5 - 1, True), (5, False)])
def test_few_observed_on_a_side_leave_the_limit_possible(n_lost: int, to_the_limit: bool) -> None:
    """Forty clusters, some of which lost a tenth: with five of them a loss of a tenth is as far as one can lie."""
    x = np.full((40, 1), 0.02)
    x[:n_lost] = -0.1
    _, low, _ = bounded_interval(x, np.arange(40), alpha=0.05)
    assert (low[0] < -0.05) == to_the_limit


@pytest.mark.parametrize(("n_beyond", "to_the_limit"), [(5 - 1, True), (5, False)])
def test_clusters_at_the_mean_lie_on_neither_side(n_beyond: int, to_the_limit: bool) -> None:
    x = np.zeros((40, 1))
    x[:n_beyond], x[n_beyond : 2 * n_beyond] = 0.125, -0.125
    _, low, high = bounded_interval(x, np.arange(40), alpha=0.05)
    assert (low[0] < -0.07, high[0] > 0.07) == (to_the_limit, to_the_limit)


@pytest.mark.parametrize("shift", [-0.5, 0.5])
def test_clusters_beyond_are_counted_from_the_mean(shift: float) -> None:
    """With five clusters beyond the mean on either side the limits do not matter: a shift of all shifts the bounds."""
    x = np.concatenate([np.full(30, 0.02), np.full(5, -0.1), np.full(5, 0.1)])[:, None]
    here, there = (bounded_interval(one, np.arange(40), alpha=0.05) for one in (x, x + shift))
    np.testing.assert_allclose(np.subtract(there, here), shift)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_rare_losses_are_covered_where_a_t_interval_misses(share: float) -> None:
    draw, n = np.random.default_rng(0), 60
    x = -(draw.random((n, 2000)) < share).astype(np.float64)
    _, low, high = bounded_interval(x, np.arange(n), alpha=0.10)
    missed = (low > -share) | (high < -share)
    assert missed.mean() <= 0.10 + 3 * np.sqrt(0.09 / 2000)
    half = stats.t.ppf(0.95, n - 1) * stats.sem(x, axis=0)
    if share == 0.02:
        assert (np.abs(x.mean(axis=0) + share) > half).mean() > 0.25


def test_clusters_of_unequal_size_have_fewer_degrees_of_freedom() -> None:
    """CR2 of independent units is unbiased whatever the sizes; its degrees of freedom by simulation."""
    draw = np.random.default_rng(1)
    codes = np.repeat(np.arange(6), [1, 2, 3, 4, 10, 40])
    fits = cluster_se(draw.standard_normal((60, 4000)), codes, kind="CR2")
    variance = np.square(fits.standard_error)
    assert variance.mean() == pytest.approx(1 / 60, rel=0.05)
    assert fits.df == pytest.approx(2 * variance.mean() ** 2 / variance.var(), rel=0.15)
    assert fits.df < 4
    even = cluster_se(draw.standard_normal((60, 1)), np.repeat(np.arange(6), 10), kind="CR2")
    assert even.df == pytest.approx(5)


def test_what_is_refused_and_what_is_unknown() -> None:
    with pytest.raises(InputError, match=r"within \+-1, got 1.5"):
        bounded_interval(np.array([[1.5], [0.0]]), [0, 1], alpha=0.05)
    mean, low, high = bounded_interval(np.array([[0.5], [0.1]]), [0, 0], alpha=0.05)
    assert mean[0] == pytest.approx(0.3)
    assert np.isnan([low[0], high[0]]).all()


def test_columns_do_not_depend_on_each_other_and_the_draws_are_fixed() -> None:
    draw = np.random.default_rng(3)
    x = draw.choice([-1.0, 0.0, 0.0, 1.0], (50, 4))
    together = bounded_interval(x, np.arange(50), alpha=0.05)
    alone = [bounded_interval(x[:, [k]], np.arange(50), alpha=0.05) for k in range(4)]
    np.testing.assert_allclose(together[1], [one[1][0] for one in alone])
    mirrored = bounded_interval(-x, np.arange(50), alpha=0.05)
    np.testing.assert_allclose(mirrored[2], -together[1], rtol=0.05)


def test_without_a_limit_it_is_the_t_interval_of_cr2() -> None:
    x, codes = np.array([[0.1], [0.5], [0.9], [0.2], [0.4], [1.7]]), np.array([0, 0, 1, 1, 2, 2])
    fit = cluster_se(x, codes, kind="CR2")
    half = stats.t.ppf(0.975, fit.df) * fit.standard_error
    mean, low, high = bounded_interval(x, codes, limit=np.inf, alpha=0.05)
    np.testing.assert_allclose([mean, low, high], [x.mean(axis=0), x.mean(axis=0) - half, x.mean(axis=0) + half])
    assert low < mean < high
