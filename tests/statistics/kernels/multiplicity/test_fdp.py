"""Bounds of false discoveries: the definition in loops, planted truth, coverage, blocks, refusals."""

import numpy as np
import pytest

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels import max_t, sign_flips
from rlgen_stats.toolkit.statistics.kernels.multiplicity.fdp import exceedance_counts, fdp_bound
from tests.oracles import slow

LEVELS = (2.0, 2.5, 3.0, 4.0)


def counted(d: np.ndarray, seed: int) -> np.ndarray:
    """Features beyond each level under each flip, by loops."""
    flips = slow.flip_group(sign_flips(len(d), 0, 8, seed=seed))
    u = np.abs(flips @ d) / np.sqrt((d**2).sum(axis=0))
    return np.array([[sum(value >= level - 1e-9 for value in row) for row in u] for level in LEVELS])


def test_counts_and_bounds_equal_the_definition() -> None:
    random = np.random.default_rng(1)
    d = random.normal(size=(30, 60))
    d[:, :8] += 0.9
    expected = counted(d, seed=5)
    result = max_t(d, n_resamples=255, seed=5, step_down=False, thresholds=LEVELS)
    np.testing.assert_array_equal(result.exceedances, expected)
    bound = fdp_bound(result.exceedances, LEVELS, alpha=0.2)
    for t in range(len(LEVELS)):
        least = expected[t, 0]
        for s in range(len(LEVELS)):
            quantile = sorted(expected[s])[int(np.ceil(0.95 * 256)) - 1]  # alpha / 4 a level
            least = min(least, quantile + max(0, expected[t, 0] - expected[s, 0]))
        assert bound.false_upper[t] == least
    assert bound.n_beyond.tolist() == expected[:, 0].tolist()
    assert bound.fdp_upper == pytest.approx(bound.false_upper / bound.n_beyond)


def test_planted_features_are_found_clean() -> None:
    random = np.random.default_rng(2)
    d = random.normal(size=(60, 400))
    d[:, :40] += 1.0
    result = max_t(d, n_resamples=1000, step_down=False, thresholds=(2.0, 4.5, 9.0))
    bound = fdp_bound(result.exceedances, (2.0, 4.5, 9.0))
    assert bound.n_beyond[1] >= 38
    assert bound.fdp_upper[1] < 0.1
    assert bound.fdp_upper[0] > 0.2
    assert bound.fdp_upper[2] == 0.0
    assert bound.n_beyond[2] == 0


def test_the_bounds_hold_at_every_level_at_once() -> None:
    """Dependent features; the observed excess alone, or bounds at the median, are exceeded far more often."""
    random = np.random.default_rng(3)
    wrong = wrong_expected = 0
    for trial in range(300):
        d = 0.6 * random.normal(size=(40, 1)) + random.normal(size=(40, 80))
        d[:, :10] += 1.0
        result = max_t(d, n_resamples=127, seed=trial, step_down=False, thresholds=LEVELS)
        true = np.array([(result.statistic[10:] >= level).sum() for level in LEVELS])
        wrong += bool((true > fdp_bound(result.exceedances, LEVELS, alpha=0.1).false_upper).any())
        wrong_expected += bool((true > result.exceedances.mean(axis=1)).any())
    assert wrong / 300 <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / 300)
    assert wrong_expected / 300 > 0.2


def test_blocks_add_up_and_order_does_not_matter() -> None:
    d = np.random.default_rng(4).normal(size=(20, 130))
    whole = max_t(d, n_resamples=100, seed=1, thresholds=LEVELS)
    parts = [max_t(d[:, s], n_resamples=100, seed=1, thresholds=LEVELS) for s in (slice(0, 9), slice(9, None))]
    np.testing.assert_array_equal(parts[0].exceedances + parts[1].exceedances, whole.exceedances)
    turned = [2, 0, 3, 1]
    levels = [LEVELS[i] for i in turned]
    again = max_t(d[:, ::-1], n_resamples=100, seed=1, step_down=False, thresholds=levels)
    np.testing.assert_array_equal(again.exceedances, whole.exceedances[turned])
    a, b = fdp_bound(whole.exceedances, LEVELS), fdp_bound(again.exceedances, levels)
    np.testing.assert_array_equal(a.false_upper[turned], b.false_upper)
    assert exceedance_counts(np.array([[3.0, 1.0], [2.0, 0.5]]), ()).shape == (0, 2)


def test_bad_input_is_explained() -> None:
    with pytest.raises(InputError, match=r"counts \[threshold, flip\] for 2 thresholds, got shape \(3, 4\)"):
        fdp_bound(np.ones((3, 4)), (1.0, 2.0))
    with pytest.raises(InputError, match=r"alpha must lie between 0 and 1, got 1.5"):
        fdp_bound(np.ones((1, 4)), (1.0,), alpha=1.5)
