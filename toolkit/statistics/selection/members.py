"""The features that a selection chose, and the prompts on which they may be described."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import FEATURE, SPLIT
from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.statistics.core.comparability import check_comparable
from rlgen_stats.toolkit.statistics.core.coordinates import feature_coord, in_split
from rlgen_stats.toolkit.statistics.kernels.numerics import IntArray
from rlgen_stats.toolkit.statistics.selection.task_prompts import split_hash

Members = Literal["selected", "candidate", "paper", "stable"]
"""Features of a selection by how they were chosen; all but ``selected`` by the selection part alone."""

_INDEPENDENT: Final = "verification prompts took no part in choosing these features"
_CONFIRMED: Final = (
    "these features also passed a test on the verification prompts, so values are a little optimistic; "
    "members='candidate' is free of that"
)


@dataclass(frozen=True)
class SelectedMembers:
    """Features of a selection, in order of rank, and the prompts on which they may be described."""

    features: IntArray
    """Positions in the features."""
    rows: IntArray
    """Positions in the selection."""
    labels: NDArray[Any]
    """Feature labels."""
    prompts: NDArray[np.bool_]
    """Verification prompts."""
    conditioned: str
    """Whether the verification prompts took part in choosing the features, as a sentence."""


def selected_members(features: xr.Dataset, selection: xr.Dataset, split: str, members: str) -> SelectedMembers:
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
        If effects are asked for on prompts that helped to choose, the split or the crosscoder differs, or there is no
        such feature.
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
    if members == "candidate":
        is_member = np.isin(column.astype(np.str_), ["CONFIRMED", "CANDIDATE"])
    else:
        is_member = np.asarray(column, dtype=bool)
    if not is_member.any():
        raise RefusedError(
            f"the selection has no {members} feature to describe (rule: {selection.attrs.get('rule')}); "
            f"choose other members of {list(known)}."
        )
    order = np.lexsort((selection[FEATURE].values, selection["rank"].values))
    rows = order[is_member[order]]
    chosen = selection[FEATURE].values[rows]
    labels = feature_coord(features)[FEATURE][1]
    missing = np.setdiff1d(chosen, labels)
    if len(missing):
        raise InputError(f"feature {missing[0]} of the selection is not in the features; open all features.")
    by_label = np.argsort(labels, kind="stable")
    confirmed = members == "selected" and str(selection.attrs.get("rule")) == "CONFIRMED"
    return SelectedMembers(
        features=by_label[np.searchsorted(labels, chosen, sorter=by_label)].astype(np.int64),
        rows=rows.astype(np.int64),
        labels=chosen,
        prompts=in_split(features, split),
        conditioned=_CONFIRMED if confirmed else _INDEPENDENT,
    )


def selection_unit(selection: xr.Dataset) -> tuple[str, str | None]:
    """Unit of a selection (prompt or token) and the label of its clusters, if it had any."""
    unit = str(selection.attrs.get("unit", "prompt"))
    return (unit, None) if unit in ("prompt", "token") else ("prompt", unit)
