"""The table of evaluation prompts: read, checked, split into selection, verification and trial."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from string import ascii_uppercase
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
from rlgen_stats.schemas.tasks import FIELD, TaskSpec, template_fields
from rlgen_stats.stores.folder import StudyFolder
from rlgen_stats.stores.hub import locate_table
from rlgen_stats.stores.table_files import read_table

TEXT: Final = "text"
ANSWER: Final = "answer"
CHOICES: Final = "choices"
FILE_ID: Final = "prompt_id"
"""Name of the id column in files; ``prompt`` is understood too."""
COLUMNS: Final = (PROMPT, TEXT, ANSWER, TASK, DOMAIN, SPLIT, CLUSTER, CHOICES)


def prompt_files(spec: StudySpec) -> dict[str, str]:
    """Tables of a study's prompts as the study file names them: ``data.prompts``, and ``tasks.NAME.file``."""
    files = {} if spec.data.prompts is None else {"data.prompts": spec.data.prompts}
    return files | {f"tasks.{name}.file": task.file for name, task in spec.tasks.items() if task.file is not None}


def read_prompts(spec: StudySpec, folder: StudyFolder) -> pd.DataFrame:
    """The columns of :func:`load_prompts` before prompts are compared and split; empty cells are missing values.

    Raises
    ------
    InputError
        If a file, column, cell or list of choices cannot be read.
    """
    tables = [] if spec.data.prompts is None else [_shared_rows(spec, locate_table(spec.data.prompts, folder))]
    tables += [
        _task_rows(read_table(file), file, task, name, chat=spec.all_rendered)
        for name, task in spec.tasks.items()
        if task.file is not None and (file := locate_table(task.file, folder))
    ]
    return pd.concat(tables, ignore_index=True).reindex(columns=list(COLUMNS)).astype(object)


def load_prompts(spec: StudySpec, folder: StudyFolder) -> pd.DataFrame:
    """The study's prompts, checked, rendered by their tasks' templates, with split and cluster filled in.

    Returns
    -------
    DataFrame
        Columns prompt, text, answer, task, domain, split, cluster, choices (all text; choices is a JSON list, empty
        where there are none; a text that is a list of chat messages is JSON, see :func:`chat_messages`), in the order
        of the files: ``data.prompts`` first, then the tasks with a file of their own. Without a cluster column each
        prompt is its own cluster. Without a split column whole clusters are drawn into verification and trial by a hash
        of (study seed, cluster), per task; of a column that names no trial prompts, a part of the verification clusters
        becomes trial in the same way.

    Raises
    ------
    InputError
        If a file is missing, unreadable or empty; a column or id is missing or duplicated; a text or answer is
        empty; a domain, split or task name is unknown; choices are no list; or a cluster has prompts in several splits.
    """
    table = read_prompts(spec, folder)
    path = " and ".join(str(locate_table(file, folder)) for file in prompt_files(spec).values())
    _check_ids(table, path)
    _check_tasks(table, path, spec)
    table[CLUSTER] = table[CLUSTER].fillna(table[PROMPT])  # of files without the column
    drawn = table[SPLIT].isna()
    table.loc[drawn, SPLIT] = SELECTION
    shares = {VERIFICATION: spec.selection.verification_share, TRIAL: spec.selection.trial_share}
    table = draw_split(table, shares, spec.seed, among=drawn)
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
        later = {TRIAL: spec.selection.trial_share / rest}
        table = draw_split(table, later, spec.seed, among=table[SPLIT] == VERIFICATION)
    return table


def load_texts(path: Path) -> list[str]:
    """Texts of a table's column ``text``; see :func:`~rlgen_stats.stores.table_files.read_table`.

    Raises
    ------
    InputError
        If the file cannot be read or has no such column.
    """
    table = read_table(path)
    if TEXT not in table.columns:
        raise InputError(f"{path} needs a column {TEXT!r}, got {', '.join(map(str, table.columns)) or 'none'}.")
    return text_cells(table, TEXT, path)


def choices_of(cell: str) -> tuple[str, ...]:
    """Choices of one prompt, from the column ``choices`` of :func:`load_prompts`; none for an empty cell."""
    return tuple(json.loads(cell)) if cell else ()


def _shared_rows(spec: StudySpec, path: Path) -> pd.DataFrame:
    """Rows of ``data.prompts``, each as its task's settings say, in the order of the file."""
    table = read_table(path)
    if TASK not in table or table.empty:
        return _task_rows(table, path, TaskSpec())  # which says what is missing
    names = pd.Series(text_cells(table, TASK, path))
    twice = [str(name) for name in names.unique() if spec.task(name).file is not None]
    if twice:
        raise InputError(f"{path} has rows of task {twice[0]!r}, which names a file of its own; keep one of the two.")
    return pd.concat(
        _task_rows(table.loc[rows.index], path, spec.task(name), chat=spec.all_rendered)
        for name, rows in names.groupby(names)
    ).sort_index()


def _task_rows(
    table: pd.DataFrame, path: Path, task: TaskSpec, name: str | None = None, *, chat: bool = False
) -> pd.DataFrame:
    """Prompts of one task, rendered by its template.

    ``table`` has the rows as they are in the file, numbered from 0 by their place there; ``name`` is the task's where
    the file is its own: rows need no column task then, nor ids. ``chat``: a template that is one column alone may be a
    list of chat messages there.
    """
    if table.empty:
        raise InputError(f"{path} has no prompts; expected at least one row.")
    table = _with_labels(table, task, name)
    fields = [field for field in template_fields(task.template) if field != CHOICES]
    optional = [label for label in (SPLIT, CLUSTER) if label in task.columns or label in table]
    labels = (FILE_ID, ANSWER, TASK, DOMAIN, *optional)
    theirs = {ours: task.column(ours) for ours in (*labels, *fields)}
    choices_column = task.choices or task.column(CHOICES)
    asked = {task.choices, task.columns.get(CHOICES), CHOICES if CHOICES in template_fields(task.template) else None}
    missing = [column for column in theirs.values() if column not in table]
    if choices_column not in table and (asked != {None} or task.n_choices is not None):
        missing.append(choices_column)
    if missing:
        raise InputError(f"{path} lacks the column(s) {missing}; it has {list(table.columns)}.")
    messages = fields if chat and FIELD.fullmatch(task.template) else []
    cells = {ours: text_cells(table, column, path, chat=ours in messages) for ours, column in theirs.items()}
    rows = pd.DataFrame({label: cells[label] for label in labels}, dtype=object, index=table.index)
    rows = rows.rename(columns={FILE_ID: PROMPT})
    _check_filled({FILE_ID: cells[FILE_ID]} | {field: cells[field] for field in fields}, rows, path)
    rows[CHOICES] = choice_cells(table, choices_column, path) if choices_column in table else ""
    choices = rows[CHOICES].map(choices_of)
    _check_numbers(choices, rows, path, task)
    rows[TEXT] = [
        _render(task.template, {field: cells[field][row] for field in fields}, of_row)
        for row, of_row in enumerate(choices)
    ]
    return rows[[PROMPT, TEXT, ANSWER, TASK, DOMAIN, CHOICES, *optional]]


def _with_labels(table: pd.DataFrame, task: TaskSpec, name: str | None) -> pd.DataFrame:
    """The table with ids, task and domain where the task's settings stand for these columns."""
    if name is not None:
        table = table.assign(**{TASK: name})
        if FILE_ID not in table and FILE_ID not in task.columns:
            table = table.assign(**{FILE_ID: [f"{name}-{row}" for row in range(1, len(table) + 1)]})
    elif FILE_ID not in table and PROMPT in table:
        table = table.assign(**{FILE_ID: table[PROMPT]})
    return table if task.domain is None else table.assign(**{DOMAIN: task.domain})


def choice_cells(table: pd.DataFrame, column: str, path: Path) -> list[str]:
    """A column's lists of choices, or JSON of them, as JSON; empty text where a cell is empty.

    Raises
    ------
    InputError
        If a cell is anything else, or a choice is empty.
    """
    cells = zip(table.index + 1, table[column], strict=True)
    choices = [_choices(cell, column, row, path) for row, cell in cells]
    return [json.dumps(of_row, ensure_ascii=False) if of_row else "" for of_row in choices]


def _choices(cell: Any, column: str, row: int, path: Path) -> tuple[str, ...]:
    wrong = f"{path}: {column} of row {row} must be a list of texts, or its JSON, none of them empty; got {cell!r}."
    if isinstance(cell, str) and cell.strip():
        try:
            cell = json.loads(cell)
        except ValueError as error:
            raise InputError(wrong) from error
    if not isinstance(cell, list | tuple | np.ndarray):
        if _text(cell, f"{path}: {column} of row {row}").strip():
            raise InputError(wrong)
        return ()
    choices = tuple(_text(choice, f"{path}: {column} of row {row}").strip() for choice in cell)
    if not all(choices):
        raise InputError(wrong)
    return choices


def _check_numbers(choices: Iterable[tuple[str, ...]], rows: pd.DataFrame, path: Path, task: TaskSpec) -> None:
    expected = f"expected {task.n_choices}" if task.n_choices else f"expected up to {len(ascii_uppercase)}"
    for of_row, prompt in zip(choices, rows[PROMPT], strict=True):
        if len(of_row) > len(ascii_uppercase) or task.n_choices not in (None, len(of_row)):
            raise InputError(
                f"{path}: prompt {prompt!r} has {len(of_row)} choices, {expected}; correct n_choices or the table."
            )


def _render(template: str, cells: dict[str, str], choices: tuple[str, ...]) -> str:
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
    known = cells | {CHOICES: lines}
    return FIELD.sub(lambda match: known[match[2]] if match[2] else f"{{{match[1]}}}", template)


def text_cells(table: pd.DataFrame, column: str, path: Path, *, chat: bool = False) -> list[str]:
    """A column's cells as text: missing ones empty, whole numbers without a decimal point (a column of integers with a
    missing one is read as floats), lists of chat messages as JSON where ``chat`` says that a template renders them.

    Raises
    ------
    InputError
        If a cell is neither text nor a number nor a truth value: the text of a list or of bytes is Python's, no prompt.
    """
    where = f"{path}: {column} of row "
    return [_text(value, f"{where}{row}", chat) for row, value in zip(table.index + 1, table[column], strict=True)]


def chat_messages(text: str) -> list[dict[str, str]] | None:
    """The chat messages that a text is as JSON, a list of {"role": ..., "content": ...}; None of any other text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        return _as_messages(json.loads(text))
    except ValueError:
        return None


def plain_text(text: str) -> str:
    """What a prompt says, whether it is a text or chat messages: their contents, one after the other."""
    messages = chat_messages(text)
    return text if messages is None else "\n\n".join(message["content"] for message in messages)


def _as_messages(value: Any) -> list[dict[str, str]] | None:
    """Role and content of each message of a list of messages; None of anything else."""
    if not isinstance(value, list | tuple | np.ndarray) or not len(value):
        return None
    if not all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in value):
        return None
    # structs of a table have every key that one of them has
    return [{name: part for name, part in one.items() if part is not None} for one in value]


def _message_text(messages: list[dict[str, str]], where: str, chat: bool) -> str:
    if not chat:
        raise InputError(
            f"{where} is a list of chat messages, which no chat template renders: write chat_template: checkpoint "
            "(or a file) for the base and the runs that read it, and no words around it in the task's template; or "
            "write it as plain text."
        )
    for message in messages:
        if not all(isinstance(message.get(name), str) for name in ("role", "content")):
            raise InputError(f"{where} has a message whose role or content is no text, got {message}; write text.")
    return json.dumps(messages, ensure_ascii=False)


def _text(value: Any, where: str, chat: bool = False) -> str:
    messages = chat_messages(value) if isinstance(value, str) else _as_messages(value)
    if messages is not None:
        return _message_text(messages, where, chat)
    if value is None or value is pd.NA or (isinstance(value, float | np.floating) and np.isnan(value)):
        return ""
    if isinstance(value, float | np.floating) and value.is_integer():
        return str(int(value))
    if not isinstance(value, str | int | float | np.generic):
        raise InputError(f"{where} is a {type(value).__name__}, expected text; write it as text.")
    return str(value)


def check_label(values: Iterable[str], column: str, path: Path) -> None:
    """Refuse labels with a NUL character, which numpy drops at the end of a text: two ids would become one.

    Raises
    ------
    InputError
        Naming the first.
    """
    broken = next((value for value in values if "\0" in value), None)
    if broken is not None:
        raise InputError(f"{path}: {column} {broken!r} holds a NUL character; expected plain text: rename it.")


def _check_filled(cells: dict[str, list[str]], rows: pd.DataFrame, path: Path) -> None:
    labels = {label: rows[label].tolist() for label in (TASK, CLUSTER) if label in rows}
    for column, texts in (cells | labels).items():
        empty = [row for row, text in enumerate(texts) if not text.strip()]
        if empty:
            raise InputError(
                f"{path}: {len(empty)} row(s) have an empty {column}, the first is row {rows.index[empty[0]] + 1} "
                f"(prompt {rows[PROMPT].iloc[empty[0]]!r}); fill them or drop the rows."
            )
    for column in (column for column in (PROMPT, TASK, CLUSTER) if column in rows):
        check_label(rows[column], column, path)
    _check_values(rows, path, DOMAIN, DOMAINS)


def _check_ids(table: pd.DataFrame, path: str) -> None:
    twice = table[PROMPT][table[PROMPT].duplicated()]
    if len(twice):
        raise InputError(
            f"{path}: prompt ids must be unique, {twice.iloc[0]!r} comes more than once "
            f"({len(twice)} row(s) repeat an id); rename them."
        )


def _check_values(table: pd.DataFrame, path: Path | str, column: str, allowed: tuple[str, ...]) -> None:
    other = table[~table[column].isin(allowed)]
    if len(other):
        raise InputError(
            f"{path}: {column} must be one of {list(allowed)}, got {other[column].iloc[0]!r} for prompt "
            f"{other[PROMPT].iloc[0]!r} ({len(other)} row(s)); correct the {column} column."
        )


def _check_tasks(table: pd.DataFrame, path: str, spec: StudySpec) -> None:
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
    named = dict.fromkeys((*spec.tasks, *spec.selection.held_out_tasks, *spec.selection.control_tasks))
    unknown = [task for task in named if task not in tasks]
    if unknown:
        raise InputError(
            f"'tasks' or a list of tasks under 'selection' names {unknown}, but the tasks of {path} are {tasks}."
        )


def draw_split(
    table: pd.DataFrame, shares: dict[str, float], seed: int, *, among: pd.Series[bool] | None = None
) -> pd.DataFrame:
    """Move shares of each task's clusters to other parts of the split, smallest hash of (seed, cluster) first.

    A cluster over several tasks counts with the task of its first prompt. A task with enough clusters keeps at least
    one in every part; one with fewer serves the earlier parts, so that selection and confirmation both see it.

    Parameters
    ----------
    table
        Prompts with columns task, cluster and split.
    shares
        Part of the split -> share of each task's clusters.
    seed
        Of the hash.
    among
        Which rows may move; default all.

    Returns
    -------
    DataFrame
        The table with another column ``split``.
    """
    inside = pd.Series(True, index=table.index) if among is None else among
    first_task = table[inside].groupby(CLUSTER, sort=False)[TASK].first()
    moved: dict[str, str] = {}
    for _, members in first_task.groupby(first_task, sort=False):
        clusters = sorted((str(c) for c in members.index), key=lambda c: (derive_seed(seed, "split", c), c))
        start = 0
        for n_later, (target, share) in zip(reversed(range(len(shares))), shares.items(), strict=True):
            left = len(clusters) - start - 1  # one stays where it is; each part to come gets one, if that leaves any
            size = min(max(round(share * len(clusters)), 1), left - min(n_later, max(left - 1, 0)))
            moved |= dict.fromkeys(clusters[start : start + size], target)
            start += size
    moves = inside & table[CLUSTER].isin(list(moved))
    return table.assign(**{SPLIT: table[SPLIT].mask(moves, table[CLUSTER].map(moved).astype(object))})
