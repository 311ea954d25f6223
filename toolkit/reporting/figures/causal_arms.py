"""Figures of the causal arms: dose response against matched random sets, and how completions end."""

from __future__ import annotations

from functools import partial
from typing import Final

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from rlgen_stats.schemas.errors import NotEstimableError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.arm_rows import CLAIM_OF, RANDOM_KINDS, Arm, arms_of, in_order, random_band
from rlgen_stats.toolkit.reporting.figures.figure_inputs import needed
from rlgen_stats.toolkit.reporting.figures.plotting import (
    GOLD,
    GOOD,
    HALF,
    INK,
    MUTED,
    NULL,
    PALE,
    SFT,
    SINGLE,
    VIOLET,
    Graphic,
    legend_below,
    panel,
    percent_axis,
    quiet,
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
        direction
        for direction in ("disable", "amplify")
        if direction in labels_of(data, "direction") and arms_of(data, direction)
    ]
    if not directions:
        raise NotEstimableError("no arm edits the set in either direction")
    return directions


def _class(name: str) -> tuple[str, str]:
    return _CLASSES.get(name, (PALE, name))


def dose_response(results: Results, spec: StudySpec) -> Graphic:
    """Accuracy against dose for the set, with the range of matched random sets and the unedited models."""
    data, panels, numbers = needed(results, "intervention"), [], {}
    for direction in _directions(data):
        accuracy = {arm.kind: 100 * arm.accuracy for arm in _doses(data, direction)}
        if {"set", "unedited"} <= accuracy.keys():
            numbers[f"{CLAIM_OF[direction]}.estimate"] = accuracy["set"] - accuracy["unedited"]
        shown = ", ".join(f"{percent(arm.accuracy, 0)} at dose {arm.dose:g}" for arm in _doses(data, direction))
        alt = f"Accuracy against dose. {direction}: {shown}."
        draw = partial(plot_dose_response, data, direction=direction)
        panels.append(panel(draw, HALF, 3.3, title=f"Dose response: {TITLES[direction]}", alt=alt))
    return Graphic(
        "dose-response",
        "Dose response of the set",
        tuple(panels),
        "Accuracy when the set's activations are multiplied by the dose (0 disables, 1 is no edit). Band: smallest to "
        "largest of the matched random feature sets; the set has a specific effect only outside the band.",
        numbers,
    )


def _doses(data: xr.Dataset, direction: str) -> list[Arm]:
    shown = (arm for arm in arms_of(data, direction) if arm.kind in ("set", "dose", "unedited"))
    return sorted(shown, key=lambda arm: arm.dose)


def plot_dose_response(intervention: xr.Dataset, axes: Axes, *, direction: str) -> Axes:
    """Accuracy on trial prompts against the dose of the set, over the range of the matched random sets.

    Parameters
    ----------
    intervention
        Results group ``intervention`` or a trial's.
    axes
        Axes to draw on.
    direction
        ``disable`` or ``amplify``.

    Returns
    -------
    Axes
        ``axes``.
    """
    arms, doses = arms_of(intervention, direction), _doses(intervention, direction)
    for arm in (arm for arm in arms if arm.kind == "unedited"):
        axes.axhline(arm.accuracy, color=MUTED, lw=1, ls="--", label="unedited")
    _band(axes, arms)
    x, y = [arm.dose for arm in doses], [arm.accuracy for arm in doses]
    axes.plot(x, y, color=VIOLET, marker="o", ms=5, label="the set", zorder=4)
    main = next((arm.dose for arm in arms if arm.kind == "set"), 1.0)
    for arm in (arm for arm in arms if arm.kind in ("set", "steering")):
        at = main if arm.kind == "set" else main + BAND_WIDTH / 2  # steering has no dose: shown beside the set
        axes.vlines(at, arm.accuracy_low, arm.accuracy_high, color=VIOLET if arm.kind == "set" else GOLD)
        if arm.kind == "steering":
            axes.plot(at, arm.accuracy, "^", color=GOLD, ms=6.5, label=arm.label)
    axes.axvline(1, color=INK, lw=0.8, ls=":")
    axes.set_title(TITLES[direction], pad=8)
    added = direction == "amplify" and intervention.attrs.get("level") == "rl"
    axes.set(xlabel=_ADDED if added else _MULTIPLIED, ylabel="accuracy on trial prompts", ylim=(0, 1.02))
    axes.margins(x=0.08)
    percent_axis(axes.yaxis)
    quiet(axes, grid="y")
    legend_below(axes, 2)
    return axes


def _band(axes: Axes, arms: list[Arm]) -> None:
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
    data, panels = needed(results, "intervention"), []
    classes = labels_of(data, "class")
    for direction in _directions(data):
        bars = _bars(in_order(arms_of(data, direction)))
        shown = "; ".join(
            f"{direction}, {label}: "
            + ", ".join(f"{_class(c)[1]} {percent(s, 0)}" for c, s in zip(classes, shares, strict=True) if s > 0)
            for label, shares in bars
        )
        draw = partial(plot_failure_classes, data, direction=direction)
        title, alt = f"How completions end: {TITLES[direction]}", f"Format classes of completions by arm. {shown}."
        panels.append(panel(draw, SINGLE, 1.1 + 0.27 * max(len(bars), 1), title=title, alt=alt))
    return Graphic(
        "failure-classes",
        "How completions of the edited models end",
        tuple(panels),
        "A fall in accuracy alone does not tell what an edit did: one that moves a model toward the other one makes "
        "its completions end as that one's do (the unedited row of the other panel); one that breaks the model "
        "causes kinds of failure that neither model shows.",
    )


def plot_failure_classes(intervention: xr.Dataset, axes: Axes, *, direction: str) -> Axes:
    """Share of completions in every format class, one bar per arm of a direction; random sets are one bar.

    Parameters
    ----------
    intervention
        Results group ``intervention`` or a trial's.
    axes
        Axes to draw on.
    direction
        ``disable`` or ``amplify``.

    Returns
    -------
    Axes
        ``axes``.
    """
    bars, classes = _bars(in_order(arms_of(intervention, direction))), labels_of(intervention, "class")
    for y, (_, shares) in enumerate(bars):
        left = 0.0
        for name, share in zip(classes, np.nan_to_num(shares), strict=True):
            colour, label = _class(name)
            axes.barh(y, share, left=left, height=0.66, color=colour, linewidth=0, label=None if y else label)
            left += float(share)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_title(TITLES[direction], pad=6)
    axes.set(xlim=(0, 1), xlabel="share of completions")
    percent_axis(axes.xaxis)
    quiet(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.14), ncols=3, handlelength=1, columnspacing=1.2)
    return axes
