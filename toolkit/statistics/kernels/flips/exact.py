"""Exact sign-flip tails: by counting every flip, or by convolution of a lattice distribution."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.toolkit.statistics.kernels.flips.flip_table import all_flips
from rlgen_stats.toolkit.statistics.kernels.numerics import SMALLEST_P, TIE_SLACK, FloatArray, column_sums

MAX_ENUMERATED: Final = 20
"""Nonzeros up to which all 2**nz flips are counted (two halves of 2**10 sums each)."""
FEATURES_AT_ONCE: Final = 256
"""Features enumerated together: 256 x 2,048 sums are 4 MB."""
MAX_LATTICE: Final = 4096
"""Width in steps up to which a lattice distribution is convolved exactly."""
MAX_DIVISOR: Final = 12
"""Candidates for the lattice's step are the smallest |d| and its halves, thirds, ... twelfths."""
LATTICE_SLACK: Final = 1e-6
"""Largest relative error of a multiple of the step; covers differences rounded to float32."""
LATTICE_ELEMENTS: Final = 2**19
"""Feature x step elements per convolved block (4 MB, and as much again for the index)."""


def enumerated_tail(d: FloatArray, total: FloatArray) -> FloatArray:
    """P(S >= s) over all flips of at most 20 nonzeros, [feature]: sums of two halves, matched by one search."""
    tail = np.empty(d.shape[1])
    order = np.argsort(np.count_nonzero(d, axis=0), kind="stable")
    for start in range(0, len(order), FEATURES_AT_ONCE):
        part = order[start : start + FEATURES_AT_ONCE]
        tail[part] = _counted(np.take(d, part, axis=1), total[part])
    return tail


def _counted(d: FloatArray, total: FloatArray) -> FloatArray:
    ranked = -np.sort(-np.abs(d), axis=0)[:MAX_ENUMERATED]
    width = max(2, int(np.count_nonzero(ranked, axis=0).max(initial=0)))
    ranked = np.concatenate([ranked, np.zeros((max(0, width - len(ranked)), ranked.shape[1]))])[:width]
    limit = column_sums(ranked)
    ranked, target = ranked / limit, total / limit  # sums lie in [-1, 1]: an offset of 4 separates features
    # S >= s where the sum of one half is at least s minus that of the other: 2 x 2^10 sums in place of 2^20.
    half = width // 2
    needed = (target - TIE_SLACK)[:, None] - (all_flips(half) @ ranked[:half]).T
    others = np.sort((all_flips(width - half) @ ranked[half:]).T, axis=1)
    offset = 4.0 * np.arange(len(target))[:, None]
    before = np.searchsorted((others + offset).ravel(), (np.clip(needed, -1.5, 1.5) + offset).ravel(), side="left")
    in_row = before.reshape(needed.shape) - others.shape[1] * np.arange(len(target))[:, None]
    return np.asarray((others.shape[1] - in_row).sum(axis=1) / 2.0**width)


def lattice_step(d: FloatArray) -> FloatArray:
    """Step of the lattice each feature's |d| lie on, NaN where they lie on none narrow enough, [feature]."""
    magnitude = np.abs(d)
    smallest = np.where(magnitude > 0, magnitude, np.inf).min(axis=0, initial=np.inf)
    step = np.full(d.shape[1], np.nan)
    for divisor in range(1, MAX_DIVISOR + 1):
        candidates = np.flatnonzero(np.isnan(step) & np.isfinite(smallest))
        width = divisor * column_sums(np.take(magnitude, candidates, axis=1))
        candidates = candidates[width <= MAX_LATTICE * smallest[candidates] * 1.001]  # rounded widths decide below
        if not len(candidates):
            break
        multiple = np.take(magnitude, candidates, axis=1) / (smallest[candidates] / divisor)
        on = (np.abs(multiple - np.round(multiple)) <= LATTICE_SLACK * multiple).all(axis=0)
        narrow = np.round(multiple).sum(axis=0) <= MAX_LATTICE
        step[candidates] = np.where(on & narrow, smallest[candidates] / divisor, np.nan)
    return step


def lattice_tail(d: FloatArray, total: FloatArray, step: FloatArray) -> FloatArray:
    """P(S >= s) of differences that are multiples of ``step``, by convolution, [feature]; ``total`` is +-sum d."""
    moves = np.round(np.abs(d) / step).astype(np.int64)
    signed = np.where(d < 0, -moves, moves).sum(axis=0)
    target = np.where(total < 0, -np.abs(signed), np.abs(signed))
    width = moves.sum(axis=0)
    order = np.argsort(width, kind="stable")
    tail = np.empty(d.shape[1])
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * 2 * (width[order[stop]] + 1) <= LATTICE_ELEMENTS:
            stop += 1
        part = order[start:stop]
        tail[part] = _convolved(np.take(moves, part, axis=1), target[part])
        start = stop
    return np.clip(tail, SMALLEST_P, 1.0)  # halves of many sums may round to 1 + 1e-16


def _convolved(moves: NDArray[np.int64], target: FloatArray) -> FloatArray:
    """Tail of the sum of +-k: where the units of negative sign sum to j, S = width - 2 j; S >= s iff 2 j <= width - s.

    One unit is added at a time, smallest move first, so that the occupied part of the table stays narrow for long.
    """
    moves = np.sort(moves, axis=0)
    moves = moves[(moves > 0).any(axis=1)]
    width = moves.sum(axis=0)
    # ``pad`` zeros before every row: the shift by a move then reads zeros instead of the end of the row before.
    n, pad = moves.shape[1], int(moves.max())
    size = pad + int(width.max()) + 1
    mass = np.zeros((n, size))
    mass[:, pad] = 1.0
    row = (np.arange(n) * size + pad)[:, None]
    reach = np.zeros(n, dtype=np.int64)
    for move in moves:
        reach += move
        occupied = np.arange(int(reach.max()) + 1)
        shifted = mass.ravel()[row + occupied - move[:, None]]
        before = mass[:, pad : pad + len(occupied)]
        mass[:, pad : pad + len(occupied)] = np.where(move[:, None] > 0, 0.5 * (before + shifted), before)
    kept = np.arange(size - pad) <= ((width - target) // 2)[:, None]
    return np.asarray(np.where(kept, mass[:, pad:], 0.0).sum(axis=1))
