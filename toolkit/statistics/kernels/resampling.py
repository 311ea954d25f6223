"""Counter-based random signs and weights: functions of (seed, draw, unit), whatever the blocks or workers."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

TIE_SLACK: Final = 1e-9
"""Statistics this close, relative to their scale, count as ties (METHOD.md section 3, rule 5)."""
BLOCK_FEATURES: Final = 1024
"""Features per matrix product: with 1,000 draws the block of statistics is 8 MB and stays near the cache."""
SPARSE_DENSITY: Final = 0.15
"""Share of nonzeros below which a sparse product is faster than a dense one."""


def stream(seed: int, draw: int) -> np.random.Generator:
    """Philox stream of one draw; unit i takes its i-th value, so that fewer units see a prefix."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, draw], dtype=np.uint64)))


def sign_flips(n_units: int, start: int, stop: int, *, seed: int) -> FloatArray:
    """Rows ``start`` to ``stop`` of the endless table of random signs, [stop - start, n_units] of +1 and -1."""
    n_bytes = -(-n_units // 8)
    raw = b"".join(stream(seed, draw).bytes(n_bytes) for draw in range(start, stop))
    bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8).reshape(stop - start, n_bytes), axis=1)
    return np.asarray(1.0 - 2.0 * bits[:, :n_units], dtype=np.float64)


def all_flips(n_units: int) -> FloatArray:
    """Every sign pattern, [2**n_units, n_units]; the first row changes nothing."""
    index = np.arange(2**n_units, dtype=np.uint32)[:, None]
    return np.asarray(1.0 - 2.0 * ((index >> np.arange(n_units, dtype=np.uint32)) & 1), dtype=np.float64)


def bootstrap_weights(n_units: int, n_resamples: int, *, seed: int) -> FloatArray:
    """How often each unit enters each bootstrap sample, [n_resamples, n_units]; rows sum to n_units."""
    table = np.empty((n_resamples, n_units))
    for draw in range(n_resamples):
        table[draw] = np.bincount(stream(seed, draw).integers(0, n_units, n_units), minlength=n_units)
    return table


def as_units(values: Any) -> tuple[FloatArray, bool]:
    """``values`` as [unit, feature] float64, and whether they came as one feature [unit]."""
    array = np.asarray(values, dtype=np.float64)
    return (array[:, None], True) if array.ndim == 1 else (array, False)


def cluster_totals(values: FloatArray, clusters: Any) -> FloatArray:
    """Sums within clusters, [cluster, feature], in order of first appearance of sorted labels."""
    labels, codes = np.unique(np.asarray(clusters), return_inverse=True)
    totals = np.zeros((len(labels), *values.shape[1:]))
    np.add.at(totals, codes, values)
    return totals
