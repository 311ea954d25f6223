"""The reward of reinforcement learning: the study's grader, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlgen_stats.toolkit.extraction.generation import Completion
from rlgen_stats.toolkit.extraction.grading import Grader


class FinalAnswerReward:
    """1 for a completion that the grader calls correct, else 0, in the form TRL calls.

    TRL decodes completions without special tokens, so whether a completion ended by itself is read from its token ids.

    Parameters
    ----------
    grader
        The study's grader; the same one decides outcomes.
    stops
        Token ids that end a completion.
    """

    __name__ = "correct"

    def __init__(self, grader: Grader, stops: Sequence[int]) -> None:
        self._grader, self._stops = grader, frozenset(stops)

    def __call__(
        self,
        *,
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        answer: Sequence[str],
        **columns: Any,
    ) -> list[float]:
        """Rewards, one per completion."""
        return [
            float(self._grader.grade(self._completion(text, ids), expected).correct)
            for text, ids, expected in zip(completions, completion_ids, answer, strict=True)
        ]

    def _completion(self, text: str, ids: Sequence[int]) -> Completion:
        tokens = tuple(int(token) for token in ids)
        return Completion(tokens, text, bool(tokens) and tokens[-1] in self._stops)
