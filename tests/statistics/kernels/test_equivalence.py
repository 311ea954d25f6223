"""Equivalence chains and margins: statsmodels and scipy, levels at the margin, refusals."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.weightstats import ttost_paired

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels import (
    minimum_effect_test,
    tost_chain,
    tost_paired,
)
from tests.oracles import slow


def test_chain_equals_statsmodels_and_walks_back_from_the_end() -> None:
    random = np.random.default_rng(0)
    x = np.array([2.0, 1.0, 0.05, 0.0, 0.0]) + 0.1 * random.normal(size=(40, 5))
    result = tost_chain(x, margin=0.2)
    for c in range(4):
        np.testing.assert_allclose(result.p_value[c], ttost_paired(x[:, c], x[:, -1], -0.2, 0.2)[0], rtol=1e-9)
    assert result.stabilized_at == 2
    assert result.p_value[-1] == 0
    broken = x.copy()
    broken[:, 3] += 1  # a late jump breaks the chain although earlier checkpoints equal the end
    assert tost_chain(broken, margin=0.2).stabilized_at == 4
    assert np.isnan(tost_chain(broken, margin=0.2, persist=1).stabilized_at)
    both = tost_chain(np.stack([x, broken], axis=-1), margin=0.2, persist=2)
    np.testing.assert_array_equal(both.stabilized_at, [2, np.nan])
    assert tost_chain(x, margin=0.6, relative=True).stabilized_at == 1


def test_chain_error_rate_at_the_margin() -> None:
    x = np.random.default_rng(1).normal(size=(50, 2, 4000))
    x[:, 0] += 0.5
    early = np.asarray(tost_chain(x, margin=0.5).stabilized_at) == 0
    assert early.mean() < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 4000)


def test_equivalence_equals_two_t_tests() -> None:
    random = np.random.default_rng(53)
    x, y = random.normal(size=(2, 20, 5))
    result = tost_paired(x, y, low=-0.4, high=0.7)
    np.testing.assert_allclose(result, [slow.tost_p(x[:, k] - y[:, k], -0.4, 0.7) for k in range(5)], rtol=1e-9)
    with pytest.raises(InputError, match="below the upper one, got 1 and 1"):
        tost_paired(x, y, low=1, high=1)


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("total", [0.0, 0.4, 2.0])
def test_a_relative_margin_keeps_its_level(share: float, total: float) -> None:
    """The truth lies exactly at the margin; putting in the estimated change as if known rejected 12% at .5."""
    random = np.random.default_rng(54)
    x = random.normal(size=(60, 3, 6000)) * np.array([1, 0.3, 0.3])[:, None]
    x += total * np.array([1, share, 0])[:, None]
    result = tost_chain(x, margin=share, relative=True)
    assert (result.p_value[1] <= 0.05).mean() < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 6000)
    if total == 2:
        assert (result.p_value[1] <= 0.05).mean() > 0.04
        inside = x - np.array([0, 0.8 * share * total, 0])[:, None]
        assert (tost_chain(inside, margin=share, relative=True).p_value[1] <= 0.05).mean() > 0.95
        mirrored = tost_chain(-x, margin=share, relative=True)
        np.testing.assert_allclose(mirrored.p_value, result.p_value, rtol=1e-12)


def test_chain_leaves_missing_features_out_and_explains_margins() -> None:
    x = np.random.default_rng(55).normal(size=(30, 4, 3))
    x[:, :, 1] = np.nan
    result = tost_chain(x, margin=np.array([5.0, 5.0, 1e-6]))
    np.testing.assert_array_equal(result.stabilized_at, [0, np.nan, 3])
    assert np.isnan(result.p_value[:, 1]).all()
    with pytest.raises(InputError, match="margin must be positive, got 0"):
        tost_chain(x, margin=0)
    with pytest.raises(InputError, match="share below 1 of the total change, got 1"):
        tost_chain(x, margin=1, relative=True)
    with pytest.raises(InputError, match=r"at least two of each, got shape \(30, 1\)"):
        tost_chain(x[:, :1, 0], margin=1)


def test_what_lies_beyond_the_margin_is_the_other_side_of_equivalence() -> None:
    """By scipy: shifted one-sample t tests against the near and the far bound; the relative margin by its contrasts."""
    x = np.random.default_rng(57).normal(size=(25, 3, 6)) + np.linspace(-1, 1, 6)
    d, margin = x - x[:, -1:], 0.3
    result = tost_chain(x, margin=margin)
    share = tost_chain(x, margin=margin, relative=True)
    for c in range(2):
        for k in range(6):
            y = d[:, c, k] * np.sign(d[:, c, k].mean())
            far = [stats.ttest_1samp(y, bound, alternative="greater").pvalue for bound in (margin, -margin)]
            assert result.p_beyond[c, k] == pytest.approx(min(1, sum(far)))
            up = margin * d[:, 0, k] * np.sign(d[:, 0, k].mean())
            far = [stats.ttest_1samp(y - turn * up, 0, alternative="greater").pvalue for turn in (1, -1)]
            assert share.p_beyond[c, k] == pytest.approx(min(1, sum(far)))
    assert np.all(np.maximum(result.p_beyond, result.p_value)[:2] >= 0.5)
    assert np.all(result.p_beyond[-1] == 1)
    x[3, 1, 2] = np.nan
    assert np.isnan(tost_chain(x, margin=margin).p_beyond[:, 2]).any()
    still = tost_chain(np.ones((5, 3, 1)), margin=0.1)
    assert (still.p_beyond.tolist(), still.p_value[:, 0].tolist()) == ([[1], [1], [1]], [0, 0, 0])


@pytest.mark.parametrize("margin", [0.01, 0.3, 2.0])
def test_what_lies_at_the_margin_is_beyond_it_alpha_of_the_time(margin: float) -> None:
    """A margin far below the error included, where the nearer bound alone rejects twice as often."""
    random = np.random.default_rng(58)
    x = random.normal(size=(20, 2, 6000))
    x[:, 0] += margin
    rate = (tost_chain(x, margin=margin).p_beyond[0] <= 0.05).mean()
    assert rate == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / 6000))
    d = x[:, 0] - x[:, 1]
    nearer = stats.t.sf((np.abs(d.mean(axis=0)) - margin) / stats.sem(d, axis=0), 19)
    assert ((nearer <= 0.05).mean() > 0.08) == (margin < 0.1)


def test_minimum_effect_is_a_t_test_of_the_excess_over_the_margin() -> None:
    """One unit at a time: the spread, each unit's influence on it, and the t test of what is left."""
    random = np.random.default_rng(20)
    before, after = random.gamma(1.0, 1.0, 40), random.gamma(1.0, 2.0, 40)
    for x, reference in ((after, before), (before, after)):
        d = x - reference
        squares = [(r - reference.mean()) ** 2 for r in reference]
        pooled = [(s + (v - x.mean()) ** 2) / 2 for s, v in zip(squares, x, strict=True)]
        shares = max(squares, pooled, key=sum)
        spread = (sum(shares) / 39) ** 0.5
        sign = np.sign(d.mean())
        excess = [sign * v - 0.2 * q / (2 * spread) for v, q in zip(d, shares, strict=True)]
        error = np.std(excess, ddof=1) / 40**0.5
        near, far = (stats.t.sf((abs(d.mean()) - side * 0.2 * spread) / error, 39) for side in (1, -1))
        result = minimum_effect_test(x, reference, margin=0.2)
        assert result.p_value == pytest.approx(near + far, rel=1e-9)
        assert result.effect == pytest.approx(d.mean() / spread, rel=1e-12)


def test_minimum_effect_without_a_margin_is_the_two_sided_t_test() -> None:
    random = np.random.default_rng(21)
    before = random.normal(size=(30, 5))
    after = before + random.normal(0.3, 1.0, (30, 5))
    expected = stats.ttest_rel(after, before).pvalue
    np.testing.assert_allclose(minimum_effect_test(after, before, margin=0.0).p_value, expected, rtol=1e-9)


def test_minimum_effect_error_rates() -> None:
    """Normal values exactly at the margin, and features that only leak, with so many units that all tests see it."""
    random = np.random.default_rng(22)
    n, columns = 400, 4000
    before = random.normal(size=(n, columns))
    beside = before + 0.3 * random.normal(size=(n, columns))
    spread = np.sqrt((1 + 1.09) / 2)
    at = minimum_effect_test(beside + 0.2 * spread, before, margin=0.2)
    assert (at.p_value <= 0.05).mean() == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / columns))
    leak = minimum_effect_test(beside + 0.1, before, margin=0.2)
    assert leak.p_value.min() > 0.05
    assert (stats.ttest_rel(beside + 0.1, before).pvalue <= 0.05).mean() > 0.99
    # The spread is not known: a test that takes it so rejects too often where the difference hardly varies.
    steady = before[:, :1000] + 0.2
    p = minimum_effect_test(steady, before[:, :1000], margin=0.2).p_value
    assert 0.03 < (p <= 0.05).mean() < 0.07


def test_a_feature_that_is_silent_in_the_reference_can_exceed_the_margin() -> None:
    random = np.random.default_rng(23)
    new = np.where(random.random((300, 1)) < 0.2, random.uniform(1.0, 2.0, (300, 1)), 0.0)
    result = minimum_effect_test(new, np.zeros_like(new), margin=0.2)
    assert result.p_value[0] < 1e-4
    assert result.effect[0] == pytest.approx(np.sqrt(2) * new.mean() / new.std(ddof=1))
    rare = np.where(np.arange(300)[:, None] < 4, 1.5, 0.0)
    assert minimum_effect_test(rare, np.zeros_like(rare), margin=0.2).p_value[0] > 0.05


def test_minimum_effect_of_constants_and_its_refusals() -> None:
    still = np.ones((6, 2))
    result = minimum_effect_test(still + np.array([0.0, 1.0]), still, margin=0.2)
    assert result.p_value.tolist() == [1.0, 0.0]
    assert np.isnan(result.effect[0])
    with pytest.raises(InputError, match=r"of two units or more, got \(6, 2\) and \(6, 1\)"):
        minimum_effect_test(still, still[:, :1], margin=0.2)
    with pytest.raises(InputError, match=r"must not be negative, got -0\.1"):
        minimum_effect_test(still, still, margin=-0.1)
