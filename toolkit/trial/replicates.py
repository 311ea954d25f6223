"""A set's features in dictionaries of other seeds: whether an effect is one dictionary's alone (METHOD.md 4d, V5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from rlgen_stats.schemas.dims import FEATURE
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, open_results
from rlgen_stats.stores.results import result_groups
from rlgen_stats.toolkit.crosscoder import Crosscoder, load_crosscoder
from rlgen_stats.toolkit.edits.edit import EditSite
from rlgen_stats.toolkit.statistics.causal.outcome_table import REPLICATE, Condition, Direction
from rlgen_stats.toolkit.trial.arms import Arm, main_dose, scaled_edit

MATCHING: Final = "matching"


@dataclass(frozen=True)
class Replicate:
    """A dictionary of another seed, and what the set is called there."""

    name: str
    crosscoder: Crosscoder
    features: tuple[int, ...]
    """Ids there of the set's features that are matched; the others have no counterpart."""


def find_replicates(spec: StudySpec, folder: StudyFolder, features: Sequence[int]) -> tuple[Replicate, ...]:
    """The primary crosscoder's other seeds with the set's matched features; none where they were not matched.

    Parameters
    ----------
    spec, folder
        The study; results ``matching`` are read.
    features
        The set, ids in the primary crosscoder.
    """
    primary = spec.primary_crosscoder
    if primary.replicates < 2 or MATCHING not in result_groups(folder.results):
        return ()
    rows = open_results(folder.results, MATCHING).sel({"crosscoder": primary.name, FEATURE: list(features)}).load()
    found = []
    for name in primary.names[1:]:
        row = rows.sel(replicate=name)
        ids = tuple(int(k) for k in row["match"].values[np.asarray(row["matched"].values, dtype=bool)])
        found.append(Replicate(name, load_crosscoder(folder.crosscoder(name)), ids))
    return tuple(found)


def replicate_arms(
    replicates: Sequence[Replicate], site: EditSite, direction: Direction, spec: StudySpec
) -> tuple[Arm, ...]:
    """One arm a dictionary: the set's counterparts, at the main dose, edited through that dictionary.

    Parameters
    ----------
    replicates
        As :func:`find_replicates` gives them.
    site
        Where the set itself is edited.
    direction, spec
        What is done, and the dose. With ``level="rl"`` nothing is amplified: levels are known of the primary
        dictionary's features only.
    """
    if direction == "amplify" and spec.intervention.level == "rl":
        return ()
    dose = main_dose(direction, spec.intervention)
    return tuple(
        Arm(
            Condition(f"{REPLICATE}-{one.name}", REPLICATE, dose),
            scaled_edit(one.features, dose, spec),
            site=replace(site, crosscoder=one.crosscoder),
        )
        for one in replicates
        if one.features
    )


def matched_words(replicates: Sequence[Replicate], n_features: int) -> tuple[str, ...]:
    """How much of the set each dictionary has."""
    return tuple(f"{one.name} has {len(one.features)} of {n_features} features" for one in replicates)
