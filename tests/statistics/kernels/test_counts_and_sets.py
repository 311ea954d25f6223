"""Counts, sets, rankings, histograms, group contrasts: whole-number and every-permutation references, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels import (
    cpss_bound,
    histogram_flip_test,
    mcnemar,
    nogueira,
    partial_conjunction,
    permutation_contrast,
    rbo,
    set_overlap_pvalue,
    wilson_interval,
)
from rlgen_stats.toolkit.statistics.kernels.flips import histogram
from tests.oracles import slow

QUICK = settings(max_examples=50, deadline=None, derandomize=True)


@QUICK
@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_equals_whole_number_sums(b: int, c: int) -> None:
    found = mcnemar(b, c)
    np.testing.assert_allclose([found.p_value, found.mid_p], slow.mcnemar_p(b, c), rtol=1e-9)
    assert found.mid_p > 0


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(InputError, match="cannot be negative"):
        mcnemar(-1, 3)


@QUICK
@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12))
def test_overlap_equals_whole_number_counts(a: int, b: int, shared: int) -> None:
    shared = min(shared, a, b)
    np.testing.assert_allclose(set_overlap_pvalue(shared, 20, a, b), slow.overlap_p(shared, 20, a, b), rtol=1e-9)


def test_overlap_broadcasts_and_refuses_the_impossible() -> None:
    found = set_overlap_pvalue([3, 5], 100, 10, np.array([10, 20]))
    np.testing.assert_allclose(found, [slow.overlap_p(3, 100, 10, 10), slow.overlap_p(5, 100, 10, 20)], rtol=1e-9)
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
    found = rbo(a[:n], b[:n], p)
    assert found.truncated <= found.minimum + 1e-12 <= found.extrapolated + 2e-12
    apart = slow.endless_rbo([*a[:n], *range(100, 500)], [*b[:n], *range(1000, 1400)], p)
    assert apart == pytest.approx(found.minimum, abs=1e-9)
    together = slow.endless_rbo([*a, *range(100, 500)], [*b, *range(100, 500)], p)
    assert together >= found.minimum - 1e-12
    assert found.extrapolated <= 1 + 1e-12
    assert rbo(a, a, p).extrapolated == pytest.approx(1)
    assert rbo(b[:n], a[:n], p) == found
    with pytest.raises(InputError, match=r"\(0, 1\), got 1"):
        rbo(a, b, 1)


@pytest.mark.parametrize("statistic", ["ks", "wasserstein"])
def test_histograms_equal_every_swap(statistic: str) -> None:
    random = np.random.default_rng(62)
    a, b = random.integers(1, 9, (2, 7, 4)).astype(float)
    distance, p = slow.histogram_p(a, b, statistic)
    found = histogram_flip_test(a, b, statistic=statistic)
    assert found.statistic == pytest.approx(distance, rel=1e-12)
    assert found.p_value == pytest.approx(p, rel=1e-12)
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


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_contrast_converges_to_every_permutation(alternative: str) -> None:
    random = np.random.default_rng(63)
    plus, minus = random.integers(-1, 4, (4, 3)) / 10, random.integers(-2, 3, (5, 3)) / 10
    wanted = [slow.contrast_p(plus[:, k], minus[:, k], alternative) for k in range(3)]
    found = permutation_contrast(plus, minus, alternative=alternative, n_resamples=9000)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.p_value, wanted, atol=4 * np.sqrt(0.25 / 9000))


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
    """METHOD.md 4c: no model difference, activation correlates .1 with being right; the paper's score rejects."""
    random = np.random.default_rng(65)
    n, n_features = 1200, 400
    right = random.random((2, n)) < 0.5  # base, RL
    x = random.normal(size=(2, n, n_features)) + 0.2 * right[:, :, None]  # correlation .1
    gain, loss = ~right[0] & right[1], right[0] & ~right[1]
    d = x[1] - x[0]
    score = stats.ttest_1samp(d[gain], 0, alternative="greater").pvalue
    assert (score <= 0.05).mean() > 0.5
    found = permutation_contrast(d[gain], -d[loss], alternative="greater", n_resamples=399)
    assert (found.p_value <= 0.05).mean() < 0.05 + 3 * np.sqrt(0.05 * 0.95 / n_features)


def test_contrast_explains_its_input() -> None:
    with pytest.raises(InputError, match=r"same features, got \(3, 2\) and \(3, 4\)"):
        permutation_contrast(np.ones((3, 2)), np.ones((3, 4)))
    with pytest.raises(InputError, match="got 'up'"):
        permutation_contrast(np.ones((3, 2)), np.ones((3, 2)), alternative="up")  # type: ignore[arg-type]


def test_proportions() -> None:
    low, high = wilson_interval([0, 3, 5], [0, 10, 5])
    assert np.isnan([low[0], high[0]]).all()
    wanted = stats.binomtest(3, 10).proportion_ci(method="wilson")
    np.testing.assert_allclose([low[1], high[1]], [wanted.low, wanted.high])
    assert high[2] == pytest.approx(1)
    assert all(isinstance(bound, float) for bound in wilson_interval(3, 10))
    with pytest.raises(InputError, match="between 0 and the number of trials, got 4 of 3"):
        wilson_interval(4, 3)


def test_conjunction_and_bounds_explain_their_input() -> None:
    with pytest.raises(InputError, match="combine must be bonferroni"):
        partial_conjunction([[0.1, 0.2]], u=1, combine="stouffer")
    with pytest.raises(InputError, match=r"got shape \(2,\)"):
        partial_conjunction([0.1, 0.2], u=1, combine="fisher")
    for arguments, message in (
        ((0, 100, 50, 0.9), "0 < q <= 100"),
        ((90, 100, 50, 0.9, "unimodal"), r"needs q <= 100 / sqrt\(3\), got 90"),
        ((10, 100, 50, 0.51, "unimodal"), "needs a threshold above"),
        ((10, 100, 50, 0.9, "r-concave"), "none or unimodal, got 'r-concave'"),
    ):
        with pytest.raises(InputError, match=message):
            cpss_bound(*arguments)


def test_stability_bound_holds_for_random_selection() -> None:
    """Features picked at random: those above the threshold number no more than the bound."""
    random = np.random.default_rng(66)
    n, q, pairs, threshold, kept = 300, 30, 25, 0.6, []
    for _ in range(60):
        share = np.zeros(n)
        for _ in range(2 * pairs):
            share[random.permutation(n)[:q]] += 1 / (2 * pairs)
        kept.append((share >= threshold).sum())
    assert np.mean(kept) <= cpss_bound(q, n, pairs, threshold, "unimodal") <= cpss_bound(q, n, pairs, threshold)


@pytest.mark.parametrize("combine", ["bonferroni", "simes", "fisher"])
def test_conjunction_is_valid_with_one_true_task(combine: str) -> None:
    """One task with an effect of any size is not two: p is at least uniform."""
    random = np.random.default_rng(67)
    p = random.random((6000, 4))
    p[:, 2] = 1e-12
    found = partial_conjunction(p, u=2, combine=combine)
    assert (found <= 0.05).mean() < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 6000)
    order = [3, 1, 0, 2]
    np.testing.assert_allclose(partial_conjunction(p[:, order], u=2, combine=combine), found, rtol=1e-12)


@pytest.mark.parametrize("statistic", ["ks", "wasserstein"])
def test_features_of_histograms_are_tested_one_by_one(statistic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(63)
    a, b = random.integers(0, 5, (2, 9, 20, 6)).astype(np.uint32)
    a[:, :, 0] += 1
    b[:, :, 0] += 1
    b[:, 4, 5] += 9
    a[3, 7] = b[5, 8] = 0  # here a unit's histogram is empty
    found = histogram_flip_test(a, b, statistic=statistic)
    for k in set(range(20)) - {7, 8}:
        alone = histogram_flip_test(a[:, k], b[:, k], statistic=statistic)
        assert (alone.p_value, alone.statistic) == (found.p_value[k], pytest.approx(found.statistic[k], rel=1e-12))
    assert np.isnan([found.p_value[7:9], found.statistic[7:9]]).all()
    assert found.p_value[4] == np.nanmin(found.p_value)
    monkeypatch.setattr(histogram, "BLOCK_SUMS", 1)
    np.testing.assert_array_equal(histogram_flip_test(a, b, statistic=statistic).p_value, found.p_value)
