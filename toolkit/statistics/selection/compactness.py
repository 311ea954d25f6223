"""What a selected set says together: the share of the rise it carries, and whether it is more than right answers.

The rise of a feature is its excess: the mean difference target - base on prompts that base gets wrong and the target
right, less that on prompts both get right, averaged over tasks. Its square is a feature's share of the rise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import dask.array as da
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.core.feature_blocks import Block, map_features
from rlgen_stats.toolkit.statistics.core.units import cluster_sums, jackknife_groups
from rlgen_stats.toolkit.statistics.kernels import (
    contrast_contributions,
    delete_group_jackknife,
    partial_conjunction,
    sign_flip_test,
)
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray
from rlgen_stats.toolkit.statistics.selection.discordance import excess_groups, n_units
from rlgen_stats.toolkit.statistics.selection.task_prompts import TaskPrompts

COMPACT_SHARE: Final = 0.10
"""Largest share of the testable features a set may be and still be called compact (the paper's were below 0.2%)."""
MOST_COMPACT: Final = 50
"""Most features such a set has: as many as the paper's larger one."""
MIN_TASKS: Final = 2
"""Tasks below which "task-agnostic" says nothing."""
CARRIED: Final = 0.5
"""Share of the rise that a compact set must carry: most of it."""
N_GROUPS: Final = 20
"""Groups of units that the jackknife leaves out in turn."""
MIN_EXCESS: Final = 0.2
"""Smallest excess that counts, in standard deviations of the feature over prompts: the margin of drift tests."""


@dataclass(frozen=True, kw_only=True)
class CarriedShare:
    """Share of the squared excess of all rising features that few of them carry; NaN where it is not estimable."""

    share: float
    """Of the candidates, chosen on other prompts than it is estimated on."""
    low: float
    high: float
    """Interval: delete-group jackknife over whole units."""
    best: float
    """Of as many features as may be, the largest on these very prompts: too large, so that it bounds every choice."""
    best_high: float
    """Upper end of its interval."""
    n_features: int
    """Candidates whose share it is."""

    def attrs(self) -> dict[str, float | int]:
        """Attributes of the layout ``selection``."""
        return {
            "carried_share": self.share,
            "carried_low": self.low,
            "carried_high": self.high,
            "carried_best": self.best,
            "carried_best_high": self.best_high,
            "n_carrying": self.n_features,
        }


def carried_share(
    values: da.Array,
    prompts: Sequence[TaskPrompts],
    members: IntArray,
    rising: NDArray[np.bool_],
    *,
    most: int,
    codes: IntArray | None,
    alpha: float,
    seed: int,
) -> CarriedShare:
    """Share of the squared excess on ``prompts`` that ``members`` carry among the ``rising`` features.

    Parameters
    ----------
    values
        [2 (base, target), prompt, feature].
    prompts
        Verification prompts of each task tested.
    members
        Features whose share is asked for; like ``rising`` not chosen on these prompts.
    rising
        [feature]: those that make up the whole.
    most
        Number of features that the best choice may have.
    codes
        Cluster per prompt, or None.
    alpha, seed
        1 - coverage; seed of the jackknife's groups.

    Returns
    -------
    CarriedShare
        NaN where no task is tested, there are no members, or the whole is not above zero.

    Notes
    -----
    The squared excess of a feature is its estimate's square less that estimate's variance, unbiased whatever the number
    of prompts; summed over many features its noise cancels. The share of ``members`` is a lower bound of what as many
    features can carry, since they were chosen with error; ``best`` is an upper bound, since it is chosen on its own
    errors. With more prompts both go to the same value.
    """
    nan = float("nan")
    if not prompts or not rising.any():
        return CarriedShare(share=nan, low=nan, high=nan, best=nan, best_high=nan, n_features=len(members))
    used = np.sort(np.concatenate([rows for of_task in prompts for rows in (of_task.gain, of_task.kept)]))
    unit = np.arange(values.shape[1]) if codes is None else codes
    groups = jackknife_groups(unit[used], N_GROUPS, derive_seed(seed, "selection", "carried"))
    left_out = np.full(values.shape[1], -1, dtype=np.int64)
    left_out[used] = groups
    mapped = map_features(
        _block,
        [values],
        outputs={"squares": (int(groups.max()) + 2,)},
        prompts=list(prompts),
        codes=codes,
        left_out=left_out,
    )
    squares = np.asarray(mapped.features["squares"].compute())
    whole = squares[:, rising].sum(axis=1)
    of_members = squares[:, members].sum(axis=1)
    leading = np.sort(squares[:, rising], axis=1)[:, ::-1][:, :most].sum(axis=1)
    if delete_group_jackknife(whole[1:], whole[0], alpha=alpha).low <= 0 or not (whole > 0).all():
        return CarriedShare(share=nan, low=nan, high=nan, best=nan, best_high=nan, n_features=len(members))
    share, best = (
        delete_group_jackknife(part[1:] / whole[1:], part[0] / whole[0], alpha=alpha) for part in (of_members, leading)
    )
    of_share = (share.estimate, share.low, share.high) if len(members) else (nan,) * 3
    return CarriedShare(
        **dict(zip(("share", "low", "high"), map(float, of_share), strict=True)),
        best=float(best.estimate),
        best_high=float(best.high),
        n_features=len(members),
    )


def no_rise_p(
    values: da.Array, prompts: Sequence[TaskPrompts], testable: NDArray[np.bool_], *, u: int, codes: IntArray | None
) -> float:
    """p-value of "some testable feature's excess reaches ``MIN_EXCESS`` in ``u`` tasks"; NaN with fewer tasks.

    Small if every feature is shown to stay below it in so many tasks that fewer than ``u`` are left: one-sided t-tests,
    partial conjunction over tasks, and the largest over features (an intersection-union test needs no correction).

    References
    ----------
    Berger 1982, doi:10.1080/00401706.1982.10487790.
    """
    if not 1 <= u <= len(prompts) or not testable.any():
        return float("nan")
    mapped = map_features(_no_rise_block, [values], outputs={"p": ()}, prompts=list(prompts), u=u, codes=codes)
    return float(np.max(np.asarray(mapped.features["p"].compute())[testable]))


def accompanying_p(
    values: da.Array, prompts: Sequence[TaskPrompts], members: IntArray, *, codes: IntArray | None, seed: int
) -> float:
    """One-sided p-value of "the members merely accompany right answers, in base and target alike"; NaN if not tested.

    Parameters
    ----------
    values
        [2 (base, target), prompt, feature].
    prompts
        Verification prompts of each task.
    members
        Features, not chosen on these prompts; tested as one set, each in its own standard deviation.
    codes, seed
        Cluster per prompt, or None; seed of the flips.

    Notes
    -----
    A feature that is higher by the same amount where either model is right rises on gain prompts, too. Then its level
    in the target is the same there as on prompts both get right; here it must be higher. That takes features to be as
    high on harder prompts as on easier ones; only losses can do without (``contrast_groups``).
    """
    if not prompts or not len(members):
        return float("nan")
    x = np.asarray(values[1][:, members].compute(), dtype=np.float64)
    scale = x.std(axis=0)
    level = (x[:, scale > 0] / scale[scale > 0]).mean(axis=1, keepdims=True)
    contributions = np.sum([contrast_contributions(level, *excess_groups(of_task)) for of_task in prompts], axis=0)
    units = cluster_sums(contributions, codes)
    return float(np.asarray(sign_flip_test(units, alternative="greater", seed=seed).p_value)[0])


def _excess(d: FloatArray, prompts: TaskPrompts, codes: IntArray | None) -> tuple[FloatArray, FloatArray]:
    """Excess of each feature and the contributions of units to its error, [feature] and [unit, feature]."""
    estimate = np.zeros(d.shape[1])
    error = np.zeros_like(d)
    for rows, weight in zip(*excess_groups(prompts), strict=True):
        mean, n = d[rows].mean(axis=0), len(rows)
        estimate += weight * mean
        error[rows] = weight / n * (d[rows] - mean) * np.sqrt(n / max(n - 1, 1))
    return estimate, cluster_sums(error, codes)


def _block(values: NDArray[Any], *, prompts: list[TaskPrompts], codes: IntArray | None, left_out: IntArray) -> Block:
    """[1 + group, feature]: squared excess, averaged over tasks, of all units and without each group."""
    d = values[1].astype(np.float64) - values[0]
    rows = []
    for group in range(-1, int(left_out.max()) + 1):
        kept = [_without(of_task, left_out, group) for of_task in prompts]
        parts = [_excess(d, of_task, codes) for of_task in kept]
        estimate = np.mean([estimate for estimate, _ in parts], axis=0)
        error = np.sum([error for _, error in parts], axis=0) / len(parts)
        rows.append(np.square(estimate) - np.square(error).sum(axis=0))
    return {"squares": np.stack(rows)}


def _without(prompts: TaskPrompts, left_out: IntArray, group: int) -> TaskPrompts:
    if group < 0:
        return prompts
    parts = (prompts.gain, prompts.loss, prompts.kept, prompts.every)
    return TaskPrompts(*(rows[left_out[rows] != group] for rows in parts))


def _no_rise_block(values: NDArray[Any], *, prompts: list[TaskPrompts], u: int, codes: IntArray | None) -> Block:
    x = values.astype(np.float64)
    d, p = x[1] - x[0], []
    for of_task in prompts:
        n_gain, n_kept = (n_units(rows, codes) for rows in (of_task.gain, of_task.kept))
        estimate, error = _excess(d, of_task, codes)
        scale = np.sqrt(x[:, np.concatenate([of_task.gain, of_task.kept])].var(axis=1, ddof=1).mean(axis=0))
        # Where no unit differs the error is not zero: one more might have differed by a standard deviation.
        standard_error = np.maximum(np.sqrt(np.square(error).sum(axis=0)), scale / min(n_gain, n_kept))
        t = np.divide(estimate - MIN_EXCESS * scale, standard_error, out=np.zeros_like(scale), where=scale > 0)
        p.append(stats.t.cdf(t, min(n_gain, n_kept) - 1))
    return {"p": np.asarray(partial_conjunction(np.array(p).T, u=len(p) - u + 1, combine="bonferroni"))}
