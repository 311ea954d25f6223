"""Figures of behaviour and of drift."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from rlgen_stats.schemas.dims import BASE_MODEL, BASE_RUN, split_model_id
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.figures.figure_inputs import contrasted_finals, needed, styles_of, task_groups
from rlgen_stats.toolkit.reporting.figures.plotting import (
    FEATURE_LINK,
    GOLD,
    GOOD,
    HALF,
    MUTED,
    NULL,
    PALE,
    RULE,
    SINGLE,
    Graphic,
    panel,
    percent_axis,
    quiet,
)
from rlgen_stats.toolkit.reporting.formatting import percent
from rlgen_stats.toolkit.reporting.result_lookup import Results, labels_of, number

MAX_POINTS: Final = 1500
"""Most points of one kind in a volcano panel; the smallest p-values are kept, the caption counts the others."""


def accuracy(results: Results, spec: StudySpec) -> Graphic:
    """Greedy accuracy of base and both final models per task, with intervals."""
    data = needed(results, "behaviour")
    models = [BASE_MODEL, *contrasted_finals(results, spec, "behaviour").values()]
    groups = task_groups(data)
    shown = [
        f"{task}: "
        + ", ".join(
            f"{split_model_id(model)[0]} {percent(number(data, 'accuracy', model=model, task=task), 0)}"
            for model in models
        )
        for _, tasks in groups
        for task in tasks
    ]
    return Graphic(
        "accuracy",
        "Accuracy by task and model",
        (
            panel(
                partial(plot_accuracy, data, models=models),
                SINGLE,
                0.8 + 0.36 * sum(len(tasks) + 0.9 for _, tasks in groups),
                title="Accuracy by task and model",
                alt=f"Accuracy per task. {'; '.join(shown)}.",
            ),
        ),
        "Greedy accuracy of base and of the last checkpoint of both runs, with intervals over prompts; controls are "
        "shown too.",
    )


def plot_accuracy(
    behaviour: xr.Dataset, axes: Axes, *, models: Sequence[str] | None = None, runs: Sequence[str] | None = None
) -> Axes:
    """Greedy accuracy of models on every task, tasks of a kind together, with intervals.

    Parameters
    ----------
    behaviour
        Results group ``behaviour``.
    axes
        Axes to draw on.
    models
        Model ids; default all.
    runs
        Runs in the order of their colours; default those of the models.

    Returns
    -------
    Axes
        ``axes``.
    """
    models = labels_of(behaviour, "model") if models is None else list(models)
    of_models = dict.fromkeys(split_model_id(model)[0] for model in models)
    styles = styles_of(behaviour, [run for run in of_models if run != BASE_RUN] if runs is None else runs)
    y, ticks, labelled = 0.0, [], set[str]()
    for kind, tasks in task_groups(behaviour):
        axes.text(
            -0.02, y, kind, transform=axes.get_yaxis_transform(), ha="right", va="center", weight="bold", fontsize=9
        )
        y += 0.85
        for task in tasks:
            ticks.append((y, task))
            axes.axhline(y, color=RULE, lw=0.5, zorder=0)
            for offset, model in zip(np.linspace(-0.24, 0.24, len(models)), models, strict=True):
                mean, low, high = (
                    number(behaviour, f"accuracy{end}", model=model, task=task) for end in ("", "_low", "_high")
                )
                run = split_model_id(model)[0]
                colour, marker = styles[run]
                label = None if run in labelled else run
                labelled.add(run)
                axes.plot([low, high], [y + offset] * 2, color=colour, lw=1.6, solid_capstyle="butt")
                axes.plot(mean, y + offset, marker, color=colour, ms=5.5, label=label, clip_on=False, zorder=3)
            y += 1.0
        y += 0.05
    axes.set(xlim=(0, 1), ylim=(y - 0.3, -0.6), xlabel="greedy accuracy")
    axes.set_yticks([position for position, _ in ticks], [task for _, task in ticks])
    percent_axis(axes.xaxis)
    quiet(axes)
    axes.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1, handletextpad=0.3)
    return axes


def transitions(results: Results, spec: StudySpec) -> Graphic:
    """Per-prompt transitions from base: gained to the right, forgotten to the left, one panel per run."""
    data = needed(results, "behaviour")
    finals = contrasted_finals(results, spec, "behaviour")
    tasks = [task for _, group in task_groups(data) for task in group]
    shares = {model: [_changes(data, model, task) for task in tasks] for model in finals.values()}
    edge = 1.3 * max(0.05, *(share for of_model in shares.values() for pair in of_model for share in pair))
    panels = []
    for run, model in finals.items():
        shown = "; ".join(
            f"{run} on {task}: {percent(gained, 0)} gained, {percent(lost, 0)} forgotten"
            for task, (gained, lost) in zip(tasks, shares[model], strict=True)
        )
        alt = f"Share of prompts whose answer changed. {shown}."
        draw = partial(plot_transitions, data, model=model, edge=edge)
        panels.append(panel(draw, HALF, 0.9 + 0.34 * len(tasks), title=f"Transitions, base to {run}", alt=alt))
    return Graphic(
        "transitions",
        "What changed prompt by prompt",
        tuple(panels),
        "Prompts base got wrong and the run right (gained), and the reverse (forgotten), as a share of the "
        "task's prompts; numbers are prompts.",
    )


def _changes(data: xr.Dataset, model: str, task: str) -> tuple[float, float]:
    """Shares of a task's prompts gained and forgotten, 0 where there are none."""
    n = number(data, "n_prompts", model=model, task=task)
    gained, lost = (
        float(np.nan_to_num(number(data, name, model=model, task=task) / n)) for name in ("gained", "forgotten")
    )
    return gained, lost


def plot_transitions(behaviour: xr.Dataset, axes: Axes, *, model: str, edge: float | None = None) -> Axes:
    """Share of every task's prompts that a model gained against base (right) and forgot (left).

    Parameters
    ----------
    behaviour
        Results group ``behaviour``.
    axes
        Axes to draw on.
    model
        Model id.
    edge
        Largest share on the axis; default as needed.

    Returns
    -------
    Axes
        ``axes``; numbers beside the bars are prompts.
    """
    tasks = [task for _, group in task_groups(behaviour) for task in group]
    axes.axvline(0, color=MUTED, lw=0.9)
    widest = 0.05
    for y, task in enumerate(tasks):
        n, (gained, lost) = number(behaviour, "n_prompts", model=model, task=task), _changes(behaviour, model, task)
        axes.barh(y, gained, height=0.62, color=GOOD)
        axes.barh(y, -lost, height=0.62, color=GOLD, hatch="////", edgecolor=PALE, linewidth=0)
        for value, sign, align in ((gained, 1, "left"), (lost, -1, "right")):
            if value > 0:
                axes.annotate(
                    f"{value * n:.0f}",
                    (sign * value, y),
                    (3 * sign, 0),
                    textcoords="offset points",
                    ha=align,
                    va="center",
                    fontsize=8,
                    color=MUTED,
                )
                widest = max(widest, value)
    axes.set_title(f"base → {split_model_id(model)[0]}", pad=8)
    axes.set_xlabel("← forgotten  |  gained →")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    edge = 1.3 * widest if edge is None else edge
    axes.set_xlim(-edge, edge)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * abs(value):.0f}%")
    quiet(axes)
    return axes


def drift_volcano(results: Results, spec: StudySpec) -> Graphic:
    """Standardised effect against p-value of every testable feature, one panel per run; dots link to features."""
    data = needed(results, "drift")
    panels, hidden = [], 0
    for run, model in contrasted_finals(results, spec, "drift").items():
        _, *chosen = _volcano(data, model)
        hidden += sum(max(0, len(index) - MAX_POINTS) for index in chosen)
        alt = f"Volcano plot of feature drift from base. {run}: {_drifted(data, model)}."
        draw = partial(plot_drift, data, model=model, runs=[run.name for run in spec.contrasted])
        panels.append(panel(draw, HALF, 3.3, title=f"Feature drift, base to {run}", alt=alt))
    more = f" {hidden:,} points with larger p are not drawn." if hidden else ""
    return Graphic(
        "drift",
        "Which features drifted",
        tuple(panels),
        "Each point is a feature and leads to its section: its change against base over prompts in standard deviations "
        "of that change (invariant to the scale of activations), and the sign-flip p-value. Coloured: called DRIFT, "
        f"which means that it differs, and by more than the margin, both after correction over the family.{more}",
    )


def _volcano(data: xr.Dataset, model: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Height of every feature, and the positions of those not called and called, smallest p first."""
    one = data.sel(model=model)
    height = drift_height(one["p_value"].values)
    ok = np.isfinite(height) & np.isfinite(one["d_z"].values)
    called = one["call"].values == "DRIFT"
    quiet_ones, drifted = (np.flatnonzero(ok & kind) for kind in (~called, called))
    by_p: Any = lambda index: index[np.argsort(-height[index], kind="stable")]  # noqa: E731
    return height, by_p(quiet_ones), by_p(drifted)


def drift_height(p_values: np.ndarray) -> np.ndarray:
    """-log10 p, at most 300."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.minimum(-np.log10(np.asarray(p_values, dtype=float)), 300.0))


def _drifted(data: xr.Dataset, model: str) -> str:
    one = data.sel(model=model)
    n_drift, n_ok = int((one["call"].values == "DRIFT").sum()), int(np.isfinite(one["p_value"].values).sum())
    return f"{n_drift:,} of {n_ok:,} testable features drifted"


def plot_drift(drift: xr.Dataset, axes: Axes, *, model: str, runs: Sequence[str] | None = None) -> Axes:
    """Standardised effect d_z against -log10 p of every testable feature of one model; in SVG the dots are links.

    Parameters
    ----------
    drift
        Results group ``drift``.
    axes
        Axes to draw on.
    model
        Model id.
    runs
        Runs in the order of their colours; default all that the dataset has.

    Returns
    -------
    Axes
        ``axes``; at most ``MAX_POINTS`` features of each kind, smallest p first.
    """
    height, *chosen = _volcano(drift, model)
    run, features = split_model_id(model)[0], drift["feature"].values
    d_z = np.asarray(drift["d_z"].sel(model=model).values)
    looks = ((NULL, 7, "not called"), (styles_of(drift, runs)[run][0], 11, "drifted"))
    for index, (colour, size, label) in zip(chosen, looks, strict=True):
        kept = index[:MAX_POINTS]
        dots = axes.scatter(d_z[kept], height[kept], s=size, color=colour, linewidths=0, alpha=0.75, label=label)
        dots.set_urls([f"{FEATURE_LINK}{feature}" for feature in features[kept]])
    axes.axvline(0, color=RULE, lw=0.8, zorder=0)
    axes.set_title(f"base → {run}", pad=16)
    axes.text(0, 1.02, _drifted(drift, model), transform=axes.transAxes, fontsize=8.5, color=MUTED)
    axes.set(xlabel="standardised effect d_z", ylabel="−log₁₀ p")
    axes.set_ylim(bottom=0)
    quiet(axes, grid="y")
    return axes
