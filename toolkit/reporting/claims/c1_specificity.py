"""C1: whether SFT introduces more model-specific features than RL."""

from __future__ import annotations

import math
from typing import Any, Final

import xarray as xr

from rlgen_stats.schemas.dims import BASE_MODEL
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.claims.claim import Claim, PaperClaim
from rlgen_stats.toolkit.reporting.claims.replication import run_caveat, these_models
from rlgen_stats.toolkit.reporting.formatting import fixed, hundred, percent
from rlgen_stats.toolkit.reporting.result_lookup import Results, final_models, labels_of, nearest_label, number, text
from rlgen_stats.toolkit.statistics.claim_verdicts import (
    NOT_COMPARABLE,
    Verdict,
    shifts_match,
    specificity_verdict,
)
from rlgen_stats.toolkit.statistics.specificity.arm_contrast import AGREED

C1: Final = PaperClaim(
    id="C1",
    statement="SFT introduces more model-specific features than RL",
    unit="percentage points of alive features",
    paper_figure=(
        "A direction, read off the tails of NRN (pairwise crosscoders) and MAS (three-model crosscoder), both by L1 "
        "norm: heavier for SFT than for RL."
    ),
)
_NOT_COMPARABLE_PREFIX: Final = "NOT_COMPARABLE"
"""Start of the contrast's ``comparable`` text where the two counts cannot be compared."""


def assess_specificity(results: Results, spec: StudySpec) -> Claim:
    """C1 from the attribution contrast at the study's tau: SFT's minus RL's share of alive features that are specific.

    Specific: NRN > tau, and latent scaling agrees where it was done. The verdict is
    :func:`~rlgen_stats.toolkit.statistics.claim_verdicts.specificity_verdict`.
    """
    data = results.get("attribution_contrast")
    if data is None:
        return C1.not_estimable("the attribution contrast has not been computed", caveats=(run_caveat(spec),))
    tau = nearest_label(data, "tau", spec.statistics.tau)
    latent_scaling = not math.isnan(number(data, f"{AGREED}effect", tau=tau))
    prefix = AGREED if latent_scaling else ""
    effect, low, high, p_value, sft, rl, null = (
        number(data, f"{prefix}{name}", tau=tau)
        for name in ("effect", "effect_low", "effect_high", "p_value", "tail_sft", "tail_rl", "tail_null")
    )
    comparable = text(data, "comparable", tau=tau)
    verdict, failed_guards = specificity_verdict(
        (effect, low, high),
        p_value,
        (sft, rl, null),
        alpha=spec.statistics.alpha,
        comparable=not comparable.startswith(_NOT_COMPARABLE_PREFIX),
    )
    if verdict is Verdict.NOT_ESTIMABLE:
        reason = comparable or "the contrast is empty: no alive features or no null crosscoder"
        return C1.not_estimable(reason, caveats=(run_caveat(spec),))
    guards = [_guard_words(guard, comparable) for guard in failed_guards]
    details = {
        "test": data.attrs.get("test", ""),
        "null": data.attrs.get("null", ""),
        "tau": tau,
        "latent_scaling": latent_scaling,
        "tails_percent": {"sft": hundred(sft), "rl": hundred(rl), "null": hundred(null)},
        "tails_percent_norms_alone": {
            arm: hundred(number(data, f"tail_{arm}", tau=tau)) for arm in ("sft", "rl", "null")
        },
        "comparable": comparable,
        "failed_guards": guards,
        "other_tau": _other_taus(data, tau, prefix),
        "activation_shift": _shifts(results, spec),
    }
    return C1.answered(
        (hundred(effect), hundred(low), hundred(high)),
        p_value,
        verdict,
        _answer(verdict, details, guards, spec),
        caveats=_caveats(results, spec, effect, details),
        details=details,
    )


def _guard_words(guard: str, comparable: str) -> str:
    if guard != NOT_COMPARABLE:
        return "the larger share does not exceed that of the base-base null crosscoder"
    reason = comparable.removeprefix(_NOT_COMPARABLE_PREFIX).removeprefix(":").strip()
    return f"the counts are not comparable ({reason})" if reason else "the counts are not comparable"


def _other_taus(data: xr.Dataset, tau: float, prefix: str) -> dict[str, dict[str, float]]:
    others = [float(t) for t in data["tau"].values if float(t) != tau] if "tau" in data.coords else []
    return {
        f"{other:g}": {
            "estimate": hundred(number(data, f"{prefix}effect", tau=other)),
            "low": hundred(number(data, f"{prefix}effect_low", tau=other)),
            "high": hundred(number(data, f"{prefix}effect_high", tau=other)),
            "p_value": number(data, f"{prefix}p_value", tau=other),
        }
        for other in others
    }


def _shifts(results: Results, spec: StudySpec) -> dict[str, float]:
    movement = results.get("movement")
    finals = final_models(spec, movement)
    return {
        run.name: number(movement, "activation_shift", model=finals[run.name])
        for run in spec.contrasted
        if run.name in finals
    }


def _answer(verdict: Verdict, details: dict[str, Any], guards: list[str], spec: StudySpec) -> str:
    first, second = (run.name for run in spec.contrasted)
    shares, norms = details["tails_percent"], details["tails_percent_norms_alone"]
    specific = f"have NRN > {details['tau']:g}"
    floor = f"null floor {percent(shares['null'] / 100)}"
    if details["latent_scaling"]:
        specific += " and are specific by latent scaling too"
        floor += f"; by norms alone {fixed(norms['sft'])}% and {fixed(norms['rl'])}%"
    comparison = (
        f"{fixed(shares['sft'])}% of {first}'s and {fixed(shares['rl'])}% of {second}'s alive features {specific} "
        f"({floor})"
    )
    if guards:
        return f"Undetermined, because {' and '.join(guards)}; {comparison}."
    head = {
        Verdict.SUPPORTED: f"{these_models(spec)} differ as claimed",
        Verdict.CONTRADICTED: f"{these_models(spec)} differ in the opposite direction",
        Verdict.NOT_SUPPORTED: f"{these_models(spec)} do not differ as claimed",
        Verdict.UNDETERMINED: f"Whether {these_models(spec, start=False)} differ is open",
    }[verdict]
    return f"{head}: {comparison}."


def _caveats(results: Results, spec: StudySpec, effect: float, details: dict[str, Any]) -> tuple[str, ...]:
    caveats = [run_caveat(spec)]
    if not details["latent_scaling"]:
        caveats.append(
            "Latent scaling has not been done: features counted as specific by decoder norms alone include some that "
            "are shared and merely have a smaller norm in one model."
        )
    if math.isnan(details["tails_percent"]["null"]):
        caveats.append(
            "There is no base-base null crosscoder, so the share expected without any difference is unknown."
        )
    if details["tau"] != spec.statistics.tau:
        caveats.append(f"Computed at tau = {details['tau']:g}; the study asked for {spec.statistics.tau:g}.")
    if "activation shift" not in details["comparable"]:  # otherwise the answer already says so
        caveats += _drift_caveat(details["activation_shift"])
    signs = {math.copysign(1, other["estimate"]) for other in details["other_tau"].values() if other["estimate"]}
    if effect and signs - {math.copysign(1, effect)}:
        caveats.append("The sign of the difference depends on tau.")
    health, pairwise = results.get("health"), _pairwise(spec)
    caveats += [
        f"Crosscoder {name} failed its health check: {text(health, 'reasons', crosscoder=name).rstrip('.')}."
        for name in labels_of(health, "crosscoder")
        if name in pairwise and not number(health, "healthy", crosscoder=name)
    ]
    return tuple(caveats)


def _pairwise(spec: StudySpec) -> set[str]:
    """Names of the crosscoders that C1 rests on: base with either run's last checkpoint, and base with itself."""
    pairs = [{BASE_MODEL, f"{run.name}@final"} for run in spec.contrasted] + [{BASE_MODEL, "base@repeat"}]
    return {crosscoder.name for crosscoder in spec.crosscoders if set(crosscoder.views) in pairs}


def _drift_caveat(shifts: dict[str, float]) -> list[str]:
    matched = shifts_match(shifts.values())
    if matched is None:
        return ["How far each model moved was not measured, so the counts are not matched for drift."]
    if matched:
        return []
    moved = " and ".join(f"{name} {value:.3g}" for name, value in shifts.items())
    return [
        f"The counts are not at matched drift (activation shift: {moved}): counts of specific features grow with "
        "how far a model moved, whatever moved it."
    ]
