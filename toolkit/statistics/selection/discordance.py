"""Tests of one split, task by task: the target exceeds base where it gained, by more than selection explains."""

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

MIN_FLIP_UNITS: Final = 6
"""Gain units below which a sign-flip p-value cannot fall under .05 with room for anything else (2^-6 = .016)."""

GUARDS: Final = ("contrast", "all prompts", "none")
"""What guards a task's p-value against selection by outcome."""


@dataclass(frozen=True)
class Sides:
    """Indices of one task's prompts in one split."""

    gain: IntArray
    """Base wrong, target right."""
    loss: IntArray
    """Base right, target wrong."""
    everyone: IntArray
    """All, whatever the outcome."""


@dataclass(frozen=True)
class SplitTests:
    """Results of one split; arrays are [task, feature] with NaN where not estimable."""

    tasks: list[str]
    p_flip: FloatArray
    contrast: FloatArray
    contrast_p: FloatArray
    p_guard: FloatArray
    p_task: FloatArray
    guard: list[str]
    contrast_estimable: list[str]
    estimable: list[str]
    task_effect: FloatArray
    effect: FloatArray
    """[3, feature]: mean difference over all prompts of the tasks, lower, upper."""
    score: FloatArray
    """[feature]: mean over tasks of the mean difference on gain prompts."""


@dataclass(frozen=True)
class _Plan:
    """What is computed for one task."""

    sides: Sides
    used: bool
    flip: bool
    contrast: bool
    seed: int


def split_tests(
    values: da.Array,
    sides: dict[str, Sides],
    *,
    used: dict[str, bool],
    split: str,
    codes: IntArray | None,
    min_discordant: int,
    n_resamples: int,
    n_bootstrap: int,
    alpha: float,
    seed: int,
) -> SplitTests:
    """Run every task's tests on the prompts in ``sides`` and on no others.

    Parameters
    ----------
    values
        [2 (base, target), prompt, feature].
    sides
        Task -> its prompts in this split.
    used
        Task -> whether it is tested; of the others only ``task_effect`` is computed.
    split
        Name of the split; seeds depend on it.
    codes
        Cluster per prompt, or None.
    min_discordant
        Gains and losses (units) the contrast needs, each.
    n_resamples, n_bootstrap, alpha, seed
        Draws, 1 - coverage and seed; ``n_bootstrap=0`` gives no intervals.
    """
    plans: dict[str, _Plan] = {}
    reasons: list[str] = []
    contrast_reasons: list[str] = []
    guards: list[str] = []
    for task, side in sides.items():
        n_gain = _n_units(side.gain, codes)
        plus, minus = (len(x) for x in contrast_units(side, codes)[1:])
        if not used[task]:
            plans[task] = _Plan(side, False, False, False, 0)
            for column in (reasons, contrast_reasons, guards):
                column.append("no: not selected on")
            continue
        can_contrast = min(plus, minus) >= min_discordant
        can_flip = n_gain >= MIN_FLIP_UNITS
        plans[task] = _Plan(side, True, can_flip, can_contrast, derive_seed(seed, "selection", split, task))
        reasons.append(_reason(len(side.gain), n_gain))
        contrast_reasons.append(
            "yes" if can_contrast else f"no: {plus} gains and {minus} losses, {min_discordant} of each needed"
        )
        guards.append("none" if not can_flip else GUARDS[0] if can_contrast else GUARDS[1])
    n = len(plans)
    names = ("p_flip", "contrast", "contrast_p", "p_guard", "task_effect")
    pooled = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *(s.everyone for t, s in sides.items() if used[t])]))
    found = map_features(
        _block,
        [values],
        outputs=dict.fromkeys(names, (n,)) | {"effect": (3,), "score": ()},
        plans=list(plans.values()),
        pooled=pooled,
        codes=codes,
        n_resamples=n_resamples,
        n_bootstrap=n_bootstrap,
        alpha=alpha,
        seed=derive_seed(seed, "selection", split, "interval"),
    )
    arrays = dict(zip(found.features, da.compute(*found.features.values()), strict=True))
    return SplitTests(
        list(plans),
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


def _n_units(index: IntArray, codes: IntArray | None) -> int:
    return len(index) if codes is None else len(np.unique(codes[index]))


def contrast_units(side: Sides, codes: IntArray | None) -> tuple[list[IntArray], IntArray, IntArray]:
    """Discordant units: the prompts of each, and which units are gains and which losses.

    With clusters a unit is a cluster whose discordant prompts all went one way; clusters that went both ways are left
    out, which swapping the labels of a cluster leaves as it is, so the permutation stays valid.
    """
    index = np.concatenate([side.gain, side.loss])
    sign = np.concatenate([np.ones(len(side.gain)), -np.ones(len(side.loss))])
    if codes is None:
        units = [np.array([i]) for i in index]
        return units, np.flatnonzero(sign > 0), np.flatnonzero(sign < 0)
    units, signs = [], []
    for code in np.unique(codes[index]):
        here = codes[index] == code
        if len(np.unique(sign[here])) == 1:
            units.append(index[here])
            signs.append(sign[here][0])
    return units, np.flatnonzero(np.array(signs) > 0), np.flatnonzero(np.array(signs) < 0)


def _block(
    values: NDArray[Any],
    *,
    plans: list[_Plan],
    pooled: IntArray,
    codes: IntArray | None,
    n_resamples: int,
    n_bootstrap: int,
    alpha: float,
    seed: int,
) -> Block:
    d = values[1].astype(np.float64) - values[0]
    n, width = len(plans), d.shape[1]
    rows = {
        name: np.full((n, width), np.nan) for name in ("p_flip", "contrast", "contrast_p", "p_guard", "task_effect")
    }
    scores = np.full((n, width), np.nan)
    for t, plan in enumerate(plans):
        side = plan.sides
        if len(side.everyone):
            rows["task_effect"][t] = d[side.everyone].mean(axis=0)
        if plan.used and len(side.gain):
            scores[t] = d[side.gain].mean(axis=0)
        if plan.contrast:
            rows["contrast"][t], rows["contrast_p"][t] = _contrast(d, side, codes, n_resamples, plan.seed)
        if plan.flip:
            rows["p_flip"][t] = flip_p(d, side.gain, codes, plan.seed)
            rows["p_guard"][t] = rows["contrast_p"][t] if plan.contrast else flip_p(d, side.everyone, codes, plan.seed)
    effect = np.full((3, width), np.nan)
    if len(pooled):
        effect[0] = unit_means(d[pooled], None if codes is None else codes[pooled]).mean(axis=0)
        if n_bootstrap:
            effect[1:] = interval(d[pooled], None if codes is None else codes[pooled], alpha, n_bootstrap, seed)
    counted = np.isfinite(scores).any(axis=1)
    score = scores[counted].mean(axis=0) if counted.any() else np.full(width, np.nan)
    return rows | {"effect": effect, "score": score}


def flip_p(d: FloatArray, index: IntArray, codes: IntArray | None, seed: int) -> FloatArray:
    """One-sided sign-flip p-value (target above base) of the units in ``index``; 1 where nothing differs."""
    units = unit_means(d[index], None if codes is None else codes[index])
    p = sign_flip_test(units, alternative="greater", seed=seed).p_value
    return np.where((units == 0).all(axis=0), 1.0, np.asarray(p, dtype=np.float64))


def _contrast(
    d: FloatArray, side: Sides, codes: IntArray | None, n_resamples: int, seed: int
) -> tuple[FloatArray, FloatArray]:
    """mean(D* | gain) - mean(D* | loss) with D* = right minus wrong model, and its permutation p-value."""
    units, plus, minus = contrast_units(side, codes)
    signed = d.copy()
    signed[side.loss] *= -1
    order = np.concatenate(units)
    member = np.repeat(np.arange(len(units)), [len(unit) for unit in units])
    means = unit_means(signed[order], member)
    result = permutation_contrast(means[plus], means[minus], alternative="greater", n_resamples=n_resamples, seed=seed)
    # A feature that is the same in every unit gives no evidence, not a missing value.
    return means[plus].mean(axis=0) - means[minus].mean(axis=0), np.nan_to_num(result.p_value, nan=1.0)


def interval(d: FloatArray, codes: IntArray | None, alpha: float, n_bootstrap: int, seed: int) -> FloatArray:
    """Bootstrap-t interval of the mean over units, [2, feature]; NaN where fewer than ten differences are not zero."""
    units = unit_means(d, codes)
    if len(units) < 2:
        return np.full((2, d.shape[1]), np.nan)
    result = bootstrap_t(units, alpha=alpha, n_resamples=n_bootstrap, seed=seed)
    return np.stack([result.low, result.high])
