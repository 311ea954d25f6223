"""Tasks and their roles, greedy correctness, and the prompts of each task by outcome in a part of the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import DOMAIN, MODEL, PROMPT, SELECTION, SPLIT, TASK, VERIFICATION
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.toolkit.statistics.core.coordinates import in_split
from rlgen_stats.toolkit.statistics.kernels.numerics import IntArray

_DOMAIN_ROLES: Final = {"in": "in_domain", "out": "out_of_domain"}


@dataclass(frozen=True)
class TaskRoles:
    """Tasks in order of appearance, their roles, which are selected on, and the task of every prompt."""

    tasks: list[str]
    roles: list[str]
    """``in_domain``, ``out_of_domain``, ``held_out`` or ``control``."""
    used: dict[str, bool]
    """Task -> whether features are selected on it."""
    of_prompt: NDArray[np.str_]


@dataclass(frozen=True)
class TaskPrompts:
    """Indices of one task's prompts in one part of the split; gains and losses are the discordant ones."""

    gain: IntArray
    """Base wrong, target right."""
    loss: IntArray
    """Base right, target wrong."""
    kept: IntArray
    """Both right."""
    every: IntArray
    """All, whatever the outcome."""

    def __or__(self, other: TaskPrompts) -> TaskPrompts:
        """The prompts of two parts of the split together."""
        pairs = ((self.gain, other.gain), (self.loss, other.loss), (self.kept, other.kept), (self.every, other.every))
        return TaskPrompts(*(np.union1d(*pair) for pair in pairs))


def assign_roles(
    features: xr.Dataset, tasks: Sequence[str] | None, held_out: Sequence[str], controls: Sequence[str]
) -> TaskRoles:
    """Tasks, roles, and which tasks are selected on.

    Raises
    ------
    InputError
        If a task is unknown, or both selected on and held out.
    """
    of_prompt = np.asarray(features[TASK].values).astype(np.str_)
    domain_of_prompt = np.asarray(features[DOMAIN].values).astype(np.str_)
    known = [str(task) for task in dict.fromkeys(of_prompt)]
    for name in (*(tasks or ()), *held_out, *controls):
        if name not in known:
            raise InputError(f"task {name!r} is not in the data; expected one of {known}.")
    clash = set(tasks or ()) & {*held_out, *controls}
    if clash:
        raise InputError(f"task {min(clash)!r} cannot be selected on and held out or a control; name it once.")
    used = set(tasks) if tasks is not None else set(known) - {*held_out, *controls}
    domains = {task: str(domain_of_prompt[of_prompt == task][0]) for task in known}
    roles = [
        "control" if task in controls else "held_out" if task in held_out else _DOMAIN_ROLES[domains[task]]
        for task in known
    ]
    return TaskRoles(known, roles, {task: task in used for task in known}, of_prompt)


def greedy_correctness(features: xr.Dataset, outcomes: xr.Dataset, models: list[str]) -> IntArray:
    """Whether greedy answers are correct, [model, prompt] in the order of the features' prompts; -1: not graded.

    Raises
    ------
    InputError
        If a model or a prompt has no outcomes.
    """
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


def prompts_by_task(roles: TaskRoles, correct: IntArray, inside: NDArray[np.bool_]) -> dict[str, TaskPrompts]:
    """Prompts of each task by outcome, among those ``inside``; ``correct`` is [base, target][prompt]."""
    prompts = {}
    for task in roles.tasks:
        of_task = inside & (roles.of_prompt == task)
        gain = of_task & (correct[0] == 0) & (correct[1] == 1)
        loss = of_task & (correct[0] == 1) & (correct[1] == 0)
        kept = of_task & (correct[0] == 1) & (correct[1] == 1)
        prompts[task] = TaskPrompts(*(np.flatnonzero(part) for part in (gain, loss, kept, of_task)))
    return prompts


def shared_clusters(features: xr.Dataset, codes: IntArray | None) -> int:
    """Number of clusters with selection and verification prompts, where confirmation depends on selection."""
    if codes is None:
        return 0
    selection, verification = (set(codes[in_split(features, split)].tolist()) for split in (SELECTION, VERIFICATION))
    return len(selection & verification)


def split_hash(features: xr.Dataset) -> str:
    """Content hash of which prompts are in which part of the split, whatever their order."""
    prompts = np.asarray(features[PROMPT].values).astype(np.str_)
    split = np.asarray(features[SPLIT].values).astype(np.str_)
    return content_hash({str(name): sorted(map(str, prompts[split == name])) for name in sorted(set(split))})
