"""Planned power against other formulas, published values, and the tests themselves on simulated data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from rlgen_stats.schemas.errors import InputError, NotEstimableError, RefusedError
from rlgen_stats.toolkit.statistics.planning.power import (
    Design,
    detectable_effect,
    power_at,
    required_prompts,
    required_runs,
    run_power,
    sd_ratio_quantiles,
    two_sided_power,
)
from rlgen_stats.toolkit.statistics.planning.power_check import arms_as_units, simulated_power, simulated_run_power

ONE = Design(effect=0.3, control="none", density=1.0)


@pytest.mark.parametrize("freedom", [5, 10, 60])
@pytest.mark.parametrize("noncentrality", [0.0, 0.5, 3.0])
def test_t_power_is_the_noncentral_t(freedom, noncentrality):
    critical = stats.t.isf(np.array([0.0005, 0.005, 0.025]), freedom)
    sd_ratio = sd_ratio_quantiles(np.array([[float(freedom)]]))
    power = two_sided_power(critical[None], np.array([[noncentrality]]), sd_ratio)
    expected = stats.nct.sf(critical, freedom, noncentrality) + stats.nct.cdf(-critical, freedom, noncentrality)
    assert power[0] == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize(("effect", "n"), [(0.1, 1000), (0.3, 80), (0.6, 20)])
def test_one_dense_feature_is_the_t_test(effect, n):
    expected = TTestPower().power(effect, n, 0.05)
    assert power_at(replace(ONE, effect=effect), n_prompts=n).power == pytest.approx(expected, abs=3e-4)
    needed = required_prompts(replace(ONE, effect=effect), power=0.9).n_prompts
    assert needed == np.ceil(TTestPower().solve_power(effect, None, 0.05, 0.9))


def test_the_bh_threshold_solves_its_equation():
    design = Design(effect=0.2, density=1.0, true_share=0.05)
    planned = power_at(design, n_prompts=400)
    t = planned.threshold
    assert t == pytest.approx(0.05 * (0.95 * t + 0.05 * planned.power), rel=1e-6)
    # A different way: the largest of many candidates, with the normal instead of the t distribution.
    grid = np.geomspace(1e-7, 0.05, 200_001)
    power = stats.norm.sf(stats.norm.isf(grid / 2) - 0.2 * np.sqrt(400))
    slow = grid[grid <= 0.05 * (0.95 * grid + 0.05 * power)].max()
    assert t == pytest.approx(slow, rel=0.02)


def test_thresholds_of_the_other_controls():
    assert power_at(replace(ONE, control="fwer", n_features=1000), n_prompts=100).threshold == pytest.approx(
        1 - 0.95 ** (1 / 1000)
    )
    assert power_at(ONE, n_prompts=100).threshold == 0.05
    # Too little power for any BH step: the threshold of the smallest p-value.
    weak = power_at(Design(effect=0.01, n_features=100, density=1.0), n_prompts=50)
    assert weak.threshold == pytest.approx(0.05 / 100)


def test_jung_2005():
    """His example: 4,000 genes, 40 of them true, FDR 1%, 24 true rejections; the threshold a* = r1 f / (m0 (1 - f))."""
    m, m1, f, r1 = 4000, 40, 0.01, 24
    threshold = r1 * f / ((m - m1) * (1 - f))
    assert threshold == pytest.approx(0.612e-4, rel=1e-3)
    # BH controls pi0 alpha, so alpha = f / pi0 gives the same threshold at the same power.
    design = Design(effect=0.5, n_features=m, true_share=m1 / m, alpha=f / (1 - m1 / m), density=1.0)
    needed = required_prompts(design, power=r1 / m1)
    assert needed.threshold == pytest.approx(threshold, rel=0.02)


def test_clusters_multiply_prompts_by_the_design_effect():
    design = replace(ONE, effect=0.05)
    alone = required_prompts(design).n_prompts
    clustered = required_prompts(replace(design, icc=0.1, cluster_size=11)).n_prompts
    assert clustered / alone == pytest.approx(2.0, rel=0.02)
    assert clustered % 11 == 0


def test_sparse_features_cannot_reach_small_p_values():
    design = Design(effect=0.3, density=0.1, n_features=32_768, control="fwer")
    few = power_at(design, n_prompts=100)
    assert few.power == pytest.approx(0, abs=1e-6)
    assert few.smallest_p > few.threshold
    with pytest.raises(NotEstimableError, match=r"show no effect with power 0\.9 at density 0\.1"):
        detectable_effect(design, n_prompts=100)


@pytest.mark.parametrize("control", ["fdr", "fwer", "none"])
def test_the_reverse_is_the_inverse(control):
    design = Design(effect=0.2, control=control, density=0.5, icc=0.1, cluster_size=2)
    needed = required_prompts(design, power=0.8)
    assert needed.power >= 0.8 > power_at(design, n_prompts=needed.n_prompts - 2).power
    assert detectable_effect(design, n_prompts=needed.n_prompts, power=0.8).effect == pytest.approx(0.2, rel=5e-3)


@pytest.mark.parametrize(
    ("settings", "n"),
    [
        ({"effect": 0.3, "true_share": 0.05}, 220),
        ({"effect": 0.3, "density": 0.6, "icc": 0.2, "cluster_size": 4}, 380),
        ({"effect": 0.3, "control": "fwer"}, 330),
        ({"effect": 0.2, "control": "none", "density": 0.1, "true_share": 0.1}, 150),
    ],
)
def test_the_tests_have_the_planned_power(settings, n):
    check = simulated_power(Design(n_features=1024, **settings), n_prompts=n, n_worlds=10, seed=2)
    assert 0.3 < check.planned < 0.99
    assert check.power_low <= check.planned <= check.power_high
    assert check.power_high - check.power_low < 0.25
    assert check.error_rate <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 10)


@pytest.mark.parametrize(("effect", "runs", "control"), [(0.3, 3, "fdr"), (0.15, 3, "none"), (0.4, 5, "fwer")])
def test_the_run_level_test_has_the_planned_power(effect, runs, control):
    design = Design(effect=effect, control=control, n_features=2048, true_share=0.05)
    check = simulated_run_power(design, runs=runs, n_prompts=1000, n_worlds=60, seed=3)
    assert check.power_low <= check.planned <= check.power_high
    assert check.power_high - check.power_low < 0.1


def test_the_arms_become_one_sample():
    a, b = np.random.default_rng(0).normal(size=(2, 4, 6))
    expected = stats.ttest_ind(a, b)
    assert stats.ttest_1samp(arms_as_units(a, b), 0).statistic == pytest.approx(expected.statistic)
    with pytest.raises(InputError, match="the same runs"):
        arms_as_units(a, b[:3])


def test_exact_floors_of_the_permutation():
    by_runs = {runs: run_power(replace(ONE, effect=2.0), runs=runs, n_prompts=1000) for runs in (1, 3, 4)}
    assert by_runs[3].floor == pytest.approx(0.1)
    assert by_runs[4].floor == pytest.approx(2 / 70)
    assert by_runs[3].power_permutation == 0
    assert by_runs[3].verdict == "permutation of 3 against 3 runs is impossible: its smallest p is 0.1, 0.05 needed"
    assert by_runs[4].verdict == ""
    assert by_runs[4].power_permutation > 0.99
    assert np.isnan(by_runs[1].power_moderated)
    assert by_runs[1].verdict.startswith("one run per arm: any difference may be that of two runs")


def test_more_prompts_do_not_replace_runs():
    design = Design(effect=0.1, control="none")
    few, many = (run_power(design, runs=3, n_prompts=n, run_sd=0.1).power_moderated for n in (1000, 10**8))
    assert few < many < 0.25
    assert required_runs(design, n_prompts=10**8, run_sd=0.1).runs > 10
    with pytest.raises(NotEstimableError, match="needs more than 200 runs per arm"):
        required_runs(replace(design, effect=0.001), n_prompts=1000, run_sd=0.1)


def test_the_same_seed_the_same_check():
    design = Design(effect=0.3, n_features=700, true_share=0.05)
    one, two = (simulated_power(design, n_prompts=100, n_worlds=2, seed=5) for _ in range(2))
    assert one == two
    assert one != simulated_power(design, n_prompts=100, n_worlds=2, seed=6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Design(effect=0.0), InputError, "effect > 0"),
        (lambda: Design(effect=0.6), InputError, r"d_z=0.6 cannot occur at density 0.25: .* stays below 0.58"),
        (lambda: Design(control="both"), InputError, "control must be one of fdr, fwer, none, got 'both'"),
        (lambda: Design(true_share=0.0), InputError, "true_share and density in"),
        (
            lambda: power_at(Design(cluster_size=10), n_prompts=19),
            InputError,
            "19 prompts in clusters of 10 make 1 unit",
        ),
        (lambda: required_prompts(ONE, power=1.0), InputError, r"power must lie in \(0, 1\), got 1.0"),
        (lambda: required_prompts(replace(ONE, effect=1e-5)), NotEstimableError, "needs more than 134,217,728 prompts"),
        (lambda: run_power(ONE, runs=0, n_prompts=10), InputError, "expected runs >= 1"),
        (lambda: simulated_power(ONE, n_prompts=50, n_worlds=1), InputError, "at least two worlds, got 1"),
        (lambda: simulated_run_power(ONE, n_prompts=50, runs=1), InputError, "at least two worlds and two runs"),
        (
            lambda: simulated_power(Design(effect=0.1, cluster_size=10, n_features=8), n_prompts=50, n_worlds=2),
            RefusedError,
            "clusters",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
