"""Reading single values out of results, and writing numbers the way a person reads them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Final

import numpy as np
import xarray as xr

from rlgen_stats.schemas.dims import RUN, STEP, TRAINED_RUN
from rlgen_stats.schemas.layout import LAYOUTS
from rlgen_stats.schemas.study import StudySpec

Results = Mapping[str, xr.Dataset]
"""Results groups by name; a missing analysis is a missing key."""

DASH: Final = "—"
"""Shown where there is no number."""
_WHOLE: Final = 1e6
"""Integers below this are written out."""
_TINY: Final = 1e-3
"""Numbers below this are written with a power of ten."""
_NO_DIVERGENCE: Final = 1e-6
"""Divergences below this, in nats, are rounding."""
_OK_FLAGS: Final = frozenset({"", "ok", "tested", "none"})


def tidy(results: Results) -> dict[str, xr.Dataset]:
    """Datasets as stored and reopened, with ordinary text (numpy cannot cast the stored kind) and in a fixed order.

    A store lists its variables in any order; here the declared ones come first, as declared, then the others by name.
    """
    return {group: _tidy(data, group) for group, data in results.items()}


def _tidy(data: xr.Dataset, group: str) -> xr.Dataset:
    layout = LAYOUTS.get(group)
    declared = [*layout.coords, *layout.variables] if layout is not None else []
    place = {name: i for i, name in enumerate(declared)}

    def ordered(names: Iterable[Hashable]) -> list[str]:
        return sorted(map(str, names), key=lambda name: (place.get(name, len(place)), name))

    variables = {name: (data[name].dims, _plain_text(data[name].values)) for name in ordered(data.data_vars)}
    coords = {name: (data[name].dims, _plain_text(data[name].values)) for name in ordered(data.coords)}
    return xr.Dataset(variables, coords=coords, attrs={k: data.attrs[k] for k in sorted(data.attrs)})


def _plain_text(values: np.ndarray) -> np.ndarray:
    return values.astype(object).astype(np.str_) if values.dtype.kind in "TO" else values


def number(dataset: xr.Dataset | None, name: str, **labels: Any) -> float:
    """The value of a variable at ``labels``, NaN if the dataset, variable or label is not there."""
    if dataset is None or name not in dataset:
        return math.nan
    array = dataset[name]
    for dim, label in labels.items():
        where = np.flatnonzero(array[dim].values == label) if dim in array.coords else np.array([], dtype=int)
        if not where.size:
            return math.nan
        array = array.isel({dim: int(where[0])})
    return float(array.values) if array.ndim == 0 else math.nan


def text(dataset: xr.Dataset | None, name: str, **labels: Any) -> str:
    """The text of a variable at ``labels``, empty if it is not there."""
    if dataset is None or name not in dataset:
        return ""
    array = dataset[name]
    for dim, label in labels.items():
        where = np.flatnonzero(array[dim].values == label) if dim in array.coords else np.array([], dtype=int)
        if not where.size:
            return ""
        array = array.isel({dim: int(where[0])})
    return str(array.values) if array.ndim == 0 else ""


def attr_number(dataset: xr.Dataset | None, name: str) -> float:
    """A numeric attribute, NaN if it is missing or no number."""
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
    """Labels of a dimension, in order; empty if it is not there."""
    if dataset is None or dim not in dataset.coords:
        return []
    return [str(label) for label in dataset[dim].values]


def final_models(spec: StudySpec, dataset: xr.Dataset | None) -> dict[str, str]:
    """``run -> model id`` of the last checkpoint of every run the dataset has."""
    if dataset is None or RUN not in dataset.coords or STEP not in dataset.coords:
        return {}
    last: dict[str, tuple[int, str]] = {}
    rows = zip(labels_of(dataset, RUN), dataset[STEP].values, labels_of(dataset, "model"), strict=False)
    for run, step, model in rows:
        last[run] = max(last.get(run, (-1, "")), (int(step), model))
    return {run.name: last[run.name][1] for run in spec.runs if run.name in last}


def of_run(dataset: xr.Dataset, run: str) -> xr.Dataset:
    """The models of one run, by step."""
    chosen = dataset.isel(model=np.flatnonzero(dataset[RUN].values == run))
    return chosen.isel(model=np.argsort(chosen[STEP].values, kind="stable"))


def runs_per_arm(spec: StudySpec) -> dict[str, int]:
    """Number of runs of each arm, in the spec's order."""
    return dict(Counter(run.arm for run in spec.runs))


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
    """How often each flag other than "nothing to say" occurs, most frequent first."""
    counts = Counter(str(value) for value in np.ravel(flags.values))
    return {flag: n for flag, n in counts.most_common() if flag not in _OK_FLAGS}


def hundred(value: float) -> float:
    """A fraction in percent, without the last bits that 100 x leaves."""
    return round(100 * float(value), 10)


# -- words ---------------------------------------------------------------------------------------------------------
def fixed(value: float, digits: int = 1, *, sign: bool = False) -> str:
    """A number with a true minus sign, or a dash; never "-0.0"."""
    if value is None or not math.isfinite(value):
        return DASH
    rounded = round(float(value), digits) + 0.0
    return f"{rounded:{'+' if sign and rounded else ''}.{digits}f}".replace("-", "−")


def percent(value: float, digits: int = 1) -> str:
    """A fraction in percent."""
    return DASH if value is None or not math.isfinite(value) else f"{fixed(100 * value, digits)}%"


def points(value: float, digits: int = 1) -> str:
    """A difference of fractions in signed percentage points."""
    return DASH if value is None or not math.isfinite(value) else f"{fixed(100 * value, digits, sign=True)} pts"


def interval(low: float, high: float, digits: int = 1, *, scale: float = 1.0, sign: bool = False) -> str:
    """``[low, high]``; open where an end is missing, a dash where both are."""
    if not math.isfinite(low) and not math.isfinite(high):
        return DASH
    if not math.isfinite(high):
        return f"at least {fixed(scale * low, digits)}"
    return f"[{fixed(scale * low, digits, sign=sign)}, {fixed(scale * high, digits, sign=sign)}]"


def p_text(p: float) -> str:
    """A p-value with as many digits as it deserves."""
    if p is None or not math.isfinite(p):
        return DASH
    if p < 1e-4:
        exponent = math.floor(math.log10(p)) if p > 0 else None
        return "0" if exponent is None else f"{p / 10**exponent:.1f}×10{_superscript(exponent)}"
    return f"{p:.4f}" if p < 0.001 else f"{p:.3f}"


def compact(value: float) -> str:
    """A number of unknown size: integers whole, others with three significant digits."""
    if value is None or not math.isfinite(value):
        return DASH
    whole = float(value).is_integer() and abs(value) < _WHOLE
    if 0 < abs(value) < _TINY:
        exponent = math.floor(math.log10(abs(value)))
        return f"{value / 10.0**exponent:.1f}×10{_superscript(exponent)}".replace("-", "−")
    return (f"{value:.0f}" if whole else f"{value:#.3g}").replace("-", "−")


def nats(value: float) -> str:
    """A divergence: what rounding leaves of an exact zero, of either sign, is no number to read."""
    return f"<10{_superscript(-6)}" if 0 < abs(value) < _NO_DIVERGENCE else compact(value)


def count(value: float, noun: str) -> str:
    """``3 features``, ``1 feature``."""
    shown = f"{int(value):,}" if value is not None and math.isfinite(value) else DASH
    return f"{shown} {noun}" if shown == "1" else f"{shown} {noun}s"


def listed(items: Iterable[str]) -> str:
    """``a, b and c``."""
    words = list(items)
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _superscript(value: int) -> str:
    return str(value).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def plain(value: Any) -> Any:
    """``value`` as JSON knows it: numpy scalars unwrapped, NaN and infinities null, text keys."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
