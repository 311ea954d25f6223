"""A grader of the user's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.tasks import GraderSpec
from rlgen_stats.toolkit.extraction.grading import Grader


@dataclass(frozen=True)
class FunctionGrader(Grader):
    """Right when a function of the user's says so."""

    function: Callable[[str, str, list[str]], Any] | None = None

    @classmethod
    def from_spec(cls, spec: GraderSpec) -> Self:
        """Uses ``python`` and ``require_termination``.

        Raises
        ------
        InputError
            If there is no such module or function.
        """
        module, _, name = str(spec.python).partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"no grader {spec.python!r} ({error}); install its package or put its folder on PYTHONPATH."
            ) from error
        return cls(spec.require_termination, function)

    def judge(self, text: str, answer: str, choices: Sequence[str]) -> bool | None:
        """What the function returns."""
        if self.function is None:
            raise InputError("a grader of your own needs 'python: package.module:function'.")
        verdict = self.function(text, answer, list(choices))
        return None if verdict is None else bool(verdict)

    def usual_form(self, answer: str) -> None:
        """Not known."""
        return
