"""Graders: whether a completion is correct, and its format class."""

from __future__ import annotations

import importlib
import re
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Protocol

from math_verify import parse, verify

from rlgen_stats.schemas.tasks import GRADERS, GraderSpec
from rlgen_stats.toolkit.extraction.generation import Completion

MAX_NGRAM: Final = 8
"""Longest repeated unit looked for, in words; loops of language models are short or a clause."""
MIN_REPEATS: Final = 4
"""Repetitions that make a loop: three in a row occur in ordinary lists and counts."""
MATH_TIMEOUT: Final = 5
"""Seconds for parsing and comparing one formula; a few take minutes to simplify."""


@dataclass(frozen=True)
class Grade:
    """Verdict on one completion."""

    correct: bool
    format_class: str
    """One of ``schemas.dims.FORMAT_CLASSES``."""
    answered: bool
    """Whether an answer can be read, right or wrong, in a text that ended or was cut off."""


class Grader(Protocol):
    """Turns completions into grades; a new one is a class and a line in ``schemas.tasks.GRADERS``."""

    @classmethod
    def from_spec(cls, spec: GraderSpec) -> Grader:
        """The grader with the study's settings, of which it takes what it knows."""

    def grade(self, completion: Completion, answer: str) -> Grade:
        """Grade one completion against the expected answer."""


def make_grader(spec: GraderSpec) -> Grader:
    """The grader a study asks for, one of ``schemas.tasks.GRADERS``.

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


def normalize(text: str) -> str:
    """Text with every run of whitespace as one space, none at the ends."""
    return " ".join(text.split())


def final_answer(text: str, marker: str) -> str | None:
    """The text after the last ``marker``, whitespace normalised; None without a marker or with nothing after it.

    A marker that starts or ends with a letter or digit must stand as a word there: ``ans`` is not found in ``answer``.
    """
    before = r"(?<!\w)" if re.match(r"\w", marker) else ""
    after = r"(?!\w)" if re.search(r"\w$", marker) else ""
    ends = [match.end() for match in re.finditer(before + re.escape(marker) + after, text)]
    return normalize(text[ends[-1] :]) or None if ends else None


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


def _grade(completion: Completion, *, answered: bool, equal: bool, require_termination: bool) -> Grade:
    correct = equal and (completion.terminated or not require_termination)
    if correct:  # first: a right answer may itself repeat words, and so look degenerate
        ending = "answer"
    elif not completion.text.strip():
        ending = "empty"
    elif is_degenerate(completion.text) and not equal:
        ending = "degenerate"
    elif not completion.terminated:  # what can be read in it may be a step on the way
        ending = "truncated"
    else:
        ending = "answer" if answered else "no_answer"
    return Grade(correct, ending, answered)


@dataclass(frozen=True)
class FinalAnswerGrader:
    """Right when the text after the last marker is the answer, letter for letter up to whitespace."""

    marker: str
    require_termination: bool = True

    @classmethod
    def from_spec(cls, spec: GraderSpec) -> FinalAnswerGrader:
        """Uses ``marker`` and ``require_termination``."""
        return cls(spec.marker, spec.require_termination)

    def grade(self, completion: Completion, answer: str) -> Grade:
        """Grade one completion; cut off ones are wrong where termination is required."""
        given = final_answer(completion.text, self.marker)
        answered, equal = given is not None, given == normalize(answer)
        return _grade(completion, answered=answered, equal=equal, require_termination=self.require_termination)


@dataclass(frozen=True)
class MathGrader:
    """Right when math-verify finds the last formula of the text equal to the answer."""

    require_termination: bool = True

    @classmethod
    def from_spec(cls, spec: GraderSpec) -> MathGrader:
        """Uses ``require_termination``."""
        return cls(spec.require_termination)

    def grade(self, completion: Completion, answer: str) -> Grade:
        """Grade one completion; cut off ones are wrong where termination is required."""
        timeout = math_timeout()
        formulas = parse(completion.text, parsing_timeout=timeout)
        equal = bool(formulas) and bool(verify(list(parse_gold(answer)), formulas, timeout_seconds=timeout))
        answered = bool(formulas)
        return _grade(completion, answered=answered, equal=equal, require_termination=self.require_termination)


def math_timeout() -> int | None:
    """Seconds a formula may take; None off the main thread, where math-verify's alarm signal cannot be set."""
    return MATH_TIMEOUT if threading.current_thread() is threading.main_thread() else None


@lru_cache(maxsize=1 << 16)  # an answer is compared with every model's and sample's completion
def parse_gold(answer: str) -> tuple[Any, ...]:
    """Parsed forms of an expected answer, read as LaTeX where it is none by itself; empty if unreadable."""
    timeout = math_timeout()
    wrapped = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
    return tuple(parse(wrapped, parsing_timeout=timeout)) or tuple(parse(answer, parsing_timeout=timeout))
