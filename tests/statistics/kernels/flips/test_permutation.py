"""Group contrasts: every permutation, selection by outcome, blocks, refusals."""

import itertools

import numpy as np
import pytest
from scipy import stats

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels import (
    permutation_contrast,
)
from tests.oracles import slow


def test_contrast_equals_every_permutation() -> None:
    random = np.random.default_rng(4)
    plus, minus = random.normal(0.8, size=(5, 3)), random.normal(size=(4, 3))
    pooled = np.concatenate([plus, minus])
    observed = plus.mean(axis=0) - minus.mean(axis=0)
    every = np.array(
        [
            pooled[list(c)].mean(axis=0) - np.delete(pooled, list(c), axis=0).mean(axis=0)
            for c in itertools.combinations(range(9), 5)
        ]
    )
    exact = (every >= observed - 1e-9).mean(axis=0)
    result = permutation_contrast(plus, minus, alternative="greater", n_resamples=20000)
    np.testing.assert_allclose(result.statistic, observed)
    np.testing.assert_allclose(result.p_value, exact, atol=4 * np.sqrt(0.25 / 20000))
    assert np.isnan(permutation_contrast(plus, minus, min_count=5).p_value).all()
    assert np.isnan(permutation_contrast(plus * 0, minus * 0).p_value).all()


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_contrast_converges_to_every_permutation(alternative: str) -> None:
    random = np.random.default_rng(63)
    plus, minus = random.integers(-1, 4, (4, 3)) / 10, random.integers(-2, 3, (5, 3)) / 10
    expected = [slow.contrast_p(plus[:, k], minus[:, k], alternative) for k in range(3)]
    result = permutation_contrast(plus, minus, alternative=alternative, n_resamples=9000)  # type: ignore[arg-type]
    np.testing.assert_allclose(result.p_value, expected, atol=4 * np.sqrt(0.25 / 9000))


def test_contrast_does_not_feel_other_features() -> None:
    random = np.random.default_rng(64)
    plus, minus = random.normal(0.3, size=(25, 40)), random.normal(size=(30, 40))
    whole = permutation_contrast(plus, minus, n_resamples=300, seed=5)
    dead = np.column_stack([plus[:, 10:20], np.zeros(25)]), np.column_stack([minus[:, 10:20], np.zeros(30)])
    part = permutation_contrast(*dead, n_resamples=300, seed=5)
    np.testing.assert_array_equal(part.p_value[:-1], whole.p_value[10:20])
    np.testing.assert_array_equal(part.statistic[:-1], whole.statistic[10:20])
    assert np.isnan(part.p_value[-1])
    assert (whole.p_value >= 1 / 301).all()
    small = permutation_contrast(plus[:19], minus, min_count=20)
    assert (small.n_plus, small.n_minus) == (19, 30)
    assert np.isnan(small.statistic).all()


def test_contrast_removes_selection_by_outcome() -> None:
    """docs/method.md 4c: no model difference, activation correlates .1 with being right; the paper's score rejects."""
    random = np.random.default_rng(65)
    n, n_features = 1200, 400
    right = random.random((2, n)) < 0.5  # base, RL
    x = random.normal(size=(2, n, n_features)) + 0.2 * right[:, :, None]  # correlation .1
    gain, loss = ~right[0] & right[1], right[0] & ~right[1]
    d = x[1] - x[0]
    score = stats.ttest_1samp(d[gain], 0, alternative="greater").pvalue
    assert (score <= 0.05).mean() > 0.5
    result = permutation_contrast(d[gain], -d[loss], alternative="greater", n_resamples=399)
    assert (result.p_value <= 0.05).mean() < 0.05 + 3 * np.sqrt(0.05 * 0.95 / n_features)


def test_contrast_explains_its_input() -> None:
    with pytest.raises(InputError, match=r"same features, got \(3, 2\) and \(3, 4\)"):
        permutation_contrast(np.ones((3, 2)), np.ones((3, 4)))
    with pytest.raises(InputError, match="got 'up'"):
        permutation_contrast(np.ones((3, 2)), np.ones((3, 2)), alternative="up")  # type: ignore[arg-type]
