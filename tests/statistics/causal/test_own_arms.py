"""Verdicts on one's own arms: the same as on the tables that a trial makes, and a sentence for every slip."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics import arms_table, judge
from rlgen_stats.toolkit.statistics.causal.outcome_table import OUTCOME_CLASSES, OutcomeTable
from rlgen_stats.toolkit.statistics.causal.own_arms import ROUNDING
from tests.statistics.causal.worlds import SETTINGS, amplified, causal, world


def rebuilt(table: OutcomeTable) -> OutcomeTable:
    """The table from its arrays, as a user has them."""
    names = {condition.name: i for i, condition in enumerate(table.conditions)}

    def classes(ending: np.ndarray) -> np.ndarray:
        return np.array(["answer", "answer", *OUTCOME_CLASSES[2:]])[ending]

    kl = table.kl_to_base if table.direction == "disable" else table.kl_to_rl
    return arms_table(
        {name: table.correct[i] for name, i in names.items()},
        table.other_correct,
        direction=table.direction,
        prompts=pd.DataFrame({"prompt": table.cluster, "task": table.task}),
        unrelated=["control"],
        doses={condition.name: condition.dose for condition in table.conditions},
        format_class={name: classes(table.ending[i]) for name, i in names.items()},
        other_format_class=classes(table.other_ending),
        kl_to_other={name: kl[i] for name, i in names.items()},
        neutral_kl={name: table.neutral_kl[i] for name, i in names.items()},
    )


@pytest.mark.parametrize(
    "table", [causal(), amplified(causal(rl=0.5, right={"set": 0.9}, base=0.9)), world(), causal(right={"set": 0.0})]
)
def test_the_verdict_is_that_of_the_same_numbers_in_a_trial(table: OutcomeTable) -> None:
    mine, trials = judge(rebuilt(table), SETTINGS), judge(table, SETTINGS)
    assert mine.verdict == trials.verdict
    assert mine.requirements == trials.requirements
    assert mine.effects.mean.tolist() == trials.effects.mean.tolist()
    assert mine.rank_p == trials.rank_p


def test_answers_alone_show_an_effect_and_no_cause() -> None:
    table = causal()
    arms = {condition.name: table.correct[i] for i, condition in enumerate(table.conditions)}
    mine = judge(arms_table(arms, table.other_correct, direction="disable", prompts=table.cluster.tolist()))
    assert mine.requirements["v1"]
    assert mine.verdict == "INCONCLUSIVE"
    assert mine.reasons[0].startswith("v4_not_estimable")


def test_kinds_and_doses_are_read_off_the_names() -> None:
    right = np.ones(4)
    names = ("unedited", "set", "dose-0.25", "random-007", "random-direction", "fresh")
    for direction, main in (("disable", 0.0), ("amplify", 2.0)):
        table = arms_table(dict.fromkeys(names, right), right, direction=direction, prompts=list("abcd"))
        assert [c.kind for c in table.conditions] == ["unedited", "set", "dose", "random", "random_direction", "fresh"]
        assert [c.dose for c in table.conditions] == [1.0, main, 0.25, main, 1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "remove"}, r"direction is one of \['disable', 'amplify'\], got 'remove'"),
        ({"correct": {"unedited": [1, 0]}}, "exactly one arm of kind 'set'"),
        ({"correct": {"unedited": [1, 0], "set": [0, 0], "ours": [1, 1]}}, "arm 'ours' is of no known kind; its name"),
        ({"correct": {"unedited": [1, 0], "set": [0, 0], "dose-half": [1, 1]}}, "arm 'dose-half' needs a dose"),
        ({"correct": {"unedited": [1, 0], "set": [0.5, 0]}}, "arm 'set' has shape .* expected 0 or 1 for each of 2"),
        ({"correct": {"unedited": [[1, 1], [0, 1]], "set": [[0], [0]]}}, "arm 'unedited' has 2 samples a prompt, the"),
        ({"other": [1]}, r"the other model has shape \(1,\)"),
        ({"unrelated": ["chat"]}, r"no prompt has the unrelated task 'chat'; the tasks are \['all'\]"),
        ({"unrelated": ["all"]}, "prompts on which its effect is measured, got none"),
        ({"format_class": {"set": ["answer", "timeout"]}}, "format classes are .*; got timeout"),
        ({"format_class": {"set": ["answer"]}}, r"format_class of set has shape \(1, 1\); expected \(2, 1\)"),
        ({"other": pd.Series([0, 1], index=["b", "a"])}, "the other model has other rows than the prompts, or in ano"),
        ({"correct": {"unedited": pd.Series([1, 0])[::-1], "set": [0, 0]}}, "arm 'unedited' has other rows"),
        ({"kl_to_other": {"sett": [0.1, 0.1]}}, r"kl_to_other names the arm 'sett'; the arms are \['set', 'unedited"),
        ({"doses": {"dose-1": 1.0}}, "doses names the arm 'dose-1'"),
        ({"kl_to_other": {"set": [0.1]}}, r"kl_to_other of 'set' has shape \(1,\); expected one number a prompt"),
        (
            {"kl_to_other": {"set": [0.1, -1.1 * ROUNDING]}},
            "kl_to_other of 'set' has the value -1.1e-06; expected nats",
        ),
        ({"kl_to_other": {"set": [np.inf, 0.1]}}, "kl_to_other of 'set' has the value inf; expected nats, finite"),
        ({"neutral_kl": {"set": -0.5}}, "neutral_kl of 'set' has the value -0.5; expected nats"),
        ({"neutral_kl": {"set": np.inf}}, "neutral_kl of 'set' has the value inf"),
        (
            {"correct": {"unedited": [1, 0], "set": [0, 0], "dose-nan": [1, 1]}},
            "arm 'dose-nan' has the dose nan; expec",
        ),
        ({"correct": {"unedited": [1, 0], "set": [0, 0], "dose-inf": [1, 1]}}, "arm 'dose-inf' has the dose inf"),
        ({"doses": {"set": np.nan}}, "arm 'set' has the dose nan"),
    ],
)
def test_a_slip_is_named(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"correct": {"unedited": [1, 0], "set": [0, 0]}, "other": [0, 0], "direction": "disable"}
    with pytest.raises(InputError, match=message):
        arms_table(**given | {"prompts": ["a", "b"]} | change)


def test_a_divergence_may_be_rounded_below_0_or_not_measured() -> None:
    arms = {"unedited": [1, 0], "set": [0, 0]}
    kl = {"unedited": [-0.9 * ROUNDING, np.nan], "set": [0.5, 0.0]}
    table = arms_table(arms, [0, 0], direction="disable", prompts=["a", "b"], kl_to_other=kl, neutral_kl={"set": -1e-9})
    np.testing.assert_array_equal(table.kl_to_base, [[0, np.nan], [0.5, 0]])
    np.testing.assert_array_equal(table.neutral_kl, [np.nan, 0])
