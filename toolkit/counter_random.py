"""Counter-based random numbers: pure functions of a key, so neither order nor batching changes a draw.

References
----------
SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014,
doi:10.1145/2660193.2660195, figure 16.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

GOLDEN_GAMMA: Final = np.uint64(0x9E3779B97F4A7C15)
"""Increment of SplitMix64's state: 2**64 over the golden ratio, made odd."""
MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
MIX_2: Final = np.uint64(0x94D049BB133111EB)
"""Factors of its output function."""


def splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output after each state: 64 random bits, one number a state."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is what the algorithm asks for
        z = state + GOLDEN_GAMMA
        z = (z ^ (z >> np.uint64(30))) * MIX_1
        z = (z ^ (z >> np.uint64(27))) * MIX_2
        return z ^ (z >> np.uint64(31))


def unit_interval(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Random bits as numbers in [0, 1): multiples of 2**-53, as many as a float64 holds exactly."""
    return np.asarray((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def counter_bits(seeds: NDArray[np.uint64], steps: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64 random bits per row that are a pure function of (seed, step).

    Parameters
    ----------
    seeds, steps
        [row]; a step is 0 or more.

    Notes
    -----
    Number ``step`` of the SplitMix64 stream whose first state is the hashed seed: neighbouring seeds then start far
    apart instead of one step behind each other.
    """
    stream = splitmix64(np.asarray(seeds, dtype=np.uint64))
    with np.errstate(over="ignore"):
        return splitmix64(stream + np.asarray(steps, dtype=np.uint64) * GOLDEN_GAMMA)
