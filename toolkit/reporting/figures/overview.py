"""The study in six small panels: behaviour, movement, whose features, when, which, and what editing does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from rlgen_stats.schemas.dims import BASE_MODEL, BASE_RUN, stored_model
from rlgen_stats.schemas.errors import NotEstimableError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.arm_rows import CLAIM_OF, arms_of
from rlgen_stats.toolkit.reporting.figures.figure_inputs import contrasted_finals, needed, styles_of
from rlgen_stats.toolkit.reporting.figures.plotting import (
    GOLD,
    INK,
    MUTED,
    NULL,
    VIOLET,
    panel,
    percent_axis,
    quiet,
)
from rlgen_stats.toolkit.reporting.formatting import compact, count_span, fixed, interval, listed, percent
from rlgen_stats.toolkit.reporting.result_lookup import Results, by_dictionary, labels_of, nearest_label, number
from rlgen_stats.toolkit.statistics.specificity.arm_contrast import AGREED
from rlgen_stats.toolkit.statistics.task_accuracy import domain_accuracy
from rlgen_stats.toolkit.statistics.timing.run_contrast import checkpoints_of, training_share

WIDTH, HEIGHT = 2.15, 1.75
"""Size of a panel, inches: legible at a sixth of a wide page and at half of a phone."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One panel of the overview: a question, its answer in numbers, what they are numbers of, and the drawing."""

    name: str
    question: str
    answer: str
    """In words and numbers; why there is none where the analysis is missing."""
    population: str
    """Prompts, decoding, unit, models; empty where nothing is shown."""
    svg: str
    """A whole SVG document; empty where nothing is shown."""
    numbers: dict[str, float]
    """Numbers of claims that the drawing shows, by where report.json has them (``C4.estimate``), in its unit."""


def overview(results: Results, spec: StudySpec, said_of: Mapping[str, str]) -> tuple[Step, ...]:
    """The six steps, each drawn or with the reason why it is not; ``said_of`` are their populations by name."""
    return tuple(_step(name, results, spec, said_of.get(name, "")) for name in STEPS)


@dataclass(frozen=True)
class _Panel:
    """What one step shows."""

    draw: Callable[[Axes], Axes]
    answer: str
    numbers: dict[str, float]


def _step(name: str, results: Results, spec: StudySpec, population: str) -> Step:
    question, build = STEPS[name]
    try:
        shown = build(results, spec)
    except NotEstimableError as error:
        return Step(name=name, question=question, answer=f"Not shown: {error}.", population="", svg="", numbers={})
    svg = panel(shown.draw, WIDTH, HEIGHT, title=question, alt=shown.answer).svg
    return Step(
        name=name, question=question, answer=shown.answer, population=population, svg=svg, numbers=shown.numbers
    )


# -- drawing -----------------------------------------------------------------------------------------------------------
def _dots(axes: Axes, rows: Sequence[tuple[str, str, str, tuple[float, float, float]]]) -> Axes:
    """One line a row from the top: label, colour, marker, and estimate with its interval."""
    for y, (_, colour, marker, (mean, low, high)) in enumerate(rows):
        axes.plot([low, high], [y, y], color=colour, lw=1.8, solid_capstyle="butt", clip_on=False)
        axes.plot(mean, y, marker, color=colour, ms=6, clip_on=False, zorder=3)
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    quiet(axes)
    return axes


def plot_domain_accuracy(behaviour: xr.Dataset, axes: Axes, *, models: Sequence[str], domain: str = "out") -> Axes:
    """Greedy accuracy of models on all tasks of a domain but the negative controls, with intervals.

    Parameters
    ----------
    behaviour
        Results group ``behaviour``.
    axes
        Axes to draw on.
    models
        Model ids, from top to bottom.
    domain
        ``in`` or ``out``.

    Returns
    -------
    Axes
        ``axes``.
    """
    models = [stored_model(model, labels_of(behaviour, "model")) for model in models]
    found = [row for model in models if (row := domain_accuracy(behaviour, model, domain)) is not None]
    styles = styles_of(behaviour, [row.run for row in found if row.run != BASE_RUN])
    _dots(axes, [(row.run, *styles[row.run], (row.accuracy, row.low, row.high)) for row in found])
    axes.set_xlim(0, 1)
    percent_axis(axes.xaxis)
    return axes


def plot_movement(movement: xr.Dataset, axes: Axes, *, runs: Sequence[str] | None = None) -> Axes:
    """How far the checkpoints of runs are from base: relative activation shift along training.

    Parameters
    ----------
    movement
        Results group ``movement``.
    axes
        Axes to draw on.
    runs
        Runs drawn; default all.

    Returns
    -------
    Axes
        ``axes``; x is the share of training, y the shift (||A - A_base|| over the spread of A_base).
    """
    styles = styles_of(movement, runs)
    for run in (run for run in styles if run != BASE_RUN):
        one = checkpoints_of(movement, run)
        if not one.sizes["model"]:
            continue
        colour, marker = styles[run]
        share, shift = training_share(one["step"].values), one["activation_shift"].values.astype(float)
        axes.plot([0, *share], [0, *shift], color=colour, marker=marker, ms=4.5, label=run, clip_on=False)
    axes.set(xlabel="share of training", ylabel="activation shift", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", handlelength=1.2)
    percent_axis(axes.xaxis)
    quiet(axes, grid="y")
    return axes


def plot_specific_shares(
    contrast: xr.Dataset, axes: Axes, *, tau: float = 0.7, runs: Sequence[str] = ("sft", "rl")
) -> Axes:
    """Share of alive features that are specific to either run, with intervals, beside the largest null floor.

    Parameters
    ----------
    contrast
        Results group ``attribution_contrast``.
    axes
        Axes to draw on.
    tau
        Level of NRN; the nearest one computed is drawn.
    runs
        Labels of the two runs compared.

    Returns
    -------
    Axes
        ``axes``.
    """
    at = {"tau": nearest_label(contrast, "tau", tau), "comparison": str(contrast.attrs["decided_by"])}
    prefix = counted_by(contrast)
    rows = []
    for run, arm, style in zip(runs, ("sft", "rl"), list(styles_of(contrast, runs).values())[1:], strict=True):
        share = number(contrast, f"{prefix}tail_{arm}", **at)
        low, high = (number(contrast, f"{prefix}tail_{arm}_{end}", **at) for end in ("low", "high"))
        rows.append((run, *style, (share, low, high)))
    _dots(axes, rows)
    floor = number(contrast, f"{prefix}tail_null", **at)
    if math.isfinite(floor):
        axes.axvline(floor, color=NULL, ls="--", lw=1.4)
        axes.annotate(
            "null floor", (floor, 0.5), (3, 0), textcoords="offset points", va="center", fontsize=8, color=MUTED
        )
    shown = [value for _, _, _, values in rows for value in (*values, floor) if math.isfinite(value)]
    right = 1.6 * max([*shown, 0.01])
    axes.set_xlim(-0.08 * right, right)
    percent_axis(axes.xaxis)
    return axes


def counted_by(contrast: xr.Dataset | None) -> str:
    """Prefix of the variables that C1 rests on: features that latent scaling confirms, where it was done."""
    return AGREED if contrast is not None and f"{AGREED}effect" in contrast else ""


def plot_time_to_stability(timing: xr.Dataset, axes: Axes, *, runs: Sequence[str] | None = None) -> Axes:
    """Mean time to stability of features that changed equally far, by run, with intervals.

    Parameters
    ----------
    timing
        Results group ``timing_contrast``.
    axes
        Axes to draw on.
    runs
        Runs drawn, from top to bottom; default all.

    Returns
    -------
    Axes
        ``axes``; x is the share of training.
    """
    runs = list(runs or labels_of(timing, "trained_run"))
    rows = []
    styles = styles_of(timing, runs)
    for run in runs:
        at = {"measure": "time", "trained_run": run}
        mean, low, high = (number(timing, f"value{end}", **at) for end in ("", "_low", "_high"))
        rows.append((run, *styles[run], (mean, low, high)))
    _dots(axes, rows)
    axes.set_xlim(0, 1.25 * max([value for row in rows for value in row[3] if math.isfinite(value)] or [1.0]))
    percent_axis(axes.xaxis)
    axes.set_xlabel("share of training")
    return axes


_COUNTS: Final = ("n_testable", "n_rising", "n_selected", "n_confirmed")
_COUNT_LABELS: Final = ("testable", "rise", "edited", "confirmed")


def selection_counts(selections: Sequence[xr.Dataset]) -> dict[str, list[int]]:
    """Features testable, confirmed to rise where RL gained, edited, and confirmed for C3, in each dictionary."""
    masks: dict[str, Callable[[xr.Dataset], Any]] = {
        "n_testable": lambda data: np.isfinite(data["specific_p"].values),
        "n_rising": lambda data: data["tier"].values == "CONFIRMED",
        "n_selected": lambda data: data["selected"].values.astype(bool),
        "n_confirmed": lambda data: data["specific_tier"].values == "CONFIRMED",
    }
    return {name: [int(mask(data).sum()) for data in selections] for name, mask in masks.items()}


def plot_selection_counts(selection: xr.Dataset | Sequence[xr.Dataset], axes: Axes) -> Axes:
    """How many features are testable, rise where RL gained, are edited, and rise by more than where base was right.

    Parameters
    ----------
    selection
        Results group ``selection``, or that of each dictionary.
    axes
        Axes to draw on.

    Returns
    -------
    Axes
        ``axes``; a bar is the mean, a dot a dictionary.
    """
    each = [selection] if isinstance(selection, xr.Dataset) else list(selection)
    counts = selection_counts(each)
    for y, name in enumerate(_COUNTS):
        axes.barh(y, np.mean(counts[name]), height=0.55, color=VIOLET, alpha=0.45, linewidth=0)
        axes.plot(counts[name], [y] * len(each), "o", color=VIOLET, ms=3.5, clip_on=False)
    axes.set_xscale("symlog", linthresh=1)
    largest = max(1, *counts["n_testable"])
    ticks = [0, *(10**power for power in range(int(math.log10(largest)) + 1))]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.minorticks_off()
    axes.set_xlim(0, 2 * largest)
    axes.set_yticks(range(len(_COUNTS)), _COUNT_LABELS)
    axes.set_ylim(len(_COUNTS) - 0.5, -0.5)
    quiet(axes)
    return axes


def plot_edits(intervention: xr.Dataset, axes: Axes) -> Axes:
    """What editing the set does to accuracy on trial prompts, over the range of the matched random sets.

    Parameters
    ----------
    intervention
        Results group ``intervention``.
    axes
        Axes to draw on.

    Returns
    -------
    Axes
        ``axes``; x is the difference of accuracy from the unedited model in percentage points.
    """
    rows: list[tuple[str, str, str, tuple[float, float, float]]] = []
    for direction, label in (("disable", "disable"), ("amplify", "amplify")):
        if direction not in labels_of(intervention, "direction"):
            continue
        arms = arms_of(intervention, direction)
        for kind, words, colour, marker in (
            ("set", label, VIOLET, "o"),
            ("lower", "lower", GOLD, "D"),
            ("lift", "lift", GOLD, "D"),
        ):
            of_kind = next((arm for arm in arms if arm.kind == kind), None)
            if of_kind is None:
                continue
            random = [arm.effect for arm in arms if arm.kind == "random"]
            if kind == "set" and random:
                y = len(rows)
                axes.barh(
                    y, 100 * (max(random) - min(random)), left=100 * min(random), height=0.5, color=NULL, alpha=0.45
                )
            mean, low, high = (100 * value for value in (of_kind.effect, of_kind.effect_low, of_kind.effect_high))
            rows.append((words, colour, marker, (mean, low, high)))
    _dots(axes, rows)
    axes.axvline(0, color=INK, lw=0.9)
    axes.set_xlabel("points of accuracy")
    return axes


# -- the six steps -----------------------------------------------------------------------------------------------------
def _behaviour(results: Results, spec: StudySpec) -> _Panel:
    data = needed(results, "behaviour")
    models = [BASE_MODEL, *contrasted_finals(results, spec, "behaviour").values()]
    for domain, words in (("out", "Out of domain"), ("in", "In domain")):
        rows = [row for model in models if (row := domain_accuracy(data, model, domain)) is not None]
        if rows:
            shown = listed(f"{row.run} {percent(row.accuracy, 0)}" for row in rows)
            draw = partial(plot_domain_accuracy, data, models=models, domain=domain)
            return _Panel(draw, f"{words}: {shown} right.", {})
    raise NotEstimableError("no task has a domain")


def _movement(results: Results, spec: StudySpec) -> _Panel:
    data = needed(results, "movement")
    finals = contrasted_finals(results, spec, "movement")
    shown = listed(f"{run} {compact(number(data, 'activation_shift', model=model))}" for run, model in finals.items())
    return _Panel(partial(plot_movement, data, runs=list(finals)), f"Shift of activations: {shown}.", {})


def _whose(results: Results, spec: StudySpec) -> _Panel:
    data = needed(results, "attribution_contrast")
    tau = nearest_label(data, "tau", spec.statistics.tau)
    runs = [run.name for run in spec.contrasted]
    prefix = counted_by(data)
    at = {"tau": tau, "comparison": str(data.attrs["decided_by"])}
    tails = {arm: number(data, f"{prefix}tail_{arm}", **at) for arm in ("sft", "rl", "null")}
    answer = (
        f"Specific: {percent(tails['sft'])} of {runs[0]}’s features, {percent(tails['rl'])} of {runs[1]}’s "
        f"(floor {percent(tails['null'])})."
    )
    draw = partial(plot_specific_shares, data, tau=tau, runs=runs)
    return _Panel(draw, answer, {"C1.estimate": 100 * (tails["sft"] - tails["rl"])})


def _when(results: Results, spec: StudySpec) -> _Panel:
    data = needed(results, "timing_contrast")
    runs = [run.name for run in spec.contrasted if run.name in labels_of(data, "trained_run")]
    time = {run: number(data, "value", measure="time", trained_run=run) for run in runs}
    after = listed(f"{percent(time[run], 0)} of training ({run})" for run in runs)
    answer = f"Stable after {after} on average; what never settles counts as 100%."
    sft, rl = (run.name for run in spec.contrasted)
    return _Panel(
        partial(plot_time_to_stability, data, runs=runs),
        answer,
        {"C2.estimate": 100 * (time.get(rl, math.nan) - time.get(sft, math.nan))},
    )


def _which(results: Results, spec: StudySpec) -> _Panel:
    needed(results, "selection")
    each = by_dictionary(results, "selection")
    counts = {name: count_span(values) for name, values in selection_counts(each).items()}
    answer = (
        f"Of {counts['n_testable']} features {counts['n_rising']} rise where {spec.contrasted[1].name} gained, "
        f"{counts['n_confirmed']} by more than elsewhere."
    )
    confirmed = float(np.mean(selection_counts(each)["n_confirmed"]))
    return _Panel(partial(plot_selection_counts, each), answer, {"C3.estimate": confirmed})


def _editing(results: Results, spec: StudySpec) -> _Panel:
    data = needed(results, "intervention")
    words, numbers = [], {}
    for direction, claim in CLAIM_OF.items():
        arms = arms_of(data, direction) if direction in labels_of(data, "direction") else []
        arm = next((arm for arm in arms if arm.kind == "set"), None)
        if arm is not None:
            ends = interval(arm.effect_low, arm.effect_high, 0, scale=100, sign=True)
            words.append(f"{direction} {fixed(100 * arm.effect, 0, sign=True)} {ends}")
            numbers[f"{claim}.estimate"] = 100 * arm.effect
    if not words:
        raise NotEstimableError("no arm edits the set in either direction")
    answer = f"Points of accuracy: {', '.join(words)} (grey: matched random sets)."
    return _Panel(partial(plot_edits, data), answer, numbers)


STEPS: Final[dict[str, tuple[str, Callable[[Results, StudySpec], _Panel]]]] = {
    "behaviour": ("Behaviour", _behaviour),
    "movement": ("How far it moved", _movement),
    "whose": ("Whose features", _whose),
    "when": ("When", _when),
    "which": ("Which", _which),
    "editing": ("What editing does", _editing),
}
"""Heading and content of every step, in reading order."""
