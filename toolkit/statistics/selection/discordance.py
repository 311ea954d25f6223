"""Tests on the discordant prompts of each task: the target exceeds base where it gained, beyond selection by outcome.

Discordant prompts are those that one model answers right and the other wrong: gains (base wrong, target right) and
losses. Gains alone are selected by outcome, so that every feature that correlates with correctness differs on them; a
guard that selection cannot bias, the contrast of gains and losses or a test on all prompts, must reject too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import dask.array as da
import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.core.feature_blocks import Block, map_features
from rlgen_stats.toolkit.statistics.core.units import unit_means
from rlgen_stats.toolkit.statistics.kernels import bootstrap_t, permutation_contrast, sign_flip_test
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray
from rlgen_stats.toolkit.statistics.selection.options import SelectionTests
from rlgen_stats.toolkit.statistics.selection.tasks import TaskPrompts

MIN_FLIP_UNITS: Final = 6
"""Fewest gain units tested by sign flips: the smallest one-sided p-value is then 2^-6 = .016, below .05 by a margin."""

CONTRAST, ALL_PROMPTS, NO_GUARD = GUARDS = ("contrast", "all prompts", "none")
"""What guards a task's p-value against selection by outcome: gains against losses, all prompts, or nothing."""

UNUSED_TASK: Final = "no: not selected on"
"""Stands for the reason where a task is held out or a control."""

STATISTICS: Final = ("p_flip", "contrast", "contrast_p", "p_guard", "task_effect")
"""What is computed of every task and feature."""


@dataclass(frozen=True, kw_only=True)
class SplitTests:
    """Results in one half of the split; arrays are [task, feature] with NaN where not estimable."""

    tasks: list[str]
    p_flip: FloatArray
    """One-sided sign-flip p-value on gain prompts: no guard."""
    contrast: FloatArray
    """Mean on gains less mean on losses of the difference right minus wrong model."""
    contrast_p: FloatArray
    """Its one-sided permutation p-value."""
    p_guard: FloatArray
    """``contrast_p``, or where that is not estimable the sign-flip p-value on all prompts."""
    p_task: FloatArray
    """max(p_flip, p_guard)."""
    guard: list[str]
    """Which of ``GUARDS`` a task has."""
    contrast_estimable: list[str]
    """``yes``, or why there is no contrast."""
    estimable: list[str]
    """``yes``, or why a task is not tested."""
    task_effect: FloatArray
    """Mean difference over all prompts of the task."""
    effect: FloatArray
    """[3, feature]: mean difference over all prompts of the tasks selected on, lower, upper."""
    score: FloatArray
    """[feature]: mean over tasks of the mean difference on gain prompts."""

    @property
    def tested(self) -> NDArray[np.bool_]:
        """[task]: whether any feature has a p-value."""
        return np.asarray(np.isfinite(self.p_task).any(axis=1))


@dataclass(frozen=True)
class _TaskPlan:
    """What is computed for one task."""

    prompts: TaskPrompts
    used: bool = False
    flip: bool = False
    contrast: bool = False
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
    guards: list[str] = []
    for task, of_task in prompts.items():
        if not used[task]:
            plans[task] = _TaskPlan(of_task)
            for column in (reasons, contrast_reasons, guards):
                column.append(UNUSED_TASK)
            continue
        n_gain = n_units(of_task.gain, codes)
        gains, losses = (len(units) for units in discordant_units(of_task, codes)[1:])
        needed = options.min_discordant
        can_contrast = min(gains, losses) >= needed
        can_flip = n_gain >= MIN_FLIP_UNITS
        task_seed = derive_seed(seed, "selection", split, task)
        plans[task] = _TaskPlan(of_task, used=True, flip=can_flip, contrast=can_contrast, seed=task_seed)
        reasons.append(_reason(len(of_task.gain), n_gain))
        contrast_reasons.append(
            "yes" if can_contrast else f"no: {gains} gains and {losses} losses, {needed} of each needed"
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
        n_resamples=options.n_resamples,
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
        estimable=reasons,
        **arrays,
    )


def _reason(n_gain: int, n_units: int) -> str:
    if n_gain == 0:
        return "no: 0 base-wrong/target-right prompts"
    if n_units < MIN_FLIP_UNITS:
        return f"score only: {n_units} base-wrong/target-right units, the flip test needs {MIN_FLIP_UNITS}"
    return "yes"


def n_units(index: IntArray, codes: IntArray | None) -> int:
    """Number of units, prompts or clusters, of the prompts in ``index``."""
    return len(index) if codes is None else len(np.unique(codes[index]))


def discordant_units(prompts: TaskPrompts, codes: IntArray | None) -> tuple[list[IntArray], IntArray, IntArray]:
    """Discordant units: the prompts of each, which units are gains, and which are losses.

    With clusters a unit is a cluster whose discordant prompts are all gains or all losses. Mixed clusters are left out:
    permuting the labels of whole clusters leaves that choice as it is, so the permutation stays valid.
    """
    index = np.concatenate([prompts.gain, prompts.loss])
    sign = np.concatenate([np.ones(len(prompts.gain)), -np.ones(len(prompts.loss))])
    if codes is None:
        units = [np.array([i]) for i in index]
        return units, np.flatnonzero(sign > 0), np.flatnonzero(sign < 0)
    units, signs = [], []
    for code in np.unique(codes[index]):
        in_cluster = codes[index] == code
        if len(np.unique(sign[in_cluster])) == 1:
            units.append(index[in_cluster])
            signs.append(sign[in_cluster][0])
    return units, np.flatnonzero(np.array(signs) > 0), np.flatnonzero(np.array(signs) < 0)


def _block(
    values: NDArray[Any],
    *,
    plans: list[_TaskPlan],
    pooled: IntArray,
    codes: IntArray | None,
    n_resamples: int,
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
        if plan.contrast:
            rows["contrast"][t], rows["contrast_p"][t] = _contrast(d, prompts, codes, n_resamples, plan.seed)
        if plan.flip:
            rows["p_flip"][t] = _flip_p(d, prompts.gain, codes, plan.seed)
            rows["p_guard"][t] = rows["contrast_p"][t] if plan.contrast else _flip_p(d, prompts.every, codes, plan.seed)
    effect = np.full((3, width), np.nan)
    if len(pooled):
        pooled_codes = None if codes is None else codes[pooled]
        effect[0] = unit_means(d[pooled], pooled_codes).mean(axis=0)
        if n_bootstrap:
            effect[1:] = mean_interval(d[pooled], pooled_codes, alpha, n_bootstrap, seed)
    has_score = np.isfinite(scores).any(axis=1)
    score = scores[has_score].mean(axis=0) if has_score.any() else np.full(width, np.nan)
    return rows | {"effect": effect, "score": score}


def _flip_p(d: FloatArray, index: IntArray, codes: IntArray | None, seed: int) -> FloatArray:
    """One-sided sign-flip p-value (target above base) of the units in ``index``; 1 where nothing differs."""
    units = unit_means(d[index], None if codes is None else codes[index])
    p = sign_flip_test(units, alternative="greater", seed=seed).p_value
    return np.where((units == 0).all(axis=0), 1.0, np.asarray(p, dtype=np.float64))


def _contrast(
    d: FloatArray, prompts: TaskPrompts, codes: IntArray | None, n_resamples: int, seed: int
) -> tuple[FloatArray, FloatArray]:
    """mean(D* | gain) - mean(D* | loss) with D* = right minus wrong model, and its permutation p-value."""
    units, gains, losses = discordant_units(prompts, codes)
    signed = d.copy()
    signed[prompts.loss] *= -1
    order = np.concatenate(units)
    member = np.repeat(np.arange(len(units)), [len(unit) for unit in units])
    means = unit_means(signed[order], member)
    test = permutation_contrast(means[gains], means[losses], alternative="greater", n_resamples=n_resamples, seed=seed)
    # A feature that is the same in every unit gives no evidence, not a missing value.
    return means[gains].mean(axis=0) - means[losses].mean(axis=0), np.nan_to_num(test.p_value, nan=1.0)


def mean_interval(d: FloatArray, codes: IntArray | None, alpha: float, n_bootstrap: int, seed: int) -> FloatArray:
    """Bootstrap-t interval of the mean over units, [2, feature]; NaN where fewer than ten differences are not zero."""
    units = unit_means(d, codes)
    if len(units) < 2:
        return np.full((2, d.shape[1]), np.nan)
    interval = bootstrap_t(units, alpha=alpha, n_resamples=n_bootstrap, seed=seed)
    return np.stack([interval.low, interval.high])
