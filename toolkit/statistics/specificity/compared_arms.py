"""Arms that are compared: which dictionaries stand for each at which distance from base, and whether they fit alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import xarray as xr

from rlgen_stats.schemas.dims import BASE_MODEL, MODEL, RUN, VIEW, split_model_id
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray
from rlgen_stats.toolkit.statistics.specificity.decoder_norms import CROSSCODER
from rlgen_stats.toolkit.statistics.specificity.matched_movement import (
    MATCHED_RATIO,
    Mixture,
    checkpoint_to_add,
    equal,
    matched,
)

FVE_TOLERANCE: Final = 0.05
"""Largest difference in fraction of variance explained between crosscoders compared."""

L0_RATIO: Final = 1.25
"""Largest ratio of active features per token between crosscoders compared."""

DEAD_TOLERANCE: Final = 0.10
"""Largest difference in dead fraction: tail mass is a share of alive features."""

COMPARISON: Final = "comparison"
MEASURES: Final = {"matched_shift": "activation_shift", "matched_kl": "kl_from_base"}
"""Comparison -> the distance from base at which the runs are compared."""
COMPARISONS: Final = ("final", *MEASURES)
ARMS: Final = ("sft", "rl")
NOT_COMPARABLE: Final = "NOT_COMPARABLE"
COMPARABLE: Final = "COMPARABLE"


@dataclass(frozen=True)
class Arm:
    """One arm at one distance from base: dictionaries with weights, the same numbers of them in every mixture."""

    runs: tuple[Mixture, ...]
    names: Mapping[str, tuple[str, ...]]
    """Model -> its dictionaries."""

    def parts(self, dictionary: int) -> list[tuple[str, float]]:
        """Dictionaries of this number, with weights that sum to one."""
        return [
            (self.names[model][dictionary], weight / len(self.runs))
            for mixture in self.runs
            for model, weight in mixture.weights.items()
        ]

    @property
    def n_dictionaries(self) -> int:
        """Dictionaries that every checkpoint of the arm has."""
        return min(len(self.names[model]) for mixture in self.runs for model in mixture.weights)

    @property
    def distance(self) -> float:
        """From base; the mean over runs."""
        return float(np.mean([mixture.distance for mixture in self.runs]))

    def by_run(self) -> list[Arm]:
        """An arm of each run alone."""
        return [Arm((mixture,), self.names) for mixture in self.runs]

    def crosscoders(self) -> list[str]:
        """Names of all dictionaries that take part."""
        return [name for r in range(self.n_dictionaries) for name, _ in self.parts(r)]


def dictionaries_of(table: xr.Dataset, run: str) -> dict[str, tuple[str, ...]]:
    """Checkpoint of the run -> the dictionaries of the first crosscoder that compares it with base."""
    labels = [str(name) for name in table[CROSSCODER].values]
    numbers = table["dictionary"].values.tolist() if "dictionary" in table.coords else [1] * len(labels)
    originals = table["original"].values if "original" in table.coords else [BASE_MODEL] * len(labels)
    groups: dict[str, list[list[str]]] = {}
    for label, target, original, number in zip(labels, table["target"].values, originals, numbers, strict=True):
        if split_model_id(str(target))[0] != run or str(original) != BASE_MODEL:
            continue
        of_target = groups.setdefault(str(target), [])
        if number == 1:
            of_target.append([])
        of_target[-1].append(label)
    if not groups:
        raise InputError(
            f"run {run!r} has no crosscoder with base in the attribution table, whose crosscoders compare base with "
            f"{sorted({str(target) for target in table['target'].values})}."
        )
    return {target: tuple(of_target[0]) for target, of_target in groups.items()}


Distances = dict[str, dict[str, float]]
"""Run -> checkpoint -> distance from base."""


def distances_of(movement: xr.Dataset | None, comparison: str) -> Distances:
    """Distances of all checkpoints by the measure of a comparison; empty where it was not taken."""
    found: Distances = {}
    measure = MEASURES.get(comparison, "activation_shift")
    if movement is not None and measure in movement:
        for model, run, value in zip(
            movement[MODEL].values, movement[RUN].values, movement[measure].values, strict=True
        ):
            found.setdefault(str(run), {})[str(model)] = float(value)
    return found


@dataclass(frozen=True)
class Compared:
    """Both arms at the distances of one comparison, or why there are none."""

    arms: Mapping[str, Arm] | None
    problems: tuple[str, ...] = ()
    note: str = ""


def compare_arms(
    comparison: str,
    runs: Mapping[str, Sequence[str]],
    names: Mapping[str, Mapping[str, tuple[str, ...]]],
    distances: Distances,
) -> Compared:
    """The arms of a comparison.

    Parameters
    ----------
    comparison
        One of ``COMPARISONS``.
    runs
        Arm -> its runs.
    names
        Run -> checkpoint -> its dictionaries.
    distances
        By the comparison's measure.
    """
    make = _finals if comparison == "final" else _matched
    return make(comparison, runs, names, distances)


def _finals(
    comparison: str,
    runs: Mapping[str, Sequence[str]],
    names: Mapping[str, Mapping[str, tuple[str, ...]]],
    distances: Distances,
) -> Compared:
    mixtures = {}
    for run, of_run in names.items():
        final = max([*distances.get(run, {}), *of_run], key=lambda model: split_model_id(model)[1])
        if final not in of_run:
            return Compared(None, (f"no crosscoder compares base with {final}, the last checkpoint of {run}",))
        mixtures[run] = Mixture({final: 1.0}, distances.get(run, {}).get(final, math.nan))
    arms = {arm: Arm(tuple(mixtures[run] for run in of_arm), _union(names)) for arm, of_arm in runs.items()}
    sft, rl = (arms[arm].distance for arm in ARMS)
    if not distances:
        return Compared(arms, ("how far each run moved from base is not known",))
    if not (math.isfinite(sft) and math.isfinite(rl)):
        missing = next(
            m for mixture in mixtures.values() for m in mixture.weights if not math.isfinite(mixture.distance)
        )
        return Compared(arms, (f"no activation shift is recorded for {missing}",))
    facts = f"activation shift from base {sft:.3g} (SFT) and {rl:.3g} (RL)"
    each = [mixture.distance for mixture in mixtures.values()]
    if len(each) > len(arms):
        facts += f", of single runs {min(each):.3g} to {max(each):.3g},"
    if equal(min(each), max(each)):
        return Compared(arms, note=f"{facts}, within a factor {MATCHED_RATIO}")
    return Compared(arms, (f"{facts} differ by more than a factor {MATCHED_RATIO}",))


def _matched(
    comparison: str,
    runs: Mapping[str, Sequence[str]],
    names: Mapping[str, Mapping[str, tuple[str, ...]]],
    distances: Distances,
) -> Compared:
    measure = {"matched_shift": "activation shift", "matched_kl": "KL"}[comparison]
    with_dictionary = {
        run: {model: distances.get(run, {}).get(model, math.nan) for model in of_run} for run, of_run in names.items()
    }
    level, mixtures = matched(with_dictionary)
    if not level > 0:
        return Compared(None, (f"the {measure} of a run is not known or zero",))
    problems = []
    found: dict[str, Mixture] = {}
    for run, mixture in mixtures.items():
        if mixture is not None:
            found[run] = mixture
            continue
        add = checkpoint_to_add(distances[run], level)
        nearest = min(with_dictionary[run], key=lambda model: with_dictionary[run][model])
        remedy = (
            f"add a crosscoder with views [{BASE_MODEL}, {add}]"
            if add is not None
            else f"no checkpoint of {run} is so near to base: train it with schedule: geometric, or more slowly"
        )
        problems.append(
            f"at {measure} {level:.3g} there is no dictionary of {run} (the nearest, of {nearest}, is at "
            f"{with_dictionary[run][nearest]:.3g}); {remedy}"
        )
    if problems:
        return Compared(None, tuple(problems))
    arms = {arm: Arm(tuple(found[run] for run in of_arm), _union(names)) for arm, of_arm in runs.items()}
    at = " and ".join(f"{run} as {mixture.describe()}" for run, mixture in found.items())
    return Compared(arms, note=f"at {measure} {level:.3g} from base, {at}")


def _union(names: Mapping[str, Mapping[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    return {model: group for of_run in names.values() for model, group in of_run.items()}


def comparability(compared: Compared, table: xr.Dataset, health: xr.Dataset | None) -> str:
    """``COMPARABLE`` or ``NOT_COMPARABLE``, a colon, and the reasons: distance from base and parity of fit."""
    problems, notes = list(compared.problems), [compared.note] if compared.note else []
    if compared.arms:
        unequal, parity = _parity(table, compared.arms, health)
        problems, notes = problems + unequal, notes + parity
    return f"{NOT_COMPARABLE}: {'; '.join(problems)}" if problems else f"{COMPARABLE}: {'; '.join(notes)}"


def _parity(table: xr.Dataset, arms: Mapping[str, Arm], health: xr.Dataset | None) -> tuple[list[str], list[str]]:
    if health is None:
        return ["fit of the crosscoders (FVE, L0, dead fraction) is not known"], []
    known = [str(name) for name in health[CROSSCODER].values]
    missing = [name for arm in arms.values() for name in arm.crosscoders() if name not in known]
    if missing:
        return [f"crosscoder {missing[0]!r} has no health record"], []
    fits = [_fit(table, arms[arm], health) for arm in ARMS]
    fve, l0, dead = np.transpose(fits).tolist()
    problems = []
    if abs(fve[0] - fve[1]) > FVE_TOLERANCE:
        problems.append(f"FVE differs ({fve[0]:.3f} and {fve[1]:.3f}, tolerance {FVE_TOLERANCE})")
    if max(l0) > L0_RATIO * min(l0):
        problems.append(f"L0 differs ({l0[0]:.1f} and {l0[1]:.1f}, factor {L0_RATIO} allowed)")
    if abs(dead[0] - dead[1]) > DEAD_TOLERANCE:
        problems.append(f"dead fractions differ ({dead[0]:.2f} and {dead[1]:.2f}, tolerance {DEAD_TOLERANCE})")
    if not np.isfinite(fits).all():
        problems.append("a health value is missing")
    return problems, ["FVE, L0 and dead fraction at parity"]


def _fit(table: xr.Dataset, arm: Arm, health: xr.Dataset) -> FloatArray:
    """FVE of the target view, L0 and dead fraction, averaged as the arm's dictionaries are."""
    total = np.zeros(3)
    for r in range(arm.n_dictionaries):
        for name, weight in arm.parts(r):
            one = health.sel({CROSSCODER: name})
            target = str(table["target"].sel({CROSSCODER: name}).item())
            views = [str(view) for view in np.atleast_1d(one[VIEW].values)]
            fve = float(one["fve"].sel({VIEW: target})) if target in views else float("nan")
            total += weight / arm.n_dictionaries * np.array([fve, float(one["l0"]), float(one["dead_fraction"])])
    return total
