"""Stabilisation: the checkpoint from which each feature stops changing (claim C2, feature by feature).

In reading order: the public test, its checks, one run, the tests of one block of features (everything that needs no
other feature), and what is counted over all features: expected shares settled, their bands, the mean time to stability,
and the comparison of two arms.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import dask
import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from rlgen_stats.schemas.dims import ARM, BASE_MODEL, FEATURE, MODEL, TRAINED_RUN, split_model_id
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.core.comparability import source_attrs
from rlgen_stats.toolkit.statistics.core.coordinates import feature_coord, find_models, model_coords, run_models
from rlgen_stats.toolkit.statistics.core.feature_blocks import (
    DEFAULT_MIN_FIRING,
    Block,
    feature_arrays,
    finish,
    in_prompt_order,
    map_features,
)
from rlgen_stats.toolkit.statistics.core.units import check_clusters, check_unit, cluster_codes, unit_attrs, unit_means
from rlgen_stats.toolkit.statistics.kernels import (
    adjust,
    bagged_replicates,
    delete_group_jackknife,
    tost_chain,
    trend_test,
)
from rlgen_stats.toolkit.statistics.kernels.intervals.bootstrap import bootstrap_blocks
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray
from rlgen_stats.toolkit.statistics.kernels.unit_tables import feature_blocks

__all__ = ["FLAGS", "STRATA", "stabilization_test"]

DEFAULT_MARGINS: Final = {False: 0.2, True: 0.25}
"""By whether it is relative: standard deviations of the reference, or share of the total change (docs/method.md 4b)."""

FLAGS: Final = ("STABILISED", "UNCHANGED", "NOT_STABILISED", "UNTESTABLE", "NO_MARGIN", "EVOLVING")
"""Per feature and run: settled at ``stabilized_at``; base itself equivalent to the end; neither settled before the last
checkpoints (``persist``) nor evolving; fires on too few prompts; no margin (base without spread, or no total change);
shown to differ from the end by more than the margin within the last checkpoints (``persist``)."""

STRATA: Final = ("unchanged", "moderate", "large")
"""Features by absolute total change: below the margin, up to 2.5 margins, more. Runs are compared within a stratum."""

STRATA_EDGES: Final = (1.0, 2.5)
"""Edges of ``STRATA`` in margins (a relative margin: in default margins)."""

CHANGED: Final = slice(1, None)
"""Strata that have a time to stability: what never left the margin was stable all along."""

DEFAULT_PERSIST: Final = 0.2
"""Of five checkpoints the last but one can show stability, of twenty the sixteenth."""

N_GROUPS: Final = 20
"""Groups of units of the infinitesimal jackknife, at most; half as many as units where these are few."""

MIN_RUNS: Final = 4
"""Runs per arm from which a permutation of runs can fall below .05 (2 / 70)."""

PERMUTATIONS: Final = 9999
"""Permutations of runs at most: all 6,435 of eight against seven runs, random ones beyond that."""

BY_CHECKPOINT: Final = ("p_value", "effect", "effect_sd")
BY_FEATURE: Final = (
    *("stabilized_at", "flag", "total_effect", "total_effect_sd"),
    *("p_reference", "p_evolving", "trend_tau", "trend_p"),
)

TEST_ATTRS: Final = {
    "test": "paired two one-sided t tests, fixed sequence from the last checkpoint backwards",
    "null": "the mean differs from the final checkpoint's by at least the margin",
    "family": "checkpoints of one feature (fixed sequence); trend_q: features of one run",
}


def stabilization_test(
    features: xr.Dataset,
    *,
    runs: Sequence[str],
    reference: str = BASE_MODEL,
    margin: float | None = None,
    relative: bool = False,
    persist: float = DEFAULT_PERSIST,
    left_out: Collection[str] = (),
    variable: str = "mean",
    clusters: str | None = None,
    n_min: int = DEFAULT_MIN_FIRING,
    alpha: float = 0.05,
    seed: int = 0,
    n_bootstrap: int = 999,
    unit: str = "prompt",
    allow_token_unit: bool = False,
) -> xr.Dataset:
    """Find the checkpoint from which a feature is shown to stay within a margin of its final activation.

    Parameters
    ----------
    features
        Layout ``features``; every checkpoint of the runs and ``reference``. Lazy in, lazy out. Prompts that a
        checkpoint lacks take no part in its run.
    runs
        Run names. If they belong to two arms, the arms are compared.
    reference
        Start of every run (step 0 of the chain) and source of the margin's unit.
    margin, relative
        Equivalence margin in standard deviations of ``reference`` over units (default .2), or, if ``relative``, as a
        share of the feature's total change (default .25).
    persist
        Share of a run's checkpoints, rounded, at least one: a feature that stabilises only within so many last ones is
        NOT_STABILISED, since nothing later could contradict it.
    left_out
        Checkpoints that are not looked at. They count in ``persist``: otherwise of two runs that change alike the one
        of which more is left out would seem to settle sooner.
    variable
        Summary compared: mean, firing or max.
    clusters
        Label of prompts whose values are averaged into one unit.
    n_min
        Prompts, pooled over the run's checkpoints and the reference, on which a testable feature fires.
    alpha, seed, n_bootstrap
        Level of each test and 1 - coverage of the bands; seed and draws of the bootstrap over units.
    unit, allow_token_unit
        ``"prompt"``; ``"token"`` only if explicitly allowed, and then recorded as a warning.

    Returns
    -------
    xr.Dataset
        Layout ``stabilization``. [model, feature]: ``p_value`` (equivalence with the final checkpoint; NaN at the final
        one), ``effect`` (mean difference from it), ``effect_sd`` (in reference standard deviations). [trained_run,
        feature]: ``stabilized_at`` (step; 0 is the reference; NaN if not shown), ``flag``, ``total_effect``,
        ``total_effect_sd``, ``p_reference``, ``p_evolving``, ``trend_tau``, ``trend_p``, ``trend_q``. [model]:
        ``share`` expected to be settled, with band; [model, stratum]: ``share_in_stratum`` with band, and [model,
        stratum, replicate] its jackknife replicates; ``n_testable`` [trained_run], ``n_in_stratum`` [trained_run,
        stratum]. With two arms, [stratum]: ``difference_in_stratum`` of mean times to stability with interval and, with
        four or more runs each, ``difference_in_stratum_p``.

    Raises
    ------
    InputError
        If a run has fewer than two checkpoints, or margin, persist or alpha are out of range.
    RefusedError
        For ``unit="token"``.

    Notes
    -----
    *Stabilised.* Two one-sided paired t tests per checkpoint, walked from the last checkpoint backwards until one
    fails: a fixed sequence, so no correction over checkpoints. A relative margin is estimated from the same prompts and
    tested as two linear contrasts, not put in as if it were known.

    *Evolving.* ``p_evolving`` is the smallest Holm-adjusted p-value of the minimal-effect tests (farther than the
    margin from the end) at the last ``persist`` checkpoints before the end. EVOLVING where it is at most ``alpha``; no
    feature can be both that and STABILISED, because the two need opposite tests of one checkpoint to reject.
    NOT_STABILISED where neither is shown. Not corrected over features: use ``adjust_pvalues`` for a list of them.

    *Trend.* Kendall's tau of each unit over reference and checkpoints, averaged; sign flips over units, because
    checkpoints are not replicates; ``trend_q`` by BH over the run's features. It describes this run, not its arm.

    *Shares.* ``share`` S(c) is the expected share of testable features whose mean stays within the margin of the end
    from c on: the mean over bootstrap draws of units (all features, checkpoints and runs together) of the share within
    it, strata formed anew in each draw. Counting features *shown* to be stable instead jumps with the noise of single
    features, and its level with the number of prompts; the bagged share is smooth, and less steep than the truth where
    the error of a mean is not small against the margin. Bands are those of a bagged estimate (infinitesimal jackknife:
    covariance over draws of the share with how often each of ``N_GROUPS`` groups of units was drawn, whose Monte-Carlo
    part only widens them), pointwise. The curve need not reach 1: a feature within the margin only over the last
    checkpoints (``persist``) does not count.

    *Mean time to stability*: area over S within a stratum of total change, as a share of training, S between
    checkpoints on a straight line from 0 at the start; a feature that does not settle counts 1. Weaker changes settle
    earlier whatever the training method, hence the strata; features that never left the margin have no time.
    ``difference_in_stratum`` is the mean over runs of the first arm less that of the second; with one run per arm its
    interval is about these two runs, not about training methods (attribute ``comparison``).

    References
    ----------
    Schuirmann 1987, doi:10.1007/BF01068419; Maurer, Hothorn and Lehmacher 1995 (a priori ordered hypotheses); Mann
    1945, doi:10.2307/1907187; errors of bagged estimates: Efron 2014, doi:10.1080/01621459.2013.823775.

    Examples
    --------
    >>> stabilization_test(open_features(path), runs=["sft", "rl"])  # doctest: +SKIP
    """
    check_unit(unit, allow_token_unit)
    margin = DEFAULT_MARGINS[relative] if margin is None else margin
    _check_settings(runs, margin, relative, persist, alpha)
    features = in_prompt_order(features, repeated=unit == "token")
    codes = cluster_codes(features, clusters)
    check_clusters(codes)
    (reference,) = find_models(features, [reference])
    every = {run: [model for model in run_models(features, run) if model != reference] for run in runs}
    checkpoints = {run: [model for model in models if model not in left_out] for run, models in every.items()}
    _check_checkpoints(checkpoints)
    settings = StabilizationSettings(
        margin=margin,
        relative=relative,
        last_ones=0,  # of each run
        alpha=alpha,
        n_min=n_min,
        codes=codes,
        n_units=features.sizes["prompt"] if codes is None else int(codes.max()) + 1,
        seed=derive_seed(seed, "stabilization_test"),
        n_bootstrap=n_bootstrap,
    )
    lazy, results = False, {}
    for run, models in checkpoints.items():
        arrays, is_lazy = feature_arrays(features, [variable, "firing"], [reference, *models])
        lazy = lazy or is_lazy
        last_ones = max(1, round(persist * len(every[run])))
        results[run] = _one_run(arrays, models, replace(settings, last_ones=last_ones))
    labels = model_coords(features, [model for models in checkpoints.values() for model in models])
    variables, comparison = _collect(results, _arms(labels, checkpoints), settings)
    coords: dict[str, Any] = labels | feature_coord(features)
    coords |= {"stratum": ("stratum", np.array(STRATA))}
    coords |= {TRAINED_RUN: (TRAINED_RUN, np.array(list(checkpoints), dtype=np.str_))}
    attrs = {"margin": margin, "margin_unit": "share of the total change" if relative else f"sd of {reference}"}
    attrs |= {"persist": persist, "reference": reference, "variable": variable, "n_min": n_min, "alpha": alpha}
    attrs |= {"seed": seed, "n_bootstrap": n_bootstrap} | comparison | TEST_ATTRS
    attrs |= source_attrs(features) | unit_attrs(unit, clusters, codes)
    return finish(xr.Dataset(variables, coords=coords, attrs=attrs), lazy)


def _check_settings(runs: Sequence[str], margin: float, relative: bool, persist: float, alpha: float) -> None:
    if margin <= 0 or (relative and margin >= 1) or not 0 < persist < 1 or not 0 < alpha < 1 or not runs:
        raise InputError(
            "expected at least one run, margin > 0 (below 1 if relative), 0 < persist < 1 (a share of the checkpoints) "
            f"and 0 < alpha < 1; got runs={list(runs)}, margin={margin}, persist={persist}, alpha={alpha}."
        )


def _check_checkpoints(checkpoints: Mapping[str, Sequence[str]]) -> None:
    for run, models in checkpoints.items():
        if len(models) < 2:
            raise InputError(f"run {run!r} has {len(models)} checkpoint; stabilisation needs at least two.")


def _arms(labels: dict[str, Any], checkpoints: dict[str, list[str]]) -> dict[str, list[str]]:
    """Runs of each arm, arms in order of their first run."""
    arm_of = dict(zip(labels[MODEL][1].tolist(), labels[ARM][1].tolist(), strict=True))
    arms: dict[str, list[str]] = {}
    for run, models in checkpoints.items():
        arms.setdefault(arm_of[models[0]], []).append(run)
    return arms


@dataclass(frozen=True, kw_only=True)
class _RunResults:
    """Lazy results of one run."""

    steps: list[int]
    """Of the reference (0) and the checkpoints."""
    by_checkpoint: dict[str, da.Array]
    by_feature: dict[str, da.Array]
    settled: da.Array
    """[draw, reference + checkpoint, stratum]: number of features settled."""
    drawn: da.Array
    """[draw, stratum]: number of testable features."""
    in_stratum: da.Array
    """[stratum]: their number where nothing is drawn."""


def _one_run(arrays: list[da.Array], models: list[str], settings: StabilizationSettings) -> _RunResults:
    steps = [0, *(split_model_id(model)[1] for model in models)]
    mapped = map_features(
        stabilization_block,
        arrays,
        outputs=dict.fromkeys(BY_CHECKPOINT, (len(models),)) | dict.fromkeys(BY_FEATURE, ()),
        states={
            "settled": ((settings.n_bootstrap, len(steps), len(STRATA)), da.sum),
            "drawn": ((settings.n_bootstrap, len(STRATA)), da.sum),
            "in_stratum": ((len(STRATA),), da.sum),
        },
        settings=settings,
        steps=steps,
    )
    by_feature = {name: mapped.features[name] for name in BY_FEATURE}
    by_feature["trend_q"] = da.map_blocks(_bh, by_feature["trend_p"].rechunk(-1), dtype=np.float64)
    return _RunResults(
        steps=steps,
        by_checkpoint={name: mapped.features[name] for name in BY_CHECKPOINT},
        by_feature=by_feature,
        settled=mapped.states["settled"],
        drawn=mapped.states["drawn"],
        in_stratum=mapped.states["in_stratum"],
    )


def _bh(p: NDArray[Any]) -> NDArray[Any]:
    return adjust(p, method="bh")


def _collect(
    results: dict[str, _RunResults], arms: dict[str, list[str]], settings: StabilizationSettings
) -> tuple[dict[str, tuple[Any, da.Array]], dict[str, Any]]:
    """Variables of the layout (``trained_run`` is the dimension of runs, ``run`` labels the models), and attributes."""
    runs = list(results.values())
    curves = [share_curves(run, settings) for run in runs]
    together, stratified, replicates = (da.concatenate(column, axis=-2) for column in zip(*curves, strict=True))
    sizes = da.stack([run.in_stratum for run in runs]).astype(np.int64)
    out: dict[str, tuple[Any, da.Array]] = {
        name: ((MODEL, FEATURE), da.concatenate([run.by_checkpoint[name] for run in runs])) for name in BY_CHECKPOINT
    }
    for name in (*BY_FEATURE, "trend_q"):
        out[name] = ((TRAINED_RUN, FEATURE), da.stack([run.by_feature[name] for run in runs]))
    flags = da.map_blocks(_flag_names, out["flag"][1], dtype=np.array(FLAGS).dtype)
    out["flag"] = ((TRAINED_RUN, FEATURE), flags)
    out |= {"n_testable": (TRAINED_RUN, sizes.sum(axis=1)), "n_in_stratum": ((TRAINED_RUN, "stratum"), sizes)}
    for i, suffix in enumerate(("", "_low", "_high")):
        out[f"share{suffix}"] = (MODEL, together[i, :, 0])
        out[f"share_in_stratum{suffix}"] = ((MODEL, "stratum"), stratified[i])
    out["share_in_stratum_replicate"] = (("replicate", MODEL, "stratum"), replicates)
    if len(arms) != 2:
        return out, {}
    difference = arm_difference([[results[run] for run in names] for names in arms.values()], settings)
    for i, suffix in enumerate(("", "_low", "_high", "_p")):
        out[f"difference_in_stratum{suffix}"] = ("stratum", difference[i])
    first, second = arms
    scope = "these two runs" if len(results) == 2 else f"{len(arms[first])} and {len(arms[second])} runs"
    return out, {"comparison": f"{first} less {second}, {scope}; interval over units, p-value over runs"}


def _flag_names(codes: NDArray[Any]) -> NDArray[np.str_]:
    return np.array(FLAGS)[codes.astype(np.int64)]


@dataclass(frozen=True, kw_only=True)
class StabilizationSettings:
    """Settings of one stabilisation test, as every block needs them."""

    margin: float
    relative: bool
    last_ones: int
    """Last checkpoints of the run that cannot show stability on their own."""
    alpha: float
    n_min: int
    codes: IntArray | None
    """[prompt]: cluster of each prompt; None if prompts are the units."""
    n_units: int
    seed: int
    n_bootstrap: int


def stabilization_block(
    values: NDArray[Any], firing: NDArray[Any], *, settings: StabilizationSettings, steps: list[int]
) -> Block:
    """All results of a block, a few features at a time; ``values`` [reference + checkpoints, prompt, feature]."""
    most_rows = values.shape[0] * max(values.shape[1], settings.n_bootstrap)
    parts = [
        _few_features(values[..., few].astype(np.float64), firing[..., few], settings, steps)
        for few in feature_blocks(most_rows, values.shape[2])
    ]
    joined = {name: np.concatenate([p[name] for p in parts], axis=-1) for name in (*BY_CHECKPOINT, *BY_FEATURE)}
    return joined | {name: np.sum([p[name] for p in parts], axis=0) for name in ("settled", "drawn", "in_stratum")}


def _few_features(values: FloatArray, firing: NDArray[Any], settings: StabilizationSettings, steps: list[int]) -> Block:
    """Results of ``stabilization_block`` for features few enough to be worked on at once."""
    last = len(steps) - 1
    fired = (firing > 0).sum(axis=(0, 1))
    x, present = _units(values, settings.codes)
    spread = x[0].std(axis=0, ddof=1)
    total = x[-1].mean(axis=0) - x[0].mean(axis=0)
    margin_unit = np.abs(total) if settings.relative else spread
    tested = (fired >= settings.n_min) & (margin_unit > 0)
    p, p_beyond = _chain(x, np.where(tested, 1.0 if settings.relative else spread, np.nan), settings)
    p_evolving = _evolving(p_beyond, settings)
    first = _first_accepted(p[:-1] <= settings.alpha)
    late = first > last - settings.last_ones
    evolving = late & (p_evolving <= settings.alpha)
    flag = np.select([fired < settings.n_min, ~tested, evolving, late, first == 0], [3, 4, 5, 2, 1], 0)
    settled = np.where(tested & ~late, first, last + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        total_sd = total / spread
        effect = x[1:].mean(axis=1) - x[-1].mean(axis=0)
        effect_sd = effect / spread
    unit = DEFAULT_MARGINS[False] if settings.relative else settings.margin
    edges = unit * np.where(tested, spread, np.nan) * np.array(STRATA_EDGES)[:, None]
    n_settled, n_drawn = _drawn_counts(x, present, settings.margin * spread, edges, settings)
    p = np.where(tested, p, np.nan)
    p[-1] = np.nan  # the final checkpoint equals itself: there is nothing to test
    trend = trend_test(np.where(tested, np.moveaxis(x, 0, 1), np.nan), seed=settings.seed)
    return {
        "p_value": p[1:],
        "effect": effect,
        "effect_sd": effect_sd,
        "stabilized_at": np.where(settled <= last, np.array([*steps, np.nan])[settled], np.nan),
        "flag": flag.astype(np.float64),
        "total_effect": total,
        "total_effect_sd": total_sd,
        "p_reference": p[0],
        "p_evolving": np.where(tested, p_evolving, np.nan),
        "trend_tau": trend.tau,
        "trend_p": trend.p_value,
        "settled": n_settled,
        "drawn": n_drawn,
        "in_stratum": np.bincount(_stratum(np.abs(total), edges), minlength=len(STRATA) + 1)[:-1].astype(np.float64),
    }


def _units(x: FloatArray, codes: IntArray | None) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Values [model, unit, feature] of the units with summaries in every model, and which of all units these are.

    A unit is a prompt, or the mean over the summarised prompts of a cluster.
    """
    summarised = np.asarray(np.isfinite(x).all(axis=(0, 2)))
    unit_of = np.arange(len(summarised)) if codes is None else codes
    kept = None if codes is None else codes[summarised]
    present = np.isin(np.arange(unit_of.max() + 1), unit_of[summarised])
    return np.stack([unit_means(model, kept) for model in x[:, summarised]]), present


def _chain(x: FloatArray, scale: FloatArray, settings: StabilizationSettings) -> tuple[FloatArray, FloatArray]:
    """P-values of equivalence with the end and of lying beyond the margin, [reference + checkpoints, feature]."""
    chain = tost_chain(
        np.moveaxis(x, 0, 1) / scale, margin=settings.margin, alpha=settings.alpha, relative=settings.relative
    )
    return np.asarray(chain.p_value), np.asarray(chain.p_beyond)


def _evolving(p_beyond: FloatArray, settings: StabilizationSettings) -> FloatArray:
    """Smallest Holm-adjusted p-value over the last checkpoints before the end, the reference excluded."""
    window = p_beyond[max(1, len(p_beyond) - 1 - settings.last_ones) : -1]
    return np.asarray(np.minimum(len(window) * window.min(axis=0), 1.0))


def _first_accepted(accepted: NDArray[np.bool_]) -> IntArray:
    """Index of the earliest checkpoint from which all later ones are accepted; the last index + 1 is the final itself.

    ``accepted`` is [checkpoint 0..C-1, ...]; the final checkpoint C equals itself.
    """
    # Reversed, the cumulative product is 1 up to the first checkpoint that fails.
    n_accepted = np.cumprod(accepted[::-1], axis=0).sum(axis=0)
    return np.asarray(len(accepted) - n_accepted, dtype=np.int64)


def _stratum(total: FloatArray, edges: FloatArray) -> IntArray:
    """Stratum of absolute total changes [..., feature], ``len(STRATA)`` where it has none; edges [2, feature]."""
    return np.where(np.isnan(edges[0]), len(STRATA), (total >= edges[0]) + (total >= edges[1]).astype(np.int64))


def _drawn_counts(
    x: FloatArray, present: NDArray[np.bool_], margin: FloatArray, edges: FloatArray, settings: StabilizationSettings
) -> tuple[FloatArray, FloatArray]:
    """Number of features settled by the reference or a checkpoint [draw, 0..last, stratum], and of all [draw, stratum].

    Units are drawn among all, so that runs that lack some share the draws of the others.
    """
    last, width = len(x) - 1, len(STRATA) + 1  # the last column holds features that are not tested
    from_end = x[:-1] - x[-1]
    counts = []
    for _, weights in bootstrap_blocks(len(present), settings.n_bootstrap, seed=settings.seed):
        weights = weights[:, present]
        weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1.0)
        distance = np.abs(weights @ from_end)  # [0..last - 1, draw, feature]
        first = _first_accepted(distance < (settings.margin * distance[0] if settings.relative else margin))
        first = np.where(first > last - settings.last_ones, last + 1, first)
        cell = first * width + _stratum(distance[0], edges)
        cell += np.arange(len(weights))[:, None] * (last + 2) * width
        counts.append(np.bincount(cell.reshape(-1), minlength=len(weights) * (last + 2) * width))
    table = np.concatenate(counts).reshape(settings.n_bootstrap, last + 2, width)[..., :-1].astype(np.float64)
    return np.cumsum(table[:, :-1], axis=1), table.sum(axis=1)


def share_curves(run: _RunResults, settings: StabilizationSettings) -> tuple[da.Array, da.Array, da.Array]:
    """Expected shares with bands, of all features [3, checkpoint, 1] and of each stratum [3, checkpoint, stratum].

    Last, the replicates of the second [replicate, checkpoint, stratum].
    """
    n, n_strata = len(run.steps) - 1, len(STRATA)
    n_replicates = _n_groups(settings.n_units)
    rows = da.from_delayed(
        dask.delayed(_curves, pure=True)(_whole(run.settled), _whole(run.drawn), settings),
        (3 + n_replicates, n, 1 + n_strata),
        dtype=np.float64,
    )
    return rows[:3, :, :1], rows[:3, :, 1:], rows[3:, :, 1:]


def _curves(settled: FloatArray, drawn: FloatArray, settings: StabilizationSettings) -> FloatArray:
    """Estimate, low, high and replicates of the shares, [3 + replicate, checkpoint, all + stratum]."""
    settled, drawn = (np.concatenate([x.sum(axis=-1, keepdims=True), x], axis=-1) for x in (settled, drawn))
    estimate, replicates = _bagged(_share(settled[:, 1:], drawn[:, None]), settings)
    bounds = delete_group_jackknife(replicates, estimate, alpha=settings.alpha)
    band = np.clip([estimate, bounds.low, bounds.high], 0.0, 1.0)
    return np.concatenate([band, replicates])


def _bagged(draws: FloatArray, settings: StabilizationSettings) -> tuple[FloatArray, FloatArray]:
    """Mean over draws of units and its jackknife replicates [group, ...], from ``draws`` [draw, ...].

    The draws' groups of units, and so the replicates, are the same for all runs.
    """
    n_groups = _n_groups(settings.n_units)
    group = np.random.default_rng(settings.seed).permutation(settings.n_units) % n_groups
    blocks = bootstrap_blocks(settings.n_units, settings.n_bootstrap, seed=settings.seed)
    counts = np.concatenate([weights @ np.eye(n_groups)[group] for _, weights in blocks])
    return bagged_replicates(draws, counts)


def _n_groups(n_units: int) -> int:
    return max(2, min(N_GROUPS, n_units // 2))


def arm_difference(arms: list[list[_RunResults]], settings: StabilizationSettings) -> da.Array:
    """First of two arms less the second: mean time to stability in the strata.

    Returns
    -------
    dask array [estimate low high p, stratum]
    """
    counts = [[(_whole(run.settled), _whole(run.drawn)) for run in arm] for arm in arms]
    shares = [[training_share(np.array(run.steps)) for run in arm] for arm in arms]
    delayed = dask.delayed(_difference, pure=True)(counts, shares, settings)
    return da.from_delayed(delayed, (4, len(STRATA)), dtype=np.float64)


def training_share(steps: NDArray[np.generic]) -> FloatArray:
    """Steps as a share of the last one, so that runs of different length can be laid over each other."""
    return np.asarray(steps, dtype=np.float64) / max(float(np.max(steps, initial=1)), 1.0)


def mean_time(training: FloatArray, settled: FloatArray) -> FloatArray:
    """Area over the curve of settled shares [..., checkpoint], a straight line between checkpoints, 0 at the start.

    Examples
    --------
    >>> mean_time(np.array([0.2, 0.6, 1.0]), np.array([0.5, 1.0, 1.0]))
    np.float64(0.25)
    """
    nodes, zeros = np.concatenate([[0.0], training]), np.zeros_like(settled[..., :1])
    return np.asarray(1 - np.trapezoid(np.concatenate([zeros, settled], axis=-1), nodes, axis=-1))[()]


def _whole(array: da.Array) -> Any:
    """The array as one delayed value; an array handed to a delayed call would be computed once more, apart."""
    return array.rechunk(-1).to_delayed(optimize_graph=False).reshape(-1)[0]


def _share(settled: NDArray[Any], size: NDArray[Any]) -> FloatArray:
    """Quotient; NaN for a stratum without features in some draw."""
    return np.asarray(settled / np.where(size > 0, size, np.nan))


def _difference(
    counts: list[list[tuple[FloatArray, FloatArray]]], shares: list[list[FloatArray]], settings: StabilizationSettings
) -> FloatArray:
    """Runs of an arm have equal weight; the draws of units are the same for both arms."""
    arms = [
        np.stack([mean_time(t[1:], np.moveaxis(_share(s[:, 1:], n[:, None]), 1, -1)) for (s, n), t in pairs])
        for pairs in (list(zip(runs, times, strict=True)) for runs, times in zip(counts, shares, strict=True))
    ]  # each [run, draw, stratum]
    for times in arms:
        times[..., 0] = np.nan  # what never left the margin has no time
    estimate, replicates = _bagged(arms[0].mean(axis=0) - arms[1].mean(axis=0), settings)
    bounds = delete_group_jackknife(replicates, estimate, alpha=settings.alpha)
    p = np.full(len(STRATA), np.nan)
    if min(map(len, arms)) >= MIN_RUNS:
        each = [times.mean(axis=1) for times in arms]
        test = stats.permutation_test(each, _mean_difference, n_resamples=PERMUTATIONS, rng=0)
        p = np.where(np.isfinite(estimate), test.pvalue, np.nan)
    return np.stack([estimate, np.clip(bounds.low, -1, 1), np.clip(bounds.high, -1, 1), p])


def _mean_difference(first: FloatArray, second: FloatArray, axis: int) -> FloatArray:
    return np.asarray(first.mean(axis=axis) - second.mean(axis=axis))
