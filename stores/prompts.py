"""The table of evaluation prompts: read, checked, split into selection, verification and trial."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from rlgen_stats.schemas.dims import (
    CLUSTER,
    DOMAIN,
    DOMAINS,
    PROMPT,
    SELECTION,
    SPLIT,
    SPLITS,
    TASK,
    TRIAL,
    VERIFICATION,
)
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores.folder import StudyFolder

TEXT: Final = "text"
ANSWER: Final = "answer"
FILE_ID: Final = "prompt_id"
"""Name of the id column in files; ``prompt`` is understood too."""
COLUMNS: Final = (PROMPT, TEXT, ANSWER, TASK, DOMAIN, SPLIT, CLUSTER)


def load_prompts(spec: StudySpec, folder: StudyFolder) -> pd.DataFrame:
    """The study's prompts, checked, with split and cluster filled in.

    Returns
    -------
    DataFrame
        Columns prompt, text, answer, task, domain, split, cluster (all text), in the order of the file. Without a
        cluster column each prompt is its own cluster. Without a split column whole clusters are drawn into
        verification and trial by a hash of (study seed, cluster), per task; of a column that names no trial prompts,
        a part of the verification clusters becomes trial in the same way.

    Raises
    ------
    InputError
        If the file is missing, unreadable or empty; a column or id is missing or duplicated; a text or answer is
        empty; a domain, split or task name is unknown; or a cluster has prompts in several splits.
    """
    path = folder.resolve(spec.data.prompts)
    table = _text_columns(read_table(path), path)
    _check_cells(table, path)
    _check_tasks(table, path, spec)
    if CLUSTER not in table:
        table[CLUSTER] = table[PROMPT]
    if SPLIT not in table:
        table[SPLIT] = SELECTION
        shares = {VERIFICATION: spec.selection.verification_share, TRIAL: spec.selection.trial_share}
        _move(table, SELECTION, shares, spec)
    _check_values(table, path, SPLIT, SPLITS)
    spanning = table.groupby(CLUSTER, sort=False)[SPLIT].nunique()
    spanning = spanning[spanning > 1]
    if len(spanning):
        raise InputError(
            f"{path}: {len(spanning)} cluster(s) have prompts in several splits, e.g. {spanning.index[0]!r}; "
            "expected whole clusters in one split: correct the split column or drop it."
        )
    if TRIAL not in set(table[SPLIT]):
        rest = spec.selection.verification_share + spec.selection.trial_share
        _move(table, VERIFICATION, {TRIAL: spec.selection.trial_share / rest}, spec)
    return table[list(COLUMNS)].reset_index(drop=True)


def load_texts(path: Path) -> list[str]:
    """Texts of a table's column ``text`` (parquet, csv or jsonl).

    Raises
    ------
    InputError
        If the file cannot be read or has no such column.
    """
    table = read_table(path)
    if TEXT not in table.columns:
        raise InputError(f"{path} needs a column {TEXT!r}, got {', '.join(map(str, table.columns)) or 'none'}.")
    return text_cells(table, TEXT, path)


def read_table(path: Path) -> pd.DataFrame:
    """A parquet, csv or jsonl file as a table; csv cells stay text, so that an answer ``05`` stays ``05``.

    Raises
    ------
    InputError
        If the file is missing, of another kind, or malformed.
    """
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".parquet": pd.read_parquet,
        ".csv": _read_csv,
        ".jsonl": _read_jsonl,
    }
    if path.suffix not in readers:
        raise InputError(f"{path}: tables are {', '.join(readers)} files, got {path.suffix or 'no suffix'!r}.")
    if not path.is_file():
        raise InputError(f"no table at {path}; correct its path in the study file.")
    try:
        return readers[path.suffix](path)
    except (ValueError, OSError, csv.Error) as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(f"{path} is not a readable {path.suffix[1:]} table ({first}).") from error


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()


def _read_jsonl(path: Path) -> pd.DataFrame:
    return pd.DataFrame(json_lines(path), dtype=object)


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file with one JSON object a line; only a line feed ends a line, a text may hold U+2028 or U+0085.

    Raises
    ------
    ValueError
        If a line is no JSON object.
    """
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is no JSON object")
                yield row


def _text_columns(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The columns we use, as text; missing values become empty text."""
    if FILE_ID in table:  # a column called prompt beside it is no id
        table = table.drop(columns=PROMPT, errors="ignore").rename(columns={FILE_ID: PROMPT})
    if table.empty:
        raise InputError(f"{path} has no prompts; expected at least one row.")
    missing = [FILE_ID if c == PROMPT else c for c in (PROMPT, TEXT, ANSWER, TASK, DOMAIN) if c not in table]
    if missing:
        raise InputError(f"{path} lacks the column(s) {missing}; it has {list(table.columns)}.")
    kept = [column for column in COLUMNS if column in table]
    return pd.DataFrame({column: text_cells(table, column, path) for column in kept}, dtype=object)


def text_cells(table: pd.DataFrame, column: str, path: Path) -> list[str]:
    """A column's cells as text: missing ones empty, whole numbers without a decimal point (a column of integers with a
    missing one is read as floats).

    Raises
    ------
    InputError
        If a cell is neither text nor a number nor a truth value: the text of a list or of bytes is Python's, no prompt.
    """
    return [_text(value, column, row, path) for row, value in enumerate(table[column], start=1)]


def _text(value: Any, column: str, row: int, path: Path) -> str:
    if value is None or value is pd.NA or (isinstance(value, float | np.floating) and np.isnan(value)):
        return ""
    if isinstance(value, float | np.floating) and value.is_integer():
        return str(int(value))
    if not isinstance(value, str | int | float | np.generic):
        raise InputError(
            f"{path}: {column} of row {row} is a {type(value).__name__}, expected text; write it as text, "
            "chat messages as rendered by the chat template."
        )
    return str(value)


def _check_cells(table: pd.DataFrame, path: Path) -> None:
    twice = table[PROMPT][table[PROMPT].duplicated()]
    if len(twice):
        raise InputError(
            f"{path}: prompt ids must be unique, {twice.iloc[0]!r} comes more than once "
            f"({len(twice)} row(s) repeat an id); rename them."
        )
    for column in (column for column in (PROMPT, TEXT, TASK, CLUSTER) if column in table):
        empty = table[table[column].str.strip() == ""]
        if len(empty):
            raise InputError(
                f"{path}: {len(empty)} row(s) have an empty {column}, the first is row {empty.index[0] + 1} "
                f"(prompt {empty[PROMPT].iloc[0]!r}); fill them or drop the rows."
            )
    _check_values(table, path, DOMAIN, DOMAINS)


def _check_values(table: pd.DataFrame, path: Path, column: str, allowed: tuple[str, ...]) -> None:
    other = table[~table[column].isin(allowed)]
    if len(other):
        raise InputError(
            f"{path}: {column} must be one of {list(allowed)}, got {other[column].iloc[0]!r} for prompt "
            f"{other[PROMPT].iloc[0]!r} ({len(other)} row(s)); correct the {column} column."
        )


def _check_tasks(table: pd.DataFrame, path: Path, spec: StudySpec) -> None:
    blank = table[ANSWER].str.strip() == ""
    unanswered = [str(task) for task, empty in blank.groupby(table[TASK], sort=False) if empty.all()]
    if unanswered:
        raise InputError(
            f"{path}: no prompt of task(s) {unanswered} has an answer; nothing could be graded: add answers."
        )
    if blank.any():
        raise InputError(
            f"{path}: {int(blank.sum())} prompt(s) have no answer, e.g. {table[PROMPT][blank].iloc[0]!r}; "
            "add the answers or drop the rows."
        )
    domains = table.groupby(TASK, sort=False)[DOMAIN].nunique()
    if (domains > 1).any():
        raise InputError(
            f"{path}: task {domains.index[domains > 1][0]!r} has prompts in both domains; a task belongs to one."
        )
    tasks = list(dict.fromkeys(table[TASK]))
    named = [*spec.selection.held_out_tasks, *spec.selection.control_tasks]
    unknown = [task for task in named if task not in tasks]
    if unknown:
        raise InputError(
            f"selection.held_out_tasks or control_tasks names {unknown}, but the tasks of {path} are {tasks}."
        )


def _move(table: pd.DataFrame, part: str, shares: dict[str, float], spec: StudySpec) -> None:
    """Move shares of each task's clusters from one part of the split to others, those with the smallest hash first.

    A cluster over several tasks counts with the task of its first prompt. A task with enough clusters keeps at least
    one in every part; one with fewer serves the earlier parts, so that selection and confirmation both see it.
    """
    inside = table[SPLIT] == part
    first_task = table[inside].groupby(CLUSTER, sort=False)[TASK].first()
    moved: dict[str, str] = {}
    for _, members in first_task.groupby(first_task, sort=False):
        clusters = sorted((str(c) for c in members.index), key=lambda c: (derive_seed(spec.seed, "split", c), c))
        start = 0
        for n_later, (target, share) in zip(reversed(range(len(shares))), shares.items(), strict=True):
            left = len(clusters) - start - 1  # one stays where it is; each part to come gets one, if that leaves any
            size = min(max(round(share * len(clusters)), 1), left - min(n_later, max(left - 1, 0)))
            moved |= dict.fromkeys(clusters[start : start + size], target)
            start += size
    table.loc[inside, SPLIT] = table.loc[inside, CLUSTER].map(lambda c: moved.get(c, part))
