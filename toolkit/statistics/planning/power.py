"""Sample size: how many prompts a drift test needs, how many runs a comparison of arms, and what they can show.

Two units, two calculations. Within one model pair the unit is the prompt: :func:`power_at`, :func:`required_prompts`,
:func:`detectable_effect`. Between post-training methods it is the training run: :func:`run_power`,
:func:`required_runs`. Both control errors over the same family by the same thresholds (``_threshold``).

Planned is the power to show that a feature differs (``q_value``). A call of DRIFT also needs more than the margin; the
test of that has the power of an effect that is smaller by the margin: plan with d_z less margin x spread / standard
deviation of the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import comb
from typing import Any, Final, Literal

import numpy as np
from scipy import optimize, stats

from rlgen_stats.schemas.errors import InputError, NotEstimableError
from rlgen_stats.toolkit.statistics.kernels.numerics import SMALLEST_P, FloatArray

Control = Literal["fdr", "fwer", "none"]

CONTROLS: Final[tuple[Control, ...]] = ("fdr", "fwer", "none")
QUANTILES: Final = 25
"""Equally likely values that stand for a binomial number of firing prompts."""
VARIANCE_QUANTILES: Final = 48
"""Equally likely values of each of the two variances averaged over in :func:`run_power`: power is right to .002."""
GRID: Final = 64
"""Thresholds tried, evenly in log p, before the largest solution is refined."""
_LEGENDRE: Final = np.polynomial.legendre.leggauss(32)
_NODES: Final = (_LEGENDRE[0] + 1) / 2
_WEIGHTS: Final = _LEGENDRE[1] / 2
"""Gauss-Legendre quadrature over the quantiles of s / sigma: power is right to 2e-4."""
MOST_PROMPTS: Final = 2**27
"""Above 100 million prompts no answer is worth giving."""
MOST_RUNS: Final = 200
"""Runs per arm beyond any budget."""
DEFAULT_PRIOR_DOF: Final = 6.0
"""Degrees of freedom that the variances of other features lend; limma finds 3 to 10 in most data sets."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """What is tested, how errors are controlled, and how the data depend on one another.

    Raises
    ------
    InputError
        If a setting is out of range, or the effect cannot occur at this density.
    """

    effect: float = 0.1
    """d_z of a true effect: mean / standard deviation of the paired difference over all prompts, zeros included. To
    plan for calls of DRIFT: of what exceeds the margin."""
    n_features: int = 32_768
    """Testable features in the family."""
    true_share: float = 0.01
    """Share of them with the effect; decides the threshold of ``fdr``."""
    density: float = 0.25
    """Share of prompts on which a feature fires; on the others the difference is 0."""
    icc: float = 0.0
    """Intraclass correlation of the differences within a cluster of prompts."""
    cluster_size: int = 1
    alpha: float = 0.05
    control: Control = "fdr"
    """``fdr``: BH. ``fwer``: max-T. ``none``: one feature named beforehand."""

    def __post_init__(self) -> None:
        if self.control not in CONTROLS:
            raise InputError(f"control must be one of {', '.join(CONTROLS)}, got {self.control!r}.")
        if self.n_features < 1 or self.cluster_size < 1 or self.effect <= 0:
            raise InputError(
                f"expected n_features >= 1, cluster_size >= 1 and effect > 0; got {self.n_features}, "
                f"{self.cluster_size}, {self.effect}."
            )
        if not 0 < self.true_share <= 1 or not 0 < self.density <= 1 or not 0 <= self.icc <= 1:
            raise InputError(
                f"expected true_share and density in (0, 1] and icc in [0, 1]; got {self.true_share}, {self.density}, "
                f"{self.icc}."
            )
        if not 0 < self.alpha < 1:
            raise InputError(f"alpha must lie in (0, 1), got {self.alpha}.")
        if self.effect >= self.largest_effect:
            raise InputError(
                f"effect d_z={self.effect} cannot occur at density {self.density}: with zeros on the other prompts d_z "
                f"stays below {self.largest_effect:.2f}; lower the effect or raise the density."
            )

    @property
    def design_effect(self) -> float:
        """Variance of a mean over clustered prompts, relative to independent ones: 1 + (size - 1) icc (Kish 1965)."""
        return 1 + (self.cluster_size - 1) * self.icc

    @property
    def largest_effect(self) -> float:
        """Bound of d_z: a constant difference wherever the feature fires."""
        per_unit = np.sqrt(self.density / (1 - self.density)) if self.density < 1 else np.inf
        return float(per_unit * np.sqrt(self.design_effect / self.cluster_size))


@dataclass(frozen=True, kw_only=True)
class Power:
    """What a number of prompts can show."""

    n_prompts: int
    effect: float
    power: float
    """Chance that a true effect is found (with ``fdr`` and ``fwer`` the mean over true effects)."""
    threshold: float
    """P-value below which a feature is found."""
    n_units: int
    """Clusters, or prompts."""
    n_nonzero: float
    """Units on which a feature is expected to fire."""
    smallest_p: float
    """2^(1 - n_nonzero), at least the least double: no sign-flip p-value is smaller."""


def power_at(design: Design, *, n_prompts: int) -> Power:
    """Power of the sign-flip drift test at a number of prompts, with errors controlled over the family.

    Parameters
    ----------
    design
        Effect, family, control, and dependence.
    n_prompts
        Prompts of one task or of all tasks pooled, as the test sees them.

    Returns
    -------
    Power

    Raises
    ------
    InputError
        If there are fewer prompts than two clusters.

    Notes
    -----
    *One test.* The units are clusters of m prompts; d_unit = d_z sqrt(m / (1 + (m - 1) icc)). Units on which the
    feature does not fire carry no information, so with n of them firing (binomial, prompts of a cluster firing
    together) and p the density, the test is the t test of n values with noncentrality
    sqrt(n) d_unit / sqrt(p - (1 - p) d_unit^2): a sign flip of normal differences has asymptotically the power of t.
    It rejects nothing at thresholds under 2^(1-n).

    *Threshold.* ``none``: alpha. ``fwer``: 1 - (1 - alpha)^(1/F), that of F independent features; max-T gains where
    features depend on one another. ``fdr``: the p-value t at which BH stops when F is large, the largest solution of
    t = alpha (pi0 t + pi1 B(t)), B the power at t (Genovese and Wasserman 2002; Jung 2005 and Liu and Hwang 2007 solve
    the same equation for a given rate of false discoveries, where alpha is that rate, not pi0 times it); at least
    alpha / F, the threshold of the smallest p-value. Where only a handful of effects is true, the threshold varies from
    data to data and the power with it: check by simulation (``simulated_power``).

    Not for skewed differences, nor for families whose features differ much in density or effect: take the rarest
    feature and the smallest effect that matter.

    References
    ----------
    Jung 2005, doi:10.1093/bioinformatics/bti456; Liu and Hwang 2007, doi:10.1093/bioinformatics/btl664; Genovese and
    Wasserman 2002, doi:10.1111/1467-9868.00347; Kish 1965 (design effect).

    Examples
    --------
    >>> round(power_at(Design(effect=0.1, density=1.0, control="none"), n_prompts=1053).power, 3)
    0.9
    """
    n_units = n_prompts // design.cluster_size
    if n_units < 2:
        raise InputError(
            f"{n_prompts} prompts in clusters of {design.cluster_size} make {n_units} unit; expected at least 2."
        )
    test = _sign_flip_power(design, n_units)
    threshold = _threshold(test, design)
    nonzero = n_units * design.density
    return Power(
        n_prompts=n_prompts,
        effect=design.effect,
        power=float(test(np.array([threshold]))[0]),
        threshold=threshold,
        n_units=n_units,
        n_nonzero=nonzero,
        smallest_p=max(float(np.exp2(1 - nonzero)), SMALLEST_P),
    )


def required_prompts(design: Design, *, power: float = 0.9) -> Power:
    """Fewest prompts on which a true effect is found with at least this power.

    Parameters
    ----------
    design, power
        What is tested, and the power asked for, in (0, 1).

    Returns
    -------
    Power
        At that number of prompts, a multiple of the cluster size.

    Raises
    ------
    NotEstimableError
        If more than 100 million prompts were needed.

    Notes
    -----
    Formulas and limits are those of :func:`power_at`.

    Examples
    --------
    >>> required_prompts(Design(effect=0.1, n_features=32_768, density=1.0), power=0.9).n_prompts
    2288
    """
    _check_power(power)
    m = design.cluster_size
    high = 2  # numbers of clusters from here on: power rises with them, so doubling and bisection find the fewest
    while power_at(design, n_prompts=high * m).power < power:
        high *= 2
        if high * m > MOST_PROMPTS:
            raise NotEstimableError(
                f"d_z={design.effect} at power {power} needs more than {MOST_PROMPTS:,} prompts; ask for a larger one."
            )
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        reached = power_at(design, n_prompts=middle * m).power >= power
        low, high = (low, middle) if reached else (middle, high)
    return power_at(design, n_prompts=high * m)


def detectable_effect(design: Design, *, n_prompts: int, power: float = 0.9) -> Power:
    """Smallest d_z that this many prompts show with at least this power; the design's own effect is not used.

    Parameters
    ----------
    design, n_prompts, power
        What is tested, on how many prompts, and the power asked for, in (0, 1).

    Returns
    -------
    Power
        At that effect.

    Raises
    ------
    NotEstimableError
        If no effect is shown with this power at this density, however large.

    Notes
    -----
    Formulas and limits are those of :func:`power_at`.

    Examples
    --------
    >>> round(detectable_effect(Design(density=1.0, control="none"), n_prompts=1053).effect, 3)
    0.1
    """
    _check_power(power)
    largest = min(design.largest_effect, 10.0) * (1 - 1e-9)  # at the bound itself the noncentrality is infinite

    def excess(effect: float) -> float:
        return power_at(replace(design, effect=effect), n_prompts=n_prompts).power - power

    if excess(largest) < 0:
        raise NotEstimableError(
            f"{n_prompts} prompts show no effect with power {power} at density {design.density} under "
            f"control={design.control!r}: a feature then fires on about {n_prompts * design.density:.0f} of them, and "
            "its p-value cannot be small enough; take more prompts."
        )
    effect = float(optimize.brentq(excess, 1e-6, largest, xtol=1e-6))
    return power_at(replace(design, effect=effect), n_prompts=n_prompts)


@dataclass(frozen=True, kw_only=True)
class RunPower:
    """What a number of training runs per arm can show of one feature."""

    runs: int
    n_prompts: int
    effect: float
    power_moderated: float
    """Of the moderated t test over runs; NaN with one run per arm."""
    power_permutation: float
    """Of the exact permutation of runs; 0 where it is impossible."""
    threshold_moderated: float
    threshold_permutation: float
    """P-value below which a feature is found."""
    floor: float
    """Smallest two-sided permutation p-value: 2 / C(2 runs, runs)."""
    verdict: str
    """Empty, or why one of the tests cannot find anything."""


def run_power(
    design: Design,
    *,
    runs: int,
    n_prompts: int,
    run_sd: float = 0.05,
    prior_dof: float = DEFAULT_PRIOR_DOF,
) -> RunPower:
    """Power to find a feature that the two arms change differently, the training run being the unit.

    Parameters
    ----------
    design
        ``effect`` is the difference between the arms' mean d_z; ``density`` plays no part beyond it.
    runs, n_prompts
        Runs per arm; prompts, the same for all runs.
    run_sd
        Standard deviation between runs of one arm of a feature's true d_z.
    prior_dof
        Prior degrees of freedom of the moderated t: how far variances of features resemble one another.

    Returns
    -------
    RunPower

    Raises
    ------
    InputError
        If a number is out of range.

    Notes
    -----
    In units of d_z a run's mean difference has variance run_sd^2 + (1 + (m - 1) icc) / (2 N) about its arm's mean:
    half of the variance of a paired difference is the run's own, the other half base's and cancels between arms. More
    prompts shrink the second term only; with few runs the first decides. Moderated t: 2 R - 2 + ``prior_dof`` degrees
    of freedom. Both powers are averages over features whose variances follow the scaled inverse chi-square prior of
    Smyth (2004). Permutation: t test of 2 R - 2 degrees at the largest attainable p-value 2 j / C(2R, R) not above the
    threshold; 0 if even the smallest (3 against 3 runs: .1, 4 against 4: .029) is above it. Thresholds are those of
    :func:`power_at`.

    References
    ----------
    Smyth 2004, doi:10.2202/1544-6115.1027; Jung 2005, doi:10.1093/bioinformatics/bti456.

    Examples
    --------
    >>> run_power(Design(effect=0.3, control="none"), runs=3, n_prompts=1000).verdict
    'permutation of 3 against 3 runs is impossible: its smallest p is 0.1, 0.05 needed'
    """
    if runs < 1 or n_prompts < 1 or run_sd < 0 or prior_dof <= 0:
        raise InputError(
            f"expected runs >= 1, n_prompts >= 1, run_sd >= 0 and prior_dof > 0; got {runs}, {n_prompts}, {run_sd}, "
            f"{prior_dof}."
        )
    floor = 2 / comb(2 * runs, runs)
    if runs == 1:
        return RunPower(
            runs=1,
            n_prompts=n_prompts,
            effect=design.effect,
            power_moderated=float("nan"),
            power_permutation=0.0,
            threshold_moderated=float("nan"),
            threshold_permutation=design.alpha,
            floor=floor,
            verdict="one run per arm: any difference may be that of two runs, not of two arms",
        )
    variance = run_sd**2 + design.design_effect / (2 * n_prompts)
    noncentrality = design.effect / np.sqrt(2 * variance / runs)
    moderated = _moderated_power(noncentrality, 2 * runs - 2, prior_dof)
    permutation = _permutation_power(noncentrality, 2 * runs - 2, prior_dof, floor)
    threshold_moderated, threshold_permutation = _threshold(moderated, design), _threshold(permutation, design)
    verdict = ""
    needed = _threshold(np.ones_like, design)  # the largest threshold there can be: every true effect found
    if floor > needed:
        verdict = (
            f"permutation of {runs} against {runs} runs is impossible: "
            f"its smallest p is {floor:.2g}, {needed:.2g} needed"
        )
    return RunPower(
        runs=runs,
        n_prompts=n_prompts,
        effect=design.effect,
        power_moderated=float(moderated(np.array([threshold_moderated]))[0]),
        power_permutation=float(permutation(np.array([threshold_permutation]))[0]),
        threshold_moderated=threshold_moderated,
        threshold_permutation=threshold_permutation,
        floor=floor,
        verdict=verdict,
    )


def required_runs(
    design: Design,
    *,
    n_prompts: int,
    power: float = 0.9,
    run_sd: float = 0.05,
    prior_dof: float = DEFAULT_PRIOR_DOF,
) -> RunPower:
    """Fewest runs per arm with which the moderated t finds the effect with at least this power.

    Parameters
    ----------
    design, n_prompts, power, run_sd, prior_dof
        As in :func:`run_power`, and the power asked for, in (0, 1).

    Returns
    -------
    RunPower
        At that number of runs.

    Raises
    ------
    NotEstimableError
        If more than 200 runs per arm were needed.

    Notes
    -----
    Formulas and limits are those of :func:`run_power`.

    Examples
    --------
    >>> required_runs(Design(effect=0.2, control="none"), n_prompts=1000, run_sd=0.05).runs
    3
    """
    _check_power(power)
    for runs in range(2, MOST_RUNS + 1):
        reached = run_power(design, runs=runs, n_prompts=n_prompts, run_sd=run_sd, prior_dof=prior_dof)
        if reached.power_moderated >= power:
            return reached
    raise NotEstimableError(
        f"a difference of {design.effect} between arms at run_sd={run_sd} needs more than {MOST_RUNS} runs per arm for "
        f"power {power}; ask for a larger one."
    )


def _threshold(power: Callable[[FloatArray], FloatArray], design: Design) -> float:
    """P-value at which features are found, given the power of one test as a function of it."""
    if design.control == "none":
        return design.alpha
    if design.control == "fwer":
        return float(-np.expm1(np.log1p(-design.alpha) / design.n_features))
    share = design.true_share
    # BH stops at the largest t with alpha (pi0 t + pi1 B(t)) >= t, which is B(t) >= slope t.
    slope = (1 / design.alpha - (1 - share)) / share
    least = design.alpha / design.n_features
    grid = np.geomspace(least, design.alpha, GRID)
    reached = np.flatnonzero(power(grid) >= slope * grid)
    if not len(reached):
        return least
    last = int(reached[-1])
    if last == GRID - 1:
        return design.alpha

    def excess(log_p: float) -> float:
        t = np.exp(log_p)
        return float(power(np.array([t]))[0] - slope * t)

    return float(np.exp(optimize.brentq(excess, np.log(grid[last]), np.log(grid[last + 1]), xtol=1e-9)))


def _sign_flip_power(design: Design, n_units: int) -> Callable[[FloatArray], FloatArray]:
    """Power of one two-sided sign-flip test as a function of its level [threshold]."""
    p = design.density
    per_unit = design.effect * np.sqrt(design.cluster_size / design.design_effect)
    ratio = per_unit / np.sqrt(p - (1 - p) * per_unit**2)
    midpoints = (np.arange(QUANTILES) + 0.5) / QUANTILES
    firing = np.full(1, n_units) if p == 1 else np.asarray(stats.binom.ppf(midpoints, n_units, p))
    firing = firing[:, None].astype(np.float64)
    freedom, noncentrality = np.maximum(firing - 1, 1.0), np.sqrt(firing) * ratio
    sd_ratio = sd_ratio_quantiles(freedom)

    def power(level: FloatArray) -> FloatArray:
        possible = (np.exp2(1 - firing) <= level) & (firing > 1)  # n values have no p-value below 2^(1 - n)
        critical = stats.t.isf(level / 2, freedom)
        rejected = two_sided_power(critical, noncentrality, sd_ratio)
        return np.asarray(np.where(possible, rejected, 0.0).mean(axis=0))

    return power


def sd_ratio_quantiles(freedom: FloatArray) -> FloatArray:
    """Quantiles of s / sigma at ``freedom`` degrees of freedom, which :func:`two_sided_power` averages, [..., node]."""
    return np.asarray(np.sqrt(stats.chi2.ppf(_NODES, freedom[..., None]) / freedom[..., None]))


def two_sided_power(critical: FloatArray, noncentrality: Any, sd_ratio: FloatArray) -> FloatArray:
    """Chance that a noncentral |t| reaches ``critical``: E over s of Phi(+-noncentrality - critical s / sigma).

    Not scipy's noncentral t: it returns NaN at some of the thousands of degrees of freedom met here (1.17).
    """
    limit = critical[..., None] * sd_ratio
    shift = np.asarray(noncentrality)[..., None]
    return np.asarray((stats.norm.cdf(shift - limit) + stats.norm.cdf(-shift - limit)) @ _WEIGHTS)


def _moderated_power(noncentrality: float, freedom: int, prior: float) -> Callable[[FloatArray], FloatArray]:
    """Power of the moderated t as a function of its level, averaged over a feature's true variance and its estimate."""
    true = _variance_ratios(prior)[:, None]
    midpoints = (np.arange(VARIANCE_QUANTILES) + 0.5) / VARIANCE_QUANTILES
    estimate = true * stats.chi2.ppf(midpoints, freedom) / freedom
    sd_ratio = np.sqrt((prior + freedom * estimate) / (prior + freedom) / true)  # shrunken over true
    shift = noncentrality / np.sqrt(true)

    def power(level: FloatArray) -> FloatArray:
        critical = stats.t.isf(np.asarray(level) / 2, freedom + prior)[:, None, None]
        rejected = stats.norm.cdf(shift - critical * sd_ratio) + stats.norm.cdf(-shift - critical * sd_ratio)
        return np.asarray(rejected.mean(axis=(1, 2)))

    return power


def _variance_ratios(prior: float) -> FloatArray:
    """True variances of features over the prior variance, sigma^2 / s0^2: equally likely values."""
    midpoints = (np.arange(VARIANCE_QUANTILES) + 0.5) / VARIANCE_QUANTILES
    return np.asarray(prior / stats.chi2.ppf(midpoints, prior))


def _permutation_power(
    noncentrality: float, freedom: int, prior: float, floor: float
) -> Callable[[FloatArray], FloatArray]:
    """Power of the permutation of runs as a function of its level; its p-values are multiples of ``floor``."""
    sd_ratio = sd_ratio_quantiles(np.array(float(freedom)))
    shift = noncentrality / np.sqrt(_variance_ratios(prior))[:, None]

    def power(level: FloatArray) -> FloatArray:
        # The slack keeps a level that is a multiple of the floor but for rounding.
        attainable = np.floor(np.asarray(level) / floor * (1 + 1e-12)) * floor
        possible = attainable > 0
        critical = stats.t.isf(np.where(possible, attainable, 0.5) / 2, freedom)
        return np.where(possible, two_sided_power(critical[None], shift, sd_ratio).mean(axis=0), 0.0)

    return power


def _check_power(power: float) -> None:
    if not 0 < power < 1:
        raise InputError(f"power must lie in (0, 1), got {power}.")
