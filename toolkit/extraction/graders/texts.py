"""Graders that compare texts: after a marker, as a whole, or where a pattern finds them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from rlgen_stats.schemas.tasks import GraderSpec
from rlgen_stats.toolkit.extraction.graders.normal_forms import ANNOUNCED, bare, one_line, words
from rlgen_stats.toolkit.extraction.grading import Grader


def final_answer(text: str, marker: str) -> str | None:
    """The text after the last ``marker``, whitespace normalised; None without a marker or with nothing after it.

    A marker that starts or ends with a letter or digit must stand as a word there: ``ans`` is not found in ``answer``.
    """
    before = r"(?<!\w)" if re.match(r"\w", marker) else ""
    after = r"(?!\w)" if re.search(r"\w$", marker) else ""
    ends = [match.end() for match in re.finditer(before + re.escape(marker) + after, text)]
    return one_line(text[ends[-1] :]) or None if ends else None


@dataclass(frozen=True)
class FinalAnswerGrader(Grader):
    """Right when the text after the last marker is the answer, but for emphasis, a full stop, thousands separators."""

    marker: str = "ans"

    @classmethod
    def from_spec(cls, spec: GraderSpec) -> Self:
        """Uses ``marker`` and ``require_termination``."""
        return cls(spec.require_termination, spec.marker)

    def judge(self, text: str, answer: str, choices: Sequence[str]) -> bool | None:
        """Compare what stands after the last marker."""
        given = final_answer(text, self.marker)
        return None if given is None else bare(given) == bare(answer)

    def usual_form(self, answer: str) -> str:
        """The marker and the answer."""
        return f"{self.marker} {answer}"


@dataclass(frozen=True)
class ExactGrader(Grader):
    """Right when the completion, or what it announces as the answer, is the answer but for how it is written."""

    def judge(self, text: str, answer: str, choices: Sequence[str]) -> bool | None:
        """Compare words without case, articles and punctuation."""
        announced = [match["given"] for match in ANNOUNCED.finditer(text)][-1:]
        sentences = [re.split(r"[.!?]\s", given)[0] for given in announced]
        given = {words(found) for found in (text, *announced, *sentences)} - {()}
        return words(answer) in given if given else None


@dataclass(frozen=True)
class RegexGrader(Grader):
    """Right when the last match of a pattern, or its first group, is the answer but for how it is written."""

    pattern: str = ""

    @classmethod
    def from_spec(cls, spec: GraderSpec) -> Self:
        """Uses ``pattern`` and ``require_termination``."""
        return cls(spec.require_termination, spec.pattern or "")

    def judge(self, text: str, answer: str, choices: Sequence[str]) -> bool | None:
        """Compare the words of the last match."""
        matches = list(re.finditer(self.pattern, text))
        if not matches:
            return None
        given = matches[-1][1 if matches[-1].re.groups else 0] or ""
        return words(given) == words(answer) != ()

    def usual_form(self, answer: str) -> None:
        """Not known: a pattern cannot be turned round."""
        return
