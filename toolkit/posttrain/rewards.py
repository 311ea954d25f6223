"""The reward of reinforcement learning: the study's graders, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlgen_stats.stores.prompts import choices_of
from rlgen_stats.toolkit.extraction.generation import Completion
from rlgen_stats.toolkit.extraction.grading import Grader


class GradedReward:
    """1 for a completion that the grader calls correct, else 0, in the form TRL calls.

    TRL decodes completions without special tokens, so whether a completion ended by itself is read from its token ids.

    Parameters
    ----------
    grader
        Grader of rows without a task, and of tasks without one of their own.
    of_tasks
        Task -> its grader; the same ones decide outcomes.
    stops
        Token ids that end a completion.
    """

    __name__ = "correct"

    def __init__(self, grader: Grader, of_tasks: Mapping[str, Grader], stops: Sequence[int]) -> None:
        self._grader, self._of_tasks, self._stops = grader, of_tasks, frozenset(stops)

    def __call__(
        self,
        *,
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        answer: Sequence[str],
        task: Sequence[str] | None = None,
        choices: Sequence[str] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Rewards, one per completion; ``choices`` are JSON lists, empty where a row has none."""
        n = len(completions)
        rows = zip(completions, completion_ids, answer, task or [""] * n, choices or [""] * n, strict=True)
        return [
            float(
                self._of_tasks.get(name, self._grader)
                .grade(self._completion(text, ids), expected, choices_of(of_row))
                .correct
            )
            for text, ids, expected, name, of_row in rows
        ]

    def _completion(self, text: str, ids: Sequence[int]) -> Completion:
        tokens = tuple(int(token) for token in ids)
        return Completion(tokens, text, bool(tokens) and tokens[-1] in self._stops)
