"""When two runs' top feature sets became stable, and the difference between the runs (claim C2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import MODEL, RUN, STEP, TRAINED_RUN
from rlgen_stats.toolkit.statistics.kernels import agreed, mover_difference, p_from_interval, pooled_intervals
from rlgen_stats.toolkit.statistics.timing.set_stability import MIN_CEILING

EARLY: Final = 0.5
"""Share of a run's training that counts as early: the first half, fixed before looking."""


class SetStatus(StrEnum):
    """How a run's top-k feature set behaved over its training."""

    EARLY_STABLE = "EARLY_STABLE"
    """Stable, beyond noise, from a checkpoint in the first half of training on."""
    LATE_STABLE = "LATE_STABLE"
    """Stable only from a checkpoint in the second half on."""
    EVOLVING = "EVOLVING"
    """Shown to differ from the final set, beyond noise, up to the last checkpoint but one."""
    UNDETERMINED = "UNDETERMINED"
    """The noise ceiling is too low, or the interval too wide, to say."""


@dataclass(frozen=True, kw_only=True)
class RunTiming:
    """What the set test and the stabilisation test say about one run; triples are estimate, low and high."""

    run: str
    half_checkpoint: str
    """Model id of the first checkpoint at or after half of training."""
    half_share: float
    """Its share of training."""
    decided_at: tuple[str, ...]
    """It and all later checkpoints: the status rests on these."""
    status: SetStatus
    set_verdict: str
    """Verdict of the set test: SET_STABLE, EVOLVING or UNDETERMINED."""
    set_reason: str
    """Reason the set test gives for it."""
    turnover: tuple[float, float, float]
    """Excess turnover of the set at half of training against the final set."""
    overlap: float
    """Plain overlap at half of training; reported only, because it mixes change with noise."""
    ceiling: float
    """Noise ceiling of the final set."""
    stable_share: float
    """Share of training from which the set is stable, NaN if it is not."""
    stabilised: tuple[float, float, float]
    """Share of testable features stabilised by half of training; NaN without a stabilisation test."""


@dataclass(frozen=True, kw_only=True)
class RunContrast:
    """Difference in excess turnover at half of training, second run minus first."""

    first: RunTiming
    second: RunTiming
    difference: float
    low: float
    high: float
    p_value: float


def set_status(verdict: str, stable_share: float, final_ceiling: float) -> SetStatus:
    """Status of one run's top-k set from its set test; a plain overlap is never looked at.

    Parameters
    ----------
    verdict
        SET_STABLE, EVOLVING or UNDETERMINED, as the set test gives it.
    stable_share
        Share of training from which the set is stable, NaN if it is not.
    final_ceiling
        Noise ceiling at the last checkpoint; below ``MIN_CEILING`` nothing is determined.
    """
    if math.isnan(final_ceiling) or final_ceiling < MIN_CEILING:
        return SetStatus.UNDETERMINED
    if verdict == "SET_STABLE" and not math.isnan(stable_share):
        return SetStatus.EARLY_STABLE if stable_share <= EARLY else SetStatus.LATE_STABLE
    return SetStatus.EVOLVING if verdict == "EVOLVING" else SetStatus.UNDETERMINED


def checkpoints_of(data: xr.Dataset, run: str) -> xr.Dataset:
    """The checkpoints of one run, by step; an empty ``model`` dimension if the run has none."""
    chosen = data.isel({MODEL: np.flatnonzero(data[RUN].values == run)})
    return chosen.isel({MODEL: np.argsort(chosen[STEP].values, kind="stable")})


def training_share(steps: NDArray[np.generic]) -> NDArray[np.float64]:
    """Steps as a share of the last one, so that runs of different length can be laid over each other."""
    return np.asarray(steps, dtype=np.float64) / max(float(np.max(steps, initial=1)), 1.0)


def half_checkpoint(shares: NDArray[np.float64]) -> int | None:
    """Index of the first checkpoint at or after half of training that is not the last; None if there is none.

    Examples
    --------
    >>> half_checkpoint(np.array([0.2, 0.4, 0.6, 0.8, 1.0]))
    2
    """
    candidates = np.flatnonzero((shares >= EARLY) & (shares < 1.0))
    return int(candidates[0]) if candidates.size else None


def run_timing(sets: xr.Dataset, run: str, *, stabilization: xr.Dataset | None = None) -> RunTiming | None:
    """Timing of one run.

    Parameters
    ----------
    sets
        Layout ``set_stability``.
    run
        Name of a run.
    stabilization
        Layout ``stabilization``, for the share of features stabilised; may be missing.

    Returns
    -------
    RunTiming or None
        None if the set test has no checkpoint of the run at or after half of its training, before the last.
    """
    checkpoints = checkpoints_of(sets, run)
    if not checkpoints.sizes[MODEL]:
        return None
    steps = checkpoints[STEP].values
    shares = training_share(steps)
    half = half_checkpoint(shares)
    if half is None:
        return None
    at_half = checkpoints.isel({MODEL: half})
    model = str(at_half[MODEL].values)
    verdict, stable_from, reason = (_of_run(sets, name, run) for name in ("verdict", "stable_from", "reason"))
    stable_share = math.nan if stable_from is None else float(stable_from) / float(steps.max())
    ceiling = float(checkpoints["final_ceiling"].values[-1])
    return RunTiming(
        run=run,
        half_checkpoint=model,
        half_share=float(shares[half]),
        decided_at=tuple(str(later) for later in checkpoints[MODEL].values[half:]),
        status=set_status(str(verdict), stable_share, ceiling),
        set_verdict=str(verdict),
        set_reason=str(reason or ""),
        turnover=(float(at_half["delta"]), float(at_half["delta_low"]), float(at_half["delta_high"])),
        overlap=float(at_half["overlap"]),
        ceiling=ceiling,
        stable_share=stable_share,
        stabilised=(
            _of_model(stabilization, "share", model),
            _of_model(stabilization, "share_low", model),
            _of_model(stabilization, "share_high", model),
        ),
    )


def contrast_runs(first: RunTiming, second: RunTiming, *, alpha: float) -> RunContrast:
    """Excess turnover at half of training, second run minus first.

    Notes
    -----
    The interval is recovered from the runs' own (MOVER), the p-value from that interval; NaN where a run's is. The
    runs are treated as independent, which is conservative because they answer the same prompts.
    """
    difference, low, high = mover_difference(second.turnover, first.turnover)
    p_value = p_from_interval(difference, low, high, alpha=alpha)
    return RunContrast(first=first, second=second, difference=difference, low=low, high=high, p_value=p_value)


def pool_timings(timings: Sequence[RunTiming], *, alpha: float) -> RunTiming:
    """One run's timing over several dictionaries: estimates pooled, status where they agree, the rest at its worst."""
    first = timings[0]
    if len(timings) == 1:
        return first
    each = [timing.status.value for timing in timings]
    status = agreed([timing.status for timing in timings], SetStatus.UNDETERMINED)
    disagreement = f"the dictionaries disagree ({', '.join(each)})" if len(set(each)) > 1 else first.set_reason
    return replace(
        first,
        status=status,
        set_verdict=agreed([timing.set_verdict for timing in timings], "UNDETERMINED"),
        set_reason=disagreement if status is SetStatus.UNDETERMINED else first.set_reason,
        turnover=_pooled([timing.turnover for timing in timings], alpha),
        overlap=float(np.mean([timing.overlap for timing in timings])),
        ceiling=min(timing.ceiling for timing in timings),
        stable_share=max(timing.stable_share for timing in timings),
        stabilised=_pooled([timing.stabilised for timing in timings], alpha),
    )


def _pooled(each: Sequence[tuple[float, float, float]], alpha: float) -> tuple[float, float, float]:
    """Estimates with low and high, pooled."""
    mean, low, high = pooled_intervals(*np.transpose(each), alpha=alpha)
    return float(mean), float(low), float(high)


def pool_contrasts(contrasts: Sequence[RunContrast], *, alpha: float) -> RunContrast:
    """The difference of two runs over several dictionaries, with the variance between these in its interval."""
    if len(contrasts) == 1:
        return contrasts[0]
    each = [(contrast.difference, contrast.low, contrast.high) for contrast in contrasts]
    difference, low, high = _pooled(each, alpha)
    return RunContrast(
        first=pool_timings([contrast.first for contrast in contrasts], alpha=alpha),
        second=pool_timings([contrast.second for contrast in contrasts], alpha=alpha),
        difference=difference,
        low=low,
        high=high,
        p_value=p_from_interval(difference, low, high, alpha=alpha),
    )


def _of_run(sets: xr.Dataset, name: str, run: str) -> Any:
    """Value of a per-run variable, None where the variable or the run is missing."""
    if name not in sets or TRAINED_RUN not in sets[name].dims:
        return None
    position = np.flatnonzero(sets[TRAINED_RUN].values == run)
    return sets[name].values[position[0]] if position.size else None


def _of_model(data: xr.Dataset | None, name: str, model: str) -> float:
    """Value of a per-checkpoint variable, NaN where the dataset, variable or checkpoint is missing."""
    if data is None or name not in data:
        return math.nan
    position = np.flatnonzero(data[MODEL].values == model)
    return float(data[name].values[position[0]]) if position.size else math.nan
