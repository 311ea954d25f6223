"""Prompts with what every model and every arm of the trial answered: where contexts, examples and claims lead to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd

from rlgen_stats.schemas.dims import BASE_MODEL, GREEDY
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder
from rlgen_stats.stores.table_files import read_parquet
from rlgen_stats.stores.trial_completions import ArmFiles
from rlgen_stats.toolkit.reporting.arm_rows import RANDOM_KINDS, Arm, arms_of, in_order
from rlgen_stats.toolkit.reporting.examples import prompt_texts, shortened
from rlgen_stats.toolkit.reporting.facts import StudyData
from rlgen_stats.toolkit.reporting.result_lookup import Results, final_models, labels_of

MAX_PROMPTS: Final = 200
"""Prompts shown: those that examples and selected features lead to, then trial prompts, in file order."""
MAX_ARMS: Final = 24
"""Arms of one direction shown a prompt, random sets left out."""
MAX_LETTERS: Final = 300
"""Longest piece of one completion; with the numbers above the page stays below 2 MB."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What one model, edited or not, said to a prompt."""

    who: str
    """Model, or direction and arm."""
    how: str
    """``greedy`` or ``sampled``."""
    text: str
    correct: bool
    format_class: str


@dataclass(frozen=True, kw_only=True)
class PromptCard:
    """One prompt and all that was said to it."""

    prompt: str
    task: str
    split: str
    text: str
    answer: str
    replies: tuple[Reply, ...]

    @property
    def anchor(self) -> str:
        """Id of its section."""
        return f"prompt-{self.prompt}"


def prompt_cards(
    folder: StudyFolder, spec: StudySpec, results: Results, data: StudyData, wanted: Iterable[str]
) -> list[PromptCard]:
    """The prompts wanted first, then trial prompts, ``MAX_PROMPTS`` at most; empty without a table of prompts."""
    if data.prompts is None:
        return []
    table = data.prompts.set_index("prompt")
    trial = table.index[table["split"] == "trial"].tolist()
    chosen = [prompt for prompt in dict.fromkeys([*wanted, *trial]) if prompt in table.index][:MAX_PROMPTS]
    sources = reply_sources(folder, spec, results)
    return cards_of(folder, spec, data.prompts, chosen, sources)


@dataclass(frozen=True, kw_only=True)
class ReplySource:
    """One model, edited or not, whose completions a study holds."""

    who: str
    """Model, or direction and arm."""
    file: Path
    greedy: bool
    """Whether its greedy completion is meant, or its first sampled one."""

    def read(self, *columns: str, prompts: Iterable[str] | None = None) -> pd.DataFrame:
        """Columns of one completion a prompt, by prompt; without rows where the file is missing."""
        if not self.file.exists():
            return pd.DataFrame(columns=[*columns], index=pd.Index([], name="prompt"))
        filters: list[tuple[str, str, Any]] = [("sample", "==", GREEDY if self.greedy else 0)]
        filters += [] if prompts is None else [("prompt", "in", list(prompts))]
        table = read_parquet(self.file, columns=["prompt", *columns], filters=filters)
        return table.drop_duplicates("prompt").set_index("prompt")


def model_source(folder: StudyFolder, model: str) -> ReplySource:
    """Greedy completions of a model."""
    return ReplySource(who=model, file=folder.completions / f"{model}.parquet", greedy=True)


def arm_source(folder: StudyFolder, arm: Arm, dictionary: int = 1) -> ReplySource:
    """First sampled completions of an arm of the study's trial in one dictionary."""
    files = ArmFiles(folder.root / "intervention", dictionary=dictionary)
    file = files.path(arm.direction, arm.condition, arm.kind)
    return ReplySource(who=f"{arm.direction}: {arm.label}", file=file, greedy=False)


def reply_sources(folder: StudyFolder, spec: StudySpec, results: Results, *, dictionary: int = 1) -> list[ReplySource]:
    """Base, the runs' final models, and the first ``MAX_ARMS`` arms of each direction, random sets left out."""
    finals = final_models(spec, results.get("behaviour"))
    models = [BASE_MODEL, *(finals[run.name] for run in spec.runs if run.name in finals)]
    trial = results.get("intervention")
    arms = []
    for direction in labels_of(trial, "direction"):
        of_direction = [] if trial is None else in_order(arms_of(trial, direction))
        arms += [arm for arm in of_direction if arm.kind not in RANDOM_KINDS][:MAX_ARMS]
    return [*(model_source(folder, model) for model in models), *(arm_source(folder, arm, dictionary) for arm in arms)]


def cards_of(
    folder: StudyFolder, spec: StudySpec, table: pd.DataFrame, prompts: list[str], sources: Iterable[ReplySource]
) -> list[PromptCard]:
    """Prompts, in order, with what each source said; ``table`` has a row a prompt: prompt, task, split."""
    of_prompts, texts = table.set_index("prompt"), prompt_texts(folder, spec)
    replies: dict[str, list[Reply]] = {}
    for source in sources:
        _add(replies, source, prompts)
    return [
        PromptCard(
            prompt=prompt,
            task=str(of_prompts.at[prompt, "task"]),
            split=str(of_prompts.at[prompt, "split"]),
            text=shortened(texts.get(prompt, ("", ""))[0]),
            answer=texts.get(prompt, ("", ""))[1],
            replies=tuple(replies.get(prompt, ())),
        )
        for prompt in prompts
    ]


def _add(replies: dict[str, list[Reply]], source: ReplySource, prompts: list[str]) -> None:
    """Append the completion of each prompt that a source has."""
    table = source.read("text", "correct", "format_class", prompts=prompts)
    for prompt, row in zip(table.index, table.to_dict("records"), strict=True):
        reply = Reply(
            who=source.who,
            how="greedy" if source.greedy else "sampled",
            text=shortened(row["text"], MAX_LETTERS),
            correct=bool(row["correct"]),
            format_class=str(row["format_class"]),
        )
        replies.setdefault(str(prompt), []).append(reply)
