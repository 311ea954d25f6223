"""Counter-based random signs and weights: functions of (seed, draw, unit), whatever the blocks or workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import hadamard

from rlgen_stats.schemas.errors import InputError, RefusedError

FloatArray = NDArray[np.float64]

TIE_SLACK: Final = 1e-9
"""Statistics this close, relative to their scale, count as ties (METHOD.md section 3, rule 5)."""
BLOCK_FEATURES: Final = 1024
"""Features per matrix product: with 1,024 draws the block of statistics is 8 MB and stays near the cache."""
BLOCK_DRAWS: Final = 1024
"""Draws per matrix product at most, for the same reason; memory does not grow with the number of draws."""
BLOCK_SIGNS: Final = 2**19
"""Signs per matrix product (4 MB): a sparse product reads a row of them for every nonzero, at random."""
BLOCK_SUMS: Final = 2**17
"""Pattern x feature sums worked on together (1 MB): twice as fast as blocks that leave the cache."""
RADIX: Final = 16
"""Four bits are transformed at a time, by a product with a 16 x 16 Hadamard matrix."""
BLOCK_UNITS: Final = 2**19
"""Unit x feature elements cleaned and packed together (4 MB)."""
ROUNDING: Final = 1e-12
"""Share of a feature's scale below which a value is what rounding left of a zero: .1 + .2 - .3 is 5.6e-17."""
SPARSE_DENSITY: Final = 0.15
"""Share of nonzeros below which a sparse product is faster than a dense one."""
MAX_EXACT_UNITS: Final = 12
"""Units up to which all 4,096 flips are used instead of random ones."""
MIN_CLUSTERS: Final = 6
"""Fewest clusters: with five the smallest two-sided p-value is 1/16, so nothing can be found at .05."""
SMALLEST_P: Final = float(np.finfo(np.float64).tiny)
"""Stands for probabilities too small for a double (2**-1075 is 0): a p-value is never 0."""


@dataclass(frozen=True)
class FlipUnits:
    """Differences ready to be flipped."""

    values: FloatArray
    """[unit, feature], rows contiguous; features without any value are all zero."""
    missing: NDArray[np.bool_]
    """[feature]: NaN in every unit."""
    single: bool
    """Whether one feature came without its axis."""


@dataclass(frozen=True)
class FlipTable:
    """A group of 2**m sign patterns: every pattern once, or all products of m random ones.

    Pattern b turns unit i where b and ``codes[i]`` share an odd number of bits; pattern 0 turns nothing.

    Notes
    -----
    A test over a group of flips that holds the identity is exact, whichever group it is (Lehmann and Romano 2005,
    theorem 15.2.1; Hemerik and Goeman 2018, doi:10.1007/s11749-017-0571-1). Any two patterns of a random group are
    independent of one another, so a count over them has the mean and variance of a count over independent flips: the
    Monte-Carlo error is the same. All sums of a feature are one Walsh-Hadamard transform of its sums within equal
    codes: n + 2^m m additions instead of 2^m n.
    """

    codes: NDArray[np.int64]
    """[unit] m bits."""
    n_generators: int
    """m."""
    exhaustive: bool
    """Whether every pattern is there once."""

    def __len__(self) -> int:
        return 1 << self.n_generators

    @property
    def n_units(self) -> int:
        """Units a pattern has."""
        return len(self.codes)

    def blocks(self) -> Iterator[tuple[slice, FloatArray]]:
        """Consecutive patterns as +1 and -1, [at most 1,024 patterns, unit], and where they stand."""
        step = min(BLOCK_DRAWS, max(64, BLOCK_SIGNS // self.n_units))
        for start in range(0, len(self), step):
            here = slice(start, min(start + step, len(self)))
            pattern = np.arange(here.start, here.stop)[:, None]
            yield here, 1.0 - 2.0 * (np.bitwise_count(pattern & self.codes) & 1)

    def feature_blocks(self, n_features: int) -> Iterator[slice]:
        """Blocks of features whose sums under all patterns stay in the cache."""
        step = max(16, BLOCK_SUMS // len(self))
        for start in range(0, n_features, step):
            yield slice(start, start + step)

    def sums(self, values: FloatArray, work: Workspace | None = None) -> FloatArray:
        """Sum of the turned values [unit, feature] under every pattern, [pattern, feature].

        With ``work`` the result lies in it, until it is used again.
        """
        cells, spare = (work or Workspace(len(self))).take(values.shape[1])
        cells.fill(0.0)
        (places, units), *more = self._rounds
        cells[places] = values[units]
        for places, units in more:
            cells[places] += values[units]
        return walsh_hadamard(cells, spare)

    def sparse_sums(
        self,
        unit: NDArray[np.int64],
        feature: NDArray[np.int64],
        values: FloatArray,
        n_features: int,
        work: Workspace | None = None,
    ) -> FloatArray:
        """The same of nonzeros and where they stand."""
        cells: Any = np.bincount(self.codes[unit] * n_features + feature, values, len(self) * n_features)
        spare = (work or Workspace(len(self))).take(n_features)[1]
        return walsh_hadamard(cells.reshape(len(self), n_features), spare)

    @cached_property
    def _rounds(self) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Codes and units: the first unit of every code, then the second ones, ...; no code twice in a round."""
        order = np.argsort(self.codes, kind="stable")
        starts = np.flatnonzero(np.diff(self.codes[order], prepend=-1))
        nth = np.arange(self.n_units) - np.repeat(starts, np.diff(starts, append=self.n_units))
        rounds = [order[nth == n] for n in range(int(nth.max()) + 1)]
        return [(self.codes[units], units) for units in rounds]

    def p_value(self, reached: FloatArray) -> FloatArray:
        """P-value of statistics that ``reached`` patterns reach or exceed, the identity among them."""
        return np.asarray(reached / len(self))


@cache
def _hadamard(size: int) -> FloatArray:
    return np.asarray(hadamard(size, dtype=np.float64))


class Workspace:
    """Two tables of sums that blocks of features use in turn: fresh ones would cost more than the sums."""

    def __init__(self, n_patterns: int) -> None:
        self._n_patterns = n_patterns
        self._tables: tuple[FloatArray, FloatArray] = (np.empty(0), np.empty(0))

    def take(self, n_features: int) -> tuple[FloatArray, FloatArray]:
        """Both, [pattern, feature]; what was in them is lost."""
        size = self._n_patterns * n_features
        if len(self._tables[0]) < size:
            self._tables = np.empty(size), np.empty(size)
        first, second = (table[:size].reshape(self._n_patterns, n_features) for table in self._tables)
        return first, second


def walsh_hadamard(cells: FloatArray, spare: FloatArray | None = None) -> FloatArray:
    """Sum over c of (-1)^popcount(b & c) cells[c] for every b, along axis 0 of [2**m, feature].

    A few bits at a time, each a product with a small Hadamard matrix; ``cells`` and ``spare`` are written over.
    """
    size, n_features = cells.shape
    found = np.ascontiguousarray(cells, dtype=np.float64)
    other = np.empty_like(found) if spare is None else spare
    left = 1
    while left < size:
        radix = min(RADIX, size // left)
        shape = (left, radix, size // (left * radix) * n_features)
        np.matmul(_hadamard(radix), found.reshape(shape), out=other.reshape(shape))
        found, other = other, found
        left *= radix
    return found


def stream(seed: int, draw: int) -> np.random.Generator:
    """Philox stream of one draw; unit i takes its i-th value, so that fewer units see a prefix.

    Raises
    ------
    InputError
        If the seed is not a non-negative 64-bit number.
    """
    if not 0 <= seed < 2**64:
        raise InputError(f"a seed is a whole number from 0 to 2**64 - 1, got {seed}.")
    return np.random.Generator(np.random.Philox(key=np.array([seed, draw], dtype=np.uint64)))


def sign_flips(n_units: int, start: int, stop: int, *, seed: int) -> FloatArray:
    """Rows ``start`` to ``stop`` of the endless table of random signs, [stop - start, n_units] of +1 and -1.

    The sign of unit i in flip b depends on (seed, b, i) alone: i is the unit's row, so the same prompts in the same
    order get the same signs in every block of features, on every worker.
    """
    return _signs(_random_bits(n_units, start, stop, seed), n_units)


def flip_table(n_units: int, n_resamples: int, *, seed: int, exact: bool = True) -> FlipTable:
    """A group of sign patterns with at least ``n_resamples`` beside the identity, or every pattern.

    Parameters
    ----------
    n_units
        Units.
    n_resamples
        Random patterns wanted; rounded up to 2^m - 1.
    seed
        The m generators are the first m rows of ``sign_flips``.
    exact
        Whether to take every pattern where there are at most 12 units, or not more patterns than asked for.

    Raises
    ------
    InputError
        If ``n_resamples`` is not positive or above 2^30.
    """
    if not 1 <= n_resamples < 2**30:
        raise InputError(f"n_resamples must be at least 1, got {n_resamples}, and below 2**30.")
    m = int(n_resamples).bit_length()
    if exact and n_units <= max(MAX_EXACT_UNITS, m):
        return FlipTable(1 << np.arange(n_units, dtype=np.int64), n_units, True)
    turned = np.unpackbits(_random_bits(n_units, 0, m, seed), axis=1, count=n_units).astype(np.int64)
    return FlipTable((turned << np.arange(m)[:, None]).sum(axis=0), m, False)


def flip_count(n_units: int, n_resamples: int) -> int:
    """Patterns that ``flip_table`` holds for these numbers."""
    return len(flip_table(n_units, n_resamples, seed=0))


def all_flips(n_units: int) -> FloatArray:
    """Every sign pattern, [2**n_units, n_units]; the first row changes nothing."""
    index = np.arange(2**n_units, dtype=np.uint32)[:, None]
    return np.asarray(1.0 - 2.0 * ((index >> np.arange(n_units, dtype=np.uint32)) & 1), dtype=np.float64)


def _random_bits(n_units: int, start: int, stop: int, seed: int) -> NDArray[np.uint8]:
    n_bytes = -(-n_units // 8)
    raw = b"".join(stream(seed, draw).bytes(n_bytes) for draw in range(start, stop))
    return np.frombuffer(raw, dtype=np.uint8).reshape(stop - start, n_bytes)


def _signs(bits: NDArray[np.uint8], n_units: int) -> FloatArray:
    return np.asarray(1.0 - 2.0 * np.unpackbits(bits, axis=1, count=n_units), dtype=np.float64)


def bootstrap_weights(n_units: int, n_resamples: int, *, seed: int) -> FloatArray:
    """How often each unit enters each bootstrap sample, [n_resamples, n_units]; rows sum to n_units."""
    return _bootstrap_counts(n_units, n_resamples, seed).astype(np.float64)


def bootstrap_blocks(n_units: int, n_resamples: int, *, seed: int) -> Iterator[tuple[slice, FloatArray]]:
    """``bootstrap_weights`` in consecutive blocks of draws of at most 4 MB, and where they stand."""
    counts, step = _bootstrap_counts(n_units, n_resamples, seed), max(16, BLOCK_SIGNS // n_units)
    for start in range(0, n_resamples, step):
        here = slice(start, min(start + step, n_resamples))
        yield here, counts[here].astype(np.float64)


@lru_cache(maxsize=2)
def _bootstrap_counts(n_units: int, n_resamples: int, seed: int) -> NDArray[np.uint8]:
    """Kept between blocks of features, which all use the same draws; a unit drawn over 255 times does not occur."""
    table = np.empty((n_resamples, n_units), dtype=np.uint8)
    for draw in range(n_resamples):
        table[draw] = np.bincount(stream(seed, draw).integers(0, n_units, n_units), minlength=n_units)
    table.flags.writeable = False
    return table


def as_table(values: Any) -> tuple[NDArray[Any], bool]:
    """``values`` as [unit, feature] of the type they have, and whether they came as one feature [unit].

    Raises
    ------
    InputError
        If there is no unit, or another number of axes than one or two.
    """
    array = np.asarray(values)
    if array.ndim not in (1, 2) or not array.shape[0]:
        raise InputError(f"expected [unit] or [unit, feature] with at least one unit, got shape {array.shape}.")
    return array[:, None] if array.ndim == 1 else array, array.ndim == 1


def as_units(values: Any) -> tuple[FloatArray, bool]:
    """``as_table`` in float64 with contiguous rows."""
    table, single = as_table(values)
    return np.ascontiguousarray(table, dtype=np.float64), single


def flip_units(differences: Any, clusters: Any = None) -> FlipUnits:
    """Differences per unit to be flipped, or their sums within clusters, checked; what rounding left of zeros is zero.

    Memory is a few times that of the differences: hand in a block of features at a time.

    Raises
    ------
    InputError
        If a feature has values in some units and NaN in others, or infinite ones.
    RefusedError
        If there are fewer than six clusters.
    """
    given, single = as_table(differences)
    missing = np.isnan(given[0].astype(np.float64))
    missing[missing] = np.isnan(given[:, missing]).all(axis=0)
    codes = None if clusters is None else cluster_codes(clusters, len(given))
    n_units = len(given) if codes is None else int(codes.max()) + 1
    if codes is not None and n_units < MIN_CLUSTERS:
        raise RefusedError(
            f"a sign-flip test over clusters needs at least {MIN_CLUSTERS}, got {n_units}; flip a lower level, "
            "or use more clusters."
        )
    d = given.astype(np.float64, order="C")
    if missing.any():
        d[:, missing] = 0.0
    magnitude = np.abs(d)
    largest = magnitude.max(axis=0)
    if not np.isfinite(largest).all():
        raise InputError(
            f"differences must be finite, got {int((~np.isfinite(given[:, ~missing])).sum())} NaN or infinite; "
            "drop those units, or set the whole feature to NaN."
        )
    if codes is not None:
        d, magnitude = cluster_totals(d, codes), cluster_totals(magnitude, codes)
        largest, magnitude = magnitude.max(axis=0), np.abs(d)
    np.copyto(d, 0.0, where=magnitude <= ROUNDING * largest)
    return FlipUnits(d, missing, single)


def feature_blocks(n_units: int, n_features: int) -> Iterator[slice]:
    """Blocks of features that stay near the cache, [unit, block]."""
    step = max(64, BLOCK_UNITS // max(1, n_units))
    for start in range(0, n_features, step):
        yield slice(start, start + step)


def packed(d: FloatArray) -> FloatArray:
    """The nonzeros of every feature in their order, zeros below, [most nonzeros, feature]; sums have the same bits."""
    rows, columns = np.nonzero(d)
    n_nonzero = np.bincount(columns, minlength=d.shape[1])
    most = int(n_nonzero.max(initial=0))
    if 2 * most > len(d):
        return d
    order = np.argsort(columns.astype(np.int32), kind="stable")
    rows, columns = rows[order], columns[order]
    out = np.zeros((most, d.shape[1]))
    out[np.arange(len(rows)) - np.repeat(np.cumsum(n_nonzero) - n_nonzero, n_nonzero), columns] = d[rows, columns]
    return out


def cluster_codes(clusters: Any, n_units: int) -> NDArray[np.int64]:
    """Which cluster each unit is in, 0, 1, ... in sorted order of the labels.

    Raises
    ------
    InputError
        If there is not one label a unit.
    """
    given = np.asarray(clusters)
    if given.shape != (n_units,):
        raise InputError(f"clusters must name one label per unit ({n_units}), got shape {given.shape}.")
    return np.asarray(np.unique(given, return_inverse=True)[1], dtype=np.int64)


def cluster_totals(values: FloatArray, clusters: Any) -> FloatArray:
    """Sums within clusters, [cluster, feature], clusters in sorted order of their labels.

    Raises
    ------
    InputError
        If there is not one label a unit.
    """
    codes = cluster_codes(clusters, len(values))
    totals = np.zeros((int(codes.max()) + 1, *values.shape[1:]))
    np.add.at(totals, codes, values)
    return totals


def column_sums(x: FloatArray) -> FloatArray:
    """Sums over axis 0, row by row: the same bits whatever other features stand beside one, zero rows or not.

    Numpy adds the rows of a wide array in order, but a single column pairwise; so a single column is doubled.
    """
    wide = np.ascontiguousarray(x if x.shape[1] != 1 else np.repeat(x, 2, axis=1))
    return np.asarray(wide.sum(axis=0)[: x.shape[1]])
