"""Figures along training: when features stabilise, and the top set against the overlap that noise allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Final

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from rlgen_stats.schemas.dims import BASE_RUN
from rlgen_stats.schemas.errors import NotEstimableError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.figures.figure_inputs import needed, run_colours, styles_of
from rlgen_stats.toolkit.reporting.figures.plotting import (
    HALF,
    MUTED,
    NULL,
    RULE,
    VIOLET,
    Graphic,
    legend_below,
    panel,
    percent_axis,
    quiet,
)
from rlgen_stats.toolkit.reporting.formatting import fixed, interval, percent
from rlgen_stats.toolkit.reporting.result_lookup import Results, attr_number, by_dictionary, labels_of, number
from rlgen_stats.toolkit.statistics.timing.run_contrast import checkpoints_of, training_share
from rlgen_stats.toolkit.statistics.timing.set_stability import DELTA_TOLERANCE, MIN_CEILING
from rlgen_stats.toolkit.statistics.timing.stabilization import CHANGED, mean_time

ENDS: Final = ("", "_low", "_high")


def _runs(data: xr.Dataset, spec: StudySpec) -> list[tuple[str, xr.Dataset, np.ndarray]]:
    """Run, its checkpoints by step, and their share of training, for the contrasted runs that the data has."""
    checkpoints = {run.name: checkpoints_of(data, run.name) for run in spec.contrasted}
    checkpoints = {name: one for name, one in checkpoints.items() if one.sizes["model"]}
    if not checkpoints:
        raise NotEstimableError("no checkpoint of either contrasted run was analysed")
    return [(name, one, training_share(one["step"].values)) for name, one in checkpoints.items()]


def compared_strata(results: Results) -> list[str]:
    """Strata of total change that C2 rests on; those of changed features where it was not computed."""
    timing, strata = results.get("timing_contrast"), labels_of(results.get("stabilization"), "stratum")
    weighed = [one for one in strata if number(timing, "weight", stratum=one) > 0]
    return weighed or strata[CHANGED]


def time_difference(results: Results, spec: StudySpec) -> float:
    """RL's minus SFT's mean time to stability, read off the curves that the figure draws; NaN where C2 has none."""
    each, timing = by_dictionary(results, "stabilization"), results.get("timing_contrast")
    sft, rl = (run.name for run in spec.contrasted)
    parts = []
    for stratum in compared_strata(results):
        times = []
        for run in (sft, rl):
            curves = [checkpoints_of(data, run).sel(stratum=stratum) for data in each]
            if timing is None or not all(one.sizes["model"] for one in curves):
                return math.nan
            share = training_share(curves[0]["step"].values)
            times.append(np.mean([mean_time(share, one["share_in_stratum"].values) for one in curves]))
        parts.append(number(timing, "weight", stratum=stratum) * (times[1] - times[0]))
    return float(sum(parts)) if parts else math.nan


def stabilization(results: Results, spec: StudySpec) -> Graphic:
    """Share of features that have stabilised along training, by how far they changed in all: what C2 compares."""
    needed(results, "stabilization")
    each, strata, timing = (
        by_dictionary(results, "stabilization"),
        compared_strata(results),
        results.get("timing_contrast"),
    )
    runs, panels = [run for run, *_ in _runs(each[0], spec)], []
    for stratum in strata:
        shown = "; ".join(f"{run}: {_settled(each, run, stratum)}" for run in runs)
        alt = f"Share of features stabilised along training, {stratum} change. {shown}."

        def draw(axes: Axes, stratum: str = stratum) -> None:
            plot_stability(each, axes, stratum=stratum, runs=runs)
            axes.set_title(f"{stratum} change", pad=16)
            axes.text(0, 1.03, _stratum_words(timing, stratum), transform=axes.transAxes, fontsize=8.5, color=MUTED)

        panels.append(panel(draw, HALF, 3.0, title=f"When features stabilise: {stratum} change", alt=alt))
    data = each[0]
    margin, unit = data.attrs.get("margin", "?"), data.attrs.get("margin_unit", "")
    persist = percent(attr_number(data, "persist"), 0)
    return Graphic(
        "stabilization",
        "When features stabilise",
        tuple(panels),
        f"A feature is stable from the checkpoint on from which its mean stays within {margin} ({unit}) of its final "
        f"one; being within it only over the last {persist} of the checkpoints does not count. Shown are the features "
        "that changed equally far in all, which is what C2 compares: features that never left the margin are stable "
        "throughout, and a run that changes fewer of them would look earlier. Thin lines: dictionaries.",
        roughly={"C2": 100 * time_difference(results, spec)},
    )


def plot_stability(
    stabilization: xr.Dataset | Sequence[xr.Dataset],
    axes: Axes,
    *,
    stratum: str,
    runs: Sequence[str] | None = None,
) -> Axes:
    """Share of the features of one stratum of total change that are stable, along training.

    Parameters
    ----------
    stabilization
        Results group ``stabilization``, or that of each dictionary.
    axes
        Axes to draw on.
    stratum
        ``unchanged``, ``moderate`` or ``large``.
    runs
        Runs drawn; default all.

    Returns
    -------
    Axes
        ``axes``; x is the share of training, the thick line the mean over dictionaries.
    """
    each = [stabilization] if isinstance(stabilization, xr.Dataset) else list(stabilization)
    styles = styles_of(each[0], runs)
    for run in runs or [run for run in styles if run != BASE_RUN]:
        curves = [checkpoints_of(data, run) for data in each]
        share = training_share(curves[0]["step"].values)
        settled = [one["share_in_stratum"].sel(stratum=stratum).values.astype(float) for one in curves]
        colour, marker = styles[run]
        for line in settled if len(settled) > 1 else []:
            axes.plot([0, *share], [0, *line], color=colour, lw=0.7, alpha=0.5)
        axes.plot(
            [0, *share], [0, *np.mean(settled, axis=0)], color=colour, marker=marker, ms=4.5, label=run, clip_on=False
        )
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="share of training", ylabel="features that are stable")
    percent_axis(axes.xaxis)
    percent_axis(axes.yaxis)
    quiet(axes, grid="y")
    axes.legend(loc="lower right", handlelength=1.4)
    return axes


def _settled(each: list[xr.Dataset], run: str, stratum: str) -> str:
    curves = [checkpoints_of(data, run).sel(stratum=stratum) for data in each]
    shares = training_share(curves[0]["step"].values)
    settled = np.mean([one["share_in_stratum"].values for one in curves], axis=0)
    return ", ".join(f"{percent(s, 0)} by {percent(x, 0)} of training" for s, x in zip(settled, shares, strict=True))


def _stratum_words(timing: xr.Dataset | None, stratum: str) -> str:
    """The difference in time that the table gives for a stratum."""
    difference, low, high = (100 * number(timing, f"stratum_difference{end}", stratum=stratum) for end in ENDS)
    if not math.isfinite(difference):
        return "no difference was computed"
    return f"difference in time {fixed(difference, sign=True)} points {interval(low, high, sign=True)}"


def plot_overlap(set_stability: xr.Dataset, axes: Axes, *, run: str, colour: str = VIOLET) -> Axes:
    """Overlap of a run's top set with its final one, between what noise allows and chance, along training.

    Parameters
    ----------
    set_stability
        Results group ``set_stability``.
    axes
        Axes to draw on.
    run
        Name of the run.
    colour
        Colour of its lines.

    Returns
    -------
    Axes
        ``axes``; faint lines are plain overlaps, reported only.
    """
    one = checkpoints_of(set_stability, run)
    share = training_share(one["step"].values)
    names = ("attainable", "cross", "overlap", "paper_overlap", "chance")
    attainable, cross, plain, paper, chance = (one[name].values.astype(float) for name in names)
    axes.plot(share, attainable, color=MUTED, lw=1.4, ls="--", label="attainable if nothing moved")
    axes.plot(share, cross, color=colour, marker="o", ms=4.5, clip_on=False, label="across prompt halves")
    axes.plot(share, plain, color=colour, lw=1.2, alpha=0.45, label="plain (reported only)")
    axes.plot(share, paper, color=colour, lw=1.2, alpha=0.45, ls="-.", label="paper's rule (reported only)")
    axes.plot(share, chance, color=NULL, lw=1.2, ls=":", label="chance")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="share of training", ylabel="overlap with the final set")
    axes.set_title(run, pad=8, color=colour)
    quiet(axes, grid="y")
    percent_axis(axes.xaxis)
    percent_axis(axes.yaxis)
    legend_below(axes, 2)
    return axes


def plot_turnover(set_stability: xr.Dataset, axes: Axes, *, run: str, colour: str = VIOLET) -> Axes:
    """Excess turnover of a run's top set with its interval, over the zone that counts as the same set.

    Parameters
    ----------
    set_stability
        Results group ``set_stability``.
    axes
        Axes to draw on.
    run
        Name of the run.
    colour
        Colour of its dots.

    Returns
    -------
    Axes
        ``axes``.
    """
    one = _compared(checkpoints_of(set_stability, run))
    share = training_share(one["step"].values)
    axes.axhspan(-1, DELTA_TOLERANCE, color=RULE, alpha=0.25, linewidth=0)
    axes.axhline(0, color=MUTED, lw=0.9)
    axes.vlines(share, one["delta_low"].values, one["delta_high"].values, color=colour, lw=1.6)
    axes.plot(share, one["delta"].values, "o", color=colour, ms=4.5, clip_on=False)
    low, high = _turnover_span(set_stability)
    axes.set(xlim=(0, 1), ylim=(low, high), xlabel="share of training", ylabel="excess turnover Δ")
    axes.set_title(run, pad=8, color=colour)
    quiet(axes, grid="y")
    percent_axis(axes.xaxis)
    percent_axis(axes.yaxis)
    return axes


def _compared(one: xr.Dataset) -> xr.Dataset:
    """Checkpoints at which two halves of the prompts could agree on a set; elsewhere its turnover says nothing."""
    return one.isel(model=one["attainable"].values >= MIN_CEILING)


def _turnover_span(data: xr.Dataset) -> tuple[float, float]:
    """Limits that hold the intervals of all runs and the zone of no turnover."""
    ends = np.concatenate([data["delta_low"].values, data["delta_high"].values, [0.0, 1.6 * DELTA_TOLERANCE]])
    ends = ends[np.isfinite(ends)]
    return min(float(ends.min()) - 0.03, -0.05), float(ends.max()) + 0.03


def set_stability(results: Results, spec: StudySpec) -> Graphic:
    """Top set: overlap with the final set between what is attainable and chance, and the excess turnover."""
    data = needed(results, "set_stability")
    runs, colours = _runs(data, spec), run_colours(spec)
    overlaps, turnovers = [], []
    for run, one, _ in runs:
        compared = _compared(one)
        turnover = zip(compared["delta"].values, training_share(compared["step"].values), strict=True)
        shown = ", ".join(f"{fixed(100 * d)}% at {percent(x, 0)}" for d, x in turnover) or "compared nowhere"
        overlap = f"Overlap of {run}'s top set with the final one, along training."
        overlaps.append(
            panel(
                partial(plot_overlap, data, run=run, colour=colours[run]),
                HALF,
                3.2,
                title=f"The top set of {run}",
                alt=overlap,
            )
        )
        alt = f"Change of the top set beyond sampling noise. {run}: excess turnover {shown}."
        turnovers.append(
            panel(
                partial(plot_turnover, data, run=run, colour=colours[run]),
                HALF,
                2.3,
                title=f"Excess turnover of {run}",
                alt=alt,
            )
        )
    return Graphic(
        "set-stability",
        "The top set through training",
        (*overlaps, *turnovers),
        f"Above: how much of the top-{data.attrs.get('top_k', 'k')} set is shared with the final one. Two "
        "halves of the prompts do not even agree on one and the same model, so only the gap below the overlap that is "
        "attainable with an unchanged ranking and this checkpoint's effect sizes is change. Below: that gap, the "
        "excess turnover Δ, with its interval; values in the shaded zone count as the same set, and checkpoints are "
        f"left out at which two halves could agree on less than {percent(MIN_CEILING, 0)} of a set. The paper's rule "
        "ranks by model-specificity and takes no noise off.",
    )
