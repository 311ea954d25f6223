"""The oracle values of the method document, to nine digits."""

from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from rlgen_stats.toolkit.statistics.kernels import (
    adjust,
    cluster_se,
    max_t,
    mcnemar,
    moderated_t,
    nogueira,
    rbo,
    set_overlap_pvalue,
    sign_flip_test,
    storey,
    tost_paired,
)

X8 = np.array([1.1, -0.4, 2.3, 0.7, -1.2, 3.1, 0.2, 1.9])
Z = np.column_stack([X8, [0.3, 0.5, -0.1, 0.9, 0.4, 0.8, 0.6, -0.2], [-0.2, 0.1, 0.4, 0.2, -0.5, 0.3, -0.1, 0.6]])
P = np.concatenate([np.arange(1, 41) ** 2 / 1700, np.linspace(0.05, 0.99, 60)])


def close(actual: object, expected: object) -> None:
    np.testing.assert_allclose(np.asarray(actual, dtype=float), expected, rtol=1e-9)


def test_o1_sign_flip_exact() -> None:
    result = sign_flip_test(X8)
    close(result.p_value, 28 / 256)
    exact = [Fraction(x).limit_denominator(10) for x in X8]
    mean = sum(exact) / 8
    variance = sum((x - mean) ** 2 for x in exact) / 7
    close(result.statistic, float(mean) / float(variance / 8) ** 0.5)
    close(result.statistic, 1.8955269054)
    assert result.method == "exact"


def test_o2_joint_max_t_exact() -> None:
    result = max_t(Z)
    assert result.exact
    close(result.p_single_step, [0.25, 0.0859375, 0.796875])
    close(result.p_step_down, [0.1484375, 0.0859375, 0.5])
    close(result.p_raw, [0.109375, 0.0390625, 0.5])
    close(sign_flip_test(Z).p_max_t, result.p_single_step)


def test_o3_an_all_zero_column_changes_nothing_else() -> None:
    with_zero = np.column_stack([Z, np.zeros(8)])
    for method in ("auto", "saddlepoint", "monte-carlo"):
        before, after = sign_flip_test(Z, method=method), sign_flip_test(with_zero, method=method)  # type: ignore[arg-type]
        assert np.array_equal(after.p_value[:3], before.p_value)
        assert np.isnan(after.p_value[3])
        assert np.isnan(after.statistic[3])
        assert after.flag.tolist() == ["", "", "", "untestable: no nonzero difference"]
    joint, joint_after = max_t(Z), max_t(with_zero)
    for name in ("p_single_step", "p_step_down", "p_raw"):
        assert np.array_equal(getattr(joint_after, name)[:3], getattr(joint, name))
        assert np.isnan(getattr(joint_after, name)[3])


@pytest.mark.parametrize(
    ("method", "index", "expected"),
    [
        ("bh", [0, 4, 9, 19, 39], [0.0588235294118, 0.294117647059, 0.534759358289, 0.730868002054, 0.971343700856]),
        ("by", [0], [0.305139853979]),
        ("holm", [0], [0.0588235294118]),
        ("hommel", [4], [0.98568970013]),
        ("bky", [0, 4], [0.061764705882, 0.308823529412]),
    ],
)
def test_o4_corrections(method: str, index: list[int], expected: list[float]) -> None:
    close(adjust(P, method=method)[index], expected)


@pytest.mark.parametrize("method", ["bonferroni", "holm", "hommel", "bh", "by", "bky", "storey"])
def test_o4_a_table_is_one_family_and_is_corrected(method: str) -> None:
    table = P.reshape(20, 5)
    result = adjust(table, method=method)
    assert np.array_equal(result.ravel(), adjust(P, method=method))
    assert not np.allclose(result, table)
    holed = np.concatenate([P, [np.nan, np.nan]])
    assert np.array_equal(adjust(holed, method=method)[:-2], adjust(P, method=method))
    assert np.isnan(adjust(holed, method=method)[-2:]).all()


def test_o5_storey() -> None:
    result = storey(P)
    close(result.pi0, 0.84)
    close(result.q_value[:5], 0.0494117647059 * np.arange(1, 6))
    close(result.q_value[59], 0.673176123803)


def test_o6_moderated_t() -> None:
    g, i = np.arange(1, 13)[:, None], np.arange(1, 9)[None]
    result = moderated_t((np.sin(1.7 * g + 2.3 * i) * (1 + 0.3 * g) + 0.15 * g * np.cos(i)).T)
    close(result.prior_variance, 4.52548651595)
    close(result.prior_dof, 5.99213639256)
    close(result.statistic[:3], [-0.0233982014429, 0.0969381067849, 0.0510088079844])


def test_o7_cluster_standard_errors() -> None:
    clusters = np.repeat(np.arange(1, 7), [3, 1, 4, 2, 5, 3])
    y = np.sin(np.arange(1, 19)) + 0.5 * clusters - 1
    close(cluster_se(y, clusters).mean, 0.885299968002)
    close(cluster_se(y, clusters, kind="CR0").standard_error, 0.271412140704)
    close(cluster_se(y, clusters, kind="CR1").standard_error, 0.297317103688)


def test_o8_mcnemar() -> None:
    close(mcnemar(33, 59).p_value, 0.00878093080698)
    close(mcnemar(33, 59).mid_p, 0.00669501813421725)


def test_o9_equivalence() -> None:
    close(tost_paired(X8, low=-2.5, high=2.5), 0.00958539487154)


def test_o10_sets_and_rankings() -> None:
    np.testing.assert_allclose(stats.hypergeom.mean(32768, 50, 50), 0.0762939453125)
    close(set_overlap_pvalue(3, 32768, 50, 50), 6.22881942208e-5)
    rows = [[int(c) for c in row] for row in ("11100000", "11010000", "10110000", "11100000")]
    close(nogueira(rows), 5 / 9)
    result = rbo("abcde", "bacef", 0.9)
    close(result.extrapolated, 0.750555)
    np.testing.assert_allclose([result.truncated, result.minimum], [0.278163, 0.488146], rtol=1e-5)


def test_rbo_minimum_is_reached_by_rankings_that_never_agree_again() -> None:
    """The published bound keeps what is shared so far; the truncated sum (0.278) lies below every possible overlap."""
    first = [*"abcde", *(f"x{i}" for i in range(2000))]
    second = [*"bacef", *(f"y{i}" for i in range(2000))]
    depth = np.arange(1, len(first) + 1)
    shared = np.array([len(set(first[:d]) & set(second[:d])) for d in depth])
    endless = 0.1 * (0.9 ** (depth - 1) * shared / depth).sum()
    np.testing.assert_allclose(rbo("abcde", "bacef", 0.9).minimum, endless, rtol=1e-9)
