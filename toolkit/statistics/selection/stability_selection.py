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
from rlgen_stats.toolkit.statistics.core.feature_blocks import Block, map_features
from rlgen_stats.toolkit.statistics.core.top_features import fold_leading, leading_features
from rlgen_stats.toolkit.statistics.core.units import unit_means
from rlgen_stats.toolkit.statistics.kernels import cpss_bound
from rlgen_stats.toolkit.statistics.kernels.draws import stream
from rlgen_stats.toolkit.statistics.kernels.numerics import ROUNDING, FloatArray, IntArray
from rlgen_stats.toolkit.statistics.selection.discordance import Sides, SplitTests, contrast_units

DEFAULT_PAIRS: Final = 50
"""Complementary pairs B (METHOD.md 4c); with 50 a share is known to about .05."""

DEFAULT_THRESHOLD: Final = 0.9
"""Share of half-samples from which a feature is called stable, the strict end of the customary .6 to .9."""

MOST_PER_HALF: Final = 50
"""Features kept per half-sample at most: the larger of the paper's two sets."""

EXPECTED_FALSE: Final = 1.0
"""False stable features the default number kept per half-sample allows for in the worst case."""

DIGITS: Final = 9
"""Decimals of the log p-value that count: what differs less is a tie, else rounding would decide between features."""


@dataclass(frozen=True)
class Stability:
    """Selection shares of all features."""

    share: FloatArray
    """[feature]: share of the 2B half-samples in which the feature is among the q leading; NaN for untested ones."""
    stable: NDArray[np.bool_]
    """[feature]: share at or above the threshold."""
    n_per_half: int
    """q; 0 where nothing could be ranked."""
    n_pairs: int
    threshold: float
    bound_mb: float
    """Expected number of stable features among those chosen with a probability of at most q / F: worst case."""
    bound_ss: float
    """The same for unimodal distributions of the share; NaN out of that bound's range."""
    min_gain: int
    """Gain units of a task in a half-sample, the fewest of all."""

    def attrs(self) -> dict[str, Any]:
        """What a reader needs beside the shares."""
        return {
            "n_stable": int(self.stable.sum()),
            "stability_q": self.n_per_half,
            "stability_pairs": self.n_pairs,
            "stability_threshold": self.threshold,
            "stability_bound_mb": self.bound_mb,
            "stability_bound_ss": self.bound_ss,
            "stability_min_gain": self.min_gain,
            "stability_ranking": "partial conjunction of normal-approximation p-values, selection prompts only",
        }


def stability_selection(
    values: da.Array,
    sides: Mapping[str, Sides],
    tests: SplitTests,
    testable: NDArray[np.bool_],
    ranks: IntArray,
    *,
    codes: IntArray | None,
    u: int,
    combine: str,
    n_pairs: int = DEFAULT_PAIRS,
    n_per_half: int | None = None,
    threshold: float = DEFAULT_THRESHOLD,
    seed: int = 0,
) -> Stability:
    """Rank all features in each half of many random halvings of the prompts, and count how often each is among the top.

    Parameters
    ----------
    values
        [2 (base, target), prompt, feature], chunked over features; read once.
    sides, tests
        Prompts of each task in the selection half, and the tests run on them: a task is ranked as it was tested.
    testable, ranks
        [feature]: which features are in the family, and ranks of their labels, by which ties are broken.
    codes
        Cluster per prompt, halved as wholes; None if prompts are the units.
    u, combine
        Partial conjunction over tasks, as in ``select_features``.
    n_pairs, n_per_half
        Complementary pairs B, and features q kept per half-sample; default ``default_per_half``.
    threshold
        Share from which a feature is stable, in (1/2, 1].
    seed
        Seed of the halvings; pair b depends on (seed, b) alone.

    Returns
    -------
    Stability
        Shares, bounds and settings.

    Raises
    ------
    InputError
        If ``n_pairs``, ``n_per_half`` or ``threshold`` is out of range.

    Notes
    -----
    Units are halved within strata of task and side (gain, loss, other), so that every half can be tested; the odd unit
    of a stratum sits out. Given the strata the halves of a pair are independent and alike, as the bounds require. In a
    half each task has z = min(z of the gains, z of its guard), with sum d / sqrt(sum d^2) for a sign flip and the
    permutation variance for the contrast, and features are ranked by the partial conjunction of the normal p-values.
    Close enough for ranking, not for a test: with few nonzeros these p-values are too small. Ties are broken at
    random, anew in each half.

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
    >>> stability_selection(values, sides, tests, testable, ranks, codes=None, u=3, combine="simes")  # doctest: +SKIP
    """
    check_stability(n_pairs, n_per_half, threshold)
    n_tested, nan = int(testable.sum()), float("nan")
    tasks = {tests.tasks[i]: sides[tests.tasks[i]] for i in np.flatnonzero(np.isfinite(tests.p_task).any(axis=1))}
    if not n_tested or not 1 <= u <= len(tasks):
        nothing = np.zeros(len(testable), dtype=bool)
        return Stability(np.full(len(testable), nan), nothing, 0, n_pairs, threshold, nan, nan, 0)
    q = min(n_per_half or default_per_half(n_tested, threshold), n_tested)
    unit_of = np.arange(values.shape[1]) if codes is None else codes
    halves = complementary_halves(unit_strata(tasks, unit_of), n_pairs, derive_seed(seed, "selection", "halves"))
    guards = dict(zip(tests.tasks, tests.guard, strict=True))
    plans = [_plan(side, guards[task] == "contrast", codes, unit_of, halves) for task, side in tasks.items()]
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
        share,
        np.nan_to_num(share) >= threshold,
        q,
        n_pairs,
        threshold,
        _bound(q, n_tested, n_pairs, threshold, "none"),
        _bound(q, n_tested, n_pairs, threshold, "unimodal"),
        min(int(plan.gains.half.sum(axis=1).min()) for plan in plans),
    )


def check_stability(n_pairs: int, n_per_half: int | None, threshold: float) -> None:
    """Refuse settings that no bound covers.

    Raises
    ------
    InputError
        If there is no pair, no feature per half, or the threshold is not in (1/2, 1].
    """
    if n_pairs < 1 or (n_per_half is not None and n_per_half < 1) or not 0.5 < threshold <= 1:
        raise InputError(
            f"expected n_pairs >= 1, n_per_half >= 1 and 1/2 < stability_threshold <= 1 (the bounds hold there only), "
            f"got {n_pairs}, {n_per_half} and {threshold}."
        )


def default_per_half(n_tested: int, threshold: float = DEFAULT_THRESHOLD) -> int:
    """The largest q with at most one false stable feature expected in the worst case: q^2 <= (2 tau - 1) F; 1 to 50."""
    return int(np.clip(np.sqrt(EXPECTED_FALSE * (2 * threshold - 1) * n_tested), 1, MOST_PER_HALF))


def _bound(q: int, n_tested: int, n_pairs: int, threshold: float, assumption: str) -> float:
    try:
        return cpss_bound(q, n_tested, n_pairs, threshold, assumption)
    except InputError:  # settings are in range, so this is the range of the unimodal bound
        return float("nan")


def unit_strata(sides: Mapping[str, Sides], unit_of: IntArray) -> IntArray:
    """Stratum of every unit: its task (of most of its prompts) and whether gains or losses prevail; -1 if unused."""
    n = int(unit_of.max()) + 1
    counts = np.stack([np.bincount(unit_of[side.everyone], minlength=n) for side in sides.values()], axis=1)
    gains = sum(np.bincount(unit_of[side.gain], minlength=n) for side in sides.values())
    losses = sum(np.bincount(unit_of[side.loss], minlength=n) for side in sides.values())
    strata = 3 * counts.argmax(axis=1) + 1 + np.sign(gains - losses)
    return np.where(counts.any(axis=1), strata, -1).astype(np.int64)


def complementary_halves(strata: IntArray, n_pairs: int, seed: int) -> FloatArray:
    """Random disjoint halves of each stratum, [2 * n_pairs, unit] of 0 and 1; rows 2b and 2b + 1 are a pair."""
    n = len(strata)
    halves = np.zeros((2 * n_pairs, n))
    size = np.bincount(strata + 1)
    size[0] = 0
    start = np.cumsum(np.bincount(strata + 1)) - np.bincount(strata + 1)
    for b in range(n_pairs):
        order = stream(seed, b).permutation(n)
        order = order[np.argsort(strata[order], kind="stable")]
        own = strata[order] + 1
        place, half = np.arange(n) - start[own], size[own] // 2
        halves[2 * b, order[place < half]] = 1.0
        halves[2 * b + 1, order[(place >= half) & (place < 2 * half)]] = 1.0
    return halves


@dataclass(frozen=True)
class _Units:
    """Units of one test, in which half-samples they are, and the prompts they are means of."""

    prompts: IntArray
    member: IntArray | None
    half: FloatArray
    """[half-sample, unit]"""


@dataclass(frozen=True)
class _Plan:
    """Tests of one task: gains, and the guard (all prompts, or the contrast of gains and losses)."""

    gains: _Units
    guard: _Units
    plus: NDArray[np.bool_] | None
    """[unit of the contrast]: whether it is a gain; None where the guard is all prompts."""
    losses: IntArray


def _plan(side: Sides, contrast: bool, codes: IntArray | None, unit_of: IntArray, halves: FloatArray) -> _Plan:
    gains = _units(side.gain, codes, unit_of, halves)
    if not contrast:
        return _Plan(gains, _units(side.everyone, codes, unit_of, halves), None, side.loss)
    units, plus, _ = contrast_units(side, codes)
    member = np.repeat(np.arange(len(units)), [len(unit) for unit in units])
    prompts = np.concatenate(units)
    guard = _Units(prompts, member, halves[:, [unit_of[unit[0]] for unit in units]])
    return _Plan(gains, guard, np.isin(np.arange(len(units)), plus), side.loss)


def _units(index: IntArray, codes: IntArray | None, unit_of: IntArray, halves: FloatArray) -> _Units:
    if codes is None:
        return _Units(index, None, halves[:, unit_of[index]])
    return _Units(index, codes[index], halves[:, np.unique(codes[index])])


def _block(
    values: NDArray[Any],
    ids: IntArray,
    testable: NDArray[np.bool_],
    ranks: IntArray,
    *,
    plans: list[_Plan],
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


def _task_z(d: FloatArray, plan: _Plan) -> FloatArray:
    """The weaker of a task's two statistics in every half-sample, [half-sample, feature]."""
    z = flip_z(unit_means(d[plan.gains.prompts], plan.gains.member), plan.gains.half)
    if plan.plus is None:
        return np.minimum(z, flip_z(unit_means(d[plan.guard.prompts], plan.guard.member), plan.guard.half))
    turned = np.where(np.isin(plan.guard.prompts, plan.losses), -1.0, 1.0)
    means = unit_means(d[plan.guard.prompts] * turned[:, None], plan.guard.member)
    return np.minimum(z, contrast_z(means, plan.plus, plan.guard.half))


def flip_z(x: FloatArray, half: FloatArray) -> FloatArray:
    """Sum over the root of the sum of squares of [unit, feature] in every half-sample; 0 where nothing differs."""
    squares = half @ np.square(x)
    return np.divide(half @ x, np.sqrt(squares), out=np.zeros_like(squares), where=squares > 0)


def contrast_z(x: FloatArray, plus: NDArray[np.bool_], half: FloatArray) -> FloatArray:
    """Difference of group means over its permutation standard deviation in every half-sample; 0 where none varies."""
    scale = np.abs(x).max(axis=0, initial=0.0)
    x = x - x.mean(axis=0)
    x[np.abs(x) <= ROUNDING * scale] = 0.0
    n_plus, n = half[:, plus].sum(axis=1)[:, None], half.sum(axis=1)[:, None]
    first, total = half[:, plus] @ x[plus], half @ x
    n_minus, below = n - n_plus, np.maximum(n - 1, 1)
    variance = (half @ np.square(x) - np.square(total) / np.maximum(n, 1)) / below
    variance *= n / np.maximum(n_plus * n_minus, 1)
    difference = first / np.maximum(n_plus, 1) - (total - first) / np.maximum(n_minus, 1)
    usable = (n_plus > 0) & (n_minus > 0) & (variance > ROUNDING * np.square(scale))
    z: FloatArray = np.divide(difference, np.sqrt(np.abs(variance)), out=np.zeros_like(variance), where=usable)
    return z


def conjunction_order(z: FloatArray, u: int, combine: str) -> FloatArray:
    """An increasing function of the one-sided partial-conjunction p-value, [..., task] -> [...]; none is too small.

    Logs of the terms of ``kernels.partial_conjunction`` without what is the same for all features.

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

    The mixing function of SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195).
    """
    row = np.arange(n_rows, dtype=np.uint64)[:, None] * np.uint64(0xD1B54A32D192ED03)
    x = np.uint64(seed) + row + ranks.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray((x ^ (x >> np.uint64(31))) >> np.uint64(11), dtype=np.float64)
