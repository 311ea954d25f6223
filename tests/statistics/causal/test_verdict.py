"""Verdicts on simulated outcome tables, where the truth is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.intervention import OutcomeTable, judge
from rlgen_stats.toolkit.statistics.causal.criteria import (
    FEWEST_RANDOM,
    FutilityRule,
    dose_order,
    effect_shown,
    over_steered,
    specificity,
)
from rlgen_stats.toolkit.statistics.causal.findings import Check, Decision, holds, of_check
from rlgen_stats.toolkit.statistics.causal.outcome_table import PairedEffect, ending_of, paired_effect
from rlgen_stats.toolkit.statistics.causal.verdict import decide
from rlgen_stats.toolkit.statistics.kernels import bounded_interval
from tests.statistics.causal.worlds import (
    EMPTY,
    N_TARGET,
    N_UNRELATED,
    RIGHT,
    SETTINGS,
    WRONG,
    amplified,
    causal,
    with_endings,
    world,
)


def codes(reasons: tuple[str, ...]) -> set[str]:
    return {reason.split(":")[0] for reason in reasons}


def test_a_planted_cause_is_specific() -> None:
    verdict = judge(causal(), SETTINGS)
    assert verdict.verdict == "CAUSAL_SPECIFIC"
    assert all(verdict.requirements.values())
    assert verdict.rank_p == pytest.approx(1 / 40)
    assert verdict.v5.startswith("3 of 3 tasks")
    assert verdict.v5.endswith("One dictionary: not replicated in another")
    assert verdict.effects.mean[3] == pytest.approx(-0.4, abs=0.08)


def test_a_planted_cause_is_specific_when_amplifying() -> None:
    verdict = judge(amplified(causal(rl=0.5, right={"set": 0.9}, base=0.9)), SETTINGS)
    assert verdict.verdict == "CAUSAL_SPECIFIC", verdict.reasons
    assert verdict.effects.mean[3] > 0.3


def test_everything_hurts_is_nonspecific() -> None:
    verdict = judge(causal(random_right=lambda draw: 0.5 + 0.1 * draw.standard_normal()), SETTINGS)
    assert verdict.verdict == "CAUSAL_NONSPECIFIC"
    assert not verdict.requirements["v2"]


def test_a_significant_but_tiny_effect_does_not_count() -> None:
    table = world(fresh_noise=False)
    ending = table.ending.copy()
    right = np.flatnonzero(ending[table.chosen, :N_TARGET, 0] == RIGHT)
    ending[table.chosen, right[:8], 0] = WRONG  # 8 of 300 lost, none gained
    verdict = judge(with_endings(table, ending), SETTINGS)
    assert verdict.effects.p_value[table.chosen] < 0.01
    assert not verdict.requirements["v1"]


@pytest.mark.parametrize(("n_tied", "verdict"), [(14, "INCONCLUSIVE"), (15, "CAUSAL_NONSPECIFIC")])
def test_ties_count_for_the_controls(n_tied: int, verdict: str) -> None:
    """Of 39 random sets 14 that do as much leave room for a share of 25%, 15 do not."""
    table = causal(n_random=39)
    ending = table.ending.copy()
    ending[table.where("random")[:n_tied]] = ending[table.chosen]
    judged = judge(with_endings(table, ending), SETTINGS)
    assert judged.rank_p == pytest.approx((1 + n_tied) / 40)
    assert judged.verdict == verdict


def test_a_rank_just_above_alpha_does_not_show_that_random_sets_do_as_much() -> None:
    """5 of 99 random sets are as large, 94 do nothing: p = .06 was called CAUSAL_NONSPECIFIC."""
    table = causal(n_random=99)
    ending = table.ending.copy()
    ending[table.where("random")[:5]] = ending[table.chosen]
    judged = judge(with_endings(table, ending), SETTINGS)
    assert judged.rank_p == pytest.approx(0.06)
    assert (judged.verdict, judged.decision) == ("INCONCLUSIVE", Decision.V2_NOT_SHOWN)


def test_a_model_that_only_stops_is_destroyed() -> None:
    verdict = judge(causal(set_fails=EMPTY, right={"set": 0.3}, kl={"set": 3.0}), SETTINGS)
    assert verdict.verdict == "DESTRUCTIVE"
    assert "v6_destroyed" in codes(verdict.reasons)
    assert verdict.requirements["v1"]
    assert verdict.requirements["v2"], "random sets leave the model alone: without V6 this would pass"


def test_a_destroyed_model_is_recognised_though_unrelated_tasks_suffer_too() -> None:
    verdict = judge(causal(set_fails=EMPTY, right={"set": 0.3}, unrelated_drop=0.3, kl={"set": 3.0}), SETTINGS)
    assert not verdict.requirements["v4"]
    assert verdict.verdict == "DESTRUCTIVE"


def test_wrong_answers_where_base_rambles_are_no_cause() -> None:
    """The format stays, but the failure is not base's: the set broke knowledge, not the gate."""
    assert judge(causal(set_fails=WRONG), SETTINGS).verdict == "DESTRUCTIVE"


def test_moving_away_from_base_is_no_cause() -> None:
    verdict = judge(causal(kl={"set": 1.5}), SETTINGS)
    assert verdict.verdict == "DESTRUCTIVE"
    assert "v6_failed" in codes(verdict.reasons)


@pytest.mark.parametrize(("high", "verdict"), [(-0.101, "DESTRUCTIVE"), (-0.1, "INCONCLUSIVE"), (0.2, "INCONCLUSIVE")])
@pytest.mark.parametrize("open_question", [Check.V1_EFFECT, Check.V2_CONTROLS])
def test_moving_away_refutes_the_claim_whatever_else_is_open(high: float, verdict: str, open_question: Check) -> None:
    """An effect that is not shown, or random sets that cannot be compared, do not undo what the divergence shows."""
    shown = {row.check: row for row in judge(causal(kl={"set": 1.5}), SETTINGS).findings}
    shown[open_question] = replace(shown[open_question], passed=False)
    shown[Check.V6_AWAY] = replace(shown[Check.V6_AWAY], high=high)
    earlier = {  # which kept one interval for all dictionaries
        Check.V6_KL: replace(shown[Check.V6_KL], high=high),
        Check.V6_AWAY: replace(shown[Check.V6_AWAY], high=np.nan),
    }
    shown[Check.V6_KL] = replace(shown[Check.V6_KL], high=0.0)
    assert decide(tuple((shown | earlier).values()))[0] == (
        verdict if open_question is Check.V1_EFFECT else "DESTRUCTIVE"
    )
    if open_question is Check.V1_EFFECT:
        assert decide(tuple(shown.values()))[0] == verdict
    else:  # with an effect, not to move toward the other model is enough
        assert decide(tuple(shown.values())) == ("DESTRUCTIVE", Decision.V6_FAILED)
    not_away = shown | {Check.V6_AWAY: replace(shown[Check.V6_AWAY], passed=False)}
    assert decide(tuple(not_away.values()))[0] == "INCONCLUSIVE"


def test_an_effect_that_random_sets_have_too_is_nonspecific_even_where_it_breaks_the_model() -> None:
    table = causal(n_random=39, kl={"set": 1.5})
    ending = table.ending.copy()
    ending[table.where("random")[:30]] = ending[table.chosen]
    assert judge(with_endings(table, ending), SETTINGS).verdict == "CAUSAL_NONSPECIFIC"


def test_no_change_is_no_effect() -> None:
    assert judge(world(seed=1, fresh_noise=False), SETTINGS).verdict == "NO_EFFECT"


def test_too_few_prompts_to_tell_is_inconclusive_even_when_nothing_changed() -> None:
    table = world(fresh_noise=False)
    few = np.zeros(len(table.target), dtype=bool)
    few[:20] = True
    verdict = judge(replace(table, target=few), SETTINGS)
    assert verdict.verdict == "INCONCLUSIVE", "no change on 20 prompts leaves room for a change on 14% of all prompts"


@pytest.mark.parametrize(
    ("changes", "settings", "code"),
    [
        ({"unrelated_drop": 0.2}, {}, "v4_failed"),
        ({"right": {"set": 0.5, "dose": 0.2}}, {}, "v3_failed"),
        ({"right": {"set": 0.5, "dose": 0.5}}, {}, "v3_failed"),
        ({"n_random": 5}, {}, "v2_not_estimable"),
        ({"n_random": 0}, {}, "v2_not_estimable"),
        ({}, {"comparable": False}, "v2_not_estimable"),
        ({}, {"noop_changed": 0.2}, "passthrough_not_noop"),
    ],
)
def test_what_is_missing_is_named(changes: dict[str, Any], settings: dict[str, Any], code: str) -> None:
    verdict = judge(causal(**changes), replace(SETTINGS, **settings))
    assert verdict.verdict == "INCONCLUSIVE"
    assert code in codes(verdict.reasons)
    assert verdict.requirements["v2"] == (code in ("v3_failed", "v4_failed", "passthrough_not_noop"))


@pytest.mark.parametrize(
    ("table", "verdict"),
    [
        (causal(), "CAUSAL_SPECIFIC"),
        (causal(kl={"set": 1.5}), "DESTRUCTIVE"),
        (world(seed=1, fresh_noise=False), "NO_EFFECT"),
    ],
)
def test_where_a_dictionary_has_no_set_nothing_is_decided(table: OutcomeTable, verdict: str) -> None:
    """Every dictionary has to say the same: one set of three that changes nothing is no equivalence of three."""
    assert judge(table, SETTINGS).verdict == verdict
    lacking = judge(table, replace(SETTINGS, missing=(2, 3)))
    assert (lacking.verdict, lacking.decision) == ("INCONCLUSIVE", Decision.V5_DICTIONARIES)


def test_without_unrelated_tasks_the_fix_is_named() -> None:
    table = causal()
    verdict = judge(replace(table, unrelated=np.zeros_like(table.unrelated)), SETTINGS)
    assert verdict.verdict == "INCONCLUSIVE"
    assert any("control_tasks" in reason for reason in verdict.reasons)


def test_divergence_on_neutral_text_counts_as_a_side_effect() -> None:
    table = causal()
    loud = table.neutral_kl.copy()
    loud[3] = 0.5
    assert not judge(replace(table, neutral_kl=loud), SETTINGS).requirements["v4"]
    everywhere = np.full_like(loud, 0.5)
    assert judge(replace(table, neutral_kl=everywhere), SETTINGS).requirements["v4"], "random sets do the same"


@pytest.mark.parametrize(
    ("of_set", "of_random", "kept"),
    [
        (0.1, 0.01, True),
        (0.101, 0.01, False),
        (0.4, [0.01] * 36 + [0.5] * 3, True),
        (0.4, [0.01] * 38 + [0.5], False),
        (0.56, [0.2 + 0.01 * i for i in range(39)], True),  # .2 + .01 * 36.1, a nineteen twentieth of 38, is .561
        (0.562, [0.2 + 0.01 * i for i in range(39)], False),
    ],
)
def test_neutral_text_may_move_as_far_as_a_tenth_of_a_nat_or_as_it_does_under_one_random_set_in_twenty(
    of_set: float, of_random: Any, kept: bool
) -> None:
    table = causal()
    neutral = table.neutral_kl.copy()
    neutral[table.chosen], neutral[table.where("random")] = of_set, of_random
    assert judge(replace(table, neutral_kl=neutral), SETTINGS).requirements["v4"] == kept


def test_broken_completions_on_unrelated_tasks_count_as_a_side_effect() -> None:
    table = causal()
    for share, kept in ((0.05, True), (0.06, False)):
        ending = table.ending.copy()
        wrong = np.flatnonzero(table.unrelated & (ending[table.chosen, :, 0] == WRONG))
        ending[table.chosen, wrong[: round(share * N_UNRELATED)], 0] = EMPTY
        assert judge(replace(table, ending=ending), SETTINGS).requirements["v4"] == kept, share


@pytest.mark.parametrize(("n_new", "verdict"), [(20, "CAUSAL_SPECIFIC"), (80, "DESTRUCTIVE")])
def test_new_failures_break_the_model_where_they_make_up_more_than_half_of_the_effect(n_new: int, verdict: str) -> None:
    table = causal(fresh_noise=False)
    lost = -table.change(table.target)[0, :, table.chosen].sum()
    assert 0.5 * lost < 80 < 0.9 * lost
    ending = table.ending.copy()
    failed = np.flatnonzero(table.target & (ending[table.chosen, :, 0] != RIGHT))
    ending[table.chosen, failed[:n_new], 0] = EMPTY
    assert judge(replace(table, ending=ending), SETTINGS).verdict == verdict


@pytest.mark.parametrize(("share", "verdict"), [(0.05, "CAUSAL_SPECIFIC"), (0.051, "INCONCLUSIVE")])
def test_a_passthrough_may_change_one_completion_in_twenty(share: float, verdict: str) -> None:
    assert judge(causal(), replace(SETTINGS, noop_changed=share)).verdict == verdict


def test_a_set_that_does_not_beat_one_vector_says_so() -> None:
    verdict = judge(causal(right={"set": 0.5, "steering": 0.45}), SETTINGS)
    assert {"does_not_beat_steering", "beats_random_direction"} <= codes(verdict.reasons)


def test_over_steering_is_reported() -> None:
    table = amplified(causal(rl=0.5, right={"set": 0.9, "fresh": 0.2}, base=0.9))
    conditions = tuple(replace(c, kind="dose", dose=4.0) if c.kind == "fresh" else c for c in table.conditions)
    table = replace(table, conditions=conditions)
    assert dose_order(table) == ([0, 6, 5, 4, 3], [1])
    assert "over_steering" in codes(judge(table, SETTINGS).reasons)


def test_clusters_are_the_unit() -> None:
    """Ten documents of thirty prompts each, all failing or none: ten units, not three hundred."""
    draw = np.random.default_rng(0)
    cluster = np.repeat(np.arange(10), 30).astype(str)
    hit = np.repeat(draw.permutation([1.0] * 5 + [0.0] * 5), 30)[:, None]
    effect = paired_effect(hit - 0.4, cluster, alpha=0.05, seed=0, n_resamples=999)
    naive = paired_effect(hit - 0.4, np.arange(300).astype(str), alpha=0.05, seed=0, n_resamples=999)
    assert effect.p_value[0] > 0.3
    assert naive.p_value[0] < 0.01
    _, low, high = bounded_interval(hit[::30] - 0.4, np.arange(10), alpha=0.05)
    assert (effect.low[0], effect.high[0]) == pytest.approx((low[0], high[0]))
    assert effect.high[0] - effect.low[0] > 5 * (naive.high[0] - naive.low[0])


def test_endings_split_answers_into_right_and_wrong() -> None:
    correct = np.array([[True, False], [False, True]])
    classes = np.array([["answer", "answer"], ["empty", "truncated"]])
    assert ending_of(correct, classes).tolist() == [[RIGHT, WRONG], [EMPTY, RIGHT]]
    with pytest.raises(InputError, match="hedge"):
        ending_of(correct, np.array([["answer", "hedge"], ["empty", "empty"]]))


def test_malformed_tables_are_refused() -> None:
    table = causal()
    with pytest.raises(InputError, match="exactly one arm of kind 'set'"):
        replace(table, conditions=tuple(replace(c, kind="random") if c.kind == "set" else c for c in table.conditions))
    with pytest.raises(InputError, match="outcomes must be"):
        replace(table, correct=table.correct[:, :5])
    with pytest.raises(InputError, match="got none"):
        replace(table, target=np.zeros_like(table.target))


def test_scoring_only_prompts_that_rl_gained_shows_an_effect_of_nothing() -> None:
    """The trap: prompts picked because base failed and RL succeeded regress when sampled again."""
    draw = np.random.default_rng(4)
    n = 4000
    skill = {"base": draw.beta(2, 3, n), "rl": draw.beta(3, 2, n)}
    first = {name: draw.random(n) < p for name, p in skill.items()}
    again = {name: draw.random(n) < p for name, p in skill.items()}
    picked = ~first["base"] & first["rl"]
    assert first["rl"][picked].mean() == 1.0
    assert again["rl"][picked].mean() < 0.75
    assert again["base"][picked].mean() > 0.25

    # the same fresh draws as the "edited" arm, on all prompts: nothing happened, and the verdict says so
    table = world(fresh_noise=False)
    rows = slice(0, N_TARGET)
    ending = table.ending.copy()
    for i in range(len(table.conditions)):
        answers = first["rl"] if i == 0 else draw.random(n) < skill["rl"]
        ending[i, rows, 0] = np.where(answers[rows], RIGHT, WRONG)
    honest = with_endings(table, ending)
    verdict = judge(honest, SETTINGS)
    assert verdict.verdict in ("INCONCLUSIVE", "NO_EFFECT")
    assert not verdict.requirements["v1"]
    trapped = replace(honest, target=honest.target & np.pad(picked[rows], (0, len(honest.target) - N_TARGET)))
    assert judge(trapped, SETTINGS).requirements["v1"], "selection by outcome manufactures an effect out of resampling"


def test_rank_p_values_of_stopped_controls_are_uniform() -> None:
    """Exchangeable controls: P(p <= a) <= a at every a, stopping included."""
    draw, n_planned, p_values = np.random.default_rng(0), 99, []
    table, settings = causal(n_random=n_planned), replace(SETTINGS, n_planned=n_planned)
    arms = {
        n: table.keep([c.name for c in table.conditions][: len(table.conditions) - n_planned + n])
        for n in range(FEWEST_RANDOM, n_planned + 1)
    }
    for _ in range(2000):
        effects = -draw.random(n_planned + 1)
        rule = FutilityRule("disable", n_planned=n_planned, alpha=0.05)
        rule.add("set", effects[0])
        for accuracy in effects[1:]:
            if rule.stop:
                break
            rule.add("random", accuracy)
        run = arms[rule.n_run]
        known = effects_of_set(run, effects[0], 0.1, 0.01)
        known.mean[run.where("random")] = effects[1 : rule.n_run + 1]
        p_values.append(specificity(run, known, settings)[0].p_value)
    for level in (0.01, 0.05, 0.1, 0.3, 0.6):
        share = np.mean(np.array(p_values) <= level)
        assert share <= level + 3 * np.sqrt(level * (1 - level) / 2000)
    assert np.mean(np.array(p_values) <= 0.05) > 0.03


def effects_of_set(table: OutcomeTable, mean: float, half: float, p_value: float) -> PairedEffect:
    """Made-up effects: the set's as given, every other arm's zero."""
    at = np.arange(len(table.conditions)) == table.chosen
    return PairedEffect(*(np.where(at, x, 0.0) for x in (mean, mean - half, mean + half)), np.where(at, p_value, 1.0))


@pytest.mark.parametrize(
    ("mean", "p_value", "passed", "opposite"),
    [(-0.3, 0.05, True, False), (-0.3, 0.051, False, False), (0.3, 0.001, False, True), (0.3, 0.2, False, False)],
)
def test_an_effect_needs_its_test_and_its_interval(mean: float, p_value: float, passed: bool, opposite: bool) -> None:
    table = causal()
    findings = effect_shown(table, effects_of_set(table, mean, 0.1, p_value), SETTINGS)
    assert holds(findings, "v1") == passed
    assert (of_check(findings, Check.V1_OPPOSITE) is not None) == opposite


@pytest.mark.parametrize(("n", "stopped"), [(FEWEST_RANDOM, 3 / 20), (FEWEST_RANDOM + 1, 2 / 20)])
def test_where_random_sets_were_stopped_the_rank_p_value_is_that_of_the_last_one(n: int, stopped: float) -> None:
    table = causal(n_random=n)
    effects = effects_of_set(table, -0.3, 0.1, 0.001)
    effects.mean[table.where("random")[[1, 3]]] = -0.3, -0.4
    for n_planned in (0, n):  # all that were planned were run
        assert specificity(table, effects, replace(SETTINGS, n_planned=n_planned))[0].p_value == 3 / (n + 1)
    assert specificity(table, effects, replace(SETTINGS, n_planned=99))[0].p_value == stopped


def test_doses_on_the_other_side_of_no_edit_are_not_beyond_the_main_one() -> None:
    table = causal()
    conditions = tuple(replace(c, kind="dose", dose=2.0) if c.kind == "fresh" else c for c in table.conditions)
    assert dose_order(replace(table, conditions=conditions)) == ([3, 4, 5, 6, 0], [])


def test_accuracy_on_unrelated_tasks_is_tested_one_sided() -> None:
    """Two of a hundred prompts lost and two gained: within the margin at one-sided, not at two-sided alpha."""
    table = causal()
    correct = table.correct.copy()
    unrelated = np.flatnonzero(table.unrelated)
    right = correct[table.unedited, unrelated, 0] == 1
    correct[:, unrelated] = correct[[table.unedited]][:, unrelated]
    correct[table.chosen, unrelated[right][:2]], correct[table.chosen, unrelated[~right][:2]] = 0.0, 1.0
    table = replace(table, correct=correct)
    assert judge(table, SETTINGS).requirements["v4"]
    assert not judge(table, replace(SETTINGS, alpha=0.025)).requirements["v4"]


def test_a_divergence_that_falls_by_chance_is_no_move_toward_the_other_model() -> None:
    table = causal()
    kl = table.kl_to_base.copy()
    step = np.where(np.arange(kl.shape[1]) % 2, 0.1, -0.1)
    step[1] = -0.1
    kl[table.chosen] = kl[table.unedited] + step
    assert (kl[table.chosen] - kl[table.unedited])[table.target].mean() < 0
    assert not judge(replace(table, kl_to_base=kl), SETTINGS).requirements["v6"]


def test_more_right_answers_than_the_other_model_gives_are_no_failures() -> None:
    table = amplified(causal(rl=0.5, right={"set": 0.9}, base=0.6))
    assert "v6_destroyed" not in codes(judge(table, SETTINGS).reasons)


@pytest.mark.parametrize(("change", "n_broken", "flagged"), [(0.0, 0, False), (-0.05, 0, True), (0.0, 30, True)])
def test_a_dose_beyond_the_main_one_over_steers_where_it_does_worse_or_breaks(
    change: float, n_broken: int, flagged: bool
) -> None:
    table = causal()
    conditions = tuple(replace(c, kind="dose", dose=-1.0) if c.kind == "fresh" else c for c in table.conditions)
    ending = table.ending.copy()
    ending[1, :n_broken] = EMPTY
    table = replace(table, conditions=conditions, ending=ending)
    effects = effects_of_set(table, -0.3, 0.1, 0.001)
    effects.mean[1] = -0.3 - change
    assert over_steered(table, effects, SETTINGS).tolist() == [i == 1 and flagged for i in range(len(conditions))]
