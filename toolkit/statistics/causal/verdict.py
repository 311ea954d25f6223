"""The verdict of a causal trial, from outcome tables alone (docs/method.md 4d)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.toolkit.statistics.causal.criteria import (
    NOOP_CHANGE,
    Criterion,
    FailureMode,
    Settings,
    baselines,
    dose_response,
    effect_shown,
    failure_mode_match,
    fresh_seeds,
    isotonic_fit,
    no_effect,
    over_steered,
    over_steering,
    random_sets_do_as_much,
    replication,
    side_effects,
    specificity,
)
from rlgen_stats.toolkit.statistics.causal.findings import Check, Decision, Finding, explain, of_check, reason
from rlgen_stats.toolkit.statistics.causal.outcome_table import Floats, OutcomeTable, PairedEffect, paired_effect

VerdictName = Literal["CAUSAL_SPECIFIC", "DESTRUCTIVE", "CAUSAL_NONSPECIFIC", "NO_EFFECT", "INCONCLUSIVE"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the trial shows.

    Attributes
    ----------
    verdict
        CAUSAL_SPECIFIC, DESTRUCTIVE, CAUSAL_NONSPECIFIC, NO_EFFECT or INCONCLUSIVE.
    decision
        What it rests on.
    findings
        The table of criteria: every number that decided.
    rank_p
        Rank p-value against the random sets, NaN without any.
    v1, v2, v3, v4, v6
        Whether each requirement holds.
    effects
        Per condition on the target prompts, arm minus unedited.
    shares
        [condition, class] endings on the target prompts.
    dose_fit
        [condition] isotonic fit of accuracy, NaN off the dose curve.
    over_steered
        [condition] doses beyond the main one that do worse or break the format.
    """

    verdict: VerdictName
    decision: Decision
    findings: tuple[Finding, ...]
    rank_p: float
    v1: bool
    v2: bool
    v3: bool
    v4: bool
    v6: bool
    effects: PairedEffect
    shares: Floats
    dose_fit: Floats
    over_steered: NDArray[np.bool_]

    @property
    def reasons(self) -> tuple[str, ...]:
        """``code: numbers in words`` each, what the verdict rests on first."""
        said = tuple(sentence for finding in self.findings if (sentence := reason(finding)))
        return said if self.decision is Decision.ALL_PASSED else (explain(self.decision), *said)

    @property
    def v5(self) -> str:
        """Replication over tasks and dictionary seeds, in words."""
        rows = [of_check(self.findings, check) for check in (Check.V5_TASKS, Check.V5_DICTIONARIES)]
        words = [str(row).partition(": ")[2] for row in rows if row is not None]
        return ". ".join(words if len(words) > 1 else [*words, "One dictionary: not replicated in another"])


def judge(table: OutcomeTable, settings: Settings) -> Verdict:
    """Decide what an edit of the set did, against its controls.

    Parameters
    ----------
    table
        Outcomes of all arms of one direction.
    settings
        Error rates and margins.

    Returns
    -------
    Verdict

    Notes
    -----
    V1 effect: sign-flip p <= alpha over prompt clusters and a cluster interval beyond ``MIN_EFFECT`` in the predicted
    direction. V2 specificity: rank p among matched random sets <= alpha, the sets being comparable. V3 dose response
    on the doses strictly between no edit and the main one. V4 no side effects on unrelated tasks. V5 replication,
    reported. V6 failure-mode match: the edited model moves toward the other model, prompt by prompt, and does not
    break. V1 to V4 and V6 make CAUSAL_SPECIFIC. Every other verdict needs evidence of its own: NO_EFFECT equivalence
    within the margin; CAUSAL_NONSPECIFIC V1 and many random sets that do as much; DESTRUCTIVE V1, V2 and either new
    failures shown to make up most of the effect, or a model shown not to move toward the other one. Anything else is
    INCONCLUSIVE.
    """
    differences = table.change(table.target)
    clusters = table.cluster[table.target]
    effects = paired_effect(
        differences, clusters, alpha=settings.alpha, seed=settings.seed, n_resamples=settings.n_resamples
    )
    v1, none = effect_shown(table, effects, settings), no_effect(table, settings)
    v2, rank_p = specificity(table, effects, settings)
    as_much = random_sets_do_as_much(table, settings)
    v3, v4, v6 = dose_response(table, settings), side_effects(table, settings), failure_mode_match(table, settings)
    criteria = _Criteria(v1=v1, none=none, v2=v2, as_much=as_much, v3=v3, v4=v4, v6=v6, rank_p=rank_p)
    name, decision = _combine(table, settings, criteria)
    parts = (v1, none, v2, as_much, v3, v4, v6.criterion)
    noop = settings.noop_changed
    machinery = Finding(check=Check.PASSTHROUGH, passed=noop <= NOOP_CHANGE, statistic=noop, bound=NOOP_CHANGE)
    return Verdict(
        verdict=name,
        decision=decision,
        findings=(
            machinery,
            *(finding for part in parts for finding in part.findings),
            *fresh_seeds(table, effects, settings),
            *baselines(table, settings),
            *over_steering(table, effects, settings),
            *replication(table, settings),
        ),
        rank_p=rank_p,
        v1=v1.passed,
        v2=v2.passed,
        v3=v3.passed,
        v4=v4.passed,
        v6=v6.criterion.passed,
        effects=effects,
        shares=table.shares(table.target),
        dose_fit=isotonic_fit(table),
        over_steered=over_steered(table, effects, settings),
    )


@dataclass(frozen=True, kw_only=True)
class _Criteria:
    """What a verdict is combined from."""

    v1: Criterion
    none: Criterion
    v2: Criterion
    as_much: Criterion
    v3: Criterion
    v4: Criterion
    v6: FailureMode
    rank_p: float


def _combine(table: OutcomeTable, settings: Settings, criteria: _Criteria) -> tuple[VerdictName, Decision]:
    """Name of the verdict and what it rests on; the first rule that applies decides."""
    if settings.noop_changed > NOOP_CHANGE:
        return "INCONCLUSIVE", Decision.PASSTHROUGH_NOT_NOOP
    if not criteria.v1.passed:
        if criteria.none.passed:
            return "NO_EFFECT", Decision.EQUIVALENT_TO_ZERO
        return "INCONCLUSIVE", Decision.V1_FAILED
    if np.isnan(criteria.rank_p) or not settings.comparable:
        return "INCONCLUSIVE", Decision.V2_NOT_ESTIMABLE
    if not criteria.v2.passed:
        if criteria.as_much.passed:
            return "CAUSAL_NONSPECIFIC", Decision.V2_FAILED
        smallest = 1 / (max(len(table.where("random")), settings.n_planned) + 1)
        return "INCONCLUSIVE", Decision.V2_NOT_ESTIMABLE if smallest > settings.alpha else Decision.V2_NOT_SHOWN
    if criteria.v6.broke:
        return "DESTRUCTIVE", Decision.V6_DESTROYED
    if criteria.v6.away:
        return "DESTRUCTIVE", Decision.V6_FAILED
    if not criteria.v3.passed:
        return "INCONCLUSIVE", Decision.V3_FAILED
    if not criteria.v4.passed:
        accuracy = of_check(criteria.v4.findings, Check.V4_ACCURACY)
        known = accuracy is not None and accuracy.passed is not None
        return "INCONCLUSIVE", Decision.V4_FAILED if known else Decision.V4_NOT_ESTIMABLE
    if not criteria.v6.criterion.passed:
        return "INCONCLUSIVE", Decision.V6_NOT_SHOWN
    if settings.missing:
        return "INCONCLUSIVE", Decision.V5_DICTIONARIES
    return "CAUSAL_SPECIFIC", Decision.ALL_PASSED
