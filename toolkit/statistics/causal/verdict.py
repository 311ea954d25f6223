"""The verdict of a causal trial, from outcome tables alone (docs/method.md 4d)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.toolkit.statistics.causal.criteria import (
    NOOP_CHANGE,
    Criterion,
    Settings,
    baselines,
    dose_response,
    effect_shown,
    failure_mode_match,
    fresh_seeds,
    interval,
    isotonic_fit,
    over_steered,
    over_steering,
    replication,
    side_effects,
    specificity,
)
from rlgen_stats.toolkit.statistics.causal.outcome_table import Floats, OutcomeTable, PairedEffect, paired_effect

VerdictName = Literal["CAUSAL_SPECIFIC", "DESTRUCTIVE", "CAUSAL_NONSPECIFIC", "NO_EFFECT", "INCONCLUSIVE"]

NOT_SHOWN: Final = {
    "v3": "accuracy is not shown to follow the dose",
    "v4": "side effects are not shown to be small",
}
"""What is not shown where this criterion fails; the verdict is then open."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the trial shows.

    Attributes
    ----------
    verdict
        CAUSAL_SPECIFIC, DESTRUCTIVE, CAUSAL_NONSPECIFIC, NO_EFFECT or INCONCLUSIVE.
    reasons
        ``code: detail`` each; the code is for machines.
    rank_p
        Rank p-value against the random sets, NaN without any.
    v1, v2, v3, v4, v6
        Whether each requirement holds.
    v5
        Replication over tasks and dictionary seeds, in words.
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
    reasons: tuple[str, ...]
    rank_p: float
    v1: bool
    v2: bool
    v3: bool
    v4: bool
    v5: str
    v6: bool
    effects: PairedEffect
    shares: Floats
    dose_fit: Floats
    over_steered: NDArray[np.bool_]


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
    between no edit and the main dose. V4 no side effects on unrelated tasks. V5 replication, reported. V6 failure-mode
    match: the edited model moves toward the other model rather than breaking. V1 fails: NO_EFFECT if equivalent to zero
    within the margin, else INCONCLUSIVE. V1 without V2: CAUSAL_NONSPECIFIC. V1 and V2 with new failures making up most
    of the effect, or V1 to V4 without V6: DESTRUCTIVE. V1 to V4 and V6: CAUSAL_SPECIFIC. Anything else is INCONCLUSIVE.
    """
    differences = table.change(table.target)
    clusters = table.cluster[table.target]
    effects = paired_effect(
        differences, clusters, alpha=settings.alpha, seed=settings.seed, n_resamples=settings.n_resamples
    )
    effects = replace(effects, low=np.maximum(effects.low, -1.0), high=np.minimum(effects.high, 1.0))  # of accuracies
    v1 = effect_shown(table, effects, settings)
    v2, rank_p = specificity(table, effects, settings)
    v3 = dose_response(table, settings)
    v4 = side_effects(table, settings)
    v6, broke = failure_mode_match(table, settings)
    notes = (
        *fresh_seeds(table, effects, settings),
        *baselines(table, settings),
        *over_steering(table, effects, settings),
    )
    criteria = _Criteria(v1=v1, v2=v2, v3=v3, v4=v4, v6=v6, broke=broke, rank_p=rank_p)
    name, why = _combine(table, settings, criteria)
    return Verdict(
        verdict=name,
        reasons=(*why, *v1.reasons, *v2.reasons, *v3.reasons, *v4.reasons, *v6.reasons, *notes),
        rank_p=rank_p,
        v1=v1.passed,
        v2=v2.passed,
        v3=v3.passed,
        v4=v4.passed,
        v5=replication(table, settings),
        v6=v6.passed,
        effects=effects,
        shares=table.shares(table.target),
        dose_fit=isotonic_fit(table),
        over_steered=over_steered(table, effects, settings),
    )


@dataclass(frozen=True, kw_only=True)
class _Criteria:
    """What a verdict is combined from."""

    v1: Criterion
    v2: Criterion
    v3: Criterion
    v4: Criterion
    v6: Criterion
    broke: bool
    """Whether failures that neither model shows make up most of the effect."""
    rank_p: float


def _combine(table: OutcomeTable, settings: Settings, criteria: _Criteria) -> tuple[VerdictName, tuple[str, ...]]:
    """Name of the verdict and its reasons; the first rule that applies decides."""
    if settings.noop_changed > NOOP_CHANGE:
        return "INCONCLUSIVE", (f"passthrough_not_noop: it changed {settings.noop_changed:.1%} of completions",)
    if not criteria.v1.passed:
        low, high = interval(table, settings, table.chosen, table.target, 2 * settings.alpha)  # two one-sided tests
        if -settings.margin < low and high < settings.margin:
            return "NO_EFFECT", (f"equivalent_to_zero: interval {low:+.3f} to {high:+.3f}, margin {settings.margin}",)
        return "INCONCLUSIVE", ("v1_failed: neither an effect nor its absence is shown",)
    if np.isnan(criteria.rank_p) or not settings.comparable:
        return "INCONCLUSIVE", ("v2_not_estimable: no comparable random sets",)
    if not criteria.v2.passed:
        smallest = 1 / (max(len(table.where("random")), settings.n_planned) + 1)
        if smallest > settings.alpha:
            return "INCONCLUSIVE", (f"v2_not_estimable: smallest possible rank p is {smallest:.3f}",)
        return "CAUSAL_NONSPECIFIC", ("v2_failed: matched random sets have effects as large",)
    if criteria.broke:
        return "DESTRUCTIVE", ("v6_destroyed: failures that neither model shows make up most of the effect",)
    failed = [name for name, criterion in (("v3", criteria.v3), ("v4", criteria.v4)) if not criterion.passed]
    if failed:
        return "INCONCLUSIVE", tuple(f"{name}_failed: {NOT_SHOWN[name]}" for name in failed)
    if not criteria.v6.passed:
        return "DESTRUCTIVE", ("v6_failed: the edited model does not move toward the other model",)
    if settings.missing:
        numbers = ", ".join(map(str, settings.missing))
        return "INCONCLUSIVE", (f"v5_dictionaries: no set of dictionary {numbers} could be tried",)
    return "CAUSAL_SPECIFIC", ()
