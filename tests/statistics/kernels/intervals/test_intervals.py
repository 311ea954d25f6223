"""Bootstrap-t, equivalence, moderation, clustered errors: coverage, level, and what must not reach other features."""

import numpy as np
import pytest
from scipy import stats

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels import (
    bootstrap_t,
    bootstrap_weights,
    cluster_se,
    moderated_t,
    tost_chain,
    tost_paired,
)
from tests.oracles import slow


@pytest.mark.parametrize("n_nonzero", [10, 25, 100])
def test_coverage_of_a_sparse_mean(n_nonzero: int) -> None:
    """200 units of which about ``n_nonzero`` differ, skewed: intervals cover, where there is one."""
    random = np.random.default_rng(50)
    share = n_nonzero / 200
    x = (random.random((200, 1500)) < share) * random.gamma(4.0, 0.25, size=(200, 1500))
    found = bootstrap_t(x, n_resamples=399, seed=1)
    few = (x != 0).sum(axis=0) < 10
    assert np.isnan(found.low[few]).all()
    assert np.isfinite(found.low[~few]).all()
    covered = ((found.low <= share) & (found.high >= share))[~few].mean()
    low, high = (0.90, 0.99) if n_nonzero == 10 else (0.93, 0.97)
    assert low < covered < high


def test_clusters_keep_the_mean_and_widen_the_interval() -> None:
    random = np.random.default_rng(51)
    clusters = np.repeat(np.arange(25), random.integers(1, 9, 25))
    x = random.normal(1, size=25)[clusters][:, None] + 0.3 * random.normal(size=(len(clusters), 4))
    found, plain = bootstrap_t(x, clusters=clusters), bootstrap_t(x)
    np.testing.assert_allclose(found.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.standard_error, cluster_se(x, clusters).standard_error, rtol=1e-12)
    assert ((found.high - found.low) > 1.5 * (plain.high - plain.low)).all()
    alone = bootstrap_t(x, clusters=np.arange(len(x)))
    np.testing.assert_allclose([alone.low, alone.high], [plain.low, plain.high], rtol=1e-9)
    nine = np.where(clusters[:, None] < 9, x, 0.0)  # many units, but nine clusters that are not zero
    assert np.isnan(bootstrap_t(nine, clusters=clusters).low).all()


def test_bootstrap_is_a_function_of_seed_and_units_alone() -> None:
    x = np.random.default_rng(52).gamma(2.0, size=(30, 2100))
    whole = bootstrap_t(x, n_resamples=700, seed=3)  # more than one block of features
    part = bootstrap_t(x[:, 1490:1510], n_resamples=700, seed=3)
    np.testing.assert_allclose(part.low, whole.low[1490:1510], rtol=1e-12)
    assert not np.allclose(bootstrap_t(x[:, :5], n_resamples=700, seed=4).low, whole.low[:5])
    assert (bootstrap_weights(30, 5, seed=3).sum(axis=1) == 30).all()
    shifted, scaled = (
        bootstrap_t(x[:, :5] + 100, n_resamples=700, seed=3),
        bootstrap_t(-2 * x[:, :5], n_resamples=700, seed=3),
    )
    np.testing.assert_allclose(shifted.low, whole.low[:5] + 100, rtol=1e-9)
    np.testing.assert_allclose(scaled.high, -2 * whole.low[:5], rtol=1e-9)
    with pytest.raises(InputError, match="0 < alpha < 1"):
        bootstrap_t(x, alpha=0)


def test_resamples_without_spread_do_not_make_nan() -> None:
    """Ten equal values among eleven units: many resamples repeat one value, whose t is infinite."""
    found = bootstrap_t(np.r_[np.zeros(1), np.ones(10)], n_resamples=200)
    assert not np.isnan([found.low, found.high]).any()
    assert found.low <= found.mean <= found.high


def test_equivalence_equals_two_t_tests() -> None:
    random = np.random.default_rng(53)
    x, y = random.normal(size=(2, 20, 5))
    found = tost_paired(x, y, low=-0.4, high=0.7)
    np.testing.assert_allclose(found, [slow.tost_p(x[:, k] - y[:, k], -0.4, 0.7) for k in range(5)], rtol=1e-9)
    with pytest.raises(InputError, match="below the upper one, got 1 and 1"):
        tost_paired(x, y, low=1, high=1)


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("total", [0.0, 0.4, 2.0])
def test_a_relative_margin_keeps_its_level(share: float, total: float) -> None:
    """The truth lies exactly at the margin; putting in the estimated change as if known rejected 12% at .5."""
    random = np.random.default_rng(54)
    x = random.normal(size=(60, 3, 6000)) * np.array([1, 0.3, 0.3])[:, None]
    x += total * np.array([1, share, 0])[:, None]
    found = tost_chain(x, margin=share, relative=True)
    assert (found.p_value[1] <= 0.05).mean() < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 6000)
    if total == 2:
        assert (found.p_value[1] <= 0.05).mean() > 0.04
        inside = x - np.array([0, 0.8 * share * total, 0])[:, None]
        assert (tost_chain(inside, margin=share, relative=True).p_value[1] <= 0.05).mean() > 0.95
        mirrored = tost_chain(-x, margin=share, relative=True)
        np.testing.assert_allclose(mirrored.p_value, found.p_value, rtol=1e-12)


def test_chain_leaves_missing_features_out_and_explains_margins() -> None:
    x = np.random.default_rng(55).normal(size=(30, 4, 3))
    x[:, :, 1] = np.nan
    found = tost_chain(x, margin=np.array([5.0, 5.0, 1e-6]))
    np.testing.assert_array_equal(found.stabilized_at, [0, np.nan, 3])
    assert np.isnan(found.p_value[:, 1]).all()
    with pytest.raises(InputError, match="margin must be positive, got 0"):
        tost_chain(x, margin=0)
    with pytest.raises(InputError, match="share below 1 of the total change, got 1"):
        tost_chain(x, margin=1, relative=True)
    with pytest.raises(InputError, match=r"at least two of each, got shape \(30, 1\)"):
        tost_chain(x[:, :1, 0], margin=1)


def test_dead_features_do_not_spoil_the_moderation() -> None:
    random = np.random.default_rng(56)
    x = random.normal(size=(6, 40)) * np.sqrt(5 / random.chisquare(5, 40))
    alone = moderated_t(x)
    found = moderated_t(np.column_stack([x[:, :9], np.zeros(6), np.full(6, np.nan), x[:, 9:]]))
    for name in ("statistic", "p_value"):
        np.testing.assert_array_equal(np.delete(getattr(found, name), [9, 10]), getattr(alone, name))
        assert np.isnan(getattr(found, name)[9:11]).all()
    assert (found.prior_dof, found.prior_variance) == (alone.prior_dof, alone.prior_variance)
    constant = moderated_t(np.column_stack([x, np.ones(6)]))
    assert np.isfinite(constant.statistic).all()
    with pytest.raises(InputError, match="two testable features, got 1 of 2"):
        moderated_t(np.column_stack([x[:, 0], np.zeros(6)]))


def test_clustered_error_is_the_sum_over_pairs() -> None:
    random = np.random.default_rng(57)
    clusters = random.integers(0, 7, 40)
    y = random.normal(size=40) + clusters
    for kind in ("CR0", "CR1"):
        wanted = slow.clustered_error(y.tolist(), clusters.tolist(), kind == "CR1")
        assert cluster_se(y, clusters, kind=kind).standard_error == pytest.approx(wanted, rel=1e-12)  # type: ignore[arg-type]
    assert cluster_se(y, [f"c{c}" for c in clusters]).n_clusters == 7
    with pytest.raises(InputError, match="CR0 or CR1, got 'CR2'"):
        cluster_se(y, clusters, kind="CR2")  # type: ignore[arg-type]


def test_tokens_as_units_break_the_level_that_clusters_keep() -> None:
    """METHOD.md section 3: 64 tokens a prompt with ICC .05, a t test over tokens rejects far above its level."""
    random = np.random.default_rng(58)
    clusters = np.repeat(np.arange(60), 64)
    token, robust = [], []
    for _ in range(150):
        y = np.sqrt(0.05) * random.normal(size=60)[clusters] + np.sqrt(0.95) * random.normal(size=60 * 64)
        token.append(stats.ttest_1samp(y, 0).pvalue)
        found = cluster_se(y, clusters)
        robust.append(2 * stats.t.sf(abs(found.mean / found.standard_error), 59))
    assert np.mean(np.array(token) <= 0.05) > 0.2
    assert np.mean(np.array(robust) <= 0.05) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 150)


@pytest.mark.parametrize("clusters", [None, np.repeat(np.arange(20), 2)])
def test_a_constant_feature_has_no_interval(clusters: np.ndarray | None) -> None:
    """The mean of forty .1 is not .1 to the last bit; that is no spread, and no reason for an infinite bound."""
    x = np.column_stack([np.full(40, value) for value in (0.1, 0.3, 0.5, 0.7, 1e-200)])
    found = bootstrap_t(x, n_resamples=199, clusters=clusters)
    np.testing.assert_allclose(found.mean, x[0])
    assert np.isnan(found.low).all()
    assert np.isnan(found.high).all()
    assert (found.standard_error == 0).all()


def test_what_lies_beyond_the_margin_is_the_other_side_of_equivalence() -> None:
    """By scipy: shifted one-sample t tests against the near and the far bound; the relative margin by its contrasts."""
    x = np.random.default_rng(57).normal(size=(25, 3, 6)) + np.linspace(-1, 1, 6)
    d, margin = x - x[:, -1:], 0.3
    found = tost_chain(x, margin=margin)
    share = tost_chain(x, margin=margin, relative=True)
    for c in range(2):
        for k in range(6):
            y = d[:, c, k] * np.sign(d[:, c, k].mean())
            far = [stats.ttest_1samp(y, bound, alternative="greater").pvalue for bound in (margin, -margin)]
            assert found.p_beyond[c, k] == pytest.approx(min(1, sum(far)))
            up = margin * d[:, 0, k] * np.sign(d[:, 0, k].mean())
            far = [stats.ttest_1samp(y - turn * up, 0, alternative="greater").pvalue for turn in (1, -1)]
            assert share.p_beyond[c, k] == pytest.approx(min(1, sum(far)))
    assert np.all(np.maximum(found.p_beyond, found.p_value)[:2] >= 0.5)
    assert np.all(found.p_beyond[-1] == 1)
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
