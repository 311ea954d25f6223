"""Figures of the dictionary: specific features, movement, and the features that tasks share."""

from __future__ import annotations

from collections import Counter
from itertools import cycle
from typing import Any, Final

import numpy as np
import xarray as xr

from rlgen_stats.schemas.dims import BASE_MODEL, split_model_id
from rlgen_stats.schemas.errors import NotEstimableError
from rlgen_stats.schemas.null_views import floor_name, floor_run_name
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.claims.c3_selection import scored_tasks
from rlgen_stats.toolkit.reporting.figures.figure_inputs import needed, run_colours, run_markers
from rlgen_stats.toolkit.reporting.figures.plotting import (
    INK,
    MUTED,
    NULL,
    PALE,
    VIOLET,
    Graphic,
    canvas,
    percent_axis,
    quiet,
    to_svg,
)
from rlgen_stats.toolkit.reporting.formatting import compact, percent
from rlgen_stats.toolkit.reporting.result_lookup import (
    Results,
    crosscoder_label,
    final_models,
    labels_of,
    nearest_label,
    number,
    text,
)
from rlgen_stats.toolkit.statistics.timing.run_contrast import checkpoints_of, training_share

MAX_PATTERNS: Final = 14
"""Most combinations of tasks drawn; the rarest are left out and counted in the caption."""

_FLOOR_STYLES: Final = ("--", "-.", ":")
"""Lines of the floors, one of base against itself each."""


def specificity(results: Results, spec: StudySpec) -> Graphic:
    """NRN distributions of the pairwise crosscoders with the null, and MAS of the three-view crosscoder."""
    data = needed(results, "attribution")
    tau, colours = spec.statistics.tau, run_colours(spec)
    pairs = {run.name: crosscoder_label(data, run.name) for run in spec.contrasted}
    curves = [(run, label, colours[run], "-") for run, label in pairs.items() if label is not None]
    floors, floor_runs = dict[str, str](), {run.name for run in spec.runs if run.is_floor}
    for label in labels_of(data, "crosscoder"):
        target = text(data, "target", crosscoder=label)
        floor = floor_run_name(target) if split_model_id(target)[0] in floor_runs else floor_name(target)
        if floor is not None:
            floors.setdefault(floor, label)  # the first of its dictionaries
    curves += [(floor, label, NULL, style) for (floor, label), style in zip(floors.items(), cycle(_FLOOR_STYLES))]
    if not curves:
        raise NotEstimableError("there is no pairwise crosscoder of either run")
    with canvas(7.4, 3.2, ncols=2, sharey=False) as (figure, grid):
        left, right = grid[0]
        descriptions = []
        for run, label, colour, style in curves:
            one = data.sel(crosscoder=label)
            nrn = one["nrn_l1"].values[one["alive"].values.astype(bool)]
            nrn = nrn[np.isfinite(nrn)]
            _exceeding(left, nrn, colour, style, run)
            descriptions.append(
                f"{run}: {percent(float(np.mean(nrn > tau)) if nrn.size else np.nan)} of {nrn.size} alive"
            )
        left.axvline(tau, color=INK, lw=0.9, ls=":")
        left.annotate(
            f"τ = {tau:g}",
            (tau, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -2),
            textcoords="offset points",
            va="top",
            fontsize=8.5,
        )
        left.set_title("NRN, pairwise crosscoders", pad=8)
        left.set(xlabel="share of the decoder norm in the trained model", ylabel="alive features above that share")
        _mas(right, data, spec)
        for axes in (left, right):
            axes.set_yscale("log")
            axes.set_ylim(top=1.15)
            axes.set_xlim(0, 1)
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
            quiet(axes, grid="y")
            if axes.get_legend_handles_labels()[1]:
                axes.legend(loc="lower left", handlelength=1.6)
        alt = f"Share of features with NRN above {tau:g}. " + "; ".join(descriptions) + "."
        svg = to_svg(figure, title="Model-specific features", alt=alt)
    return Graphic(
        "specificity",
        "Model-specific features",
        svg,
        alt,
        "Left: how much of each feature's decoder norm (L1) belongs to the trained model; 0.5 is shared. A curve's "
        "height at τ is the share of features that count as specific. Grey: the same measurement on base against "
        "itself, and on floor runs. Right: the same for each model's share (MAS) in the three-model crosscoder; one "
        "third is shared.",
    )


def _exceeding(axes: Any, values: np.ndarray, colour: str, style: str, label: str) -> None:
    """Share of values above x, a step at every value."""
    if values.size < 2:
        return
    ordered = np.sort(values)
    above = np.arange(ordered.size - 1, -1, -1) / max(ordered.size, 1)
    axes.stairs(above[:-1], ordered, color=colour, lw=1.7, ls=style, label=label, baseline=None)


def _mas(axes: Any, data: xr.Dataset, spec: StudySpec) -> None:
    axes.set_title("MAS, three-model crosscoder", pad=8)
    axes.set_xlabel("share of the decoder norm in this model")
    names, colours = labels_of(data, "mas_crosscoder"), run_colours(spec)
    if not names:
        axes.text(0.5, 0.5, "not computed", transform=axes.transAxes, ha="center", color=MUTED)
        return
    name = spec.primary_crosscoder.name if spec.primary_crosscoder.name in names else names[0]
    for view in labels_of(data, "view"):
        values = data["mas_l1"].sel(mas_crosscoder=name, view=view).values
        values = values[np.isfinite(values)]
        run = "base" if view == BASE_MODEL else split_model_id(view)[0]
        if values.size:
            _exceeding(axes, values, colours.get(run, MUTED), "-", run)


def matched_drift(results: Results, spec: StudySpec) -> Graphic:
    """Specific features against how far each model moved, beside the movement of all checkpoints."""
    contrast, movement = results.get("attribution_contrast"), needed(results, "movement")
    finals, tau = final_models(spec, movement), nearest_label(contrast, "tau", spec.statistics.tau)
    colours, markers, descriptions = run_colours(spec), run_markers(spec), []
    with canvas(7.4, 3.1, ncols=2) as (figure, grid):
        left, right = grid[0]
        for run, arm in zip(spec.contrasted, ("sft", "rl"), strict=True):
            one = checkpoints_of(movement, run.name)
            if not one.sizes["model"]:
                continue
            shift = one["activation_shift"].values.astype(float)
            share = training_share(one["step"].values)
            left.plot(
                [0, *share],
                [0, *shift],
                color=colours[run.name],
                marker=markers[run.name],
                ms=4.5,
                label=run.name,
                clip_on=False,
            )
            last = number(movement, "activation_shift", model=finals[run.name])
            at = {"tau": tau, "comparison": "final"}
            tail = number(contrast, f"tail_{arm}", **at)
            low, high = (number(contrast, f"tail_{arm}_{end}", **at) for end in ("low", "high"))
            if np.isfinite(low) and np.isfinite(high):
                right.plot([last] * 2, [low, high], color=colours[run.name], lw=1.6, solid_capstyle="butt")
            right.plot(last, tail, markers[run.name], color=colours[run.name], ms=7, label=run.name, clip_on=False)
            descriptions.append(f"{run.name}: shift {compact(last)}, {percent(tail)} specific")
        null = number(contrast, "tail_null", tau=tau, comparison="final")
        if np.isfinite(null):
            right.axhline(null, color=NULL, ls="--", lw=1.3, label="largest null floor")
        left.set_title("How far each run moved", pad=8)
        left.set(xlabel="share of training", ylabel="relative activation shift", xlim=(0, 1))
        percent_axis(left.xaxis)
        right.set_title("Specific features at that distance", pad=8)
        right.set(xlabel="relative activation shift of the final model", ylabel="alive features with NRN > τ")
        right.set_xlim(0, 1.12 * right.get_xlim()[1])
        right.set_ylim(bottom=0)
        left.set_ylim(bottom=0)
        percent_axis(right.yaxis)
        for axes in (left, right):
            quiet(axes, grid="y")
            axes.legend(loc="best", handlelength=1.4)
        alt = "Specific features against activation shift. " + "; ".join(descriptions) + "."
        svg = to_svg(figure, title="Specific features against movement", alt=alt)
    return Graphic(
        "matched-drift",
        "Specific features against movement",
        svg,
        alt,
        "Counts of specific features grow with how far a model moved. Only points at about the same shift "
        "compare the kind of training rather than its amount. Right: the horizontal distance of the points is the "
        "mismatch. Left: the range of shifts that both runs cover.",
    )


def _pattern(bars: Any, dots: Any, x: int, pattern: tuple[bool, ...], n: int, n_confirmed: int) -> None:
    """One combination of tasks: its bar and its column of dots."""
    bars.bar(x, n, width=0.62, color=VIOLET if all(pattern) else NULL)
    label = f"{n}" + (f" ({n_confirmed} ✓)" if n_confirmed else "")
    bars.annotate(label, (x, n), (0, 2), textcoords="offset points", ha="center", fontsize=8, color=INK)
    rows = np.flatnonzero(pattern)
    dots.plot([x, x], [rows.min(), rows.max()], color=INK, lw=1.6, zorder=2)
    dots.scatter([x] * len(pattern), range(len(pattern)), s=38, color=PALE, linewidths=0, zorder=1)
    dots.scatter([x] * len(rows), rows, s=38, color=INK, linewidths=0, zorder=3)


def task_intersection(results: Results, spec: StudySpec) -> Graphic:
    """Which combinations of tasks keep the same features: bars over a dot matrix."""
    data = needed(results, "selection")
    tasks = scored_tasks(data)
    if not tasks:
        raise NotEstimableError("no selection task has enough prompts that base got wrong and RL right")
    kept = data["kept"].sel(task=tasks).values.astype(bool)
    patterns = Counter(tuple(bool(v) for v in column) for column in kept.T if column.any())
    if not patterns:
        raise NotEstimableError("the paper's rule keeps no feature in any task")
    ranked = sorted(patterns.items(), key=lambda item: (-sum(item[0]), -item[1], item[0]))
    if len(ranked) > MAX_PATTERNS:
        most = {pattern for pattern, _ in patterns.most_common(MAX_PATTERNS - 1)} | {ranked[0][0]}
        ranked = [item for item in ranked if item[0] in most]
    confirmed = np.isin(data["tier"].values, ["CONFIRMED"])
    ratio = {"height_ratios": [1.5, max(0.28 * len(tasks), 0.6)]}
    with canvas(7.4, 2.2 + 0.27 * len(tasks), nrows=2, sharex=True, gridspec_kw=ratio) as (figure, grid):
        bars, dots = grid[0, 0], grid[1, 0]
        for x, (pattern, n) in enumerate(ranked):
            same = (kept == np.array(pattern)[:, None]).all(axis=0)
            _pattern(bars, dots, x, pattern, n, int((same & confirmed).sum()))
        bars.set_ylabel("features kept")
        bars.set_ylim(0, 1.15 * max(n for _, n in ranked))
        quiet(bars, grid="y")
        dots.set_yticks(range(len(tasks)), tasks)
        dots.set_ylim(len(tasks) - 0.5, -0.5)
        dots.set_xlim(-0.6, max(len(ranked), 6) - 0.4)
        dots.set_xticks([])
        dots.tick_params(length=0)
        for side in ("left", "bottom"):
            dots.spines[side].set_visible(False)
        in_all = patterns.get((True,) * len(tasks), 0)
        alt = (
            f"Features kept by the paper's rule, by the tasks that keep them: {in_all} in all {len(tasks)} tasks, "
            f"{sum(n for p, n in patterns.items() if sum(p) == 1)} in one only."
        )
        svg = to_svg(figure, title="Which tasks share the selected features", alt=alt)
    dropped = len(patterns) - len(ranked)
    more = f" {dropped} rarer combinations are not drawn." if dropped else ""
    return Graphic(
        "intersection",
        "Which tasks share the selected features",
        svg,
        alt,
        "Each column is a combination of tasks (filled dots) and the number of features that the paper's "
        "rule keeps in exactly these; coloured: in all tasks. In brackets: confirmed on verification "
        f"prompts.{more}",
    )
