"""A check of planned power: the tests themselves, run on simulated data sets with the planned effect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import helmert

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.statistics.kernels import adjust, max_t, max_t_p_value, moderated_t, sign_flip_test
from rlgen_stats.toolkit.statistics.kernels.draws import stream
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray
from rlgen_stats.toolkit.statistics.planning.power import DEFAULT_PRIOR_DOF, Design, power_at, run_power

BLOCK: Final = 512
"""Features generated and tested together."""
MOST_FEATURES: Final = 4096
"""Largest family simulated; planned power is computed for a family of the same size, so that the two compare."""
N_FLIPS: Final = 4095
"""Sign flips of a simulated max-T test: with the observed labelling a group of 2^12."""
BAND_ERRORS: Final = 3.0
"""Standard errors of the band: 1 in 370 checks of a right formula falls outside."""


@dataclass(frozen=True, kw_only=True)
class SimulatedPower:
    """Power in simulated data sets (worlds) beside the planned power, for the same number of features."""

    n_prompts: int
    n_features: int
    n_worlds: int
    planned: float
    power: float
    """Share of true effects found, averaged over worlds."""
    power_low: float
    power_high: float
    """``power`` less and plus three standard errors over worlds."""
    error_rate: float
    """False discovery rate (fdr), share of worlds with a false positive (fwer), or false positive rate (none)."""


def simulated_power(
    design: Design,
    *,
    n_prompts: int,
    n_worlds: int = 20,
    seed: int = 0,
    most_features: int = MOST_FEATURES,
    progress: Progress = SILENT,
) -> SimulatedPower:
    """Power of the sign flips that ``drift_test`` runs, by simulating data sets (worlds) with the design's effect.

    Parameters
    ----------
    design, n_prompts
        What is planned.
    n_worlds, seed
        Number of simulated data sets, and their seed.
    most_features
        Largest family simulated.
    progress
        Where progress is reported.

    Returns
    -------
    SimulatedPower

    Raises
    ------
    InputError
        If there are fewer than two worlds.
    RefusedError
        If there are fewer than six clusters.

    Notes
    -----
    Differences are normal where a feature fires (whole clusters of prompts fire together), 0 elsewhere, with the
    design's intraclass correlation, independent between features. Tests: ``sign_flip_test`` with BH, or ``max_t``
    (single step, 4,095 flips).

    Examples
    --------
    >>> check = simulated_power(Design(effect=0.5, n_features=64, true_share=0.5), n_prompts=100, n_worlds=4)
    >>> check.power_low <= check.planned <= check.power_high
    True
    """
    if n_worlds < 2:
        raise InputError(f"a standard error needs at least two worlds, got {n_worlds}.")
    design, n_true = _simulated_family(design, most_features)
    power, errors = np.empty(n_worlds), np.empty(n_worlds)
    with progress.task("simulate power", total=n_worlds, unit="world") as task:
        for world in range(n_worlds):
            p = _corrected_p_values(design, n_prompts, n_true, derive_seed(seed, "simulated_power", world))
            rejected = p <= design.alpha
            power[world] = rejected[:n_true].mean()
            errors[world] = _error(rejected, n_true, design)
            task.advance(1, power=float(power[: world + 1].mean()))
    planned = power_at(replace(design, true_share=n_true / design.n_features), n_prompts=n_prompts).power
    return _summary(n_prompts, design, planned, n_true, power, errors)


def _simulated_family(design: Design, most_features: int) -> tuple[Design, int]:
    """The design with at most ``most_features`` features, and how many of them have the effect (the first ones)."""
    design = replace(design, n_features=min(design.n_features, most_features))
    return design, max(1, round(design.true_share * design.n_features))


def _error(rejected: NDArray[np.bool_], n_true: int, design: Design) -> float:
    """The error that the design's control bounds, in one world."""
    n_false = int(rejected[n_true:].sum())
    rates = {
        "fdr": n_false / max(1, int(rejected.sum())),
        "fwer": float(n_false > 0),
        "none": n_false / max(1, len(rejected) - n_true),
    }
    return rates[design.control]


def _summary(
    n_prompts: int, design: Design, planned: float, n_true: int, power: FloatArray, errors: FloatArray
) -> SimulatedPower:
    """Mean over worlds with its band; ``power`` and ``errors`` [world]."""
    mean, n = float(power.mean()), len(power)
    # Where every effect is found the spread over worlds is 0: the band is never narrower than a binomial one.
    binomial = np.sqrt(max(mean * (1 - mean), 1 / (n * n_true)) / (n * n_true))
    half = BAND_ERRORS * max(float(power.std(ddof=1)) / np.sqrt(n), float(binomial))
    return SimulatedPower(
        n_prompts=n_prompts,
        n_features=design.n_features,
        n_worlds=n,
        planned=planned,
        power=mean,
        power_low=max(0.0, mean - half),
        power_high=min(1.0, mean + half),
        error_rate=float(errors.mean()),
    )


def _corrected_p_values(design: Design, n_prompts: int, n_true: int, seed: int) -> FloatArray:
    """P-values of one world, corrected as the design says [feature]; the first ``n_true`` features have the effect."""
    p, maxima, observed = [], [], []
    clusters = None
    if design.cluster_size > 1:
        clusters = np.arange(n_prompts - n_prompts % design.cluster_size) // design.cluster_size
    for d in _differences(design, n_prompts, n_true, seed):
        if design.control == "fwer":
            # The same flips in every block, so that the maximum over blocks is that over the whole family.
            joint = max_t(d, n_resamples=N_FLIPS, seed=seed, step_down=False, clusters=clusters)
            maxima.append(joint.maxima)
            observed.append(joint.statistic)
        else:
            p.append(np.asarray(sign_flip_test(d, clusters=clusters).p_value))
    if design.control == "fwer":
        return max_t_p_value(np.concatenate(observed), np.max(maxima, axis=0))
    raw = np.concatenate(p)
    return adjust(raw, method="bh") if design.control == "fdr" else raw


def _differences(design: Design, n_prompts: int, n_true: int, seed: int) -> Iterator[FloatArray]:
    """Paired differences [prompt, feature] in blocks of features, each from a stream of its own."""
    m, p = design.cluster_size, design.density
    n_clusters = n_prompts // m
    rows = np.arange(n_clusters * m) // m
    # Mean of a firing prompt in its standard deviations, such that clusters have the d_z that the plan gives them.
    per_cluster = design.effect * np.sqrt(m / design.design_effect)
    shift = per_cluster / np.sqrt(p - (1 - p) * per_cluster**2) * np.sqrt(design.design_effect / m)
    for block, start in enumerate(range(0, design.n_features, BLOCK)):
        width = min(BLOCK, design.n_features - start)
        random = stream(seed, block)
        d = np.sqrt(1 - design.icc) * random.standard_normal((len(rows), width))
        if design.icc:
            d += np.sqrt(design.icc) * random.standard_normal((n_clusters, width))[rows]
        d[:, : max(0, min(n_true - start, width))] += shift
        d *= (random.random((n_clusters, width)) < p)[rows]
        yield d


def simulated_run_power(
    design: Design,
    *,
    runs: int,
    n_prompts: int,
    run_sd: float = 0.05,
    prior_dof: float = DEFAULT_PRIOR_DOF,
    n_worlds: int = 20,
    seed: int = 0,
    most_features: int = MOST_FEATURES,
) -> SimulatedPower:
    """Power of the moderated t test between arms, by simulating the mean difference of every run.

    Parameters
    ----------
    design, runs, n_prompts, run_sd, prior_dof
        As in :func:`~rlgen_stats.toolkit.statistics.planning.power.run_power`.
    n_worlds, seed, most_features
        As in :func:`simulated_power`.

    Returns
    -------
    SimulatedPower

    Raises
    ------
    InputError
        If there are fewer than two worlds or two runs.

    Examples
    --------
    >>> simulated_run_power(Design(effect=0.5, n_features=64, true_share=0.5), runs=4, n_prompts=100).n_worlds
    20
    """
    if n_worlds < 2 or runs < 2:
        raise InputError(f"expected at least two worlds and two runs per arm, got {n_worlds} and {runs}.")
    design, n_true = _simulated_family(design, most_features)
    variance = run_sd**2 + design.design_effect / (2 * n_prompts)
    methods: dict[str, Literal["bh", "holm"]] = {"fdr": "bh", "fwer": "holm"}
    method = methods.get(design.control)
    power, errors = np.empty(n_worlds), np.empty(n_worlds)
    for world in range(n_worlds):
        random = stream(derive_seed(seed, "simulated_run_power", world), 0)
        sd = np.sqrt(variance * prior_dof / random.chisquare(prior_dof, design.n_features))
        means = sd * random.standard_normal((2 * runs, design.n_features))
        means[:runs, :n_true] += design.effect
        p = moderated_t(arms_as_units(means[:runs], means[runs:])).p_value
        rejected = (p if method is None else adjust(p, method=method)) <= design.alpha
        power[world], errors[world] = rejected[:n_true].mean(), _error(rejected, n_true, design)
    family = replace(design, true_share=n_true / design.n_features)
    planned = run_power(family, runs=runs, n_prompts=n_prompts, run_sd=run_sd, prior_dof=prior_dof).power_moderated
    return _summary(n_prompts, design, planned, n_true, power, errors)


def arms_as_units(first: FloatArray, second: FloatArray) -> FloatArray:
    """Two arms [run, feature] as units whose one-sample t test is the arms' two-sample t test.

    Notes
    -----
    An orthogonal transform: the contrast of the arms becomes the mean, the residuals within arms (2 R - 2 of them) the
    spread about it, so that the one-sample ``moderated_t`` tests two samples with their degrees of freedom.
    """
    if first.shape != second.shape or len(first) < 2:
        raise InputError(
            f"arms must have the same runs (two or more) and features, got {first.shape} and {second.shape}."
        )
    n = len(first)
    # Scaled like an orthonormal coordinate, so that it has the variance of a single run.
    contrast = (first.sum(axis=0) - second.sum(axis=0)) / np.sqrt(2 * n)
    residuals = np.concatenate([helmert(n) @ first, helmert(n) @ second])
    units = 2 * n - 1
    return np.asarray(contrast / np.sqrt(units) + helmert(units).T @ residuals)
