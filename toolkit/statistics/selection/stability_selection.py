"""Complementary-pairs stability selection: how often a feature is among the leading ones in random half-samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import dask.array as da
import numpy as np
from numpy.typing import NDArray
from scipy import special

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.counter_random import GOLDEN_GAMMA, splitmix64, unit_interval
from rlgen_stats.toolkit.statistics.core.feature_blocks import Block, map_features
from rlgen_stats.toolkit.statistics.core.top_features import fold_leading, leading_features
from rlgen_stats.toolkit.statistics.core.units import unit_means
from rlgen_stats.toolkit.statistics.kernels import cpss_bound
from rlgen_stats.toolkit.statistics.kernels.draws import stream
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray
from rlgen_stats.toolkit.statistics.selection.discordance import (
    CONTRAST,
    SplitTests,
    contrast_groups,
    contrast_units,
)
from rlgen_stats.toolkit.statistics.selection.options import DEFAULT_THRESHOLD, StabilityOptions
from rlgen_stats.toolkit.statistics.selection.task_prompts import TaskPrompts

MOST_PER_HALF: Final = 50
"""Most features kept per half-sample by default: the size of the larger of the paper's two sets."""

EXPECTED_FALSE: Final = 1.0
"""Worst-case expected number of false stable features at the default number kept per half-sample."""

DIGITS: Final = 9
"""Decimals to which log p-values are compared: smaller differences are ties, not to be decided by rounding errors."""

STREAM_STEP: Final = np.uint64(0xD1B54A32D192ED03)
"""Distance of the first states of two half-samples' streams: odd, and no small multiple of a stream's own step, so that
streams do not overlap."""


@dataclass(frozen=True, kw_only=True)
class Stability:
    """Selection shares of all features."""

    share: FloatArray
    """[feature]: share of the 2B half-samples in which the feature is among the q leading; NaN for untested ones."""
    stable: NDArray[np.bool_]
    """[feature]: share at or above the threshold."""
    n_per_half: int
    """q; 0 where nothing could be ranked."""
    options: StabilityOptions
    bound_mb: float
    """Expected number of stable features among those chosen with a probability of at most q / F: worst case."""
    bound_ss: float
    """The same for unimodal distributions of the share; NaN out of that bound's range."""
    min_gain: int
    """Fewest gain units of any task in any half-sample."""

    def attrs(self) -> dict[str, Any]:
        """Attributes of the layout ``selection``: settings and bounds."""
        return {
            "n_stable": int(self.stable.sum()),
            "stability_q": self.n_per_half,
            "stability_pairs": self.options.n_pairs,
            "stability_threshold": self.options.threshold,
            "stability_bound_mb": self.bound_mb,
            "stability_bound_ss": self.bound_ss,
            "stability_min_gain": self.min_gain,
            "stability_ranking": "partial conjunction of normal-approximation p-values, selection prompts only",
        }


def stability_selection(
    values: da.Array,
    prompts: Mapping[str, TaskPrompts],
    tests: SplitTests,
    testable: NDArray[np.bool_],
    ranks: IntArray,
    options: StabilityOptions,
    *,
    codes: IntArray | None,
    u: int,
    combine: str,
    seed: int = 0,
) -> Stability:
    """Rank all features in each half of many random halvings of the prompts, and count how often each leads.

    Parameters
    ----------
    values
        [2 (base, target), prompt, feature], chunked over features; read once.
    prompts, tests
        Prompts of each task in the selection part, and the tests run on them: a task is ranked as it was tested.
    testable, ranks
        [feature]: which features are in the family, and ranks of their labels, by which ties are broken.
    options
        Pairs, features kept per half-sample, threshold.
    codes
        Cluster per prompt, halved as wholes; None if prompts are the units.
    u, combine
        Partial conjunction over tasks, as in ``select_features``.
    seed
        Seed of the halvings; pair b depends on (seed, b) alone.

    Returns
    -------
    Stability
        Shares, bounds and settings.

    Notes
    -----
    Units are halved within strata of task and outcome (gain, loss, other), so that every half can be tested; the odd
    unit of a stratum is left out. Given the strata the two halves of a pair are exchangeable, as the bounds require. In
    a half each task has z = min(z of the gains, z of its guard), with sum d / sqrt(sum d^2) of differences, or of
    contributions to a contrast of the whole sample, and features are ranked by the partial conjunction of the normal
    p-values. Close enough for ranking, not for a test: with few nonzeros these p-values are too small. Ties are broken
    at random, independently in each half.

    The bounds hold for any ranking: they are on the number of *low-probability* features (chosen in at most q / F of
    halves) at or above the threshold, and are not a false discovery rate. Where more than q features are equally
    strong they displace one another and none is stable: ``n_per_half`` should exceed the number looked for. One pass
    over feature blocks; memory O(block).

    References
    ----------
    Shah and Samworth 2013, doi:10.1111/j.1467-9868.2011.01034.x, theorem 1 and equation 8; Meinshausen and Buhlmann
    2010, doi:10.1111/j.1467-9868.2010.00740.x, theorem 1.

    Examples
    --------
    >>> options = StabilityOptions(n_per_half=20)
    >>> stability_selection(
    ...     values, prompts, tests, testable, ranks, options, codes=None, u=3, combine="simes"
    ... )  # doctest: +SKIP
    """
    n_tested, nan = int(testable.sum()), float("nan")
    tasks = {tests.tasks[i]: prompts[tests.tasks[i]] for i in np.flatnonzero(tests.tested)}
    if not n_tested or not 1 <= u <= len(tasks):
        return Stability(
            share=np.full(len(testable), nan),
            stable=np.zeros(len(testable), dtype=bool),
            n_per_half=0,
            options=options,
            bound_mb=nan,
            bound_ss=nan,
            min_gain=0,
        )
    q = min(options.n_per_half or default_per_half(n_tested, options.threshold), n_tested)
    unit_of = np.arange(values.shape[1]) if codes is None else codes
    halves = complementary_halves(
        unit_strata(tasks, unit_of), options.n_pairs, derive_seed(seed, "selection", "halves")
    )
    guards = dict(zip(tests.tasks, tests.guard, strict=True))
    plans = [_TaskPlan(of_task, guards[task] == CONTRAST, codes, halves[:, unit_of]) for task, of_task in tasks.items()]
    widths = (values.chunks[-1],)
    mapped = map_features(
        _block,
        [values, *(da.from_array(x, chunks=widths) for x in (np.arange(len(testable)), testable, ranks))],
        outputs={},
        states={"top": ((3, len(halves), q), fold_leading)},
        plans=plans,
        u=u,
        combine=combine,
        q=q,
        seed=derive_seed(seed, "selection", "ties"),
    )
    ids = np.asarray(mapped.states["top"].compute()[2], dtype=np.int64)
    share = np.where(testable, np.bincount(ids[ids >= 0], minlength=len(testable)) / len(halves), nan)
    return Stability(
        share=share,
        stable=np.nan_to_num(share) >= options.threshold,
        n_per_half=q,
        options=options,
        bound_mb=_bound(q, n_tested, options, "none"),
        bound_ss=_bound(q, n_tested, options, "unimodal"),
        min_gain=min(int(plan.half(plan.prompts.gain).sum(axis=1).min()) for plan in plans),
    )


def default_per_half(n_tested: int, threshold: float = DEFAULT_THRESHOLD) -> int:
    """The largest q with at most one false stable feature expected in the worst case: q^2 <= (2 tau - 1) F; 1 to 50."""
    return int(np.clip(np.sqrt(EXPECTED_FALSE * (2 * threshold - 1) * n_tested), 1, MOST_PER_HALF))


def _bound(q: int, n_tested: int, options: StabilityOptions, assumption: str) -> float:
    try:
        return cpss_bound(q, n_tested, options.n_pairs, options.threshold, assumption)
    except InputError:  # settings are in range, so this is the range of the unimodal bound
        return float("nan")


def unit_strata(prompts: Mapping[str, TaskPrompts], unit_of: IntArray) -> IntArray:
    """Stratum of every unit: task of most of its prompts, and whether gains or losses prevail; -1 if in no task."""
    n = int(unit_of.max()) + 1
    counts = np.stack([np.bincount(unit_of[of_task.every], minlength=n) for of_task in prompts.values()], axis=1)
    gains = sum(np.bincount(unit_of[of_task.gain], minlength=n) for of_task in prompts.values())
    losses = sum(np.bincount(unit_of[of_task.loss], minlength=n) for of_task in prompts.values())
    strata = 3 * counts.argmax(axis=1) + 1 + np.sign(gains - losses)
    return np.where(counts.any(axis=1), strata, -1).astype(np.int64)


def complementary_halves(strata: IntArray, n_pairs: int, seed: int) -> FloatArray:
    """Random disjoint halves of each stratum, [2 * n_pairs, unit] of 0 and 1; rows 2b and 2b + 1 are a pair."""
    n = len(strata)
    halves = np.zeros((2 * n_pairs, n))
    groups = strata + 1  # group 0 holds the units that are in no task; its size is set to 0, so that none is drawn
    size = np.bincount(groups)
    start = np.cumsum(size) - size
    size[0] = 0
    for b in range(n_pairs):
        order = stream(seed, b).permutation(n)
        order = order[np.argsort(strata[order], kind="stable")]
        group = groups[order]
        place, half = np.arange(n) - start[group], size[group] // 2
        halves[2 * b, order[place < half]] = 1.0
        halves[2 * b + 1, order[(place >= half) & (place < 2 * half)]] = 1.0
    return halves


@dataclass(frozen=True)
class _TaskPlan:
    """Prompts of one task, how it is guarded, and which half-samples its units are in."""

    prompts: TaskPrompts
    contrast: bool
    """Whether the guard against selection by outcome is the contrast, or all prompts."""
    codes: IntArray | None
    half_of_prompt: FloatArray
    """[half-sample, prompt] of 0 and 1; the same for all prompts of a cluster."""

    def half(self, *groups: IntArray) -> FloatArray:
        """[half-sample, unit] of the units with prompts in the groups."""
        rows = np.sort(np.concatenate(groups))
        if self.codes is not None:
            rows = rows[np.unique(self.codes[rows], return_index=True)[1]]
        return self.half_of_prompt[:, rows]

    def means(self, d: FloatArray, rows: IntArray) -> FloatArray:
        """[unit, feature] means over the prompts of each unit."""
        return unit_means(d[rows], None if self.codes is None else self.codes[rows])


def _block(
    values: NDArray[Any],
    ids: IntArray,
    testable: NDArray[np.bool_],
    ranks: IntArray,
    *,
    plans: list[_TaskPlan],
    u: int,
    combine: str,
    q: int,
    seed: int,
) -> Block:
    d = values[1].astype(np.float64) - values[0]
    z = np.stack([_task_z(d, plan) for plan in plans], axis=-1)
    keys = np.where(testable, np.round(conjunction_order(z, u, combine), DIGITS), np.inf)
    columns = np.stack([keys, _ties(ranks, len(keys), seed), np.broadcast_to(ids, keys.shape)])
    return {"top": leading_features(columns, q)}


def _task_z(d: FloatArray, plan: _TaskPlan) -> FloatArray:
    """The smaller of a task's two statistics, gains and guard, in every half-sample, [half-sample, feature]."""
    prompts = plan.prompts
    z = flip_z(plan.means(d, prompts.gain), plan.half(prompts.gain))
    if not plan.contrast:
        return np.minimum(z, flip_z(plan.means(d, prompts.every), plan.half(prompts.every)))
    groups, weights = contrast_groups(prompts)
    return np.minimum(z, flip_z(contrast_units(d, groups, weights, plan.codes), plan.half(*groups)))


def flip_z(x: FloatArray, half: FloatArray) -> FloatArray:
    """Sum over the root of the sum of squares of [unit, feature] in every half-sample; 0 where nothing differs."""
    squares = half @ np.square(x)
    return np.divide(half @ x, np.sqrt(squares), out=np.zeros_like(squares), where=squares > 0)


def conjunction_order(z: FloatArray, u: int, combine: str) -> FloatArray:
    """An increasing function of the one-sided partial-conjunction p-value, [..., task] -> [...], without underflow.

    Logs of the terms of ``kernels.partial_conjunction``, less factors that are the same for all features.

    Raises
    ------
    InputError
        If the rule is unknown.
    """
    log_p = np.sort(special.log_ndtr(-z), axis=-1)[..., u - 1 :]
    if combine == "bonferroni":
        return np.asarray(log_p[..., 0])
    if combine == "simes":
        return np.asarray((log_p - np.log(np.arange(1, log_p.shape[-1] + 1))).min(axis=-1))
    if combine == "fisher":
        return np.asarray(log_p.sum(axis=-1))
    raise InputError(f"combine must be bonferroni, simes or fisher, got {combine!r}.")


def _ties(ranks: IntArray, n_rows: int, seed: int) -> FloatArray:
    """Random numbers [half-sample, feature] that depend on seed, half-sample and the feature's rank alone.

    Every half-sample has a SplitMix64 stream of its own, from which a feature takes the number of its rank.
    """
    first = np.uint64(seed) + np.arange(n_rows, dtype=np.uint64)[:, None] * STREAM_STEP
    # splitmix64 advances a state before it mixes it, so that the state before rank 0 is one step back.
    return unit_interval(splitmix64(first + (ranks.astype(np.uint64) - np.uint64(1)) * GOLDEN_GAMMA))
