"""Trials of other sets than the study's, and effects of single features, as plain rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import xarray as xr

from rlgen_stats.schemas.dims import of_dictionary, split_dictionary
from rlgen_stats.toolkit.reporting.arm_rows import arms_of
from rlgen_stats.toolkit.reporting.claims.c4_c5_causal import main_condition
from rlgen_stats.toolkit.reporting.formatting import interval, points
from rlgen_stats.toolkit.reporting.result_lookup import attr_list, attr_number, labels_of, number, text
from rlgen_stats.toolkit.statistics.causal.causal_equivalence import (
    DIFFERENT,
    EQUIVALENT,
    NO_EFFECT_SHOWN,
    UNDETERMINED,
)

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
                    "title": _title_of(group),
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


def _title_of(group: str) -> str:
    """What a trial is called; that of the study's own set by its dictionary."""
    family, number = split_dictionary(group)
    return f"the study’s set, dictionary {number}" if family == "trial-dictionary" else group.removeprefix(PREFIX)


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


_EDITS: Final = {
    ("disable", "set"): "switched off in {rl}",
    ("disable", "lower"): "lowered in {rl} to base’s level",
    ("amplify", "set"): "amplified in base",
    ("amplify", "lift"): "raised in base to {rl}’s level",
}
"""Direction and kind of arm -> what is done to a feature."""
_STATES: Final = {
    EQUIVALENT: "Its change does the same in both models",
    DIFFERENT: "Its change does not do the same in both models (which may be for want of room: accuracy is bounded)",
    UNDETERMINED: "Whether its change does the same in both models is open",
    NO_EFFECT_SHOWN: "Its change is not shown to do anything in either model, so there is nothing to compare",
}
"""State of causal equivalence -> beginning of its sentence."""


def of_first_dictionary(group: str) -> bool:
    """Whether the features of a trial are numbered as in the first dictionary."""
    return re.search(r"-in-\d+(-|$)|\.\d+$", group) is None


def in_dictionary(results: Mapping[str, xr.Dataset], dictionary: int) -> dict[str, xr.Dataset]:
    """Results as if a dictionary were the only one: its analyses and trials by the names that the first one's have."""
    if dictionary == 1:
        return dict(results)
    several = {stem for stem, number in map(split_dictionary, results) if number > 1}
    kept: dict[str, xr.Dataset] = {}
    for group, data in results.items():
        stem, number = split_dictionary(group)
        if group.startswith(PREFIX):
            name = re.sub(rf"-in-{dictionary}(?=-|$)", "", group)
            kept |= {"intervention": data} if group == of_dictionary(f"{PREFIX}dictionary", dictionary) else {}
            kept |= {name: data} if name != group else {}
        elif number == dictionary or (stem not in several and group != "intervention"):
            kept[stem] = data
    return kept


def single_trials(results: Mapping[str, xr.Dataset], rl: str) -> dict[int, list[dict[str, Any]]]:
    """``feature -> trials`` of it alone: ``trial``, ``edits`` with their arms, ``equivalence`` in words or empty."""
    trials: dict[int, list[dict[str, Any]]] = {}
    for group, data in results.items():
        features = attr_list(data, "features") if group.startswith(PREFIX) and "verdict" in data else []
        if len(features) != 1 or not of_first_dictionary(group):
            continue
        edits = [
            {"edit": _EDITS[direction, arm.kind].format(rl=rl), "arm": arm}
            for direction in labels_of(data, "direction")
            for arm in arms_of(data, direction)
            if (direction, arm.kind) in _EDITS
        ]
        same = equivalence_sentence(results.get(f"{group}-equivalence"))
        if edits:
            row = {"trial": group.removeprefix(PREFIX), "edits": edits, "equivalence": same}
            trials.setdefault(features[0], []).append(row)
    return trials


def equivalence_sentence(data: xr.Dataset | None) -> str:
    """Whether what is copied does the same in both models, with the numbers that say so; empty if not computed."""
    if data is None:
        return ""
    effects = {direction: points(number(data, "effect", direction=direction)) for direction in ("amplify", "disable")}
    outer, inner = (
        interval(number(data, f"{name}_low"), number(data, f"{name}_high"), scale=100, sign=True)
        for name in ("difference", "inner")
    )
    alpha, margin = attr_number(data, "alpha"), attr_number(data, "margin")
    return (
        f"{_STATES[text(data, 'state')]}: put into base {effects['amplify']} of accuracy, taken out of the RL model "
        f"{effects['disable']}; the two together {points(number(data, 'difference'))}, {100 * (1 - alpha):g}% {outer}, "
        f"{100 * (1 - 2 * alpha):g}% {inner}, which is within ±{100 * margin:g} points where they are the same "
        f"({attr_number(data, 'n_prompts'):,.0f} trial prompts, clusters as units). Not corrected over features: of "
        "many that are tried, some come out the same, or not, by chance."
    )
