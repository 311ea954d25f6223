"""The table of training prompts."""

from __future__ import annotations

from typing import Any, Final

import pandas as pd

from rlgen_stats.schemas.dims import TASK
from rlgen_stats.schemas.errors import InputError, SpecError
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.schemas.study import RunSpec, StudySpec
from rlgen_stats.stores import StudyFolder
from rlgen_stats.stores.prompts import CHOICES, choice_cells, read_table, text_cells

NEEDED: Final = {"sft": ("text", "answer", "completion"), "grpo": ("text", "answer"), "pretrain": ("text",)}
"""Columns each method needs: prompt or text, expected answer and, to imitate, the teacher's completion."""
N_PROBED: Final = 64
"""Rows whose tokenization across the prompt's end is checked; a mistake there is in every row or in none."""


def load_training_table(spec: StudySpec, run: RunSpec, folder: StudyFolder) -> pd.DataFrame:
    """The prompts a run trains on, as strings.

    Parameters
    ----------
    spec
        The study; ``data.train`` names the table (parquet, csv or jsonl).
    run
        The run; its method decides which columns are needed.
    folder
        The study's folder.

    Returns
    -------
    DataFrame
        The columns that its method needs; where the study lists tasks also task and choices (a JSON list, empty where
        there are none), if the table has them. Other columns are left out.

    Raises
    ------
    SpecError
        If no table is named or the file is missing.
    InputError
        If it cannot be read, is empty, lacks a column, or has an empty cell.
    """
    if spec.data.train is None:
        raise SpecError(
            f"run {run.name!r} is trained here but 'data.train' names no table; name a parquet, csv or jsonl."
        )
    path = folder.resolve(spec.data.train)
    if not path.exists():
        raise SpecError(f"'data.train' names {path}, which does not exist; correct the path.")
    table = read_table(path)
    needed = NEEDED[run.method]
    missing = [column for column in needed if column not in table.columns]
    if missing:
        why = "SFT imitates the completion of each row; " if missing == ["completion"] else ""
        raise InputError(
            f"{path} lacks {', '.join(map(repr, missing))}: {why}run {run.name!r} ({run.method}) needs the columns "
            f"{', '.join(needed)}, got {', '.join(map(str, table.columns)) or 'none'}."
        )
    if table.empty:
        raise InputError(f"{path} has no rows; expected at least one training prompt.")
    texts = pd.DataFrame({column: text_cells(table, column, path) for column in needed}, dtype=object)
    for column in needed:
        empty = texts[column].str.strip() == ""
        if empty.any():
            raise InputError(
                f"{path}: {int(empty.sum())} of {len(table)} rows have an empty {column!r}, the first is row "
                f"{int(empty.to_numpy().argmax())}; fill or drop them."
            )
    if spec.tasks and TASK in table:
        texts[TASK] = text_cells(table, TASK, path)
    if spec.tasks and CHOICES in table:
        texts[CHOICES] = choice_cells(table, CHOICES, path)
    return texts


def table_hash(table: pd.DataFrame) -> str:
    """Content hash of a training table."""
    return content_hash(table.to_dict(orient="list"))


def check_lengths(spec: StudySpec, run: RunSpec, table: pd.DataFrame, tokenizer: Any, arguments: Any) -> str:
    """Refuse lengths at which TRL's own default would cut training texts; what the study's own lengths cut is said.

    Parameters
    ----------
    spec, run, table
        The study, one of its runs, and the texts it trains on.
    tokenizer
        Base's.
    arguments
        trl.SFTConfig or trl.GRPOConfig of the run.

    Returns
    -------
    str
        One sentence, or nothing where nothing is cut.

    Raises
    ------
    SpecError
        If SFT texts are longer than a ``max_length`` that the run does not name.
    """
    if run.method == "grpo":
        trained, sampled = arguments.max_completion_length, spec.generation.max_new_tokens
        if trained is None or trained >= sampled:
            return ""
        return (
            f"run {run.name!r}: trainer.max_completion_length cuts completions in training at {trained} tokens, "
            f"generation.max_new_tokens elsewhere at {sampled}"
        )
    completed = run.method == "sft"  # and the end token follows
    texts = (table["text"] + table["completion"] if completed else table["text"]).tolist()
    lengths = [len(ids) + completed for ids in tokenizer(texts)["input_ids"]]
    limit = arguments.max_length
    n_longer = sum(limit is not None and length > limit for length in lengths)
    if not n_longer:
        return ""
    cut = f"run {run.name!r}: {n_longer} of {len(lengths)} training texts are longer than {limit} tokens and "
    if "max_length" in run.trainer:
        return f"{cut}cut there, by trainer.max_length (the longest has {max(lengths)})"
    raise SpecError(
        f"{cut}would be cut there, by TRL's default; write trainer.max_length: {max(lengths)} to keep them whole, or "
        f"{limit} to cut them."
    )


def check_boundary(table: pd.DataFrame, tokenizer: Any) -> None:
    """Refuse completions that change the prompt's last tokens when they are appended to it.

    SFT masks the prompt by its number of tokens, so a token across the boundary would be learned or masked wrongly.

    Raises
    ------
    InputError
        Naming the first such row.
    """
    for row, (text, completion) in enumerate(
        zip(table["text"][:N_PROBED], table["completion"][:N_PROBED], strict=True)
    ):
        alone = tokenizer(text)["input_ids"]
        joined = tokenizer(text + completion)["input_ids"]
        if joined[: len(alone)] != alone:
            raise InputError(
                f"training row {row}: the completion {completion[:40]!r} changes the tokens of the prompt it follows; "
                "start completions with the space or newline that separates them from the prompt."
            )
