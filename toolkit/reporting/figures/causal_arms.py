"""Figures of the causal arms: dose response against matched random sets, and how completions end."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import xarray as xr

from rlgen_stats.schemas.errors import NotEstimableError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.arm_rows import RANDOM_KINDS, Arm, arms_of, in_order, random_band
from rlgen_stats.toolkit.reporting.figures.figure_inputs import needed
from rlgen_stats.toolkit.reporting.figures.plotting import (
    GOLD,
    GOOD,
    INK,
    MUTED,
    NULL,
    PALE,
    SFT,
    VIOLET,
    Graphic,
    canvas,
    percent_axis,
    quiet,
    to_svg,
)
from rlgen_stats.toolkit.reporting.formatting import percent
from rlgen_stats.toolkit.reporting.result_lookup import Results, labels_of

TITLES: Final = {"disable": "Disabling in the RL model", "amplify": "Amplifying in base"}
"""Title of a direction."""
_CLASSES: Final = {
    "right": (GOOD, "right"),
    "answer": (GOOD, "answers"),
    "wrong": (PALE, "wrong"),
    "no_answer": (GOLD, "no answer"),
    "truncated": (VIOLET, "cut off"),
    "empty": (NULL, "empty"),
    "degenerate": (SFT, "degenerate"),
}
"""Colour and label of a format class; PALE for an unknown one."""
BAND_WIDTH: Final = 0.18
"""Half-width, in doses, of the band of random sets that were run at one dose only."""
MAX_ARMS: Final = 14
"""Most arms of one direction in the figure of format classes; random sets are averaged into one."""


_MULTIPLIED: Final = "dose: multiplier of the set's activation"
_ADDED: Final = "dose: 1 + RL's mean activations added"
"""Labels of the dose axis: the set's activations are multiplied, or RL's mean activations are added."""


def _directions(data: xr.Dataset) -> list[str]:
    directions: list[str] = [
        direction for direction in ("disable", "amplify") if direction in labels_of(data, "direction")
    ]
    if not directions:
        raise NotEstimableError("no arm edits the set in either direction")
    return directions


def _class(name: str) -> tuple[str, str]:
    return _CLASSES.get(name, (PALE, name))


def dose_response(results: Results, spec: StudySpec) -> Graphic:
    """Accuracy against dose for the set, with the range of matched random sets and the unedited models."""
    data = needed(results, "intervention")
    directions, descriptions = _directions(data), []
    with canvas(7.4, 3.3, ncols=len(directions), sharey=True) as (figure, grid):
        for axes, direction in zip(grid[0], directions, strict=True):
            arms = arms_of(data, direction)
            colour = VIOLET
            shown = ("set", "dose", "unedited")
            doses = sorted((arm for arm in arms if arm.kind in shown), key=lambda arm: arm.dose)
            for arm in (arm for arm in arms if arm.kind == "unedited"):
                axes.axhline(arm.accuracy, color=MUTED, lw=1, ls="--", label="unedited")
            _band(axes, arms)
            axes.plot(
                [arm.dose for arm in doses],
                [arm.accuracy for arm in doses],
                color=colour,
                marker="o",
                ms=5,
                label="the set",
                zorder=4,
            )
            main = next((arm.dose for arm in arms if arm.kind == "set"), 1.0)
            for arm in (arm for arm in arms if arm.kind in ("set", "steering")):
                x = main if arm.kind == "set" else main + BAND_WIDTH / 2  # steering has no dose: shown beside the set
                axes.vlines(x, arm.accuracy_low, arm.accuracy_high, color=colour if arm.kind == "set" else GOLD)
                if arm.kind == "steering":
                    axes.plot(x, arm.accuracy, "^", color=GOLD, ms=6.5, label=arm.label)
            axes.axvline(1, color=INK, lw=0.8, ls=":")
            axes.set_title(TITLES[direction], pad=8)
            added = direction == "amplify" and data.attrs.get("level") == "rl"
            axes.set(xlabel=_ADDED if added else _MULTIPLIED, ylim=(0, 1.02))
            percent_axis(axes.yaxis)
            quiet(axes, grid="y")
            descriptions.append(
                f"{direction}: " + ", ".join(f"{percent(a.accuracy, 0)} at dose {a.dose:g}" for a in doses)
            )
            axes.margins(x=0.08)
        grid[0, 0].set_ylabel("accuracy on trial prompts")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), handlelength=1.8)
        alt = "Accuracy against dose. " + "; ".join(descriptions) + "."
        svg = to_svg(figure, title="Dose response of the set", alt=alt)
    return Graphic(
        "dose-response",
        "Dose response of the set",
        svg,
        alt,
        "Accuracy when the set's activations are multiplied by the dose (0 disables, 1 is no edit). Band: smallest to "
        "largest of the matched random feature sets; the set has a specific effect only outside the band.",
    )


def _band(axes: Any, arms: list[Arm]) -> None:
    band = random_band(arms)
    if not band:
        return
    doses = sorted(band)
    low, middle, high = (np.array([band[dose][i] for dose in doses]) for i in range(3))
    if len(doses) == 1:
        axes.fill_between(
            [doses[0] - BAND_WIDTH, doses[0] + BAND_WIDTH],
            low[0],
            high[0],
            color=NULL,
            alpha=0.4,
            linewidth=0,
            label="random sets",
        )
        axes.plot([doses[0] - BAND_WIDTH, doses[0] + BAND_WIDTH], [middle[0]] * 2, color=MUTED, lw=1.2)
        return
    axes.fill_between(doses, low, high, color=NULL, alpha=0.4, linewidth=0, label="random sets")
    axes.plot(doses, middle, color=MUTED, lw=1.2)


def _bars(arms: list[Arm]) -> list[tuple[str, np.ndarray]]:
    """Label and shares of classes of a direction's bars; the random sets are one, those rescaled are left out."""
    shown = [(arm.label, arm.shares) for arm in arms if arm.kind not in RANDOM_KINDS][:MAX_ARMS]
    randoms = [arm.shares for arm in arms if arm.kind == "random"]
    return [*shown, (f"random sets (mean of {len(randoms)})", np.nanmean(randoms, axis=0))] if randoms else shown


def failure_classes(results: Results, spec: StudySpec) -> Graphic:
    """Share of completions in every format class, one bar per arm."""
    data = needed(results, "intervention")
    directions, classes = _directions(data), labels_of(data, "class")
    rows = [(direction, *row) for direction in directions for row in _bars(in_order(arms_of(data, direction)))]
    heights = [max(sum(row[0] == direction for row in rows), 1) for direction in directions]
    with canvas(
        7.4, 1.1 + 0.29 * len(rows), nrows=len(directions), sharex=True, gridspec_kw={"height_ratios": heights}
    ) as (figure, grid):
        for axes, direction in zip(grid[:, 0], directions, strict=True):
            panel = [row for row in rows if row[0] == direction]
            for y, (_, _, shares) in enumerate(panel):
                left = 0.0
                for name, share in zip(classes, np.nan_to_num(shares), strict=True):
                    axes.barh(
                        y,
                        share,
                        left=left,
                        height=0.66,
                        color=_class(name)[0],
                        linewidth=0,
                        label=_class(name)[1] if y == 0 else None,
                    )
                    left += float(share)
            axes.set_yticks(range(len(panel)), [label for _, label, _ in panel])
            axes.invert_yaxis()
            axes.set_title(TITLES[direction], pad=6)
            axes.set_xlim(0, 1)
            percent_axis(axes.xaxis)
            quiet(axes)
        grid[-1, 0].set_xlabel("share of completions")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), handlelength=1, columnspacing=1.4)
        alt = (
            "Format classes of completions by arm. "
            + "; ".join(
                f"{direction}, {label}: "
                + ", ".join(f"{_class(c)[1]} {percent(s, 0)}" for c, s in zip(classes, shares, strict=True) if s > 0)
                for direction, label, shares in rows
            )
            + "."
        )
        svg = to_svg(figure, title="How completions of the edited models end", alt=alt)
    return Graphic(
        "failure-classes",
        "How completions of the edited models end",
        svg,
        alt,
        "A fall in accuracy alone does not tell what an edit did: one that moves a model toward the other one makes "
        "its completions end as that one's do (the unedited row of the other panel); one that breaks the model "
        "causes kinds of failure that neither model shows.",
    )
