"""C2: whether SFT's features stabilise early while RL's keep evolving."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from rlgen_stats.schemas.study import RunSpec, StudySpec
from rlgen_stats.toolkit.reporting.claims.scope import readout_caveat, run_caveat, these_models
from rlgen_stats.toolkit.reporting.claims.verdicts import (
    EARLY,
    MIN_CEILING,
    NOTHING,
    SET_MARGIN,
    Claim,
    SetStatus,
    Verdict,
    mover_difference,
    p_from_interval,
    set_status,
    timing_verdict,
)
from rlgen_stats.toolkit.reporting.values import (
    Results,
    fixed,
    hundred,
    labels_of,
    number,
    of_run,
    per_run,
    percent,
)

_C2: Final = "SFT features stabilise early; RL features keep evolving"
_C2_PAPER: Final = (
    "A direction, read off the overlap of top-50 feature sets across checkpoints. A plain overlap mixes change with "
    "noise: where nothing differs it falls from .96 to .16 as effects shrink, so ours is held against a noise ceiling."
)


@dataclass(frozen=True)
class RunTiming:
    """What the set test and the feature chains say about one run."""

    run: str
    model: str
    """The checkpoint used for "half"."""
    status: SetStatus
    half: float
    """Its share of training."""
    delta: tuple[float, float, float]
    """Excess turnover at half against the final set, with interval."""
    overlap: float
    """Plain overlap at half, shown but never used."""
    ceiling: float
    """Final noise ceiling."""
    stable_fraction: float
    share: tuple[float, float, float]
    """Share of testable features stabilised by half, with band."""
    verdict: str
    """Verdict of the set test."""
    reason: str
    """Its reason."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "half_checkpoint": self.model,
            "status": self.status.value,
            "set_test": self.verdict,
            "set_test_reason": self.reason,
            "training_share_at_half": self.half,
            "excess_turnover_at_half": self.delta,
            "plain_overlap_at_half": self.overlap,
            "final_noise_ceiling": self.ceiling,
            "stable_from_training_share": self.stable_fraction,
            "features_stabilised_by_half": self.share,
        }


def training_share(steps: np.ndarray) -> np.ndarray:
    """Steps as a share of the last one, so that runs of different length can be laid over each other."""
    return np.asarray(steps, dtype=float) / max(float(np.max(steps, initial=1)), 1.0)


def half_checkpoint(fractions: np.ndarray) -> int | None:
    """Index of the first checkpoint at or after half of training that is not the last; None if there is none.

    Examples
    --------
    >>> half_checkpoint(np.array([0.2, 0.4, 0.6, 0.8, 1.0]))
    2
    """
    found = np.flatnonzero((fractions >= EARLY) & (fractions < 1.0))
    return int(found[0]) if found.size else None


def run_timing(results: Results, run: RunSpec) -> RunTiming | None:
    """Timing of one run, None if the set test has no checkpoint at or after half of its training."""
    sets = results.get("set_stability")
    if sets is None:
        return None
    data = of_run(sets, run.name)
    if not data.sizes["model"]:
        return None
    steps = data["step"].values
    fractions = training_share(steps)
    where = half_checkpoint(fractions)
    if where is None:
        return None
    here = data.isel(model=where)
    delta = tuple(float(here[name]) for name in ("delta", "delta_low", "delta_high"))
    verdict = str(per_run(sets, "verdict", run.name))
    stable_from = per_run(sets, "stable_from", run.name)
    stable_fraction = NOTHING if stable_from is None else float(stable_from) / float(steps.max())
    ceiling = float(data["final_ceiling"].values[-1])
    curve = results.get("stabilization")
    model = str(here["model"].values)
    return RunTiming(
        run.name,
        model,
        set_status(verdict, stable_fraction, ceiling),
        float(fractions[where]),
        (delta[0], delta[1], delta[2]),
        float(here["overlap"]),
        ceiling,
        stable_fraction,
        (
            number(curve, "share", model=model),
            number(curve, "share_low", model=model),
            number(curve, "share_high", model=model),
        ),
        verdict,
        str(per_run(sets, "reason", run.name) or ""),
    )


def assess_timing(results: Results, spec: StudySpec) -> Claim:
    """C2 from the set test of both contrasted runs at half of training.

    The estimate is RL's minus SFT's excess turnover (the part of the set's change that sampling noise does not
    explain); the verdict is :func:`timing_verdict` on both runs' status. A plain overlap is never enough.
    """
    timings = [run_timing(results, run) for run in spec.contrasted]
    sft, rl = timings
    if sft is None or rl is None:
        missing = "the set stability analysis has not been computed"
        if results.get("set_stability") is not None:
            missing = "a run has no checkpoint in the second half of its training, before the last"
        return _unanswered(missing, spec)
    effect, low, high = mover_difference(rl.delta, sft.delta)
    if math.isnan(effect) or math.isnan(low) or math.isnan(high):
        return _unanswered("excess turnover is not estimable for at least one run", spec)
    verdict = timing_verdict(sft.status, rl.status, low, high)
    data = results["set_stability"]
    return Claim(
        "C2",
        _C2,
        hundred(effect),
        hundred(low),
        hundred(high),
        p_from_interval(effect, low, high, alpha=spec.statistics.alpha),
        "percentage points of the top set, beyond noise",
        verdict,
        _answer(verdict, sft, rl, spec),
        _caveats(results, sft, rl, spec),
        _C2_PAPER,
        {
            "test": f"{data.attrs.get('test', '')}; difference of runs by recovered variance (MOVER), p from interval",
            "null": data.attrs.get("null", ""),
            "top_k": data.attrs.get("top_k"),
            "margin_percent": hundred(SET_MARGIN),
            "sft": sft.as_dict(),
            "rl": rl.as_dict(),
            "stabilised_by_half_in_stratum": _strata(results, timings),
        },
    )


def _unanswered(reason: str, spec: StudySpec) -> Claim:
    return Claim(
        "C2",
        _C2,
        NOTHING,
        NOTHING,
        NOTHING,
        NOTHING,
        "percentage points of the top set, beyond noise",
        Verdict.NOT_ESTIMABLE,
        f"Not estimable: {reason}.",
        (run_caveat(spec),),
        _C2_PAPER,
        {"reason": reason},
    )


def _strata(results: Results, timings: list[RunTiming | None]) -> dict[str, dict[str, float]]:
    """Share of features stabilised by half within strata of total effect: ``stratum -> run -> percent``."""
    curve = results.get("stabilization")
    if curve is None or "share_in_stratum" not in curve:
        return {}
    return {
        stratum: {
            t.run: hundred(number(curve, "share_in_stratum", model=t.model, stratum=stratum))
            for t in timings
            if t is not None
        }
        for stratum in labels_of(curve, "stratum")
    }


_STATUS_WORDS: Final = {
    SetStatus.EARLY_STABLE: "is stable from the first half of training on",
    SetStatus.LATE_STABLE: "is stable only from the second half on",
    SetStatus.EVOLVING: "still changes up to the last checkpoint but one",
    SetStatus.UNDETERMINED: "cannot be called stable or evolving",
}


def _answer(verdict: Verdict, sft: RunTiming, rl: RunTiming, spec: StudySpec) -> str:
    parts = (
        f"{sft.run}'s top set {_STATUS_WORDS[sft.status]} (excess turnover {fixed(100 * sft.delta[0])}%) and "
        f"{rl.run}'s {_STATUS_WORDS[rl.status]} ({fixed(100 * rl.delta[0])}%)"
    )
    head = {
        Verdict.SUPPORTED: f"{these_models(spec)} differ as claimed",
        Verdict.CONTRADICTED: f"{these_models(spec)} differ the other way",
        Verdict.NOT_SUPPORTED: f"{these_models(spec)} do not differ in timing as claimed",
    }.get(verdict, f"Whether {these_models(spec, start=False)} differ in timing is open")
    return f"{head}: {parts}."


def _caveats(results: Results, sft: RunTiming, rl: RunTiming, spec: StudySpec) -> tuple[str, ...]:
    caveats = [run_caveat(spec)]
    for timing in (sft, rl):
        if math.isnan(timing.ceiling) or timing.ceiling < MIN_CEILING:
            caveats.append(
                f"{timing.run}: two halves of the prompts agree on only {percent(timing.ceiling, 0)} of the final top "
                f"set, less than the {percent(MIN_CEILING, 0)} needed to speak about its change."
            )
    curve = results.get("stabilization")
    if curve is None:
        caveats.append("The feature-by-feature chains (stabilisation curve) have not been computed.")
    elif "share_in_stratum" not in curve:
        caveats.append("The stabilisation curves are not compared within strata of total effect size.")
    if abs(sft.half - rl.half) > 0.1:
        caveats.append(
            f"The checkpoints compared sit at different shares of training ({percent(sft.half, 0)} and "
            f"{percent(rl.half, 0)})."
        )
    caveats += [
        f"{timing.run}: {timing.reason}."
        for timing in (sft, rl)
        if timing.status is SetStatus.UNDETERMINED and timing.reason and timing.ceiling >= MIN_CEILING
    ]
    return (*caveats, *readout_caveat(results, spec))
