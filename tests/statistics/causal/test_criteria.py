"""Every constant that decides a criterion: one case just inside, one just outside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlgen_stats.schemas.errors import RefusedError
from rlgen_stats.toolkit.intervention import OutcomeTable, judge
from rlgen_stats.toolkit.statistics.causal.criteria import (
    FutilityRule,
    combined_rank_p,
    dose_order,
    dose_response,
    effect_shown,
    is_futile,
    no_effect,
    random_sets_do_as_much,
    side_effects,
    specificity,
)
from rlgen_stats.toolkit.statistics.causal.design import shortfalls
from rlgen_stats.toolkit.statistics.causal.findings import Check, Decision, Finding, Findings, holds, of_check, passed
from rlgen_stats.toolkit.statistics.causal.outcome_table import PairedEffect, paired_effect
from rlgen_stats.toolkit.statistics.causal.telling_words import telling_words, with_any_of
from rlgen_stats.toolkit.trial.plan import refuse_undecidable
from tests.statistics.causal.old_rules import invented_clusters
from tests.statistics.causal.worlds import EMPTY, RIGHT, SETTINGS, SILENT, amplified, causal, with_endings, world


def row(findings: Findings, check: Check) -> Finding:
    found = of_check(findings, check)
    assert found is not None
    return found


def set_effect(table: OutcomeTable, low: float, high: float) -> PairedEffect:
    """Made-up effects, the set's significant with this interval."""
    zeros = np.zeros(len(table.conditions))
    at = np.arange(len(zeros)) == table.chosen
    return PairedEffect(
        np.where(at, (low + high) / 2, 0.0), np.where(at, low, 0.0), np.where(at, high, 0.0), np.where(at, 0.001, 1.0)
    )


def losing(n_lost: int, *, on: Any, table: OutcomeTable, arm: int) -> OutcomeTable:
    """The table where an arm is the unedited one but for so many right completions lost among the masked prompts."""
    ending = table.ending.copy()
    ending[arm] = ending[table.unedited]
    lost = np.flatnonzero(on & (ending[arm, :, 0] == RIGHT))[:n_lost]
    ending[arm, lost, 0] = SILENT
    return with_endings(table, ending)


# -- V1 and its absence


@pytest.mark.parametrize(("high", "holds_"), [(-0.02 - 1e-6, True), (-0.02 + 1e-6, False)])
def test_the_interval_lies_beyond_the_least_effect(high: float, holds_: bool) -> None:
    table = causal()
    findings = effect_shown(table, set_effect(table, -0.5, high), SETTINGS)
    assert holds(findings, "v1") == holds_
    assert row(findings, Check.V1_EFFECT).bound == -0.02


@pytest.mark.parametrize(("lost", "agree"), [((), None), ((60,), None), ((60, 1), True), ((60, 0), False)])
def test_v1_needs_the_sign_of_the_effect_in_each_of_two_dictionaries(lost: tuple[int, ...], agree: bool | None) -> None:
    table = causal(fresh_noise=False)
    parts = tuple(losing(n, on=table.target, table=table, arm=table.chosen) for n in lost)
    if parts:
        correct, ending = (
            np.concatenate([getattr(one, name) for one in parts], axis=2) for name in ("correct", "ending")
        )
        table = replace(table, correct=correct, ending=ending, parts=parts)
    found = of_check(effect_shown(table, set_effect(table, -0.5, -0.1), SETTINGS), Check.V1_DICTIONARIES)
    assert (None if found is None else (found.passed, found.statistic)) == (
        None if agree is None else (agree, sum(n > 0 for n in lost))
    )


@pytest.mark.parametrize(("low", "high", "opposite"), [(-0.5, -0.1, True), (-0.5, 0.1, False), (0.1, 0.5, False)])
def test_a_loss_where_a_gain_is_predicted_is_the_opposite(low: float, high: float, opposite: bool) -> None:
    table = amplified(causal(rl=0.5, right={"set": 0.9}, base=0.9))
    findings = effect_shown(table, set_effect(table, low, high), SETTINGS)
    assert (of_check(findings, Check.V1_OPPOSITE) is not None) == opposite


@pytest.mark.parametrize(("n_lost", "inside"), [(8, True), (9, False)])
def test_no_effect_is_an_equivalence_test_one_sided_at_alpha(n_lost: int, inside: bool) -> None:
    """Of 300 prompts eight lost leave a loss of 5% improbable at one-sided .05, at one-sided .025 they do not."""
    table = world(fresh_noise=False)
    table = losing(n_lost, on=table.target, table=table, arm=table.chosen)
    findings = no_effect(table, SETTINGS)
    assert passed(findings, Check.NO_EFFECT) == inside, row(findings, Check.NO_EFFECT)
    assert not passed(no_effect(table, replace(SETTINGS, alpha=SETTINGS.alpha / 2)), Check.NO_EFFECT)


def test_an_edit_that_changes_nothing_has_no_effect_and_no_side_effects_on_sixty_prompts() -> None:
    """Unreachable while two invented clusters widened every interval: 0 of 8 trials."""
    table = world(fresh_noise=False, n_target=60, n_unrelated=60, unrelated=0.9)
    verdict = judge(table, SETTINGS)
    assert (verdict.verdict, verdict.decision) == ("NO_EFFECT", Decision.EQUIVALENT_TO_ZERO)
    assert verdict.requirements["v4"]
    fewer = judge(world(fresh_noise=False, n_target=58, n_unrelated=58, unrelated=0.9), SETTINGS)
    assert fewer.decision is Decision.V1_FAILED
    assert not fewer.requirements["v4"]


def test_a_true_effect_of_a_tenth_is_shown_on_twenty_eight_clusters_of_five() -> None:
    """One of every ten lost, in half of the clusters: two invented clusters at +-1 left it open."""
    change = np.zeros((140, 1))
    change[::10] = -1.0
    clusters = np.repeat(np.arange(28), 5).astype(str)
    effect = paired_effect(change, clusters, alpha=0.05, seed=0, n_resamples=999)
    old = invented_clusters(change[:, 0], np.repeat(np.arange(28), 5), alpha=0.05)
    assert old[1] > -0.02 > effect.high[0]
    assert effect.low[0] < -0.1 < effect.high[0]


# -- V2


@pytest.mark.parametrize(("share", "counted"), [(0.5, True), (0.5 - 0.05, False)])
def test_random_sets_do_as_much_from_half_of_the_effect_on(share: float, counted: bool) -> None:
    table = causal(fresh_noise=False)
    table = losing(100, on=table.target, table=table, arm=table.chosen)
    for arm in table.where("random")[:20]:
        table = losing(round(share * 100), on=table.target, table=table, arm=int(arm))
    found = row(random_sets_do_as_much(table, SETTINGS), Check.V2_RANDOM_SETS)
    assert found.statistic == pytest.approx(20 / 39 if counted else 0.0)
    assert found.passed == counted


@pytest.mark.parametrize(("n_as_much", "shown"), [(8, False), (9, True)])
def test_nine_of_nineteen_show_that_more_than_a_quarter_do_as_much(n_as_much: int, shown: bool) -> None:
    table = causal(n_random=19)
    ending = table.ending.copy()
    ending[table.where("random")[:n_as_much]] = ending[table.chosen]
    table = with_endings(table, ending)
    found = row(random_sets_do_as_much(table, SETTINGS), Check.V2_RANDOM_SETS)
    assert found.low == pytest.approx(0.2737 if shown else 0.2297, abs=1e-3)  # Clopper and Pearson, one-sided .05
    assert found.passed == shown
    assert (judge(table, SETTINGS).verdict == "CAUSAL_NONSPECIFIC") == shown


@pytest.mark.parametrize(("n_run", "stop"), [(19 - 1, False), (19, True)])
def test_random_sets_are_not_stopped_before_enough_were_run(n_run: int, stop: bool) -> None:
    rule = FutilityRule("disable", n_planned=99, alpha=0.05)
    rule.add("set", 0.5)
    for _ in range(n_run):
        rule.add("random", 0.4)
    assert rule.stop == stop


@pytest.mark.parametrize(("accuracy", "n_as_large"), [(0.49, 1), (0.5, 1), (0.51, 0)])
def test_a_random_set_that_leaves_the_same_accuracy_is_as_large(accuracy: float, n_as_large: int) -> None:
    rule = FutilityRule("disable", n_planned=99, alpha=0.05)
    rule.add("set", 0.5)
    rule.add("random", accuracy)
    assert (rule.n_run, rule.n_as_large) == (1, n_as_large)


@pytest.mark.parametrize(("n", "n_planned", "futile"), [(4, 99, False), (5, 99, True), (4, 98, True), (0, 19, False)])
def test_a_rank_is_hopeless_once_it_must_exceed_alpha(n: int, n_planned: int, futile: bool) -> None:
    """Five of a hundred, the set among them, are .05; five of ninety-nine are more."""
    assert is_futile(n, n_planned, 0.05) == futile


@pytest.mark.parametrize(("n_random", "known"), [(18, False), (19, True)])
def test_the_rank_among_eighteen_says_nothing_at_a_twentieth(n_random: int, known: bool) -> None:
    table = causal(n_random=n_random)
    ranks = specificity(table, set_effect(table, -0.5, -0.1), SETTINGS)
    assert row(ranks, Check.V2_RANK).p_value == 1 / (n_random + 1)
    assert row(ranks, Check.V2_RANK).passed is (True if known else None)


@pytest.mark.parametrize(("second", "shown"), [(4, False), (5, True)])
def test_random_sets_do_as_much_in_each_of_two_dictionaries(second: int, shown: bool) -> None:
    """Of nineteen 16 do as much, and in the other dictionary 4 or 5, a quarter being 4.75."""
    table = causal(n_random=19)
    parts = []
    for n in (16, second):
        ending = table.ending.copy()
        ending[table.where("random")] = ending[table.unedited]
        ending[table.where("random")[:n]] = ending[table.chosen]
        parts.append(with_endings(table, ending))
    found = row(random_sets_do_as_much(replace(table, parts=tuple(parts)), SETTINGS), Check.V2_RANDOM_SETS)
    assert (found.n, found.statistic) == (38, pytest.approx((16 + second) / 38))
    assert found.low > 0.25
    assert found.passed == shown


def test_one_rank_p_value_stays_as_it_is() -> None:
    assert combined_rank_p([1.0]) == 1.0
    assert combined_rank_p([0.05, 0.4]) > 0.1


# -- V3


@pytest.mark.parametrize(("n_doses", "known"), [(3 - 1, False), (3, True)])
def test_a_dose_response_needs_three_intermediate_doses(n_doses: int, known: bool) -> None:
    table = causal()
    doses = [table.conditions[i].name for i in table.where("dose")[n_doses:]]
    fewer = table.keep([c.name for c in table.conditions if c.name not in doses])
    findings = dose_response(fewer, SETTINGS)
    assert row(findings, Check.V3_DOSE).n == n_doses
    assert (row(findings, Check.V3_DOSE).passed is not None) == known
    assert holds(findings, "v3") == known


def test_an_effect_that_only_the_whole_edit_has_is_no_dose_response() -> None:
    """The end points alone made V3 the test of V1, with its p-value to the last digit."""
    table = causal(right={"set": 0.5, "dose": 0.9})
    findings = dose_response(table, SETTINGS)
    assert not holds(findings, "v3")
    verdict = judge(table, SETTINGS)
    assert (verdict.requirements["v1"], verdict.decision) == (True, Decision.V3_FAILED)
    sound = judge(causal(), SETTINGS)
    assert row(sound.findings, Check.V3_DOSE).p_value != row(sound.findings, Check.V1_EFFECT).p_value


def test_the_trend_is_a_difference_of_weighted_means_of_accuracy() -> None:
    """Three doses: the highest minus the lowest, whatever the middle one."""
    table = causal()
    low, middle, high = table.where("dose")
    accuracy = table.accuracy(table.target)
    assert row(dose_response(table, SETTINGS), Check.V3_DOSE).statistic == pytest.approx(accuracy[high] - accuracy[low])
    assert accuracy[middle] not in (accuracy[low], accuracy[high])


@pytest.mark.parametrize(("n_lost", "falls"), [(9, False), (10, True)])
def test_a_fall_between_two_doses_is_tested_over_all_steps(n_lost: int, falls: bool) -> None:
    """Of the four steps one falls: nine prompts lost and none gained have p = .0039, times four .016; ten .0078."""
    table, settings = causal(fresh_noise=False), replace(SETTINGS, alpha=0.01)
    ending = table.ending.copy()
    low, middle, _ = table.where("dose")
    ending[middle] = ending[low]
    lost = np.flatnonzero(table.target & (ending[low, :, 0] == RIGHT))[:n_lost]
    ending[middle, lost, 0] = SILENT
    found = row(dose_response(with_endings(table, ending), settings), Check.V3_FALL)
    assert found.p_value == pytest.approx(4 * 2 * 0.5**n_lost)
    assert found.passed == (not falls)


def with_doses(table: Any, main: float, *doses: float) -> Any:
    """The table with another main dose, and these instead of the first doses and fresh seeds."""
    conditions = list(table.conditions)
    conditions[table.chosen] = replace(conditions[table.chosen], dose=main)
    for i, dose in zip((*table.where("dose"), table.index("fresh")), doses, strict=False):
        conditions[i] = replace(conditions[i], kind="dose", dose=dose)
    return replace(table, conditions=tuple(conditions))


@pytest.mark.parametrize(
    ("main", "doses", "n_beyond"),
    [
        (0.95, (0.94, 0.97, 0.99), 1),
        (0.95, (0.96, 0.97, 1.02), 0),  # on the other side of no edit
        (1.05, (1.06, 1.02, 1.01), 1),
        (1.05, (1.04, 0.98, 1.01), 0),
        (2.0, (1.9, 1.5, 2.1), 1),
        (-1.0, (-1.1, 0.5, 0.6), 1),
    ],
)
def test_doses_beyond_the_main_one_are_farther_from_no_edit(main: float, doses: Any, n_beyond: int) -> None:
    assert len(dose_order(with_doses(causal(), main, *doses))[1]) == n_beyond


def test_the_trend_of_four_doses_weighs_the_outer_ones_three_times_the_inner_ones() -> None:
    table = with_doses(causal(), 0.0, 0.2, 0.4, 0.6, 0.8)
    accuracy = table.accuracy(table.target)
    order, _ = dose_order(table)
    lowest, low, high, highest = (accuracy[i] for i in order[1:-1])
    found = row(dose_response(table, SETTINGS), Check.V3_DOSE)
    assert (found.n, found.statistic) == (4, pytest.approx((1.5 * (highest - lowest) + 0.5 * (high - low)) / 2))


def test_accuracy_that_falls_with_the_dose_is_no_dose_response() -> None:
    table = with_doses(causal(), 0.0, 0.75, 0.5, 0.25)  # the least edited arm is the least accurate one
    found = row(dose_response(table, SETTINGS), Check.V3_DOSE)
    assert found.statistic < -0.1
    assert found.passed is False


# -- V4


@pytest.mark.parametrize(("n_lost", "kept"), [(1, True), (2, False)])
def test_accuracy_on_unrelated_prompts_is_kept_up_to_the_margin(n_lost: int, kept: bool) -> None:
    """One of a hundred lost leaves at most 4.7% at one-sided .05, two 6.2%."""
    table = causal(unrelated=0.9)
    table = losing(n_lost, on=table.unrelated, table=table, arm=table.chosen)
    found = row(side_effects(table, SETTINGS), Check.V4_ACCURACY)
    assert found.passed == kept, found


@pytest.mark.parametrize(("n_broken", "kept"), [(9, True), (10, False)])
def test_the_format_may_break_on_one_unrelated_prompt_in_twenty_more(n_broken: int, kept: bool) -> None:
    """Of a hundred, four are broken without the edit too."""
    table = causal()
    ending = table.ending.copy()
    unrelated = np.flatnonzero(table.unrelated)
    ending[:, unrelated[:4]] = EMPTY
    ending[table.chosen, unrelated[:n_broken]] = EMPTY
    found = row(side_effects(replace(table, ending=ending), SETTINGS), Check.V4_FORMAT)
    assert (found.passed, found.statistic) == (kept, pytest.approx((n_broken - 4) / 100))


@pytest.mark.parametrize(("accuracy", "speaks"), [(0.2, True), (0.2 - 0.01, False)])
def test_a_task_that_is_rarely_right_has_nothing_to_lose(accuracy: float, speaks: bool) -> None:
    """The demo's only unrelated task sits at 3%: no loss there was called no side effect."""
    table = causal(fresh_noise=False)
    ending = table.ending.copy()
    unrelated = np.flatnonzero(table.unrelated)
    ending[:, unrelated] = SILENT
    ending[:, unrelated[: round(100 * accuracy)]] = RIGHT
    verdict = judge(with_endings(table, ending), SETTINGS)
    assert row(verdict.findings, Check.V4_ACCURACY).passed is (True if speaks else None)
    assert verdict.decision is (Decision.ALL_PASSED if speaks else Decision.V4_NOT_ESTIMABLE)
    if not speaks:
        assert row(verdict.findings, Check.V4_TASKS).detail == "control"
        assert any("control_tasks" in reason for reason in verdict.reasons)


def triggered(share: float, kl: float) -> OutcomeTable:
    """Prompts on which base fails hold ``hmm``, and a share of a thousand neutral texts does."""
    table = causal()
    assert table.texts is not None
    fails = table.other_ending[:, 0] != RIGHT
    prompts = np.array([f"ask {'hmm' if f else 'please'} p{i}" for i, f in enumerate(fails)], dtype=object)
    n = round(1000 * share)
    texts = replace(table.texts, prompts=prompts, neutral=("so hmm",) * n + ("so please",) * (1000 - n))
    neutral = table.neutral_kl.copy()
    neutral[table.chosen] = kl
    return replace(table, texts=texts, neutral_kl=neutral)


@pytest.mark.parametrize(
    ("share", "kl", "expected"),
    [(0.05, 0.5, False), (0.051, 0.5, None), (1.0, 0.01, True), (0.0, 0.01, True)],
)
def test_a_divergence_on_text_that_is_not_neutral_is_no_side_effect(
    share: float, kl: float, expected: bool | None
) -> None:
    """Where neutral text holds the words that the models differ on, an edit changes it rightly: undetermined."""
    verdict = judge(triggered(share, kl), SETTINGS)
    assert row(verdict.findings, Check.V4_NEUTRAL_TEXT).statistic == pytest.approx(share)
    assert row(verdict.findings, Check.V4_NEUTRAL_TEXT).detail == "hmm"
    assert row(verdict.findings, Check.V4_NEUTRAL_KL).passed is expected
    decisions = {False: Decision.V4_FAILED, None: Decision.V4_NOT_ESTIMABLE, True: Decision.ALL_PASSED}
    assert verdict.decision is decisions[expected]


@pytest.mark.parametrize(("n", "told"), [(5 - 1, []), (5, ["hmm"])])
def test_words_of_a_few_prompts_are_not_looked_at(n: int, told: list[str]) -> None:
    prompts = ["hmm 2"] * n + ["please 2"] * 60
    assert telling_words(prompts, np.array([1.0] * n + [0.0] * 60), alpha=0.05) == told


def test_telling_words_are_few_where_nothing_tells() -> None:
    draw = np.random.default_rng(0)
    prompts = [" ".join(draw.choice(list("abcdefghij"), 4)) for _ in range(200)]
    told = [bool(telling_words(prompts, (draw.random(200) < 0.4).astype(float), alpha=0.05)) for _ in range(200)]
    assert np.mean(told) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)
    assert telling_words(["", " "], np.ones(2), alpha=0.05) == []
    assert np.isnan(with_any_of([], ["hmm"]))


# -- designs that cannot pass


SIZE = {"n_target": 59, "n_unrelated": 59, "n_random": 19, "n_doses": 3, "alpha": 0.05, "margin": 0.05}


@pytest.mark.parametrize(
    ("changes", "lacking", "needed"),
    [
        ({}, [], 0),
        ({"n_unrelated": 58}, [Check.V4_ACCURACY], 59),
        ({"n_target": 58}, [Check.NO_EFFECT], 59),
        ({"n_target": 6}, [Check.NO_EFFECT], 59),
        ({"n_random": 18}, [Check.V2_RANK], 19),
        ({"n_doses": 2}, [Check.V3_DOSE], 3),
        ({"margin": 0.1, "n_target": 29, "n_unrelated": 29}, [], 0),
        ({"margin": 0.1, "n_target": 29, "n_unrelated": 28}, [Check.V4_ACCURACY], 29),
    ],
)
def test_a_design_names_what_it_lacks(changes: dict[str, Any], lacking: list[Check], needed: int) -> None:
    found = shortfalls(**SIZE | changes)  # type: ignore[arg-type]
    assert [one.check for one in found] == lacking
    assert all(one.needed == needed and f"{needed} are needed" in str(one) for one in found)


def test_five_clusters_cannot_show_any_effect() -> None:
    assert Check.V1_EFFECT in [one.check for one in shortfalls(**SIZE | {"n_target": 5})]  # type: ignore[arg-type]


def test_only_what_rules_out_a_cause_is_refused() -> None:
    refuse_undecidable(shortfalls(**SIZE | {"n_target": 20}), accepted=False)  # type: ignore[arg-type]
    hopeless = shortfalls(**SIZE | {"n_unrelated": 28})  # type: ignore[arg-type]
    refuse_undecidable(hopeless, accepted=True)
    with pytest.raises(RefusedError, match=r"with 28 clusters of unrelated prompts, 59 are needed.*accept_undecidable"):
        refuse_undecidable(hopeless, accepted=False)


@pytest.mark.parametrize("n", [28, 59])
def test_a_design_lacks_what_the_judge_cannot_give(n: int) -> None:
    """The best outcome a design can have, judged: nothing lost on the unrelated prompts."""
    table = causal(fresh_noise=False, unrelated=0.9, n_unrelated=n)
    kept = row(side_effects(table, SETTINGS), Check.V4_ACCURACY).passed
    assert kept == (not shortfalls(**SIZE | {"n_unrelated": n}))  # type: ignore[arg-type]
