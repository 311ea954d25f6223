"""C4 and C5: whether editing the set in a live model changes its accuracy, and only as the claim says."""

from __future__ import annotations

import json
import re
from typing import Any, Final

import numpy as np
import xarray as xr

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.claims.verdicts import NOTHING, Claim, Verdict, causal_verdict
from rlgen_stats.toolkit.reporting.values import (
    Results,
    attr_list,
    count,
    fixed,
    hundred,
    labels_of,
    listed,
    number,
    p_text,
    text,
)

_C4: Final = "Disabling that set in the RL model lowers its out-of-domain accuracy"
_C5: Final = "Amplifying that set in the base model raises its accuracy"
_C4_PAPER: Final = "Accuracy falls by 14 to 46 points on its selected prompts (base wrong, RL right)."
_C5_PAPER: Final = "Accuracy rises by 12 to 56 points on its selected prompts (base wrong, RL right)."
_UNIT: Final = "percentage points of accuracy"

_EFFECT: Final = ("effect", "effect_low", "effect_high", "p_value")

CHECKS: Final = {
    "v1": "V1 effect",
    "v2": "V2 specific",
    "v3": "V3 dose response",
    "v4": "V4 no side effects",
    "v5": "V5 replicated",
    "v6": "V6 mode",
}
"""Names of the six checks of causal verification (METHOD.md 4d)."""


def assess_disabling(results: Results, spec: StudySpec) -> Claim:
    """C4 from the direction 'disable'; see :func:`causal_verdict`."""
    return _assess(results, spec, "C4", _C4, _C4_PAPER, direction="disable", claimed=-1)


def assess_amplification(results: Results, spec: StudySpec) -> Claim:
    """C5 from the direction 'amplify'; see :func:`causal_verdict`."""
    return _assess(results, spec, "C5", _C5, _C5_PAPER, direction="amplify", claimed=1)


def main_condition(data: xr.Dataset, direction: str) -> str | None:
    """The condition that edits the set itself at the main dose, None if there is none."""
    kinds = data["kind"].sel(direction=direction).values
    found = [str(c) for c, kind in zip(data["condition"].values, kinds, strict=True) if str(kind) == "set"]
    return found[0] if found else None


def _assess(
    results: Results, spec: StudySpec, name: str, statement: str, paper: str, *, direction: str, claimed: int
) -> Claim:
    data = results.get("intervention")
    if data is None:
        return _unanswered(name, statement, paper, "no intervention has been run")
    condition = main_condition(data, direction) if direction in labels_of(data, "direction") else None
    if condition is None:
        known = direction in labels_of(data, "direction")
        said = [_coded(reason)[1] or reason for reason in _reasons(data, direction)] if known else []
        return _unanswered(name, statement, paper, "; ".join(said) or f"there is no arm that does {direction} the set")
    at = {"direction": direction, "condition": condition}
    effect, low, high, p = (number(data, variable, **at) for variable in _EFFECT)
    causal, reasons = text(data, "verdict", direction=direction), _reasons(data, direction)
    verdict = causal_verdict(causal, effect, low, high, p, alpha=spec.statistics.alpha, claimed=claimed)
    if verdict is Verdict.NOT_ESTIMABLE:
        return _unanswered(name, statement, paper, "; ".join(reasons) or "the causal arms could not be run")
    details = {
        "test": data.attrs.get("test", ""),
        "null": data.attrs.get("null", ""),
        "causal_verdict": causal,
        "reasons": reasons,
        "checks": {label: text(data, check, direction=direction) for check, label in CHECKS.items()},
        "rank_p": number(data, "rank_p", direction=direction),
        "n_controls": _n_controls(data, direction),
        "n_prompts": number(data, "n_prompts", direction=direction),
        "n_features": len(attr_list(data, "features")),
        "accuracy_percent": hundred(number(data, "accuracy", **at)),
        "effect_by_task": _by_task(data, at),
        "measured_on": [str(task) for task in np.atleast_1d(data.attrs.get("target_tasks", labels_of(data, "task")))],
    }
    return Claim(
        name,
        statement,
        hundred(effect),
        hundred(low),
        hundred(high),
        p,
        _UNIT,
        verdict,
        _answer(verdict, causal, details, effect, direction, near_zero=0 < max(low, -high) <= SMALLEST_EFFECT),
        _caveats(results, spec, details, direction),
        paper,
        details,
    )


def _unanswered(name: str, statement: str, paper: str, reason: str) -> Claim:
    nothing = (NOTHING, NOTHING, NOTHING, NOTHING)
    answer = f"Not estimable: {reason.rstrip('.')}."
    return Claim(
        name, statement, *nothing, _UNIT, Verdict.NOT_ESTIMABLE, answer, (), paper, {"reason": reason.rstrip(".")}
    )


def _reasons(data: xr.Dataset, direction: str) -> list[str]:
    raw = text(data, "reasons", direction=direction)
    if raw.startswith("["):
        return [str(reason) for reason in json.loads(raw)]
    parts = re.split(r"\s*;\s*(?=[a-z0-9]+_[a-z0-9_]+:)", raw)  # codes hold an underscore, details semicolons
    return [part.strip() for part in parts if part.strip()]


def _n_controls(data: xr.Dataset, direction: str) -> int:
    kinds, accuracy = data["kind"].sel(direction=direction).values, data["accuracy"].sel(direction=direction).values
    return int(sum(str(kind) == "random" and np.isfinite(a) for kind, a in zip(kinds, accuracy, strict=True)))


def _by_task(data: xr.Dataset, at: dict[str, str]) -> dict[str, float]:
    effects = data["task_effect"].sel(at).values
    return {task: hundred(e) for task, e in zip(labels_of(data, "task"), effects, strict=True)}


def _in_domain(results: Results) -> set[str]:
    behaviour = results.get("behaviour")
    rows = zip(labels_of(behaviour, "task"), labels_of(behaviour, "domain"), strict=True)
    return {task for task, domain in rows if domain == "in"}


def _balance_caveat(balance: xr.Dataset | None) -> list[str]:
    if balance is None:
        return ["How well the random sets match the set is not recorded."]
    if not np.isfinite(balance["standardized_difference"].values).any():
        why = "; ".join(str(flag).rstrip(".") for flag in np.atleast_1d(balance.attrs.get("flags", [])) if str(flag))
        return [f"There are no matched random sets{': ' + why if why else ''}."]
    rows = zip(labels_of(balance, "covariate"), balance["balanced"].values, strict=True)
    off = [label.replace("_", " ") for label, balanced in rows if not balanced]
    return [f"The random sets do not quite match the set in {listed(off)}."] if off else []


_CODES: Final = {
    "does_not_beat_steering": "The set of features does not beat one mean-shift vector",
    "does_not_beat_random_direction": "The set of features does not beat a random direction of equal norm",
    "fresh_differs": "Sampling with other seeds alone changes accuracy",
    "over_steering": "Stronger doses break the model",
    "v2_controls": "The matching of random sets fell short",
    "passthrough_not_noop": "The machinery itself is not neutral",
}
"""Reasons of the causal verdict that limit it, in words."""


def _coded(reason: str) -> tuple[str, str]:
    code, _, said = reason.partition(":")
    return code.strip(), said.strip().rstrip(".")


SMALLEST_EFFECT: Final = 0.02
"""Share of prompts that V1 asks an effect to clear (METHOD.md 4d)."""

_SUBJECT: Final = {"disable": "Disabling the set in the RL model", "amplify": "Amplifying the set in base"}


def _open_question(checks: dict[str, str], near_zero: bool) -> str:
    if checks[CHECKS["v1"]] != "True":
        if near_zero:
            return "which differs from zero, but its interval does not clear the 2 points that an effect must (V1)"
        return "which is neither shown to be an effect nor shown to be none"
    failed = [label for name, label in CHECKS.items() if name != "v5" and checks[label] == "False"]
    return f"but not every check held ({listed(failed)})" if failed else "but the arms do not allow a verdict"


def _answer(
    verdict: Verdict, causal: str, details: dict[str, Any], effect: float, direction: str, *, near_zero: bool
) -> str:
    subject = _SUBJECT[direction]
    moved = f"changes accuracy by {fixed(100 * effect, sign=True)} points"
    if verdict is Verdict.CONTRADICTED:
        return f"{subject} {moved}, the opposite of the claim."
    if verdict is Verdict.SUPPORTED:
        return (
            f"{subject} {moved}, more than matched random sets do (rank p = {p_text(details['rank_p'])}), with a dose "
            "response, without side effects, and in the direction of the other model's behaviour."
        )
    why = {
        "DESTRUCTIVE": "but it breaks the model rather than moving it toward the other one",
        "CAUSAL_NONSPECIFIC": "but matched random sets do as much",
        "NO_EFFECT": "which is equivalent to no effect",
        "INCONCLUSIVE": _open_question(details["checks"], near_zero),
    }.get(causal, f"and the causal verdict is {causal or 'missing'}")
    return f"{subject} {moved}, {why}."


def _caveats(results: Results, spec: StudySpec, details: dict[str, Any], direction: str) -> tuple[str, ...]:
    data, selection = results["intervention"], results.get("selection")
    caveats = [
        "The paper's figure is on prompts chosen by their outcome, where mere resampling moves base from 0 to 36% and "
        "RL from 100 to 65%; ours is on verification prompts not chosen by outcome, so the two are not on one scale."
    ]
    inside = _in_domain(results) & set(details["measured_on"])
    if direction == "disable" and inside:
        caveats.append(f"The effect is not over out-of-domain tasks only; it includes {listed(sorted(inside))}.")
    features = attr_list(data, "features")
    if selection is not None and features:
        known = selection.isel(feature=np.flatnonzero(np.isin(selection["feature"].values, features)))
        n_confirmed = int((known["tier"].values == "CONFIRMED").sum())
        if n_confirmed < len(features):
            caveats.append(f"Only {n_confirmed} of the {len(features)} edited features are confirmed (C3).")
    caveats += _balance_caveat(results.get("control_balance"))
    floor = 1 / (details["n_controls"] + 1)
    if details["n_controls"] and floor > spec.statistics.alpha:
        caveats.append(
            f"With {count(details['n_controls'], 'random set')} the rank p-value cannot fall below {floor:.3g}."
        )
    caveats += [
        f"{_CODES[code]}: {said}."
        for code, said in map(_coded, details["reasons"])
        if code in _CODES and not said.startswith("unbalanced")  # the table of balance says that
    ]
    health = results.get("health")
    name = spec.primary_crosscoder.name
    if name in labels_of(health, "crosscoder") and not number(health, "healthy", crosscoder=name):
        caveats.append(f"Crosscoder {name} failed its health check: {text(health, 'reasons', crosscoder=name)}.")
    return tuple(caveats)
