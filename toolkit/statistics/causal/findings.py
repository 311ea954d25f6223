"""What a causal trial's criteria found: one typed row a criterion, from which the sentences are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import nan
from typing import Any, Final

import numpy as np


class Check(StrEnum):
    """One thing that is looked at in a direction of a trial; the meaning of its numbers stands beside it."""

    PASSTHROUGH = "passthrough"
    """statistic: share of completions that the passthrough arm changed; bound: largest share trusted."""
    V1_EFFECT = "v1_effect"
    """statistic, low, high: change of accuracy; bound: what the interval must lie beyond; p: of no change."""
    V1_DICTIONARIES = "v1_dictionaries"
    """statistic: dictionaries with the direction of the mean; bound: how many must have it."""
    V1_OPPOSITE = "v1_opposite"
    """As V1_EFFECT, where accuracy changed against the prediction; never passed."""
    NO_EFFECT = "no_effect"
    """statistic, low, high: change of accuracy, 1 - 2 alpha; bound: margin within which the interval must lie."""
    V2_RANK = "v2_rank"
    """statistic: random sets with at least the set's effect (NaN for combined ranks); n: random sets; p: rank p; bound:
    alpha. Not estimable where even the best rank of so many sets exceeds alpha."""
    V2_CONTROLS = "v2_controls"
    """Whether the random sets match the set well enough; detail: what the matching fell short of."""
    V2_RANDOM_SETS = "v2_random_sets"
    """statistic, low, high: share of random sets with at least half of the set's effect, 1 - 2 alpha; n: random sets;
    bound: share that ``low`` must exceed before random sets are said to do as much; passed: they are."""
    V3_DOSE = "v3_dose"
    """statistic, low, high: accuracy at higher minus lower intermediate doses; n: those doses; p: of no trend."""
    V3_FALL = "v3_fall"
    """statistic: deepest fall of accuracy between two rising doses; p: its p-value, over all steps (Bonferroni)."""
    V4_ACCURACY = "v4_accuracy"
    """statistic, low: change of accuracy on unrelated prompts, one-sided; bound: minus the margin; n: prompts."""
    V4_TASKS = "v4_tasks"
    """statistic: largest accuracy, unedited, of the unrelated tasks that are left out; bound: least accuracy at which
    one counts; detail: those tasks. Reported only."""
    V4_FORMAT = "v4_format"
    """statistic: rise of the share of broken completions on unrelated tasks; bound: largest harmless rise."""
    V4_NEUTRAL_KL = "v4_neutral_kl"
    """statistic: nats per token on neutral text; bound: largest harmless divergence. Not estimable where it is larger,
    but the text is not neutral (V4_NEUTRAL_TEXT)."""
    V4_NEUTRAL_TEXT = "v4_neutral_text"
    """statistic: share of neutral texts with a word that goes with where the two models differ; bound: largest share
    at which they are neutral; detail: those words."""
    V4_LENGTH = "v4_length"
    """statistic: tokens of completions on unrelated tasks; bound: unedited. Reported only."""
    V6_KL = "v6_kl"
    """statistic: share of the divergence from the other model that the edit closes, of several dictionaries by the
    geometric mean of what is left; bound: least share; p: that it is not this share."""
    V6_AGREEMENT = "v6_agreement"
    """statistic, low, high: agreement with the other model gained on completions that changed, beyond chance; bound: a
    share of what that model itself would gain; p: that it is not this share; n: prompts."""
    V6_OUTCOME = "v6_outcome"
    """statistic, low, high: the part of the agreement beyond chance that is about being right; p: that it is 0."""
    V6_ENDING = "v6_ending"
    """The same of the class in which a completion ends. Reported only."""
    V6_TEXT = "v6_text"
    """The same of the words of a completion. Reported only."""
    V6_NEW_FAILURES = "v6_new_failures"
    """statistic: share of completions that fail as neither model does; bound: largest share; detail: the most frequent
    ending of these."""
    V6_DICTIONARIES = "v6_dictionaries"
    """statistic: dictionaries in which V6 holds; bound: how many must; n: dictionaries."""
    V6_BROKEN = "v6_broken"
    """statistic, low, high: share of new failures minus its bound, 1 - 2 alpha; passed: the edit is shown to break the
    model, of several dictionaries in as many as must agree, each by itself; n: dictionaries in which it is."""
    V6_AWAY = "v6_away"
    """statistic: ways in which the model is shown not to move toward the other one; detail: which; passed: there are
    some, of several dictionaries in as many as must agree, each by itself; n: dictionaries in which one is shown; high:
    upper end of the share of the divergence that is closed, which as many of their own intervals stay below."""
    NON_FINITE = "non_finite_logits"
    """statistic: arms in which some logits were not finite; detail: which. Reported only."""
    FRESH = "fresh_differs"
    """statistic, low, high, p: change of accuracy by other seeds alone; passed: none is shown. Reported only."""
    STEERING = "beats_steering"
    """statistic, low, high, p: the set's effect minus that of one mean-shift vector. Reported only."""
    RANDOM_DIRECTION = "beats_random_direction"
    """The same against a random direction of equal norm. Reported only."""
    OVER_STEERING = "over_steering"
    """statistic: doses beyond the main one that do worse or break the format; detail: which. Reported only."""
    V5_TASKS = "v5_tasks"
    """statistic: target tasks in which the effect is significant on its own (Holm); n: tasks. Reported only."""
    V5_DICTIONARIES = "v5_dictionaries"
    """The same over dictionaries."""
    V5_SETS = "v5_sets"
    """statistic: dictionaries that have a set; n: dictionaries, bound: as many; detail: numbers of those without."""


class State(StrEnum):
    """What became of a check."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_ESTIMABLE = "not_estimable"
    ABSENT = "absent"
    """Not looked at."""


REQUIREMENTS: Final = {
    "v1": (Check.V1_EFFECT, Check.V1_DICTIONARIES),
    "v2": (Check.V2_RANK, Check.V2_CONTROLS),
    "v3": (Check.V3_DOSE, Check.V3_FALL),
    "v4": (Check.V4_ACCURACY, Check.V4_FORMAT, Check.V4_NEUTRAL_KL),
    "v6": (Check.V6_KL, Check.V6_AGREEMENT, Check.V6_NEW_FAILURES, Check.V6_DICTIONARIES),
}
"""Checks that each requirement of CAUSAL_SPECIFIC consists of, where they are looked at."""


class Decision(StrEnum):
    """What a verdict rests on."""

    PASSTHROUGH_NOT_NOOP = "passthrough_not_noop"
    EQUIVALENT_TO_ZERO = "equivalent_to_zero"
    V1_FAILED = "v1_failed"
    V2_NOT_ESTIMABLE = "v2_not_estimable"
    V2_NOT_SHOWN = "v2_not_shown"
    V2_FAILED = "v2_failed"
    V6_DESTROYED = "v6_destroyed"
    V3_FAILED = "v3_failed"
    V4_FAILED = "v4_failed"
    V4_NOT_ESTIMABLE = "v4_not_estimable"
    V6_FAILED = "v6_failed"
    V6_NOT_SHOWN = "v6_not_shown"
    V5_DICTIONARIES = "v5_dictionaries"
    ALL_PASSED = "all_passed"


EXPLANATIONS: Final = {
    Decision.PASSTHROUGH_NOT_NOOP: "hooks that edit nothing change completions",
    Decision.EQUIVALENT_TO_ZERO: "the interval lies within the margin",
    Decision.V1_FAILED: "neither an effect nor its absence is shown",
    Decision.V2_NOT_ESTIMABLE: "no comparable random sets, or too few",
    Decision.V2_NOT_SHOWN: "the set is not shown to do more than random sets, nor they to do as much",
    Decision.V2_FAILED: "matched random sets have effects as large",
    Decision.V6_DESTROYED: "failures that neither model shows make up most of the effect",
    Decision.V3_FAILED: "accuracy is not shown to follow the dose",
    Decision.V4_FAILED: "side effects are not shown to be small",
    Decision.V4_NOT_ESTIMABLE: "what was measured cannot tell side effects",
    Decision.V6_FAILED: "the edited model does not move toward the other model",
    Decision.V6_NOT_SHOWN: "the edited model is not shown to move toward the other model",
    Decision.V5_DICTIONARIES: "no set of some dictionaries could be tried",
    Decision.ALL_PASSED: "every criterion holds",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the table of criteria; numbers that do not apply are NaN, see :class:`Check`."""

    check: Check
    passed: bool | None
    """None: not estimable."""
    statistic: float = nan
    low: float = nan
    high: float = nan
    bound: float = nan
    p_value: float = nan
    n: float = nan
    detail: str = ""
    """Names that belong to the numbers, e.g. tasks."""

    def __post_init__(self) -> None:
        for name in NUMBERS:
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def state(self) -> State:
        """What became of it."""
        return State.NOT_ESTIMABLE if self.passed is None else State.PASSED if self.passed else State.FAILED

    def __str__(self) -> str:
        """``code: numbers in words``."""
        code = _FAILED_CODES.get(self.check, self.check) if self.passed is False else self.check
        template = _NOT_ESTIMABLE.get(self.check, "not estimable") if self.passed is None else _TEMPLATES[self.check]
        numbers = {name: getattr(self, name) for name in NUMBERS}
        points = {f"{name}_points": 100 * value for name, value in numbers.items()}
        change = "{statistic_points:+.1f} points [{low_points:+.1f}, {high_points:+.1f}]".format(**points)
        words = template.format(**numbers, **points, change=change, detail=self.detail).strip()
        return f"{code}: {words}"


Findings = tuple[Finding, ...]

NUMBERS: Final = ("statistic", "low", "high", "bound", "p_value", "n")
"""Columns of the table of criteria."""
_FAILED_CODES: Final = {
    Check.STEERING: "does_not_beat_steering",
    Check.RANDOM_DIRECTION: "does_not_beat_random_direction",
}
"""Where failing has a name of its own."""
_NOT_ESTIMABLE: Final = {
    Check.V2_RANK: "not estimable, no random sets",
    Check.V2_RANDOM_SETS: "not estimable, no random sets",
    Check.V3_DOSE: "not estimable, {n:g} doses between no edit and the main one, of {bound:g} needed",
    Check.V4_ACCURACY: "not estimable, no unrelated task that the unedited model gets right often enough to lose any, "
    "name some under selection.control_tasks",
    Check.V4_NEUTRAL_KL: "not estimable, the neutral texts have no tokens where edits act, or words that go with where "
    "the models differ, name others under intervention.neutral_text ({statistic:.3g} nats a token, limit {bound:.3g})",
    Check.V6_KL: "not estimable, no divergences",
    Check.V6_AGREEMENT: "not estimable, no completion changed in a task of several prompts",
}
_TEMPLATES: Final = {
    Check.NON_FINITE: "{detail}",
    Check.PASSTHROUGH: "changed {statistic:.1%} of completions (at most {bound:.0%})",
    Check.V1_EFFECT: "{change}, p={p_value:.3g}",
    Check.V1_DICTIONARIES: "{statistic:g} of {n:g} have the direction of the mean ({bound:g} must): {detail}",
    Check.V1_OPPOSITE: "accuracy changed against the prediction, {change}",
    Check.NO_EFFECT: "{change} for a margin of {bound_points:g}",
    Check.V2_RANK: "rank p={p_value:.3g} among {n:g} random sets{detail}",
    Check.V2_CONTROLS: "{detail}",
    Check.V2_RANDOM_SETS: "{statistic:.0%} [{low:.0%}, {high:.0%}] of {n:g} have at least half of the set's effect",
    Check.V3_DOSE: "higher minus lower of {n:g} intermediate doses {change}, p={p_value:.3g}, dose: accuracy (isotonic "
    "fit) {detail}",
    Check.V3_FALL: "deepest fall between two rising doses {statistic_points:+.1f} points, p={p_value:.3g}",
    Check.V4_ACCURACY: "on {n:g} unrelated prompts changes by no less than {low_points:+.1f} points "
    "(margin {bound_points:+g})",
    Check.V4_TASKS: "nothing to lose in {detail}: right on at most {statistic:.1%} unedited ({bound:.0%} needed)",
    Check.V4_FORMAT: "broken completions on unrelated tasks {statistic:+.1%} (at most {bound:+.1%})",
    Check.V4_NEUTRAL_KL: "{statistic:.3g} nats a token (limit {bound:.3g})",
    Check.V4_NEUTRAL_TEXT: "{statistic:.0%} of neutral texts have words that go with where the models differ (at most "
    "{bound:.0%}): {detail}",
    Check.V4_LENGTH: "completions on unrelated tasks {bound:.1f} -> {statistic:.1f} tokens, reported only",
    Check.V6_KL: "closes {statistic:.0%} of the divergence from the other model ({bound:.0%} needed), p={p_value:.3g}",
    Check.V6_AGREEMENT: "with the other model beyond chance, on completions of {n:g} prompts that changed, {change} "
    "({bound_points:+.1f} needed), p={p_value:.3g}",
    Check.V6_OUTCOME: "agreement beyond chance in being right {change}, p={p_value:.3g}",
    Check.V6_ENDING: "agreement beyond chance in the ending {change}, p={p_value:.3g}",
    Check.V6_TEXT: "agreement beyond chance in words {change}, p={p_value:.3g}",
    Check.V6_NEW_FAILURES: "{statistic:.1%} new failures (at most {bound:.1%}; most: {detail})",
    Check.V6_DICTIONARIES: "it holds in {statistic:g} of {n:g} ({bound:g} needed)",
    Check.V6_BROKEN: "new failures minus their bound {change}",
    Check.V6_AWAY: "shown by {detail}",
    Check.V5_SETS: "{statistic:g} of {n:g} dictionaries have a set: {detail}",
    Check.FRESH: "other seeds alone change accuracy by {change}, p={p_value:.3g}",
    Check.STEERING: "lead of the set over steering, in the claimed direction, {change}, p={p_value:.3g}",
    Check.RANDOM_DIRECTION: "lead of the set over a random one, in the claimed direction, {change}, p={p_value:.3g}",
    Check.OVER_STEERING: "{detail}",
    Check.V5_TASKS: "{statistic:g} of {n:g} tasks on their own (Holm): {detail}",
    Check.V5_DICTIONARIES: "{statistic:g} of {n:g} dictionaries on their own (Holm): {detail}",
}
_QUIET: Final = dict.fromkeys(
    (
        *(Check.PASSTHROUGH, Check.NON_FINITE, Check.V1_DICTIONARIES, Check.V3_FALL, Check.V4_NEUTRAL_TEXT),
        *(Check.FRESH, Check.OVER_STEERING, Check.V5_TASKS, Check.V5_DICTIONARIES, Check.V5_SETS),
    ),
    State.PASSED,
) | dict.fromkeys((Check.NO_EFFECT, Check.V6_BROKEN, Check.V6_AWAY), State.FAILED)
"""Checks that are not worth a sentence among the reasons in this state."""


def reason(finding: Finding) -> str:
    """Its sentence; empty where it is not worth one. Reasons are joined by semicolons, so that none may contain one."""
    nothing_to_say = finding.check is Check.V2_CONTROLS and not finding.detail
    if nothing_to_say or finding.state is _QUIET.get(finding.check):
        return ""
    return str(finding).replace("; ", ", ")


def reasons(decision: Decision, findings: Findings) -> tuple[str, ...]:
    """``code: explanation`` each, what a verdict rests on first."""
    said = tuple(sentence for finding in findings if (sentence := reason(finding)))
    return said if decision is Decision.ALL_PASSED else (f"{decision}: {EXPLANATIONS[decision]}", *said)


# -- tables of findings


def of_check(findings: Findings, check: Check) -> Finding | None:
    """The row of a check, None if it was not looked at."""
    return next((finding for finding in findings if finding.check is check), None)


def passed(findings: Findings, check: Check) -> bool:
    """Whether a check was looked at and has passed."""
    row = of_check(findings, check)
    return row is not None and row.passed is True


def holds(findings: Findings, requirement: str) -> bool:
    """Whether a requirement was looked at, and all of its checks that were have passed."""
    rows = [row for check in REQUIREMENTS[requirement] if (row := of_check(findings, check)) is not None]
    return bool(rows) and all(row.passed is True for row in rows)


def failed(findings: Findings, requirement: str) -> bool:
    """Whether a check of a requirement was looked at and has failed, rather than not been estimable."""
    rows = (of_check(findings, check) for check in REQUIREMENTS[requirement])
    return any(row is not None and row.passed is False for row in rows)


def as_columns(findings: Findings) -> dict[str, np.ndarray]:
    """Numbers, states and names [check], one entry for every member of :class:`Check`."""
    rows = [of_check(findings, check) for check in Check]
    columns: dict[str, np.ndarray] = {
        f"criterion_{name}": np.array([nan if row is None else getattr(row, name) for row in rows]) for name in NUMBERS
    }
    columns["criterion_state"] = np.array([str(State.ABSENT if row is None else row.state) for row in rows])
    columns["criterion_detail"] = np.array(["" if row is None else row.detail for row in rows], dtype=object)
    return columns


def from_columns(columns: Mapping[str, Any]) -> Findings:
    """The findings that :func:`as_columns` was given, in the order of :class:`Check`.

    Parameters
    ----------
    columns
        Its columns, or one direction of a stored result.
    """
    known = {name: np.asarray(columns[f"criterion_{name}"]) for name in (*NUMBERS, "state", "detail")}
    states: dict[str, bool | None] = {State.PASSED: True, State.FAILED: False, State.NOT_ESTIMABLE: None}
    return tuple(
        Finding(
            check=check,
            passed=states[str(known["state"][i])],
            detail=str(known["detail"][i]),
            **{name: known[name][i] for name in NUMBERS},
        )
        for i, check in enumerate(Check)
        if known["state"][i] != State.ABSENT
    )
