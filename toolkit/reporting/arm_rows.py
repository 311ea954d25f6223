"""The arms of the causal verification, what they change and their side effects, as plain rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr

from rlgen_stats.toolkit.reporting.claims.c4_c5_causal import CHECKS
from rlgen_stats.toolkit.reporting.formatting import count
from rlgen_stats.toolkit.reporting.result_lookup import labels_of, number, text
from rlgen_stats.toolkit.statistics.causal.findings import Check

_KIND_LABELS: Final = {
    "set": "the set",
    "passthrough": "passthrough",
    "fresh": "fresh seeds",
    "unedited": "unedited",
    "steering": "mean-shift steering",
    "random_direction": "random direction",
    "patch": "full patch of the site",
    "lift": "the set lifted to the RL model's level",
    "lower": "the set lowered to base's level",
}
"""Labels of the kinds of arm that occur once; the other kinds are labelled by their condition."""

ARM_ORDER: Final = (
    "unedited",
    "fresh",
    "passthrough",
    "set",
    "dose",
    "replicate",
    "steering",
    "random_direction",
    "patch",
    "lift",
    "lower",
    "random",
    "rescaled",
)
"""Kinds of arm in reading order."""
CLAIM_OF: Final = {"disable": "C4", "amplify": "C5"}
"""Direction -> claim on it."""
RANDOM_KINDS: Final = {"random": "", "rescaled": " at the set's edit norm"}
"""Kinds of arm that are shown together, and what is said after the number of random sets."""
_NUMBERS: Final = (
    "dose",
    "accuracy",
    "effect",
    "effect_low",
    "effect_high",
    "p_value",
    "kl_to_base",
    "kl_to_rl",
    "length",
)
"""Variables of the dataset that an :class:`Arm` holds."""

_SIDE_EFFECTS: Final = (
    "unrelated_accuracy",
    "unrelated_effect",
    "unrelated_low",
    "unrelated_high",
    "unrelated_broken",
    "unrelated_length",
    "neutral_kl",
)
"""Variables of an arm's side effects."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One condition of one direction."""

    direction: str
    condition: str
    kind: str
    dose: float
    accuracy: float
    effect: float
    effect_low: float
    effect_high: float
    p_value: float
    kl_to_base: float
    kl_to_rl: float
    length: float
    shares: np.ndarray
    """Share of completions in each class."""

    @property
    def accuracy_low(self) -> float:
        """Lower end of the effect's interval, added to the unedited model's accuracy."""
        return self.accuracy - self.effect + self.effect_low

    @property
    def accuracy_high(self) -> float:
        """Upper end of the effect's interval, added to the unedited model's accuracy."""
        return self.accuracy - self.effect + self.effect_high

    @property
    def has_dose(self) -> bool:
        """Whether the arm multiplies activations of features."""
        return self.kind in ("set", "dose", "replicate", "random")

    @property
    def label(self) -> str:
        """Name for a table or an axis."""
        if self.kind == "replicate":
            return f"set in {self.condition.removeprefix('replicate-')}"
        return _KIND_LABELS.get(self.kind, self.condition.replace("_", " ").replace("-", " "))


def arms_of(data: xr.Dataset, direction: str) -> list[Arm]:
    """Arms of a direction that were run, in the dataset's order."""
    arms = data.isel(direction=labels_of(data, "direction").index(direction))
    values = {name: np.asarray(arms[name].values, dtype=float) for name in _NUMBERS}
    for name in ("kl_to_base", "kl_to_rl"):  # over whole completions, as V6 judges it, where these were read
        forced = arms.get(f"forced_{name}")
        if forced is not None and np.isfinite(forced.values).any():
            values[name] = np.asarray(forced.values, dtype=float)
    kinds, shares = arms["kind"].values, np.asarray(arms["class_share"].values, dtype=float)
    return [
        Arm(
            direction=direction,
            condition=condition,
            kind=str(kinds[i]),
            **{name: float(column[i]) for name, column in values.items()},
            shares=shares[i],
        )
        for i, condition in enumerate(labels_of(data, "condition"))
        if np.isfinite(values["accuracy"][i])
    ]


def in_order(arms: list[Arm]) -> list[Arm]:
    """Arms as the table and the figure show them: unedited and its reruns, the set, other doses, baselines, random."""
    place = {kind: i for i, kind in enumerate(ARM_ORDER)}
    return sorted(arms, key=lambda arm: (place.get(arm.kind, len(place)), arm.dose))


def random_band(arms: list[Arm]) -> dict[float, tuple[float, float, float]]:
    """``dose -> (smallest, median, largest)`` accuracy of the random sets."""
    doses: dict[float, list[float]] = {}
    for arm in arms:
        if arm.kind == "random":
            doses.setdefault(arm.dose, []).append(arm.accuracy)
    return {dose: (min(values), float(np.median(values)), max(values)) for dose, values in doses.items()}


def direction_blocks(data: xr.Dataset | None) -> list[dict[str, Any]]:
    """Per direction: verdict, checks, arms in reading order, summaries of the random sets, side effects.

    ``no_op``: whether the passthrough arm changed no completion, so that its effect is zero and not estimated.
    """
    if data is None:
        return []
    blocks = []
    for direction in labels_of(data, "direction"):
        arms = arms_of(data, direction)
        blocks.append(
            {
                "direction": direction,
                "verdict": text(data, "verdict", direction=direction),
                "checks": {label: text(data, check, direction=direction) for check, label in CHECKS.items()},
                "arms": [arm for arm in in_order(arms) if arm.kind not in RANDOM_KINDS],
                "random": [
                    _random_summary(label, random)
                    for kind, label in RANDOM_KINDS.items()
                    if (random := [arm for arm in arms if arm.kind == kind])
                ],
                "side_effects": side_effect_rows(data, direction),
                "no_op": number(data, "criterion_statistic", direction=direction, criterion=Check.PASSTHROUGH) == 0,
            }
        )
    return blocks


def _random_summary(label: str, arms: list[Arm]) -> dict[str, Any]:
    """Median and range of random sets, the interval of a single one; means where only a rough size matters."""
    accuracy, effect = (np.array([getattr(arm, name) for arm in arms]) for name in ("accuracy", "effect"))
    several = len(arms) > 1
    return {
        "label": f"{count(len(arms), 'random set')}{label}",
        "several": several,
        "accuracy": float(np.median(accuracy)),
        "low": float(effect.min()) if several else arms[0].effect_low,
        "high": float(effect.max()) if several else arms[0].effect_high,
        "effect": float(np.median(effect)),
        "kl_to_base": _mean([arm.kl_to_base for arm in arms]),
        "kl_to_rl": _mean([arm.kl_to_rl for arm in arms]),
        "length": float(np.nanmean([arm.length for arm in arms])),
        "shares": np.nanmean([arm.shares for arm in arms], axis=0),
    }


def _mean(values: list[float]) -> float:
    """Mean of those that are known, NaN of none."""
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def side_effect_rows(data: xr.Dataset, direction: str) -> list[dict[str, Any]]:
    """One row per arm, random sets together in one; empty where no task is unrelated."""
    if any(name not in data for name in _SIDE_EFFECTS):
        return []
    arms = in_order(arms_of(data, direction))
    single = [arm for arm in arms if arm.kind not in RANDOM_KINDS]
    rows = [_side_effects(data, [arm]) | {"label": arm.label, "kind": arm.kind} for arm in single]
    for kind, label in RANDOM_KINDS.items():
        random = [arm for arm in arms if arm.kind == kind]
        if random:
            name = f"{count(len(random), 'random set')}{label}"
            rows.append(_side_effects(data, random) | {"label": name, "kind": kind})
    return rows if any(np.isfinite(row["unrelated_accuracy"]) for row in rows) else []


def _side_effects(data: xr.Dataset, arms: list[Arm]) -> dict[str, Any]:
    """Values of one arm; of several arms their medians, with the range of effects in place of an interval."""
    values = {
        name: np.array([number(data, name, direction=arm.direction, condition=arm.condition) for arm in arms])
        for name in _SIDE_EFFECTS
    }
    several = len(arms) > 1
    row: dict[str, Any] = {name: float(np.median(column)) for name, column in values.items()} | {"several": several}
    if several:
        effects = values["unrelated_effect"]
        row |= {"unrelated_low": float(effects.min()), "unrelated_high": float(effects.max())}
    return row
