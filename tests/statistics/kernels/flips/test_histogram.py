"""Histogram flips: every swap, one feature at a time, calibration, refusals."""

import numpy as np
import pytest

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels import (
    histogram_flip_test,
)
from rlgen_stats.toolkit.statistics.kernels.flips import histogram
from tests.oracles import slow


def test_histogram_distances_and_calibration() -> None:
    a, b = np.array([[4.0, 0, 0], [0, 4, 0]]), np.array([[0.0, 0, 4], [0, 4, 0]])
    assert histogram_flip_test(a, b, statistic="wasserstein").statistic == pytest.approx(1.0)
    assert histogram_flip_test(a, b, statistic="ks").statistic == pytest.approx(0.5)
    random = np.random.default_rng(3)
    p = [
        histogram_flip_test(
            random.multinomial(20, [0.2] * 5, 25), random.multinomial(20, [0.2] * 5, 25), statistic=s, n_resamples=99
        ).p_value
        for s in ("ks", "wasserstein") * 150
    ]
    assert 0.02 < np.mean(np.array(p) <= 0.05) < 0.09
    assert min(p) >= 1 / 128
    shifted = random.multinomial(20, [0.1, 0.1, 0.2, 0.3, 0.3], 25)
    result = histogram_flip_test(random.multinomial(20, [0.2] * 5, 25), shifted, statistic="wasserstein")
    assert result.p_value < 0.001
    with pytest.raises(InputError, match="unit's histogram is empty"):
        histogram_flip_test(0 * a, b, statistic="ks")


@pytest.mark.parametrize("statistic", ["ks", "wasserstein"])
def test_histograms_equal_every_swap(statistic: str) -> None:
    random = np.random.default_rng(62)
    a, b = random.integers(1, 9, (2, 7, 4)).astype(float)
    distance, p = slow.histogram_p(a, b, statistic)
    result = histogram_flip_test(a, b, statistic=statistic)
    assert result.statistic == pytest.approx(distance, rel=1e-12)
    assert result.p_value == pytest.approx(p, rel=1e-12)
    assert histogram_flip_test(3 * b, a, statistic=statistic) == histogram_flip_test(a, b, statistic=statistic)
    assert histogram_flip_test(a, a, statistic=statistic).p_value == 1
    many = histogram_flip_test(np.repeat(a, 30, axis=0), np.repeat(b, 30, axis=0), statistic=statistic, n_resamples=99)
    assert many.p_value >= 1 / 128


def test_histograms_are_checked() -> None:
    a = np.ones((3, 4))
    for b, message in ((np.ones((3, 5)), "of one shape"), (-a, "negative or missing"), (a * np.nan, "missing")):
        with pytest.raises(InputError, match=message):
            histogram_flip_test(a, b, statistic="ks")
    with pytest.raises(InputError, match="ks or wasserstein, got 'mean'"):
        histogram_flip_test(a, a, statistic="mean")


@pytest.mark.parametrize("statistic", ["ks", "wasserstein"])
def test_features_of_histograms_are_tested_one_by_one(statistic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(63)
    a, b = random.integers(0, 5, (2, 9, 20, 6)).astype(np.uint32)
    a[:, :, 0] += 1
    b[:, :, 0] += 1
    b[:, 4, 5] += 9
    a[3, 7] = b[5, 8] = 0  # here a unit's histogram is empty
    result = histogram_flip_test(a, b, statistic=statistic)
    for k in set(range(20)) - {7, 8}:
        alone = histogram_flip_test(a[:, k], b[:, k], statistic=statistic)
        assert (alone.p_value, alone.statistic) == (result.p_value[k], pytest.approx(result.statistic[k], rel=1e-12))
    assert np.isnan([result.p_value[7:9], result.statistic[7:9]]).all()
    assert result.p_value[4] == np.nanmin(result.p_value)
    monkeypatch.setattr(histogram, "BLOCK_SUMS", 1)
    np.testing.assert_array_equal(histogram_flip_test(a, b, statistic=statistic).p_value, result.p_value)
