"""Numerical conventions of all kernels: array types, tolerances, and sums independent of the block of features."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

TIE_SLACK: Final = 1e-9
"""Statistics this close, relative to their scale, count as ties (docs/method.md section 3, rule 5)."""
ROUNDING: Final = 1e-12
"""Values below this share of a feature's scale are taken as zeros that rounding missed: .1 + .2 - .3 is 5.6e-17."""
SMALLEST_P: Final = float(np.finfo(np.float64).tiny)
"""Reported for probabilities too small for a double (2**-1075 is 0), so that a p-value is never 0."""


def column_sums(x: FloatArray) -> FloatArray:
    """Sums over axis 0, row by row: a feature's sum has the same bits in every block, with or without zero rows."""
    # Numpy adds the rows of a wide array in order, but a single column pairwise; so a single column is doubled.
    wide = np.ascontiguousarray(x if x.shape[1] != 1 else np.repeat(x, 2, axis=1))
    return np.asarray(wide.sum(axis=0)[: x.shape[1]])
