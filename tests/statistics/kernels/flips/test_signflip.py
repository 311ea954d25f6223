"""Sign flips against slow enumeration, invariances, calibration, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.statistics.kernels import (
    flip_tail,
    max_t,
    saddlepoint_tail,
    sign_flip_test,
    sign_flips,
    unit_tables,
)
from rlgen_stats.toolkit.statistics.kernels.flips import signflip as signflip_module
from tests.oracles import slow

ALTERNATIVES = ("two-sided", "greater", "less")
QUICK = settings(max_examples=40, deadline=None, derandomize=True)
METHODS = ("auto", "saddlepoint", "monte-carlo")


def heavy(name: str, random: np.random.Generator) -> np.ndarray:
    d = {
        "normal": lambda: random.normal(size=(28, 40)),
        "t2": lambda: random.standard_t(2, size=(28, 40)),
        "cauchy": lambda: random.standard_cauchy((28, 40)),
        "lognormal": lambda: np.exp(2 * random.normal(size=(28, 40))) * random.choice([-1, 1], (28, 40)),
        "one dominates": lambda: np.vstack([random.normal(size=(27, 40)), 100 * random.choice([-1, 1], (1, 40))]),
    }[name]()
    d[:, :15] += 0.6 * np.abs(d[:, :15])
    return d


@pytest.mark.parametrize("alternative", ["two-sided", "greater"])
@pytest.mark.parametrize("values", ["normal", "ties"])
def test_exact_equals_enumeration(alternative: str, values: str) -> None:
    random = np.random.default_rng(1)
    d = random.normal(size=(11, 6)) if values == "normal" else random.integers(-2, 3, (11, 6)).astype(float)
    d[random.random(d.shape) < 0.2] = 0
    d[0] += 1
    np.testing.assert_allclose(
        sign_flip_test(d, alternative=alternative).p_value,
        [slow.sign_flip_p(column, alternative) for column in d.T],
        rtol=1e-12,  # type: ignore[arg-type]
    )


def test_less_is_greater_mirrored() -> None:
    d = np.random.default_rng(2).normal(0.4, size=(15, 4))
    less, greater = sign_flip_test(d, alternative="less"), sign_flip_test(-d, alternative="greater")
    np.testing.assert_array_equal(less.p_value, greater.p_value)
    np.testing.assert_allclose(less.statistic, stats.ttest_1samp(d, 0).statistic)


def test_lattice_equals_binomial_tail() -> None:
    d = np.array([1.0] * 22 + [-1.0] * 8)[:, None] * [0.25, 3.0]
    result = sign_flip_test(d)
    assert result.method.tolist() == ["lattice", "lattice"]
    np.testing.assert_allclose(result.p_value, stats.binomtest(22, 30).pvalue, rtol=1e-12)


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


def test_features_do_not_depend_on_the_blocks_they_are_packed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    d = np.where(rng.random((200, 70)) < rng.random(70), rng.normal(0.1, 1, (200, 70)), 0.0)
    whole = sign_flip_test(d)
    monkeypatch.setattr(unit_tables, "BLOCK_UNITS", 1)
    monkeypatch.setattr(signflip_module, "feature_blocks", lambda n, f: (slice(i, i + 1) for i in range(f)))
    single = sign_flip_test(d)
    np.testing.assert_array_equal(whole.p_value, single.p_value)
    np.testing.assert_array_equal(whole.statistic, single.statistic)
    np.testing.assert_array_equal(whole.method, single.method)


def test_monte_carlo_error_is_that_of_independent_flips() -> None:
    """The group's patterns are dependent, but pairwise independent: the variance of p over seeds is binomial."""
    d = np.random.default_rng(8).normal(0.25, 1, 30)
    truth = float(sign_flip_test(d, method="saddlepoint").p_value)
    result = np.array([sign_flip_test(d, method="monte-carlo", n_resamples=255, seed=s).p_value for s in range(600)])
    assert abs(result.mean() - (truth * 255 + 1) / 256) < 4 * np.sqrt(truth / 256 / 600)
    assert 0.8 < result.var() / (truth * (1 - truth) / 256) < 1.25


def test_a_random_group_keeps_the_level_with_few_flips() -> None:
    """With 19 flips beside the identity the test is exact: a rejection at 1/32 happens with probability 1/32."""
    random = np.random.default_rng(9)
    d = random.standard_t(2, size=(25, 4000))
    p = np.concatenate(
        [
            sign_flip_test(d[:, i : i + 40], method="monte-carlo", n_resamples=31, seed=i).p_value
            for i in range(0, 4000, 40)
        ]
    )
    for level in (1 / 32, 2 / 32, 8 / 32):
        assert abs((p <= level + 1e-12).mean() - level) < 4 * np.sqrt(level * (1 - level) / 4000)


@QUICK
@given(
    hnp.arrays(float, (7, 2), elements=st.integers(-4, 4).map(lambda x: x / 10) | st.floats(-5, 5)),
    st.sampled_from(ALTERNATIVES),
)
def test_exact_equals_every_flip(d: np.ndarray, alternative: str) -> None:
    """Integers over ten bring ties that differ in the last bit; the slack must count them."""
    d = np.where(np.abs(d) < 1e-6, 0.0, d)
    result = sign_flip_test(d, alternative=alternative)  # type: ignore[arg-type]
    for k in range(2):
        if d[:, k].any():
            assert result.p_value[k] == pytest.approx(slow.sign_flip_p(d[:, k], alternative), rel=1e-12)
        else:
            assert np.isnan(result.p_value[k])
            assert result.flag[k] == "untestable: no nonzero difference"


@pytest.mark.parametrize("name", ["normal", "t2", "cauchy", "lognormal", "one dominates"])
def test_saddlepoint_is_right_where_a_few_differences_carry_the_sum(name: str) -> None:
    d = heavy(name, np.random.default_rng(20))
    exact = np.array([slow.half_sums_p(column) for column in d.T])
    result = sign_flip_test(d)
    assert set(result.method) == {"saddlepoint"}
    np.testing.assert_allclose(result.p_value, exact, rtol=0.05, atol=0.002)
    plain = np.minimum(1, 2 * saddlepoint_tail(np.abs(d), np.abs(d.sum(axis=0))))
    off = np.abs(plain - exact).max()
    assert off < 0.01 if name == "normal" else off > 0.05  # without conditioning the same formula is far off


def test_flip_tail_takes_sums_of_either_sign() -> None:
    d = heavy("cauchy", np.random.default_rng(21))[:, 20:]
    total = d.sum(axis=0)
    both = flip_tail(np.abs(d), total) + flip_tail(np.abs(d), -total)
    np.testing.assert_allclose(both, 1.0, atol=1e-6)


def test_lattice_step_is_found_though_no_difference_equals_it() -> None:
    random = np.random.default_rng(22)
    d = random.choice([2, 3, 5], size=(26, 30)) * random.choice([-1, 1], size=(26, 30), p=[0.3, 0.7]) / 20
    d[:, 15:] = d[:, 15:].astype(np.float32)  # as read from a store
    result = sign_flip_test(d)
    assert set(result.method) == {"lattice"}
    exact = [slow.half_sums_p(np.round(column * 20)) for column in d.T]
    np.testing.assert_allclose(result.p_value, exact, rtol=1e-12)
    for alternative, sign in (("greater", 1), ("less", -1)):
        one_sided = sign_flip_test(np.sign(d), alternative=alternative).p_value  # type: ignore[arg-type]
        expected = [stats.binomtest(int((sign * c > 0).sum()), 26, alternative="greater").pvalue for c in d.T]
        np.testing.assert_allclose(one_sided, expected, rtol=1e-12)


@pytest.mark.parametrize("n", [5, 30, 2000])
@pytest.mark.parametrize("method", METHODS)
def test_p_is_never_zero(n: int, method: str) -> None:
    random = np.random.default_rng(23)
    same_sign = np.column_stack([random.random((n, 2)) + 0.1, np.ones(n)])
    for alternative in ALTERNATIVES:
        for sign in (1, -1):
            p = sign_flip_test(sign * same_sign, alternative=alternative, method=method, n_resamples=50).p_value  # type: ignore[arg-type]
            assert (p > 0).all()
            assert (p <= 1).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_feature_does_not_feel_the_others_bit_for_bit(method: str) -> None:
    """Other columns, their order, zero columns, NaN columns, a single column: the same bits."""
    random = np.random.default_rng(24)
    d = random.standard_t(2, size=(57, 330)) * (random.random((57, 330)) < random.random(330))
    d[:, :40] = np.round(d[:, :40])

    def run(x: np.ndarray) -> np.ndarray:
        result = sign_flip_test(x, method=method, n_resamples=199, seed=4)  # type: ignore[arg-type]
        return np.stack([result.p_value, result.statistic, result.n_nonzero])

    whole = run(d)
    order = random.permutation(330)
    np.testing.assert_array_equal(run(d[:, order]), whole[:, order])
    np.testing.assert_array_equal(np.concatenate([run(d[:, :7]), run(d[:, 7:])], axis=1), whole)
    np.testing.assert_array_equal(run(np.asfortranarray(d)), whole)
    np.testing.assert_array_equal(np.concatenate([run(d[:, [k]]) for k in range(60)], axis=1), whole[:, :60])
    padded = run(np.column_stack([np.zeros(57), d, np.full(57, np.nan)]))
    np.testing.assert_array_equal(padded[:, 1:-1], whole)
    assert np.isnan(padded[:2, [0, -1]]).all()


@pytest.mark.parametrize("method", ["auto", "saddlepoint"])
def test_zeros_unit_order_and_scale_do_not_matter(method: str) -> None:
    random = np.random.default_rng(25)
    d = random.standard_t(2, size=(40, 50)) * (random.random((40, 50)) < 0.7) + 0.1
    p = sign_flip_test(d, method=method).p_value  # type: ignore[arg-type]
    for other in (d[random.permutation(40)], d * 1e-180, d * 3e150, -d, np.vstack([d, np.zeros((30, 50))])):
        np.testing.assert_allclose(sign_flip_test(other, method=method).p_value, p, rtol=1e-7)  # type: ignore[arg-type]


def test_monte_carlo_counts_the_flips_of_the_table() -> None:
    d = np.random.default_rng(26).normal(0.3, size=(20, 3))
    patterns = slow.flip_group(sign_flips(20, 0, 11, seed=7))  # 2^11 - 1 >= 1,500
    expected = (np.abs(patterns @ d) >= np.abs(d.sum(axis=0)) - 1e-9).mean(axis=0)
    np.testing.assert_array_equal(sign_flip_test(d, method="monte-carlo", n_resamples=1500, seed=7).p_value, expected)


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_saddlepoint_is_calibrated_under_a_sparse_heavy_tailed_null(alternative: str) -> None:
    random = np.random.default_rng(27)
    d = random.standard_t(1.5, size=(120, 3000)) * (random.random((120, 3000)) < 0.4)
    result = sign_flip_test(d, alternative=alternative)  # type: ignore[arg-type]
    assert (result.method == "saddlepoint").mean() > 0.99
    assert stats.kstest(result.p_value, "uniform").pvalue > 0.01
    for level in (0.01, 0.05):
        assert abs((result.p_value <= level).mean() - level) < 3 * np.sqrt(level * (1 - level) / 3000)


def test_missing_features_are_flagged_and_partly_missing_ones_refused() -> None:
    result = sign_flip_test(np.column_stack([np.arange(1.0, 9), np.full(8, np.nan)]))
    assert result.flag.tolist() == ["", "untestable: no value"]
    assert result.n_nonzero.tolist() == [8, 0]
    assert np.isnan(result.p_max_t[1])
    with pytest.raises(InputError, match="set the whole feature to NaN"):
        sign_flip_test([[1.0, np.nan], [1.0, 1.0]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alternative": "both"}, "two-sided, greater or less, got 'both'"),
        ({"method": "permutation"}, "saddlepoint or monte-carlo, got 'permutation'"),
        ({"method": "monte-carlo", "n_resamples": 0}, "n_resamples must be at least 1, got 0"),
        ({"method": "monte-carlo", "seed": -1}, "a seed is a whole number"),
        ({"clusters": [0, 1]}, r"one label per unit \(30\), got shape \(2,\)"),
    ],
)
def test_options_are_explained(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sign_flip_test(np.random.default_rng(0).normal(size=30), **options)
    with pytest.raises(InputError, match="at least one unit, got shape"):
        sign_flip_test(np.empty((0, 3)))


@pytest.mark.parametrize("joint", [False, True])
def test_cluster_sums_that_cancel_are_zero(joint: bool) -> None:
    """.1 + .2 - .3 is 5.6e-17 in doubles: 40 such clusters, always of one sign, would be p = 2e-12."""
    d = np.column_stack([np.tile([0.1, 0.2, -0.3], 40), np.tile([0.1, 0.2, 0.3], 40)])
    clusters = np.repeat(np.arange(40), 3)
    if joint:
        result = max_t(d, n_resamples=99, clusters=clusters)
        assert np.isnan(result.p_single_step[0])
        np.testing.assert_allclose(result.p_single_step[1], 1 / 128)
        return
    flips = sign_flip_test(d, clusters=clusters)
    assert flips.n_nonzero.tolist() == [0, 40]
    assert flips.flag.tolist() == ["untestable: no nonzero difference", ""]
    np.testing.assert_allclose(flips.p_value, [np.nan, 2.0**-39])


def test_rounded_tenths_stay_on_their_lattice() -> None:
    """Tenths summed within clusters equal the same whole numbers summed, zeros and all."""
    rng = np.random.default_rng(0)
    tenths, clusters = rng.integers(-3, 4, (120, 8)), np.repeat(np.arange(40), 3)
    whole, rounded = (sign_flip_test(x, clusters=clusters) for x in (tenths, tenths / 10))
    sums = (tenths / 10).reshape(40, 3, 8).sum(axis=1)
    assert ((sums != 0) & (np.abs(sums) < 1e-12)).any(), "no sum cancels up to rounding: the test shows nothing"
    for result in (rounded, sign_flip_test(sums)):
        assert set(result.method) == {"lattice"}
        assert np.array_equal(result.n_nonzero, whole.n_nonzero)
        np.testing.assert_allclose(result.p_value, whole.p_value, rtol=1e-9)
