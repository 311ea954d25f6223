"""A few prompts with every model's completion, as illustrations of the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import pandas as pd

from rlgen_stats.schemas.dims import BASE_MODEL, BASE_RUN, GREEDY, PROMPT
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder
from rlgen_stats.stores.prompts import ANSWER, TEXT, plain_text, read_prompts
from rlgen_stats.stores.table_files import read_parquet
from rlgen_stats.toolkit.reporting.facts import StudyData
from rlgen_stats.toolkit.reporting.result_lookup import Results, final_models
from rlgen_stats.toolkit.statistics.completion_shares import too_often_unread, unread_examples

PER_KIND: Final = 3
"""Examples of each kind (gained, forgotten), from different tasks."""
MAX_CHARACTERS: Final = 600
"""Longest piece of text shown."""


@dataclass(frozen=True)
class Answer:
    """One model's greedy completion."""

    run: str
    text: str
    correct: bool
    format_class: str


@dataclass(frozen=True)
class Example:
    """One prompt."""

    kind: str
    prompt: str
    task: str
    text: str
    answer: str
    answers: tuple[Answer, ...]


def pick_examples(folder: StudyFolder, spec: StudySpec, results: Results, data: StudyData) -> list[Example]:
    """The first prompt of each task, in file order, that RL gained and that SFT forgot; empty without completions."""
    if data.prompts is None:
        return []
    sft, rl = (run.name for run in spec.contrasted)
    finals = {BASE_RUN: BASE_MODEL} | final_models(spec, results.get("behaviour"))
    greedy = {run: _greedy(folder, finals[run]) for run in (BASE_RUN, sft, rl) if run in finals}
    tables = {run: table for run, table in greedy.items() if table is not None}
    if set(tables) != {BASE_RUN, sft, rl}:
        return []
    right = pd.DataFrame({run: table["correct"].astype(bool) for run, table in tables.items()}).dropna()
    changed = {
        f"Gained by {rl}": ~right[BASE_RUN].astype(bool) & right[rl].astype(bool),
        f"Forgotten by {sft}": right[BASE_RUN].astype(bool) & ~right[sft].astype(bool),
    }
    texts = prompt_texts(folder, spec)
    prompts = data.prompts.set_index("prompt")
    examples = []
    for kind, chosen in changed.items():
        firsts = prompts[prompts.index.isin(chosen.index[chosen])]
        firsts = firsts.sort_values("domain", ascending=False, kind="stable").groupby("task", sort=False).head(1)
        for prompt, task in firsts["task"].head(PER_KIND).items():
            answers = tuple(
                Answer(
                    run,
                    shortened(table.at[prompt, "text"]),
                    bool(right.at[prompt, run]),
                    str(table.at[prompt, "format_class"]),
                )
                for run, table in tables.items()
            )
            text, answer = texts.get(str(prompt), ("", ""))
            examples.append(Example(kind, str(prompt), str(task), shortened(text), answer, answers))
    return examples


@dataclass(frozen=True)
class Unread:
    """Completions of one model and task in which too often no answer can be read."""

    model: str
    task: str
    texts: list[tuple[str, str]]
    """Prompt, and the end of the completion."""


def pick_unread(folder: StudyFolder, results: Results, data: StudyData) -> list[Unread]:
    """The first unread completions of the first model, for every task that has such models."""
    behaviour = results.get("behaviour")
    if behaviour is None or data.prompts is None:
        return []
    first: dict[str, str] = {}
    for model, tasks in too_often_unread(behaviour).items():
        first |= {task: model for task in tasks if task not in first}
    unread = []
    for task, model in first.items():
        prompts = data.prompts["prompt"][data.prompts["task"] == task].tolist()
        path = folder.completions / f"{model}.parquet"
        if prompts and path.exists():  # pooled tasks have no prompts of their own
            table = read_parquet(path, columns=["prompt", "sample", "text", "answered"])
            unread.append(Unread(model, task, unread_examples(table, prompts)))
    return unread


def _greedy(folder: StudyFolder, model: str) -> pd.DataFrame | None:
    path = folder.completions / f"{model}.parquet"
    if not path.exists():
        return None
    table = read_parquet(path, columns=["prompt", "sample", "text", "correct", "format_class"])
    return table[table["sample"] == GREEDY].drop_duplicates("prompt").set_index("prompt")


def prompt_texts(folder: StudyFolder, spec: StudySpec) -> dict[str, tuple[str, str]]:
    """``prompt -> (text, answer)``, empty if the prompts cannot be read."""
    try:
        prompts = read_prompts(spec, folder)
    except InputError:
        return {}
    rows = zip(prompts[PROMPT], prompts[TEXT], prompts[ANSWER], strict=True)
    return {prompt: (plain_text(text), answer) for prompt, text, answer in rows}


def shortened(text: object, most: int = MAX_CHARACTERS) -> str:
    """A text of at most ``most`` characters, and a mark where it was cut."""
    text = str(text)
    return text if len(text) <= most else text[:most].rstrip() + " …"
