"""Selection of prompts by their labels: ``ds.sel(task="sciq", domain="out")``."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from xarray.core.indexing import IndexSelResult

from rlgen_stats.schemas.dims import PROMPT, PROMPT_LABELS
from rlgen_stats.schemas.errors import InputError


def selected_labels(legend: NDArray[Any], selection: object, name: str) -> NDArray[np.bool_]:
    """[code] whether the label in ``legend`` is the selected one, or one of them.

    Raises
    ------
    InputError
        If a selected label does not exist.
    """
    values = [selection] if isinstance(selection, str) else np.atleast_1d(np.asarray(selection)).astype(str).tolist()
    # By hashing: sorting, as numpy's isin does, or a set of a legend of a million prompts takes seconds.
    chosen = np.asarray(pd.Series(legend.astype(object)).isin(values))
    unknown = sorted(set(values) - set(legend[chosen].tolist()))
    if unknown:
        known = sorted(set(legend.tolist()))
        shown = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
        raise InputError(f"no {name} is called {unknown[0]!r}; there are {shown}.")
    return chosen


def label_values(value: object) -> Sequence[str] | str:
    """The argument of ``sel`` as a label or a list of labels."""
    if isinstance(value, str):
        return value
    if isinstance(value, xr.DataArray | xr.Variable):
        value = value.values
    if isinstance(value, slice):
        raise InputError("labels are selected by value or list of values, not by slice.")
    if isinstance(value, Iterable):
        return [str(item) for item in value]
    return str(value)


class PromptIndex(xr.Index):
    """Selects prompts by task, domain, split or cluster; follows the prompt ids when datasets are aligned."""

    def __init__(self, prompts: pd.Index, labels: dict[str, NDArray[Any]]) -> None:
        self._prompts, self._labels = prompts, labels

    def sel(self, labels: dict[Any, Any], method: Any = None, tolerance: Any = None) -> IndexSelResult:
        """Prompts that have the given labels."""
        keep = np.ones(len(self._prompts), dtype=bool)
        for name, value in labels.items():
            keep &= selected_labels(self._labels[name], label_values(value), str(name))
        return IndexSelResult({PROMPT: np.flatnonzero(keep)})

    def isel(self, indexers: Mapping[Any, Any]) -> PromptIndex | None:
        """The index of the chosen prompts; none for a single one."""
        chosen = indexers.get(PROMPT)
        if isinstance(chosen, xr.Variable):
            chosen = chosen.values
        if chosen is None:
            return self
        if not isinstance(chosen, slice) and np.ndim(chosen) != 1:
            return None
        rows = np.arange(len(self._prompts))[chosen]
        return PromptIndex(self._prompts[rows], {name: value[rows] for name, value in self._labels.items()})

    @classmethod
    def concat(cls, indexes: Sequence[Any], dim: Hashable, positions: Any = None) -> PromptIndex:
        """One index after the other, or each at its ``positions``."""
        order = np.argsort(np.concatenate([np.asarray(p) for p in positions])) if positions is not None else slice(None)
        prompts = indexes[0]._prompts.append([index._prompts for index in indexes[1:]])
        labels = {name: np.concatenate([i._labels[name] for i in indexes])[order] for name in indexes[0]._labels}
        return cls(prompts[order], labels)

    def equals(self, other: xr.Index, **_: Any) -> bool:
        """Whether prompts and labels are the same."""
        return (
            isinstance(other, PromptIndex)
            and self._prompts.equals(other._prompts)
            and self._labels.keys() == other._labels.keys()
            and all(np.array_equal(self._labels[name], other._labels[name]) for name in self._labels)
        )

    def join(self, other: Any, how: Any = "inner") -> PromptIndex:
        """The index of the prompts of both (inner) or either (outer)."""
        prompts = self._prompts.join(other._prompts, how=how)
        # Row of each joined prompt in either index; -1 where it is absent there, and then the other index has it.
        rows, other_rows = self._prompts.get_indexer(prompts), other._prompts.get_indexer(prompts)
        labels = {
            name: np.where(rows >= 0, value[rows], other._labels[name][other_rows])
            for name, value in self._labels.items()
        }
        return PromptIndex(prompts, labels)

    def reindex_like(self, other: Any) -> dict[Hashable, Any]:
        """Positions of another index's prompts in this one."""
        return {PROMPT: self._prompts.get_indexer(other._prompts)}

    def create_variables(self, variables: Mapping[Any, xr.Variable] | None = None) -> dict[Any, xr.Variable]:
        """The labels as coordinates."""
        attrs = {name: dict(variable.attrs) for name, variable in (variables or {}).items()}
        return {name: xr.Variable((PROMPT,), value, attrs.get(name)) for name, value in self._labels.items()}

    def __repr__(self) -> str:
        return "PromptIndex"


def with_prompt_index(dataset: xr.Dataset) -> xr.Dataset:
    """``dataset`` with an index that selects by task, domain, split and cluster, where these label its prompts."""
    names = [n for n in PROMPT_LABELS if n in dataset.coords and dataset[n].dims == (PROMPT,)]
    if not names or PROMPT not in dataset.indexes:
        return dataset
    labels = {name: np.asarray(dataset[name].values).astype(np.str_) for name in names}
    index = PromptIndex(dataset.indexes[PROMPT], labels)
    return dataset.assign_coords(xr.Coordinates(index.create_variables(), indexes=dict.fromkeys(names, index)))
