"""Trials of other sets than the study's, and effects of single features, as plain rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import xarray as xr

from rlgen_stats.toolkit.reporting.claims.c4_c5_causal import main_condition
from rlgen_stats.toolkit.reporting.result_lookup import attr_list, labels_of, number, text

PREFIX: Final = "trial-"
"""Start of the name of a results group that holds a trial of another set."""
_FEATURE_COLUMNS: Final = (
    "feature",
    "alone",
    "alone_low",
    "alone_high",
    "alone_q_value",
    "left_out",
    "left_out_low",
    "left_out_high",
    "left_out_q_value",
    "in_subset",
)


def trial_rows(results: Mapping[str, xr.Dataset]) -> list[dict[str, Any]]:
    """One row per trial and direction."""
    rows = []
    for group, data in results.items():
        if not group.startswith(PREFIX) or "verdict" not in data:
            continue
        if group == "trial-dictionary" and "trial-dictionary.2" not in results:
            continue  # the only dictionary: its trial is the study's
        for direction in labels_of(data, "direction"):
            condition = main_condition(data, direction)
            reasons = text(data, "reasons", direction=direction)
            if reasons.startswith("not_asked"):
                continue
            effect = {
                name: float("nan")
                if condition is None
                else number(data, name, direction=direction, condition=condition)
                for name in ("effect", "effect_low", "effect_high", "dose")
            }
            rows.append(
                {
                    "name": group.removeprefix(PREFIX),
                    "direction": direction,
                    "n_features": len(attr_list(data, "features")),
                    "verdict": text(data, "verdict", direction=direction),
                    "reason": reasons.split(";")[0].partition(":")[2].strip() or reasons,
                    "rank_p": number(data, "rank_p", direction=direction),
                    "level": str(data.attrs.get("level", "own")),
                }
                | effect
            )
    return rows


def part_blocks(results: Mapping[str, xr.Dataset]) -> list[dict[str, Any]]:
    """Per trial and direction: its features in the order of the search for a smaller set, and that set's effect."""
    blocks = []
    for group, data in results.items():
        if not group.startswith(PREFIX) or "left_out" not in data:
            continue
        for direction in labels_of(data, "direction"):
            features = data.sel(direction=direction).sortby("order")
            blocks.append(
                {
                    "name": group.removeprefix(PREFIX).removesuffix("-features"),
                    "direction": direction,
                    "rows": [
                        dict(zip(_FEATURE_COLUMNS, values, strict=True))
                        for values in zip(*(features[name].values.tolist() for name in _FEATURE_COLUMNS), strict=True)
                    ],
                    "size": int(features["subset_size"]),
                    "effects": [
                        (label, *(float(features[f"{name}{end}"]) for end in ("", "_low", "_high")))
                        for label, name in (
                            ("the smaller set", "subset_effect"),
                            ("the whole set", "set_effect"),
                            ("difference", "set_minus_subset"),
                        )
                    ],
                }
            )
    return blocks
