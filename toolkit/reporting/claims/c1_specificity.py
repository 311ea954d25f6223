"""C1: whether SFT introduces more model-specific features than RL."""

from __future__ import annotations

import math
from typing import Any, Final

import xarray as xr

from rlgen_stats.schemas.dims import BASE_MODEL
from rlgen_stats.schemas.null_views import BASE_VIEWS, REPEAT_MODEL, floor_name
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.claims.claim import Claim, PaperClaim
from rlgen_stats.toolkit.reporting.claims.replication import run_caveat, these_models
from rlgen_stats.toolkit.reporting.formatting import fixed, hundred, percent
from rlgen_stats.toolkit.reporting.result_lookup import (
    Results,
    attr_list,
    final_models,
    labels_of,
    nearest_label,
    number,
    text,
)
from rlgen_stats.toolkit.reporting.source_study import UNCHECKED
from rlgen_stats.toolkit.statistics.claim_verdicts import (
    BELOW_NULL,
    DICTIONARIES_DISAGREE,
    EQUAL_KL,
    NO_NULL,
    NOT_COMPARABLE,
    RANKS,
    Verdict,
    smallest_permutation_p,
    specificity_claim,
)
from rlgen_stats.toolkit.statistics.specificity.arm_contrast import AGREED, MIN_RUNS
from rlgen_stats.toolkit.statistics.specificity.compared_arms import NOT_COMPARABLE as NOT_COMPARABLE_TEXT

C1: Final = PaperClaim(
    id="C1",
    statement="SFT introduces more model-specific features than RL",
    short="SFT adds more own features",
    unit="percentage points of alive features",
    paper_figure=(
        "A direction, read off the tails of NRN (pairwise crosscoders) and MAS (three-model crosscoder), both by L1 "
        f"norm: heavier for SFT than for RL. {UNCHECKED}"
    ),
)


def assess_specificity(results: Results, spec: StudySpec) -> Claim:
    """C1 from the attribution contrast at the study's tau: SFT's minus RL's share of alive features that are specific.

    Specific: NRN > tau, and latent scaling agrees where it was done. Of the final models, or where both runs are
    equally far from base, as the contrast says. The verdict is
    :func:`~rlgen_stats.toolkit.statistics.claim_verdicts.specificity_claim`.
    """
    data = results.get("attribution_contrast")
    if data is None:
        return C1.not_estimable("the attribution contrast has not been computed", caveats=(run_caveat(spec),))
    tau = nearest_label(data, "tau", spec.statistics.tau)
    decides = str(data.attrs["decided_by"])
    details = _details(data, tau, decides, results, spec)
    effect, low, high = details["differences"][decides]["interval"]
    verdict, failed_guards = specificity_claim(data, tau=tau, alpha=spec.statistics.alpha)
    if verdict is Verdict.NOT_ESTIMABLE:
        reason = details["comparable"][decides] or "the contrast is empty: no alive features"
        return C1.not_estimable(reason, caveats=(run_caveat(spec),))
    guards = [_guard_words(guard, details) for guard in failed_guards]
    return C1.answered(
        (hundred(effect), hundred(low), hundred(high)),
        details["differences"][decides]["p_value"],
        verdict,
        _answer(verdict, details, guards, spec),
        in_short=guards[0].partition(" (")[0] if guards else "",
        caveats=_caveats(results, spec, effect, details),
        details=details | {"failed_guards": guards},
    )


def _details(data: xr.Dataset, tau: float, decides: str, results: Results, spec: StudySpec) -> dict[str, Any]:
    """What the answer, its caveats and the report's JSON say of the contrast."""
    latent_scaling = f"{AGREED}effect" in data
    prefix = AGREED if latent_scaling else ""

    def shares(prefix: str) -> dict[str, float]:
        return {
            name: hundred(number(data, f"{prefix}tail_{name}", tau=tau, comparison=decides))
            for name in ("sft", "rl", "null")
        }

    return {
        "test": data.attrs.get("test", ""),
        "null": data.attrs.get("null", ""),
        "runs_per_arm": attr_list(data, "runs_per_arm"),
        "tau": tau,
        "latent_scaling": latent_scaling,
        "decided_by": decides,
        "tails_percent": shares(prefix),
        "tails_percent_norms_alone": shares(""),
        "floors_percent": {
            floor: hundred(number(data, f"{prefix}tail_floor", tau=tau, floor=floor))
            for floor in labels_of(data, "floor")
        },
        "floors_percent_norms_alone": {
            floor: hundred(number(data, "tail_floor", tau=tau, floor=floor)) for floor in labels_of(data, "floor")
        },
        "differences": {name: _difference(data, tau, name, prefix) for name in labels_of(data, "comparison")},
        "comparable": {name: text(data, "comparable", comparison=name) for name in labels_of(data, "comparison")},
        "superiority": {
            name: tuple(number(data, f"superiority{end}", comparison=name) for end in ("", "_low", "_high"))
            for name in labels_of(data, "comparison")
        },
        "other_tau": {
            f"{other:g}": {
                "estimate": hundred(number(data, f"{prefix}effect", tau=other, comparison=decides)),
                "low": hundred(number(data, f"{prefix}effect_low", tau=other, comparison=decides)),
                "high": hundred(number(data, f"{prefix}effect_high", tau=other, comparison=decides)),
                "p_value": number(data, f"{prefix}p_value", tau=other, comparison=decides),
            }
            for other in map(float, data["tau"].values)
            if other != tau
        },
        "activation_shift": _shifts(results, spec),
    }


def _difference(data: xr.Dataset, tau: float, comparison: str, prefix: str) -> dict[str, Any]:
    at = {"tau": tau, "comparison": comparison}
    each = data[f"{prefix}effect_each"].sel(at).values
    return {
        "interval": tuple(number(data, f"{prefix}effect{end}", **at) for end in ("", "_low", "_high")),
        "p_value": number(data, f"{prefix}p_value", **at),
        "each": [float(value) for value in each if math.isfinite(value)],
    }


def _guard_words(guard: str, details: dict[str, Any]) -> str:
    if guard != NOT_COMPARABLE:
        return {
            BELOW_NULL: "the larger share does not exceed the largest of base against itself",
            NO_NULL: "no share of base against itself, which the larger share must exceed, was measured",
            DICTIONARIES_DISAGREE: "the dictionaries do not agree on the direction",
            RANKS: "the ranks of all features say the opposite of the tails",
            EQUAL_KL: "at equal KL from base the opposite holds",
        }[guard]
    reasons = [details["comparable"][name] for name in ("final", "matched_shift") if name in details["comparable"]]
    because = [reason.removeprefix(NOT_COMPARABLE_TEXT).removeprefix(":").strip() for reason in reasons]
    return f"the counts are not comparable ({'; '.join(because)})"


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
    floor = f"largest null floor {percent(shares['null'] / 100)}"
    if details["latent_scaling"]:
        specific += " and are specific by latent scaling too"
        floor += f"; by norms alone {fixed(norms['sft'])}% and {fixed(norms['rl'])}%"
    comparison = (
        f"{fixed(shares['sft'])}% of {first}'s and {fixed(shares['rl'])}% of {second}'s alive features {specific} "
        f"({floor})"
    )
    if details["decided_by"] != "final":
        note = details["comparable"][details["decided_by"]].partition(": ")[2].partition(";")[0]
        comparison = f"{note}, {comparison}"
    ranks, low, high = details["superiority"][details["decided_by"]]
    if math.isfinite(ranks):
        comparison += (
            f"; of two features that lean to their run, {first}'s leans more with probability {fixed(ranks, 2)} "
            f"[{fixed(low, 2)}, {fixed(high, 2)}]"
        )
    if guards:
        return f"Undetermined, because {' and '.join(guards)}; {comparison}."
    subject = these_models(spec, start=False)
    if _arms_compared(details["runs_per_arm"]):
        subject = "the runs of " + " and of ".join(run.arm for run in spec.contrasted)
    starting = subject[0].upper() + subject[1:]
    head = {
        Verdict.SUPPORTED: f"{starting} differ as claimed",
        Verdict.CONTRADICTED: f"{starting} differ in the opposite direction",
        Verdict.NOT_SUPPORTED: f"{starting} do not differ as claimed",
        Verdict.UNDETERMINED: f"Whether {subject} differ is open",
    }[verdict]
    return f"{head}: {comparison}."


def _arms_compared(runs_per_arm: list[int]) -> bool:
    """Whether the contrast is one of arms, over enough runs of each, and not of two models."""
    return min(runs_per_arm, default=0) >= MIN_RUNS


def _replication_caveat(spec: StudySpec, runs_per_arm: list[int]) -> tuple[str, ...]:
    """What so few runs cannot show; nothing where runs are compared and can reach the level."""
    if not _arms_compared(runs_per_arm):
        return (run_caveat(spec),)
    best = smallest_permutation_p(*runs_per_arm)
    if best <= spec.statistics.alpha:
        return ()
    n_sft, n_rl = runs_per_arm
    return (f"Exact permutation of {n_sft} and {n_rl} runs reaches p = {best:.3g} at best; train more runs an arm.",)


def _caveats(results: Results, spec: StudySpec, effect: float, details: dict[str, Any]) -> tuple[str, ...]:
    caveats = list(_replication_caveat(spec, details["runs_per_arm"]))
    if not details["latent_scaling"]:
        caveats.append(
            "Latent scaling has not been done: features counted as specific by decoder norms alone include some that "
            "are shared and merely have a smaller norm in one model."
        )
    if math.isnan(details["tails_percent"]["null"]):
        caveats.append(
            "There is no null crosscoder of base with itself, so the share expected without any difference is unknown."
        )
    elif set(details["floors_percent"]) == {floor_name(REPEAT_MODEL)}:
        caveats.append(
            "The only null floor is base read again, which is zero by construction; add crosscoders with views "
            "[base@0, base@halves] and [base@0, RUN@noise] for floors that can fail."
        )
    if len(details["differences"][details["decided_by"]]["each"]) < 2:
        caveats.append(
            "One dictionary of each run: the interval does not hold the variance between dictionaries (replicates)."
        )
    if details["tau"] != spec.statistics.tau:
        caveats.append(f"Computed at tau = {details['tau']:g}; the study asked for {spec.statistics.tau:g}.")
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
    """Dictionaries that C1 rests on: of base and a run compared or a floor run, or base itself unless it has noise."""
    runs = {run.name for run in (*spec.contrasted, *(run for run in spec.runs if run.is_floor))}
    return {
        name
        for crosscoder in spec.crosscoders
        if len(crosscoder.views) == 2 and BASE_MODEL in crosscoder.views
        for other in set(crosscoder.views) - {BASE_MODEL}
        if other in BASE_VIEWS or (other.rpartition("@")[0] in runs and not other.endswith("@noise"))
        for name in crosscoder.names
    }
