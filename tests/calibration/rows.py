"""Rows of the calibration table: an observed rate, its nominal value, and the rate of the naive estimator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_ERRORS = 3.0
"""Half width of a band in standard errors: a calibrated estimator falls outside once in 370 experiments."""


@dataclass(frozen=True)
class Row:
    """One experiment."""

    name: str
    nominal: float
    observed: float
    low: float
    """Band in which a calibrated estimator stays."""
    high: float
    naive: float
    """The same rate of the estimator that the guard replaces; NaN if there is none."""
    naive_name: str
    size: str
    known: str = ""
    """Known reason why the estimator falls outside the band and stays in use; empty if it must stay inside."""

    @property
    def passed(self) -> bool:
        return self.low <= self.observed <= self.high

    @property
    def bites(self) -> bool:
        """Whether the naive estimator falls outside the band; True where there is none."""
        return bool(np.isnan(self.naive) or not self.low <= self.naive <= self.high)


def rate_row(
    name: str,
    nominal: float,
    hits: int,
    trials: int,
    size: str,
    *,
    naive: float = float("nan"),
    naive_name: str = "",
    at_most: bool = False,
    known: str = "",
) -> Row:
    """A rate over independent trials: 3 binomial standard errors about the nominal one, or only above it."""
    half = MOST_ERRORS * np.sqrt(nominal * (1 - nominal) / trials)
    low = 0.0 if at_most else max(0.0, nominal - half)
    return Row(name, nominal, hits / trials, low, min(1.0, nominal + half), naive, naive_name, size, known)


def mean_row(
    name: str,
    nominal: float,
    values: Sequence[float],
    size: str,
    *,
    naive: float = float("nan"),
    naive_name: str = "",
    at_most: bool = False,
    known: str = "",
) -> Row:
    """A mean over independent worlds: 3 standard errors of the mean about the nominal value, or only above it."""
    half = MOST_ERRORS * float(np.std(values, ddof=1)) / np.sqrt(len(values))
    low = -np.inf if at_most else nominal - half
    return Row(name, nominal, float(np.mean(values)), low, nominal + half, naive, naive_name, size, known)
