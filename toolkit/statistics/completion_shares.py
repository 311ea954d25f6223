"""Terminated, answered, right: three facts of completions, and what their shares warn about."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

import numpy as np
import pandas as pd
import xarray as xr

from rlgen_stats.schemas.dims import GREEDY, MODEL, NOT_SAMPLED, PROMPT, SAMPLE, TASK
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

    Of models without samples it is the greedy completion that counts.

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
            sampled = outcomes["completion_tokens"] != NOT_SAMPLED
            share = outcomes[name].astype(float).where(sampled).mean(SAMPLE)
            greedy = outcomes.get(f"greedy_{name}")
            share = share if greedy is None else share.where(sampled.any(SAMPLE), greedy)
            of_prompt = np.asarray(share.transpose(MODEL, PROMPT).values, dtype=np.float64)
            columns = [
                of_prompt[:, index].mean(axis=1) if len(index) else of_prompt[:, :0].sum(axis=1) * np.nan
                for index in rows.values()
            ]
            shares[name] = ((MODEL, TASK), np.stack(columns, axis=1))
    return xr.Dataset(shares, coords={MODEL: outcomes[MODEL].values, TASK: list(rows)})


def share_warnings(
    shares: xr.Dataset, *, may_be_cut: Collection[str] = (), sampled: Collection[str] | None = None
) -> list[str]:
    """One sentence for every model of which, in some tasks, too many completions were cut off or cannot be read.

    Parameters
    ----------
    shares
        ``terminated`` and ``answered`` [model, task], either may be missing.
    may_be_cut
        Tasks in which a completion that was cut off may be right.
    sampled
        Models of which completions were sampled; the shares of the others are of their greedy ones. None: not said.
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
    warnings = []
    for name, (most, consequence) in kinds.items():
        for model, found in _missing_too_often(shares, name, most).items():
            tasks = {task: share for task, share in found.items() if name != "terminated" or task not in may_be_cut}
            if tasks:
                (first, share), *others = tasks.items()
                rest = "".join(f", {100 * other:.0f}% of {task}" for task, other in others)
                how = "" if sampled is None else "sampled " if model in sampled else "greedy "
                warnings.append(f"{100 * share:.0f}% of {model}'s {how}completions of task {first}{rest} {consequence}")
    return warnings


def _missing_too_often(shares: xr.Dataset, name: str, most: float) -> dict[str, dict[str, float]]:
    """Model -> task -> share of its completions that are not so, where that is more than ``most``."""
    if name not in shares:
        return {str(model): {} for model in shares[MODEL].values}
    missing = np.round(1 - shares[name].transpose(MODEL, TASK).values, 9)  # 1 - 0.95 is 0.05000000000000004
    tasks = np.asarray(shares[TASK].values).astype(np.str_).tolist()
    return {
        str(model): {task: float(share) for task, share in zip(tasks, row, strict=True) if share > most}
        for model, row in zip(shares[MODEL].values, missing, strict=True)
    }


def too_often_unread(shares: xr.Dataset) -> dict[str, list[str]]:
    """Model -> tasks of which more than ``UNREAD_WARNING`` of its completions have no readable answer."""
    return {model: list(tasks) for model, tasks in _missing_too_often(shares, "answered", UNREAD_WARNING).items()}


def unread_examples(completions: pd.DataFrame, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """The first few completions of some prompts in which no answer can be read: prompt, and the text's end.

    Sampled ones, where the model has any.

    Parameters
    ----------
    completions
        One model's: prompt, sample, text, answered.
    prompts
        Ids of a task's prompts.
    """
    sampled = completions[SAMPLE] != GREEDY
    rows = completions[sampled] if sampled.any() else completions
    rows = rows[~rows["answered"] & rows[PROMPT].isin(prompts)].head(N_EXAMPLES)
    return [
        (prompt, " ".join(text.split())[-EXCERPT:]) for prompt, text in zip(rows[PROMPT], rows["text"], strict=True)
    ]
