"""Evidence that may be looked at after every unit: e-values of the symmetric null."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.flips.resampling import (
    FloatArray,
    as_table,
    cluster_codes,
    feature_blocks,
    flip_units,
)
from rlgen_stats.toolkit.statistics.kernels.flips.signflip import Alternative

LARGEST_BET: Final = 1.0
"""Most lambda |d| of a unit. With normal differences half of it gives 30% less log-evidence at d_z = .5 (20% more at
.2), twice as much 15% less at .2 (30% more at d_z = 1)."""
LOG_2: Final = float(np.log(2.0))


def flip_e_value(
    differences: Any, *, alternative: Alternative = "two-sided", clusters: Any = None, running: bool = False
) -> Any:
    """E-value against differences symmetric about zero, valid whenever one stops adding units.

    Parameters
    ----------
    differences
        [unit] or [unit, feature], units in the order they came, fixed without looking at signs. A feature that is NaN
        in every unit, or zero in every unit, is untestable.
    alternative
        ``two-sided``, ``greater`` or ``less``.
    clusters
        Labels [unit]; clusters are bet on as wholes, in order of their first unit.
    running
        Whether to return the e-value after every unit (or cluster) in place of the last.

    Returns
    -------
    float or array
        E-values [feature], or [unit, feature] if running; NaN for untestable features.

    Raises
    ------
    InputError
        If differences are not finite or the alternative is unknown.
    RefusedError
        If there are fewer than six clusters.

    Notes
    -----
    Product over units of exp(lambda d) / cosh(lambda d). Given |d|, the sign is a fair coin under the null, so that
    each factor has mean one whatever lambda the signs before it chose: the product is a test martingale, E[e] = 1 for
    any number of units and any stopping rule, and P(e ever >= 1/a) <= a (Ville). lambda = sum d / sum d^2 of earlier
    units, no less than 0, with lambda |d| <= 1 for the largest |d| up to this one, its sign unseen. Two-sided: the mean
    of both directions. Null as in ``sign_flip_test``, conditional on units being independent of one another. Evidence
    for stopping early is paid for: with N fixed in advance ``sign_flip_test`` finds more. With ``clusters`` the path
    moves at whole clusters only; a cluster that still grows is not over.

    References
    ----------
    Ramdas, Grunwald, Vovk and Shafer 2023, doi:10.1214/23-STS894 (test martingales, Ville's inequality); symmetric
    differences: de la Pena 1999, doi:10.1214/aop/1022677271, whose exp(x - x^2/2) is smaller, since cosh x <=
    exp(x^2/2).

    Examples
    --------
    >>> float(flip_e_value(np.full(20, 0.3))) > 1000
    True
    """
    if alternative not in ("two-sided", "greater", "less"):
        raise InputError(f"alternative must be two-sided, greater or less, got {alternative!r}.")
    d, single = as_table(differences)
    order = None if clusters is None else _in_order(clusters, len(d))
    n_units = len(d) if order is None else int(order.max()) + 1
    found = np.full((n_units, d.shape[1]) if running else d.shape[1], np.nan)
    for part in feature_blocks(*d.shape):
        values = flip_units(d[:, part], order).values
        path = np.exp(_log_path(values, alternative))
        path[:, ~values.any(axis=0)] = np.nan
        found[..., part] = path if running else path[-1]
    return found[..., 0][()] if single else found


def e_bh(e: Any, *, alpha: float) -> NDArray[np.bool_]:
    """Which hypotheses e-BH rejects at false discovery rate ``alpha``, whatever their dependence.

    Parameters
    ----------
    e
        E-values of the whole family [any shape]; NaN is untestable, no part of the family, and not rejected.
    alpha
        False discovery rate.

    Returns
    -------
    array of bool
        Of the shape of ``e``.

    Raises
    ------
    InputError
        If an e-value is negative or alpha is not between 0 and 1.

    Notes
    -----
    Rejects the k largest of K, for the largest k whose k-th largest e-value is at least K / (k alpha). No correction
    for dependence is needed. E-values of the same stopping time for all features, or of stopping times of their own,
    but not running maxima: those are no e-values.

    References
    ----------
    Wang and Ramdas 2022, doi:10.1111/rssb.12489, definition 1 and theorem 2.

    Examples
    --------
    >>> e_bh([90.0, 45.0, 1.0, 0.2], alpha=0.05).tolist()
    [True, True, False, False]
    """
    values = np.asarray(e, dtype=np.float64)
    if not 0 < alpha < 1:
        raise InputError(f"alpha must lie between 0 and 1, got {alpha}.")
    if (values < 0).any():
        raise InputError(f"e-values are not negative, got {float(np.nanmin(values))}; pass e-values, not their logs.")
    ranked = np.sort(values[~np.isnan(values)])[::-1]
    enough = np.flatnonzero(ranked * np.arange(1, len(ranked) + 1) >= len(ranked) / alpha)
    least = ranked[enough[-1]] if len(enough) else np.inf
    return np.asarray((values >= least) & bool(len(enough)))


def anytime_p(e_running: Any) -> FloatArray:
    """P-values that hold at every unit and at any stopping rule: one over the largest e-value so far.

    Parameters
    ----------
    e_running
        Running e-values [unit(, feature)], as of ``flip_e_value(..., running=True)``.

    Returns
    -------
    array
        [unit(, feature)], never rising, at most 1, never 0; NaN for untestable features.

    Raises
    ------
    InputError
        If there is no unit, or an e-value is negative.

    Notes
    -----
    Ville: P(some p <= a) <= a. Features are not corrected for one another: hand the p-values of one stopping time to
    ``adjust``, or the e-values to ``e_bh``.

    References
    ----------
    Ramdas, Grunwald, Vovk and Shafer 2023, doi:10.1214/23-STS894.

    Examples
    --------
    >>> anytime_p([0.5, 4.0, 2.0]).tolist()
    [1.0, 0.25, 0.25]
    """
    path = np.asarray(e_running, dtype=np.float64)
    if not path.ndim or not len(path):
        raise InputError(f"expected running e-values [unit] or [unit, feature], got shape {path.shape}.")
    if (path < 0).any():
        raise InputError(f"e-values are not negative, got {float(np.nanmin(path))}; pass e-values, not their logs.")
    largest = np.minimum(np.maximum.accumulate(path, axis=0), np.finfo(np.float64).max)
    return np.asarray(1.0 / np.maximum(largest, 1.0))


def _in_order(clusters: Any, n_units: int) -> NDArray[np.int64]:
    """Cluster of each unit, 0, 1, ... in order of their first units."""
    codes = cluster_codes(clusters, n_units)
    first = np.unique(codes, return_index=True)[1]
    return np.asarray(np.argsort(np.argsort(first)), dtype=np.int64)[codes]


def _log_path(d: FloatArray, alternative: Alternative) -> FloatArray:
    """Log e-value after every unit, [unit, feature]."""
    magnitude = np.abs(d)
    largest = np.maximum.accumulate(magnitude, axis=0)
    before = np.zeros((2, *d.shape))
    np.cumsum(d[:-1], axis=0, out=before[0, 1:])
    np.cumsum(np.square(d[:-1]), axis=0, out=before[1, 1:])
    with np.errstate(divide="ignore", invalid="ignore"):
        stake = np.where(before[1] > 0, before[0] / before[1], 0.0)
        most = np.where(largest > 0, LARGEST_BET / largest, 0.0)
    up, down = (np.clip(turn * stake, 0.0, most) for turn in (1.0, -1.0))
    if alternative == "greater":
        return _log_product(up * d)
    if alternative == "less":
        return _log_product(-down * d)
    return np.asarray(np.logaddexp(_log_product(up * d), _log_product(-down * d)) - LOG_2)


def _log_product(bet: FloatArray) -> FloatArray:
    """Running sum of x - log cosh x = log 2 - log(1 + exp(-2 x))."""
    return np.asarray(np.cumsum(LOG_2 - np.logaddexp(0.0, -2.0 * bet), axis=0))
