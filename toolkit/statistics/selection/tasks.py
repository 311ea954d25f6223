"""What selection starts from: tasks and their roles, graded outcomes, and the prompts on each side of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import DOMAIN, FEATURE, MODEL, PROMPT, SPLIT, SPLITS, TASK
from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.toolkit.statistics.core.comparability import check_comparable
from rlgen_stats.toolkit.statistics.core.coordinates import feature_coord, in_split
from rlgen_stats.toolkit.statistics.kernels.numerics import IntArray
from rlgen_stats.toolkit.statistics.selection.discordance import Sides


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


def shared_clusters(features: xr.Dataset, codes: IntArray | None) -> int:
    """Clusters with prompts on both sides of the split: confirmation is not independent of selection there."""
    if codes is None:
        return 0
    chosen, fresh = (set(codes[in_split(features, split)].tolist()) for split in SPLITS)
    return len(chosen & fresh)


def split_hash(features: xr.Dataset) -> str:
    """Content hash of which prompts are on which side of the split, whatever their order."""
    prompts = np.asarray(features[PROMPT].values).astype(np.str_)
    split = np.asarray(features[SPLIT].values).astype(np.str_)
    return content_hash({str(name): sorted(map(str, prompts[split == name])) for name in sorted(set(split))})


Members = Literal["selected", "candidate", "paper", "stable"]
"""Features of a selection by how they were chosen; all but ``selected`` by the selection half alone."""


@dataclass(frozen=True)
class Chosen:
    """Features of a selection and the prompts on which they may be described."""

    features: IntArray
    """Positions in the features, in the order of their ranks."""
    rows: IntArray
    """Positions in the selection, in the same order."""
    labels: NDArray[Any]
    """Feature labels, in the same order."""
    prompts: NDArray[np.bool_]
    """Verification prompts."""
    conditioned: str
    """What else was done with the verification prompts."""


def chosen_by(features: xr.Dataset, selection: xr.Dataset, split: str, members: str) -> Chosen:
    """Features that ``selection`` chose, and the prompts that did not help to choose them.

    Parameters
    ----------
    features
        The features the selection was made from, or others of the same prompts, split and crosscoder.
    selection
        Result of ``select_features``.
    split
        Only ``"verification"``.
    members
        ``selected``, ``candidate`` (CONFIRMED and CANDIDATE), ``paper`` or ``stable``.

    Raises
    ------
    RefusedError
        If effects are asked for on prompts that helped to choose, the split or the crosscoder is another one, or there
        is no such feature.
    InputError
        If ``selection`` is no selection, or a name is unknown.
    """
    if split in ("selection", "all"):
        raise RefusedError(
            f"split={split!r} would report effects on the prompts that chose the features, where they are too large "
            "by construction; use split='verification'."
        )
    known = get_args(Members)
    if split != "verification" or members not in known:
        raise InputError(
            f"expected split 'verification' and members one of {list(known)}, got {split!r} and {members!r}."
        )
    variable = {"candidate": "tier", "paper": "paper_selected", "stable": "stable"}.get(members, "selected")
    if variable not in selection or "split_hash" not in selection.attrs or SPLIT not in features.coords:
        raise InputError(
            f"expected the result of select_features with {variable!r} and features with the prompt label 'split', got "
            f"variables {sorted(map(str, selection.data_vars))[:5]} and labels {sorted(map(str, features.coords))}; "
            "give the selection made from these features."
        )
    check_comparable(features, selection)
    if split_hash(features) != selection.attrs["split_hash"]:
        raise RefusedError(
            "the prompts or their split are not those of the selection (split_hash differs), so prompts that chose the "
            "features could be among the verification prompts; open the features that the selection was made from."
        )
    column = selection[variable].values
    inside = (
        np.isin(column.astype(np.str_), ["CONFIRMED", "CANDIDATE"])
        if members == "candidate"
        else np.asarray(column, dtype=bool)
    )
    if not inside.any():
        raise RefusedError(
            f"the selection has no {members} feature to describe (rule: {selection.attrs.get('rule')}); "
            f"choose other members of {list(known)}."
        )
    order = np.lexsort((selection[FEATURE].values, selection["rank"].values))
    rows = order[inside[order]]
    wanted = selection[FEATURE].values[rows]
    labels = feature_coord(features)[FEATURE][1]
    missing = np.setdiff1d(wanted, labels)
    if len(missing):
        raise InputError(f"feature {missing[0]} of the selection is not in the features; open all features.")
    place = np.argsort(labels, kind="stable")
    confirmed = members == "selected" and str(selection.attrs.get("rule")) == "CONFIRMED"
    return Chosen(
        place[np.searchsorted(labels, wanted, sorter=place)].astype(np.int64),
        rows.astype(np.int64),
        wanted,
        in_split(features, split),
        _CONFIRMED if confirmed else _FREE,
    )


def selection_unit(selection: xr.Dataset) -> tuple[str, str | None]:
    """Unit of a selection (prompt or token) and the label of its clusters, if it had any."""
    unit = str(selection.attrs.get("unit", "prompt"))
    return (unit, None) if unit in ("prompt", "token") else ("prompt", unit)


_FREE: Final = "verification prompts took no part in choosing these features"
_CONFIRMED: Final = (
    "these features also passed a test on the verification prompts, so values are a little optimistic; "
    "members='candidate' is free of that"
)
