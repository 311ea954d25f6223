"""Two models' graded completions of the same prompts, compared prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
import pandas as pd
import xarray as xr

from rlgen_stats.schemas.dims import CLUSTER, PROMPT, SAMPLE, TASK
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.core.paired_accuracy import (
    INTERVAL,
    MCNEMAR,
    difference_interval,
    paired_p_value,
    paired_test,
    shares_clusters,
)
from rlgen_stats.toolkit.statistics.kernels import adjust, pass_at_k
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray

CORRECT: Final = "correct"
METRIC: Final = "metric"
"""Optional column: what graded the completion."""
CONTENT: Final = "content"
"""Optional column: text or digest of the prompt, so that equal ids of other prompts are not paired."""
ALL: Final = "all"
"""Row of all tasks together, every prompt with equal weight; the task of tables that name none."""
EXAMPLES: Final = 3
"""Prompts named in a message."""
SCORE_DIGITS: Final = 12
"""Digits of a prompt's mean score: the same scores summed in another order are a tie."""

Unpaired = Literal["error", "drop"]


def compare_outcomes(
    a: pd.DataFrame,
    b: pd.DataFrame,
    *,
    tasks: Sequence[str] | None = None,
    k: Sequence[int] | None = None,
    clusters: str | None = CLUSTER,
    unpaired: Unpaired = "error",
    names: tuple[str, str] = ("A", "B"),
    alpha: float = 0.05,
) -> xr.Dataset:
    """Compare two models on the same prompts: accuracy, paired difference, exact test and pass@k, per task and overall.

    Parameters
    ----------
    a, b
        One row a graded completion, columns ``prompt`` and ``correct`` (0, 1, or a score between; NaN is ungraded);
        optional ``task``, ``sample`` (which of several completions), ``cluster`` (prompts that depend on one another),
        ``metric`` and ``content``. :func:`rlgen_stats.toolkit.exchange.read_graded` makes them from tables, studies
        and the logs of lm-evaluation-harness and Inspect.
    tasks
        Tasks to compare; all where None.
    k
        Of pass@k; default 1, 2, 4, ... up to the fewest completions a prompt has.
    clusters
        Column of prompts that depend on one another; ``cluster`` is used where a table has it. None makes prompts the
        units.
    unpaired
        ``error``, or ``drop`` the prompts that only one table has a graded completion of.
    names
        Of the two models, for messages and attributes.
    alpha
        1 - coverage of the intervals.

    Returns
    -------
    xr.Dataset
        Layout ``outcome_comparison`` over task (``all`` last, where there are several) and k. Differences are B minus
        A. ``a_better`` and ``b_better`` are the discordant prompts: with one completion a prompt, those that only one
        model has right. ``n_samples_a`` and ``n_samples_b`` are the fewest completions a prompt has. Attributes
        ``n_ungraded_a`` and ``ungraded_a`` (and ``_b``) are the completions without a score, which are left out, and
        the first prompts that have one.

    Raises
    ------
    InputError
        If a column is missing or there twice, a score lies outside [0, 1], a completion comes twice, prompts do not
        pair, or the tables disagree on a prompt's content, cluster or metric.

    Notes
    -----
    Accuracies are means over prompts of each prompt's mean score. ``p_value``: exact McNemar where prompts are the
    units and have one right or wrong completion in each model, else the sign flip of differences summed within
    clusters (``p_test`` says which); NaN below six clusters. Exact where both models have as many completions of a
    prompt; otherwise only the mean difference is tested. ``p_holm`` is corrected over tasks; the row ``all`` is one
    test of its own. Intervals: :func:`difference_interval`. pass@k needs scores of 0 or 1: k is 1 otherwise.

    References
    ----------
    McNemar 1947, doi:10.1007/BF02295996; Chen et al. 2021, arXiv 2107.03374, eq. 1 (pass@k).

    Examples
    --------
    >>> prompts = [f"p{i}" for i in range(100)]
    >>> one = pd.DataFrame({"prompt": prompts, "correct": [0] * 33 + [1] * 59 + [0] * 8})
    >>> two = pd.DataFrame({"prompt": prompts, "correct": [1] * 33 + [0] * 59 + [0] * 8})
    >>> float(compare_outcomes(one, two).p_value.sel(task="all"))
    0.008780930806...
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha must lie between 0 and 1, got {alpha}.")
    one, two = (
        _by_prompt(_checked(table, name, clusters), name, tasks) for table, name in zip((a, b), names, strict=True)
    )
    pairs = _pairs(one, two, names, unpaired)
    groups = _groups(pairs)
    tries = _tries(pairs, k)
    found = pairs.index.get_level_values(TASK)
    rows = {str(task): np.flatnonzero(found == task) for task in one.index.unique(TASK) if task in found}
    if len(rows) > 1:
        if ALL in rows:
            raise InputError(f"a task is called {ALL!r}, the name of the row of all tasks together; rename it.")
        rows[ALL] = np.arange(len(pairs))
    cells = [_cells(pairs.iloc[index], groups[index], tries, alpha) for index in rows.values()]
    p = np.array([cell["p_value"] for cell in cells], dtype=np.float64)
    p_holm, n_family = p.copy(), len(rows) - (ALL in rows and len(rows) > 1)
    p_holm[:n_family] = adjust(p[:n_family], method="holm")
    by_k = [name for name in cells[0] if name.startswith("pass_")]
    exchangeable = bool((pairs["n_a"] == pairs["n_b"]).all())
    return xr.Dataset(
        {
            name: ((TASK, "k") if name in by_k else (TASK,), np.array([cell[name] for cell in cells]))
            for name in cells[0]
        }
        | {"p_holm": (TASK, p_holm)},
        coords={TASK: np.array(list(rows)), "k": np.array(tries)},
        attrs={
            "test": f"{MCNEMAR} or sign flip, see p_test",
            "null": "the models are exchangeable on every prompt" if exchangeable else "mean difference 0",
            "interval": INTERVAL,
            "unit": clusters if shares_clusters(groups) else PROMPT,
            "family": TASK,
            "family_size": int(np.isfinite(p[:n_family]).sum()),
            "alpha": alpha,
            "a": names[0],
            "b": names[1],
            **pairs.attrs,
        },
    )


def _by_prompt(table: pd.DataFrame, name: str, tasks: Sequence[str] | None) -> pd.DataFrame:
    """One row a prompt that has a graded completion: number and sum of its scores, whether they are 0 or 1, labels."""
    if tasks is not None:
        unknown = [task for task in tasks if task not in set(table[TASK])]
        if unknown:
            raise InputError(f"{name} has no task {unknown[0]!r}; it has {', '.join(table[TASK].unique())}.")
        table = table[table[TASK].isin(list(tasks))]
    labels = [label for label in (CLUSTER, CONTENT, METRIC) if label in table]
    by_prompt = table.groupby([TASK, PROMPT], sort=False)
    for label in labels:
        several = by_prompt[label].nunique(dropna=False) > 1
        if several.any():
            task, prompt = several.index[several][0]
            raise InputError(f"{name} gives prompt {prompt!r} of task {task!r} more than one {label}; expected one.")
    graded = (
        table[table[CORRECT].notna()].assign(binary=table[CORRECT].isin([0, 1])).groupby([TASK, PROMPT], sort=False)
    )
    rows = graded.agg(
        n=(CORRECT, "size"), total=(CORRECT, "sum"), binary=("binary", "all"), **{x: (x, "first") for x in labels}
    )
    ungraded = table[table[CORRECT].isna()]
    named = [f"{prompt!r} of {task!r}" for task, prompt in zip(ungraded[TASK], ungraded[PROMPT], strict=True)]
    rows.attrs = {"n_ungraded": len(named), "ungraded": ", ".join(list(dict.fromkeys(named))[:EXAMPLES])}
    return rows


def _checked(table: pd.DataFrame, name: str, clusters: str | None) -> pd.DataFrame:
    """The columns that are used, ids as text, scores as numbers, ``clusters`` called cluster."""
    twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise InputError(f"{name} has the column {str(twice[0])!r} more than once; rename or drop one of them.")
    if clusters not in (None, CLUSTER, *table.columns):
        raise InputError(
            f"{name} lacks the column {clusters!r} of clusters; it has {', '.join(map(str, table.columns))}."
        )
    if clusters != CLUSTER:
        table = table.drop(columns=CLUSTER, errors="ignore").rename(
            columns={} if clusters is None else {clusters: CLUSTER}
        )
    missing = [column for column in (PROMPT, CORRECT) if column not in table]
    if missing:
        raise InputError(f"{name} lacks the column {missing[0]!r}; it has {', '.join(map(str, table.columns))}.")
    if table.empty:
        raise InputError(f"{name} has no rows; expected one a graded completion.")
    known = [column for column in (PROMPT, TASK, SAMPLE, CLUSTER, CONTENT, METRIC, CORRECT) if column in table]
    for column in (PROMPT, TASK, SAMPLE):
        if column in table and table[column].isna().any():
            raise InputError(f"{name} has {int(table[column].isna().sum())} rows without {column}; fill it in.")
    table = table[known].assign(
        **{label: _as_text(table[label]) for label in (PROMPT, TASK, CLUSTER) if label in table}
    )
    if TASK not in table:
        table[TASK] = ALL
    scores = pd.to_numeric(table[CORRECT], errors="coerce").astype(float)
    wrong = (scores.isna() & table[CORRECT].notna()) | (scores < 0) | (scores > 1)
    if wrong.any():
        raise InputError(
            f"{name} has the score {str(table[CORRECT][wrong].iloc[0])!r} ({int(wrong.sum())} such rows); expected 1 "
            "(right), 0 (wrong), or a score between: rescale it or choose another metric."
        )
    table[CORRECT] = scores
    key = [TASK, PROMPT, *([SAMPLE] if SAMPLE in table else [])]
    repeats = table.duplicated(key)
    if repeats.any():
        row = table[repeats].iloc[0]
        what = f"sample {row[SAMPLE]} of prompt" if SAMPLE in table else "prompt"
        raise InputError(
            f"{name} has {what} {row[PROMPT]!r} of task {row[TASK]!r} more than once ({int(repeats.sum())} such rows); "
            + ("remove the repeats." if SAMPLE in table else "number its completions in a column 'sample'.")
        )
    return table


def _as_text(labels: pd.Series) -> pd.Series:
    """Labels as text, whole numbers alike whether a table holds them as 1 or 1.0; missing ones stay missing."""
    return labels.astype(object).map(
        lambda label: f"{label:.0f}" if isinstance(label, float) and label.is_integer() else str(label),
        na_action="ignore",
    )


def _pairs(a: pd.DataFrame, b: pd.DataFrame, names: tuple[str, str], unpaired: Unpaired) -> pd.DataFrame:
    """One row a prompt that both have, sorted: n_a, total_a, n_b, total_b, binary, and the labels."""
    if unpaired not in ("error", "drop"):
        raise InputError(f"unpaired must be error or drop, got {unpaired!r}.")
    pairs = a.merge(b, left_index=True, right_index=True, suffixes=("_a", "_b")).sort_index()
    only = [len(side) - len(pairs) for side in (a, b)]
    if not len(pairs) or (any(only) and unpaired == "error"):
        alone = [place for side in (a, b) for place in side.index.difference(pairs.index)[:EXAMPLES]]
        examples = ", ".join(f"{prompt!r} of {task!r}" for task, prompt in alone)
        raise InputError(
            f"{len(pairs)} prompts pair, {only[0]} are graded only in {names[0]} and {only[1]} only in {names[1]} "
            f"(e.g. {examples}); give both the same prompts, or keep the common ones with unpaired='drop' (--common)."
        )
    for label in (CLUSTER, CONTENT, METRIC):
        if f"{label}_a" not in pairs:
            continue
        differ = pairs[f"{label}_a"].astype(str) != pairs[f"{label}_b"].astype(str)
        if differ.any():
            row = pairs[differ].iloc[0]
            task, prompt = pairs.index[differ][0]
            raise InputError(
                f"{int(differ.sum())} prompts have another {label} in {names[0]} than in {names[1]}, e.g. {prompt!r} "
                f"of {task!r}: {str(row[f'{label}_a'])[:40]!r} and {str(row[f'{label}_b'])[:40]!r}; expected the same: "
                "evaluate and label both alike, or drop the column from one table."
            )
        pairs[label] = pairs[f"{label}_a"]
    pairs["binary"] = pairs["binary_a"] & pairs["binary_b"]
    pairs.attrs = {"n_unpaired_a": only[0], "n_unpaired_b": only[1]}
    pairs.attrs |= {f"{name}_{side}": rows.attrs[name] for name in a.attrs for side, rows in (("a", a), ("b", b))}
    return pairs


def _groups(pairs: pd.DataFrame) -> IntArray:
    """Cluster of each prompt; the prompt itself where none is named."""
    if CLUSTER not in pairs:
        return np.arange(len(pairs))
    if pairs[CLUSTER].isna().any():
        raise InputError(f"{int(pairs[CLUSTER].isna().sum())} prompts have no cluster; fill it in or drop the column.")
    return np.asarray(pd.factorize(pairs[CLUSTER], sort=True)[0], dtype=np.int64)


def _tries(pairs: pd.DataFrame, k: Sequence[int] | None) -> list[int]:
    most = int(min(pairs["n_a"].min(), pairs["n_b"].min())) if pairs["binary"].all() else 1
    if k is None:
        return [2**i for i in range(most.bit_length())]
    wrong = [one for one in k if not 1 <= one <= most]
    if wrong or not k:
        raise InputError(
            f"pass@{wrong[0] if wrong else '?'} needs that many completions of every prompt, graded 0 or 1; the fewest "
            f"that a prompt has here is {most}: choose k from 1 to {most}."
        )
    return sorted(set(k))


def _cells(pairs: pd.DataFrame, groups: IntArray, tries: list[int], alpha: float) -> dict[str, object]:
    """All numbers of one task."""
    n_a, n_b, total_a, total_b = (pairs[name].to_numpy() for name in ("n_a", "n_b", "total_a", "total_b"))
    a, b = (np.round(total / n, SCORE_DIGITS) for total, n in ((total_a, n_a), (total_b, n_b)))
    low, high = difference_interval(b - a, groups, alpha)
    cells: dict[str, object] = {
        "n_prompts": len(pairs),
        "n_clusters": len(np.unique(groups)),
        "n_samples_a": int(n_a.min()),
        "n_samples_b": int(n_b.min()),
        "accuracy_a": float(a.mean()),
        "accuracy_b": float(b.mean()),
        "difference": float((b - a).mean()),
        "difference_low": low,
        "difference_high": high,
        "a_better": int((a > b).sum()),
        "b_better": int((b > a).sum()),
        "p_value": paired_p_value(b - a, groups),
        "p_test": paired_test(b - a, groups),
    }
    passes = [(_passes(total_a, n_a, k), _passes(total_b, n_b, k)) for k in tries]
    intervals = [difference_interval(second - first, groups, alpha) for first, second in passes]
    return cells | {
        "pass_a": [float(first.mean()) for first, _ in passes],
        "pass_b": [float(second.mean()) for _, second in passes],
        "pass_difference": [float((second - first).mean()) for first, second in passes],
        "pass_difference_low": [low for low, _ in intervals],
        "pass_difference_high": [high for _, high in intervals],
    }


def _passes(total: FloatArray, n: IntArray, k: int) -> FloatArray:
    """pass@k of each prompt; pass@1 is the mean score, whatever the scores are."""
    return total / n if k == 1 else np.asarray(pass_at_k(total, n, k))
