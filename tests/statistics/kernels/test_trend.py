"""Trends: scipy unit by unit, planted rises, autocorrelated nulls beside the naive test, blocks, refusals."""

import numpy as np
import pytest
from scipy import stats

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.statistics.kernels import unit_tables
from rlgen_stats.toolkit.statistics.kernels.flips.signflip import sign_flip_test
from rlgen_stats.toolkit.statistics.kernels.trend import trend_contrast, trend_test


def test_contrasts_equal_scipy_unit_by_unit() -> None:
    x = np.random.default_rng(1).normal(size=(12, 7, 3))
    kendall, page = (trend_contrast(x, kind=kind) for kind in ("kendall", "page"))
    for i in range(12):
        for k in range(3):
            assert kendall[i, k] == pytest.approx(stats.kendalltau(np.arange(7), x[i, :, k]).statistic)
            assert page[i, k] == pytest.approx(stats.spearmanr(np.arange(7), x[i, :, k]).statistic)
    for k in range(3):  # Page's L = sum_c c R_c = n (C (C + 1)^2 / 4 + C (C^2 - 1) / 12 * mean rho)
        mean_rho = (stats.page_trend_test(x[:, :, k]).statistic / 12 - 7 * 64 / 4) / (7 * 48 / 12)
        assert page[:, k].mean() == pytest.approx(mean_rho)


def test_ties_count_nothing_and_scale_is_by_unit() -> None:
    x = np.array([[1.0, 1, 2, 3], [0.1 + 0.2, 0.3, 0.3, 0.3], [3, 2, 1, 0]])
    assert trend_contrast(x, kind="kendall") == pytest.approx([5 / 6, 0, -1])
    np.testing.assert_allclose(trend_contrast(x * [[1e-8], [1], [1e8]], kind="page"), trend_contrast(x, kind="page"))
    x[0, 2] = np.nan
    assert np.isnan(trend_contrast(x, kind="page")).tolist() == [True, False, False]


@pytest.mark.parametrize("kind", ["kendall", "page"])
def test_it_is_the_sign_flip_test_of_contrasts_and_finds_planted_rises(kind: str) -> None:
    random = np.random.default_rng(2)
    x = random.normal(size=(18, 6, 12))
    x[:, :, 4] += 0.6 * np.arange(6)
    x[:, :, 7] = np.nan
    result = trend_test(x, kind=kind)
    contrast = trend_contrast(x, kind=kind)
    kept = np.arange(12) != 7
    np.testing.assert_allclose(result.p_value[kept], sign_flip_test(contrast[:, kept]).p_value, rtol=1e-9)
    np.testing.assert_allclose(result.tau[kept], contrast[:, kept].mean(axis=0), rtol=1e-12)
    assert np.isnan([result.tau[7], result.p_value[7]]).all()
    assert result.p_value[4] == np.nanmin(result.p_value) < 0.001
    falling = trend_test(-x, kind=kind, alternative="less")
    np.testing.assert_array_equal(falling.p_value, trend_test(x, kind=kind, alternative="greater").p_value)
    assert (falling.tau[4], falling.n_nonzero[4]) == (-result.tau[4], result.n_nonzero[4])


def test_autocorrelated_checkpoints_do_not_make_trends() -> None:
    """Every prompt wanders on its own (random walk over checkpoints): no common trend. Kendall's test on the mean over
    prompts takes its 12 checkpoints for independent and finds one half of the time."""
    random = np.random.default_rng(3)
    x = np.cumsum(random.normal(size=(30, 12, 600)), axis=1)
    p = trend_test(x).p_value
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / 600))
    mean = x.mean(axis=0)
    naive = np.mean([stats.kendalltau(np.arange(12), mean[:, k]).pvalue <= 0.05 for k in range(600)])
    assert naive > 0.3


def test_neither_blocks_nor_order_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(4).normal(size=(30, 5, 300))
    whole = trend_test(x)
    monkeypatch.setattr(unit_tables, "BLOCK_UNITS", 30 * 5 * 64)
    for name in ("tau", "p_value", "n_nonzero"):
        np.testing.assert_array_equal(getattr(trend_test(x), name), getattr(whole, name))
        np.testing.assert_array_equal(getattr(trend_test(x[:, :, ::-1]), name)[::-1], getattr(whole, name))
    alone = trend_test(x[:, :, 17])
    assert (alone.tau, alone.p_value) == (whole.tau[17], whole.p_value[17])


def test_clusters_flip_as_wholes() -> None:
    x = np.random.default_rng(5).normal(size=(24, 4, 3)) + np.arange(4)[:, None] * 0.3
    clusters = np.repeat(np.arange(8), 3)
    result = trend_test(x, clusters=clusters)
    sums = trend_contrast(x, kind="kendall").reshape(8, 3, 3).sum(axis=1)
    np.testing.assert_allclose(result.p_value, sign_flip_test(sums).p_value, rtol=1e-9)
    with pytest.raises(RefusedError, match="at least 6, got 3"):
        trend_test(x, clusters=np.repeat(np.arange(3), 8))


def test_refusals() -> None:
    x = np.zeros((10, 4, 2))
    with pytest.raises(InputError, match="at least two checkpoints"):
        trend_test(x[:, :1])
    with pytest.raises(InputError, match="kendall or page, got 'linear'"):
        trend_contrast(x, kind="linear")
    x[3, 1, 0] = np.nan
    with pytest.raises(InputError, match="got 1 unit and feature pairs with missing ones"):
        trend_test(x)
