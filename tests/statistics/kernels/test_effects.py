"""Sizes of change: scipy and token-level oracles, identities, edges."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.effects import hurdle, paired_wasserstein


def test_wasserstein_equals_scipy_and_sees_what_means_do_not() -> None:
    random = np.random.default_rng(1)
    a, b = random.normal(size=(2, 40, 5))
    b[:, 4] = 3 * a[:, 4]
    a[:, 4] -= a[:, 4].mean()
    b[:, 4] -= b[:, 4].mean()
    result = paired_wasserstein(a, b)
    assert result == pytest.approx([stats.wasserstein_distance(a[:, k], b[:, k]) for k in range(5)], rel=1e-12)
    assert result[4] > 0.5
    assert abs((b - a)[:, 4].mean()) < 1e-12
    np.testing.assert_array_equal(paired_wasserstein(a[::-1], b), result)
    assert paired_wasserstein(a + 2, a) == pytest.approx([2.0] * 5)
    with pytest.raises(InputError, match="two samples"):
        paired_wasserstein(a, b[:3])


@given(st.lists(st.tuples(*[st.floats(0, 5)] * 2, *[st.floats(0.01, 1)] * 2), min_size=1, max_size=6))
def test_the_parts_add_up_to_the_change(rows: list[tuple[float, float, float, float]]) -> None:
    before, after, p, q = np.array(rows).T
    result = hurdle(before * p, after * q, p, q)
    np.testing.assert_allclose(result.from_firing + result.from_magnitude, after * q - before * p, atol=1e-12)
    np.testing.assert_allclose(result.magnitude_change, after - before, atol=1e-12)


def test_planted_causes_are_told_apart() -> None:
    """Tokens: feature 0 fires twice as often, 1 twice as strongly, 2 appears, 3 vanishes, 4 never fires."""
    before = np.zeros((1000, 5))
    after = np.zeros((1000, 5))
    before[:100, 0], after[:200, 0] = 2, 2
    before[:100, 1], after[:100, 1] = 2, 4
    after[:50, 2] = 3
    before[:50, 3] = 3
    result = hurdle(before.mean(0), after.mean(0), (before > 0).mean(0), (after > 0).mean(0))
    assert result.from_firing == pytest.approx([0.2, 0, 0.15, -0.15, 0])
    assert result.from_magnitude == pytest.approx([0, 0.2, 0, 0, 0])
    assert result.magnitude_change[:2].tolist() == [0, 2]
    assert np.isnan(result.magnitude_change[2:]).all()


def test_a_mean_without_firing_has_no_parts() -> None:
    result = hurdle([1.0], [2.0], [0.0], [0.5])
    assert np.isnan(result.from_firing).all()
    assert np.isnan(result.from_magnitude).all()
