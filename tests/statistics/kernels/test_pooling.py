"""Pooling over dictionaries: the two-way table by hand, statsmodels, coverage, and what one dictionary gives."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from numpy.typing import NDArray
from scipy import stats

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels import (
    agreed,
    bounded_interval,
    cluster_se,
    delete_group_jackknife,
    dictionaries_needed,
    pooled_estimates,
    pooled_intervals,
    pooled_mean,
    same_direction,
)

TABLE = np.array([[1.0, 3.0, 2.0, 6.0], [2.0, 5.0, 3.0, 6.0], [4.0, 5.0, 7.0, 8.0]])
"""Three dictionaries, four prompts. Means 3, 4, 6 and 7/3, 13/3, 4, 20/3; grand mean 13/3."""


def by_hand(y: NDArray[np.float64], alpha: float = 0.05) -> tuple[float, float, float]:
    """Mean, squared half-width and between-variance from the mean squares of a two-way table."""
    r, g = y.shape
    grand, rows, columns = y.mean(), y.mean(axis=1), y.mean(axis=0)
    ms_r = g * sum((a - grand) ** 2 for a in rows) / (r - 1)
    ms_g = r * sum((b - grand) ** 2 for b in columns) / (g - 1)
    ms_e = sum((y[i, j] - rows[i] - columns[j] + grand) ** 2 for i in range(r) for j in range(g)) / (r - 1) / (g - 1)
    t_g, t_r = (stats.t.ppf(1 - alpha / 2, df) for df in (g - 1, r - 1))
    both = t_g**2 * max(ms_g - ms_e, 0) / (r * g) + t_r**2 * ms_r / (r * g)
    return float(grand), float(max(both, t_g**2 * ms_g / (r * g))), max((ms_r - ms_e) / g, 0.0)


def test_the_interval_is_that_of_the_mean_squares() -> None:
    mean, squared, between = by_hand(TABLE)
    assert (mean, between) == pytest.approx((13 / 3, 19 / 9))  # MS_R = 28/3, MS_E = 8/9
    pooled = pooled_mean(TABLE)
    assert pooled.mean == pytest.approx(mean)
    assert (pooled.high - pooled.mean) ** 2 == pytest.approx(squared)
    assert pooled.mean - pooled.low == pytest.approx(pooled.high - pooled.mean)
    assert pooled.between_sd == pytest.approx(np.sqrt(between))
    assert pooled.each_mean.tolist() == [3, 4, 6]
    assert pooled.between_known
    assert pooled.n_dictionaries == 3
    # V = (MS_G + MS_R - MS_E) / (R G)
    ms_g = 3 * float(np.square(TABLE.mean(axis=0) - 13 / 3).sum()) / 3
    assert pooled.standard_error**2 == pytest.approx((ms_g + 28 / 3 - 8 / 9) / 12)
    assert stats.t.ppf(0.975, pooled.df) * pooled.standard_error == pytest.approx(pooled.high - pooled.mean)
    at_zero = pooled_mean(TABLE, alpha=pooled.p_value)
    assert at_zero.low == pytest.approx(0, abs=1e-9)


def test_variance_between_dictionaries_agrees_with_statsmodels() -> None:
    """REML of crossed effects equals the moments of a balanced table where no component is negative."""
    random = np.random.default_rng(3)
    y = random.normal(size=(5, 1)) + random.normal(size=12) + 0.5 * random.normal(size=(5, 12))
    where = {"dictionary": np.repeat(np.arange(5), 12), "prompt": np.tile(np.arange(12), 5)}
    table = pd.DataFrame({"y": y.ravel(), "one": 1, **where})
    crossed = {"d": "0 + C(dictionary)", "p": "0 + C(prompt)"}
    fit = smf.mixedlm("y ~ 1", table, groups="one", vc_formula=crossed, re_formula="0").fit(method="lbfgs")
    pooled = pooled_mean(y)
    assert pooled.between_sd**2 == pytest.approx(
        dict(zip(fit.model.exog_vc.names, fit.vcomp, strict=True))["d"], rel=1e-3
    )
    assert pooled.standard_error == pytest.approx(float(fit.bse["Intercept"]), rel=1e-3)


def test_one_dictionary_gives_the_interval_over_clusters_and_says_so() -> None:
    random = np.random.default_rng(4)
    codes = random.integers(0, 9, 50)
    x = random.normal(0.4, 1.0, (50, 3))
    pooled, over = pooled_mean(x[None], codes), cluster_se(x, codes)
    half = stats.t.ppf(0.975, 8) * over.standard_error
    np.testing.assert_allclose([pooled.low, pooled.high], [over.mean - half, over.mean + half], rtol=1e-12)
    np.testing.assert_allclose(pooled.p_value, 2 * stats.t.sf(np.abs(over.mean / over.standard_error), 8), rtol=1e-9)
    assert not pooled.between_known
    assert np.isnan(pooled.between_sd).all()
    assert np.all(pooled.df == 8)


def test_unequal_clusters_keep_the_mean_over_units_and_its_error() -> None:
    """Identical dictionaries: no variance between, and the error over clusters remains."""
    random = np.random.default_rng(5)
    codes = np.repeat([2, 7, 1, 4], [1, 9, 3, 5])
    x = random.normal(size=18)
    pooled, over = pooled_mean(np.stack([x, x, x]), codes), cluster_se(x, codes)
    assert pooled.mean == pytest.approx(x.mean())
    assert pooled.standard_error == pytest.approx(over.standard_error)
    assert pooled.df == pytest.approx(3)
    assert pooled.between_sd == 0


def test_never_narrower_than_over_clusters_alone() -> None:
    random = np.random.default_rng(6)
    y = random.normal(size=(2, 20, 500))
    pooled, over = pooled_mean(y), pooled_mean(y.mean(axis=0)[None])
    assert np.all(pooled.high >= over.high - 1e-12)
    assert np.any(pooled.high <= over.high + 1e-12)  # where dictionaries agree by chance


def test_columns_are_independent_of_each_other() -> None:
    y = np.random.default_rng(7).normal(0.2, 1.0, (3, 15, 4))
    together = pooled_mean(y)
    for k in range(4):
        alone = pooled_mean(y[..., k])
        for name in ("mean", "low", "high", "standard_error", "df", "between_sd", "p_value"):
            assert getattr(together, name)[k] == pytest.approx(getattr(alone, name), rel=1e-12), name


def test_other_bounds_replace_those_over_clusters() -> None:
    y = TABLE[..., None]
    usual = pooled_mean(y)
    over = cluster_se(TABLE.mean(axis=0), np.arange(4))
    half = stats.t.ppf(0.975, 3) * over.standard_error
    same = pooled_mean(y, within=(np.array([over.mean - half]), np.array([over.mean + half])))
    assert (same.low, same.high) == (pytest.approx(usual.low), pytest.approx(usual.high))
    skewed = pooled_mean(y, within=(np.array([over.mean - 3 * half]), np.array([over.mean + half])))
    assert skewed.high == pytest.approx(usual.high)
    # by hand: the clusters' part is 3 times as wide, less their noise, plus the spread of dictionaries
    t_g, t_r = stats.t.ppf(0.975, 3), stats.t.ppf(0.975, 2)
    below = (3 * half) ** 2 - t_g**2 * (8 / 9) / 12 + t_r**2 * (28 / 3) / 12
    assert (skewed.mean - skewed.low) ** 2 == pytest.approx(below)
    assert (skewed.mean, skewed.p_value) == (usual.mean, usual.p_value)


def test_accuracy_differences_keep_their_interval() -> None:
    """One dictionary: the interval of a causal trial; three that agree: still never of width 0."""
    random = np.random.default_rng(10)
    codes = random.integers(0, 12, 40)
    changes = random.choice([-1.0, 0.0, 0.0, 0.0, 1.0], (40, 2))
    mean, low, high = bounded_interval(changes, codes, alpha=0.05)
    one = pooled_mean(changes[None], codes, within=(low, high))
    np.testing.assert_allclose([one.mean, one.low, one.high], [mean, low, high], rtol=1e-12)
    unchanged = np.zeros((3, 40))
    _, low, high = bounded_interval(unchanged[0][:, None], codes, alpha=0.05)
    pooled = pooled_mean(unchanged, codes, within=(low[0], high[0]))
    assert (pooled.low, pooled.high) == (pytest.approx(low[0]), pytest.approx(high[0]))
    assert pooled_mean(unchanged, codes).high == 0


@pytest.mark.parametrize("statistic", [lambda x: x.mean(axis=-1), lambda x: np.log(np.square(x).mean(axis=-1))])
def test_jackknife_and_draws_agree_with_the_table(statistic: Callable[[Any], Any]) -> None:
    random = np.random.default_rng(8)
    y = 1 + random.normal(size=(3, 60)) + 0.3 * random.normal(size=(3, 1)) + random.normal(size=60)
    without = np.stack([statistic(np.delete(y, g, axis=1)) for g in range(60)], axis=1)
    by_jackknife = pooled_estimates(statistic(y), jackknife=without)
    drawn = random.integers(0, 60, (3000, 60))
    by_draws = pooled_estimates(statistic(y), draws=statistic(y[:, drawn]), df_draws=59)
    assert by_draws.standard_error == pytest.approx(by_jackknife.standard_error, rel=0.05)
    assert by_draws.high - by_draws.low == pytest.approx(by_jackknife.high - by_jackknife.low, rel=0.05)
    one = pooled_estimates(statistic(y)[:1], jackknife=without[:1])
    assert one.standard_error == pytest.approx(delete_group_jackknife(without[0]).standard_error)


def test_jackknife_of_a_mean_is_the_mean() -> None:
    without = (TABLE.sum(axis=1, keepdims=True) - TABLE) / 3
    expected, got = pooled_mean(TABLE), pooled_estimates(TABLE.mean(axis=1), jackknife=without)
    for name in ("mean", "low", "high", "standard_error", "df", "between_sd", "p_value"):
        assert getattr(got, name) == pytest.approx(getattr(expected, name)), name


@pytest.mark.parametrize("n_dictionaries", [2, 3, 5])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 5.0])
def test_intervals_hold_the_mean_whatever_the_ratio_of_variances(n_dictionaries: int, ratio: float) -> None:
    random = np.random.default_rng([9, n_dictionaries, int(10 * ratio)])
    n_worlds, n_clusters = 4000, 25
    prompts = random.normal(size=(n_clusters, n_worlds))
    noise = 0.5 * random.normal(size=(n_dictionaries, n_clusters, n_worlds))
    own = ratio / np.sqrt(n_clusters) * random.normal(size=(n_dictionaries, 1, n_worlds))
    pooled = pooled_mean(0.7 + own + prompts + noise)
    held = ((pooled.low <= 0.7) & (pooled.high >= 0.7)).mean()
    assert held >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / n_worlds)
    if ratio == 5:
        alone = pooled_mean((own + prompts + noise).mean(axis=0)[None])
        assert ((alone.low <= 0) & (alone.high >= 0)).mean() < 0.7
        assert held < 0.97


def test_the_same_direction_of_all_of_a_few_and_most_of_many() -> None:
    assert same_direction([1, 2, 3], 2)
    assert not same_direction([1, 2, -0.1], 1)
    assert not same_direction([1, 2, 0], 1)  # no effect is not the same direction
    assert not same_direction([1, 1, 1, -0.1], 0.7)
    assert same_direction([1, 1, 1, 1, -0.1], 0.7)
    assert not same_direction([1, 1, 1, -0.1, -0.1], 0.5)
    assert same_direction([-1] * 8 + [1] * 2, -0.6)
    assert not same_direction([-1] * 7 + [1] * 3, -0.4)
    assert not same_direction([1, -1], 0)
    assert not same_direction([0, 0], 0)
    assert not same_direction([np.nan, 1], np.nan)
    np.testing.assert_array_equal(same_direction([[1, 1], [1, -1]], [1, 0.1]), [True, False])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pooled_mean([1.0, 2.0]), r"\[dictionary, unit\(, ...\)\], got shape \(2,\)"),
        (lambda: pooled_mean([[1.0], [2.0]]), "at least two of them, got 1"),
        (lambda: pooled_mean(TABLE, alpha=1.0), "alpha must lie between 0 and 1, got 1.0"),
        (lambda: pooled_mean(TABLE, alpha=0.0), "alpha must lie between 0 and 1, got 0.0"),
        (lambda: pooled_mean(TABLE, codes=[0, 1]), "one label per unit"),
        (lambda: pooled_estimates([1.0, 2.0]), "either jackknife replicates or bootstrap draws"),
        (lambda: pooled_estimates([1.0, 2.0], jackknife=np.ones((3, 4))), r"got shapes \(2,\) and \(3, 4\)"),
        (lambda: pooled_estimates([1.0, 2.0], jackknife=np.ones((2, 1))), "at least two replicates"),
        (lambda: pooled_estimates([1.0, 2.0], draws=np.ones((2, 9)), df_draws=0), "must be positive, got 0"),
    ],
)
def test_what_cannot_be_pooled_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_intervals_alone_are_pooled_by_their_halves_and_the_spread() -> None:
    each, below, above = np.array([0.1, 0.2, 0.6]), np.array([0.02, 0.04, 0.03]), np.array([0.05, 0.05, 0.08])
    mean, low, high = pooled_intervals(each, each - below, each + above)
    spread = 4.302652730 * each.std(ddof=1) / np.sqrt(3)
    assert mean == pytest.approx(0.3)
    assert mean - low == pytest.approx(np.hypot(0.03, spread))
    assert high - mean == pytest.approx(np.hypot(0.06, spread))
    alone = pooled_intervals(each[:1], [0.0], [0.4])
    assert [float(x) for x in alone] == pytest.approx([0.1, 0.0, 0.4])
    with pytest.raises(InputError, match=r"three arrays \[dictionary"):
        pooled_intervals(each, each[:2], each)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("apart", [0.0, 1e-200])
def test_two_dictionaries_that_say_the_same_of_every_cluster_have_a_p_and_no_warning(apart: float) -> None:
    pooled = pooled_mean(np.array([[1.0] * 4, [1.0] * 4]) - np.array([[0.0], [apart]]))
    assert (pooled.low, pooled.mean, pooled.high) == pytest.approx((1, 1, 1))
    assert 0 < pooled.p_value < 1e-290


def test_two_dictionaries_and_two_clusters_are_enough() -> None:
    y = np.array([[1.0, 2.0], [4.0, 6.0]])
    mean, squared, _ = by_hand(y)
    pooled = pooled_mean(y)
    assert (pooled.mean, (pooled.high - pooled.mean) ** 2) == pytest.approx((mean, squared))
    _, low, high = pooled_intervals([0.1, 0.3], [0.0, 0.2], [0.2, 0.4])
    half = np.hypot(0.1, 12.706204736 * 0.1)
    assert (low, high) == pytest.approx((0.2 - half, 0.2 + half))


def test_intervals_alone_cover_at_least_what_the_whole_table_covers() -> None:
    """Forty prompts shared by three dictionaries; errors shared in part, dictionaries far apart or not."""
    random = np.random.default_rng(6)
    for spread in (0.0, 0.2):
        covered = 0
        for _ in range(400):
            table = spread * random.standard_normal((3, 1)) + random.standard_normal(40)
            table = table + random.standard_normal((3, 40))
            error = table.std(axis=1, ddof=1) / np.sqrt(40) * stats.t.ppf(0.975, 39)
            each = table.mean(axis=1)
            _, low, high = pooled_intervals(each, each - error, each + error)
            covered += bool(low <= 0 <= high)
        assert covered >= 0.94 * 400, spread


def test_how_many_dictionaries_must_agree() -> None:
    assert [dictionaries_needed(n) for n in (1, 2, 3, 4, 5, 6, 9, 10, 50)] == [1, 2, 3, 4, 4, 5, 8, 8, 40]
    assert agreed(["a", "a", "b"], "open") == "open"
    assert agreed(["a", "a", "a"], "open") == "a"
    assert agreed([*"aaaab"], "open") == "a"
    assert agreed([*"aaabb"], "open") == "open"
