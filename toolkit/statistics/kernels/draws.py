"""Counter-based random numbers: functions of (seed, draw, unit) alone, independent of blocks and workers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray


def stream(seed: int, draw: int) -> np.random.Generator:
    """Philox stream of one draw; unit i takes its i-th value, so that fewer units use a prefix of the same values.

    Raises
    ------
    InputError
        If the seed is not a non-negative 64-bit number.
    """
    if not 0 <= seed < 2**64:
        raise InputError(f"a seed is a whole number from 0 to 2**64 - 1, got {seed}.")
    return np.random.Generator(np.random.Philox(key=np.array([seed, draw], dtype=np.uint64)))


def sign_flips(n_units: int, start: int, stop: int, *, seed: int) -> FloatArray:
    """Rows ``start`` to ``stop`` of an unlimited table of random signs, [stop - start, n_units] of +1 and -1.

    The sign of unit i in flip b depends on (seed, b, i) alone: i is the unit's row, so the same prompts in the same
    order get the same signs in every block of features, on every worker.
    """
    bits = random_bits(n_units, start, stop, seed=seed)
    return np.asarray(1.0 - 2.0 * np.unpackbits(bits, axis=1, count=n_units), dtype=np.float64)


def random_bits(n_units: int, start: int, stop: int, *, seed: int) -> NDArray[np.uint8]:
    """Rows of ``sign_flips`` as packed bits, 1 for a sign of -1, [stop - start, bytes]."""
    n_bytes = -(-n_units // 8)
    raw = b"".join(stream(seed, draw).bytes(n_bytes) for draw in range(start, stop))
    return np.frombuffer(raw, dtype=np.uint8).reshape(stop - start, n_bytes)
