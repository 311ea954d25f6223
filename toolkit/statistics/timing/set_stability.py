"""Stability of the set of most changed features during training (claim C2, as the paper measures it).

Plain overlap of top-k sets falls when effects shrink although nothing moves; here the overlap across checkpoints is
held against the overlap of two halves of the prompts at one checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from rlgen_stats.schemas.dims import BASE_MODEL, MODEL, TRAINED_RUN, split_model_id
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.statistics.core.comparability import check_contribution_scale, source_attrs
from rlgen_stats.toolkit.statistics.core.coordinates import feature_ranks, model_coords, run_models
from rlgen_stats.toolkit.statistics.core.feature_blocks import (
    DEFAULT_MIN_FIRING,
    Block,
    feature_arrays,
    in_prompt_order,
    map_features,
)
from rlgen_stats.toolkit.statistics.core.units import check_unit, cluster_codes, unit_attrs
from rlgen_stats.toolkit.statistics.kernels import delete_group_jackknife, nogueira, rbo, set_overlap_pvalue
from rlgen_stats.toolkit.statistics.kernels.numerics import IntArray
from rlgen_stats.toolkit.statistics.timing.top_sets import Design, TopSets, make_design, overlaps, top_sets

DELTA_TOLERANCE: Final = 0.10
"""Share of a top set that may still change while the set is called stable (METHOD.md 4b)."""

MIN_CEILING: Final = 0.5
"""Half-to-half overlap of the final set below which prompts are too few to say anything about sets (METHOD.md 4b)."""

RBO_PERSISTENCE: Final = 0.9
"""Rank-biased overlap puts 86% of its weight on the first ten ranks."""

DEFAULT_GROUPS: Final = 20
"""Groups of the delete-group jackknife."""

MIN_UNITS: Final = 8
"""Fewer units leave halves of three or less: no standard deviation worth ranking by."""

CHANCE_LEVEL: Final = 0.95
"""Quantile of the overlap of random sets: what chance alone reaches one time in twenty."""

COLUMNS: Final = (
    "overlap", "cross", "noise_ceiling", "final_ceiling", "delta", "delta_low", "delta_high", "delta_lower",
    "delta_upper", "chance", "chance_high", "overlap_p", "rbo",
)  # fmt: skip


def set_stability(
    features: xr.Dataset,
    *,
    runs: Sequence[str],
    reference: str = BASE_MODEL,
    k: int = 50,
    n_halvings: int = 100,
    n_groups: int = DEFAULT_GROUPS,
    variable: str = "mean",
    clusters: str | None = None,
    n_min: int = DEFAULT_MIN_FIRING,
    alpha: float = 0.05,
    seed: int = 0,
    unit: str = "prompt",
    allow_token_unit: bool = False,
    progress: Progress = SILENT,
) -> xr.Dataset:
    """Compare the top-k set of every checkpoint with the final one, against what the prompts can tell.

    Parameters
    ----------
    features
        Layout ``features`` with every checkpoint of the runs and ``reference``; read in feature blocks.
    runs, reference
        Run names, and the model from which every checkpoint's change D is measured.
    k
        Size of the sets (the paper's is 50).
    n_halvings, n_groups
        Random halvings of the units; groups of the delete-group jackknife.
    variable, clusters, n_min, unit, allow_token_unit
        As in ``stabilization_test``; units are halved and deleted whole.
    alpha, seed
        1 - coverage (two-sided ``delta_low``, ``delta_high``; one-sided ``delta_lower``, ``delta_upper``) and seed.

    Returns
    -------
    xr.Dataset
        Layout ``set_stability``. Over ``model``: ``overlap`` with the final set (all prompts), ``cross`` (X),
        ``noise_ceiling`` (rho_c), ``final_ceiling`` (rho_C), ``delta`` with bounds, ``chance`` (mean overlap of random
        sets), ``chance_high`` (its 95% quantile), ``overlap_p`` (all hypergeometric), ``rbo``. Over ``trained_run``:
        ``verdict`` SET_STABLE / EVOLVING / UNDETERMINED, ``stable_from`` (step), ``nogueira`` (over the checkpoints'
        sets), ``reason``, ``n_testable``.
        Small; computed at once.

    Raises
    ------
    InputError
        If a run has fewer than two checkpoints or a setting is out of range.
    RefusedError
        For ``unit="token"``, or features that are not in contribution scale.

    Notes
    -----
    Features are ranked by |mean D| / (sd D + s0), s0 the median sd over testable features and the run's checkpoints
    (Tusher et al. 2001); a set holds only positive scores. delta = (rho_c + rho_C)/2 - X, where X pairs one half of c
    with the *other* half of the final checkpoint: if D has the same distribution at c and at the end, all three are
    overlaps of sets from independent halves with the same truth, so E[delta] = 0 at any signal-to-noise.
    SET_STABLE from c: rho_C >= .5 and ``delta_upper`` < .10 at c and every later checkpoint before the last.
    EVOLVING: rho_C >= .5, not stable, and ``delta_lower`` > 0 at the last checkpoint but one. Otherwise UNDETERMINED.
    Per-checkpoint bounds are not simultaneous; the walk from the end backwards needs no correction.

    References
    ----------
    Tusher, Tibshirani and Chu 2001, doi:10.1073/pnas.091062498; Webber, Moffat and Zobel 2010,
    doi:10.1145/1852102.1852106; Nogueira, Sechidis and Brown 2018 (JMLR 18(174)).

    Examples
    --------
    >>> set_stability(open_features(path), runs=["sft", "rl"], k=50)  # doctest: +SKIP
    """
    check_unit(unit, allow_token_unit)
    check_contribution_scale(features, "ranks")
    features = in_prompt_order(features, repeated=unit == "token")
    if k < 1 or n_halvings < 1 or n_groups < 2 or not 0 < alpha < 1 or not runs:
        raise InputError(
            f"expected at least one run, k >= 1, n_halvings >= 1, n_groups >= 2 and 0 < alpha < 1; got "
            f"runs={list(runs)}, k={k}, n_halvings={n_halvings}, n_groups={n_groups}, alpha={alpha}."
        )
    codes = cluster_codes(features, clusters)
    design = make_design(features.sizes["prompt"], codes, k, n_halvings, n_groups, seed)
    rows: dict[str, list[float]] = {name: [] for name in COLUMNS}
    verdicts: list[tuple[str, float, float, str, int]] = []
    models: list[str] = []
    with progress.task("set stability", total=len(runs), unit="run") as task:
        for run in runs:
            own = [model for model in run_models(features, run) if model != reference]
            if len(own) < 2:
                raise InputError(f"run {run!r} has {len(own)} checkpoint; set stability needs at least two.")
            table, verdict = _one_run(features, variable, reference, own, design, n_min, alpha)
            for name, values in table.items():
                rows[name].extend(values)
            verdicts.append(verdict)
            models += own
            task.advance(1, run=run, verdict=verdict[0])
    labels = {name: list(column) for name, column in zip(_RUN_COLUMNS, zip(*verdicts, strict=True), strict=True)}
    return xr.Dataset(
        {name: (MODEL, np.array(values, dtype=np.float64)) for name, values in rows.items()}
        | {name: (TRAINED_RUN, np.array(values)) for name, values in labels.items()},
        coords=model_coords(features, models) | {TRAINED_RUN: (TRAINED_RUN, np.array(list(runs), dtype=np.str_))},
        attrs={
            "test": f"cross-half overlap of top-{k} sets, delete-group jackknife",
            "null": "change has the same distribution at this checkpoint and at the end (delta = 0)",
            "top_k": k,
            "n_halvings": n_halvings,
            "n_groups": design.n_groups,
            "tolerance": DELTA_TOLERANCE,
            "min_ceiling": MIN_CEILING,
        }
        | {"reference": reference, "variable": variable, "seed": seed, "alpha": alpha}
        | source_attrs(features)
        | unit_attrs(unit, clusters, codes),
    )


_RUN_COLUMNS: Final = ("verdict", "stable_from", "nogueira", "reason", "n_testable")


def _one_run(
    features: xr.Dataset,
    variable: str,
    reference: str,
    models: list[str],
    design: Design,
    n_min: int,
    alpha: float,
) -> tuple[dict[str, list[float]], tuple[str, float, float, str, int]]:
    arrays, _ = feature_arrays(features, [variable, "firing"], [reference, *models])
    spread, fired = da.compute(
        *map_features(_moments, arrays, outputs={"sd": (len(models),), "fired": ()}).features.values()
    )
    testable = np.asarray(fired) >= n_min
    n_testable = int(testable.sum())
    if n_testable <= design.k or design.n_units < MIN_UNITS:
        why = (
            f"{n_testable} testable features and {design.n_units} units; "
            f"needs more than k={design.k} features and at least {MIN_UNITS} units"
        )
        blank = {name: [float("nan")] * len(models) for name in COLUMNS}
        return blank, ("UNDETERMINED", float("nan"), float("nan"), why, n_testable)
    s0 = float(np.median(np.asarray(spread)[:, testable]))
    ranks = feature_ranks(features)
    tops = [top_sets(arrays[0], c + 1, testable, ranks, s0, design) for c in range(len(models))]
    table = _table(tops, n_testable, alpha)
    chosen = np.stack([np.isin(ranks[testable], top.full) for top in tops])
    verdict, stable_from, reason = _verdict(table, models)
    return table, (verdict, stable_from, float(nogueira(chosen)), reason, n_testable)


def _moments(values: NDArray[Any], firing: NDArray[Any]) -> Block:
    d = values[1:].astype(np.float64) - values[0]
    return {"sd": d.std(axis=1, ddof=1), "fired": (firing > 0).sum(axis=(0, 1)).astype(np.float64)}


def _table(tops: list[TopSets], n_testable: int, alpha: float) -> dict[str, list[float]]:
    final, k = tops[-1], len(tops[-1].full)
    ceiling = overlaps(final.halves[:, :, 0], final.halves[:, :, 1]).mean(axis=1) / k
    table: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for top in tops:
        own = overlaps(top.halves[:, :, 0], top.halves[:, :, 1]).mean(axis=1) / k
        cross = (
            overlaps(top.halves[:, :, 0], final.halves[:, :, 1])
            + overlaps(top.halves[:, :, 1], final.halves[:, :, 0])
        ).mean(axis=1) / (2 * k)  # fmt: skip
        delta = (own + ceiling) / 2 - cross
        shared = int(overlaps(top.full, final.full))
        sizes = int((top.full >= 0).sum()), int((final.full >= 0).sum())
        bounds = delete_group_jackknife(delta[1:], delta[0], alpha=alpha)
        chance = stats.hypergeom(n_testable, *sizes)
        row = {
            "delta": float(delta[0]),
            "delta_low": float(bounds.low),
            "delta_high": float(bounds.high),
            "delta_lower": float(bounds.lower),
            "delta_upper": float(bounds.upper),
            "overlap": shared / k,
            "cross": float(cross[0]),
            "noise_ceiling": float(own[0]),
            "final_ceiling": float(ceiling[0]),
            "chance": float(chance.mean()) / k,
            "chance_high": float(chance.ppf(CHANCE_LEVEL)) / k,
            "overlap_p": float(set_overlap_pvalue(shared, n_testable, *sizes)),
            "rbo": _rbo(top.full, final.full),
        }
        for name in COLUMNS:
            table[name].append(row[name])
    return table


def _rbo(a: IntArray, b: IntArray) -> float:
    return float(rbo(a[a >= 0].tolist(), b[b >= 0].tolist(), RBO_PERSISTENCE).extrapolated)


def _verdict(table: dict[str, list[float]], models: list[str]) -> tuple[str, float, str]:
    """Verdict, step from which the set is stable (NaN if not), and why."""
    ceiling = table["final_ceiling"][-1]
    nan = float("nan")
    if ceiling < MIN_CEILING:
        return (
            "UNDETERMINED",
            nan,
            f"two halves of the prompts agree on {ceiling:.2f} of the final set; {MIN_CEILING} needed",
        )
    upper, lower = table["delta_upper"][:-1], table["delta_lower"][:-1]
    stable = len(upper)
    while stable > 0 and upper[stable - 1] < DELTA_TOLERANCE:
        stable -= 1
    if stable < len(upper):
        step = float(split_model_id(models[stable])[1])
        return "SET_STABLE", step, f"upper bound of delta below {DELTA_TOLERANCE} from step {step:.0f} on"
    if lower[-1] > 0:
        return (
            "EVOLVING",
            nan,
            f"delta {table['delta'][-2]:.2f} (at least {lower[-1]:.2f}) at the last checkpoint but one",
        )
    return "UNDETERMINED", nan, f"delta at the last checkpoint but one is between {lower[-1]:.2f} and {upper[-1]:.2f}"
