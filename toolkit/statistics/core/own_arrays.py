"""The layouts ``features`` and ``outcomes`` from one's own arrays, with every label and attribute checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import (
    ARM,
    CLUSTER,
    DOMAIN,
    DOMAINS,
    FEATURE,
    MODEL,
    NOT_SAMPLED,
    PROMPT,
    PROMPT_LABELS,
    RUN,
    SAMPLE,
    SELECTION,
    SPLIT,
    SPLITS,
    STEP,
    TASK,
    VERIFICATION,
    VIEW,
    split_model_id,
)
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.layout import validate
from rlgen_stats.stores.prompts import draw_split
from rlgen_stats.stores.provenance import Provenance

Labels = dict[str, tuple[str, NDArray[Any]]]
Prompts = pd.DataFrame | xr.Dataset | Sequence[str]

SCALES: Final = ("contribution", "raw")
"""Activation times decoder norm, which different features share; or activations as they are."""
UNKNOWN: Final = "unknown"
"""Readout, text mode and dictionary of features of which nothing is said."""
IN_MEMORY: Final = "in memory"
"""Study of datasets of which none is named."""


def features_dataset(
    mean: Mapping[str, Any],
    *,
    prompts: Prompts,
    scale: str,
    firing: Mapping[str, Any] | None = None,
    maximum: Mapping[str, Any] | None = None,
    n_tokens: Mapping[str, Any] | None = None,
    fve: Mapping[str, float] | None = None,
    decoder_norm: Mapping[str, Any] | None = None,
    features: Sequence[int] | None = None,
    arms: Mapping[str, str] | None = None,
    readout: str = UNKNOWN,
    text_mode: str = UNKNOWN,
    crosscoder: str = UNKNOWN,
    study: str = IN_MEMORY,
) -> xr.Dataset:
    """Prompt summaries of features as every test takes them, from arrays.

    Parameters
    ----------
    mean
        Model id (``run@step``; base is ``base@0``) -> [prompt, feature] mean activation over the prompt's tokens:
        numpy, pandas, xarray, or dask, which stays lazy and whose numbers are not looked at. Labels of rows must be
        the prompts', and those of columns the same in every model, where there are any.
    prompts
        One row a prompt, in the order of the arrays: a table with column ``prompt`` (unique ids) and, where they
        matter, ``task``, ``domain`` (in, out), ``split`` (selection, verification, trial) and ``cluster``; a list of
        ids; or a dataset of the same prompts. Default: one task, ``all``, in domain; every prompt its own cluster; half
        of each task's clusters drawn by a hash into selection, half into verification, whatever the order of rows (a
        cluster over several tasks counts with that of its smallest id).
    scale
        ``contribution`` (activation x decoder norm), needed wherever different features are ranked, or ``raw``.
    firing, maximum, n_tokens
        Model -> [prompt, feature] share of tokens on which the feature fires, largest activation; [prompt] tokens, 0
        where a model has none. Default: a prompt is taken as one token, which fires where ``mean`` is not 0.
    fve
        Model -> fraction of variance that the dictionary explains; not needed by any test.
    decoder_norm
        View -> [feature]; not needed by any test.
    features
        Feature ids; default 0, 1, ...
    arms
        Run -> arm, for runs that repeat one way of training; default: each run is its own.
    readout, text_mode, crosscoder, study
        What the numbers are of. Datasets that differ in one are never combined.

    Returns
    -------
    Dataset
        Layout ``features``.

    Raises
    ------
    InputError
        If a shape, label or number is not as above: what was expected, what came, and what to do.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> base = rng.gamma(1.0, size=(40, 3))
    >>> mean = {"base@0": base, "rl@100": base + rng.normal([0, 0, 0.5], 0.1, (40, 3))}
    >>> own = features_dataset(mean, prompts=[f"p{i}" for i in range(40)], scale="raw")
    >>> from rlgen_stats.toolkit.statistics import drift_test
    >>> drift_test(own, models=["rl@final"]).call.values.tolist()
    [['NO_DRIFT', 'NO_DRIFT', 'DRIFT']]
    """
    labels, models = prompt_labels(prompts), model_labels(mean, arms)
    if scale not in SCALES:
        raise InputError(f"scale is one of {list(SCALES)}, got {scale!r}; name the one that the numbers have.")
    rows = _Rows(list(mean), labels[PROMPT][1])
    means = rows.stack("mean", mean, 2)
    width = means.shape[2]
    fires = (means != 0).astype(np.float64) if firing is None else rows.stack("firing", firing, 2, width, (0, 1))
    tokens = np.ones(means.shape[:2]) if n_tokens is None else rows.stack("n_tokens", n_tokens, 1, bounds=(0, np.inf))
    if not isinstance(tokens, da.Array) and (tokens % 1).any():
        raise InputError("n_tokens has fractions; expected how many tokens each prompt has, in whole numbers.")
    norms = dict.fromkeys(mean, np.full(width, np.nan)) if decoder_norm is None else decoder_norm
    ids = np.arange(width) if features is None else np.asarray(features)
    if ids.shape != (width,) or len(np.unique(ids)) != width or any(np.shape(n) != (width,) for n in norms.values()):
        raise InputError(
            f"mean has {width} features; expected as many different ids in features and as many norms in every view of "
            f"decoder_norm, got {len(np.unique(ids))} ids and norms of shape {[np.shape(n) for n in norms.values()]}."
        )
    dims = (MODEL, PROMPT, FEATURE)
    dataset = xr.Dataset(
        {
            "mean": (dims, means),
            "firing": (dims, fires),
            "max": (dims, means if maximum is None else rows.stack("maximum", maximum, 2, width)),
            "n_tokens": (dims[:2], tokens.astype(np.int64)),
            "fve": (MODEL, np.array([(fve or {}).get(model, np.nan) for model in mean], dtype=np.float64)),
            "decoder_norm": ((VIEW, FEATURE), np.array(list(norms.values()), dtype=np.float64)),
        },
        coords=models | labels | {VIEW: (VIEW, np.array(list(norms), dtype=np.str_)), FEATURE: (FEATURE, ids)},
        attrs=Provenance(study, IN_MEMORY).attrs()
        | {"scale": scale, "readout": readout, "text_mode": text_mode, "crosscoder": crosscoder},
    )
    return validate(dataset, "features")


def outcomes_dataset(
    greedy: Mapping[str, Any],
    *,
    prompts: Prompts,
    samples: Mapping[str, Any] | None = None,
    arms: Mapping[str, str] | None = None,
    study: str = IN_MEMORY,
) -> xr.Dataset:
    """Graded answers as every test takes them, from arrays.

    Parameters
    ----------
    greedy
        Model id -> [prompt] whether its greedy answer is right: 0 or 1, NaN where it was not graded. A table of prompts
        by models is one too.
    prompts, arms, study
        As in :func:`features_dataset`; ``prompts=features`` takes those of features.
    samples
        Model -> [prompt, sample] the same of sampled answers; models and samples may be missing (NaN).

    Returns
    -------
    Dataset
        Layout ``outcomes``. How long answers are and how they end is not known: 0 tokens, no format class.

    Raises
    ------
    InputError
        If a shape, label or grade is not as above.

    Examples
    --------
    >>> right = {"base@0": [0, 1, 0, 0, 1, 0], "rl@100": [1, 1, 1, 1, 0, 1]}
    >>> own = outcomes_dataset(right, prompts=list("abcdef"))
    >>> from rlgen_stats.toolkit.statistics import behaviour
    >>> behaviour(own).gained.sel(model="rl@100", task="all").item()
    4
    """
    labels, models = prompt_labels(prompts), model_labels(greedy, arms)
    samples = samples or {}
    unknown = sorted(set(samples) - set(greedy))
    if unknown:
        raise InputError(f"samples has the model {unknown[0]!r}; expected only those of greedy, {sorted(greedy)}.")
    rows = _Rows(list(greedy), labels[PROMPT][1])
    right = rows.grades("greedy", greedy, 1)
    most = max((np.shape(values)[1] for values in samples.values() if np.ndim(values) == 2), default=1)
    none = np.full((len(rows.prompts), most), np.nan)
    for model, values in samples.items():
        check_rows(f"samples of {model}", values, rows.prompts)
    sampled = rows.grades("samples", {model: _padded(samples.get(model, none), most) for model in greedy}, 2, most)
    per_sample, per_prompt = (MODEL, PROMPT, SAMPLE), (MODEL, PROMPT)
    dataset = xr.Dataset(
        {
            "correct": (per_sample, sampled),
            "completion_tokens": (per_sample, np.where(sampled == NOT_SAMPLED, NOT_SAMPLED, 0)),
            "format_class": (per_sample, np.full(sampled.shape, "", dtype="U1")),
            "greedy_correct": (per_prompt, right),
            "greedy_tokens": (per_prompt, np.zeros_like(right)),
            "greedy_class": (per_prompt, np.full(right.shape, "", dtype="U1")),
        },
        coords=models | labels,
        attrs=Provenance(study, IN_MEMORY).attrs(),
    )
    return validate(dataset, "outcomes")


def prompt_labels(prompts: Prompts) -> Labels:
    """Coordinates prompt, task, domain, split and cluster, checked; see :func:`features_dataset`.

    Raises
    ------
    InputError
        If an id is missing or comes twice, a label is missing or unknown, or a task or cluster spans what it may not.
    """
    if isinstance(prompts, xr.Dataset):
        names = [name for name in (PROMPT, *PROMPT_LABELS) if name in prompts.coords]
        table = pd.DataFrame({name: prompts[name].values for name in names})
    elif isinstance(prompts, pd.DataFrame):
        table = prompts.reset_index() if prompts.index.name == PROMPT else prompts.reset_index(drop=True)
    else:
        table = pd.DataFrame({PROMPT: list(prompts)})
    if PROMPT not in table or not len(table):
        raise InputError(f"prompts needs a column 'prompt' with an id a row, got {list(table)}; add or rename it.")
    for name, default in ((TASK, "all"), (DOMAIN, "in"), (CLUSTER, table[PROMPT])):
        table = table if name in table else table.assign(**{name: default})
    drawn = SPLIT not in table
    for name in (PROMPT, TASK, DOMAIN, CLUSTER, *(() if drawn else (SPLIT,))):
        table[name] = _text(table, name)
    _check_prompts(table)
    if drawn:
        by_id = table.assign(**{SPLIT: SELECTION}).sort_values(PROMPT)  # the order of rows says nothing
        table[SPLIT] = draw_split(by_id, {VERIFICATION: 0.5}, seed=0)[SPLIT]
    return {name: (PROMPT, table[name].to_numpy(dtype=np.str_)) for name in (PROMPT, *PROMPT_LABELS)}


def _text(table: pd.DataFrame, name: str) -> pd.Series[str]:
    """A column of labels as text; numbers but fractions are taken by their digits."""
    column = table[name]
    wrong = column.isna() | column.map(lambda value: isinstance(value, float) or str(value) == "")
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise InputError(f"prompts: {name} of row {row} is {column.iloc[row]!r}; expected a text in every row.")
    return column.astype(str)


def _check_prompts(table: pd.DataFrame) -> None:
    twice = table[PROMPT][table[PROMPT].duplicated()]
    if len(twice):
        raise InputError(f"prompt {twice.iloc[0]!r} comes twice; expected one row a prompt: give means over its rows.")
    for name, allowed in ((DOMAIN, DOMAINS), (SPLIT, SPLITS)):
        other = table[~table[name].isin(allowed)] if name in table else table[:0]
        if len(other):
            raise InputError(
                f"{name} is one of {list(allowed)}, got {other[name].iloc[0]!r} for prompt {other[PROMPT].iloc[0]!r}; "
                "correct the column."
            )
    for name, within in ((TASK, DOMAIN), (CLUSTER, SPLIT)):
        if within in table:
            parts = table.groupby(name, sort=False)[within].nunique()
            if (parts > 1).any():
                raise InputError(
                    f"{name} {parts.index[parts > 1][0]!r} has prompts of more than one {within}; expected one: a "
                    f"{name} belongs to one {within}."
                )


def model_labels(models: Iterable[str], arms: Mapping[str, str] | None = None) -> Labels:
    """Coordinates model, run, step and arm of model ids.

    Raises
    ------
    InputError
        If there is none, an id is not ``run@step``, one model comes twice, or ``arms`` names another run.
    """
    ids = list(models)
    if not ids:
        raise InputError("expected the arrays of at least one model, got none; name each by its id, such as 'base@0'.")
    parts = [split_model_id(str(model)) for model in ids]
    twice = [model for number, model in enumerate(ids) if parts[number] in parts[:number]]
    if twice:
        raise InputError(f"{twice[0]!r} is a model that comes before under another id; expected one array a model.")
    runs = list(dict.fromkeys(run for run, _ in parts))
    unknown = sorted(set(arms or {}) - set(runs))
    if unknown:
        raise InputError(f"arms names the run {unknown[0]!r}; the runs are {runs}.")
    return {
        MODEL: (MODEL, np.array(ids, dtype=np.str_)),
        RUN: (MODEL, np.array([run for run, _ in parts], dtype=np.str_)),
        STEP: (MODEL, np.array([step for _, step in parts], dtype=np.int64)),
        ARM: (MODEL, np.array([(arms or {}).get(run, run) for run, _ in parts], dtype=np.str_)),
    }


def check_rows(what: str, values: Any, prompts: NDArray[np.str_]) -> None:
    """Compare the labels of an array's rows, if it has any, with the prompts.

    Raises
    ------
    InputError
        If they are others, or in another order.
    """
    rows = _labels(values, 0)
    if rows is not None and rows != prompts.tolist():
        raise InputError(
            f"{what} has other rows than the prompts, or in another order; expected {prompts[:3].tolist()} and so on, "
            f"got {rows[:3]}: reindex it by the prompts, or give it without labels."
        )


def _labels(values: Any, axis: int) -> list[str] | None:
    """Labels of rows (axis 0) or columns of a table or labelled array; None if there are none but 0, 1, ..."""
    index = None
    if isinstance(values, pd.DataFrame | pd.Series) and axis < values.ndim:
        index = values.axes[axis]
    elif isinstance(values, xr.DataArray) and axis < values.ndim:
        index = values.indexes.get(values.dims[axis])
    return None if index is None or index.equals(pd.RangeIndex(len(index))) else list(map(str, index))


@dataclass(frozen=True)
class _Rows:
    """The models and prompts that arrays are of."""

    models: list[str]
    prompts: NDArray[np.str_]

    def stack(
        self,
        name: str,
        arrays: Mapping[str, Any],
        ndim: int,
        width: int | None = None,
        bounds: tuple[float, float] = (-np.inf, np.inf),
    ) -> Any:
        """[model, prompt, ...] of finite numbers within bounds; lazy, and then not looked at, where one array is."""
        one_each = self._matching(name, arrays, ndim, width)
        if any(isinstance(array, da.Array) for array in one_each):
            return da.stack([da.asarray(array) for array in one_each])
        stacked = np.stack(one_each)
        wrong = np.argwhere(~(np.isfinite(stacked) & (stacked >= bounds[0]) & (stacked <= bounds[1])))
        if len(wrong):
            within = f" from {bounds[0]:g} to {bounds[1]:g}" if bounds[0] > -np.inf else ""
            raise InputError(
                f"{self._cell(name, *wrong[0])} is {stacked[tuple(wrong[0])]:g}; expected a finite number{within}: "
                "correct it, or leave the prompt out."
            )
        return stacked

    def grades(self, name: str, arrays: Mapping[str, Any], ndim: int, width: int | None = None) -> NDArray[np.int64]:
        """[model, prompt, ...] 0, 1, or ``NOT_SAMPLED`` where there is no grade."""
        stacked = np.stack([np.asarray(array, dtype=np.float64) for array in self._matching(name, arrays, ndim, width)])
        wrong = np.argwhere(~(np.isnan(stacked) | np.isin(stacked, (0, 1))))
        if len(wrong):
            raise InputError(
                f"{self._cell(name, *wrong[0])} is {stacked[tuple(wrong[0])]}; expected 0, 1, or NaN without a grade: "
                "scores between are for compare_outcomes."
            )
        return np.where(np.isnan(stacked), NOT_SAMPLED, stacked).astype(np.int64)

    def _matching(self, name: str, arrays: Mapping[str, Any], ndim: int, width: int | None) -> list[Any]:
        """One array a model, with a row for every prompt, in their order, and as wide as the first, or as ``width``."""
        if set(arrays) != set(self.models):
            raise InputError(f"{name} has the models {sorted(arrays)}; expected {sorted(self.models)} in all arrays.")
        found, columns = [], None
        for model in self.models:
            values = arrays[model]
            check_rows(f"{name} of {model}", values, self.prompts)
            its_columns = _labels(values, 1) if ndim == 2 else None
            columns = its_columns if columns is None else columns
            if columns is not None and its_columns not in (None, columns):
                raise InputError(
                    f"{name} of {model} has other columns than that of another model, or in another order; expected "
                    f"{columns[:3]} and so on: give all models the same."
                )
            values = values.data if isinstance(values, xr.DataArray) else values
            array = values if isinstance(values, da.Array) else np.asarray(values)
            if ndim == 2 and width is None:
                width = array.shape[-1] if array.ndim == 2 else 1
            expected = (len(self.prompts), width)[:ndim]
            if array.shape != expected or array.dtype.kind not in "biuf" or not array.size:
                raise InputError(
                    f"{name} of {model} has shape {array.shape} and type {array.dtype}; expected numbers of shape "
                    f"{expected}: a row for each prompt{', as many columns in every model' if ndim == 2 else ''}."
                )
            found.append(array if array.dtype.kind == "f" else array.astype(np.float64))
        return found

    def _cell(self, name: str, model: int, prompt: int, *column: int) -> str:
        at = f"column {column[0]} of " if column else ""
        return f"{name} of {self.models[model]}, {at}prompt {str(self.prompts[prompt])!r},"


def _padded(values: Any, n_samples: int) -> NDArray[Any]:
    """[prompt, sample] with NaN for samples that other models have more of; what is no such table is left as it is."""
    array = np.asarray(values)
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        return array
    missing = n_samples - array.shape[1]
    return np.pad(array.astype(np.float64), ((0, 0), (0, missing)), constant_values=np.nan)
