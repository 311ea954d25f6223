"""Contributions to a contrast of group means: written out, level under the null, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels import contrast_contributions, sign_flip_test


def test_contributions_are_residuals_from_the_best_means_without_a_contrast() -> None:
    random = np.random.default_rng(0)
    x = random.normal(2, 1, (30, 3))
    groups, weights = [np.arange(8), np.arange(8, 20), np.array([22, 25, 29])], [1.0, 1.0, -2.0]
    got = contrast_contributions(x, groups, weights)
    for k in range(3):
        fit = optimize.minimize(
            lambda m, k=k: sum(((x[rows, k] - mean) ** 2).sum() for rows, mean in zip(groups, m, strict=True)),
            np.zeros(3),
            constraints={"type": "eq", "fun": lambda m: m @ weights},
            tol=1e-14,
        )
        for rows, weight, mean in zip(groups, weights, fit.x, strict=True):
            np.testing.assert_allclose(got[rows, k], weight / len(rows) * (x[rows, k] - mean), atol=1e-6)
    contrast = sum(w * x[rows].mean(axis=0) for rows, w in zip(groups, weights, strict=True))
    np.testing.assert_allclose(got.sum(axis=0), contrast)
    assert not got[[20, 21, 23, 24, 26, 27, 28]].any()


@pytest.mark.parametrize("spread", [(1.0, 1.0), (3.0, 1.0), (1.0, 3.0)])
def test_flips_keep_the_level_whatever_the_spread_of_groups(spread: tuple[float, float]) -> None:
    """Permuting units between groups of other size and spread rejects .28 or .00 at .05 here."""
    random = np.random.default_rng(1)
    x = random.normal(5, 1, (60, 2000))
    x[:15] = 5 + spread[0] * (x[:15] - 5)
    x[15:] = 5 + spread[1] * (x[15:] - 5)
    p = sign_flip_test(contrast_contributions(x, [np.arange(15), np.arange(15, 60)], [1, -1])).p_value
    assert np.mean(np.asarray(p) <= 0.05) == pytest.approx(0.05, abs=0.02)


def test_what_never_varies_gives_no_evidence() -> None:
    x = np.full((12, 1), 0.1) * 3
    assert not contrast_contributions(x, [np.arange(6), np.arange(6, 12)], [1, -1]).any()


def test_groups_and_weights_must_fit() -> None:
    with pytest.raises(InputError, match=r"one weight a group and no empty group, got 1 weights for \[2\.0, 1\.0\]"):
        contrast_contributions(np.ones((3, 1)), [np.arange(2), np.array([2])], [1.0])
    with pytest.raises(InputError, match="no empty group"):
        contrast_contributions(np.ones((3, 1)), [np.arange(3), np.array([], dtype=int)], [1.0, -1.0])
