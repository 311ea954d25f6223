"""Single values, labels and rows looked up in results; what is missing gives NaN, an empty text or None."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from itertools import count, takewhile
from typing import Any, Final

import numpy as np
import xarray as xr

from rlgen_stats.schemas.dims import RUN, STEP, TRAINED_RUN, of_dictionary, split_dictionary
from rlgen_stats.schemas.layout import LAYOUTS
from rlgen_stats.schemas.study import StudySpec

Results = Mapping[str, xr.Dataset]
"""Results groups by name; a missing analysis is a missing key."""

_TESTED_FLAGS: Final = frozenset({"", "ok", "tested", "none", "identical", "below_margin"})
"""Flags of features that were tested."""


def tidy(results: Results) -> dict[str, xr.Dataset]:
    """Datasets as stored and reopened, with ordinary text (numpy cannot cast the stored kind) and in a fixed order.

    A store lists its variables in any order; here the declared ones come first, as declared, then the others by name.
    """
    return {group: _tidy(data, group) for group, data in results.items()}


def _tidy(data: xr.Dataset, group: str) -> xr.Dataset:
    layout = LAYOUTS.get(split_dictionary(group)[0])
    declared = [*layout.coords, *layout.variables] if layout is not None else []
    place = {name: i for i, name in enumerate(declared)}

    def ordered(names: Iterable[Hashable]) -> list[str]:
        return sorted(map(str, names), key=lambda name: (place.get(name, len(place)), name))

    variables = {name: (data[name].dims, _plain_text(data[name].values)) for name in ordered(data.data_vars)}
    coords = {name: (data[name].dims, _plain_text(data[name].values)) for name in ordered(data.coords)}
    return xr.Dataset(variables, coords=coords, attrs={k: data.attrs[k] for k in sorted(data.attrs)})


def _plain_text(values: np.ndarray) -> np.ndarray:
    return values.astype(object).astype(np.str_) if values.dtype.kind in "TO" else values


def by_dictionary(results: Results, group: str) -> list[xr.Dataset]:
    """One analysis of every dictionary of the encoded crosscoder, the first one's first; empty if it is missing."""
    numbered = (results.get(of_dictionary(group, i)) for i in count(1))
    return [data for data in takewhile(lambda data: data is not None, numbered) if data is not None]


def number(dataset: xr.Dataset | None, name: str, **labels: Any) -> float:
    """The value of a variable at ``labels``, NaN if the dataset, variable or label is missing."""
    cell = _cell(dataset, name, labels)
    return math.nan if cell is None else float(cell)


def text(dataset: xr.Dataset | None, name: str, **labels: Any) -> str:
    """The text of a variable at ``labels``, empty if it is missing."""
    cell = _cell(dataset, name, labels)
    return "" if cell is None else str(cell)


def _cell(dataset: xr.Dataset | None, name: str, labels: Mapping[str, Any]) -> Any:
    """The one value that ``labels`` name, None if they name nothing or more than one."""
    if dataset is None or name not in dataset:
        return None
    array = dataset[name]
    for dim, label in labels.items():
        position = np.flatnonzero(array[dim].values == label) if dim in array.coords else np.array([], dtype=int)
        if not position.size:
            return None
        array = array.isel({dim: int(position[0])})
    return array.values if array.ndim == 0 else None


def attr_number(dataset: xr.Dataset | None, name: str) -> float:
    """A numeric attribute, NaN if it is missing or not a number."""
    if dataset is None:
        return math.nan
    try:
        return float(dataset.attrs.get(name, math.nan))
    except (TypeError, ValueError):
        return math.nan


def attr_list(dataset: xr.Dataset | None, name: str) -> list[int]:
    """A list of integers kept as an attribute: a sequence, JSON text, or comma separated text."""
    value = None if dataset is None else dataset.attrs.get(name)
    if value is None:
        return []
    if isinstance(value, str):
        value = json.loads(value) if value.strip().startswith("[") else [v for v in value.split(",") if v.strip()]
    return [int(v) for v in np.atleast_1d(np.asarray(value)).tolist()]


def labels_of(dataset: xr.Dataset | None, dim: str) -> list[str]:
    """Labels of a dimension, in order; empty if it is missing."""
    if dataset is None or dim not in dataset.coords:
        return []
    return [str(label) for label in dataset[dim].values]


def nearest_label(dataset: xr.Dataset | None, dim: str, value: float) -> float:
    """The numeric label of ``dim`` closest to ``value``; ``value`` itself if the dataset has none."""
    labels = [float(label) for label in dataset[dim].values] if dataset is not None and dim in dataset.coords else []
    return min(labels, key=lambda label: abs(label - value), default=value)


def chooses_features(selection: xr.Dataset) -> np.ndarray:
    """[task] True where features were chosen and confirmed on a task: not one held out, nor a negative control."""
    return ~np.isin(selection["role"].values.astype(str), ("held_out", "control"))


def final_models(spec: StudySpec, dataset: xr.Dataset | None) -> dict[str, str]:
    """``run -> model id`` of the last checkpoint of every run the dataset has."""
    if dataset is None or RUN not in dataset.coords or STEP not in dataset.coords:
        return {}
    last: dict[str, tuple[int, str]] = {}
    rows = zip(labels_of(dataset, RUN), dataset[STEP].values, labels_of(dataset, "model"), strict=False)
    for run, step, model in rows:
        last[run] = max(last.get(run, (-1, "")), (int(step), model))
    return {run.name: last[run.name][1] for run in spec.runs if run.name in last}


def crosscoder_label(dataset: xr.Dataset, run: str) -> str | None:
    """Label of the pairwise crosscoder of ``run``: by its last target checkpoint, else by name."""
    labels = labels_of(dataset, "crosscoder")
    if "target" in dataset.coords:
        targets = [str(t).rpartition("@") for t in dataset["target"].values]
        steps = [int(step) if name == run and step.isdigit() else -1 for name, _, step in targets]
        if max(steps, default=-1) >= 0:
            return labels[int(np.argmax(steps))]
    exact = [label for label in labels if label in (run, f"pair-{run}")]
    holding = [label for label in labels if run in label.replace("_", "-").split("-")]
    return next(iter([*exact, *holding]), None)


def per_run(dataset: xr.Dataset | None, name: str, run: str) -> Any:
    """Value of a variable on the run dimension, or None."""
    if dataset is None or name not in dataset or TRAINED_RUN not in dataset[name].dims:
        return None
    runs = labels_of(dataset, TRAINED_RUN)
    return dataset[name].isel({TRAINED_RUN: runs.index(run)}).values if run in runs else None


def flag_counts(flags: xr.DataArray) -> dict[str, int]:
    """How often each flag occurs that marks a feature as not tested, most frequent first."""
    counts = Counter(str(value) for value in np.ravel(flags.values))
    return {flag: n for flag, n in counts.most_common() if flag not in _TESTED_FLAGS}
