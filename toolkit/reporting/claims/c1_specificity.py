"""The five claims, assessed from results; see :mod:`rlgen_stats.toolkit.reporting.claims.verdicts` for the rules."""

from __future__ import annotations

import math
from typing import Any, Final

from rlgen_stats.schemas.dims import BASE_MODEL
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.claims.c2_timing import assess_timing
from rlgen_stats.toolkit.reporting.claims.c3_selection import assess_selection
from rlgen_stats.toolkit.reporting.claims.c4_c5_causal import assess_amplification, assess_disabling
from rlgen_stats.toolkit.reporting.claims.scope import run_caveat, these_models
from rlgen_stats.toolkit.reporting.claims.verdicts import NOTHING, Claim, Verdict, interval_verdict
from rlgen_stats.toolkit.reporting.values import (
    DASH,
    Results,
    count,
    final_models,
    fixed,
    hundred,
    interval,
    labels_of,
    number,
    p_text,
    percent,
    text,
    tidy,
)

CLAIM_COLUMNS: Final = ("Claim", "Statement", "Verdict", "Estimate", "Interval", "p")
"""Headings of :func:`claims_table`."""

NEGLIGIBLE_TAIL: Final = 0.01
"""C1: a difference of one alive feature in a hundred is no "more specific features"."""
SHIFT_RATIO: Final = 1.25
"""C1: models whose activation shifts differ by more than a quarter did not move equally far."""

_C1: Final = "SFT introduces more model-specific features than RL"
_C1_PAPER: Final = (
    "A direction, read off the tails of NRN (pairwise crosscoders) and MAS (three-model crosscoder), both by L1 norm: "
    "heavier for SFT than for RL."
)
AGREED: Final = "agreed_"
"""Prefix of contrasts over features that latent scaling confirms."""
_NOT_COMPARABLE: Final = "NOT_COMPARABLE"


def assess_claims(results: Results, spec: StudySpec) -> tuple[Claim, ...]:
    """Answer C1 to C5 from a study's results; a missing or unusable analysis gives NOT_ESTIMABLE, never an error.

    Parameters
    ----------
    results
        Results groups by name, with the layouts of :mod:`rlgen_stats.schemas.layout`; any may be missing.
    spec
        The study: its alpha, its contrasted runs, its runs per arm.

    Returns
    -------
    tuple of Claim
        C1, C2, C3, C4, C5.

    Examples
    --------
    >>> from rlgen_stats.toolkit.study import read_spec  # doctest: +SKIP
    >>> assess_claims({}, read_spec("runs/demo"))[0].verdict  # doctest: +SKIP
    <Verdict.NOT_ESTIMABLE: 'NOT_ESTIMABLE'>
    """
    results = tidy(results)
    return (
        assess_specificity(results, spec),
        assess_timing(results, spec),
        assess_selection(results, spec),
        assess_disabling(results, spec),
        assess_amplification(results, spec),
    )


def estimate_text(claim: Claim) -> str:
    """The estimate with its unit."""
    if not math.isfinite(claim.estimate):
        return DASH
    if claim.unit == "features":
        return count(claim.estimate, "feature")
    return f"{fixed(claim.estimate, sign=True)} points"


def interval_text(claim: Claim) -> str:
    """The interval without its unit."""
    digits = 0 if claim.unit == "features" else 1
    return interval(claim.low, claim.high, digits, sign=digits == 1)


def claims_table(claims: tuple[Claim, ...]) -> list[tuple[str, ...]]:
    """One row of text a claim, with the columns of ``CLAIM_COLUMNS``.

    Examples
    --------
    >>> claims_table(())
    []
    """
    return [(c.id, c.statement, c.verdict.value, estimate_text(c), interval_text(c), p_text(c.p_value)) for c in claims]


def assess_specificity(results: Results, spec: StudySpec) -> Claim:
    """C1 from the attribution contrast at the study's tau: SFT's minus RL's share of alive features that are specific.

    Specific: NRN > tau, and latent scaling agrees where it was done.

    :func:`interval_verdict` with ``negligible`` = 1 point, and two guards that turn a verdict into UNDETERMINED:
    the counts must be comparable (how far the models moved; explained variance, L0 and dead share), and SFT's (for
    CONTRADICTED: RL's) share must lie above that of the base-base null crosscoder.
    """
    data = results.get("attribution_contrast")
    if data is None:
        return _unanswered("the attribution contrast has not been computed", spec)
    tau, alpha = _nearest_tau(data, spec.statistics.tau), spec.statistics.alpha
    scaled = not math.isnan(number(data, f"{AGREED}effect", tau=tau))
    effect, low, high, p, sft, rl, null = (
        number(data, f"{AGREED if scaled else ''}{name}", tau=tau)
        for name in ("effect", "effect_low", "effect_high", "p_value", "tail_sft", "tail_rl", "tail_null")
    )
    comparable = text(data, "comparable", tau=tau)
    verdict = interval_verdict(low, high, p, alpha=alpha, negligible=NEGLIGIBLE_TAIL)
    if verdict is Verdict.NOT_ESTIMABLE or math.isnan(effect):
        return _unanswered(comparable or "the contrast is empty: no alive features or no null crosscoder", spec)
    guards = []
    if comparable.startswith(_NOT_COMPARABLE):
        reason = comparable.removeprefix(_NOT_COMPARABLE).removeprefix(":").strip()
        guards.append(f"the counts are not comparable ({reason})" if reason else "the counts are not comparable")
    leading = sft if effect > 0 else rl
    if verdict in (Verdict.SUPPORTED, Verdict.CONTRADICTED) and leading <= null:
        guards.append("the larger share does not exceed that of the base-base null crosscoder")
    if guards:
        verdict = Verdict.UNDETERMINED
    details = {
        "test": data.attrs.get("test", ""),
        "null": data.attrs.get("null", ""),
        "tau": tau,
        "latent_scaling": scaled,
        "tails_percent": {"sft": hundred(sft), "rl": hundred(rl), "null": hundred(null)},
        "tails_percent_norms_alone": {
            arm: hundred(number(data, f"tail_{arm}", tau=tau)) for arm in ("sft", "rl", "null")
        },
        "comparable": comparable,
        "failed_guards": guards,
        "other_tau": _other_taus(data, tau, AGREED if scaled else ""),
        "activation_shift": _shifts(results, spec),
    }
    return Claim(
        "C1",
        _C1,
        hundred(effect),
        hundred(low),
        hundred(high),
        p,
        "percentage points of alive features",
        verdict,
        _specificity_answer(verdict, details, guards, spec),
        _specificity_caveats(results, spec, null, tau, details),
        _C1_PAPER,
        details,
    )


def _unanswered(reason: str, spec: StudySpec) -> Claim:
    return Claim(
        "C1",
        _C1,
        NOTHING,
        NOTHING,
        NOTHING,
        NOTHING,
        "percentage points of alive features",
        Verdict.NOT_ESTIMABLE,
        f"Not estimable: {reason}.",
        (run_caveat(spec),),
        _C1_PAPER,
        {"reason": reason},
    )


def _nearest_tau(data: Any, wanted: float) -> float:
    taus = [float(tau) for tau in data["tau"].values] if "tau" in data.coords else []
    return min(taus, key=lambda tau: abs(tau - wanted), default=wanted)


def _other_taus(data: Any, tau: float, prefix: str) -> dict[str, dict[str, float]]:
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


def _specificity_answer(verdict: Verdict, details: dict[str, Any], guards: list[str], spec: StudySpec) -> str:
    first, second = (run.name for run in spec.contrasted)
    shares, norms = details["tails_percent"], details["tails_percent_norms_alone"]
    specific = f"have NRN > {details['tau']:g}"
    floor = f"null floor {percent(shares['null'] / 100)}"
    if details["latent_scaling"]:
        specific += " and are specific by latent scaling too"
        floor += f"; by norms alone {fixed(norms['sft'])}% and {fixed(norms['rl'])}%"
    shares = (
        f"{fixed(shares['sft'])}% of {first}'s and {fixed(shares['rl'])}% of {second}'s alive features {specific} "
        f"({floor})"
    )
    if guards:
        return f"Undetermined, because {' and '.join(guards)}; {shares}."
    head = {
        Verdict.SUPPORTED: f"{these_models(spec)} differ as claimed",
        Verdict.CONTRADICTED: f"{these_models(spec)} differ the other way",
        Verdict.NOT_SUPPORTED: f"{these_models(spec)} do not differ as claimed",
        Verdict.UNDETERMINED: f"Whether {these_models(spec, start=False)} differ is open",
    }[verdict]
    return f"{head}: {shares}."


def _specificity_caveats(
    results: Results, spec: StudySpec, null: float, tau: float, details: dict[str, Any]
) -> tuple[str, ...]:
    caveats = [run_caveat(spec)]
    if not details["latent_scaling"]:
        caveats.append(
            "Latent scaling has not been done: features counted as specific by decoder norms alone include some that "
            "are shared and merely shrunk in one model."
        )
    if math.isnan(null):
        caveats.append("There is no base-base null crosscoder, so what zero looks like is unknown.")
    if tau != spec.statistics.tau:
        caveats.append(f"Computed at tau = {tau:g}; the study asked for {spec.statistics.tau:g}.")
    if "activation shift" not in details["comparable"]:  # else the answer says it already
        caveats += _matching_caveat(results, details["activation_shift"])
    signs = {math.copysign(1, o["estimate"]) for o in details["other_tau"].values() if o["estimate"]}
    here = number(results["attribution_contrast"], f"{AGREED if details['latent_scaling'] else ''}effect", tau=tau)
    if here and signs - {math.copysign(1, here)}:
        caveats.append("The sign of the difference depends on tau.")
    health, pairs = results.get("health"), _pairwise(spec)
    caveats += [
        f"Crosscoder {name} failed its health check: {text(health, 'reasons', crosscoder=name).rstrip('.')}."
        for name in labels_of(health, "crosscoder")
        if name in pairs and not number(health, "healthy", crosscoder=name)
    ]
    return tuple(caveats)


def _pairwise(spec: StudySpec) -> set[str]:
    """Names of the crosscoders that C1 rests on: base with either run's last checkpoint, and base with itself."""
    wanted = [{BASE_MODEL, f"{run.name}@final"} for run in spec.contrasted] + [{BASE_MODEL, "base@repeat"}]
    return {crosscoder.name for crosscoder in spec.crosscoders if set(crosscoder.views) in wanted}


def _matching_caveat(results: Results, shifts: dict[str, float]) -> list[str]:
    values = [value for value in shifts.values() if math.isfinite(value)]
    if len(values) < 2:
        return ["How far each model moved was not measured, so the counts are not matched for drift."]
    if min(values) <= 0 or max(values) / min(values) > SHIFT_RATIO:
        moved = " and ".join(f"{name} {value:.3g}" for name, value in shifts.items())
        return [
            f"The counts are not at matched drift (activation shift: {moved}): counts of specific features grow with "
            "how far a model moved, whatever moved it."
        ]
    return []
