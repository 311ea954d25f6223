"""The grader of formulas: in this process where a comparison can be ended, else in one of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rlgen_stats.toolkit.extraction.graders import formulas
from rlgen_stats.toolkit.extraction.graders.formulas_apart import FormulaProcess, alarms_reach_this_thread
from rlgen_stats.toolkit.extraction.grading import Grader

_APART: Final = FormulaProcess(formulas.__name__)


@dataclass(frozen=True)
class MathGrader(Grader):
    """Right when the last box, a final answer said after it, or without both the last formula equals the answer.

    Without a box, an answer of words or a letter is also right where the completion ends with it.
    """

    def judge(self, text: str, answer: str, choices: Sequence[str]) -> bool | None:
        """Compare by value; numbers that say their base, digit for digit."""
        return formulas.judged(text, answer) if alarms_reach_this_thread() else _APART.judge(text, answer)

    def usual_form(self, answer: str) -> str:
        """The answer in a box."""
        return rf"\boxed{{{answer}}}"
