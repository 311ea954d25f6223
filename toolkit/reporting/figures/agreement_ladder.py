"""How far dictionaries of other seeds agree: from single features over sets to whole changes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes

from rlgen_stats.schemas.errors import NotEstimableError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.figures.figure_inputs import needed, styles_of
from rlgen_stats.toolkit.reporting.figures.plotting import NULL, SINGLE, Graphic, panel, quiet
from rlgen_stats.toolkit.reporting.formatting import fixed
from rlgen_stats.toolkit.reporting.over_dictionaries import GROUP, pairs_of, span
from rlgen_stats.toolkit.reporting.result_lookup import Results, attr_number, final_models

TITLE: Final = "What replicates over dictionaries"
_STEPS: Final = (
    ("features matched", "matched_share", "", ""),
    ("features matched closely", "close_share", "", ""),
    ("drift that the close carry", "close_energy", "close_energy_random", "close_energy_random_high"),
    ("top features matched in top", "top_shared", "top_expected", ""),
    ("drift of the set, by prompt", "set_correlation", "set_correlation_random", "set_correlation_random_high"),
    ("the same within tasks", "set_within", "set_within_random", "set_within_random_high"),
    ("decoded change", "decoded_correlation", "", ""),
    ("error of the decoded change", "error_correlation", "", ""),
)
"""Label, number, its random level, and the 95% quantile of that."""


def agreement_ladder(results: Results, spec: StudySpec) -> Graphic:
    """One line a kind of finding, one mark a pair of dictionaries and run, with the random level."""
    data, finals = needed(results, GROUP), final_models(spec, results.get(GROUP))
    runs = {run.name: finals[run.name] for run in spec.contrasted if run.name in finals}
    if not runs:
        raise NotEstimableError(f"the analysis '{GROUP}' has no final checkpoint of the contrasted runs")
    alt = _alt(_shares(data, runs), list(runs))
    return Graphic(
        GROUP,
        TITLE,
        (panel(partial(plot_agreement, data, models=runs), SINGLE, 3.4, title=TITLE, alt=alt),),
        "One mark a pair of dictionaries; the first four lines compare with the first dictionary only. "
        "Where errors agree as much as decoded changes do, part of the agreement is a common mistake.",
    )


def _shares(data: xr.Dataset, models: Mapping[str, str]) -> pd.DataFrame:
    """Rows of pairs with the top features as shares of the top."""
    table, top_k = pairs_of(data, models), attr_number(data, "top_k")
    return table.assign(top_shared=table["top_shared"] / top_k, top_expected=table["top_expected"] / top_k)


def plot_agreement(replicability: xr.Dataset, axes: Axes, *, models: Mapping[str, str]) -> Axes:
    """How far pairs of dictionaries agree, from features over sets to whole changes, beside the random level.

    Parameters
    ----------
    replicability
        Results group ``replicability``.
    axes
        Axes to draw on.
    models
        Run -> model id; the first two look like SFT and RL.

    Returns
    -------
    Axes
        ``axes``; shares (features) and correlations (sets, changes, errors).
    """
    table, runs = _shares(replicability, models), list(models)
    styles = styles_of(replicability, runs)
    for place, run in enumerate(runs):
        rows, (colour, marker) = table[table["run"] == run], styles[run]
        for line, (_, name, level, high) in enumerate(_STEPS):
            y = line + 0.3 * (place - (len(runs) - 1) / 2)
            _random_level(axes, rows, level, high, y)
            axes.plot(rows[name], np.full(len(rows), y), marker, color=colour, ms=5.5, ls="", alpha=0.85)
        axes.plot([], [], marker, color=colour, ms=5.5, label=run)
    axes.plot([], [], color=NULL, lw=3, label="random level, to its 95% quantile")
    axes.set_yticks(range(len(_STEPS)), [label for label, *_ in _STEPS])
    axes.set_ylim(len(_STEPS) - 0.5, -0.5)
    left = np.nanmin(np.append(table[[name for _, name, *_ in _STEPS]].to_numpy(dtype=float).ravel(), 0.0))
    axes.set_xlim(left - 0.02, 1.02)
    axes.set_xlabel("share (features), correlation (sets, changes, errors)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.35, 1.14), ncols=3, handlelength=1.2)
    quiet(axes)
    return axes


def _random_level(axes: Axes, rows: pd.DataFrame, level: str, high: str, y: float) -> None:
    """A bar from the random level to its quantile, and a tick at the level."""
    if not level:
        return
    for _, row in rows.iterrows():
        if np.isfinite(row[level]):
            axes.plot([row[level]], [y], "|", color=NULL, ms=8, mew=1.6, zorder=1)
            if high:
                axes.plot([row[level], row[high]], [y, y], color=NULL, lw=3, solid_capstyle="butt", zorder=1)


def _alt(table: pd.DataFrame, runs: list[str]) -> str:
    parts = []
    for run in runs:
        rows = table[table["run"] == run]
        shown = [f"{label} {span(rows[name])}" + _beside(rows, level) for label, name, level, _ in _STEPS]
        parts.append(f"{run}: {', '.join(shown)}")
    return f"Agreement of pairs of dictionaries. {'; '.join(parts)}."


def _beside(rows: pd.DataFrame, level: str) -> str:
    values = rows[level].to_numpy(dtype=float) if level else np.array([])
    known = values[np.isfinite(values)]
    return f" (random {fixed(float(known.mean()), 2)})" if len(known) else ""
