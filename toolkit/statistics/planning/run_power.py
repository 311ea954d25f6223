"""Sample size of the comparison of arms, whose unit is the training run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rlgen_stats.schemas.errors import InputError, NotEstimableError
from rlgen_stats.toolkit.statistics.planning.power import Design, root_mean_square, threshold_of, two_sided

FloatArray = NDArray[np.float64]

DEFAULT_PRIOR_DOF: Final = 6.0
"""Degrees of freedom that the variances of other features lend; limma finds 3 to 10 in most data sets."""
MOST_RUNS: Final = 200
"""Nobody trains more."""
QUADRATURE: Final = 48
"""Equally likely values of each of the two variances averaged over: power is right to .002."""


@dataclass(frozen=True)
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
    :func:`~rlgen_stats.toolkit.statistics.planning.power.power_at`.

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
            1, n_prompts, design.effect, float("nan"), 0.0, float("nan"), design.alpha, floor,
            "one run per arm: any difference may be that of two runs, not of two arms",
        )  # fmt: skip
    variance = run_sd**2 + design.design_effect / (2 * n_prompts)
    noncentrality = design.effect / np.sqrt(2 * variance / runs)
    moderated = _moderated_power(noncentrality, 2 * runs - 2, prior_dof)
    permuted = _permutation_power(noncentrality, 2 * runs - 2, prior_dof, floor)
    at_moderated, at_permuted = threshold_of(moderated, design), threshold_of(permuted, design)
    verdict = ""
    needed = threshold_of(np.ones_like, design)  # were every true effect found
    if floor > needed:
        verdict = (
            f"permutation of {runs} against {runs} runs is impossible: "
            f"its smallest p is {floor:.2g}, {needed:.2g} needed"
        )
    return RunPower(
        runs=runs,
        n_prompts=n_prompts,
        effect=design.effect,
        power_moderated=float(moderated(np.array([at_moderated]))[0]),
        power_permutation=float(permuted(np.array([at_permuted]))[0]),
        threshold_moderated=at_moderated,
        threshold_permutation=at_permuted,
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
        As in :func:`run_power`, and the chance wanted, in (0, 1).

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
    if not 0 < power < 1:
        raise InputError(f"power must lie in (0, 1), got {power}.")
    for runs in range(2, MOST_RUNS + 1):
        found = run_power(design, runs=runs, n_prompts=n_prompts, run_sd=run_sd, prior_dof=prior_dof)
        if found.power_moderated >= power:
            return found
    raise NotEstimableError(
        f"a difference of {design.effect} between arms at run_sd={run_sd} needs more than {MOST_RUNS} runs per arm for "
        f"power {power}; ask for a larger one."
    )


def _moderated_power(noncentrality: float, freedom: int, prior: float) -> Callable[[FloatArray], FloatArray]:
    """Power as a function of the level, averaged over a feature's own variance and its estimate."""
    own = _own_variances(prior)[:, None]
    middle = (np.arange(QUADRATURE) + 0.5) / QUADRATURE
    estimate = own * stats.chi2.ppf(middle, freedom) / freedom
    shrunk = np.sqrt((prior + freedom * estimate) / (prior + freedom) / own)
    shift = noncentrality / np.sqrt(own)

    def power(level: FloatArray) -> FloatArray:
        critical = stats.t.isf(np.asarray(level) / 2, freedom + prior)[:, None, None]
        found = stats.norm.cdf(shift - critical * shrunk) + stats.norm.cdf(-shift - critical * shrunk)
        return np.asarray(found.mean(axis=(1, 2)))

    return power


def _own_variances(prior: float) -> FloatArray:
    """sigma^2 / s0^2 of equally likely features."""
    middle = (np.arange(QUADRATURE) + 0.5) / QUADRATURE
    return np.asarray(prior / stats.chi2.ppf(middle, prior))


def _permutation_power(
    noncentrality: float, freedom: int, prior: float, floor: float
) -> Callable[[FloatArray], FloatArray]:
    spread = root_mean_square(np.array(float(freedom)))
    shift = noncentrality / np.sqrt(_own_variances(prior))[:, None]

    def power(level: FloatArray) -> FloatArray:
        attainable = np.floor(np.asarray(level) / floor * (1 + 1e-12)) * floor
        possible = attainable > 0
        critical = stats.t.isf(np.where(possible, attainable, 0.5) / 2, freedom)
        return np.where(possible, two_sided(critical[None], shift, spread).mean(axis=0), 0.0)

    return power
