"""Groups of sign patterns, and the sums of many features under all of them by a Walsh-Hadamard transform."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import hadamard

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.draws import random_bits
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray

BLOCK_SUMS: Final = 2**17
"""Pattern x feature sums per block (1 MB): twice as fast as blocks that do not fit into the cache."""
RADIX: Final = 16
"""The transform takes four bits at a time, as a product with a 16 x 16 Hadamard matrix."""
MAX_EXACT_UNITS: Final = 12
"""Units up to which all flips (at most 4,096) are used instead of random ones."""


@dataclass(frozen=True)
class FlipTable:
    """A group of 2**m sign patterns: every pattern once, or all products of m random ones.

    Pattern b flips unit i where b and ``codes[i]`` share an odd number of bits; pattern 0 is the identity.

    Notes
    -----
    A test over a group of flips, which holds the identity, is exact, whichever group it is (Lehmann and Romano 2005,
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
    """Whether the group holds every pattern once."""

    def __len__(self) -> int:
        return 1 << self.n_generators

    @property
    def n_units(self) -> int:
        """Units per pattern."""
        return len(self.codes)

    def feature_blocks(self, n_features: int) -> Iterator[slice]:
        """Slices of features whose sums under all patterns fit into the cache."""
        step = max(16, BLOCK_SUMS // len(self))
        for start in range(0, n_features, step):
            yield slice(start, start + step)

    def sums(self, values: FloatArray, work: Workspace | None = None) -> FloatArray:
        """Sum of the flipped values [unit, feature] under every pattern, [pattern, feature].

        With ``work`` the result is a view of it, valid until the workspace is used again.
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
        """``sums`` of values given as nonzeros: their units, features and values."""
        cells: Any = np.bincount(self.codes[unit] * n_features + feature, values, len(self) * n_features)
        spare = (work or Workspace(len(self))).take(n_features)[1]
        return walsh_hadamard(cells.reshape(len(self), n_features), spare)

    @cached_property
    def _rounds(self) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Codes and units: the first unit of every code, then the second ones, ...; no code twice in a round.

        An indexed ``+=`` adds only once where an index repeats, so each round must hold every code at most once.
        """
        order = np.argsort(self.codes, kind="stable")
        starts = np.flatnonzero(np.diff(self.codes[order], prepend=-1))
        nth = np.arange(self.n_units) - np.repeat(starts, np.diff(starts, append=self.n_units))
        rounds = [order[nth == n] for n in range(int(nth.max()) + 1)]
        return [(self.codes[units], units) for units in rounds]

    def p_value(self, reached: FloatArray) -> FloatArray:
        """P-value of statistics that ``reached`` patterns reach or exceed, counting the identity."""
        return np.asarray(reached / len(self))


def flip_table(n_units: int, n_resamples: int, *, seed: int, exact: bool = True) -> FlipTable:
    """A group of at least ``n_resamples`` sign patterns besides the identity, or of every pattern.

    Parameters
    ----------
    n_units
        Units.
    n_resamples
        Random patterns; rounded up to 2^m - 1.
    seed
        The m generators are the first m rows of ``sign_flips``.
    exact
        Whether to use every pattern where there are at most 12 units, or no more patterns than ``n_resamples``.

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
    flipped = np.unpackbits(random_bits(n_units, 0, m, seed=seed), axis=1, count=n_units).astype(np.int64)
    return FlipTable((flipped << np.arange(m)[:, None]).sum(axis=0), m, False)


def flip_count(n_units: int, n_resamples: int) -> int:
    """Number of patterns of ``flip_table`` for these arguments."""
    return len(flip_table(n_units, n_resamples, seed=0))


def all_flips(n_units: int) -> FloatArray:
    """Every sign pattern, [2**n_units, n_units]; the first row is the identity."""
    index = np.arange(2**n_units, dtype=np.uint32)[:, None]
    return np.asarray(1.0 - 2.0 * ((index >> np.arange(n_units, dtype=np.uint32)) & 1), dtype=np.float64)


class Workspace:
    """Two tables of sums, reused by one block of features after another: allocating costs more than the sums."""

    def __init__(self, n_patterns: int) -> None:
        self._n_patterns = n_patterns
        self._tables: tuple[FloatArray, FloatArray] = (np.empty(0), np.empty(0))

    def take(self, n_features: int) -> tuple[FloatArray, FloatArray]:
        """Both tables as [pattern, feature], contents undefined."""
        size = self._n_patterns * n_features
        if len(self._tables[0]) < size:
            self._tables = np.empty(size), np.empty(size)
        first, second = (table[:size].reshape(self._n_patterns, n_features) for table in self._tables)
        return first, second


def walsh_hadamard(cells: FloatArray, spare: FloatArray | None = None) -> FloatArray:
    """Sum over c of (-1)^popcount(b & c) cells[c] for every b, along axis 0 of [2**m, feature].

    A few bits at a time, each a product with a small Hadamard matrix; ``cells`` and ``spare`` are overwritten.
    """
    size, n_features = cells.shape
    current = np.ascontiguousarray(cells, dtype=np.float64)
    other = np.empty_like(current) if spare is None else spare
    done = 1  # the product of the radices of the bits transformed so far
    while done < size:
        radix = min(RADIX, size // done)
        shape = (done, radix, size // (done * radix) * n_features)
        np.matmul(_hadamard(radix), current.reshape(shape), out=other.reshape(shape))
        current, other = other, current
        done *= radix
    return current


@cache
def _hadamard(size: int) -> FloatArray:
    return np.asarray(hadamard(size, dtype=np.float64))
