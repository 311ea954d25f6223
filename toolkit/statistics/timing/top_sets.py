"""Top-k sets of changed features from random halves of the prompts, in one pass over feature blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import dask.array as da
import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.core.feature_blocks import Block, map_features
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray

DIGITS: Final = 9
"""Decimals of a score that count: what differs less is a tie, else rounding would decide between features."""

FEATURES: Final = 512
"""Features scored at a time: the sums of 20 groups and 100 halvings take 33 MB."""

MIN_UNITS_PER_GROUP: Final = 2
"""Below two units a group the number of groups is reduced."""


@dataclass(frozen=True)
class Design:
    """Random halvings and jackknife groups of units, the same for every checkpoint."""

    halves: FloatArray
    """[halving, prompt]: 1 in the first half."""
    groups: IntArray
    """[prompt]: jackknife group."""
    n_groups: int
    n_units: int
    k: int


def make_design(n: int, codes: IntArray | None, k: int, n_halvings: int, n_groups: int, seed: int) -> Design:
    """Draw ``n_halvings`` halvings and at most ``n_groups`` jackknife groups of ``n`` prompts, clusters kept whole."""
    units = np.arange(n) if codes is None else codes
    n_units = int(units.max()) + 1
    rng = np.random.default_rng(derive_seed(seed, "set_stability"))
    n_groups = max(2, min(n_groups, n_units // MIN_UNITS_PER_GROUP))
    groups = rng.permutation(n_units) % n_groups
    first = np.zeros((n_halvings, n_units))
    for row in first:
        row[rng.permutation(n_units)[: n_units // 2]] = 1.0
    return Design(first[:, units], groups[units].astype(np.int64), n_groups, n_units, k)


@dataclass(frozen=True)
class TopSets:
    """Feature ids of top-k sets (-1: none): from all prompts in order of rank, and from every half and replicate."""

    full: IntArray
    """[k]"""
    halves: IntArray
    """[replicate, halving, half, k]; replicate 0 has all units, replicate j lacks group j-1."""


def top_sets(
    values: da.Array, c: int, testable: NDArray[np.bool_], ranks: IntArray, s0: float, design: Design
) -> TopSets:
    """Top-k sets of checkpoint ``c`` from one pass over feature blocks; only the leading k of a block are kept.

    Features are named by ``ranks``, the order of their labels, which also breaks ties: sets do not depend on where
    features stand.
    """
    pair = values[[0, c]]
    ids = da.from_array(ranks, chunks=(values.chunks[-1],))
    usable = da.from_array(testable, chunks=(values.chunks[-1],))
    n_rows = 1 + (1 + design.n_groups) * len(design.halves) * 2
    mapped = map_features(
        _block_tops,
        [pair, ids, usable],
        outputs={},
        states={"top": ((2, n_rows, design.k), _merge_tops)},
        s0=s0,
        design=design,
    )
    rows = np.asarray(mapped.states["top"].compute()[1], dtype=np.int64)
    shape = (1 + design.n_groups, len(design.halves), 2, design.k)
    return TopSets(rows[0], rows[1:].reshape(shape))


def _block_tops(values: NDArray[Any], ids: IntArray, usable: NDArray[np.bool_], *, s0: float, design: Design) -> Block:
    tops = []
    order = np.argsort(ids)
    for start in range(0, len(order), FEATURES):
        part = order[start : start + FEATURES]
        scores = half_scores(values[1, :, part].T.astype(np.float64) - values[0, :, part].T, s0, design)
        scores[:, ~usable[part]] = 0.0
        scores = np.round(scores, DIGITS)
        tops.append(_leading(scores, np.broadcast_to(ids[part].astype(np.float64), scores.shape), design.k))
    return {"top": _merge_stack(np.stack(tops))}


def _leading(scores: FloatArray, ids: FloatArray, k: int) -> FloatArray:
    """The k largest scores of each row in order and their ids, [2, row, k]; id -1 where the score is not positive.

    Of equal scores the one that stands first is kept: ids rise along a row, or at least among equal scores.
    """
    short = k - scores.shape[1]
    if short > 0:
        scores = np.pad(scores, ((0, 0), (0, short)))
        ids = np.pad(ids, ((0, 0), (0, short)), constant_values=-1.0)
    least = np.partition(scores, -k, axis=1)[:, -k, None]
    above, equal = scores > least, scores == least
    equal &= np.cumsum(equal, axis=1, dtype=np.int32) <= k - above.sum(axis=1, keepdims=True)
    chosen = np.nonzero(above | equal)[1].reshape(len(scores), k)  # exactly k a row, in order of place
    top, label = np.take_along_axis(scores, chosen, 1), np.take_along_axis(ids, chosen, 1)
    order = np.argsort(-top, axis=1, kind="stable")
    top, label = np.take_along_axis(top, order, 1), np.take_along_axis(label, order, 1)
    return np.stack([top, np.where(top > 0, label, -1.0)])


def _merge_tops(stacked: da.Array, axis: int) -> da.Array:
    """Fold the leading features of all blocks, [block, 2, row, k] -> [2, row, k]."""
    whole = stacked.rechunk({0: -1})
    return da.map_blocks(_merge_stack, whole, drop_axis=axis, dtype=np.float64)


def _merge_stack(stacked: FloatArray) -> FloatArray:
    n_blocks, _, n_rows, k = stacked.shape
    if n_blocks == 1:
        return np.asarray(stacked[0])
    scores, ids = stacked.transpose(1, 2, 0, 3).reshape(2, n_rows, n_blocks * k)
    order = np.argsort(ids, axis=1, kind="stable")
    return _leading(np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1), k)


def half_scores(d: FloatArray, s0: float, design: Design) -> FloatArray:
    """|mean| / (sd + s0) of a feature block: row 0 over all prompts, then [replicate, halving, half] flattened.

    Every replicate's sums are the full sums minus those of the deleted group, so halvings cost one product in all.
    Values are centred first: sums of squares then do not cancel.
    """
    centre = d.mean(axis=0)
    d, squares = d - centre, np.square(d - centre)
    n_halvings = len(design.halves)
    sums = np.empty((design.n_groups, n_halvings, 2, 2, d.shape[1]))
    counts = np.empty((design.n_groups, n_halvings, 2))
    for g in range(design.n_groups):
        rows = design.groups == g
        first = design.halves[:, rows]
        for m, values in enumerate((d[rows], squares[rows])):
            sums[g, :, 0, m] = first @ values
            sums[g, :, 1, m] = values.sum(axis=0) - sums[g, :, 0, m]
        counts[g, :, 0] = first.sum(axis=1)
        counts[g, :, 1] = rows.sum() - counts[g, :, 0]
    total, n = sums.sum(axis=0), counts.sum(axis=0)
    scores = np.empty((1 + design.n_groups, n_halvings, 2, d.shape[1]))
    for replicate in range(1 + design.n_groups):
        gone = replicate - 1
        s = total if replicate == 0 else total - sums[gone]
        m = n if replicate == 0 else n - counts[gone]
        scores[replicate] = _moderated(s[:, :, 0], s[:, :, 1], m[..., None], centre, s0)
    full = _moderated(d.sum(axis=0), squares.sum(axis=0), np.array(float(len(d))), centre, s0)
    return np.concatenate([full[None], scores.reshape(-1, d.shape[1])])


def _moderated(sums: FloatArray, squares: FloatArray, n: FloatArray, centre: FloatArray, s0: float) -> FloatArray:
    mean = sums / n
    sd = np.sqrt(np.maximum(squares - n * np.square(mean), 0.0) / np.maximum(n - 1, 1))
    scale = sd + s0
    score: FloatArray = np.abs(mean + centre) / np.where(scale > 0, scale, np.inf)
    return score


def overlaps(a: IntArray, b: IntArray) -> FloatArray:
    """Size of the intersection of id sets along the last axis; ids are unique within a set, -1 is no id."""
    both = np.sort(np.concatenate([a, b], axis=-1), axis=-1)
    same = (both[..., 1:] == both[..., :-1]) & (both[..., 1:] >= 0)
    return np.asarray(same.sum(axis=-1), dtype=np.float64)
