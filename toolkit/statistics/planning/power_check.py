"""Planned power held against simulated data and the tests themselves."""

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
from rlgen_stats.toolkit.statistics.planning.power import Design, power_at
from rlgen_stats.toolkit.statistics.planning.run_power import DEFAULT_PRIOR_DOF, run_power

FloatArray = NDArray[np.float64]

BLOCK: Final = 512
"""Features generated and tested together."""
MOST_FEATURES: Final = 4096
"""Features simulated at most; the plan is worked out for as many, so that the two can be compared."""
MOST_ERRORS: Final = 3.0
"""Standard errors of the band: 1 in 370 checks of a right formula falls outside."""


@dataclass(frozen=True)
class SimulatedPower:
    """Power in simulated data beside the planned one, for the same number of features."""

    n_prompts: int
    n_features: int
    n_worlds: int
    planned: float
    power: float
    """Share of true effects found, averaged over worlds."""
    power_low: float
    power_high: float
    """Three standard errors over worlds."""
    error_rate: float
    """Share of false findings (fdr), of worlds with any (fwer), or of nulls found (none)."""


def simulated_power(
    design: Design,
    *,
    n_prompts: int,
    n_worlds: int = 20,
    seed: int = 0,
    most_features: int = MOST_FEATURES,
    progress: Progress = SILENT,
) -> SimulatedPower:
    """Draw worlds with the design's effect, run the tests that ``drift_test`` runs, and count what they find.

    Parameters
    ----------
    design, n_prompts
        What is planned.
    n_worlds, seed
        Worlds and their seed.
    most_features
        Features of a world at most.

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
    >>> found = simulated_power(Design(effect=0.5, n_features=64, true_share=0.5), n_prompts=100, n_worlds=4)
    >>> found.power_low <= found.planned <= found.power_high
    True
    """
    if n_worlds < 2:
        raise InputError(f"a standard error needs at least two worlds, got {n_worlds}.")
    small = replace(design, n_features=min(design.n_features, most_features))
    n_true = max(1, round(small.true_share * small.n_features))
    found, errors = np.empty(n_worlds), np.empty(n_worlds)
    with progress.task("simulate power", total=n_worlds, unit="world") as task:
        for world in range(n_worlds):
            p = _world(small, n_prompts, n_true, derive_seed(seed, "simulated_power", world))
            hit = p <= small.alpha
            found[world] = hit[:n_true].mean()
            errors[world] = _error(hit, n_true, small)
            task.advance(1, power=float(found[: world + 1].mean()))
    planned = power_at(replace(small, true_share=n_true / small.n_features), n_prompts=n_prompts).power
    return _summary(n_prompts, small, planned, n_true, found, errors)


def _error(hit: NDArray[np.bool_], n_true: int, design: Design) -> float:
    """What the control bounds, in one world."""
    false = int(hit[n_true:].sum())
    rates = {
        "fdr": false / max(1, int(hit.sum())),
        "fwer": float(false > 0),
        "none": false / max(1, len(hit) - n_true),
    }
    return rates[design.control]


def _summary(
    n_prompts: int, design: Design, planned: float, n_true: int, found: FloatArray, errors: FloatArray
) -> SimulatedPower:
    share, n = float(found.mean()), len(found)
    # With everything found the spread over worlds is 0: the band is never narrower than a binomial one.
    binomial = np.sqrt(max(share * (1 - share), 1 / (n * n_true)) / (n * n_true))
    half = MOST_ERRORS * max(float(found.std(ddof=1)) / np.sqrt(n), float(binomial))
    return SimulatedPower(
        n_prompts=n_prompts,
        n_features=design.n_features,
        n_worlds=n,
        planned=planned,
        power=share,
        power_low=max(0.0, share - half),
        power_high=min(1.0, share + half),
        error_rate=float(errors.mean()),
    )


def _world(design: Design, n_prompts: int, n_true: int, seed: int) -> FloatArray:
    """Corrected p-values of one world; the first ``n_true`` features have the effect."""
    p, maxima, observed = [], [], []
    clusters = None
    if design.cluster_size > 1:
        clusters = np.arange(n_prompts - n_prompts % design.cluster_size) // design.cluster_size
    for d in _differences(design, n_prompts, n_true, seed):
        if design.control == "fwer":
            joint = max_t(d, n_resamples=4095, seed=seed, step_down=False, clusters=clusters)
            maxima.append(joint.maxima)
            observed.append(joint.statistic)
        else:
            p.append(np.asarray(sign_flip_test(d, clusters=clusters).p_value))
    if design.control == "fwer":
        return max_t_p_value(np.concatenate(observed), np.max(maxima, axis=0))
    values = np.concatenate(p)
    return adjust(values, method="bh") if design.control == "fdr" else values


def _differences(design: Design, n_prompts: int, n_true: int, seed: int) -> Iterator[FloatArray]:
    """Paired differences [prompt, feature] in blocks."""
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
    """Draw the mean differences of every run, test the arms' contrast with ``moderated_t``, and count what is found.

    Parameters
    ----------
    design, runs, n_prompts, run_sd, prior_dof
        As in :func:`~rlgen_stats.toolkit.statistics.planning.run_power.run_power`.
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
    >>> found = simulated_run_power(Design(effect=0.5, n_features=64, true_share=0.5), runs=4, n_prompts=100)
    >>> found.n_worlds
    20
    """
    if n_worlds < 2 or runs < 2:
        raise InputError(f"expected at least two worlds and two runs per arm, got {n_worlds} and {runs}.")
    small = replace(design, n_features=min(design.n_features, most_features))
    n_true = max(1, round(small.true_share * small.n_features))
    variance = run_sd**2 + small.design_effect / (2 * n_prompts)
    methods: dict[str, Literal["bh", "holm"]] = {"fdr": "bh", "fwer": "holm"}
    method = methods.get(small.control)
    found, errors = np.empty(n_worlds), np.empty(n_worlds)
    for world in range(n_worlds):
        random = stream(derive_seed(seed, "simulated_run_power", world), 0)
        own = np.sqrt(variance * prior_dof / random.chisquare(prior_dof, small.n_features))
        means = own * random.standard_normal((2 * runs, small.n_features))
        means[:runs, :n_true] += small.effect
        p = moderated_t(arm_contrast(means[:runs], means[runs:])).p_value
        hit = (p if method is None else adjust(p, method=method)) <= small.alpha
        found[world], errors[world] = hit[:n_true].mean(), _error(hit, n_true, small)
    planned = run_power(
        replace(small, true_share=n_true / small.n_features), runs=runs, n_prompts=n_prompts, run_sd=run_sd,
        prior_dof=prior_dof,
    ).power_moderated  # fmt: skip
    return _summary(n_prompts, small, planned, n_true, found, errors)


def arm_contrast(first: FloatArray, second: FloatArray) -> FloatArray:
    """Two arms [run, feature] as units whose one-sample t test is the arms' two-sample t test.

    Notes
    -----
    An orthogonal turn: the contrast of the arms becomes the mean, the residuals within arms (2 R - 2 of them) the
    spread about it, so that ``moderated_t``, which knows one sample, tests two with their degrees of freedom.
    """
    if first.shape != second.shape or len(first) < 2:
        raise InputError(
            f"arms must have the same runs (two or more) and features, got {first.shape} and {second.shape}."
        )
    n = len(first)
    contrast = (first.sum(axis=0) - second.sum(axis=0)) / np.sqrt(2 * n)
    residuals = np.concatenate([helmert(n) @ first, helmert(n) @ second])
    units = 2 * n - 1
    return np.asarray(contrast / np.sqrt(units) + helmert(units).T @ residuals)
