"""All features in one table, which of them have a section of their own, and where these stand.

Sizes are bounded whatever the dictionary's width: ``MAX_ROWS`` rows in the table, ``MAX_SECTIONS`` features with a
section, ``PER_PAGE`` of them a file. What is left out is counted and stays in results.zarr.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.reporting.csv_tables import flat
from rlgen_stats.toolkit.reporting.result_lookup import Results, final_models

MAX_ROWS: Final = 5000
"""Features in the table: 300 bytes each, 1.5 MB at most."""
MAX_SECTIONS: Final = 1000
"""Features with a section: 8 kB each."""
PER_PAGE: Final = 50
"""Sections a file: 0.4 MB."""
SELECTED_PAGE: Final = "features.html"
"""Page with the table and the sections of the selected features."""


@dataclass(frozen=True, kw_only=True)
class FeatureTable:
    """All features, most interesting first."""

    rows: list[dict[str, Any]]
    """``feature, shown, selected, rank, verification_effect`` and, by run, ``effect_sd, d_z, q, call``."""
    n_features: int
    """All of the dictionary's; more than there are rows where there are too many."""
    pages: dict[str, list[int]]
    """File name -> features with a section on it."""

    @property
    def hrefs(self) -> dict[int, str]:
        """Feature -> its section."""
        return {feature: f"{page}#feature-{feature}" for page, features in self.pages.items() for feature in features}


def feature_table(results: Results, spec: StudySpec) -> FeatureTable:
    """Rows of all features: selected ones by rank, then confirmed and candidates, then by p-value of drift."""
    selection, drift = results.get("selection"), results.get("drift")
    rows: dict[int, dict[str, Any]] = {}
    if drift is not None:
        finals = {run: model for run, model in final_models(spec, drift).items() if run in _compared(spec)}
        for run, model in finals.items():
            one = drift.sel(model=model)
            columns = {name: one[name].values.tolist() for name in ("effect_sd", "d_z", "q_value", "p_value", "call")}
            for i, feature in enumerate(drift["feature"].values.tolist()):
                rows.setdefault(feature, {"feature": feature, "runs": {}})["runs"][run] = {
                    name: column[i] for name, column in columns.items()
                }
    if selection is not None:
        for row in flat(selection, ("feature",)).to_dict("records"):
            rows.setdefault(int(row["feature"]), {"feature": int(row["feature"]), "runs": {}}).update(
                {"shown": shown_of(row)}
                | {name: row[name] for name in ("tier", "selected", "rank", "verification_effect", "verification_q")}
            )
    ordered = sorted(rows.values(), key=_interest)
    selected = [row["feature"] for row in ordered if row.get("selected")]
    others = sorted(row["feature"] for row in ordered[:MAX_SECTIONS] if not row.get("selected"))
    blocks = [others[start : start + PER_PAGE] for start in range(0, len(others), PER_PAGE)]
    pages = {SELECTED_PAGE: selected} | {f"features-{i}.html": block for i, block in enumerate(blocks, start=1)}
    return FeatureTable(rows=ordered[:MAX_ROWS], n_features=len(ordered), pages=pages)


def _compared(spec: StudySpec) -> list[str]:
    return [run.name for run in spec.contrasted]


def shown_of(row: Mapping[Any, Any]) -> str:
    """What the selection showed of a feature, in a word; ``confirmed`` only of those that C3 counts.

    ``rises``: where RL gained, on verification prompts; ``confirmed``: by more than where base was right too.
    """
    if row.get("specific_tier") == "CONFIRMED":
        return "confirmed"
    tier = row.get("tier")
    return "rises" if tier == "CONFIRMED" else str(tier).lower() if isinstance(tier, str) else ""


_TIERS: Final = {"CONFIRMED": 0, "CANDIDATE": 1}


def _interest(row: dict[str, Any]) -> tuple[Any, ...]:
    p_values = [one["p_value"] for one in row["runs"].values() if math.isfinite(one["p_value"])]
    rank = row.get("rank", math.nan)
    return (
        not row.get("selected", False),
        rank if row.get("selected") and np.isfinite(rank) else math.inf,
        _TIERS.get(row.get("tier", ""), 2),
        min(p_values, default=2.0),
        row["feature"],
    )
