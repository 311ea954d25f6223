"""C2: whether SFT's features stabilise early while RL's keep evolving."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import xarray as xr

from rlgen_stats.schemas.dims import TRAINED_RUN, split_model_id
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.claims.claim import Claim, PaperClaim
from rlgen_stats.toolkit.reporting.claims.replication import (
    dictionary_caveat,
    health_caveat,
    run_caveat,
    these_models,
    unusable_readout,
)
from rlgen_stats.toolkit.reporting.formatting import fixed, hundred, interval, listed, percent
from rlgen_stats.toolkit.reporting.result_lookup import Results, labels_of, number
from rlgen_stats.toolkit.reporting.source_study import UNCHECKED
from rlgen_stats.toolkit.statistics.claim_verdicts import (
    NEGLIGIBLE_TIME,
    NEGLIGIBLE_TURNOVER,
    Verdict,
    times_oppose,
    timing_claim,
    timing_differences,
)
from rlgen_stats.toolkit.statistics.timing.run_contrast import MEASURES, undescribed_checkpoints
from rlgen_stats.toolkit.statistics.timing.set_stability import MIN_CEILING

C2: Final = PaperClaim(
    id="C2",
    statement="SFT features stabilise early; RL features keep evolving",
    short="RL’s features settle later",
    unit="percentage points of training",
    paper_figure=(
        "A direction, read off the overlap of the top 50 features by model-specificity across checkpoints. "
        f"{UNCHECKED} A plain overlap mixes change with noise: where nothing differs it falls from .96 to .16 as "
        "effects shrink, so ours is held against the overlap that noise allows."
    ),
)
_ENDS: Final = ("", "_low", "_high")
NEGLIGIBLE: Final = {"time": NEGLIGIBLE_TIME, "turnover": NEGLIGIBLE_TURNOVER}


def assess_timing(results: Results, spec: StudySpec) -> Claim:
    """C2 from the stored contrast of both runs: mean time to stability, and excess turnover of the top set.

    The estimate is RL's minus SFT's mean time to stability within strata of total change; the verdict is
    :func:`~rlgen_stats.toolkit.statistics.claim_verdicts.timing_verdict` on both differences and those within strata. A
    plain overlap is reported only. Checkpoints whose change from base the features do not describe were left out; a
    caveat names them.
    """
    unusable = unusable_readout(results, spec)
    if unusable:
        return C2.not_estimable(unusable, caveats=(run_caveat(spec),))
    undescribed = _undescribed(results, spec)
    caveats = (run_caveat(spec), *dictionary_caveat(spec), *_undescribed_caveat(undescribed))
    data = results.get("timing_contrast")
    if data is None:
        reason = (
            "of one of the runs the features describe fewer than two checkpoints"
            if undescribed
            else "the contrast of timing has not been computed"
        )
        return C2.not_estimable(reason, caveats=caveats)
    verdict, *alone = timing_claim(data, alpha=spec.statistics.alpha)
    verdicts = dict(zip(MEASURES, alone, strict=True))
    if verdict is Verdict.NOT_ESTIMABLE:
        reason = (
            "the runs have no checkpoint before the last at the same share of training"
            if data.sizes["node"] < 2
            else "no stratum of total change holds features of both runs"
        )
        return C2.not_estimable(reason, caveats=caveats)
    estimate, low, high = (hundred(number(data, name, measure="time")) for name in ("difference", "low", "high"))
    return C2.answered(
        (estimate, low, high),
        number(data, "p_value", measure="time"),
        verdict,
        _answer(verdict, verdicts, data, spec),
        in_short=_in_short(verdict, verdicts),
        caveats=(
            *caveats,
            *_strata_caveat(data),
            *_turnover_caveat(data),
            _paper_caveat(data),
            *health_caveat(results, spec),
        ),
        details={
            "test": data.attrs.get("test", ""),
            "null": data.attrs.get("null", ""),
            "top_k": data.attrs.get("top_k"),
            "dfve_below_limit": undescribed,
            "compared_at_training_share": data["training_share"].values.tolist(),
            "measures": {name: _measure_details(data, name, verdicts[name]) for name in MEASURES},
            "time_in_stratum": _strata(data),
            "paper_rule_overlap": _paper_overlap(data),
        },
    )


def _by_dictionary(data: xr.Dataset, measure: str) -> list[float]:
    return [float(value) for value in data["dictionary_difference"].sel(measure=measure).values]


def _undescribed(results: Results, spec: StudySpec) -> dict[str, float]:
    """Checkpoint of a contrasted run -> smallest dFVE of all dictionaries, where below its limit and not accepted."""
    health, runs = results.get("health"), {run.name for run in spec.contrasted}
    if health is None or spec.primary_crosscoder.accept_unhealthy:
        return {}
    low = undescribed_checkpoints(health, spec.primary_crosscoder.names)
    return {model: value for model, value in low.items() if split_model_id(model)[0] in runs}


def _undescribed_caveat(undescribed: dict[str, float]) -> tuple[str, ...]:
    if not undescribed:
        return ()
    shown = listed([f"{model} ({fixed(100 * value, 0)}%)" for model, value in undescribed.items()])
    return (f"Nothing is said about {shown}: so little of its change from base do the features describe.",)


def _turnover_caveat(data: xr.Dataset) -> tuple[str, ...]:
    """One sentence where the prompts do not determine the top sets everywhere."""
    hidden = data["training_share"].values[~data["determined"].values.astype(bool)]
    if not hidden.size:
        return ()
    where = listed([percent(float(share), 0) for share in hidden])
    return (
        f"Top sets are not compared at {where} of training: there two halves of the prompts could agree on less than "
        f"{percent(MIN_CEILING, 0)} of a set even if it never changed.",
    )


def _measure_details(data: xr.Dataset, measure: str, verdict: Verdict) -> dict[str, Any]:
    names = ("difference", "low", "high")
    return {
        "verdict": verdict.value,
        **{name: hundred(number(data, name, measure=measure)) for name in names},
        "p_value": number(data, "p_value", measure=measure),
        "negligible": hundred(NEGLIGIBLE[measure]),
        "by_dictionary": [hundred(value) for value in _by_dictionary(data, measure)],
        "by_run": {
            run: [hundred(number(data, f"value{end}", measure=measure, trained_run=run)) for end in _ENDS]
            for run in labels_of(data, TRAINED_RUN)
        },
    }


def _strata(data: xr.Dataset) -> dict[str, dict[str, Any]]:
    """What the time rests on: ``stratum -> difference, weight, and features by run``, times in percent of training."""
    return {
        stratum: {
            "weight": number(data, "weight", stratum=stratum),
            **{
                name: hundred(number(data, f"stratum_difference{end}", stratum=stratum))
                for name, end in zip(("difference", "low", "high"), _ENDS, strict=True)
            },
            "n_features": {
                run: number(data, "n_in_stratum", stratum=stratum, trained_run=run)
                for run in labels_of(data, TRAINED_RUN)
            },
        }
        for stratum in labels_of(data, "stratum")
        if number(data, "weight", stratum=stratum) > 0
    }


def _strata_caveat(data: xr.Dataset) -> tuple[str, ...]:
    """One sentence: what the strata that the time is averaged over show by themselves, and on how many features."""
    words = [
        f"{stratum} {fixed(one['difference'], sign=True)} points {interval(one['low'], one['high'], sign=True)} ("
        + listed([f"{fixed(n, 0)} of {run}'s features" for run, n in one["n_features"].items()])
        + ")"
        for stratum, one in _strata(data).items()
    ]
    return (f"By how far features changed, {'; '.join(words)}.",) if words else ()


def _paper_overlap(data: xr.Dataset) -> dict[str, dict[str, float]]:
    """The paper's own number: ``run -> checkpoint -> percent of the final set``, mean over dictionaries."""
    by_run = zip(np.transpose(data["checkpoint"].values), np.transpose(data["paper_overlap"].values), strict=True)
    return {
        run: {str(model): hundred(float(share)) for model, share in zip(models, overlap, strict=True)}
        for run, (models, overlap) in zip(labels_of(data, TRAINED_RUN), by_run, strict=True)
    }


def _paper_caveat(data: xr.Dataset) -> str:
    """The paper's rule in words, its last checkpoint (which is the final set itself) left out."""
    shares = listed([percent(float(share), 0) for share in data["training_share"].values[:-1]])
    overlaps = [
        f"{listed([percent(value / 100, 0) for value in list(overlap.values())[:-1]])} of {run}'s"
        for run, overlap in _paper_overlap(data).items()
    ]
    return (
        f"The paper's own rule, reported only: at {shares} of training, {listed(overlaps)} final top "
        f"{data.attrs.get('top_k')} by model-specificity were in the set already; noise is not taken off."
    )


_HEADS: Final = {
    Verdict.SUPPORTED: "{models} differ as claimed",
    Verdict.CONTRADICTED: "{models} differ in the opposite direction",
    Verdict.NOT_SUPPORTED: "{models} do not differ in timing by an amount that matters",
}
_MEASURE_WORDS: Final = {
    "time": "{rl}'s features become stable {difference} points of training {later} than {sft}'s that changed as far",
    "turnover": "of its top set {difference} points {more} were still to change than of {sft}'s",
}
_ALONE: Final = {Verdict.UNDETERMINED: ", alone open", Verdict.NOT_SUPPORTED: ", too little to matter"}


def _in_short(verdict: Verdict, verdicts: dict[str, Verdict]) -> str:
    if verdict is Verdict.NOT_SUPPORTED:
        return "too small to matter"
    if verdict is not Verdict.UNDETERMINED:
        return ""
    if verdicts["time"] is Verdict.UNDETERMINED:
        return f"{fixed(hundred(NEGLIGIBLE_TIME), 0)} points are not shown to be exceeded"
    return "the turnover of the top set is open or says otherwise"


def _answer(verdict: Verdict, verdicts: dict[str, Verdict], data: xr.Dataset, spec: StudySpec) -> str:
    open_head = f"Whether {these_models(spec, start=False)} differ in timing is open"
    head = _HEADS.get(verdict, open_head).format(models=these_models(spec))
    answer = f"{head}: {listed(_measure_words(data, name, verdicts[name], spec) for name in MEASURES)}."
    time, _, strata = timing_differences(data)
    if times_oppose(time, strata, alpha=spec.statistics.alpha):
        answer += " Features that changed little and features that changed much do not show the same."
    return answer


def _measure_words(data: xr.Dataset, measure: str, verdict: Verdict, spec: StudySpec) -> str:
    """The size of one difference in the direction it has, its interval in that direction, and what it says alone."""
    difference, *ends = (hundred(number(data, name, measure=measure)) for name in ("difference", "low", "high"))
    if math.isnan(difference):
        return "the prompts do not determine its top set"
    positive = difference >= 0
    low, high = sorted(end if positive else -end for end in ends)
    sft, rl = (run.name for run in spec.contrasted)
    words = _MEASURE_WORDS[measure].format(
        sft=sft,
        rl=rl,
        difference=fixed(abs(difference)),
        later="later" if positive else "earlier",
        more="more" if positive else "fewer",
    )
    return f"{words} [{fixed(low)}, {fixed(high)}{_ALONE.get(verdict, '')}]"
