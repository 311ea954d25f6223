"""Differences per unit or cluster, checked and cleaned, ready for their signs to be flipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.statistics.kernels.numerics import ROUNDING, FloatArray
from rlgen_stats.toolkit.statistics.kernels.unit_tables import MIN_CLUSTERS, as_table, cluster_codes, cluster_totals


@dataclass(frozen=True)
class FlipUnits:
    """Differences ready to be flipped."""

    values: FloatArray
    """[unit, feature], rows contiguous; features without any value are all zero."""
    missing: NDArray[np.bool_]
    """[feature]: NaN in every unit."""
    single: bool
    """Whether one feature came without its axis."""


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
