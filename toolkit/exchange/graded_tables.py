"""Graded completions of one model from a table, a study, or the logs of an evaluation framework."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from rlgen_stats.schemas.dims import CLUSTER, MODEL, NOT_SAMPLED, PROMPT, SAMPLE, TASK, stored_model
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.stores import open_outcomes
from rlgen_stats.stores.hub import is_on_hub, locate_table
from rlgen_stats.stores.prompts import FILE_ID
from rlgen_stats.stores.table_files import is_table_folder, read_table
from rlgen_stats.toolkit.exchange.evaluation_logs import TaskLog, evaluation_logs

CORRECT: Final = "correct"
METRICS_OF_A_STUDY: Final = ("greedy", "sampled")
"""The greedy completion of each prompt, or the sampled ones."""
_LOG_FILES: Final = ("samples_*.jsonl", "*.eval", "*.json")
"""Logs in a folder: the first kind that it has."""
_COLUMNS: Final = (PROMPT, TASK, SAMPLE, CLUSTER, CORRECT, "metric", "content")


def read_graded(
    path: Path | str,
    *,
    metric: str | Sequence[str] = (),
    model: str | None = None,
    cluster: str | None = None,
) -> pd.DataFrame:
    """Read one model's graded completions, one row each, for ``compare_outcomes``.

    Parameters
    ----------
    path
        A table (any that :func:`~rlgen_stats.stores.table_files.read_table` reads, or ``hf://datasets/...``) with the
        columns prompt and correct and perhaps task, sample and cluster; a study folder or its outcomes.zarr;
        ``samples_*.jsonl`` of lm-evaluation-harness; a log of Inspect (``.eval``, ``.json``); or a folder of either
        kind of logs, one a task.
    metric
        What counts as correct, where there are several: a table's column, ``greedy`` or ``sampled`` of a study, a
        metric of lm-evaluation-harness (``acc``, or ``exact_match,strict-match`` with its filter), a scorer of Inspect.
        Several names where tasks differ.
    model
        Of a study: ``run@step``.
    cluster
        What says which prompts depend on one another: a column of a table, or a field of a logged sample, with dots
        (``doc.passage_id``, ``metadata.topic``).

    Returns
    -------
    pandas.DataFrame
        prompt, task, sample, correct (0, 1 or a score between; NaN where ungraded), metric, and cluster and content
        where known.

    Raises
    ------
    InputError
        If nothing is recognised, a file is broken, a task is there twice, or the metric is absent or not the only one.

    Examples
    --------
    >>> base = read_graded("out/base", metric="exact_match,strict-match")  # doctest: +SKIP
    """
    wanted = (metric,) if isinstance(metric, str) else tuple(metric)
    if is_on_hub(str(path)):
        return _of_table(locate_table(path), wanted, cluster)
    path = Path(path)
    store = next((one for one in (path / "outcomes.zarr", path) if (one / "zarr.json").is_file()), None)
    if store is not None:
        return _of_study(store, model, wanted)
    if model is not None:
        raise InputError(
            f"{path} is no study, so it has no model {model!r}; name a study folder or leave the model out."
        )
    try:
        logs = _logs(path, cluster)
        return _of_table(path, wanted, cluster) if logs is None else _of_logs(path, logs, wanted)
    except (ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}); expected a "
            "table of graded completions, or a log of lm-evaluation-harness or Inspect: write it again."
        ) from error


def _of_study(store: Path, model: str | None, wanted: tuple[str, ...]) -> pd.DataFrame:
    outcomes = open_outcomes(store)
    models = [str(one) for one in outcomes[MODEL].values]
    model = None if model is None else stored_model(model, models)
    if model not in models:
        raise InputError(f"{store} holds the models {', '.join(models)}, got {model!r}; name one of them.")
    name = _only(store, "the study", METRICS_OF_A_STUDY, wanted)
    one = outcomes.sel({MODEL: model})
    grades = one["greedy_correct"].expand_dims({SAMPLE: 1}, -1) if name == "greedy" else one[CORRECT]
    if name != "greedy":
        n_sampled = (one["completion_tokens"].transpose(PROMPT, SAMPLE).values != NOT_SAMPLED).all(axis=0).sum()
        if not n_sampled:
            raise InputError(
                f"{model} has its greedy completions alone (generation.n_samples: others); compare these by the metric "
                "greedy (--metric greedy), or a last checkpoint."
            )
        grades = grades[{SAMPLE: slice(int(n_sampled))}]
    values = grades.transpose(PROMPT, SAMPLE).values.astype(float)
    n = values.shape[1]
    labels = {label: np.repeat(np.asarray(one[label].values).astype(str), n) for label in (PROMPT, TASK, CLUSTER)}
    samples = np.tile(np.arange(n), len(values))
    return pd.DataFrame(
        labels | {SAMPLE: samples, CORRECT: np.where(values < 0, np.nan, values).ravel(), "metric": name}
    )


def _of_table(path: Path, wanted: tuple[str, ...], cluster: str | None) -> pd.DataFrame:
    table = read_table(path)
    if table.columns.empty:
        raise InputError(f"{path} is empty; expected the columns prompt and correct.")
    if PROMPT not in table and FILE_ID in table:
        table = table.rename(columns={FILE_ID: PROMPT})
    graded = wanted[0] if wanted else CORRECT
    for column in (PROMPT, graded, *([cluster] if cluster else [])):
        if column not in table:
            raise InputError(
                f"{path} lacks the column {column!r}; it has {', '.join(map(str, table.columns))}: expected prompt and "
                "correct, or name the graded column with metric= (--metric)."
            )
    table[CORRECT] = [_truth(value) for value in table[graded]]
    table["metric"] = graded
    if cluster:
        table[CLUSTER] = table[cluster]
    return table[[column for column in _COLUMNS if column in table]]


def _truth(value: Any) -> Any:
    """Text of a csv as a number: true and false count, an empty cell is ungraded."""
    words = {"true": 1.0, "false": 0.0, "": math.nan}
    return words.get(value.strip().lower(), value) if isinstance(value, str) else value


def _logs(path: Path, cluster: str | None) -> list[TaskLog] | None:
    """Tasks of a file or folder of logs; None for a file that is a table."""
    if path.is_file():
        return evaluation_logs(path, cluster)
    if is_table_folder(path):
        return None
    if not path.is_dir():
        raise InputError(
            f"there is nothing at {path}; expected a file or folder of graded completions: correct the path."
        )
    files = next((found for kind in _LOG_FILES if (found := sorted(path.rglob(kind)))), [])
    logs = [log for file in files for log in evaluation_logs(file, cluster) or []]
    if not logs:
        raise InputError(
            f"{path} holds no graded completions; expected a study, or logs of lm-evaluation-harness or Inspect "
            f"({', '.join(_LOG_FILES)}): name the folder or file that has them."
        )
    return logs


def _of_logs(path: Path, logs: list[TaskLog], wanted: tuple[str, ...]) -> pd.DataFrame:
    tables, files = [], dict[str, Path]()
    for log in logs:
        if log.task in files:
            raise InputError(
                f"{path} has the task {log.task!r} twice, in {files[log.task].name} and {log.file.name}; expected one "
                "evaluation of a model: name a file, or a folder with one."
            )
        files[log.task] = log.file
        graded = [name for name, rows in log.rows.items() if all(_is_score(row[CORRECT]) for row in rows)]
        name = _only(log.file, f"task {log.task!r}", list(log.rows), wanted, graded)
        tables.append(pd.DataFrame(log.rows[name]).assign(task=log.task, metric=name))
    table = pd.concat(tables, ignore_index=True)
    if table["content"].isna().any():
        table = table.drop(columns="content")
    return table[[column for column in _COLUMNS if column in table]]


def _is_score(value: Any) -> bool:
    return value is None or (isinstance(value, float) and (math.isnan(value) or 0 <= value <= 1))


def _only(
    path: Path, what: str, names: Sequence[str], wanted: tuple[str, ...], graded: Sequence[str] | None = None
) -> str:
    """The one metric that is wanted, or the only one that holds scores between 0 and 1."""
    exact = [name for name in names if name in wanted]
    near = exact or [name for name in names if name.split(",")[0] in wanted]
    found = near if wanted else list(names if graded is None else graded)
    if len(found) == 1:
        return found[0]
    held = ", ".join(names) or "none"
    if not found:
        asked = f"none of the metrics {', '.join(wanted)}" if wanted else "no metric with scores between 0 and 1"
        raise InputError(f"{what} of {path} has {asked}; it has {held}: name one with metric= (--metric).")
    raise InputError(f"{what} of {path} is graded by {', '.join(found)}; name one with metric= (--metric).")
