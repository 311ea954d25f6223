"""Trends over checkpoints: one contrast per unit, tested by sign flips over units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.flips.signflip import Alternative, Method, sign_flip_test
from rlgen_stats.toolkit.statistics.kernels.numerics import ROUNDING, FloatArray, column_sums
from rlgen_stats.toolkit.statistics.kernels.unit_tables import cluster_codes, feature_blocks

Kind = Literal["kendall", "page"]


@dataclass(frozen=True)
class TrendResult:
    """Test of a monotone trend; scalars in shape when one feature was given."""

    tau: Any
    """Mean contrast over units [feature], in [-1, 1]; NaN for missing features."""
    p_value: Any
    """[feature]; NaN for untestable features, never 0."""
    n_nonzero: Any
    """Units whose contrast is not zero [feature]."""
    flag: Any
    """Empty, or why a feature was not tested [feature]."""


def trend_contrast(x: Any, *, kind: Kind) -> Any:
    """Trend of each unit over checkpoints, from -1 (falls at every step) over 0 (no trend) to 1 (rises at every step).

    Parameters
    ----------
    x
        [unit, checkpoint] or [unit, checkpoint, feature], checkpoints in their order.
    kind
        ``kendall``: rising minus falling pairs of checkpoints, over all pairs (tau-a; Mann-Kendall's S, scaled).
        ``page``: the same with pairs weighted by their distance in checkpoints, which is the product sum of midranks
        and centred checkpoints (Page's L, centred and scaled; Spearman's rho without ties).

    Returns
    -------
    array
        [unit] or [unit, feature]; NaN where a checkpoint is NaN.

    Raises
    ------
    InputError
        If there are fewer than two checkpoints or the kind is unknown.

    Notes
    -----
    Ranks are taken within a unit, so units on different scales have equal weight. Values that differ by less than the
    rounding error of the unit's largest value tie. Ties count 0 and stay in the denominator. Memory is one block of
    features, time C^2 / 2 subtractions per unit.

    References
    ----------
    Mann 1945, doi:10.2307/1907187; Page 1963, doi:10.1080/01621459.1963.10500843.

    Examples
    --------
    >>> trend_contrast([[1.0, 2.0, 4.0], [2.0, 1.0, 3.0]], kind="kendall").tolist()
    [1.0, 0.3333333333333333]
    """
    values, single = _as_paths(x, kind)
    contrast = np.empty((values.shape[0], values.shape[2]))
    for part in feature_blocks(values.shape[0] * values.shape[1], values.shape[2]):
        contrast[:, part] = _pair_sums(values[:, :, part], kind)
    contrast /= _largest(values.shape[1], kind)
    return contrast[:, 0] if single else contrast


def trend_test(
    x: Any,
    *,
    kind: Kind = "kendall",
    alternative: Alternative = "two-sided",
    clusters: Any = None,
    seed: int = 0,
    method: Method = "auto",
    n_resamples: int = 9999,
) -> TrendResult:
    """Test, feature by feature, that units rise over checkpoints as often as they fall.

    Parameters
    ----------
    x
        [unit, checkpoint] or [unit, checkpoint, feature]. A feature that is NaN throughout is untestable.
    kind
        ``kendall`` or ``page``, as in ``trend_contrast``; ``page`` gives distant checkpoints more weight.
    alternative
        ``two-sided``, ``greater`` (rising) or ``less`` (falling).
    clusters
        Labels [unit]; whole clusters are flipped.
    seed, method, n_resamples
        As in ``sign_flip_test``, which tests the contrasts.

    Returns
    -------
    TrendResult
        [feature], or scalars for one feature.

    Raises
    ------
    InputError
        If a feature is NaN in some units only, there are fewer than two checkpoints, or an option is unknown.
    RefusedError
        If there are fewer than six clusters.

    Notes
    -----
    Null: given the unit, the reversed order of checkpoints is equally likely, which flips the sign of its contrast. So
    the sign flip over units is exact under any autocorrelation over checkpoints; checkpoints are not treated as
    replicates, as a Mann-Kendall test of the mean over units would. All units share one run: the conclusion is about
    this run, not about training in general. A trend that rises in half of the units and falls in the other half is not
    detected.

    References
    ----------
    Mann 1945, doi:10.2307/1907187; Page 1963, doi:10.1080/01621459.1963.10500843; sign flips as in ``sign_flip_test``.

    Examples
    --------
    >>> result = trend_test(np.arange(5) + np.zeros((8, 1)))
    >>> float(result.tau), float(result.p_value)
    (1.0, 0.0078125)
    """
    values, single = _as_paths(x, kind)
    codes = None if clusters is None else cluster_codes(clusters, len(values))
    n_units, n_checkpoints, n_features = values.shape
    parts = []
    for part in feature_blocks(n_units, max(1, n_features)):
        block = values[:, :, part]
        sums = np.empty((n_units, block.shape[2]))
        for inner in feature_blocks(n_units * n_checkpoints, block.shape[2]):
            sums[:, inner] = _pair_sums(block[:, :, inner], kind)  # whole numbers: a lattice, exact where it is narrow
        _check_missing(sums)
        tested = sign_flip_test(
            sums, alternative=alternative, method=method, n_resamples=n_resamples, seed=seed, clusters=codes
        )
        tau = column_sums(sums) / n_units / _largest(n_checkpoints, kind)
        nonzero = np.count_nonzero(np.nan_to_num(sums), axis=0)
        parts.append((tau, tested.p_value, nonzero, tested.flag))
    features: Any = 0 if single else slice(None)
    return TrendResult(*(np.concatenate(column)[features] for column in zip(*parts, strict=True)))


def _as_paths(x: Any, kind: str) -> tuple[NDArray[Any], bool]:
    """``x`` as [unit, checkpoint, feature], and whether it was given as one feature."""
    if kind not in ("kendall", "page"):
        raise InputError(f"kind must be kendall or page, got {kind!r}.")
    values = np.asarray(x)
    if values.ndim not in (2, 3) or not values.shape[0] or values.shape[1] < 2:
        raise InputError(
            "expected [unit, checkpoint] or [unit, checkpoint, feature] with at least two checkpoints, got shape "
            f"{values.shape}."
        )
    return values[:, :, None] if values.ndim == 2 else values, values.ndim == 2


def _check_missing(sums: FloatArray) -> None:
    missing = np.isnan(sums)
    partly = missing.any(axis=0) & ~missing.all(axis=0)
    if partly.any():
        raise InputError(
            f"expected every checkpoint of every unit, got {int(missing[:, partly].sum())} unit and feature pairs with "
            "missing ones; drop those units, or set the whole feature to NaN."
        )


def _largest(n_checkpoints: int, kind: Kind) -> float:
    """``_pair_sums`` of a unit that rises at every step: the denominator of the contrast."""
    pairs = n_checkpoints * (n_checkpoints - 1) / 2
    return pairs if kind == "kendall" else pairs * (n_checkpoints + 1) / 3


def _pair_sums(block: NDArray[Any], kind: Kind) -> FloatArray:
    """Sum of sign(x_c' - x_c) over pairs c < c', for page times c' - c, [unit, feature]; NaN where x is not finite.

    sum_c rank_c (c - mean c), where rank_c = (C + 1) / 2 + sum_c' sign(x_c - x_c') / 2, is half of page's.
    """
    x = np.asarray(block, dtype=np.float64)
    slack = ROUNDING * np.abs(x).max(axis=1, keepdims=True)
    sums = np.zeros((x.shape[0], x.shape[2]))
    with np.errstate(invalid="ignore"):
        for lag in range(1, x.shape[1]):
            step = x[:, lag:] - x[:, :-lag]
            rising = (step > slack).sum(axis=1) - (step < -slack).sum(axis=1)
            sums += rising * (1.0 if kind == "kendall" else float(lag))
    return np.where(np.isfinite(slack[:, 0]), sums, np.nan)
