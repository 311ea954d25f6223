"""Overlap of sets and rankings: whole-number counts, bounds under any continuation, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels import (
    nogueira,
    rbo,
    set_overlap_pvalue,
)
from tests.oracles import slow

QUICK = settings(max_examples=50, deadline=None, derandomize=True)


def test_sets_at_their_ends() -> None:
    assert rbo("abc", "abc", 0.9).extrapolated == pytest.approx(1.0)
    assert rbo("abc", "xyz", 0.9).extrapolated == 0.0
    assert rbo([], "abc", 0.9).minimum == 0.0
    assert rbo("ab", "abcd", 0.9).extrapolated == rbo("abcd", "ab", 0.9).extrapolated
    with pytest.raises(InputError, match="repeated"):
        rbo("aab", "abc", 0.9)
    assert nogueira([[1, 0, 1, 0]] * 3) == pytest.approx(1.0)
    assert np.isnan(nogueira(np.ones((3, 4))))
    chance = np.random.default_rng(7).random((400, 200)) < 0.3
    assert abs(nogueira(chance)) < 0.01
    assert set_overlap_pvalue(0, 100, 10, 10) == 1.0
    with pytest.raises(InputError, match="do not fit"):
        set_overlap_pvalue(1, 5, 10, 3)


@QUICK
@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12))
def test_overlap_equals_whole_number_counts(a: int, b: int, shared: int) -> None:
    shared = min(shared, a, b)
    np.testing.assert_allclose(set_overlap_pvalue(shared, 20, a, b), slow.overlap_p(shared, 20, a, b), rtol=1e-9)


def test_overlap_broadcasts_and_refuses_the_impossible() -> None:
    result = set_overlap_pvalue([3, 5], 100, 10, np.array([10, 20]))
    np.testing.assert_allclose(result, [slow.overlap_p(3, 100, 10, 10), slow.overlap_p(5, 100, 10, 20)], rtol=1e-9)
    with pytest.raises(InputError, match="10 and 3 cannot share 4"):
        set_overlap_pvalue(4, 100, 10, 3)


def test_nogueira_equals_mean_pairwise_overlap_beyond_chance() -> None:
    rows = (np.random.default_rng(60).random((6, 15)) < 0.4).astype(int)
    assert nogueira(rows) == pytest.approx(slow.nogueira_pairs(rows.tolist()), rel=1e-12)
    order = np.random.default_rng(61).permutation(15)
    assert nogueira(rows[::-1, order]) == pytest.approx(nogueira(rows), rel=1e-12)
    with pytest.raises(InputError, match="two repeats, got shape"):
        nogueira([[1, 0]])


@QUICK
@given(st.permutations(range(8)), st.permutations(range(8)), st.integers(1, 8), st.sampled_from([0.5, 0.9]))
def test_rbo_bounds_hold_for_what_follows(a: list[int], b: list[int], n: int, p: float) -> None:
    """Whatever the next 200 items, the overlap lies between minimum and minimum + residual; itself gives 1."""
    result = rbo(a[:n], b[:n], p)
    assert result.truncated <= result.minimum + 1e-12 <= result.extrapolated + 2e-12
    apart = slow.endless_rbo([*a[:n], *range(100, 500)], [*b[:n], *range(1000, 1400)], p)
    assert apart == pytest.approx(result.minimum, abs=1e-9)
    together = slow.endless_rbo([*a, *range(100, 500)], [*b, *range(100, 500)], p)
    assert together >= result.minimum - 1e-12
    assert result.extrapolated <= 1 + 1e-12
    assert rbo(a, a, p).extrapolated == pytest.approx(1)
    assert rbo(b[:n], a[:n], p) == result
    with pytest.raises(InputError, match=r"\(0, 1\), got 1"):
        rbo(a, b, 1)
