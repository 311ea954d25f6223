"""The table of training prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pandas as pd

from rlgen_stats.schemas.dims import TASK
from rlgen_stats.schemas.errors import InputError, SpecError
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.schemas.study import RunSpec, StudySpec
from rlgen_stats.stores import StudyFolder
from rlgen_stats.stores.hub import is_on_hub, locate_table
from rlgen_stats.stores.prompts import CHOICES, chat_messages, choice_cells, text_cells
from rlgen_stats.stores.table_files import read_table
from rlgen_stats.toolkit.extraction.batching import encode
from rlgen_stats.toolkit.extraction.rendering import PromptReader

NEEDED: Final = {"sft": ("text", "answer", "completion"), "grpo": ("text", "answer"), "pretrain": ("text",)}
"""Columns each method needs: prompt or text, expected answer and, to imitate, the teacher's completion."""


def load_training_table(spec: StudySpec, run: RunSpec, folder: StudyFolder) -> pd.DataFrame:
    """The prompts a run trains on, as strings.

    Parameters
    ----------
    spec
        The study; ``data.train`` names the table.
    run
        The run; its method decides which columns are needed.
    folder
        The study's folder.

    Returns
    -------
    DataFrame
        The columns that its method needs; where the study lists tasks also task and choices (a JSON list, empty where
        there are none), if the table has them. Other columns are left out. Where the run reads a chat template, a text
        may be a list of chat messages (then JSON, see :func:`chat_messages`) and a completion the assistant's message.

    Raises
    ------
    SpecError
        If no table is named or the file is missing.
    InputError
        If it cannot be read, is empty, lacks a column, or has an empty cell.
    """
    if spec.data.train is None:
        raise SpecError(f"run {run.name!r} is trained here but 'data.train' names no table; name one.")
    path = locate_table(spec.data.train, folder)
    if not path.exists() and not is_on_hub(spec.data.train):
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
    cells = {column: text_cells(table, column, path, chat=run.rendered and column != "answer") for column in needed}
    if "completion" in cells:
        cells["completion"] = [_completion(text, row, path) for row, text in enumerate(cells["completion"], start=1)]
    texts = pd.DataFrame(cells, dtype=object)
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


def check_lengths(spec: StudySpec, run: RunSpec, table: pd.DataFrame, reader: PromptReader, arguments: Any) -> str:
    """Refuse lengths at which TRL's own default would cut training texts; what the study's own lengths cut is said.

    Parameters
    ----------
    spec, run, table
        The study, one of its runs, and the texts it trains on.
    reader
        How the run reads them.
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
    lengths = [len(ids) for ids in encode_training(table, reader)["input_ids"]]
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


def _completion(text: str, row: int, path: Path) -> str:
    """A completion as text, also one that is the assistant's message."""
    messages = chat_messages(text)
    if messages is None:
        return text
    if [message["role"] for message in messages] != ["assistant"]:
        raise InputError(
            f"{path}: completion of row {row} holds {len(messages)} chat messages; expected one, of the assistant."
        )
    return messages[0]["content"]


def encode_training(table: pd.DataFrame, reader: PromptReader) -> dict[str, list[list[int]]]:
    """Texts as a run reads them, those with a completion with it and the tokenizer's end token behind.

    Returns
    -------
    dict
        ``input_ids`` of each row, and of completions ``completion_mask``, 1 where they are: SFT learns these alone.

    Raises
    ------
    InputError
        If a completion changes the last tokens of its prompt, so that a token across the boundary would be learned or
        masked wrongly; naming the first such row.
    """
    end, special = reader.tokenizer.eos_token or "", reader.template is None
    prompts = [reader.render(text) for text in table["text"]]
    if "completion" not in table:
        return {"input_ids": encode(reader.tokenizer, prompts, special=special)}
    whole = [prompt + text.removesuffix(end) + end for prompt, text in zip(prompts, table["completion"], strict=True)]
    ids = encode(reader.tokenizer, whole, special=special)
    masks = []
    for row, (alone, joined) in enumerate(zip(encode(reader.tokenizer, prompts, special=special), ids, strict=True)):
        if joined[: len(alone)] != alone:
            raise InputError(
                f"training row {row}: the completion {table['completion'].iloc[row][:40]!r} changes the tokens of the "
                "prompt it follows; start completions with the space or newline that separates them from the prompt, "
                "and with neither after a chat template."
            )
        masks.append([0] * len(alone) + [1] * (len(joined) - len(alone)))
    return {"input_ids": ids, "completion_mask": masks}
