"""Which prompts a causal trial takes, and which arms: conditions and edits as data, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan, nan
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import DOMAIN, PROMPT, SPLIT, TASK, TRIAL
from rlgen_stats.schemas.seeds import content_hash, derive_seed
from rlgen_stats.schemas.study import ExtractionSpec, InterventionSpec, Readout, StudySpec
from rlgen_stats.toolkit.edits.edit import FeatureEdit, Positions
from rlgen_stats.toolkit.statistics.causal.controls import TINY
from rlgen_stats.toolkit.statistics.causal.criteria import MIN_DOSES
from rlgen_stats.toolkit.statistics.causal.edit_norms import EditNorm
from rlgen_stats.toolkit.statistics.causal.mediated_share import PATCH, SET, CurvePoint
from rlgen_stats.toolkit.statistics.causal.outcome_table import Condition, Direction

CONTROL_SHARE: Final = 0.25
"""Share of the prompts that every unrelated task gets at least, where it has as many and all together no more than
half: an accuracy loss beyond .05 is ruled out at level .05 only from 59 prompts without any loss on, and their even
share is often less."""
MOST_GAIN: Final = 10.0
"""Factor up to which copies of a random set are enlarged to the norm of another set's: what hardly differs between the
models is rounding error, not a direction."""
UNKNOWN_VECTOR: Final = (nan,)
"""Stands for a vector that only the models can tell (kinds ``steering`` and ``random_direction``) until the run fills
it in; hooks refuse it, because no model has one channel."""


RANDOM_KINDS: Final = ("random", "rescaled")
"""Kinds of arm that edit matched random sets: there are many, and their divergences are measured on fewer texts."""
EDITED: Final[Mapping[Direction, str]] = {"disable": "rl", "amplify": "base"}
"""The model that each direction edits; the other one is what it is compared with."""
COPYING: Final[dict[Direction, str]] = {"amplify": "lift", "disable": "lower"}
"""What copying the other model's features is called: base's go up to the RL model's level, or the RL model's down."""


@dataclass(frozen=True)
class Site:
    """Where an edit reads and writes, as data: what the run loads."""

    crosscoder: Path
    """Folder of the crosscoder."""
    weights_sha256: str
    """Hash of its weights when the trial was planned."""
    view: str
    """View whose decoder rows are added: base's when editing base, the RL model's when editing that."""
    layer: int
    """Decoder block whose output is edited."""
    readout: Readout
    """How the edited model's features are read from the shared code."""


@dataclass(frozen=True)
class Arm:
    """One arm: its label, and the edit in force while it runs (None: the model as it is)."""

    condition: Condition
    edit: FeatureEdit | None
    fresh: bool = False
    """Whether the sampling seeds are other than in all other arms."""

    @property
    def name(self) -> str:
        """Name, also of its file."""
        return self.condition.name

    @property
    def reads_features(self) -> bool:
        """Whether its edit looks at or changes features, so that it depends on the dictionary."""
        return self.edit is not None and self.edit.kind not in ("add_vector", PATCH)

    @property
    def copies(self) -> bool:
        """Whether its edit copies from the other model."""
        return self.edit is not None and self.edit.needs_source

    @property
    def needs_vector(self) -> bool:
        """Whether its vector is still to be filled in."""
        return self.edit is not None and any(isnan(value) for value in self.edit.vector[:1])

    def with_vector(self, vector: NDArray[np.float64]) -> Arm:
        """The arm that adds this vector (raw units, [channel])."""
        if self.edit is None:
            raise ValueError(f"arm {self.name} adds no vector.")
        return replace(self, edit=replace(self.edit, vector=tuple(map(float, vector))))


def choose_prompts(prompts: pd.DataFrame, spec: StudySpec) -> pd.DataFrame:
    """Trial prompts of all tasks, evenly, by a hash of the prompt's id; outcomes play no part.

    Parameters
    ----------
    prompts
        Prompt table of the study.
    spec
        ``intervention.max_prompts`` and ``selection.control_tasks`` are used. Each control task gets
        ``CONTROL_SHARE`` at least, all together at most half; what a task cannot fill goes to the others.

    Returns
    -------
    DataFrame
        Rows of ``prompts`` in their order.
    """
    pool = prompts[prompts[SPLIT] == TRIAL]
    order = pool[PROMPT].map(lambda prompt: derive_seed(spec.seed, "intervention prompt", prompt))
    queues = {
        str(task): list(order.loc[group.index].sort_values().index) for task, group in pool.groupby(TASK, sort=True)
    }
    controls = [task for task in queues if task in spec.selection.control_tasks]
    others = [task for task in queues if task not in controls]
    limit = spec.intervention.max_prompts
    even = round(limit * len(controls) / max(len(queues), 1))
    reserved = max(even, round(min(CONTROL_SHARE * len(controls), 0.5) * limit)) if controls else 0
    available = sum(len(queues[task]) for task in controls)
    taken = _deal([queues[task] for task in others], limit - min(reserved, available))
    taken += _deal([queues[task] for task in controls], limit - len(taken))
    return prompts.loc[sorted(taken)].reset_index(drop=True)


def _deal(queues: Sequence[list[int]], limit: int) -> list[int]:
    """Take one from each queue in turn until ``limit`` are taken or all are empty."""
    taken: list[int] = []
    depth = max((len(queue) for queue in queues), default=0)
    for i in range(depth):
        taken += [queue[i] for queue in queues if i < len(queue)]
    return taken[: max(limit, 0)]


def target_prompts(prompts: pd.DataFrame, spec: StudySpec) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """[prompt] masks of where the effect is measured and of where side effects are.

    The effect is measured on out-of-domain tasks that are no controls (all tasks but controls where none is out of
    domain), side effects on control tasks.
    """
    unrelated = prompts[TASK].isin(spec.selection.control_tasks).to_numpy(dtype=bool)
    outside = (prompts[DOMAIN] == "out").to_numpy(dtype=bool) & ~unrelated
    return (outside if outside.any() else ~unrelated), unrelated


def dose_grid(direction: Direction, spec: InterventionSpec) -> tuple[float, ...]:
    """Doses beside the main one: the spec's, and quarters of the way to it if fewer than ``MIN_DOSES`` lie between."""
    main = main_dose(direction, spec)
    doses = {float(dose) for dose in spec.doses} - {main, 1.0}
    if len(intermediate_doses(doses, main)) < MIN_DOSES:
        doses |= {1.0 + share * (main - 1.0) for share in (0.25, 0.5, 0.75)}
    return tuple(sorted(doses))


def intermediate_doses(doses: Iterable[float], main: float) -> tuple[float, ...]:
    """Those strictly between no edit (1) and the main dose."""
    return tuple(dose for dose in doses if min(main, 1.0) < dose < max(main, 1.0))


def main_dose(direction: Direction, spec: InterventionSpec) -> float:
    """Multiplier of the set's own arm: 0 when disabling, ``intervention.amplify`` when amplifying."""
    return 0.0 if direction == "disable" else float(spec.amplify)


def edited_positions(spec: ExtractionSpec) -> Positions:
    """Positions edited: those whose activations the crosscoder was trained on."""
    if set(spec.segments) == {"prompt", "completion"}:
        return "all"
    return "prompt" if spec.segments == ("prompt",) else "completion"


def _where(spec: StudySpec) -> dict[str, Any]:
    return {"positions": edited_positions(spec.extraction), "skip_first": spec.extraction.skip_first}


def scaled_edit(
    features: Sequence[int], dose: float, spec: StudySpec, levels: NDArray[np.float64] | None = None
) -> FeatureEdit:
    """Features at a dose, where the study edits.

    Parameters
    ----------
    features
        Ids.
    dose
        0 disables, 1 is no edit.
    spec
        Edited positions.
    levels
        [feature] of the whole dictionary: what ``dose - 1`` multiplies instead of the features' own activations.
    """
    ids = tuple(int(k) for k in features)
    if levels is not None:
        return FeatureEdit(ids, "amplify", dose, level=tuple(levels[list(ids)].tolist()), **_where(spec))
    if dose == 0.0:
        return FeatureEdit(ids, "disable", **_where(spec))
    return FeatureEdit(ids, "amplify", dose, **_where(spec))


def plan_arms(
    direction: Direction,
    features: Sequence[int],
    controls: NDArray[np.int64],
    spec: StudySpec,
    *,
    steering: NDArray[np.float64] | None = None,
    random_direction: NDArray[np.float64] | None = None,
    levels: NDArray[np.float64] | None = None,
    gains: Sequence[float] = (),
) -> tuple[Arm, ...]:
    """All arms of a direction but the unedited one and those that copy features of the other model.

    Parameters
    ----------
    direction
        What is done to the set.
    features
        The set.
    controls
        [control, member] matched random sets.
    spec
        Doses, main dose, edited positions.
    steering
        [channel] mean residual of the RL model minus that of base, raw units; added to base, subtracted from the RL
        model. None if not known yet (``UNKNOWN_VECTOR``). A zero vector has no arms.
    random_direction
        [channel] vector of the same norm, or None.
    levels
        As in :func:`scaled_edit`, for set, doses and random sets.
    gains
        Factors that give the edits of the first random sets the norm of the set's; 0 where none does.

    Returns
    -------
    tuple of Arm
        fresh, passthrough, set, dose-*, steering, random-direction, patch, rescaled-001..., random-001...
    """
    main, where = main_dose(direction, spec.intervention), _where(spec)
    chosen = tuple(int(k) for k in features)

    def shift(vector: NDArray[np.float64] | None) -> FeatureEdit:
        sign = 1.0 if direction == "amplify" else -1.0
        channels = UNKNOWN_VECTOR if vector is None else tuple(map(float, vector))
        return FeatureEdit((), "add_vector", sign, vector=channels, **where)

    arms = [
        Arm(Condition("fresh", "fresh", 1.0), None, fresh=True),
        Arm(Condition("passthrough", "passthrough", 1.0), FeatureEdit((), "passthrough", **where)),
        Arm(Condition("set", "set", main), scaled_edit(chosen, main, spec, levels)),
    ]
    arms += [
        Arm(Condition(f"dose-{d:g}", "dose", d), scaled_edit(chosen, d, spec, levels))
        for d in dose_grid(direction, spec.intervention)
    ]
    if steering is None or np.linalg.norm(steering) > 0:
        arms.append(Arm(Condition("steering", "steering", 1.0), shift(steering)))
        arms.append(Arm(Condition("random-direction", "random_direction", 1.0), shift(random_direction)))
    arms.append(Arm(Condition(PATCH, PATCH, 1.0), FeatureEdit((), PATCH, **where)))
    random = [scaled_edit(tuple(map(int, row)), main, spec, levels) for row in controls]
    for number, (edit, gain) in enumerate(zip(random, gains, strict=False), start=1):
        if gain > 0:
            arms.append(Arm(Condition(f"rescaled-{number:03d}", "rescaled", main), replace(edit, gain=gain)))
    for number, edit in enumerate(random, start=1):
        arms.append(Arm(Condition(f"random-{number:03d}", "random", main), edit))
    return tuple(arms)


@dataclass(frozen=True, eq=False)
class CopiedSet:
    """Features to be copied from the other model, and random sets of their number."""

    label: str
    """``set``, ``top-K`` or ``all``."""
    features: tuple[int, ...]
    random: NDArray[np.int64]
    """[control, member]."""
    rescaled: bool = False
    """Whether the random sets' edits are given the norm of this one's: none of their own is as large."""


def copying_arms(
    direction: Direction, sets: Sequence[CopiedSet], spec: StudySpec, norm: EditNorm, difference: float
) -> tuple[tuple[Arm, ...], tuple[CurvePoint, ...]]:
    """Arms that copy features of the other model on the same text, and what the curve of mediated shares reads of them.

    Parameters
    ----------
    direction
        Which model is edited.
    sets
        What is copied.
    spec
        Edited positions.
    norm
        Measures these edits.
    difference
        Mean norm of the difference between the models, raw units.

    Returns
    -------
    arms, points
        lift, lift-random-1..., lift-top-K, lift-top-K-random-1..., lift-all, or with ``lower`` in the RL model; of
        random sets that are rescaled lift-rescaled-1..., those left out that ``MOST_GAIN`` does not suffice for.
    """
    arms: list[Arm] = []
    points: list[CurvePoint] = []

    def arm(name: str, kind: str, features: Sequence[int], gain: float = 1.0) -> str:
        ids = tuple(int(k) for k in features)
        arms.append(Arm(Condition(name, kind, 1.0), FeatureEdit(ids, "lift", gain=gain, **_where(spec))))
        return name

    for copied in sets:
        of_set = copied.label == SET
        name = COPYING[direction] + ("" if of_set else f"-{copied.label}")
        own = arm(name, COPYING[direction] if of_set else "curve", copied.features)
        kind, how = "lift_random" if of_set else "curve_random", "rescaled" if copied.rescaled else "random"
        size, *sizes = norm.of_each((copied.features, *copied.random))
        gains = [size / max(one, TINY) if copied.rescaled else 1.0 for one in sizes]
        beside = [
            (arm(f"{name}-{how}-{i}", kind, row, gain), gain * one)
            for i, (row, one, gain) in enumerate(zip(copied.random, sizes, gains, strict=True), start=1)
            if gain <= MOST_GAIN
        ]
        points.append(
            CurvePoint(
                copied.label,
                len(copied.features),
                own,
                tuple(random for random, _ in beside),
                size / difference if difference else nan,
                tuple(one / difference if difference else nan for _, one in beside),
                copied.rescaled,
            )
        )
    return tuple(arms), tuple(points)


UNEDITED: Final = Arm(Condition("unedited", "unedited", 1.0), None)
"""The model as it is."""


def part_arm(set_arm: Arm, features: Sequence[int]) -> Arm:
    """The arm that edits some features of a set as ``set_arm`` edits all; the same features always get one name."""
    if set_arm.edit is None:
        raise ValueError(f"arm {set_arm.name} edits no features.")
    members, levels = set_arm.edit.features, set_arm.edit.level
    kept = [i for i, k in enumerate(members) if k in features]
    left_out = [k for k in members if k not in features]
    if not left_out:
        return set_arm
    ids = [members[i] for i in kept]
    if len(ids) == 1:
        name = f"single-{ids[0]}"
    elif len(left_out) == 1:
        name = f"without-{left_out[0]}"
    else:
        name = f"subset-{content_hash(ids)[:12]}"
    edit = replace(set_arm.edit, features=tuple(ids), level=tuple(levels[i] for i in kept) if levels else ())
    return Arm(Condition(name, "part", set_arm.condition.dose), edit)


def part_arms(set_arm: Arm) -> tuple[Arm, ...]:
    """Every feature alone and every feature left out, each arm once."""
    members = () if set_arm.edit is None else set_arm.edit.features
    arms = [part_arm(set_arm, (k,)) for k in members]
    arms += [part_arm(set_arm, [other for other in members if other != k]) for k in members if len(members) > 1]
    return tuple({arm.name: arm for arm in arms if arm.condition.kind == "part"}.values())
