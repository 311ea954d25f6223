"""The last step: outcome tables in, stored datasets out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlgen_stats.schemas.layout import validate
from rlgen_stats.toolkit.statistics.causal.controls import MatchedControls, match_controls
from rlgen_stats.toolkit.statistics.causal.criteria import FEWEST_RANDOM, FutilityRule, is_futile
from rlgen_stats.toolkit.statistics.causal.findings import REQUIREMENTS, Decision, from_columns, holds, reasons
from rlgen_stats.toolkit.statistics.causal.outcome_table import DirectionOutcomes, OutcomeTable
from rlgen_stats.toolkit.statistics.causal.result_datasets import Declaration, judge_trial
from rlgen_stats.toolkit.statistics.causal.verdict import decide, judge
from tests.statistics.causal.test_controls import of_one_size, population
from tests.statistics.causal.worlds import EMPTY, causal


def controls() -> MatchedControls:
    return match_controls(population(), (5, 77, 140), of_one_size, n_sets=39, seed=0)


def declared(**changes: Any) -> Declaration:
    known: dict[str, Any] = {
        **{
            "alpha": 0.05,
            "margin": 0.05,
            "seeds": {"disable": 3, "amplify": 4},
            "controls": dict.fromkeys(("disable", "amplify"), controls()),
        },
        **{"not_held": "", "no_controls": "", "tasks": ("control", "task0", "task1", "task2")},
        "attributes": dict.fromkeys(("test", "null", "seed", "alpha", "features"), 0) | {"unit": "prompt cluster"},
    }
    return Declaration(**known | changes)


def outcomes(table: OutcomeTable, **changes: Any) -> DirectionOutcomes:
    kl = dict.fromkeys(("kl_to_base", "kl_to_rl", "forced_kl_to_base", "forced_kl_to_rl"), table.kl_to_base)
    known: dict[str, Any] = {"divergences": kl, "passthrough_changed": 0.0, "non_finite": ()}
    return DirectionOutcomes(table=table, **known | changes)


def test_a_verdict_is_stored_with_everything_it_was_judged_from() -> None:
    table, fixed = causal(), declared()
    result, balance = judge_trial([outcomes(table)], fixed)
    validate(result, "intervention")
    validate(balance, "control_balance")
    verdict = judge(table, fixed.settings(table.direction))
    row = result.sel(direction="disable")
    assert str(row["verdict"].item()) == verdict.verdict == "CAUSAL_SPECIFIC"
    assert str(row["reasons"].item()).split("; ") == [reason.replace("; ", ", ") for reason in verdict.reasons]
    np.testing.assert_array_equal(row["effect"].values, verdict.effects.mean)
    at_set = row.sel(condition="set")
    target = table.correct[table.chosen][table.target].mean()
    assert float(at_set["accuracy"]) == pytest.approx(target)
    assert float(at_set["task_accuracy"].sel(task="task1")) == table.accuracy(table.task == "task1")[table.chosen]
    assert float(at_set["kl_to_rl"]) == pytest.approx(table.kl_to_base[table.chosen][table.target].mean())
    other = result.sel(direction="amplify")
    assert str(other["reasons"].item()) == "not_asked: not run"
    assert set(other["kind"].values) == {"absent"}
    assert result.attrs["n_controls"] == 39
    assert result.attrs["unit"] == "prompt cluster"


@pytest.mark.parametrize("changes", [{}, {"set_fails": EMPTY, "kl": {"set": 3.0}}, {"n_random": 0}, {"unrelated": 0.1}])
def test_a_verdict_is_derived_again_from_its_stored_table(changes: dict[str, Any]) -> None:
    result, _ = judge_trial([outcomes(causal(**changes))], declared())
    stored = result.sel(direction="disable")
    findings = from_columns(stored)
    verdict, decision = decide(findings)
    assert (verdict, str(decision)) == (stored["verdict"].item(), stored["decided_by"].item())
    assert "; ".join(reasons(decision, findings)) == stored["reasons"].item()
    assert {name: holds(findings, name) for name in REQUIREMENTS} == {
        name: bool(stored[name]) for name in ("v1", "v2", "v3", "v4", "v6")
    }


def test_what_running_saw_reaches_the_verdict() -> None:
    broken, _ = judge_trial([outcomes(causal(), non_finite=("dose-0.5",))], declared())
    assert "; non_finite_logits: dose-0.5; " in str(broken["reasons"].values[0])
    changed, _ = judge_trial([outcomes(causal(), passthrough_changed=0.5)], declared())
    assert str(changed["reasons"].values[0]).startswith("passthrough_not_noop: ")


def test_a_trial_without_controls_or_without_anything_says_so() -> None:
    alone = declared(controls={}, no_controls="controls cannot be matched on mas_bin")
    result, balance = judge_trial([outcomes(causal(n_random=0))], alone)
    assert "v2_controls: controls cannot be matched on mas_bin" in str(result["reasons"].values[0])
    reason = "controls cannot be matched on mas_bin"
    assert balance.attrs["flags"] == [f"disable: {reason}", f"amplify: {reason}"]
    result, balance = judge_trial([], declared(controls={}, not_held="no_prompts: none", tasks=()))
    validate(result, "intervention")
    validate(balance, "control_balance")
    assert set(result["reasons"].values) == {"no_prompts: none"}
    assert result["task"].values.tolist() == ["none"]


@pytest.mark.parametrize(("direction", "sign"), [("disable", -1.0), ("amplify", 1.0)])
def test_the_futility_rule_stops_where_the_rank_is_settled(direction: Any, sign: float) -> None:
    draw = np.random.default_rng(1)
    accuracies = draw.random(99)
    rule = FutilityRule(direction, n_planned=99, alpha=0.05)
    rule.add("set", 0.5)
    rule.add("dose", 1.0)
    assert not rule.stop
    n_as_large = 0
    for accuracy in accuracies:
        rule.add("random", accuracy)
        n_as_large += sign * accuracy >= sign * 0.5
        assert rule.stop == (rule.n_run >= FEWEST_RANDOM and is_futile(n_as_large, 99, 0.05))
        if rule.stop:
            break
    assert (rule.n_as_large, rule.n_run) == (n_as_large, FEWEST_RANDOM)
    assert rule.reason.startswith(f"{n_as_large} had at least as large an effect as the set")


def test_an_equal_effect_counts_for_the_controls() -> None:
    rule = FutilityRule("disable", n_planned=1, alpha=0.05)
    rule.add("set", 0.3)
    rule.add("random", 0.1 + 0.2)  # the same, but for rounding
    assert rule.n_as_large == 1


@pytest.mark.parametrize(("n_planned", "alpha"), [(12, 0.05), (39, 0.01)])
def test_too_few_random_sets_to_show_anything_are_not_estimable(n_planned: int, alpha: float) -> None:
    """The best rank exceeds alpha from the start; 0 as large of 1 run would be a p-value of 0."""
    rule = FutilityRule("disable", n_planned=n_planned, alpha=alpha)
    rule.add("set", 0.2)
    rule.add("random", 0.1)
    assert not rule.stop
    settings = replace(declared(alpha=alpha).settings("disable"), n_planned=n_planned)
    verdict = judge(causal(n_random=n_planned), settings)
    assert verdict.rank_p == pytest.approx(1 / (n_planned + 1))
    assert verdict.decision is Decision.V2_NOT_ESTIMABLE
    enough = judge(causal(n_random=round(1 / alpha) - 1), replace(settings, n_planned=round(1 / alpha) - 1))
    assert enough.decision is not Decision.V2_NOT_ESTIMABLE


def test_outcomes_are_as_they_were_given() -> None:
    """Judging changes no table."""
    table = causal()
    before = replace(table, correct=table.correct.copy())
    judge_trial([outcomes(table)], declared())
    np.testing.assert_array_equal(before.correct, table.correct)
