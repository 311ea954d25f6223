"""McNemar and Wilson: whole-number sums, scipy, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels import (
    mcnemar,
    pass_at_k,
    wilson_interval,
)
from tests.oracles import slow

QUICK = settings(max_examples=50, deadline=None, derandomize=True)


def test_both_equal_scipy() -> None:
    np.testing.assert_allclose(mcnemar([0, 3], [0, 9]).p_value, [1.0, stats.binomtest(3, 12).pvalue])
    low, high = wilson_interval(7, 20)
    expected = stats.binomtest(7, 20).proportion_ci(method="wilson")
    np.testing.assert_allclose([low, high], [expected.low, expected.high])


@QUICK
@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_equals_whole_number_sums(b: int, c: int) -> None:
    result = mcnemar(b, c)
    np.testing.assert_allclose([result.p_value, result.mid_p], slow.mcnemar_p(b, c), rtol=1e-9)
    assert result.mid_p > 0


def test_mcnemar_refuses_negative_counts() -> None:
    for counts in ((-1, 3), (3, -1)):
        with pytest.raises(InputError, match="cannot be negative"):
            mcnemar(*counts)


def test_wilson_bounds_of_arrays_and_edges() -> None:
    low, high = wilson_interval([0, 3, 5], [0, 10, 5])
    assert np.isnan([low[0], high[0]]).all()
    expected = stats.binomtest(3, 10).proportion_ci(method="wilson")
    np.testing.assert_allclose([low[1], high[1]], [expected.low, expected.high])
    assert high[2] == pytest.approx(1)
    assert all(isinstance(bound, float) for bound in wilson_interval(3, 10))
    assert np.isfinite(wilson_interval(1, 1)).all()
    assert np.isnan(wilson_interval(0, 0)).all()
    for successes, n in ((4, 3), (-1, 3)):
        with pytest.raises(InputError, match=f"between 0 and the number of trials, got {successes} of {n}"):
            wilson_interval(successes, n)


def test_pass_at_k_from_none_to_all_right_and_from_one_try_to_all() -> None:
    np.testing.assert_allclose(pass_at_k([0, 1, 4], 4, 1), [0, 0.25, 1])
    np.testing.assert_allclose(pass_at_k([0, 1, 4], 4, 4), [0, 1, 1])
    for right, n, k, message in (
        (-1, 4, 1, "between 0"),
        (5, 4, 1, "between 0"),
        (1, 4, 0, "k = 0"),
        (1, 4, 5, "k = 5"),
    ):
        with pytest.raises(InputError, match=message):
            pass_at_k(right, n, k)
