"""Intervals recovered from intervals, against the formulas for symmetric ones and a simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rlgen_stats.toolkit.statistics.kernels import mover_difference, mover_weighted_sum, p_from_interval

NAN = math.nan


def test_mover_is_the_usual_interval_for_symmetric_ends() -> None:
    difference, low, high = mover_difference((0.5, 0.2, 0.8), (0.1, -0.3, 0.5))
    assert difference == pytest.approx(0.4)
    assert (low, high) == (pytest.approx(0.4 - 0.5), pytest.approx(0.4 + 0.5))  # sqrt(.3^2 + .4^2) = .5


def test_mover_takes_the_ends_that_face_each_other() -> None:
    _, low, high = mover_difference((0.9, 0.6, 1.0), (0.2, 0.0, 0.6))
    assert low == pytest.approx(0.7 - math.hypot(0.3, 0.4))
    assert high == pytest.approx(0.7 + math.hypot(0.1, 0.2))


@pytest.mark.parametrize(("z", "alpha"), [(0.3, 0.05), (1.9, 0.05), (-3.2, 0.01)])
def test_p_from_interval_inverts_a_normal_interval(z: float, alpha: float) -> None:
    half = stats.norm.ppf(1 - alpha / 2)
    assert p_from_interval(z, z - half, z + half, alpha=alpha) == pytest.approx(2 * stats.norm.sf(abs(z)))


def test_p_from_interval_agrees_with_its_interval_when_asymmetric() -> None:
    assert p_from_interval(0.3, 0.0, 2.0, alpha=0.05) == pytest.approx(0.05)
    assert p_from_interval(0.3, 0.01, 2.0, alpha=0.05) < 0.05
    assert p_from_interval(-0.3, -2.0, 0.01, alpha=0.05) > 0.05
    assert math.isnan(p_from_interval(NAN, 0.0, 1.0, alpha=0.05))
    assert math.isnan(p_from_interval(0.3, 0.3, 0.3, alpha=0.05))
    assert p_from_interval(0.0, 0.0, 0.0, alpha=0.05) == 1.0


def test_weighted_sum_of_symmetric_intervals_adds_variances() -> None:
    weights = np.array([0.25, 0.75])
    estimate, low, high = mover_weighted_sum([0.2, 0.6], [0.1, 0.2], [0.3, 1.0], weights=weights)
    half = math.hypot(0.25 * 0.1, 0.75 * 0.4)
    assert (estimate, low, high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_a_difference_is_the_sum_with_the_mirror_image() -> None:
    """The difference of two estimates is the sum of the first and the mirror image of the second."""
    first, second = (0.9, 0.6, 1.0), (0.2, 0.0, 0.6)
    mirrored = [(a, -b) for a, b in zip(first, (second[0], second[2], second[1]), strict=True)]
    assert mover_weighted_sum(*mirrored, weights=[1, 1]) == pytest.approx(mover_difference(first, second))


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
