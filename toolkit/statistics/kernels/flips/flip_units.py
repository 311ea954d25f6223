"""Preparation of differences for sign flips: checks, sums within clusters, exact zeros, packing of nonzeros."""

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
    """Checked differences, one row per unit or cluster."""

    values: FloatArray
    """[unit, feature], rows contiguous; missing features are all zero."""
    missing: NDArray[np.bool_]
    """[feature]: NaN in every unit."""


def flip_units(differences: Any, clusters: Any = None) -> FlipUnits:
    """Check differences [unit(, feature)], sum them within clusters, and set to 0 values that are rounding errors of 0.

    Memory is a few times that of the differences: pass one block of features at a time.

    Raises
    ------
    InputError
        If a feature has values in some units and NaN in others, or infinite ones.
    RefusedError
        If there are fewer than six clusters.
    """
    table, _ = as_table(differences)
    missing = np.isnan(table[0].astype(np.float64))
    missing[missing] = np.isnan(table[:, missing]).all(axis=0)
    codes = None if clusters is None else cluster_codes(clusters, len(table))
    n_units = len(table) if codes is None else int(codes.max()) + 1
    if codes is not None and n_units < MIN_CLUSTERS:
        raise RefusedError(
            f"a sign-flip test over clusters needs at least {MIN_CLUSTERS}, got {n_units}; flip a lower level, "
            "or use more clusters."
        )
    d = table.astype(np.float64, order="C")
    if missing.any():
        d[:, missing] = 0.0
    magnitude = np.abs(d)
    largest = magnitude.max(axis=0)
    if not np.isfinite(largest).all():
        raise InputError(
            f"differences must be finite, got {int((~np.isfinite(table[:, ~missing])).sum())} NaN or infinite; "
            "drop those units, or set the whole feature to NaN."
        )
    if codes is not None:
        d, magnitude = cluster_totals(d, codes), cluster_totals(magnitude, codes)
        largest, magnitude = magnitude.max(axis=0), np.abs(d)
    # A difference of equal values may round to 1e-17; as a nonzero it would count as evidence of its sign.
    np.copyto(d, 0.0, where=magnitude <= ROUNDING * largest)
    return FlipUnits(d, missing)


def packed(d: FloatArray) -> FloatArray:
    """The nonzeros of every feature in their order, then zeros, [largest number of nonzeros, feature].

    Shorter columns make sums and tails faster, and ``column_sums`` of the result has the same bits.
    """
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
