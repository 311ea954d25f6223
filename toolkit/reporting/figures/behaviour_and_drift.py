"""Figures of behaviour and of drift."""

from __future__ import annotations

from typing import Final

import numpy as np

from rlgen_stats.schemas.dims import BASE_MODEL
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.figures.figure_inputs import (
    contrasted_finals,
    needed,
    run_colours,
    run_markers,
    task_groups,
)
from rlgen_stats.toolkit.reporting.figures.plotting import (
    GOLD,
    GOOD,
    MUTED,
    NULL,
    PALE,
    RULE,
    Graphic,
    canvas,
    percent_axis,
    quiet,
    to_svg,
)
from rlgen_stats.toolkit.reporting.formatting import percent
from rlgen_stats.toolkit.reporting.result_lookup import Results, number

MAX_POINTS: Final = 1500
"""Most points of one kind in a volcano panel; the smallest p-values are kept, the caption counts the others."""


def accuracy(results: Results, spec: StudySpec) -> Graphic:
    """Greedy accuracy of base and both final models per task, with intervals."""
    data = needed(results, "behaviour")
    models = {"base": BASE_MODEL} | contrasted_finals(results, spec, "behaviour")
    colours, markers = run_colours(spec), run_markers(spec)
    groups = task_groups(data)
    n_rows = sum(len(tasks) + 0.9 for _, tasks in groups)
    with canvas(7.4, 0.7 + 0.40 * n_rows) as (figure, grid):
        axes, y, descriptions, ticks = grid[0, 0], 0.0, [], []
        for kind, tasks in groups:
            axes.text(
                -0.02, y, kind, transform=axes.get_yaxis_transform(), ha="right", va="center", weight="bold", fontsize=9
            )
            y += 0.85
            for task in tasks:
                ticks.append((y, task))
                axes.axhline(y, color=RULE, lw=0.5, zorder=0)
                values = []
                for offset, (run, model) in zip(np.linspace(-0.24, 0.24, len(models)), models.items(), strict=True):
                    mean, low, high = (
                        number(data, f"accuracy{end}", model=model, task=task) for end in ("", "_low", "_high")
                    )
                    axes.plot([low, high], [y + offset] * 2, color=colours[run], lw=1.6, solid_capstyle="butt")
                    axes.plot(
                        mean,
                        y + offset,
                        markers[run],
                        color=colours[run],
                        ms=5.5,
                        mec=colours[run],
                        label=run if len(ticks) == 1 else None,
                        clip_on=False,
                        zorder=3,
                    )
                    values.append(f"{run} {percent(mean, 0)}")
                descriptions.append(f"{task}: {', '.join(values)}")
                y += 1.0
            y += 0.05
        axes.set(xlim=(0, 1), ylim=(y - 0.3, -0.6), xlabel="greedy accuracy")
        axes.set_yticks([position for position, _ in ticks], [task for _, task in ticks])
        percent_axis(axes.xaxis)
        quiet(axes)
        axes.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1, handletextpad=0.3)
        alt = "Accuracy per task. " + "; ".join(descriptions) + "."
        svg = to_svg(figure, title="Accuracy by task and model", alt=alt)
    return Graphic(
        "accuracy",
        "Accuracy by task and model",
        svg,
        alt,
        "Greedy accuracy of base and of the last checkpoint of both runs, with intervals over prompts.",
    )


def transitions(results: Results, spec: StudySpec) -> Graphic:
    """Per-prompt transitions from base: gained to the right, forgotten to the left, one panel per run."""
    data = needed(results, "behaviour")
    finals = contrasted_finals(results, spec, "behaviour")
    tasks = [task for _, group in task_groups(data) for task in group]
    descriptions, widest = [], 0.05
    with canvas(7.4, 0.9 + 0.34 * len(tasks), ncols=len(finals), sharey=True, sharex=True) as (figure, grid):
        for axes, (run, model) in zip(grid[0], finals.items(), strict=True):
            axes.axvline(0, color=MUTED, lw=0.9)
            for y, task in enumerate(tasks):
                n = number(data, "n_prompts", model=model, task=task)
                gained, lost = (number(data, name, model=model, task=task) / n for name in ("gained", "forgotten"))
                axes.barh(y, gained, height=0.62, color=GOOD)
                axes.barh(y, -lost, height=0.62, color=GOLD, hatch="////", edgecolor=PALE, linewidth=0)
                for value, sign, align in ((gained, 1, "left"), (lost, -1, "right")):
                    if np.isfinite(value) and value > 0:
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
                descriptions.append(f"{run} on {task}: {percent(gained, 0)} gained, {percent(lost, 0)} forgotten")
            axes.set_title(f"base → {run}", pad=8)
            axes.set_xlabel("← forgotten  |  gained →")
            quiet(axes)
        grid[0, 0].set_yticks(range(len(tasks)), tasks)
        grid[0, 0].invert_yaxis()
        edge = 1.25 * widest
        grid[0, 0].set_xlim(-edge, edge)
        for axes in grid[0]:
            axes.xaxis.set_major_formatter(lambda value, _: f"{100 * abs(value):.0f}%")
        alt = "Share of prompts whose answer changed. " + "; ".join(descriptions) + "."
        svg = to_svg(figure, title="Transitions from base", alt=alt)
    return Graphic(
        "transitions",
        "What changed prompt by prompt",
        svg,
        alt,
        "Prompts base got wrong and the run right (gained), and the reverse (forgotten), as a share of the "
        "task's prompts; numbers are prompts.",
    )


def drift_volcano(results: Results, spec: StudySpec) -> Graphic:
    """Standardised effect against p-value of every testable feature, one panel per run."""
    data = needed(results, "drift")
    finals = contrasted_finals(results, spec, "drift")
    colours, descriptions, hidden = run_colours(spec), [], 0
    with canvas(7.4, 3.3, ncols=len(finals), sharey=True, sharex=True) as (figure, grid):
        for axes, (run, model) in zip(grid[0], finals.items(), strict=True):
            one = data.sel(model=model)
            p, d, call = (np.asarray(one[name].values) for name in ("p_value", "d_z", "call"))
            with np.errstate(divide="ignore"):
                height = np.minimum(-np.log10(p), 300.0)
            ok = np.isfinite(height) & np.isfinite(d)
            for chosen, colour, size, label in (
                (ok & (call != "DRIFT"), NULL, 7, "not called"),
                (ok & (call == "DRIFT"), colours[run], 11, "drifted"),
            ):
                index = np.flatnonzero(chosen)
                kept = index[np.argsort(-height[index], kind="stable")][:MAX_POINTS]
                hidden += len(index) - len(kept)
                axes.scatter(d[kept], height[kept], s=size, color=colour, linewidths=0, alpha=0.75, label=label)
            n_drift, n_ok = int((call == "DRIFT").sum()), int(np.isfinite(p).sum())
            axes.axvline(0, color=RULE, lw=0.8, zorder=0)
            axes.set_title(f"base → {run}", pad=16)
            axes.text(
                0,
                1.02,
                f"{n_drift:,} of {n_ok:,} testable features drifted",
                transform=axes.transAxes,
                fontsize=8.5,
                color=MUTED,
            )
            axes.set_xlabel("standardised effect d_z")
            quiet(axes, grid="y")
            descriptions.append(f"{run}: {n_drift} of {n_ok} testable features drifted")
        grid[0, 0].set_ylabel("−log₁₀ p")
        grid[0, 0].set_ylim(bottom=0)
        alt = "Volcano plot of feature drift from base. " + "; ".join(descriptions) + "."
        svg = to_svg(figure, title="Feature drift", alt=alt)
    more = f" {hidden:,} points with larger p are not drawn." if hidden else ""
    return Graphic(
        "drift",
        "Which features drifted",
        svg,
        alt,
        "Each point is a feature: its change against base over prompts in standard deviations of that change "
        "(invariant to the scale of activations), and the sign-flip p-value. Coloured: called DRIFT, which means that "
        f"it differs, and by more than the margin, both after correction over the family.{more}",
    )
