"""Sign flips against slow enumeration, invariances, calibration, refusals."""

import itertools

import numpy as np
import pytest
from scipy import stats

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.statistics.kernels import bootstrap_t, max_t, sign_flip_test, sign_flips
from tests.oracles import slow


def enumerate_p(d: np.ndarray, alternative: str) -> np.ndarray:
    """Every flip, one feature at a time."""
    out = []
    for column in d.T:
        column = column[column != 0]
        sums = [float(np.dot(signs, column)) for signs in itertools.product((1, -1), repeat=len(column))]
        s = float(column.sum())
        if alternative == "two-sided":
            sums, s = [abs(t) for t in sums], abs(s)
        out.append(np.mean([t >= s - 1e-9 for t in sums]))
    return np.array(out)


@pytest.mark.parametrize("alternative", ["two-sided", "greater"])
@pytest.mark.parametrize("values", ["normal", "ties"])
def test_exact_equals_enumeration(alternative: str, values: str) -> None:
    random = np.random.default_rng(1)
    d = random.normal(size=(11, 6)) if values == "normal" else random.integers(-2, 3, (11, 6)).astype(float)
    d[random.random(d.shape) < 0.2] = 0
    d[0] += 1
    np.testing.assert_allclose(
        sign_flip_test(d, alternative=alternative).p_value,
        enumerate_p(d, alternative),
        rtol=1e-12,  # type: ignore[arg-type]
    )


def test_less_is_greater_mirrored() -> None:
    d = np.random.default_rng(2).normal(0.4, size=(15, 4))
    less, greater = sign_flip_test(d, alternative="less"), sign_flip_test(-d, alternative="greater")
    np.testing.assert_array_equal(less.p_value, greater.p_value)
    np.testing.assert_allclose(less.statistic, stats.ttest_1samp(d, 0).statistic)


def test_lattice_equals_binomial_tail() -> None:
    d = np.array([1.0] * 22 + [-1.0] * 8)[:, None] * [0.25, 3.0]
    found = sign_flip_test(d)
    assert found.method.tolist() == ["lattice", "lattice"]
    np.testing.assert_allclose(found.p_value, stats.binomtest(22, 30).pvalue, rtol=1e-12)


def test_saddlepoint_is_close_to_exact_down_to_the_tail() -> None:
    random = np.random.default_rng(3)
    d = random.gamma(1.0, size=(18, 40)) * random.choice([-1, 1], (18, 40), p=[0.25, 0.75])
    exact, approximate = sign_flip_test(d).p_value, sign_flip_test(d, method="saddlepoint").p_value
    assert exact.min() < 1e-3
    np.testing.assert_allclose(approximate, exact, rtol=0.12, atol=2e-4)


def test_saddlepoint_guards() -> None:
    ones = np.arange(1.0, 31.0)[:, None]
    assert sign_flip_test(ones, method="saddlepoint").p_value[0] == 2.0**-29
    balanced = np.concatenate([ones, -ones])
    np.testing.assert_allclose(sign_flip_test(balanced, method="saddlepoint").p_value, 1.0)


def test_calibrated_under_a_zero_inflated_symmetric_null() -> None:
    random = np.random.default_rng(4)
    d = random.standard_t(3, size=(60, 4000)) * (random.random((60, 4000)) < 0.6)
    p = sign_flip_test(d).p_value
    assert stats.kstest(p, "uniform").pvalue > 0.01
    for level in (0.01, 0.05):
        assert abs((p <= level).mean() - level) < 3 * np.sqrt(level * (1 - level) / len(p)) + 1e-3


def test_monte_carlo_is_never_zero_and_shrinks_to_exact() -> None:
    d = np.abs(np.random.default_rng(5).normal(size=(18, 5))) + 0.1
    few = sign_flip_test(d, method="monte-carlo", n_resamples=99).p_value
    assert (few == 1 / 128).all()  # 99 is rounded up to 2^7 - 1
    noisy = np.random.default_rng(6).normal(0.2, size=(18, 200))
    exact = sign_flip_test(noisy).p_value
    errors = [
        np.abs(sign_flip_test(noisy, method="monte-carlo", n_resamples=n).p_value - exact).mean() for n in (100, 10000)
    ]
    assert errors[1] < errors[0] / 4


def test_clusters_flip_together_and_few_are_refused() -> None:
    random = np.random.default_rng(7)
    clusters = np.repeat(np.arange(10), 4)
    d = np.repeat(random.normal(size=(10, 3)), 4, axis=0)
    np.testing.assert_allclose(sign_flip_test(d, clusters=clusters).p_value, sign_flip_test(d[::4]).p_value, rtol=1e-12)
    assert (sign_flip_test(d, clusters=clusters).p_value > sign_flip_test(d).p_value).mean() > 0.5
    with pytest.raises(RefusedError, match="at least 6, got 5"):
        sign_flip_test(d, clusters=clusters % 5)


def test_bad_input_is_explained() -> None:
    with pytest.raises(InputError, match="must be finite, got 1 NaN"):
        sign_flip_test([1.0, np.nan])
    with pytest.raises(InputError, match="at most 20 nonzero differences or a lattice, got 40"):
        sign_flip_test(np.random.default_rng(0).normal(size=(40, 1)), method="exact")


def test_flips_are_a_function_of_seed_flip_and_prompt() -> None:
    table = sign_flips(50, 0, 40, seed=9)
    assert set(np.unique(table)) == {-1.0, 1.0}
    np.testing.assert_array_equal(table[17:23, :31], sign_flips(31, 17, 23, seed=9))
    assert not np.array_equal(table, sign_flips(50, 0, 40, seed=10))
    assert abs(table.mean()) < 0.1


def test_max_t_does_not_depend_on_order_or_blocks_or_density() -> None:
    random = np.random.default_rng(8)
    d = random.normal(size=(40, 2300)) * (random.random((40, 2300)) < 0.1)
    d[:, :1500] += random.normal(size=(40, 1500))
    whole = max_t(d, n_resamples=200, seed=3)
    order = random.permutation(d.shape[1])
    shuffled = max_t(d[:, order], n_resamples=200, seed=3)
    for name in ("p_single_step", "p_step_down", "p_raw"):
        np.testing.assert_allclose(getattr(shuffled, name), getattr(whole, name)[order], rtol=1e-12)
    blocks = [max_t(d[:, part], n_resamples=200, seed=3).maxima for part in (slice(0, 700), slice(700, None))]
    np.testing.assert_allclose(np.maximum(*blocks), whole.maxima, rtol=1e-12)
    flips = slow.flip_group(sign_flips(40, 0, 8, seed=3))
    alive = (d != 0).any(axis=0)
    assert np.count_nonzero(d[:, 1500:]) < 0.15 * d[:, 1500:].size
    direct = np.abs(flips @ d[:, alive]) / np.sqrt((d[:, alive] ** 2).sum(axis=0))
    np.testing.assert_allclose(whole.maxima, direct.max(axis=1), rtol=1e-12)
    np.testing.assert_array_equal(whole.p_raw[alive], (direct >= whole.statistic[alive] - 1e-9).mean(axis=0))


def test_max_t_controls_the_family_where_raw_p_does_not() -> None:
    random = np.random.default_rng(9)
    wrong_joint = wrong_raw = 0
    for trial in range(200):
        shared = random.normal(size=(20, 1))
        d = 0.7 * shared + random.normal(size=(20, 30))
        found = max_t(d, n_resamples=99, seed=trial)
        wrong_joint += bool((found.p_step_down <= 0.05).any())
        wrong_raw += bool((found.p_raw <= 0.05).any())
    assert wrong_joint / 200 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)
    assert wrong_raw / 200 > 0.2


def test_step_down_is_at_least_as_powerful_and_monotone() -> None:
    d = np.random.default_rng(10).normal(size=(30, 20)) + np.linspace(0, 1.2, 20)
    found = max_t(d, n_resamples=499)
    assert (found.p_step_down <= found.p_single_step + 1e-12).all()
    assert (found.p_step_down < found.p_single_step - 1e-12).any()
    order = np.argsort(-found.statistic)
    assert (np.diff(found.p_step_down[order]) >= 0).all()


@pytest.mark.parametrize("n", [15, 60])
def test_bootstrap_t_covers_a_skewed_mean(n: int) -> None:
    x = np.random.default_rng(11).exponential(size=(n, 1500))
    found = bootstrap_t(x, n_resamples=400)
    covered = ((found.low <= 1) & (found.high >= 1)).mean()
    assert 0.91 < covered < 0.975
    normal = np.abs(x.mean(axis=0) - 1) <= stats.t.ppf(0.975, n - 1) * x.std(axis=0, ddof=1) / np.sqrt(n)
    assert covered > normal.mean()


def test_bootstrap_t_equals_a_slow_one_and_refuses_sparse_features() -> None:
    x = np.random.default_rng(12).gamma(2.0, size=25)
    found = bootstrap_t(x, n_resamples=300, seed=5)
    draws = []
    for draw in range(300):
        generator = np.random.Generator(np.random.Philox(key=np.array([5, draw], dtype=np.uint64)))
        sample = x[generator.integers(0, 25, 25)]
        draws.append((sample.mean() - x.mean()) / (sample.std(ddof=1) / 5))
    error = x.std(ddof=1) / 5
    np.testing.assert_allclose(found.low, x.mean() - error * np.quantile(draws, 0.975, method="median_unbiased"))
    np.testing.assert_allclose(found.high, x.mean() - error * np.quantile(draws, 0.025, method="median_unbiased"))
    sparse = np.zeros(50)
    sparse[:9] = 1.0
    assert np.isnan(bootstrap_t(sparse).low)
