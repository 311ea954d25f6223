"""C4 and C5: whether editing the set during generation changes accuracy in the claimed direction, and specifically."""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final

import numpy as np
import xarray as xr

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.claims.claim import Claim, PaperClaim
from rlgen_stats.toolkit.reporting.claims.replication import dictionary_caveat, health_caveat, unusable_readout
from rlgen_stats.toolkit.reporting.formatting import count, fixed, hundred, interval, listed, p_text, percent
from rlgen_stats.toolkit.reporting.result_lookup import (
    Results,
    attr_list,
    attr_number,
    by_dictionary,
    labels_of,
    number,
    text,
)
from rlgen_stats.toolkit.reporting.source_study import effect_ranges
from rlgen_stats.toolkit.statistics.causal.criteria import MIN_EFFECT
from rlgen_stats.toolkit.statistics.causal.findings import Decision
from rlgen_stats.toolkit.statistics.causal.mediated_share import NEAREST, RESCALED, SET, of_patch
from rlgen_stats.toolkit.statistics.claim_verdicts import Verdict, causal_verdict, smallest_rank_p, within_minimum

_UNIT: Final = "percentage points of accuracy"
C4: Final = PaperClaim(
    id="C4",
    statement="Disabling that set in the RL model lowers its out-of-domain accuracy",
    short="Switching them off hurts RL",
    unit=_UNIT,
    paper_figure=f"Accuracy falls by {effect_ranges('disable')}",
)
C5: Final = PaperClaim(
    id="C5",
    statement="Amplifying that set in the base model raises its accuracy",
    short="Turning them up helps base",
    unit=_UNIT,
    paper_figure=f"Accuracy rises by {effect_ranges('amplify')}",
)

CHECKS: Final = {
    "v1": "V1 effect",
    "v2": "V2 specific",
    "v3": "V3 dose response",
    "v4": "V4 no side effects",
    "v5": "V5 replicated",
    "v6": "V6 failure-mode match",
}
"""Labels of the six checks of causal verification (docs/method.md 4d)."""
CHECK_KEYS: Final = CHECKS | {"v6": "V6 mode"}
"""Names of the checks in report.json, which programs read and which therefore stay as they were first written."""


def assess_disabling(results: Results, spec: StudySpec) -> Claim:
    """C4 from the direction 'disable'; the rule is ``causal_verdict``."""
    return _assess(results, spec, C4, direction="disable", claimed=-1)


def assess_amplification(results: Results, spec: StudySpec) -> Claim:
    """C5 from the direction 'amplify'; the rule is ``causal_verdict``."""
    return _assess(results, spec, C5, direction="amplify", claimed=1)


def main_condition(data: xr.Dataset, direction: str) -> str | None:
    """The condition that edits the set itself at the main dose, None if there is none."""
    kinds = zip(data["condition"].values, data["kind"].sel(direction=direction).values, strict=True)
    return next((str(condition) for condition, kind in kinds if str(kind) == "set"), None)


_IN_SHORT: Final = {
    "DESTRUCTIVE": "it breaks the model",
    "CAUSAL_NONSPECIFIC": "random features do as much",
    "NO_EFFECT": "equivalent to no effect",
    "INCONCLUSIVE": "not every check of the trial held",
    Decision.V5_DICTIONARIES: "not every dictionary has a set",
}
"""Verdict of a trial, or what it rests on -> why its claim is not supported, in a few words."""


def _assess(results: Results, spec: StudySpec, paper: PaperClaim, *, direction: str, claimed: int) -> Claim:
    data = results.get("intervention")
    if data is None:
        return paper.not_estimable("no intervention has been run")
    unusable = unusable_readout(results, spec)
    if unusable:
        return paper.not_estimable(unusable)
    if direction not in labels_of(data, "direction"):
        return paper.not_estimable(f"no arm edits the set in the direction '{direction}'")
    condition, reasons = main_condition(data, direction), _reasons(data, direction)
    if condition is None:
        explained = "; ".join(_coded(reason)[1] or reason for reason in reasons)
        reason = explained or f"no arm edits the set in the direction '{direction}'"
        return paper.not_estimable(reason.rstrip("."))
    arm = {"direction": direction, "condition": condition}
    effect, low, high, p_value = (
        number(data, name, **arm) for name in ("effect", "effect_low", "effect_high", "p_value")
    )
    causal, decision = (text(data, name, direction=direction) for name in ("verdict", "decided_by"))
    verdict = causal_verdict(
        *(causal, effect, low, high, p_value),
        alpha=spec.statistics.alpha,
        claimed=claimed,
        decision=decision,
        each=_by_dictionary(data, direction),
    )
    if verdict is Verdict.NOT_ESTIMABLE:
        return paper.not_estimable(("; ".join(reasons) or "the causal arms could not be run").rstrip("."))
    details = {
        "test": data.attrs.get("test", ""),
        "null": data.attrs.get("null", ""),
        "causal_verdict": causal,
        "reasons": reasons,
        "checks": {key: text(data, check, direction=direction) for check, key in CHECK_KEYS.items()},
        "rank_p": number(data, "rank_p", direction=direction),
        "n_controls": _n_controls(data, direction),
        "n_prompts": number(data, "n_prompts", direction=direction),
        "margin": 100 * spec.intervention.non_inferiority,
        "n_features": attr_list(data, "n_features") or [len(attr_list(data, "features"))],
        "effect_by_dictionary": _by_dictionary(data, direction),
        "accuracy_percent": hundred(number(data, "accuracy", **arm)),
        "effect_by_task": _by_task(data, arm),
        **carried_by_set(results, direction),
        "measured_on": [str(task) for task in np.atleast_1d(data.attrs.get("target_tasks", labels_of(data, "task")))],
    }
    return paper.answered(
        (hundred(effect), hundred(low), hundred(high)),
        p_value,
        verdict,
        _answer(verdict, details, effect, direction, near_zero=within_minimum(low, high)),
        in_short="" if verdict is Verdict.SUPPORTED else _IN_SHORT.get(decision) or _IN_SHORT.get(causal, ""),
        caveats=_caveats(results, spec, details, direction),
        details=details,
    )


def carried_by_set(results: Results, direction: str) -> dict[str, Any]:
    """Effects (points) of copying the set and the whole residual from the other model, and what share the set carries.

    ``share_of_patch`` is the share with its interval, ``share_above_random`` that beyond comparable random sets
    (``random_sets``), ``share_by_set`` the share of all points of the curve; nothing where they were not measured.
    """
    data = results.get("mediated_share")
    if data is None or SET not in labels_of(data, "point"):
        return {}
    one = data.sel(direction=direction)
    of_set = of_patch(data, direction)
    patch = [hundred(float(one[name])) for name in ("patch_effect", "patch_low", "patch_high")]
    return {
        "patch_effect": patch,
        "copied_effect": hundred(float(one["effect"].sel(point=SET))),
        "share_of_patch": [of_set.share, of_set.low, of_set.high],
        "share_above_random": [of_set.above, of_set.above_low, of_set.above_high],
        "random_sets": of_set.random_sets,
        "share_by_set": dict(zip(labels_of(one, "point"), map(float, one["share"].values), strict=True)),
        "edit_over_difference": [float(ratio) for ratio in one["norm_ratio"].sel(point=SET).values],
    }


def share_words(details: dict[str, Any]) -> str:
    """What share of the full patch's effect the set carries, in words; empty where it is not known."""
    share, low, high = details.get("share_of_patch", [math.nan] * 3)
    if not math.isfinite(share):
        return ""
    return f"{percent(share, 0)} [{percent(low, 0)}, {percent(high, 0)}] of what copying the whole residual does"


_RANDOM_SETS: Final = {
    NEAREST: "random sets whose edits are as large",
    RESCALED: "random sets rescaled to edits as large (none is by itself)",
}


def beyond_random(details: dict[str, Any]) -> str:
    """The share less that of comparable random sets, in words."""
    if not details["random_sets"]:
        return " (there is no random set of comparable edits)"
    above, low, high = (hundred(value) for value in details["share_above_random"])
    beyond = f"{fixed(above, 0, sign=True)}% of it {interval(low, high, 0, sign=True)}"
    return f", {beyond} beyond {_RANDOM_SETS[details['random_sets']]}"


def _no_share_caveat(details: dict[str, Any]) -> list[str]:
    """Why no share is named although sets were copied."""
    if "patch_effect" not in details or share_words(details):
        return []
    effect, low, high = details["patch_effect"]
    return [
        f"Copying the whole residual changes accuracy by {fixed(effect, sign=True)} points "
        f"{interval(low, high, sign=True)}, which is no shown effect in the claim's direction, so that the set carries "
        "no share of it."
    ]


def _reasons(data: xr.Dataset, direction: str) -> list[str]:
    joined = text(data, "reasons", direction=direction)
    if joined.startswith("["):
        return [str(reason) for reason in json.loads(joined)]
    # Explanations may hold semicolons, so a new reason starts only where a code follows: codes hold an underscore.
    parts = re.split(r"\s*;\s*(?=[a-z0-9]+_[a-z0-9_]+:)", joined)
    return [part.strip() for part in parts if part.strip()]


def _n_controls(data: xr.Dataset, direction: str) -> int:
    """Random sets that were run; of several dictionaries, whose ranks are combined, those planned in each."""
    if data.sizes.get("dictionary", 1) > 1:
        return int(attr_number(data, "n_controls"))
    kinds, accuracy = data["kind"].sel(direction=direction).values, data["accuracy"].sel(direction=direction).values
    return int(sum(str(kind) == "random" and np.isfinite(a) for kind, a in zip(kinds, accuracy, strict=True)))


def _by_task(data: xr.Dataset, arm: dict[str, str]) -> dict[str, float]:
    effects = data["task_effect"].sel(arm).values
    return {task: hundred(e) for task, e in zip(labels_of(data, "task"), effects, strict=True)}


def _by_dictionary(data: xr.Dataset, direction: str) -> list[float]:
    """Effect of each dictionary's own set, points; empty where only one was tried."""
    if data.sizes.get("dictionary", 1) < 2:
        return []
    return [hundred(float(effect)) for effect in data["dictionary_effect"].sel(direction=direction).values]


def _in_domain(results: Results) -> set[str]:
    behaviour = results.get("behaviour")
    rows = zip(labels_of(behaviour, "task"), labels_of(behaviour, "domain"), strict=True)
    return {task for task, domain in rows if domain == "in"}


def _balance_caveat(balance: xr.Dataset | None, direction: str) -> list[str]:
    """Where the random sets of a direction fall short; rows and flags of both directions stand in one table."""
    if balance is None:
        return ["How well the random sets match the set is not recorded."]
    suffix, prefix = f"_{direction}", f"{direction}: "
    own = balance.isel(covariate=[label.endswith(suffix) for label in labels_of(balance, "covariate")])
    if not np.isfinite(own["standardized_difference"].values).any():
        flags = [str(flag) for flag in np.atleast_1d(balance.attrs.get("flags", []))]
        why = "; ".join(flag.removeprefix(prefix).rstrip(".") for flag in flags if flag.startswith(prefix))
        return [f"There are no matched random sets{': ' + why if why else ''}."]
    rows = zip(labels_of(own, "covariate"), own["balanced"].values, strict=True)
    unbalanced = [label.removesuffix(suffix).replace("_", " ") for label, balanced in rows if not balanced]
    return [f"The random sets do not fully match the set in {listed(unbalanced)}."] if unbalanced else []


def _edited_features(results: Results) -> tuple[int, int, int]:
    """Edited features over all dictionaries, those shown to rise where RL gained, and those that C3 counts."""
    edited = rising = confirmed = 0
    trials = by_dictionary(results, "trial-dictionary") or [results["intervention"]]
    for trial, selection in zip(trials, by_dictionary(results, "selection"), strict=False):
        features = np.isin(selection["feature"].values, attr_list(trial, "features"))
        edited += int(features.sum())
        rising += int((features & (selection["tier"].values == "CONFIRMED")).sum())
        confirmed += int((features & (selection["specific_tier"].values == "CONFIRMED")).sum())
    return edited, rising, confirmed


_LIMITING_REASONS: Final = {
    "does_not_beat_steering": "The set is not shown to have a larger effect than one mean-shift vector",
    "does_not_beat_random_direction": "The set is not shown to have a larger effect than a random direction",
    "fresh_differs": "A second sample of the same model differs",
    "over_steering": "Stronger doses break the model",
    "v2_controls": "The random sets are not well matched",
    "passthrough_not_noop": "Hooks that edit nothing change completions",
}
"""Codes of the causal verdict's reasons that limit it -> start of the caveat."""


def _coded(reason: str) -> tuple[str, str]:
    """Code and explanation of a reason such as ``v3_dose: p=0.01``."""
    code, _, explanation = reason.partition(":")
    return code.strip(), explanation.strip().rstrip(".")


_SUBJECT: Final = {"disable": ("Disabling", "in the RL model"), "amplify": ("Amplifying", "in base")}
_COPIED: Final = {
    "disable": "Lowered to base's level in the RL model",
    "amplify": "Lifted to the RL model's level in base",
}


def _open_question(checks: dict[str, str], near_zero: bool, *, all_tried: bool) -> str:
    if not all_tried:
        return "and what the other dictionaries would say is open"
    if checks[CHECK_KEYS["v1"]] != "True":
        if near_zero:
            return f"which differs from zero, but may be smaller than the {100 * MIN_EFFECT:g} points that V1 requires"
        return "which is neither shown to be an effect nor shown to be none"
    failed = [label for name, label in CHECKS.items() if name != "v5" and checks[CHECK_KEYS[name]] == "False"]
    return f"but not every check held ({listed(failed)})" if failed else "but the arms do not allow a verdict"


def _answer(verdict: Verdict, details: dict[str, Any], effect: float, direction: str, *, near_zero: bool) -> str:
    sentence = _by_the_papers_rule(verdict, details, effect, direction, near_zero=near_zero)
    carried = share_words(details)
    if not carried:
        return sentence
    copied, patch = (fixed(one, sign=True) for one in (details["copied_effect"], details["patch_effect"][0]))
    return f"{_COPIED[direction]}, the set changes accuracy by {copied} points, {carried} ({patch})" + (
        f"{beyond_random(details)}. {sentence}"
    )


def _by_the_papers_rule(
    verdict: Verdict, details: dict[str, Any], effect: float, direction: str, *, near_zero: bool
) -> str:
    """What scaling the set does: zeroing it, or multiplying it."""
    verb, where = _SUBJECT[direction]
    causal, each = details["causal_verdict"], details["effect_by_dictionary"]
    rule = ", the paper's rule," if share_words(details) else ""
    tried = [one for one in each if math.isfinite(one)]
    whose = "the set" if not each else "the set of each dictionary" if len(tried) == len(each) else (
        f"the set that {len(tried)} of {len(each)} dictionaries {'has' if len(tried) == 1 else 'have'}"
    )  # fmt: skip
    subject = f"{verb} {whose} {where}{rule}"
    change = f"changes accuracy by {fixed(100 * effect, sign=True)} points"
    if len(tried) > 1:
        change += f" on average ({', '.join(fixed(one, sign=True) for one in tried)})"
    if verdict is Verdict.CONTRADICTED:
        return f"{subject} {change}, the opposite of the claim."
    if verdict is Verdict.SUPPORTED:
        return (
            f"{subject} {change}, more than matched random sets (rank p = {p_text(details['rank_p'])}), with a dose "
            f"response, without side effects beyond {details['margin']:g} points on unrelated tasks, and in the "
            "direction of the other model's behaviour."
        )
    explanation = {
        "DESTRUCTIVE": "but it breaks the model rather than moving it toward the other one",
        "CAUSAL_NONSPECIFIC": "but many matched random sets have at least half of that effect",
        "NO_EFFECT": f"which is equivalent to no effect (within {details['margin']:g} points)",
        "INCONCLUSIVE": _open_question(details["checks"], near_zero, all_tried=len(tried) == len(each)),
    }.get(causal, f"and the causal verdict is {causal or 'missing'}")
    return f"{subject} {change}, {explanation}."


def _caveats(results: Results, spec: StudySpec, details: dict[str, Any], direction: str) -> tuple[str, ...]:
    caveats = [
        "The paper's figure is on prompts chosen by their outcome, where resampling alone moves base from 0 to 36% and "
        "RL from 100 to 65%; ours is on trial prompts not chosen by outcome, so their sizes cannot be compared."
    ]
    caveats += _no_share_caveat(details)
    in_domain = _in_domain(results) & set(details["measured_on"])
    if direction == "disable" and in_domain:
        caveats.append(f"The effect is not over out-of-domain tasks only; it includes {listed(sorted(in_domain))}.")
    each = details["effect_by_dictionary"]
    n_tried = sum(map(math.isfinite, each))
    if 0 < n_tried < len(each):
        caveats.append(
            f"Only {n_tried} of {len(each)} dictionaries selected any feature: what is said of the set is not said by "
            "all of them."
        )
    edited, rising, confirmed = _edited_features(results)
    if confirmed < edited:
        caveats.append(
            f"Of the {edited} edited features {rising} are shown to rise where {spec.contrasted[1].name} gained, "
            f"{confirmed} by more than elsewhere (C3)."
        )
    caveats += _balance_caveat(results.get("control_balance"), direction)
    floor = smallest_rank_p(details["n_controls"])
    if details["n_controls"] and floor > spec.statistics.alpha:
        caveats.append(
            f"With {count(details['n_controls'], 'random set')} the rank p-value cannot fall below {floor:.3g}."
        )
    caveats += [
        f"{_LIMITING_REASONS[code]}: {explanation}."
        for code, explanation in map(_coded, details["reasons"])
        if code in _LIMITING_REASONS and "unbalanced:" not in explanation  # the balance caveat already says so
    ]
    return (*caveats, *dictionary_caveat(spec), *health_caveat(results, spec))
