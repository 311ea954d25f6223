"""One estimate from several dictionaries: its interval holds the sampling of prompts and the draw of dictionaries."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import special

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray
from rlgen_stats.toolkit.statistics.kernels.unit_tables import cluster_totals

Answer = TypeVar("Answer")

FEW_DICTIONARIES: Final = 5
"""Below this number every dictionary must have the pooled sign; from it on a majority does."""
MAJORITY: Final = 0.8
"""Share of five or more dictionaries that must have the pooled sign: 4 of 5, 8 of 10."""
BISECTIONS: Final = 80
"""Halvings of a bracket: enough for every digit of a double."""
SMALLEST_LOG_P: Final = -690.0
"""Log of the smallest p-value that is looked for (1e-300)."""
LARGEST_T: Final = 1e150
"""Quantile of t at smaller p-values yet, with one degree of freedom: its square is still a number."""


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """Mean over dictionaries, one entry a column; dictionaries and clusters of prompts are both random."""

    mean: Any
    """[...]: mean over dictionaries."""
    low: Any
    """[...]: lower end of the two-sided 1 - alpha interval."""
    high: Any
    """[...]: its upper end."""
    standard_error: Any
    """[...]: of the mean, over clusters and dictionaries."""
    df: Any
    """[...]: degrees of freedom of the t quantile that leads from this standard error to this interval."""
    between_sd: Any
    """[...]: standard deviation of the effect between dictionaries, sampling noise taken off; NaN with one."""
    p_value: Any
    """[...]: t test of a mean of 0: the level at which the interval ends at 0."""
    each_mean: FloatArray
    """[dictionary, ...]."""
    n_dictionaries: int

    @property
    def between_known(self) -> bool:
        """Whether the interval holds the variance between dictionaries: not with a single one."""
        return self.n_dictionaries > 1


def pooled_mean(
    values: Any, codes: Any = None, *, alpha: float = 0.05, within: tuple[Any, Any] | None = None
) -> Pooled:
    """Mean over units and dictionaries, where each dictionary measured the same units.

    Parameters
    ----------
    values
        [dictionary, unit(, ...)].
    codes
        [unit] cluster of each unit; None if units are independent. The mean stays that over units.
    alpha
        1 - coverage.
    within
        Low and high [...] of the 1 - alpha interval that the mean over dictionaries would have if its dictionaries were
        the only ones, in place of the t-interval with the cluster-robust (CR1) error. It replaces the bounds alone, not
        standard error and p-value.

    Returns
    -------
    Pooled
        With one dictionary exactly that interval.

    Raises
    ------
    InputError
        If the values are no [dictionary, unit(, ...)], fewer than two clusters are left, or alpha is out of range.

    Notes
    -----
    Model: y = mean + dictionary + cluster + both. With S2 the variance of the dictionaries' means, W the squared error
    over clusters and E the share of S2 that is sampling noise (interaction mean square over the number of clusters),
    W estimates (cluster part) + E / R and S2 / R estimates (between) / R + E / R. The interval's half-width squared is
    the larger of t(G - 1)^2 W and t(G - 1)^2 max(W - E / R, 0) + t(R - 1)^2 S2 / R. Weighting each part with its own
    quantile covers at least nominally for normal effects whatever the ratio of the parts (Banerjee), where
    Satterthwaite's degrees of freedom do not, and less so if the between-variance is cut off at 0.

    Lowest coverage of .95 over 10 to 200 clusters, dictionaries that spread by 0 to 5 times sqrt(W) and noise that
    makes up 5 to 95% of W (40,000 tables each, normal), of the interval over clusters only, of Satterthwaite's with
    the between-variance cut off at 0, and of this one; last, its median width over that over clusters only, where
    dictionaries do not differ:

    ============  =============  =============  ======  ==============
    dictionaries  clusters only  Satterthwaite  here    width, equal
    ============  =============  =============  ======  ==============
    2             .41            .82            .957    2.9
    3             .48            .88            .952    1.45
    5             .58            .91            .951    1.18
    10            .70            .93            .950    1.09
    ============  =============  =============  ======  ==============

    Heavy tails (t with 3 degrees of freedom) cover at least .951, skewness 1 .942. Skewness 2 (exponential) covers at
    least .951 while dictionaries spread by at most 2 standard errors, and .933, .913, .921, .938 (2, 3, 5, 10
    dictionaries) at 5.

    References
    ----------
    Banerjee 1960, "Approximate confidence interval for linear functions of means of k populations when the population
    variances are not equal", Sankhya 22, 357-358; mean squares of crossed random effects: Searle, Casella and McCulloch
    1992, doi:10.1002/9780470316856, chapter 4.

    Examples
    --------
    >>> table = [[1.0, 3.0, 2.0, 6.0], [2.0, 5.0, 3.0, 6.0], [4.0, 5.0, 7.0, 8.0]]
    >>> pooled = pooled_mean(table)
    >>> [round(float(x), 2) for x in (pooled.mean, pooled.low, pooled.high, pooled.between_sd)]
    [4.33, -0.33, 8.99, 1.45]
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim < 2 or not table.shape[0] or not table.shape[1]:
        raise InputError(f"expected values [dictionary, unit(, ...)], got shape {table.shape}.")
    each = table.mean(axis=1)
    return _pooled(each, _cluster_parts(table, each, codes), alpha, within)


def pooled_estimates(
    estimates: Any, *, jackknife: Any = None, draws: Any = None, df_draws: float = math.inf, alpha: float = 0.05
) -> Pooled:
    """Mean over dictionaries of any statistic, from replicates that leave out or draw the same clusters in each.

    Parameters
    ----------
    estimates
        [dictionary, ...].
    jackknife
        [dictionary, group, ...]: the statistic without each group of clusters, the same groups in every dictionary
        (:func:`~rlgen_stats.toolkit.statistics.kernels.delete_group_jackknife` says how groups are formed).
    draws
        [dictionary, draw, ...], instead: the statistic over bootstrap draws, the same clusters drawn in every
        dictionary.
    df_draws
        Degrees of freedom of the variance over draws: clusters - 1 where there are few.
    alpha
        1 - coverage.

    Returns
    -------
    Pooled

    Raises
    ------
    InputError
        Unless there is exactly one kind of replicates, at least two of them, in the shape of the estimates.

    Notes
    -----
    As :func:`pooled_mean`, of the pseudovalues G estimate - (G - 1) replicate; their bias correction, mostly noise, is
    not applied. Of draws, W is their variance after averaging over dictionaries, and E that of the rest. The interval
    is symmetric: give a statistic on a scale on which it is nearly normal (logit of a share, log of a ratio).

    References
    ----------
    Tukey 1958; Kott 2001, Journal of Official Statistics 17(4), 521-526.
    """
    each = np.asarray(estimates, dtype=np.float64)
    if (jackknife is None) == (draws is None):
        raise InputError("give either jackknife replicates or bootstrap draws, not both or neither.")
    replicates = np.asarray(draws if jackknife is None else jackknife, dtype=np.float64)
    fits = replicates.ndim == each.ndim + 1 and each.ndim and replicates.shape[:1] + replicates.shape[2:] == each.shape
    if not fits or replicates.shape[1] < 2:
        raise InputError(
            f"expected estimates [dictionary, ...] and at least two replicates [dictionary, replicate, ...] each, got "
            f"shapes {each.shape} and {replicates.shape}."
        )
    if jackknife is not None:
        # Pseudovalues spread g - 1 times as far about their mean as replicates do.
        spread = (replicates.shape[1] - 1) * (replicates - replicates.mean(axis=1, keepdims=True))
        return _pooled(each, _parts(spread), alpha)
    if not df_draws > 0:
        raise InputError(f"degrees of freedom must be positive, got {df_draws}.")
    within = replicates.mean(axis=0)
    noise = (replicates - within).var(axis=1, ddof=1).sum(axis=0) / max(len(each) - 1, 1)
    return _pooled(each, _Parts(within.var(axis=0, ddof=1), noise, df_draws), alpha)


def pooled_intervals(
    estimates: Any, lows: Any, highs: Any, *, alpha: float = 0.05
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mean over dictionaries of estimates that come with an interval each and nothing else.

    Parameters
    ----------
    estimates, lows, highs
        [dictionary, ...]: estimate and its 1 - alpha interval over prompts, from the same prompts in every dictionary.
    alpha
        1 - coverage.

    Returns
    -------
    tuple of array
        Mean, low and high [...]; with one dictionary exactly its interval.

    Notes
    -----
    Each side's squared half-width is the squared mean of the dictionaries' own plus t(R - 1)^2 S2 / R, as in
    :func:`pooled_mean` with errors over prompts taken to be wholly shared. They are shared in part, and S2 holds what
    is not, so that the interval covers at least as much.

    Examples
    --------
    >>> [round(float(x), 3) for x in pooled_intervals([0.1, 0.2, 0.3], [0.0, 0.1, 0.2], [0.2, 0.3, 0.4])]
    [0.2, -0.068, 0.468]
    """
    each, low, high = (np.asarray(values, dtype=np.float64) for values in (estimates, lows, highs))
    if each.shape != low.shape or each.shape != high.shape or not each.ndim:
        raise InputError(f"expected three arrays [dictionary, ...], got {each.shape}, {low.shape} and {high.shape}.")
    n, mean = len(each), each.mean(axis=0)
    between = _t(n - 1, np.log(alpha)) ** 2 * each.var(axis=0, ddof=1) / n if n > 1 else 0.0
    below, above = (each - low).mean(axis=0), (high - each).mean(axis=0)
    return mean, mean - np.sqrt(below**2 + between), mean + np.sqrt(above**2 + between)


def dictionaries_needed(n: int) -> int:
    """How many of ``n`` dictionaries must agree: all of fewer than five, else four fifths.

    Examples
    --------
    >>> [dictionaries_needed(n) for n in (1, 3, 4, 5, 10)]
    [1, 3, 4, 4, 8]
    """
    return n if n < FEW_DICTIONARIES else math.ceil(MAJORITY * n - 1e-9)


def agreed(answers: Sequence[Answer], otherwise: Answer) -> Answer:
    """The answer that :func:`dictionaries_needed` of the dictionaries give; ``otherwise`` if they give none.

    Examples
    --------
    >>> agreed(["stable", "stable", "evolving"], "open"), agreed(["stable"] * 4 + ["evolving"], "open")
    ('open', 'stable')
    """
    answer, count = Counter(answers).most_common(1)[0]
    return answer if count >= dictionaries_needed(len(answers)) else otherwise


def same_direction(each_mean: Any, pooled: Any) -> Any:
    """Whether enough dictionaries have the sign of the pooled mean: all of fewer than five, else four fifths.

    Parameters
    ----------
    each_mean
        [dictionary, ...].
    pooled
        [...] pooled mean.

    Returns
    -------
    bool or array of bool
        [...]; False where the pooled mean is 0 or NaN.

    Examples
    --------
    >>> same_direction([0.2, 0.3, -0.01], 0.16), same_direction([0.2, 0.3, 0.1, 0.4, -0.1], 0.18)
    (False, True)
    """
    each, mean = np.asarray(each_mean, dtype=np.float64), np.asarray(pooled, dtype=np.float64)
    agree = (np.sign(each) == np.sign(mean)).sum(axis=0) >= dictionaries_needed(len(each))
    result = agree & (mean != 0) & ~np.isnan(mean)
    return result if result.ndim else bool(result)


@dataclass(frozen=True)
class _Parts:
    """What the clusters say about the mean over dictionaries."""

    within: FloatArray
    """[...]: squared error of the mean over these dictionaries."""
    noise: FloatArray
    """[...]: part of the variance between dictionaries' estimates that is sampling noise."""
    df: float
    """Degrees of freedom of ``within``."""


def _cluster_parts(table: FloatArray, each: FloatArray, codes: Any) -> _Parts:
    """Parts of a mean over units [dictionary, unit, ...]: influences of clusters, whose error is CR1."""
    centred = table - each[:, None]
    if codes is not None:
        centred = np.stack([cluster_totals(one, codes) for one in centred])
        centred *= centred.shape[1] / table.shape[1]
    return _parts(centred)


def _parts(centred: FloatArray) -> _Parts:
    """Parts from influences [dictionary, cluster, ...], which sum to 0 over clusters."""
    n_dictionaries, n_clusters = centred.shape[:2]
    if n_clusters < 2:
        raise InputError(f"an interval over clusters needs at least two of them, got {n_clusters}.")
    shared = centred.mean(axis=0)
    scale = (n_clusters - 1) * n_clusters
    own = np.square(centred - shared).sum(axis=(0, 1)) / max(n_dictionaries - 1, 1)
    return _Parts(np.square(shared).sum(axis=0) / scale, own / scale, n_clusters - 1)


def _pooled(each: FloatArray, parts: _Parts, alpha: float, within: tuple[Any, Any] | None = None) -> Pooled:
    """The interval from the dictionaries' estimates [dictionary, ...] and their errors over clusters."""
    if not 0 < alpha < 1:
        raise InputError(f"alpha must lie between 0 and 1, got {alpha}.")
    n = len(each)
    mean, inside = each.mean(axis=0), parts.within
    shared, between = inside, np.zeros_like(inside)
    between_sd = np.full_like(mean, np.nan)
    if n > 1:
        between = each.var(axis=0, ddof=1) / n
        shared = np.maximum(inside - parts.noise / n, 0.0)
        between_sd = np.sqrt(np.maximum(between * n - parts.noise, 0.0))

    def widened(over_clusters: FloatArray, noise: FloatArray, log_level: Any) -> FloatArray:
        """Half-width over clusters and dictionaries from that over clusters, squared, and its part that is noise."""
        if n == 1:
            return np.asarray(np.sqrt(over_clusters), dtype=np.float64)
        both = np.maximum(over_clusters - noise, 0.0) + np.square(_t(n - 1, log_level)) * between
        return np.asarray(np.sqrt(np.maximum(over_clusters, both)), dtype=np.float64)

    def half(log_level: Any) -> FloatArray:
        """Half-width at a two-sided level, given as its logarithm."""
        squared_t = np.square(_t(parts.df, log_level))
        return widened(squared_t * inside, squared_t * parts.noise / n, log_level)

    level = np.log(alpha)
    width, error = half(level), np.sqrt(np.maximum(inside, shared + between))
    below = above = width
    if within is not None:
        noise = np.square(_t(parts.df, level)) * parts.noise / n
        below, above = (widened(np.square(end - mean), noise, level) for end in map(np.asarray, within))
    return Pooled(
        mean=mean[()],
        low=(mean - below)[()],
        high=(mean + above)[()],
        standard_error=error[()],
        df=_implied_df(width, error, alpha, parts.df, n)[()],
        between_sd=between_sd[()],
        p_value=_level(half, np.abs(mean), width)[()],
        each_mean=each,
        n_dictionaries=n,
    )


def _t(df: Any, log_level: Any) -> FloatArray:
    """Upper quantile of |t| at a two-sided level."""
    tail = np.exp(log_level) / 2
    df = np.asarray(df, dtype=np.float64)
    quantile = np.where(np.isinf(df), special.ndtri(tail), special.stdtrit(np.where(np.isinf(df), 1.0, df), tail))
    # scipy's is +inf, not -inf, where it is too large
    return np.asarray(np.minimum(np.abs(quantile), LARGEST_T), dtype=np.float64)


def _bisect(above: Callable[[FloatArray], NDArray[np.bool_]], low: FloatArray, high: FloatArray) -> FloatArray:
    """Where a decreasing function crosses: the largest point between the bounds at which ``above`` still holds."""
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        holds = above(middle)
        low, high = np.where(holds, middle, low), np.where(holds, high, middle)
    return low


def _level(half: Callable[[Any], FloatArray], distance: FloatArray, width: FloatArray) -> FloatArray:
    """Two-sided level at which an interval of these half-widths ends this far from its centre; 1 for a centre of 0."""
    start = np.full_like(distance, SMALLEST_LOG_P)
    p = np.exp(_bisect(lambda level: half(level) >= distance, start, np.zeros_like(distance)))
    return np.where(np.isnan(distance) | np.isnan(width), np.nan, np.where(distance == 0, 1.0, p))


def _implied_df(width: FloatArray, error: FloatArray, alpha: float, df_within: float, n: int) -> FloatArray:
    """Degrees of freedom at which the t quantile times the error is this width; between those of the two parts."""
    if n == 1:
        return np.full_like(error, df_within)
    ends = sorted((1 / df_within, 1 / (n - 1)))  # the quantile rises with 1 / df
    low, high = (np.full_like(error, end) for end in ends)
    with np.errstate(divide="ignore"):
        inverse = _bisect(lambda x: _t(1 / x, np.log(alpha)) * error <= width * (1 + 1e-12), low, high)
        return np.where(np.isnan(error), np.nan, 1 / inverse)
