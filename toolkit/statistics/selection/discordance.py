"""Tests on the gain prompts of each task: the target exceeds base there, and by more than where both are right.

Gain prompts (base wrong, target right) are selected by outcome. A feature that correlates with correctness in either
model differs on them too, so that a guard must reject beside the test on gains. One that rises on all prompts alike
passes that; only the excess over prompts that both models get right tells it apart (docs/method.md 4c).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import dask.array as da
import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.core.feature_blocks import Block, map_features
from rlgen_stats.toolkit.statistics.core.units import cluster_sums, unit_means
from rlgen_stats.toolkit.statistics.kernels import bootstrap_t, contrast_contributions, sign_flip_test
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray
from rlgen_stats.toolkit.statistics.selection.options import SelectionTests
from rlgen_stats.toolkit.statistics.selection.task_prompts import TaskPrompts

MIN_FLIP_UNITS: Final = 6
"""Fewest units of gains, and of prompts both get right, that are tested: the smallest one-sided p-value of six sign
flips is 2^-6 = .016, below .05 by a margin."""

CONTRAST, ALL_PROMPTS, NO_GUARD = GUARDS = ("contrast", "all prompts", "none")
"""What guards a task against selection by outcome: the RL-specific contrast, all prompts, or nothing."""

UNUSED_TASK: Final = "no: not selected on"
"""Stands for the reason where a task is held out or a control."""

STATISTICS: Final = ("p_flip", "contrast", "contrast_p", "p_guard", "excess", "excess_p", "task_effect")
"""What is computed of every task and feature."""


@dataclass(frozen=True, kw_only=True)
class SplitTests:
    """Results in one part of the split; arrays are [task, feature] with NaN where not estimable."""

    tasks: list[str]
    p_flip: FloatArray
    """One-sided sign-flip p-value on gain prompts: no guard."""
    contrast: FloatArray
    """RL-specific contrast: sum of the mean differences on gains and on losses."""
    contrast_p: FloatArray
    """Its one-sided p-value, by sign flips of contributions."""
    p_guard: FloatArray
    """``contrast_p``, or where losses are too few the sign-flip p-value on all prompts."""
    p_task: FloatArray
    """max(p_flip, p_guard)."""
    excess: FloatArray
    """Mean difference on gains less that on prompts both get right: zero for a rise everywhere."""
    excess_p: FloatArray
    """Its one-sided p-value; where losses suffice the larger of that and the p-value of the contrast less twice the
    mean difference on prompts both get right, which is zero for what rises and follows correctness at once."""
    guard: list[str]
    """Which of ``GUARDS`` a task has."""
    contrast_estimable: list[str]
    """``yes``, or why there is no contrast."""
    estimable: list[str]
    """``yes``, or why a task is not tested."""
    excess_estimable: list[str]
    """``yes``, or why there is no excess."""
    task_effect: FloatArray
    """Mean difference over all prompts of the task."""
    effect: FloatArray
    """[3, feature]: mean difference over all prompts of the tasks selected on, lower, upper."""
    score: FloatArray
    """[feature]: mean over tasks of the mean difference on gain prompts."""

    @property
    def tested(self) -> NDArray[np.bool_]:
        """[task]: whether it has p-values."""
        return np.array([state == "yes" for state in self.estimable], dtype=bool)

    @property
    def excess_tested(self) -> NDArray[np.bool_]:
        """[task]: whether it has an excess, too."""
        return np.array([state == "yes" for state in self.excess_estimable], dtype=bool)


@dataclass(frozen=True)
class _TaskPlan:
    """What is computed for one task."""

    prompts: TaskPrompts
    used: bool = False
    flip: bool = False
    contrast: bool = False
    excess: bool = False
    seed: int = 0


def discordance_tests(
    values: da.Array,
    prompts: dict[str, TaskPrompts],
    *,
    used: dict[str, bool],
    split: str,
    codes: IntArray | None,
    options: SelectionTests,
    seed: int,
) -> SplitTests:
    """Run every task's tests on the prompts in ``prompts`` and on no others.

    Parameters
    ----------
    values
        [2 (base, target), prompt, feature].
    prompts
        Task -> its prompts in this half of the split.
    used
        Task -> whether it is tested; of the others only ``task_effect`` is computed.
    split
        ``selection`` or ``verification``; seeds depend on it. Only the latter has intervals, since no effect is
        reported from prompts that helped to choose.
    codes
        Cluster per prompt, or None.
    options, seed
        As in ``select_features``; ``n_bootstrap=0`` gives no intervals.
    """
    plans: dict[str, _TaskPlan] = {}
    reasons: list[str] = []
    contrast_reasons: list[str] = []
    excess_reasons: list[str] = []
    guards: list[str] = []
    for task, of_task in prompts.items():
        if not used[task]:
            plans[task] = _TaskPlan(of_task)
            for column in (reasons, contrast_reasons, excess_reasons, guards):
                column.append(UNUSED_TASK)
            continue
        n_gain, n_loss, n_kept = (n_units(rows, codes) for rows in (of_task.gain, of_task.loss, of_task.kept))
        needed = options.min_discordant
        can_flip = n_gain >= MIN_FLIP_UNITS
        can_contrast = can_flip and min(n_gain, n_loss) >= needed
        can_exceed = can_flip and n_kept >= MIN_FLIP_UNITS
        task_seed = derive_seed(seed, "selection", split, task)
        plans[task] = _TaskPlan(
            of_task, used=True, flip=can_flip, contrast=can_contrast, excess=can_exceed, seed=task_seed
        )
        reasons.append(_reason(len(of_task.gain), n_gain))
        contrast_reasons.append(
            "yes" if can_contrast else f"no: {n_gain} gains and {n_loss} losses, {needed} of each needed"
        )
        excess_reasons.append(
            "yes" if can_exceed else f"no: {n_gain} gains and {n_kept} both right, {MIN_FLIP_UNITS} of each needed"
        )
        guards.append(NO_GUARD if not can_flip else CONTRAST if can_contrast else ALL_PROMPTS)
    pooled = [np.empty(0, dtype=np.int64), *(of_task.every for task, of_task in prompts.items() if used[task])]
    mapped = map_features(
        _block,
        [values],
        outputs=dict.fromkeys(STATISTICS, (len(plans),)) | {"effect": (3,), "score": ()},
        plans=list(plans.values()),
        pooled=np.sort(np.concatenate(pooled)),
        codes=codes,
        n_bootstrap=options.n_bootstrap if split == "verification" else 0,
        alpha=options.alpha,
        seed=derive_seed(seed, "selection", split, "interval"),
    )
    arrays = dict(zip(mapped.features, da.compute(*mapped.features.values()), strict=True))
    return SplitTests(
        tasks=list(plans),
        p_task=np.maximum(arrays["p_flip"], arrays["p_guard"]),
        guard=guards,
        contrast_estimable=contrast_reasons,
        excess_estimable=excess_reasons,
        estimable=reasons,
        **arrays,
    )


def _reason(n_prompts: int, n_gain: int) -> str:
    if n_prompts == 0:
        return "no: 0 base-wrong/target-right prompts"
    if n_gain < MIN_FLIP_UNITS:
        return f"score only: {n_gain} base-wrong/target-right units, the flip test needs {MIN_FLIP_UNITS}"
    return "yes"


def n_units(index: IntArray, codes: IntArray | None) -> int:
    """Number of units, prompts or clusters, of the prompts in ``index``."""
    return len(index) if codes is None else len(np.unique(codes[index]))


def _block(
    values: NDArray[Any],
    *,
    plans: list[_TaskPlan],
    pooled: IntArray,
    codes: IntArray | None,
    n_bootstrap: int,
    alpha: float,
    seed: int,
) -> Block:
    """All statistics of a block of features; ``values`` [2 (base, target), prompt, feature]."""
    d = values[1].astype(np.float64) - values[0]
    n, width = len(plans), d.shape[1]
    rows = {name: np.full((n, width), np.nan) for name in STATISTICS}
    scores = np.full((n, width), np.nan)
    for t, plan in enumerate(plans):
        prompts = plan.prompts
        if len(prompts.every):
            rows["task_effect"][t] = d[prompts.every].mean(axis=0)
        if plan.used and len(prompts.gain):
            scores[t] = d[prompts.gain].mean(axis=0)
        if not plan.flip:
            continue
        rows["p_flip"][t] = _flip_p(unit_means(d[prompts.gain], _codes(codes, prompts.gain)), plan.seed)
        if plan.contrast:
            rows["contrast"][t], rows["contrast_p"][t] = _contrast(d, *contrast_groups(prompts), codes, plan.seed)
            rows["p_guard"][t] = rows["contrast_p"][t]
        else:
            rows["p_guard"][t] = _flip_p(unit_means(d[prompts.every], _codes(codes, prompts.every)), plan.seed)
        if plan.excess:
            rows["excess"][t], rows["excess_p"][t] = _contrast(d, *excess_groups(prompts), codes, plan.seed)
        if plan.excess and plan.contrast:
            _, p = _contrast(d, *both_groups(prompts), codes, plan.seed)
            rows["excess_p"][t] = np.maximum(rows["excess_p"][t], p)
    effect = np.full((3, width), np.nan)
    if len(pooled):
        pooled_codes = _codes(codes, pooled)
        effect[0] = unit_means(d[pooled], pooled_codes).mean(axis=0)
        if n_bootstrap:
            effect[1:] = mean_interval(d[pooled], pooled_codes, alpha, n_bootstrap, seed)
    has_score = np.isfinite(scores).any(axis=1)
    score = scores[has_score].mean(axis=0) if has_score.any() else np.full(width, np.nan)
    return rows | {"effect": effect, "score": score}


def contrast_groups(prompts: TaskPrompts) -> tuple[list[IntArray], list[float]]:
    """Groups and weights of the RL-specific contrast: zero for what follows correctness alike in both models."""
    return [prompts.gain, prompts.loss], [1.0, 1.0]


def excess_groups(prompts: TaskPrompts) -> tuple[list[IntArray], list[float]]:
    """Groups and weights of "rises more on gains than where both are right": zero where a feature rises everywhere."""
    return [prompts.gain, prompts.kept], [1.0, -1.0]


def both_groups(prompts: TaskPrompts) -> tuple[list[IntArray], list[float]]:
    """Groups and weights of a contrast that is zero for an equal rise, for what follows correctness, and their sum."""
    return [prompts.gain, prompts.loss, prompts.kept], [1.0, 1.0, -2.0]


def _codes(codes: IntArray | None, index: IntArray) -> IntArray | None:
    return None if codes is None else codes[index]


def _flip_p(units: FloatArray, seed: int) -> FloatArray:
    """One-sided sign-flip p-value (target above base) of [unit, feature]; 1 where nothing differs."""
    p = sign_flip_test(units, alternative="greater", seed=seed).p_value
    return np.where((units == 0).all(axis=0), 1.0, np.asarray(p, dtype=np.float64))


def contrast_units(d: FloatArray, groups: list[IntArray], weights: list[float], codes: IntArray | None) -> FloatArray:
    """Contributions of units to a contrast of group means, [unit, feature]: clusters' are sums over their prompts."""
    used = np.sort(np.concatenate(groups))
    positions = [np.searchsorted(used, rows) for rows in groups]
    return cluster_sums(contrast_contributions(d[used], positions, weights), _codes(codes, used))


def _contrast(
    d: FloatArray, groups: list[IntArray], weights: list[float], codes: IntArray | None, seed: int
) -> tuple[FloatArray, FloatArray]:
    """A contrast of group means and its one-sided p-value."""
    units = contrast_units(d, groups, weights, codes)
    return units.sum(axis=0), _flip_p(units, seed)


def mean_interval(d: FloatArray, codes: IntArray | None, alpha: float, n_bootstrap: int, seed: int) -> FloatArray:
    """Bootstrap-t interval of the mean over units, [2, feature]; NaN where fewer than ten differences are not zero."""
    units = unit_means(d, codes)
    if len(units) < 2:
        return np.full((2, d.shape[1]), np.nan)
    interval = bootstrap_t(units, alpha=alpha, n_resamples=n_bootstrap, seed=seed)
    return np.stack([interval.low, interval.high])
