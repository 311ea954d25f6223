"""Graders: whether a completion is correct, and its format class."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Self

import pandas as pd

from rlgen_stats.schemas.dims import PROMPT, TASK
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.schemas.tasks import GRADERS, GraderSpec
from rlgen_stats.stores.prompts import ANSWER, CHOICES, TEXT, choices_of, plain_text
from rlgen_stats.toolkit.extraction.generation import Completion

MAX_NGRAM: Final = 8
"""Longest repeated unit looked for, in words; loops of language models are short or a clause."""
MIN_REPEATS: Final = 4
"""Repetitions that make a loop: three in a row occur in ordinary lists and counts."""
N_NAMED: Final = 10
"""Prompt ids that a message about unreadable answers lists."""


@dataclass(frozen=True)
class Grade:
    """Verdict on one completion."""

    correct: bool
    format_class: str
    """One of ``schemas.dims.FORMAT_CLASSES``."""
    answered: bool
    """Whether an answer can be read, right or wrong, in a text that ended or was cut off."""


@dataclass(frozen=True)
class Grader(ABC):
    """Turns completions into grades; a new one is a subclass and a line in ``schemas.tasks.GRADERS``."""

    require_termination: bool = True
    """Whether a completion cut off by the length limit counts as wrong."""
    needs_generation: ClassVar[bool] = True
    """Whether it reads completions; False: models score the choices, and nothing is generated."""

    @classmethod
    def from_spec(cls, spec: GraderSpec) -> Self:
        """The grader with a task's settings, of which it takes what it knows."""
        return cls(spec.require_termination)

    @abstractmethod
    def judge(self, text: str, answer: str, choices: Sequence[str]) -> bool | None:
        """Whether a completion's text gives the expected answer; None where no answer can be read in it."""

    def usual_form(self, answer: str) -> str | None:
        """A completion that gives an answer as the task's prompts ask for it; None where that is not known."""
        return answer

    def grade(self, completion: Completion, answer: str, choices: Sequence[str] = ()) -> Grade:
        """Grade one completion; cut off ones are wrong where termination is required."""
        text = completion.text
        verdict = self.judge(text, answer, choices) if text.strip() else None
        answered, equal = verdict is not None, verdict is True
        correct = equal and (completion.terminated or not self.require_termination)
        if correct:  # first: a right answer may itself repeat words, and so look degenerate
            ending = "answer"
        elif not text.strip():
            ending = "empty"
        elif is_degenerate(text) and not equal:
            ending = "degenerate"
        elif not completion.terminated:  # what can be read in it may be a step on the way
            ending = "truncated"
        else:
            ending = "answer" if answered else "no_answer"
        return Grade(correct, ending, answered)


def make_grader(spec: GraderSpec) -> Grader:
    """The grader a task asks for, one of ``schemas.tasks.GRADERS``.

    Examples
    --------
    >>> from rlgen_stats.schemas.tasks import GraderSpec
    >>> grader = make_grader(GraderSpec(marker="ans"))
    >>> grader.grade(Completion((1, 2), "3 plus 4 ans 7", True), "7")
    Grade(correct=True, format_class='answer', answered=True)
    """
    module, _, name = GRADERS[spec.name].partition(":")
    grader: type[Grader] = getattr(importlib.import_module(module), name)
    return grader.from_spec(spec)


def graders_of(spec: StudySpec, tasks: Iterable[str]) -> dict[str, Grader]:
    """Task -> its grader."""
    return {task: make_grader(spec.grader_of(task)) for task in dict.fromkeys(tasks)}


def grade_all(graders: Mapping[str, Grader], completions: Iterable[Completion], prompts: pd.DataFrame) -> list[Grade]:
    """Grades of one completion a prompt, each by its task's grader; ``prompts`` as ``load_prompts`` returns them."""
    rows = zip(completions, prompts[TASK], prompts[ANSWER], prompts[CHOICES].map(choices_of), strict=True)
    return [graders[task].grade(completion, answer, choices) for completion, task, answer, choices in rows]


def check_answers(graders: Mapping[str, Grader], prompts: pd.DataFrame, *, where: str = "") -> None:
    """Refuse expected answers that their task's grader does not find right when they are given as they stand.

    Whatever a model wrote to such a prompt would be wrong. Prompts without choices are refused where those are to be
    scored. ``where`` names the table, where it is not the study's.

    Raises
    ------
    InputError
        With task, grader and the prompts' ids.
    """
    for name, of_task in prompts.groupby(TASK, sort=False):
        task = str(name)
        grader, what = graders[task], where or f"task {task!r}"
        bare = of_task[PROMPT][(of_task[CHOICES] == "").to_numpy()]
        if not grader.needs_generation and len(bare):
            raise InputError(
                f"{what}: {len(bare)} prompt(s) have no choices to be scored, the first is {bare.iloc[0]!r}; add a "
                f"column {CHOICES!r} or name another grader."
            )
        unread = []
        for prompt, answer, choices in zip(of_task[PROMPT], of_task[ANSWER], of_task[CHOICES], strict=True):
            text = grader.usual_form(answer)
            if text is not None and grader.judge(text, answer, choices_of(choices)) is not True:
                unread.append(f"{prompt} ({answer!r})")
        if unread:
            more = f" and {len(unread) - N_NAMED} more" if len(unread) > N_NAMED else ""
            raise InputError(
                f"{what}: the grader cannot read {len(unread)} of {len(of_task)} expected answer(s): "
                f"{', '.join(unread[:N_NAMED])}{more}; correct the answers, drop the rows or name another "
                f"grader under {f'tasks.{task}.grader' if task else 'grader'}."
            )


def check_letters(spec: StudySpec, prompts: pd.DataFrame) -> None:
    """Refuse tasks whose letters are scored although no prompt says what they stand for.

    Raises
    ------
    InputError
        Naming the task.
    """
    for name, rows in prompts.groupby(TASK, sort=False):
        texts = zip(rows[TEXT].map(plain_text), rows[CHOICES].map(choices_of), strict=True)
        shown = any(all(choice in text for choice in choices) for text, choices in texts)
        if spec.grader_of(str(name)).options == "letters" and not shown:
            raise InputError(
                f"task {name!r}: letters are scored, but no prompt shows the choices that they stand for; put "
                f"{{choices}} into tasks.{name}.template, or score texts (options: texts)."
            )


def is_degenerate(text: str) -> bool:
    """Whether the text ends in one n-gram repeated MIN_REPEATS times or more that fills at least half of it."""
    words = text.split()
    for n in range(1, MAX_NGRAM + 1):
        if len(words) < n * MIN_REPEATS:
            return False
        repeated = n
        while repeated < len(words) and words[-repeated - 1] == words[-repeated - 1 + n]:
            repeated += 1
        if repeated >= n * MIN_REPEATS and 2 * repeated >= len(words):
            return True
    return False
