"""What selection starts from: tasks and their roles, graded outcomes, and the prompts on each side of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import DOMAIN, MODEL, PROMPT, SPLIT, TASK
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.toolkit.statistics.task_tests import Sides


@dataclass(frozen=True)
class Labels:
    """Tasks in order of appearance, their roles, which are selected on, and the task of every prompt."""

    tasks: list[str]
    roles: list[str]
    used: dict[str, bool]
    of_prompt: NDArray[np.str_]


def task_labels(
    features: xr.Dataset, tasks: Sequence[str] | None, held_out: Sequence[str], controls: Sequence[str]
) -> Labels:
    """Tasks, roles, and which tasks are selected on.

    Raises
    ------
    InputError
        If a task is unknown, or both selected on and held out.
    """
    of_prompt = np.asarray(features[TASK].values).astype(np.str_)
    domain = np.asarray(features[DOMAIN].values).astype(np.str_)
    there = [str(task) for task in dict.fromkeys(of_prompt)]
    for name in (*(tasks or ()), *held_out, *controls):
        if name not in there:
            raise InputError(f"task {name!r} is not in the data; expected one of {there}.")
    clash = set(tasks or ()) & {*held_out, *controls}
    if clash:
        raise InputError(f"task {min(clash)!r} cannot be selected on and held out or a control; name it once.")
    wanted = set(tasks) if tasks is not None else set(there) - {*held_out, *controls}
    domains = {task: str(domain[of_prompt == task][0]) for task in there}
    roles = [
        "control" if task in controls else "held_out" if task in held_out else _ROLES[domains[task]] for task in there
    ]
    return Labels(there, roles, {task: task in wanted for task in there}, of_prompt)


_ROLES: Final = {"in": "in_domain", "out": "out_of_domain"}


def greedy_right(features: xr.Dataset, outcomes: xr.Dataset, models: list[str]) -> NDArray[np.int64]:
    """Greedy outcome [base, target][prompt] in the order of the features' prompts; -1 where not graded."""
    absent = [model for model in models if model not in outcomes[MODEL].values]
    if absent:
        raise InputError(
            f"model {absent[0]!r} has no outcomes; they exist for {list(map(str, outcomes[MODEL].values))}."
        )
    missing = set(map(str, features[PROMPT].values)) - set(map(str, outcomes[PROMPT].values))
    if missing:
        raise InputError(f"{len(missing)} prompt(s) of the features have no outcome, e.g. {min(missing)!r}.")
    graded = outcomes["greedy_correct"].sel({MODEL: models, PROMPT: features[PROMPT].values})
    return np.asarray(graded.transpose(MODEL, PROMPT).values, dtype=np.int64)


def task_sides(labels: Labels, right: NDArray[np.int64], inside: NDArray[np.bool_]) -> dict[str, Sides]:
    """Prompts of each task in one split: gains, losses, and all."""
    out = {}
    for task in labels.tasks:
        here = inside & (labels.of_prompt == task)
        gain, loss = (here & (right[0] == b) & (right[1] == t) for b, t in ((0, 1), (1, 0)))
        out[task] = Sides(np.flatnonzero(gain), np.flatnonzero(loss), np.flatnonzero(here))
    return out


def split_hash(features: xr.Dataset) -> str:
    """Content hash of which prompts are on which side of the split, whatever their order."""
    prompts = np.asarray(features[PROMPT].values).astype(np.str_)
    split = np.asarray(features[SPLIT].values).astype(np.str_)
    return content_hash({str(name): sorted(map(str, prompts[split == name])) for name in sorted(set(split))})
