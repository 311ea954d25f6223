"""Terminated, answered, right: three facts of completions, and what their shares warn about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import pandas as pd
import xarray as xr

from rlgen_stats.schemas.dims import GREEDY, MODEL, PROMPT, SAMPLE, TASK
from rlgen_stats.toolkit.statistics.kernels.numerics import IntArray

TRUNCATED_WARNING: Final = 0.05
"""Share of a task's completions cut off by the length limit above which accuracies are more about length than skill."""
UNREAD_WARNING: Final = 0.10
"""Share of a task's completions without a readable answer above which its accuracy is about format or the grader."""


N_EXAMPLES: Final = 5
"""Completions shown of a model's task in which too often no answer can be read."""
EXCERPT: Final = 120
"""Characters shown of each, from its end, where answers stand."""


def completion_shares(outcomes: xr.Dataset, rows: Mapping[str, IntArray] | None = None) -> xr.Dataset:
    """Shares of sampled completions that ended by themselves, and of those in which an answer can be read.

    Parameters
    ----------
    outcomes
        Layout ``outcomes``.
    rows
        Name -> numbers of its prompts; default: the tasks.

    Returns
    -------
    xr.Dataset
        ``terminated`` and ``answered`` [model, task], fractions; without variables for stores of releases that did not
        keep them.
    """
    tasks = np.asarray(outcomes[TASK].values).astype(np.str_)
    rows = rows or {name: np.flatnonzero(tasks == name) for name in dict.fromkeys(tasks.tolist())}
    shares = {}
    for name in ("terminated", "answered"):
        if name in outcomes:
            of_prompt = np.asarray(outcomes[name].mean(SAMPLE).transpose(MODEL, PROMPT).values, dtype=np.float64)
            columns = [
                of_prompt[:, index].mean(axis=1) if len(index) else of_prompt[:, :0].sum(axis=1) * np.nan
                for index in rows.values()
            ]
            shares[name] = ((MODEL, TASK), np.stack(columns, axis=1))
    return xr.Dataset(shares, coords={MODEL: outcomes[MODEL].values, TASK: list(rows)})


def share_warnings(shares: xr.Dataset) -> list[str]:
    """One sentence for every model and task with too many completions cut off, or without a readable answer.

    Parameters
    ----------
    shares
        ``terminated`` and ``answered`` [model, task], either may be missing.
    """
    kinds = {
        "terminated": (
            TRUNCATED_WARNING,
            "were cut off by the length limit and count as wrong; raise generation.max_new_tokens, or give the task "
            "stop strings if its models run on.",
        ),
        "answered": (
            UNREAD_WARNING,
            "have no answer that its grader can read and count as wrong; look at some, then correct the task's grader "
            "or template.",
        ),
    }
    return [
        f"{100 * (1 - share):.0f}% of {model}'s completions of task {task} {consequence}"
        for name, (most, consequence) in kinds.items()
        if name in shares
        for model, row in zip(shares[MODEL].values, shares[name].transpose(MODEL, TASK).values, strict=True)
        for task, share in zip(shares[TASK].values, row, strict=True)
        if round(1 - share, 9) > most  # 1 - 0.95 is 0.05000000000000004
    ]


def too_often_unread(shares: xr.Dataset) -> dict[str, list[str]]:
    """Model -> tasks of which more than ``UNREAD_WARNING`` of its completions have no readable answer."""
    tasks = np.asarray(shares[TASK].values).astype(np.str_)
    if "answered" not in shares:
        return {str(model): [] for model in shares[MODEL].values}
    unread = np.round(1 - shares["answered"].transpose(MODEL, TASK).values, 9) > UNREAD_WARNING
    return {str(model): tasks[row].tolist() for model, row in zip(shares[MODEL].values, unread, strict=True)}


def unread_examples(completions: pd.DataFrame, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """The first few sampled completions of some prompts in which no answer can be read: prompt, and the text's end.

    Parameters
    ----------
    completions
        One model's: prompt, sample, text, answered.
    prompts
        Ids of a task's prompts.
    """
    unread = completions[(completions[SAMPLE] != GREEDY) & ~completions["answered"] & completions[PROMPT].isin(prompts)]
    rows = unread.head(N_EXAMPLES)
    return [
        (prompt, " ".join(text.split())[-EXCERPT:]) for prompt, text in zip(rows[PROMPT], rows["text"], strict=True)
    ]
