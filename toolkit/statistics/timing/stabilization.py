"""Stabilisation: the checkpoint from which each feature stops changing (claim C2, feature by feature)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import ARM, BASE_MODEL, FEATURE, MODEL, TRAINED_RUN, split_model_id
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.core.comparability import source_attrs
from rlgen_stats.toolkit.statistics.core.coordinates import feature_coord, model_coords, run_models
from rlgen_stats.toolkit.statistics.core.feature_blocks import (
    DEFAULT_MIN_FIRING,
    feature_arrays,
    finish,
    in_prompt_order,
    map_features,
)
from rlgen_stats.toolkit.statistics.core.units import check_clusters, check_unit, cluster_codes, unit_attrs
from rlgen_stats.toolkit.statistics.kernels import adjust
from rlgen_stats.toolkit.statistics.timing.stabilization_bands import FRACTIONS, compared, curves
from rlgen_stats.toolkit.statistics.timing.stabilization_blocks import (
    BY_CHECKPOINT,
    BY_FEATURE,
    FLAGS,
    STRATA,
    Settings,
    stabilization_block,
)

__all__ = ["FLAGS", "STRATA", "stabilization_test"]

DEFAULT_MARGINS: Final = {False: 0.2, True: 0.25}
"""Standard deviations of the reference, or, if relative, share of the total change (METHOD.md 4b)."""


def stabilization_test(
    features: xr.Dataset,
    *,
    runs: Sequence[str],
    reference: str = BASE_MODEL,
    margin: float | None = None,
    relative: bool = False,
    persist: int = 3,
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
        Stabilising only within the last ``persist`` checkpoints is NOT_STABILISED.
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
        ``share`` settled, with band; [model, stratum]: ``share_in_stratum`` with band; ``n_testable`` [trained_run],
        ``n_in_stratum`` [trained_run, stratum]. With two arms, [fraction, stratum]: ``difference_in_stratum`` with
        interval and, with four or more runs each, ``difference_in_stratum_p``.

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
    NOT_STABILISED is neither shown. Not corrected over features: use ``adjust_pvalues`` for a list of them.

    *Trend.* Kendall's tau of each unit over reference and checkpoints, averaged; sign flips over units, so checkpoints
    are no replicates; ``trend_q`` by BH over the run's features. It is of this run.

    *Shares.* ``share`` at c is the share of testable features with ``stabilized_at`` <= c; other features never count,
    so it does not reach 1 by construction. Bands come from resampling units, all features, checkpoints and runs
    together, with reference spread and strata held fixed, re-centred on the estimate because resampled differences
    carry their sampling noise twice; pointwise, not simultaneous. ``difference_in_stratum`` is the mean over runs of
    the first arm less that of the second, at a fraction of each run's steps and among features of like total change:
    weaker changes settle earlier whoever made them. With one run an arm its interval is about these two runs, not
    about training methods (attribute ``comparison``).

    References
    ----------
    Schuirmann 1987, doi:10.1007/BF01068419; Maurer, Hothorn and Lehmacher 1995 (a priori ordered hypotheses); Mann
    1945, doi:10.2307/1907187.

    Examples
    --------
    >>> stabilization_test(open_features(path), runs=["sft", "rl"])  # doctest: +SKIP
    """
    check_unit(unit, allow_token_unit)
    margin = DEFAULT_MARGINS[relative] if margin is None else margin
    _check(runs, margin, relative, persist, alpha)
    features = in_prompt_order(features, repeated=unit == "token")
    codes = cluster_codes(features, clusters)
    check_clusters(codes)
    chains = {run: _checkpoints(features, run, reference) for run in runs}
    models = [model for own in chains.values() for model in own]
    settings = Settings(
        margin, relative, persist, alpha, n_min, codes, derive_seed(seed, "stabilization_test"), n_bootstrap
    )  # fmt: skip
    lazy, found = False, {}
    for run, own in chains.items():
        arrays, is_lazy = feature_arrays(features, [variable, "firing"], [reference, *own])
        lazy = lazy or is_lazy
        found[run] = _one_run(arrays, own, settings)
    labels = model_coords(features, models)
    variables, comparison = _collect(found, _arms(labels, chains), alpha)
    coords: dict[str, Any] = labels | feature_coord(features)
    coords |= {name: (name, np.array(values)) for name, values in _COORDS.items()}
    coords |= {TRAINED_RUN: (TRAINED_RUN, np.array(list(chains), dtype=np.str_))}
    attrs = {"margin": margin, "margin_unit": "share of the total change" if relative else f"sd of {reference}"}
    attrs |= {"persist": persist, "reference": reference, "variable": variable, "n_min": n_min, "alpha": alpha}
    attrs |= {"seed": seed, "n_bootstrap": n_bootstrap} | comparison | _ATTRS
    attrs |= source_attrs(features) | unit_attrs(unit, clusters, codes)
    return finish(xr.Dataset(variables, coords=coords, attrs=attrs), lazy)


_COORDS: Final = {"stratum": STRATA, "fraction": FRACTIONS}

_ATTRS: Final = {
    "test": "paired two one-sided t tests, fixed sequence from the last checkpoint backwards",
    "null": "the mean differs from the final checkpoint's by at least the margin",
    "family": "checkpoints of one feature (fixed sequence); trend_q: features of one run",
}


def _check(runs: Sequence[str], margin: float, relative: bool, persist: int, alpha: float) -> None:
    if margin <= 0 or (relative and margin >= 1) or persist < 0 or not 0 < alpha < 1 or not runs:
        raise InputError(
            f"expected at least one run, margin > 0 (below 1 if relative), persist >= 0 and 0 < alpha < 1; got "
            f"runs={list(runs)}, margin={margin}, persist={persist}, alpha={alpha}."
        )


def _checkpoints(features: xr.Dataset, run: str, reference: str) -> list[str]:
    models = [model for model in run_models(features, run) if model != reference]
    if len(models) < 2:
        raise InputError(f"run {run!r} has {len(models)} checkpoint; stabilisation needs at least two.")
    return models


@dataclass(frozen=True)
class _Run:
    """Lazy results of one run."""

    steps: list[int]
    """Of the reference (0) and the checkpoints."""
    by_checkpoint: dict[str, da.Array]
    by_feature: dict[str, da.Array]
    settled: da.Array
    """[1 + draw, reference + checkpoint, stratum]: how many features are settled, the estimate first."""
    in_stratum: da.Array


def _one_run(arrays: list[da.Array], models: list[str], settings: Settings) -> _Run:
    steps = [0, *(split_model_id(model)[1] for model in models)]
    mapped = map_features(
        stabilization_block,
        arrays,
        outputs=dict.fromkeys(BY_CHECKPOINT, (len(models),)) | dict.fromkeys(BY_FEATURE, ()),
        states={
            "settled": ((1 + settings.n_bootstrap, len(steps), len(STRATA)), da.sum),
            "in_stratum": ((len(STRATA),), da.sum),
        },
        settings=settings,
        steps=steps,
    )
    by_feature = {name: mapped.features[name] for name in BY_FEATURE}
    by_feature["trend_q"] = da.map_blocks(_bh, by_feature["trend_p"].rechunk(-1), dtype=np.float64)
    return _Run(
        steps,
        {name: mapped.features[name] for name in BY_CHECKPOINT},
        by_feature,
        mapped.states["settled"],
        mapped.states["in_stratum"],
    )


def _bh(p: NDArray[Any]) -> NDArray[Any]:
    return adjust(p, method="bh")


def _arms(labels: dict[str, Any], chains: dict[str, list[str]]) -> dict[str, list[str]]:
    """Runs of each arm, arms in order of their first run."""
    arm_of = dict(zip(labels[MODEL][1].tolist(), labels[ARM][1].tolist(), strict=True))
    arms: dict[str, list[str]] = {}
    for run, models in chains.items():
        arms.setdefault(arm_of[models[0]], []).append(run)
    return arms


def _collect(
    found: dict[str, _Run], arms: dict[str, list[str]], alpha: float
) -> tuple[dict[str, tuple[Any, da.Array]], dict[str, Any]]:
    """Variables of the layout (``trained_run`` is the dimension of runs, ``run`` labels the models), and attributes."""
    runs = list(found.values())
    bands = [curves(run.settled, run.in_stratum, alpha) for run in runs]
    everyone, strata = (da.concatenate(column, axis=1) for column in zip(*bands, strict=True))
    sizes = da.stack([run.in_stratum for run in runs]).astype(np.int64)
    out: dict[str, tuple[Any, da.Array]] = {
        name: ((MODEL, FEATURE), da.concatenate([run.by_checkpoint[name] for run in runs])) for name in BY_CHECKPOINT
    }
    for name in (*BY_FEATURE, "trend_q"):
        out[name] = ((TRAINED_RUN, FEATURE), da.stack([run.by_feature[name] for run in runs]))
    out["flag"] = ((TRAINED_RUN, FEATURE), da.map_blocks(_name_flags, out["flag"][1], dtype=_FLAG_TYPE))
    out |= {"n_testable": (TRAINED_RUN, sizes.sum(axis=1)), "n_in_stratum": ((TRAINED_RUN, "stratum"), sizes)}
    for i, end in enumerate(("", "_low", "_high")):
        out[f"share{end}"] = (MODEL, everyone[i])
        out[f"share_in_stratum{end}"] = ((MODEL, "stratum"), strata[i])
    if len(arms) != 2:
        return out, {}
    sides = [[(found[run].settled, found[run].in_stratum, found[run].steps) for run in own] for own in arms.values()]
    difference = compared(sides, alpha)
    for i, end in enumerate(("", "_low", "_high", "_p")):
        out[f"difference_in_stratum{end}"] = (("fraction", "stratum"), difference[i])
    first, second = arms
    what = "these two runs" if len(found) == 2 else f"{len(arms[first])} and {len(arms[second])} runs"
    return out, {"comparison": f"{first} less {second}, {what}; interval over units, p-value over runs"}


_FLAG_TYPE: Final = np.array(FLAGS).dtype


def _name_flags(codes: NDArray[Any]) -> NDArray[np.str_]:
    return np.array(FLAGS)[codes.astype(np.int64)]
