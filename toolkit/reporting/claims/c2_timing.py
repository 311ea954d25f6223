"""C2: whether SFT's features stabilise early while RL's keep evolving."""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import Any, Final

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.claims.claim import Claim, PaperClaim
from rlgen_stats.toolkit.reporting.claims.replication import (
    dictionary_caveat,
    health_caveat,
    readout_accepted,
    run_caveat,
    these_models,
    unusable_readout,
)
from rlgen_stats.toolkit.reporting.formatting import fixed, hundred, listed, percent
from rlgen_stats.toolkit.reporting.result_lookup import Results, attr_number, by_dictionary, labels_of, number
from rlgen_stats.toolkit.statistics.claim_verdicts import Verdict, timing_verdict
from rlgen_stats.toolkit.statistics.timing.run_contrast import (
    RunContrast,
    RunTiming,
    SetStatus,
    contrast_runs,
    pool_contrasts,
    run_timing,
)
from rlgen_stats.toolkit.statistics.timing.set_stability import DELTA_TOLERANCE, MIN_CEILING

C2: Final = PaperClaim(
    id="C2",
    statement="SFT features stabilise early; RL features keep evolving",
    unit="percentage points of the top set, beyond noise",
    paper_figure=(
        "A direction, read off the overlap of top-50 feature sets across checkpoints. A plain overlap mixes change "
        "with noise: where nothing differs it falls from .96 to .16 as effects shrink, so ours is held against a noise "
        "ceiling."
    ),
)


def assess_timing(results: Results, spec: StudySpec) -> Claim:
    """C2 from the set test of both contrasted runs at half of training.

    The estimate is RL's minus SFT's excess turnover (the part of the set's change that sampling noise does not
    explain); the verdict is :func:`~rlgen_stats.toolkit.statistics.claim_verdicts.timing_verdict` on both runs' status.
    A plain overlap is never enough.

    Nothing is said about checkpoints whose change from base the features do not describe (dFVE below its limit): a
    caveat names them, and C2 is UNDETERMINED, without numbers, if one of them lies between half of a run's training and
    its end, where the claim is decided. A study that accepts its readout as it is keeps its numbers.
    """
    sets = by_dictionary(results, "set_stability")
    if not sets:
        return C2.not_estimable("the set stability analysis has not been computed", caveats=(run_caveat(spec),))
    unusable = unusable_readout(results, spec)
    if unusable:
        return C2.not_estimable(unusable, caveats=(run_caveat(spec),))
    timings = _timings(results, spec)
    if timings is None:
        reason = "a run has no checkpoint in the second half of its training, before the last"
        return C2.not_estimable(reason, caveats=(run_caveat(spec),))
    undescribed = _undescribed(results, spec)
    decisive = [model for timing in timings[0] for model in timing.decided_at if model in undescribed]
    if decisive:
        return C2.answered(
            (math.nan, math.nan, math.nan),
            math.nan,
            Verdict.UNDETERMINED,
            f"Undetermined, because the features do not describe what changed at {listed(decisive)}.",
            caveats=(run_caveat(spec), *_undescribed_caveat(undescribed), *health_caveat(results, spec)),
            details={"dfve_below_limit": undescribed},
        )
    alpha, data = spec.statistics.alpha, sets[0]
    contrasts = [contrast_runs(sft, rl, alpha=alpha) for sft, rl in timings]
    contrast = pool_contrasts(contrasts, alpha=alpha)
    sft, rl = contrast.first, contrast.second
    interval = (contrast.difference, contrast.low, contrast.high)
    if any(math.isnan(value) for value in interval):
        reason = "excess turnover is not estimable for at least one run"
        return C2.not_estimable(reason, caveats=(run_caveat(spec),))
    verdict = timing_verdict(sft.status, rl.status, contrast.low, contrast.high)
    return C2.answered(
        (hundred(contrast.difference), hundred(contrast.low), hundred(contrast.high)),
        contrast.p_value,
        verdict,
        _answer(verdict, contrast, spec),
        caveats=(*_caveats(results, contrast, spec), *_undescribed_caveat(undescribed)),
        details={
            "test": f"{data.attrs.get('test', '')}; difference of runs by recovered variance (MOVER), p from interval",
            "null": data.attrs.get("null", ""),
            "top_k": data.attrs.get("top_k"),
            "margin_percent": hundred(DELTA_TOLERANCE),
            "sft": _timing_details(sft),
            "rl": _timing_details(rl),
            "difference_by_dictionary": [hundred(one.difference) for one in contrasts],
            "stabilised_by_half_in_stratum": _strata(results, contrast),
        },
    )


def _timings(results: Results, spec: StudySpec) -> list[tuple[RunTiming, RunTiming]] | None:
    """Timing of both contrasted runs in every dictionary; None if one has no checkpoint to look at."""
    sets, chains = (by_dictionary(results, group) for group in ("set_stability", "stabilization"))
    pairs = []
    for data, chain in zip_longest(sets, chains):
        sft, rl = (run_timing(data, run.name, stabilization=chain) for run in spec.contrasted)
        if sft is None or rl is None:
            return None
        pairs.append((sft, rl))
    return pairs


def _undescribed(results: Results, spec: StudySpec) -> dict[str, float]:
    """Checkpoint of a contrasted run -> smallest dFVE of all dictionaries, where below its limit and not accepted."""
    sets, limit = by_dictionary(results, "set_stability"), attr_number(results.get("health"), "dfve_min")
    if not sets or readout_accepted(results, spec):
        return {}
    data = sets[0]
    runs = {run.name for run in spec.contrasted}
    models = [m for m, run in zip(labels_of(data, "model"), labels_of(data, "run"), strict=True) if run in runs]
    dfve = {model: min(number(data, "dfve", model=model) for data in sets) for model in models}
    return {model: value for model, value in dfve.items() if value < limit}


def _undescribed_caveat(undescribed: dict[str, float]) -> tuple[str, ...]:
    if not undescribed:
        return ()
    shown = listed([f"{model} ({fixed(100 * value, 0)}%)" for model, value in undescribed.items()])
    return (f"Nothing is said about {shown}: so little of its change from base do the features describe.",)


def _timing_details(timing: RunTiming) -> dict[str, Any]:
    return {
        "half_checkpoint": timing.half_checkpoint,
        "status": timing.status.value,
        "set_test": timing.set_verdict,
        "set_test_reason": timing.set_reason,
        "training_share_at_half": timing.half_share,
        "excess_turnover_at_half": timing.turnover,
        "plain_overlap_at_half": timing.overlap,
        "final_noise_ceiling": timing.ceiling,
        "stable_from_training_share": timing.stable_share,
        "features_stabilised_by_half": timing.stabilised,
    }


def _strata(results: Results, contrast: RunContrast) -> dict[str, dict[str, float]]:
    """Share of features stabilised by half within strata of total effect: ``stratum -> run -> percent``."""
    data = results.get("stabilization")
    if data is None or "share_in_stratum" not in data:
        return {}
    return {
        stratum: {
            timing.run: hundred(number(data, "share_in_stratum", model=timing.half_checkpoint, stratum=stratum))
            for timing in (contrast.first, contrast.second)
        }
        for stratum in labels_of(data, "stratum")
    }


_STATUS_WORDS: Final = {
    SetStatus.EARLY_STABLE: "is stable from the first half of training on",
    SetStatus.LATE_STABLE: "is stable only from the second half on",
    SetStatus.EVOLVING: "still changes up to the last checkpoint but one",
    SetStatus.UNDETERMINED: "cannot be called stable or evolving",
}


def _answer(verdict: Verdict, contrast: RunContrast, spec: StudySpec) -> str:
    sft, rl = contrast.first, contrast.second
    comparison = (
        f"{sft.run}'s top set {_STATUS_WORDS[sft.status]} (excess turnover {fixed(100 * sft.turnover[0])}%) and "
        f"{rl.run}'s {_STATUS_WORDS[rl.status]} ({fixed(100 * rl.turnover[0])}%)"
    )
    head = {
        Verdict.SUPPORTED: f"{these_models(spec)} differ as claimed",
        Verdict.CONTRADICTED: f"{these_models(spec)} differ in the opposite direction",
        Verdict.NOT_SUPPORTED: f"{these_models(spec)} do not differ in timing as claimed",
    }.get(verdict, f"Whether {these_models(spec, start=False)} differ in timing is open")
    return f"{head}: {comparison}."


def _caveats(results: Results, contrast: RunContrast, spec: StudySpec) -> tuple[str, ...]:
    timings = (contrast.first, contrast.second)
    caveats = [run_caveat(spec), *dictionary_caveat(spec)]
    caveats += [
        f"{timing.run}: two halves of the prompts agree on only {percent(timing.ceiling, 0)} of the final top set, "
        f"less than the {percent(MIN_CEILING, 0)} needed to say whether it changed."
        for timing in timings
        if math.isnan(timing.ceiling) or timing.ceiling < MIN_CEILING
    ]
    stabilization = results.get("stabilization")
    if stabilization is None:
        caveats.append("The test of single features (stabilisation curve) has not been computed.")
    elif "share_in_stratum" not in stabilization:
        caveats.append("The stabilisation curves are not compared within strata of total effect size.")
    half_shares = [timing.half_share for timing in timings]
    if abs(half_shares[0] - half_shares[1]) > 0.1:
        caveats.append(
            f"The checkpoints compared are at different shares of training ({percent(half_shares[0], 0)} and "
            f"{percent(half_shares[1], 0)})."
        )
    caveats += [
        f"{timing.run}: {timing.set_reason}."
        for timing in timings
        if timing.status is SetStatus.UNDETERMINED and timing.set_reason and timing.ceiling >= MIN_CEILING
    ]
    return (*caveats, *health_caveat(results, spec))
