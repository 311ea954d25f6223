"""How much of what the whole site carries features carry that are copied from the other model, by their number."""

from __future__ import annotations

from functools import partial
from typing import Final

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from rlgen_stats.schemas.errors import NotEstimableError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.arm_rows import CLAIM_OF
from rlgen_stats.toolkit.reporting.figures.figure_inputs import needed
from rlgen_stats.toolkit.reporting.figures.plotting import (
    GOLD,
    HALF,
    INK,
    MUTED,
    NULL,
    VIOLET,
    Graphic,
    legend_below,
    panel,
    percent_axis,
    quiet,
)
from rlgen_stats.toolkit.reporting.formatting import count_span, fixed, percent
from rlgen_stats.toolkit.reporting.result_lookup import Results, labels_of

GROUP: Final = "mediated_share"
TITLE: Final = "What a few features carry"
_TITLES: Final = {"disable": "Lowered in the RL model", "amplify": "Lifted in base"}
"""Title of a direction."""
_ALL: Final = "all"
_SET: Final = "set"
_LOWEST, _HIGHEST = -0.3, 1.6
"""Shares shown: what lies beyond is noise of a small patch effect."""


def mediated_share(results: Results, spec: StudySpec) -> Graphic:
    """Share of the full patch's effect against the number of features, one line a dictionary, with random sets."""
    data = needed(results, GROUP)
    directions = [d for d in _TITLES if np.isfinite(data["share"].sel(direction=d).values).any()]
    if not directions:
        raise NotEstimableError("copying the other model's whole residual has no shown effect to have a share in")
    panels, numbers = [], {}
    for direction in directions:
        alt = f"Share of the full patch's effect. {_alt(data, direction)}."
        draw = partial(plot_mediated_share, data, direction=direction)
        panels.append(panel(draw, HALF, 3.4, title=f"{TITLE}: {_TITLES[direction]}", alt=alt))
        if _SET in labels_of(data, "point"):
            drawn = float(data["share"].sel(direction=direction, point=_SET))
            numbers[f"{CLAIM_OF[direction]}.details.share_of_patch.0"] = drawn
    return Graphic(
        "mediated-share",
        TITLE,
        tuple(panels),
        "Features are set to the other model's level on the same text. 100% is the effect of copying the whole "
        "residual of the site. Thin lines: dictionaries.",
        numbers,
    )


def plot_mediated_share(mediated_share: xr.Dataset, axes: Axes, *, direction: str) -> Axes:
    """Share of the full patch's effect that copied features carry, by their number, with intervals and random sets.

    Parameters
    ----------
    mediated_share
        Results group ``mediated_share``.
    axes
        Axes to draw on.
    direction
        ``disable`` (lowered in the RL model) or ``amplify`` (lifted in base).

    Returns
    -------
    Axes
        ``axes``; thin lines are dictionaries.
    """
    data = mediated_share.sel(direction=direction)
    sizes = data["n_features"].mean("dictionary").values
    is_set = np.array([label == _SET for label in labels_of(data, "point")])
    order = np.flatnonzero(~is_set)[np.argsort(sizes[~is_set], kind="stable")]
    for number in labels_of(data, "dictionary"):
        one = data.sel(dictionary=int(number)).isel(point=order)
        axes.plot(one["n_features"], one["dictionary_share"], color=VIOLET, lw=0.7, alpha=0.5)
    for points, colour, style, label in (
        (order, VIOLET, "o-", "largest drift"),
        (np.flatnonzero(is_set), GOLD, "D", "the set"),
    ):
        one = data.isel(point=points)
        ends = np.abs(np.stack([one["share_low"].values, one["share_high"].values]) - one["share"].values)
        axes.errorbar(sizes[points], one["share"], ends, color=colour, fmt=style, ms=4.5, lw=1.4, label=label, zorder=4)
    random = data["random_share"].mean(("dictionary", "random"), skipna=True).values
    axes.plot(sizes, random, "x", color=NULL, ms=5, mew=1.4, label="matched random sets (mean)")
    axes.axhline(1, color=MUTED, lw=1, ls="--", label="full patch")
    axes.axhline(0, color=INK, lw=0.8, ls=":")
    axes.set(
        xlabel="features copied", xscale="log", ylim=(_LOWEST, _HIGHEST), ylabel="share of the full patch's effect"
    )
    axes.set_title(_TITLES[direction], pad=8)
    axes.xaxis.set_major_formatter("{x:g}")
    percent_axis(axes.yaxis)
    quiet(axes, grid="y")
    legend_below(axes, 2)
    return axes


def _alt(data: xr.Dataset, direction: str) -> str:
    shown = []
    for label in labels_of(data, "point"):
        point = data.sel(direction=direction, point=label)
        ratio = fixed(float(point["norm_ratio"].mean()), 2)
        n = count_span(int(size) for size in point["n_features"].values)
        name = {_SET: f"the set ({n} features)", _ALL: f"all {n} features"}.get(label, f"the {n} of largest drift")
        shown.append(f"{name} {percent(float(point['share']), 0)} (edit {ratio} of the true difference's norm)")
    return f"{_TITLES[direction]}: {', '.join(shown)}"
