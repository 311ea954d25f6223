"""The arms of the causal verification as plain rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import xarray as xr

from rlgen_stats.toolkit.reporting.result_lookup import labels_of

_KIND_LABELS: Final = {
    "set": "the set",
    "passthrough": "passthrough (no-op)",
    "fresh": "fresh seeds",
    "unedited": "unedited",
    "steering": "mean-shift steering",
    "random_direction": "random direction",
    "lift": "activation patching from RL",
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
    "lift",
    "random",
)
"""Kinds of arm in reading order."""
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


@dataclass(frozen=True)
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
        """Lower end of the effect's interval, on top of the unedited model's accuracy."""
        return self.accuracy - self.effect + self.effect_low

    @property
    def accuracy_high(self) -> float:
        """Upper end of the effect's interval, on top of the unedited model's accuracy."""
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
    kinds, shares = arms["kind"].values, np.asarray(arms["class_share"].values, dtype=float)
    return [
        Arm(
            direction,
            condition,
            str(kinds[i]),
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
