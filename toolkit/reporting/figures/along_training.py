"""Figures along training: when features stabilise, and the top set against the overlap that noise allows."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from rlgen_stats.schemas.errors import NotEstimableError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.figures.figure_inputs import needed, run_colours, run_markers
from rlgen_stats.toolkit.reporting.figures.plotting import (
    MUTED,
    NULL,
    RULE,
    Graphic,
    canvas,
    percent_axis,
    quiet,
    to_svg,
)
from rlgen_stats.toolkit.reporting.formatting import fixed, percent
from rlgen_stats.toolkit.reporting.result_lookup import Results, attr_number
from rlgen_stats.toolkit.statistics.timing.run_contrast import checkpoints_of, training_share
from rlgen_stats.toolkit.statistics.timing.set_stability import DELTA_TOLERANCE


def _runs(data: xr.Dataset, spec: StudySpec) -> list[tuple[str, xr.Dataset, np.ndarray]]:
    """Run, its checkpoints by step, and their share of training, for the contrasted runs that the data has."""
    checkpoints = {run.name: checkpoints_of(data, run.name) for run in spec.contrasted}
    checkpoints = {name: one for name, one in checkpoints.items() if one.sizes["model"]}
    if not checkpoints:
        raise NotEstimableError("no checkpoint of either contrasted run was analysed")
    return [(name, one, training_share(one["step"].values)) for name, one in checkpoints.items()]


def stabilization(results: Results, spec: StudySpec) -> Graphic:
    """Share of testable features expected to have stabilised, along training, with band."""
    data = needed(results, "stabilization")
    colours, markers, descriptions = run_colours(spec), run_markers(spec), []
    with canvas(7.4, 3.0) as (figure, grid):
        axes = grid[0, 0]
        for run, one, share in _runs(data, spec):
            stabilised, low, high = (one[f"share{end}"].values.astype(float) for end in ("", "_low", "_high"))
            axes.fill_between(share, low, high, color=colours[run], alpha=0.16, linewidth=0, step=None)
            axes.plot(share, stabilised, color=colours[run], marker=markers[run], ms=4.5, label=run, clip_on=False)
            descriptions.append(
                run
                + ": "
                + ", ".join(
                    f"{percent(s, 0)} by {percent(x, 0)} of training" for s, x in zip(stabilised, share, strict=True)
                )
            )
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="share of training", ylabel="testable features that are stable")
        percent_axis(axes.xaxis)
        percent_axis(axes.yaxis)
        quiet(axes, grid="y")
        axes.legend(loc="upper left", handlelength=1.4)
        alt = "Share of features stabilised along training. " + "; ".join(descriptions) + "."
        svg = to_svg(figure, title="When features stabilise", alt=alt)
    margin, unit = data.attrs.get("margin", "?"), data.attrs.get("margin_unit", "")
    persist = percent(attr_number(data, "persist"), 0)
    return Graphic(
        "stabilization",
        "When features stabilise",
        svg,
        alt,
        f"A feature is stable from the checkpoint on from which its mean stays within {margin} ({unit}) of its final "
        f"one; being within it only over the last {persist} of the checkpoints does not count. Shown is the share "
        "expected over bootstrap draws of the prompts, with its band. What never left the margin is stable throughout, "
        "so that a run that changes fewer features lies higher: C2 compares features that changed as far.",
    )


def _overlap_panel(axes: Any, one: xr.Dataset, share: np.ndarray, colour: str) -> None:
    """Overlap across halves between what is attainable and chance; plain overlaps, reported only, faint."""
    names = ("attainable", "cross", "overlap", "paper_overlap", "chance")
    attainable, cross, plain, paper, chance = (one[name].values.astype(float) for name in names)
    axes.plot(share, attainable, color=MUTED, lw=1.4, ls="--", label="attainable if nothing moved")
    axes.plot(share, cross, color=colour, marker="o", ms=4.5, clip_on=False, label="overlap across prompt halves")
    axes.plot(share, plain, color=colour, lw=1.2, alpha=0.45, label="plain overlap (reported only)")
    axes.plot(share, paper, color=colour, lw=1.2, alpha=0.45, ls="-.", label="the paper's rule (reported only)")
    axes.plot(share, chance, color=NULL, lw=1.2, ls=":", label="chance")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    quiet(axes, grid="y")
    percent_axis(axes.yaxis)


def _turnover_panel(axes: Any, one: xr.Dataset, share: np.ndarray, colour: str) -> None:
    """Excess turnover with its interval over the zone that counts as the same set."""
    axes.axhspan(-1, DELTA_TOLERANCE, color=RULE, alpha=0.25, linewidth=0)
    axes.axhline(0, color=MUTED, lw=0.9)
    axes.vlines(share, one["delta_low"].values, one["delta_high"].values, color=colour, lw=1.6)
    axes.plot(share, one["delta"].values, "o", color=colour, ms=4.5, clip_on=False)
    axes.set_xlabel("share of training")
    quiet(axes, grid="y")
    percent_axis(axes.xaxis)
    percent_axis(axes.yaxis)


def set_stability(results: Results, spec: StudySpec) -> Graphic:
    """Top set: overlap with the final set between what is attainable and chance, and the excess turnover."""
    data = needed(results, "set_stability")
    runs, colours, descriptions = _runs(data, spec), run_colours(spec), []
    shape = {
        "nrows": 2,
        "ncols": len(runs),
        "sharex": True,
        "sharey": "row",
        "gridspec_kw": {"height_ratios": [1.35, 1]},
    }
    with canvas(7.4, 4.9, **shape) as (figure, grid):
        for column, (run, one, share) in enumerate(runs):
            _overlap_panel(grid[0, column], one, share, colours[run])
            _turnover_panel(grid[1, column], one, share, colours[run])
            grid[0, column].set_title(run, pad=8, color=colours[run])
            turnover = zip(one["delta"].values, share, strict=True)
            descriptions.append(
                f"{run}: excess turnover " + ", ".join(f"{fixed(100 * d)}% at {percent(x, 0)}" for d, x in turnover)
            )
        lows = np.concatenate([one["delta_low"].values.astype(float) for _, one, _ in runs])
        highs = np.concatenate([one["delta_high"].values.astype(float) for _, one, _ in runs])
        finite = np.concatenate([lows[np.isfinite(lows)], highs[np.isfinite(highs)], [0.0, 1.6 * DELTA_TOLERANCE]])
        grid[1, 0].set_ylim(min(finite.min() - 0.03, -0.05), finite.max() + 0.03)
        grid[0, 0].set_ylabel("overlap with the final set")
        grid[1, 0].set_ylabel("excess turnover Δ")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, handlelength=1.8, columnspacing=1.4)
        alt = "Change of the top set beyond sampling noise. " + "; ".join(descriptions) + "."
        svg = to_svg(figure, title="The top set through training", alt=alt)
    return Graphic(
        "set-stability",
        "The top set through training",
        svg,
        alt,
        f"Above: how much of the top-{data.attrs.get('top_k', 'k')} set is shared with the final one. Two "
        "halves of the prompts do not even agree on one and the same model, so only the gap below the overlap that is "
        "attainable with an unchanged ranking and this checkpoint's effect sizes is change. Below: that gap, the "
        "excess turnover Δ, with its interval; values in the shaded zone count as the same set. The paper's rule "
        "ranks by model-specificity and takes no noise off.",
    )
