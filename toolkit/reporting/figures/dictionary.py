"""Figures of the dictionary: specific features, movement, and the features that tasks share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import Final

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from rlgen_stats.schemas.dims import BASE_RUN, split_model_id
from rlgen_stats.schemas.errors import NotEstimableError
from rlgen_stats.schemas.null_views import floor_name, floor_run_name
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.claims.c3_selection import scored_tasks
from rlgen_stats.toolkit.reporting.figures.figure_inputs import needed, run_colours, styles_of
from rlgen_stats.toolkit.reporting.figures.overview import counted_by, plot_movement
from rlgen_stats.toolkit.reporting.figures.plotting import (
    HALF,
    INK,
    MUTED,
    NULL,
    RL,
    SFT,
    SINGLE,
    VIOLET,
    Graphic,
    panel,
    percent_axis,
    quiet,
)
from rlgen_stats.toolkit.reporting.formatting import compact, listed, percent
from rlgen_stats.toolkit.reporting.result_lookup import (
    Results,
    crosscoder_label,
    final_models,
    labels_of,
    nearest_label,
    number,
    text,
)

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
    shown = []
    for run, label, *_ in curves:
        nrn = _finite_nrn(data, label)
        shown.append(f"{run}: {percent(float(np.mean(nrn > tau)) if nrn.size else np.nan)} of {nrn.size} alive")
    names = labels_of(data, "mas_crosscoder")
    mas = spec.primary_crosscoder.name if spec.primary_crosscoder.name in names else next(iter(names), None)
    draw = partial(plot_specificity, data, tau=tau, curves=curves)
    alt = f"Share of features with NRN above {tau:g}, one dictionary a run. {'; '.join(shown)}."
    panels = [panel(draw, HALF, 3.2, title="Model-specific features, pairwise crosscoders", alt=alt)]
    if mas is not None:
        draw_mas = partial(plot_model_shares, data, crosscoder=mas, runs=[run.name for run in spec.contrasted])
        words = "Share of the decoder norm in each model of the three-model crosscoder."
        panels.append(panel(draw_mas, HALF, 3.2, title="Model-specific features, three-model crosscoder", alt=words))
    return Graphic(
        "specificity",
        "Model-specific features",
        tuple(panels),
        "By decoder norms alone. First: how much of each feature's decoder norm (L1) belongs to the trained model; 0.5 "
        "is shared. A curve's height at τ is the share of features that count as specific, in one dictionary of base "
        "and a run's last model that has one (claim C1 rests on every dictionary, and on earlier models at equal "
        "distance). Grey: the same measurement on base against itself, and on floor runs. Second: the same for each "
        "model's share (MAS) in the three-model crosscoder; one third is shared.",
    )


def _finite_nrn(data: xr.Dataset, crosscoder: str) -> np.ndarray:
    one = data.sel(crosscoder=crosscoder)
    nrn = one["nrn_l1"].values[one["alive"].values.astype(bool)]
    return np.asarray(nrn[np.isfinite(nrn)])


def plot_specificity(
    attribution: xr.Dataset,
    axes: Axes,
    *,
    tau: float = 0.7,
    curves: Sequence[tuple[str, str, str, str]] | None = None,
) -> Axes:
    """Share of alive features whose decoder norm belongs to the trained model by more than x, one curve a dictionary.

    Parameters
    ----------
    attribution
        Results group ``attribution``.
    axes
        Axes to draw on.
    tau
        Level from which a feature counts as specific.
    curves
        Label, dictionary, colour and line style of each curve; default every pairwise dictionary.

    Returns
    -------
    Axes
        ``axes``; y is logarithmic.
    """
    if curves is None:
        looks = cycle((SFT, RL, NULL, VIOLET))
        curves = [(name, name, next(looks), "-") for name in labels_of(attribution, "crosscoder")]
    for label, crosscoder, colour, style in curves:
        _exceeding(axes, _finite_nrn(attribution, crosscoder), colour, style, label)
    axes.axvline(tau, color=INK, lw=0.9, ls=":")
    axes.annotate(
        f"τ = {tau:g}",
        (tau, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -2),
        textcoords="offset points",
        va="top",
        fontsize=8.5,
    )
    axes.set_title("NRN, pairwise crosscoders", pad=8)
    axes.set(xlabel="share of the decoder norm in the trained model", ylabel="alive features above that share")
    return _exceedance(axes)


def plot_model_shares(
    attribution: xr.Dataset, axes: Axes, *, crosscoder: str, runs: Sequence[str] | None = None
) -> Axes:
    """Share of features whose decoder norm belongs to each model of a crosscoder of three by more than x.

    Parameters
    ----------
    attribution
        Results group ``attribution``.
    axes
        Axes to draw on.
    crosscoder
        Label on ``mas_crosscoder``.
    runs
        Runs in the order of their colours; default as in the views.

    Returns
    -------
    Axes
        ``axes``; y is logarithmic.
    """
    views = [split_model_id(view)[0] for view in labels_of(attribution, "view")]
    styles = styles_of(attribution, runs or [run for run in dict.fromkeys(views) if run != BASE_RUN])
    for view, run in zip(labels_of(attribution, "view"), views, strict=True):
        values = attribution["mas_l1"].sel(mas_crosscoder=crosscoder, view=view).values
        values = values[np.isfinite(values)]
        if values.size:
            _exceeding(axes, values, styles.get(run, (MUTED, ""))[0], "-", run)
    axes.set_title("MAS, three-model crosscoder", pad=8)
    axes.set(xlabel="share of the decoder norm in this model", ylabel="alive features above that share")
    return _exceedance(axes)


def _exceedance(axes: Axes) -> Axes:
    axes.set_yscale("log")
    axes.set_ylim(top=1.15)
    axes.set_xlim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    quiet(axes, grid="y")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower left", handlelength=1.6)
    return axes


def _exceeding(axes: Axes, values: np.ndarray, colour: str, style: str, label: str) -> None:
    """Share of values above x, a step at every value."""
    if values.size < 2:
        return
    ordered = np.sort(values)
    above = np.arange(ordered.size - 1, -1, -1) / max(ordered.size, 1)
    axes.stairs(above[:-1], ordered, color=colour, lw=1.7, ls=style, label=label, baseline=None)


def matched_drift(results: Results, spec: StudySpec) -> Graphic:
    """Specific features against how far each model moved, beside the movement of all checkpoints."""
    contrast, movement = results.get("attribution_contrast"), needed(results, "movement")
    finals, tau = final_models(spec, movement), nearest_label(contrast, "tau", spec.statistics.tau)
    runs = [run.name for run in spec.contrasted if run.name in finals]
    shifts = {run: number(movement, "activation_shift", model=finals[run]) for run in runs}
    at, prefix = {"tau": tau, "comparison": "final"}, counted_by(contrast)
    tails = [number(contrast, f"{prefix}tail_{arm}", **at) for arm in ("sft", "rl")]
    shown = [
        f"{run}: shift {compact(shifts[run])}, {percent(tail)} specific" for run, tail in zip(runs, tails, strict=False)
    ]
    moved = f"Activation shift of {listed(runs)} along training."
    panels = [panel(partial(plot_movement, movement, runs=runs), HALF, 3.1, title="How far each run moved", alt=moved)]
    if contrast is not None:
        draw = partial(plot_specific_at_distance, contrast, shifts=shifts, tau=tau)
        alt = f"Specific features against activation shift. {'; '.join(shown)}."
        panels.append(panel(draw, HALF, 3.1, title="Specific features at that distance", alt=alt))
    return Graphic(
        "matched-drift",
        "Specific features against movement",
        tuple(panels),
        "Specific: NRN above τ, and by latent scaling too where that was done. Their number grows with how far a model "
        "moved. Only points at about the same shift compare the kind of training rather than its amount. Second: the "
        "horizontal distance of the points is the "
        "mismatch. First: the range of shifts that both runs cover.",
    )


def plot_specific_at_distance(
    contrast: xr.Dataset, axes: Axes, *, shifts: Mapping[str, float], tau: float = 0.7
) -> Axes:
    """Share of features with NRN > tau of both final models, against how far these are from base.

    Parameters
    ----------
    contrast
        Results group ``attribution_contrast``.
    axes
        Axes to draw on.
    shifts
        Relative activation shift of the SFT run's and the RL run's final model, by run, in this order.
    tau
        Level of NRN; the nearest one computed is drawn.

    Returns
    -------
    Axes
        ``axes``; dashed: the largest share of base against itself.
    """
    at = {"tau": nearest_label(contrast, "tau", tau), "comparison": "final"}
    styles, prefix = styles_of(contrast, list(shifts)), counted_by(contrast)
    for (run, shift), arm in zip(shifts.items(), ("sft", "rl"), strict=False):
        colour, marker = styles[run]
        low, high = (number(contrast, f"{prefix}tail_{arm}_{end}", **at) for end in ("low", "high"))
        if np.isfinite(low) and np.isfinite(high):
            axes.plot([shift] * 2, [low, high], color=colour, lw=1.6, solid_capstyle="butt")
        share = number(contrast, f"{prefix}tail_{arm}", **at)
        axes.plot(shift, share, marker, color=colour, ms=7, label=run, clip_on=False)
    null = number(contrast, f"{prefix}tail_null", **at)
    if np.isfinite(null):
        axes.axhline(null, color=NULL, ls="--", lw=1.3, label="largest null floor")
    axes.set_title("Specific features at that distance", pad=8)
    axes.set(xlabel="relative activation shift of the final model", ylabel="alive features that are specific")
    axes.set_xlim(0, 1.12 * axes.get_xlim()[1])
    axes.set_ylim(bottom=0)
    percent_axis(axes.yaxis)
    quiet(axes, grid="y")
    axes.legend(loc="best", handlelength=1.4)
    return axes


def _patterns(
    selection: xr.Dataset,
) -> tuple[list[str], list[tuple[tuple[bool, ...], int, int]], Counter[tuple[bool, ...]]]:
    """Tasks; combinations drawn: which tasks, how many features, how many of these rise; features of all."""
    tasks = scored_tasks(selection)
    kept = selection["kept"].sel(task=tasks).values.astype(bool)
    patterns = Counter(tuple(bool(v) for v in column) for column in kept.T if column.any())
    ranked = sorted(patterns.items(), key=lambda item: (-sum(item[0]), -item[1], item[0]))
    if len(ranked) > MAX_PATTERNS:
        most = {pattern for pattern, _ in patterns.most_common(MAX_PATTERNS - 1)} | {ranked[0][0]}
        ranked = [item for item in ranked if item[0] in most]
    confirmed = np.isin(selection["tier"].values, ["CONFIRMED"])
    rows = [
        (pattern, n, int(((kept == np.array(pattern)[:, None]).all(axis=0) & confirmed).sum())) for pattern, n in ranked
    ]
    return tasks, rows, patterns


def task_intersection(results: Results, spec: StudySpec) -> Graphic:
    """Which combinations of tasks keep the same features."""
    data = needed(results, "selection")
    if not scored_tasks(data):
        raise NotEstimableError("no selection task has enough prompts that base got wrong and RL right")
    tasks, rows, patterns = _patterns(data)
    if not rows:
        raise NotEstimableError("the paper's rule keeps no feature in any task")
    in_all = sum(n for pattern, n in patterns.items() if all(pattern))
    in_one = sum(n for pattern, n in patterns.items() if sum(pattern) == 1)
    dropped = len(patterns) - len(rows)
    alt = (
        f"Features kept by the paper's rule, by the tasks that keep them: {in_all} in all {len(tasks)} tasks, {in_one} "
        "in one only."
    )
    more = f" {dropped} rarer combinations are not drawn." if dropped else ""
    return Graphic(
        "intersection",
        "Which tasks share the selected features",
        (
            panel(
                partial(plot_task_intersection, data),
                SINGLE,
                0.8 + 0.3 * max(len(rows), 2),
                title="Which tasks share the selected features",
                alt=alt,
            ),
        ),
        "Each bar is a combination of tasks and the number of features that the paper's rule keeps in exactly these; "
        f"coloured: in all tasks. In brackets: shown to rise on verification prompts.{more}",
    )


def plot_task_intersection(selection: xr.Dataset, axes: Axes) -> Axes:
    """Number of features that the paper's rule keeps in exactly one combination of tasks, a bar each.

    Parameters
    ----------
    selection
        Results group ``selection``.
    axes
        Axes to draw on.

    Returns
    -------
    Axes
        ``axes``; the ``MAX_PATTERNS`` largest combinations, those of most tasks first.
    """
    tasks, rows, _ = _patterns(selection)
    for y, (pattern, n, n_confirmed) in enumerate(rows):
        axes.barh(y, n, height=0.62, color=VIOLET if all(pattern) else NULL)
        label = f"{n}" + (f" ({n_confirmed} ✓)" if n_confirmed else "")
        axes.annotate(label, (n, y), (3, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    named = [[task for task, kept in zip(tasks, pattern, strict=True) if kept] for pattern, *_ in rows]
    axes.set_yticks(
        range(len(rows)), [f"all {len(tasks)} tasks" if len(one) == len(tasks) else ", ".join(one) for one in named]
    )
    axes.set_ylim(max(len(rows), 2) - 0.5, -0.5)
    axes.set_xlim(0, 1.2 * max([n for _, n, _ in rows], default=1))
    axes.set_xlabel("features kept")
    quiet(axes)
    return axes
