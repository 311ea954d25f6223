"""Prompts with what every model and every arm of the trial answered: where contexts, examples and claims lead to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pandas as pd

from rlgen_stats.schemas.dims import BASE_MODEL, GREEDY
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder
from rlgen_stats.toolkit.reporting.arm_rows import RANDOM_KINDS, arms_of, in_order
from rlgen_stats.toolkit.reporting.examples import prompt_texts, shortened
from rlgen_stats.toolkit.reporting.facts import StudyData
from rlgen_stats.toolkit.reporting.result_lookup import Results, final_models, labels_of

MAX_PROMPTS: Final = 200
"""Prompts shown: those that examples and selected features lead to, then trial prompts, in file order."""
MAX_ARMS: Final = 12
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
    texts, replies = prompt_texts(folder, spec), _replies(folder, spec, results, chosen)
    cards = []
    for prompt in chosen:
        text, answer = texts.get(prompt, ("", ""))
        cards.append(
            PromptCard(
                prompt=prompt,
                task=str(table.at[prompt, "task"]),
                split=str(table.at[prompt, "split"]),
                text=shortened(text),
                answer=answer,
                replies=tuple(replies.get(prompt, ())),
            )
        )
    return cards


def _replies(folder: StudyFolder, spec: StudySpec, results: Results, prompts: list[str]) -> dict[str, list[Reply]]:
    replies: dict[str, list[Reply]] = {}
    finals = final_models(spec, results.get("behaviour"))
    models = [BASE_MODEL, *(finals[run.name] for run in spec.runs if run.name in finals)]
    for model in models:
        _add(replies, folder.completions / f"{model}.parquet", prompts, model, greedy=True)
    trial = results.get("intervention")
    for direction in labels_of(trial, "direction"):
        arms = [] if trial is None else in_order(arms_of(trial, direction))
        for arm in [arm for arm in arms if arm.kind not in RANDOM_KINDS][:MAX_ARMS]:
            file = folder.root / "intervention" / direction / f"{arm.condition}.parquet"
            _add(replies, file, prompts, f"{direction}: {arm.label}", greedy=False)
    return replies


def _add(replies: dict[str, list[Reply]], file: Path, prompts: list[str], who: str, *, greedy: bool) -> None:
    """Append the greedy, or the first sampled, completion of each prompt that the file has."""
    if not file.exists():
        return
    table = pd.read_parquet(file, columns=["prompt", "sample", "text", "correct", "format_class"])
    table = table[(table["sample"] == (GREEDY if greedy else 0)) & table["prompt"].isin(prompts)]
    for row in table.drop_duplicates("prompt").to_dict("records"):
        reply = Reply(
            who=who,
            how="greedy" if greedy else "sampled",
            text=shortened(row["text"], MAX_LETTERS),
            correct=bool(row["correct"]),
            format_class=str(row["format_class"]),
        )
        replies.setdefault(str(row["prompt"]), []).append(reply)
