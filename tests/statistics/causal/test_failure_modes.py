"""Whether changed completions become the other model's: by hand, and against marginal shares that are fooled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlgen_stats.toolkit.intervention import OutcomeTable, judge
from rlgen_stats.toolkit.statistics.causal.criteria import failure_mode_match
from rlgen_stats.toolkit.statistics.causal.failure_modes import UNLIKE, agreement_of, kinds_of_endings
from rlgen_stats.toolkit.statistics.causal.findings import Check, Decision, Finding, Findings, holds, of_check
from tests.statistics.causal.old_rules import matching_shares
from tests.statistics.causal.worlds import EMPTY, N_TARGET, RIGHT, SETTINGS, SILENT, WRONG, causal, with_endings, world


def with_failures(table: OutcomeTable, where: Any, ending: int = SILENT) -> OutcomeTable:
    """The set's arm as the unedited one, but for failures on these prompts."""
    endings = table.ending.copy()
    endings[table.chosen] = endings[table.unedited]
    endings[table.chosen, where, 0] = ending
    return with_endings(table, endings)


def row_of(findings: Findings, check: Check) -> Finding:
    row = of_check(findings, check)
    assert row is not None
    return row


def value(findings: Findings, check: Check) -> float:
    return row_of(findings, check).statistic


def test_agreement_is_that_with_the_own_prompt_minus_that_with_the_others() -> None:
    """Six prompts of one task, worked by hand; what is right is 1."""
    table = causal(n_target=6, n_unrelated=0, fresh_noise=False)
    table = replace(table, task=np.array(["one"] * 6), texts=None)
    ending = table.ending.copy()
    ending[table.unedited, :, 0] = [RIGHT] * 6
    ending[table.chosen, :, 0] = [RIGHT, RIGHT, RIGHT, RIGHT, SILENT, SILENT]  # four and five changed
    table = replace(table, ending=ending, correct=(ending == RIGHT).astype(float))
    table = replace(table, other_ending=np.array([[RIGHT]] * 3 + [[SILENT]] * 2 + [[RIGHT]]))
    found = agreement_of(table, kinds_of_endings(table))
    assert found.prompts.tolist() == [4, 5]
    # prompt 4: silent as base there (1), as one other of five (.2); before, right (0), as four of five (.8)
    # prompt 5: silent, base is right (0), as two others of five (.4); before, right (1), as three of five (.6)
    expected = [((1 - 0.2) - (0 - 0.8)) / 2, ((0 - 0.4) - (1 - 0.6)) / 2]
    assert found.beyond_chance["outcome"] == pytest.approx(expected)
    assert found.beyond_chance["ending"] == pytest.approx(expected)
    assert "text" not in found.beyond_chance
    # base itself: prompt 4 as the edited model; prompt 5 as the unedited one, which gains nothing
    assert found.attainable == pytest.approx([0.8, 0.0])


@pytest.mark.parametrize(
    ("placed", "passes", "decision"),
    [("where base fails", True, Decision.ALL_PASSED), ("where base is right", False, Decision.V6_FAILED)],
)
def test_failures_placed_where_base_is_right_do_not_move_toward_base(
    placed: str, passes: bool, decision: Decision
) -> None:
    """The finding: as many failures of the same class pass every marginal share, wherever they are."""
    table = causal(fresh_noise=False)
    fails = table.target & (table.other_ending[:, 0] != RIGHT) == (placed == "where base fails")
    right = table.ending[table.unedited, :, 0] == RIGHT
    chosen = np.flatnonzero(table.target & fails & right)[:100]
    edited = with_failures(table, chosen)
    assert matching_shares(edited, SETTINGS), "the old rule: shares of endings move toward base's"
    findings = failure_mode_match(edited, SETTINGS)
    assert holds(findings, "v6") == passes
    assert (value(findings, Check.V6_OUTCOME) > 0) == passes
    assert row_of(findings, Check.V6_OUTCOME).passed == passes
    assert judge(edited, SETTINGS).decision is decision


@pytest.mark.parametrize(("closed", "passes"), [(0.096, False), (0.104, True)])
def test_a_least_share_of_the_divergence_is_closed(closed: float, passes: bool) -> None:
    table = causal()
    kl = np.ones_like(table.kl_to_base)
    kl[table.chosen] = 1 - closed + 0.01 * np.random.default_rng(0).standard_normal(kl.shape[1])
    findings = failure_mode_match(replace(table, kl_to_base=kl), SETTINGS)
    assert value(findings, Check.V6_KL) == pytest.approx(closed, abs=0.001)
    assert holds(findings, "v6") == passes
    away = of_check(findings, Check.V6_AWAY)
    assert away is not None
    assert away.passed == (not passes)


@pytest.mark.parametrize(("share", "passes", "away"), [(0.75, True, False), (0.65, False, False), (0.5, False, True)])
def test_a_least_share_of_the_agreement_is_reached(share: float, passes: bool, away: bool) -> None:
    """Failures of which a share is where base fails too; half of them is chance in being right."""
    table = causal(fresh_noise=False, n_target=600)
    right = table.target & (table.ending[table.unedited, :, 0] == RIGHT)
    fails = table.other_ending[:, 0] != RIGHT
    n = 150
    chosen = np.concatenate(
        [np.flatnonzero(right & fails)[: round(share * n)], np.flatnonzero(right & ~fails)[: n - round(share * n)]]
    )
    findings = failure_mode_match(with_failures(table, chosen), SETTINGS)
    row, against = (of_check(findings, check) for check in (Check.V6_AGREEMENT, Check.V6_AWAY))
    assert row is not None
    assert against is not None
    assert (row.passed, against.passed) == (passes, away), row


def test_silence_of_a_new_kind_is_no_failure_of_bases() -> None:
    """One class ``no_answer`` held base's ramble and any other text without an answer."""
    table = causal(fresh_noise=False)
    assert table.texts is not None
    garbled = table.texts.edited.copy()
    silent = table.target & (table.ending[table.chosen, :, 0] == SILENT)
    silent &= table.ending[table.unedited, :, 0] == RIGHT
    garbled[silent, 0] = "zxq vvk"
    other = replace(table, texts=replace(table.texts, edited=garbled))
    assert (kinds_of_endings(table)[1] != UNLIKE).all()
    assert (kinds_of_endings(other)[1][silent, 0] == UNLIKE).all()
    assert judge(table, SETTINGS).verdict == "CAUSAL_SPECIFIC"
    verdict = judge(other, SETTINGS)
    assert (verdict.verdict, verdict.decision) == ("DESTRUCTIVE", Decision.V6_DESTROYED)


@pytest.mark.parametrize(("known", "new_kind"), [("well goes on it", False), ("well then never", True)])
def test_the_nearest_completion_of_base_decides_the_kind_of_silence(known: str, new_kind: bool) -> None:
    table = causal(fresh_noise=False)
    assert table.texts is not None
    others = table.texts.other.copy()
    silent = np.flatnonzero(table.target & (table.other_ending[:, 0] == SILENT))
    for i, prompt in enumerate(silent):
        others[prompt, 0] = "well goes on it you know"[: 15 if i % 2 else 24]
    edited = table.texts.edited.copy()
    at = np.flatnonzero(table.target & (table.ending[table.chosen, :, 0] == SILENT))[0]
    edited[at, 0] = known
    ending = kinds_of_endings(replace(table, texts=replace(table.texts, other=others, edited=edited)))[1]
    assert (ending[at, 0] == UNLIKE) == new_kind


def partly_shared(n_shared: int, name: str) -> str:
    """Sixty words: ``n_shared`` are words of others, too, the rest and all pairs of words are its own."""
    return " ".join(f"shared{i // 2}" if i % 2 == 0 and i // 2 < n_shared else f"{name}{i}" for i in range(60))


def silent_on(others: list[str]) -> tuple[OutcomeTable, int]:
    """Base writes these texts without an answer and is right elsewhere; one prompt where the edited model is silent."""
    table = causal(fresh_noise=False)
    assert table.texts is not None
    on, texts = np.flatnonzero(table.target)[: len(others)], table.texts.other.copy()
    ending = np.full_like(table.other_ending, RIGHT)
    ending[on], texts[on, 0] = SILENT, others
    at = int(np.flatnonzero(table.target & (table.ending[table.chosen, :, 0] == SILENT))[0])
    return replace(table, other_ending=ending, texts=replace(table.texts, other=texts)), at


def is_unlike(table: OutcomeTable, at: int, text: str) -> bool:
    assert table.texts is not None
    edited = table.texts.edited.copy()
    edited[at, 0] = text
    return bool(kinds_of_endings(replace(table, texts=replace(table.texts, edited=edited)))[1][at, 0] == UNLIKE)


@pytest.mark.parametrize(("n_shared", "unlike"), [(19, True), (20, False)])
def test_one_in_twenty_of_bases_own_completions_may_be_less_like_the_others(n_shared: int, unlike: bool) -> None:
    """Of 21, one shares no word with another and one shares twenty; that one's likeness is the 5% quantile."""
    others = [partly_shared(n, f"o{n}x{i}x") for n, times in ((0, 1), (20, 1), (30, 19)) for i in range(times)]
    assert is_unlike(*silent_on(others), partly_shared(n_shared, "edited")) == unlike


@pytest.mark.parametrize(("n_others", "unlike"), [(1, False), (2, True)])
def test_two_completions_of_base_are_the_fewest_that_make_a_kind(n_others: int, unlike: bool) -> None:
    assert is_unlike(*silent_on(["well goes on it"] * n_others), "zxq vvk") == unlike


@pytest.mark.parametrize(("n_alone", "n_known"), [(1, 4), (2, 6)])
def test_a_prompt_without_another_of_its_task_is_compared_with_nothing(n_alone: int, n_known: int) -> None:
    table = causal(n_target=6, n_unrelated=0, fresh_noise=False)
    task = np.array(["many"] * 4 + (["one", "other"] if n_alone == 1 else ["two", "two"]))
    ending = table.ending.copy()
    ending[table.unedited], ending[table.chosen] = RIGHT, SILENT
    table = replace(table, task=task, texts=None, ending=ending, correct=(ending == RIGHT).astype(float))
    assert len(agreement_of(table, kinds_of_endings(table)).prompts) == n_known


@pytest.mark.parametrize(("share", "destroyed"), [(0.45, False), (0.75, True)])
def test_the_model_is_broken_where_new_failures_are_shown_to_be_most_of_the_effect(
    share: float, destroyed: bool
) -> None:
    table = causal(fresh_noise=False)
    lost = np.flatnonzero(table.target & (table.change(np.ones_like(table.target))[0, :, table.chosen] < 0))
    ending = table.ending.copy()
    ending[table.chosen, lost[: round(share * len(lost))], 0] = EMPTY
    findings = failure_mode_match(with_endings(table, ending), SETTINGS)
    new, broken = (of_check(findings, check) for check in (Check.V6_NEW_FAILURES, Check.V6_BROKEN))
    assert new is not None
    assert broken is not None
    assert new.statistic == pytest.approx(share * len(lost) / N_TARGET, abs=0.01)
    assert new.bound == pytest.approx(0.5 * len(lost) / N_TARGET)
    assert broken.statistic == pytest.approx(new.statistic - new.bound)
    assert (not new.passed, broken.passed) == (destroyed, destroyed)


def test_a_few_new_failures_more_than_half_are_not_shown_to_break_the_model() -> None:
    table = causal(fresh_noise=False)
    lost = np.flatnonzero(table.target & (table.change(np.ones_like(table.target))[0, :, table.chosen] < 0))
    ending = table.ending.copy()
    ending[table.chosen, lost[: len(lost) // 2 + 3], 0] = EMPTY
    verdict = judge(with_endings(table, ending), SETTINGS)
    assert (verdict.verdict, verdict.decision) == ("INCONCLUSIVE", Decision.V6_NOT_SHOWN)


def test_wrong_where_base_is_silent_is_of_a_new_kind_too() -> None:
    table = causal(set_fails=WRONG)
    findings = failure_mode_match(table, SETTINGS)
    row = of_check(findings, Check.V6_NEW_FAILURES)
    assert row is not None
    assert row.detail == "wrong"
    assert not row.passed


def test_the_share_of_the_divergence_that_is_closed_does_not_depend_on_its_size() -> None:
    table = causal()
    one, three = (
        row_of(failure_mode_match(replace(table, kl_to_base=k * table.kl_to_base), SETTINGS), Check.V6_KL)
        for k in (1, 3)
    )
    assert (three.statistic, three.low, three.high) == pytest.approx((one.statistic, one.low, one.high))
    assert 0.65 < one.low < one.statistic < one.high < 0.75


@pytest.mark.parametrize(("divergence", "known"), [(0.0, False), (0.01, True)])
def test_models_that_do_not_diverge_have_nothing_to_close(divergence: float, known: bool) -> None:
    table = causal()
    kl = np.full_like(table.kl_to_base, divergence)
    kl[table.chosen] *= 0.5
    found = row_of(failure_mode_match(replace(table, kl_to_base=kl), SETTINGS), Check.V6_KL)
    assert found.passed is (True if known else None)


def test_failures_are_new_beyond_those_of_the_model_that_has_more_of_them() -> None:
    """The unedited model is wrong on 20 of 300 prompts and base on none; edited, it is wrong on 80: 60 are new."""
    table = causal(fresh_noise=False)
    ending = table.ending.copy()
    right = np.flatnonzero(table.target & (ending[table.chosen, :, 0] == RIGHT))
    for arm in range(len(ending)):
        ending[arm, right[:20], 0] = WRONG
    ending[table.chosen, right[20:80], 0] = WRONG
    findings = failure_mode_match(with_endings(table, ending), SETTINGS)
    new, broken = row_of(findings, Check.V6_NEW_FAILURES), row_of(findings, Check.V6_BROKEN)
    assert new.statistic == pytest.approx(60 / 300)
    assert broken.statistic == pytest.approx(new.statistic - new.bound)


def test_an_edit_that_changes_nothing_leaves_room_for_one_and_a_half_times_the_unseen_prompts() -> None:
    """Of 300 prompts at one-sided .05 a share of .00994 may not have been seen, and each counts up to 1.5."""
    table = world(fresh_noise=False)
    broken = row_of(failure_mode_match(table, SETTINGS), Check.V6_BROKEN)
    assert (broken.low, broken.high) == pytest.approx((-1.5 * 0.00994, 1.5 * 0.00994), rel=1e-3)
    assert not broken.passed
