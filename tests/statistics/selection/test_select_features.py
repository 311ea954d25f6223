from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.toolkit.statistics import SelectionRule, SelectionTests, select_features

MODELS = ["base@0", "rl@10"]
TASKS = ["math", "quiz", "facts", "noise"]


@pytest.fixture
def world(gain_world):
    return gain_world


def run(features, outcomes, *, n_resamples=199, n_bootstrap=199, **options):
    tests = SelectionTests(n_resamples=n_resamples, n_bootstrap=n_bootstrap)
    defaults = {"target": "rl@10", "controls": ["noise"], "tests": tests, "seed": 2}
    return select_features(features, outcomes, **(defaults | options))


def test_layout_and_planted_truth(world):
    out = validate(run(*world(everywhere=True)), "selection")
    rises = [0, 1, 2, 3, 4, 15, 16, 17, 18, 19]
    assert np.flatnonzero(out.tier == "CONFIRMED").tolist() == rises
    assert np.flatnonzero(out.selected).tolist() == rises
    assert out.attrs["rule"] == "CONFIRMED"
    # What follows correctness looks perfect on the chosen prompts; only the guard stops it.
    used = out.sel(task=["math", "quiz", "facts"])
    assert np.all(used.p_flip.values[:, 10:15] < 0.01)
    assert np.all(used.kept.values[:, 10:15])
    assert np.all(out.paper_selected.values[10:15])
    assert np.all(used.contrast_p.values[:, 10:15].max(axis=0) > 0.05)
    # What rises everywhere is for the edit, not for the claim.
    assert np.flatnonzero(out.specific_tier == "CONFIRMED").tolist() == [0, 1, 2, 3, 4]
    assert np.all(used.excess_p.values[:, 15:20].max(axis=0) > 0.05)
    assert np.all(out.specific_tier.values[5:30] == "REJECTED")
    assert np.all((out.verification_low < 1.5 * 0.34)[:5] & (out.verification_high > 1.5 * 0.34)[:5])
    assert json.loads(out.attrs["guard"]) == dict.fromkeys(["math", "quiz", "facts"], "contrast")
    assert out.role.values.tolist() == ["in_domain", "out_of_domain", "out_of_domain", "control"]
    assert out.used.values.tolist() == [True, True, True, False]
    assert out.estimable.values[3].startswith("no")
    assert np.isnan(out.score.sel(task="noise")).all()


def test_numbers_against_loops(world):
    features, outcomes = world()
    out = run(features, outcomes)
    d = (features["mean"][1] - features["mean"][0]).values
    base, rl = outcomes.greedy_correct.values
    in_task = (features.task.values == "quiz") & (features.split.values == "selection")
    gain, loss = in_task & (base == 0) & (rl == 1), in_task & (base == 1) & (rl == 0)
    got = out.sel(task="quiz")
    assert (int(got.n_gain), int(got.n_loss), int(got.n_selected_prompts)) == (gain.sum(), loss.sum(), in_task.sum())
    assert got.score.values == pytest.approx(d[gain].mean(axis=0))
    assert np.array_equal(got.kept.values, got.score.values >= 0.2 * got.score.values.max())
    kept = in_task & (base == 1) & (rl == 1)
    means = [d[rows].mean(axis=0) for rows in (gain, loss, kept)]
    assert got.excess.values == pytest.approx(means[0] - means[2])
    assert got.contrast.values == pytest.approx(means[0] + means[1])
    assert got.p_guard.values == pytest.approx(got.contrast_p)
    # Welch's test is the limit of the sign flips.
    parts = (d[gain], d[loss], d[kept])
    np.testing.assert_allclose(got.contrast_p.values, _welch(parts, (1, 1, 0)), atol=0.03)
    excess_p = np.maximum(_welch(parts, (1, 0, -1)), _welch(parts, (1, 1, -2)))
    np.testing.assert_allclose(got.excess_p.values, excess_p, atol=0.03)
    verified = (features.split.values == "verification") & (features.task.values != "noise")
    assert out.verification_effect.values == pytest.approx(d[verified].mean(axis=0))
    assert out.p_value.values == pytest.approx(
        np.maximum(out.p_flip, out.p_guard).sel(task=["math", "quiz", "facts"]).values.max(axis=0)
    )
    assert out.specific_p.values == pytest.approx(
        np.maximum(out.p_flip, np.maximum(out.p_guard, out.excess_p))
        .sel(task=["math", "quiz", "facts"])
        .values.max(axis=0)
    )


def _welch(groups, weights):
    estimate = sum(w * x.mean(axis=0) for x, w in zip(groups, weights, strict=True))
    error = np.sqrt(sum(w * w * x.var(axis=0, ddof=1) / len(x) for x, w in zip(groups, weights, strict=True)))
    return stats.norm.sf(estimate / error)


def test_families_are_all_features_and_then_all_candidates(world):
    out = run(*world())
    assert out.q_value.values == pytest.approx(stats.false_discovery_control(out.p_value.values))
    assert not np.allclose(out.q_value, out.p_value)
    candidate = out.tier.values != "REJECTED"
    p = out.verification_p.values
    assert np.array_equal(np.isfinite(p), candidate)
    ranked = np.argsort(p[candidate])
    m = candidate.sum()
    holm = np.maximum.accumulate([min(1.0, (m - i) * p[candidate][k]) for i, k in enumerate(ranked)])
    assert out.verification_q.values[candidate][ranked] == pytest.approx(holm)


def test_effects_never_come_from_selection_prompts(world):
    features, outcomes = world()
    chosen = np.flatnonzero(features.split.values == "selection")
    verification = np.flatnonzero(features.split.values == "verification")
    poisoned = features.copy(deep=True)
    poisoned["mean"][1, chosen] += 50
    a, b = run(features, outcomes), run(poisoned, outcomes)
    for name in ("verification_effect", "verification_low", "verification_high", "verification_score"):
        np.testing.assert_array_equal(a[name].values, b[name].values)
    np.testing.assert_array_equal(a.verification_task_effect.values, b.verification_task_effect.values)
    assert np.nanmax(np.abs(b.verification_effect)) < 2 < np.nanmax(b.score)
    other = features.copy(deep=True)
    other["mean"][1, verification] -= 50
    c = run(other, outcomes)
    for name in ("score", "kept", "p_flip", "contrast_p", "p_value", "q_value"):
        np.testing.assert_array_equal(a[name].values, c[name].values)
    assert not (c.tier == "CONFIRMED").any()


def test_without_the_guard_confounded_features_pass(make_features, make_outcomes):
    """docs/method.md 4c: no model difference at all, activation-correctness correlation about .1."""
    rng = np.random.default_rng(1)
    n, f = 4000, 300
    right = (rng.random((2, n)) < 0.5).astype(int)
    mean = 5 + rng.normal(0, 1, (2, n, f)) + 0.2 * right[..., None]
    r = np.corrcoef(mean[0, :, 0], right[0])[0, 1]
    assert 0.05 < r < 0.15
    out = run(
        make_features(mean, MODELS), make_outcomes(right, MODELS), controls=[], n_resamples=399, n_bootstrap=1
    ).isel(task=0)
    band = 3 * np.sqrt(0.05 * 0.95 / f)
    assert (out.p_flip <= 0.05).mean() > 0.8
    assert (out.contrast_p <= 0.05).mean() <= 0.05 + band
    assert out.attrs["p_n1"] < 0.05  # the paper's own null is fooled as well
    assert (out.tier == "CONFIRMED").sum() == 0


def test_without_losses_all_prompts_and_the_excess_guard(world):
    features, outcomes = world(losses=False, everywhere=True)
    out = run(features, outcomes)
    assert json.loads(out.attrs["guard"]) == dict.fromkeys(["math", "quiz", "facts"], "all prompts")
    assert np.isnan(out.contrast_p).all()
    assert str(out.contrast_estimable.values[0]).startswith("no: ")
    assert "0 losses" in str(out.contrast_estimable.values[0])
    tier = out.specific_tier.values
    assert np.all(tier[:5] == "CONFIRMED")
    assert np.all(tier[15:20] == "REJECTED"), "an equal rise on all prompts is no rise where rl gained"
    assert np.all(out.tier.values[15:20] == "CONFIRMED"), "by gains and all prompts alone they would have been claimed"
    assert out.attrs["accompanying_p"] < 0.05


def test_what_merely_accompanies_right_answers_is_told_as_a_set(make_features, make_outcomes):
    """Without losses single features cannot be told apart; of the set, the level where rl gained can be."""
    n, f = 600, 10
    p = {"follows": [], "changed": []}
    for seed in range(12):
        rng = np.random.default_rng(seed)
        base = (rng.random(n) < 0.5).astype(int)
        right = np.stack([base, np.maximum(base, (rng.random(n) < 0.7).astype(int))])
        for name, values in p.items():
            mean = 5 + rng.normal(0, 1, (1, n, f)) + rng.normal(0, 0.5, (2, n, f))
            if name == "follows":
                mean[..., :4] += right[..., None]
            else:
                mean[1, (base == 0) & (right[1] == 1), :4] += 1.0
            data = make_features(mean, MODELS), make_outcomes(right, MODELS)
            out = run(*data, controls=[], n_resamples=9, n_bootstrap=0, stability=None)
            assert np.flatnonzero(out.specific_tier == "CONFIRMED").tolist() == [0, 1, 2, 3]
            values.append(out.attrs["accompanying_p"])
    assert max(p["changed"]) < 0.001
    assert stats.kstest(p["follows"], "uniform").pvalue > 0.01


def test_an_equal_rise_is_twice_in_the_contrast_and_not_in_the_excess(world):
    out = run(*world(everywhere=True))
    used = out.sel(task=["math", "quiz", "facts"])
    assert used.contrast.values[:, 15:20].mean() == pytest.approx(1.6, abs=0.15)
    assert used.excess.values[:, 15:20].mean() == pytest.approx(0, abs=0.1)
    assert used.contrast.values[:, 10:15].mean() == pytest.approx(0, abs=0.15)
    assert used.excess.values[:, 10:15].mean() == pytest.approx(0.8, abs=0.1)
    assert used.contrast.values[:, :5].mean() == pytest.approx(1.5, abs=0.15)


def test_rising_and_following_correctness_at_once_is_not_specific(world):
    """Contrast and excess are each fooled; only gains and losses against twice the prompts both get right are not."""
    features, outcomes = world()
    features["mean"][1, :, 10:15] += 0.8
    out = run(features, outcomes)
    assert np.all(out.tier.values[10:15] == "CONFIRMED")
    assert np.all(out.specific_tier.values[10:15] == "REJECTED")


TOO_FEW = "no: 20 gains and 5 both right, 6 of each needed"


@pytest.mark.parametrize(
    ("n_kept", "state", "confirming"), [(10, TOO_FEW, TOO_FEW), (11, "yes", TOO_FEW), (12, "yes", "yes")]
)
def test_what_base_seldom_gets_right_can_be_edited_but_not_claimed(
    make_features, make_outcomes, n_kept, state, confirming
):
    rng = np.random.default_rng(5)
    right = np.zeros((2, 80), dtype=int)  # prompts alternate between the parts of the split
    right[1, :40] = 1
    right[:, 40 : 40 + n_kept] = 1
    mean = 5 + rng.normal(0, 1, (2, 80, 8))
    mean[1, :, :2] += 4
    out = run(make_features(mean, MODELS), make_outcomes(right, MODELS), controls=[], n_bootstrap=0)
    assert np.flatnonzero(out.tier == "CONFIRMED").tolist() == [0, 1]
    assert out.estimable.values.tolist() == ["yes"]
    assert out.excess_estimable.values.tolist() == [state]
    assert out.verification_excess_estimable.values.tolist() == [confirming]
    assert np.isfinite(out.specific_p).all() == (state == "yes")
    assert np.all(np.isin(out.specific_tier, ["REJECTED"] if state == "yes" else ["UNTESTED"]))


def test_the_fallback_guard_holds_without_a_model_difference(make_features, make_outcomes):
    rng = np.random.default_rng(3)
    n, f = 600, 300
    base = (rng.random(n) < 0.3).astype(int)
    rl = np.maximum(base, (rng.random(n) < 0.7).astype(int))
    mean = 5 + rng.normal(0, 1, (2, n, f))
    out = run(make_features(mean, MODELS), make_outcomes(np.stack([base, rl]), MODELS), controls=[]).isel(task=0)
    assert str(out.guard.item()) == "all prompts"
    assert (out.p_value <= 0.05).mean() <= 0.05
    assert not (out.tier == "CONFIRMED").any()


def test_null_calibration_of_the_whole_selection(world):
    """Nothing planted: any candidate is false; at BH level .05 few studies have one."""
    any_candidate = [bool((run(*world(planted=False, n=320, seed=s)).tier != "REJECTED").any()) for s in range(12)]
    assert sum(any_candidate) <= 3


def test_a_task_without_gains_is_not_estimable_and_the_rest_goes_on(world):
    features, outcomes = world()
    outcomes["greedy_correct"][1, outcomes.task.values == "facts"] = 0
    out = validate(run(features, outcomes), "selection")
    assert str(out.estimable.sel(task="facts").item()) == "no: 0 base-wrong/target-right prompts"
    assert np.isnan(out.p_flip.sel(task="facts")).all()
    assert np.flatnonzero(out.tier == "CONFIRMED").tolist() == [0, 1, 2, 3, 4]
    assert out.attrs["u"] == [2, 2]


def test_a_task_with_few_gains_is_scored_but_not_tested(world):
    features, outcomes = world()
    where = np.flatnonzero((outcomes.task.values == "facts") & (features.split.values == "selection"))
    gains = where[(outcomes.greedy_correct.values[:, where] == [[0], [1]]).all(axis=0)]
    outcomes["greedy_correct"][1, gains[3:]] = 0
    out = run(features, outcomes)
    assert str(out.estimable.sel(task="facts").item()).startswith("score only: 3")
    assert np.isfinite(out.score.sel(task="facts")).all()
    assert np.isnan(out.p_flip.sel(task="facts")).all()


def test_nothing_estimable_is_a_result(world):
    features, outcomes = world(gains=False)
    out = validate(run(features, outcomes), "selection")
    assert not out.selected.any()
    assert not out.paper_selected.any()
    assert np.isnan(out.p_value).all()
    assert np.isnan(out.q_value).all()
    assert np.all(out.tier == "UNTESTED")
    assert np.all(out.flag == "not_estimable")
    assert out.attrs["rule"].startswith("nothing selected")
    assert out.attrs["n_paper"] == 0
    assert np.isnan(out.attrs["p_n1"])


def test_what_is_selected_when_nothing_is_confirmed(world):
    features, outcomes = world()
    verification = np.flatnonzero(features.split.values == "verification")
    features["mean"][1, verification, :5] -= 0.6
    out = run(features, outcomes)
    assert out.attrs["rule"].startswith("CANDIDATE")
    assert np.flatnonzero(out.selected).tolist() == [0, 1, 2, 3, 4]
    paper = run(features, outcomes, rule="paper")
    assert paper.attrs["rule"].startswith("paper")
    xr.testing.assert_identical(paper, run(features, outcomes, rule=SelectionRule(kind="paper")))
    with pytest.raises(InputError, match="expected rule 'confirmed' or 'paper'"):
        run(features, outcomes, rule="candidate")
    np.testing.assert_array_equal(paper.selected.values, paper.paper_selected.values)
    capped = run(features, outcomes, rule=SelectionRule(kind="paper", max_features=3))
    least = np.where(capped.paper_selected, capped.score.min("task"), -np.inf)
    assert set(np.flatnonzero(capped.selected)) == set(np.argsort(-least)[:3])


def test_untestable_features_are_in_no_family(world):
    features, outcomes = world()
    whole = run(features, outcomes)
    dead = features.copy(deep=True)
    dead["mean"][:, :, 29] = 0
    dead["firing"][:, :, 29] = 0
    out = run(dead, outcomes)
    assert str(out.flag.values[29]) == "untestable"
    assert np.isnan(out.p_value.values[29])
    assert out.attrs["family_size"] == 29
    np.testing.assert_array_equal(out.p_value.values[:29], whole.p_value.values[:29])


@pytest.mark.parametrize(("n", "most"), [(9, 1), (10, 1), (20, 2), (100, 10)])
def test_a_compact_set_is_at_most_a_tenth_of_the_testable_features(world, n, most):
    features, outcomes = world()
    features = features.isel(feature=np.arange(n) % features.sizes["feature"]).assign_coords(feature=np.arange(n))
    out = run(features, outcomes, n_resamples=19, n_bootstrap=19)
    assert out.attrs["family_size"] == n
    assert out.attrs["most_features"] == most


def test_one_mechanism_is_said(make_features, make_outcomes):
    rng = np.random.default_rng(5)
    direction = rng.exponential(1, 40)
    base = rng.normal(5, 1, (400, 40))
    mean = np.stack([base, base + direction + rng.normal(0, 0.1, base.shape)])
    greedy = np.stack([np.zeros(400), np.ones(400)])
    tasks = {"tasks": ["a", "b"], "domains": {"a": "in", "b": "out"}}
    out = run(
        make_features(mean, MODELS, **tasks),
        make_outcomes(greedy, MODELS, **tasks),
        controls=[],
    )
    assert out.attrs["score_correlation"] > 0.99
    assert out.attrs["one_mechanism"]
    assert out.attrs["shift_rank"] < 1.1
    d = (mean[1] - mean[0])[(np.arange(400) // 2) % 2 == 0]
    s = np.linalg.svd(d, compute_uv=False) ** 2
    assert out.attrs["shift_rank"] == pytest.approx(s.sum() ** 2 / (s**2).sum(), rel=1e-6)


@pytest.mark.parametrize("chunk", [4, 11])
def test_chunks_change_nothing(world, chunk):
    a, b = run(*world(n=400)), run(*world(n=400, chunk=chunk))
    xr.testing.assert_allclose(a, b, rtol=1e-9)
    assert a.attrs["split_hash"] == b.attrs["split_hash"]
    assert a.attrs["p_n1"] == b.attrs["p_n1"]


def test_split_hash_knows_sides_not_order(world):
    features, outcomes = world(n=400)
    a = run(features, outcomes, n_bootstrap=1)
    shuffled = features.isel(prompt=np.random.default_rng(0).permutation(400))
    b = run(shuffled, outcomes, n_bootstrap=1)
    assert a.attrs["split_hash"] == b.attrs["split_hash"]
    np.testing.assert_allclose(a.score.sel(task=TASKS).values, b.score.sel(task=TASKS).values)
    moved = features.assign_coords(split=("prompt", np.where(np.arange(400) < 200, "selection", "verification")))
    assert run(moved, outcomes, n_bootstrap=1).attrs["split_hash"] != a.attrs["split_hash"]


def test_clusters_are_the_units(world):
    out = run(*world(n=1600, per_cluster=8), clusters="cluster")
    assert out.attrs["unit"] == "cluster"
    assert set(range(5)) <= set(np.flatnonzero(out.tier != "REJECTED"))


def test_errors(world):
    features, outcomes = world(n=80)
    with pytest.raises(RefusedError, match="contribution scale"):
        run(features.assign_attrs(scale="raw"), outcomes)
    with pytest.raises(RefusedError, match="unit='token'"):
        run(features, outcomes, unit="token")
    with pytest.raises(InputError, match="task 'history' is not in the data"):
        run(features, outcomes, tasks=["history"])
    with pytest.raises(InputError, match="task 'noise' cannot be selected on"):
        run(features, outcomes, tasks=["noise", "quiz"])
    with pytest.raises(InputError, match="model 'rl@99' is not in the data"):
        run(features, outcomes, target="rl@99")
    with pytest.raises(InputError, match="model 'rl@10' has no outcomes"):
        run(features, outcomes.sel(model=["base@0"]))
    with pytest.raises(InputError, match=r"40 prompt\(s\) of the features have no outcome"):
        run(features, outcomes.isel(prompt=slice(40)))
    for options in ({"kind": "best"}, {"score_fraction": 0.0}):
        with pytest.raises(InputError, match="expected rule 'confirmed' or 'paper' and 0 < score_fraction <= 1"):
            SelectionRule(**options)
    with pytest.raises(InputError, match="expected 0 < alpha < 1, got 1"):
        SelectionTests(alpha=1)
    with pytest.raises(InputError, match="split into"):
        run(features.assign_coords(split=("prompt", np.full(80, "train"))), outcomes)
