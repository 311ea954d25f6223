"""Intervals recovered from intervals, against the formulas for symmetric ones and a simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rlgen_stats.toolkit.statistics.kernels import mover_weighted_sum

NAN = math.nan


def test_weighted_sum_of_symmetric_intervals_adds_variances() -> None:
    weights = np.array([0.25, 0.75])
    estimate, low, high = mover_weighted_sum([0.2, 0.6], [0.1, 0.2], [0.3, 1.0], weights=weights)
    half = math.hypot(0.25 * 0.1, 0.75 * 0.4)
    assert (estimate, low, high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_the_ends_that_face_each_other_count() -> None:
    """The difference of two estimates is the sum of the first and the mirror image of the second."""
    first, mirrored = (0.9, 0.6, 1.0), (-0.2, -0.6, 0.0)
    _, low, high = mover_weighted_sum(*zip(first, mirrored, strict=True), weights=[1, 1])
    assert low == pytest.approx(0.7 - math.hypot(0.3, 0.4))
    assert high == pytest.approx(0.7 + math.hypot(0.1, 0.2))


def test_weighted_sum_covers_the_pooled_share() -> None:
    rng = np.random.default_rng(0)
    shares, n = np.array([0.3, 0.5, 0.8]), np.array([60, 100, 40])
    weights, covered = n / n.sum(), 0
    for counts in rng.binomial(n, shares, size=(2000, 3)):
        means = counts / n
        half = stats.norm.ppf(0.975) * np.sqrt(means * (1 - means) / n)
        _, low, high = mover_weighted_sum(means, means - half, means + half, weights=weights)
        covered += low <= weights @ shares <= high
    assert 0.93 < covered / 2000 < 0.97


def test_weighted_sum_with_a_missing_term_is_missing() -> None:
    assert all(
        math.isnan(value) for value in mover_weighted_sum([0.2, NAN], [0.1, NAN], [0.3, NAN], weights=[0.5, 0.5])
    )
