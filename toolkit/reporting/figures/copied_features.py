"""How much of what the whole site carries features carry that are copied from the other model, by their number."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import xarray as xr

from rlgen_stats.schemas.errors import NotEstimableError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.figures.figure_inputs import needed
from rlgen_stats.toolkit.reporting.figures.plotting import (
    GOLD,
    INK,
    MUTED,
    NULL,
    VIOLET,
    Graphic,
    canvas,
    percent_axis,
    quiet,
    to_svg,
)
from rlgen_stats.toolkit.reporting.formatting import fixed, percent
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
    with canvas(7.4, 3.4, ncols=len(directions), sharey=True) as (figure, grid):
        for axes, direction in zip(grid[0], directions, strict=True):
            _panel(axes, data.sel(direction=direction))
            axes.set_title(_TITLES[direction], pad=8)
        grid[0, 0].set_ylabel("share of the full patch's effect")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), handlelength=1.6)
        alt = f"Share of the full patch's effect. {'; '.join(_alt(data, direction) for direction in directions)}."
        svg = to_svg(figure, title=TITLE, alt=alt)
    return Graphic(
        "mediated-share",
        TITLE,
        svg,
        alt,
        "Features are set to the other model's level on the same text. 100% is the effect of copying the whole "
        "residual of the site. Thin lines: dictionaries.",
    )


def _panel(axes: Any, data: xr.Dataset) -> None:
    """One direction: the curve over dictionaries with intervals, each dictionary's, the set and random sets."""
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
    axes.set(xlabel="features copied", xscale="log", ylim=(_LOWEST, _HIGHEST))
    axes.xaxis.set_major_formatter("{x:g}")
    percent_axis(axes.yaxis)
    quiet(axes, grid="y")


def _alt(data: xr.Dataset, direction: str) -> str:
    shown = []
    for label in labels_of(data, "point"):
        point = data.sel(direction=direction, point=label)
        ratio = fixed(float(point["norm_ratio"].mean()), 2)
        n = f"{float(point['n_features'].mean()):.3g}"
        name = {_SET: f"the set ({n} features)", _ALL: f"all {n} features"}.get(label, f"the {n} of largest drift")
        shown.append(f"{name} {percent(float(point['share']), 0)} (edit {ratio} of the true difference's norm)")
    return f"{_TITLES[direction]}: {', '.join(shown)}"
