"""What a trial would cost, before it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import Provenance, StudyFolder
from rlgen_stats.toolkit.statistics.causal.outcome_table import Direction
from rlgen_stats.toolkit.trial.arms import DIRECTIONS, UNEDITED, Arm, plan_arms
from rlgen_stats.toolkit.trial.parts import n_search_sets, part_arms
from rlgen_stats.toolkit.trial.replicates import replicate_arms
from rlgen_stats.toolkit.trial.verify_causally import edit_site, make_bench, prepare

NEEDS_MODELS = ("steering", "random_direction")
"""Arms whose vector is computed from the models; that their file is there is all that can be said without them."""


@dataclass(frozen=True)
class TrialPlan:
    """What a trial runs at most; early stopping may spare random sets."""

    features: tuple[int, ...]
    n_prompts: int
    n_samples: int
    n_controls: int
    arms: dict[str, int]
    """Arms of each direction."""
    stored: dict[str, int]
    """Of these, arms that have been run already."""
    max_new_tokens: int
    why_not: str
    """Why the trial cannot be held, if so; or why it has no controls."""

    @property
    def completions(self) -> int:
        """Completions still to be sampled."""
        return (sum(self.arms.values()) - sum(self.stored.values())) * self.n_prompts * self.n_samples


def plan_trial(
    spec: StudySpec,
    folder: StudyFolder,
    features: Sequence[int],
    *,
    provenance: Provenance,
    directions: Sequence[Direction] = DIRECTIONS,
    name: str = "",
    by_feature: bool = False,
) -> TrialPlan:
    """Count a trial's arms and completions; loads no model.

    Parameters
    ----------
    spec, folder, features, provenance, directions, name
        As in :func:`verify_causally`.
    by_feature
        Whether :func:`feature_effects` is to follow.

    Raises
    ------
    InputError
        If a feature does not exist.
    """
    n_samples, limit = spec.intervention.n_samples, spec.generation.max_new_tokens
    trial = prepare(spec, folder, features)
    if isinstance(trial, str):
        return TrialPlan(tuple(map(int, features)), 0, n_samples, 0, {}, {}, limit, trial)
    sets = np.empty((0, len(trial.chosen)), dtype=np.int64) if trial.controls is None else trial.controls.sets
    unknown = np.ones(1)  # stands for a vector that only the models can tell
    bench = make_bench(trial, folder, provenance, None, name)
    arms: dict[str, int] = {}
    stored: dict[str, int] = {}
    for direction in directions:
        levels, site = trial.levels_of(direction), edit_site(trial, direction)
        vectors = {"steering": unknown, "random_direction": unknown}
        others = replicate_arms(trial.replicates, site, direction, spec)
        planned: tuple[Arm, ...] = (
            UNEDITED,
            *plan_arms(direction, trial.chosen, sets, spec, levels=levels, replicates=others, **vectors),
            *(part_arms(trial, direction) if by_feature else ()),
        )
        arms[direction] = len(planned) + (n_search_sets(len(trial.chosen)) if by_feature else 0)
        stored[direction] = sum(
            bench.place(direction, arm).exists()
            if arm.condition.kind in NEEDS_MODELS
            else bench.is_stored(direction, site, arm)
            for arm in planned
        )
    return TrialPlan(trial.chosen, len(trial.prompts), n_samples, len(sets), arms, stored, limit, trial.why)
