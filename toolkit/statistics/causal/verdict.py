"""The verdict of a causal trial, from outcome tables alone (docs/method.md 4d)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.toolkit.statistics.causal.criteria import (
    Settings,
    baselines,
    dose_response,
    effect_shown,
    failure_mode_match,
    fresh_seeds,
    isotonic_fit,
    machinery,
    no_effect,
    over_steered,
    over_steering,
    random_sets_do_as_much,
    replication,
    side_effects,
    specificity,
)
from rlgen_stats.toolkit.statistics.causal.findings import (
    REQUIREMENTS,
    Check,
    Decision,
    Findings,
    failed,
    from_columns,
    holds,
    of_check,
    passed,
    reasons,
)
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
        The table of criteria: every number that decided, and from which name and decision follow (:func:`decide`).
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
    findings: Findings
    effects: PairedEffect
    shares: Floats
    dose_fit: Floats
    over_steered: NDArray[np.bool_]

    @property
    def requirements(self) -> dict[str, bool]:
        """Whether each of v1, v2, v3, v4, v6 holds."""
        return {name: holds(self.findings, name) for name in REQUIREMENTS}

    @property
    def rank_p(self) -> float:
        """Rank p-value against the random sets, NaN without any."""
        row = of_check(self.findings, Check.V2_RANK)
        return np.nan if row is None else row.p_value

    @property
    def reasons(self) -> tuple[str, ...]:
        """``code: numbers in words`` each, what the verdict rests on first."""
        return reasons(self.decision, self.findings)

    @property
    def v5(self) -> str:
        """Replication over tasks and dictionary seeds, in words."""
        rows = [of_check(self.findings, check) for check in (Check.V5_TASKS, Check.V5_DICTIONARIES)]
        words = [str(row).partition(": ")[2] for row in rows if row is not None]
        return ". ".join(words if len(words) > 1 else [*words, "One dictionary: not replicated in another"])


DEFAULTS: Final = Settings()


def judge(table: OutcomeTable, settings: Settings = DEFAULTS) -> Verdict:
    """Decide what an edit of the set did, against its controls.

    Parameters
    ----------
    table
        Outcomes of all arms of one direction; of one's own arms :func:`~rlgen_stats.toolkit.statistics.arms_table`.
    settings
        Error rates and margins, and whether the random sets are comparable to the set.

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
    within the margin; CAUSAL_NONSPECIFIC V1 and many random sets that do as much; DESTRUCTIVE V1 and either new
    failures shown to make up most of the effect, or a model shown not to move toward the other one; or, whether or not
    accuracy is shown to change, a model shown to move away from the other one by more than a tenth of the way; of
    several dictionaries in as many as must agree, each by itself.
    Anything else is INCONCLUSIVE, and so is everything where a dictionary has no set to try, since every dictionary
    has to say the same: what refutes one requirement is not undone by what another leaves open.
    """
    differences = table.change(table.target)
    clusters = table.cluster[table.target]
    effects = paired_effect(
        differences, clusters, alpha=settings.alpha, seed=settings.seed, n_resamples=settings.n_resamples
    )
    found = (
        *machinery(settings),
        *effect_shown(table, effects, settings),
        *no_effect(table, settings),
        *specificity(table, effects, settings),
        *random_sets_do_as_much(table, settings),
        *dose_response(table, settings),
        *side_effects(table, settings),
        *failure_mode_match(table, settings),
        *fresh_seeds(table, effects, settings),
        *baselines(table, settings),
        *over_steering(table, effects, settings),
        *replication(table, settings),
    )
    findings = tuple(sorted(found, key=lambda row: list(Check).index(row.check)))
    verdict, decision = decide(findings)
    return Verdict(
        verdict=verdict,
        decision=decision,
        findings=findings,
        effects=effects,
        shares=table.shares(table.target),
        dose_fit=isotonic_fit(table),
        over_steered=over_steered(table, effects, settings),
    )


def decide(findings: Findings) -> tuple[VerdictName, Decision]:
    """Name of a verdict and what it rests on, from the table of criteria alone; the first rule that applies decides.

    Examples
    --------
    >>> from rlgen_stats.toolkit.statistics.causal.findings import Finding
    >>> equivalent = Finding(check=Check.NO_EFFECT, passed=True)
    >>> decide((Finding(check=Check.PASSTHROUGH, passed=True), equivalent))[0]
    'NO_EFFECT'
    """
    if not passed(findings, Check.PASSTHROUGH):
        return "INCONCLUSIVE", Decision.PASSTHROUGH_NOT_NOOP
    if of_check(findings, Check.V5_SETS) is not None and not passed(findings, Check.V5_SETS):
        return "INCONCLUSIVE", Decision.V5_DICTIONARIES
    if not holds(findings, "v1"):
        if passed(findings, Check.NO_EFFECT):
            return "NO_EFFECT", Decision.EQUIVALENT_TO_ZERO
        if _moves_away(findings):
            return "DESTRUCTIVE", Decision.V6_FAILED
        return "INCONCLUSIVE", Decision.V1_FAILED
    comparable, special = passed(findings, Check.V2_CONTROLS), passed(findings, Check.V2_RANK)
    if comparable and not special and passed(findings, Check.V2_RANDOM_SETS):
        return "CAUSAL_NONSPECIFIC", Decision.V2_FAILED
    if passed(findings, Check.V6_BROKEN):
        return "DESTRUCTIVE", Decision.V6_DESTROYED
    if passed(findings, Check.V6_AWAY):
        return "DESTRUCTIVE", Decision.V6_FAILED
    if not comparable:
        return "INCONCLUSIVE", Decision.V2_NOT_ESTIMABLE
    if not special:
        return "INCONCLUSIVE", Decision.V2_NOT_SHOWN if failed(findings, "v2") else Decision.V2_NOT_ESTIMABLE
    if not holds(findings, "v3"):
        return "INCONCLUSIVE", Decision.V3_FAILED
    if not holds(findings, "v4"):
        return "INCONCLUSIVE", Decision.V4_FAILED if failed(findings, "v4") else Decision.V4_NOT_ESTIMABLE
    if not holds(findings, "v6"):
        return "INCONCLUSIVE", Decision.V6_NOT_SHOWN
    return "CAUSAL_SPECIFIC", Decision.ALL_PASSED


def decided_again(trial: xr.Dataset) -> xr.Dataset:
    """A stored trial with the verdict, what it rests on, and the reasons that the present rules give its criteria.

    Rules change between releases, criteria that were measured do not: finished studies need no new trial.

    Parameters
    ----------
    trial
        Results group ``intervention`` or a trial's.

    Returns
    -------
    Dataset
        ``trial`` itself where nothing changes; directions without a verdict stay as they are.
    """
    changed = {name: trial[name].values.astype(object) for name in ("verdict", "decided_by", "reasons")}
    for i, (verdict, decision) in enumerate(zip(changed["verdict"], changed["decided_by"], strict=True)):
        if not decision:
            continue
        findings = from_columns(cast(Mapping[str, Any], trial.isel(direction=i)))
        if (now := decide(findings)) != (verdict, decision):
            changed["verdict"][i], changed["decided_by"][i] = now
            changed["reasons"][i] = "; ".join(reasons(now[1], findings))
    if all((trial[name].values == values).all() for name, values in changed.items()):
        return trial
    return trial.assign({name: (trial[name].dims, values) for name, values in changed.items()})


def _moves_away(findings: Findings) -> bool:
    """Whether the divergence from the other model is shown to grow, by at least the share that it should shrink by."""
    divergence, away = (of_check(findings, check) for check in (Check.V6_KL, Check.V6_AWAY))
    if divergence is None or away is None or not away.passed:
        return False
    high = divergence.high if np.isnan(away.high) else away.high  # earlier releases had one interval for all
    return bool(high < -divergence.bound)
