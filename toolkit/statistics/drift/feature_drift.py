"""Drift: which features differ between models on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import dask.array as da
import numpy as np
import xarray as xr

from rlgen_stats.schemas.dims import BASE_MODEL, FEATURE, MODEL, PROMPT
from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.core.comparability import source_attrs
from rlgen_stats.toolkit.statistics.core.coordinates import feature_coord, model_coords
from rlgen_stats.toolkit.statistics.core.feature_blocks import (
    DEFAULT_MIN_FIRING,
    Mapped,
    feature_arrays,
    finish,
    in_prompt_order,
    map_features,
)
from rlgen_stats.toolkit.statistics.core.units import check_clusters, check_unit, cluster_codes, unit_attrs
from rlgen_stats.toolkit.statistics.drift.drift_blocks import COUNTS, THRESHOLDS, WILD_RESAMPLES, Settings, drift_block
from rlgen_stats.toolkit.statistics.drift.drift_family import (
    CALLS,
    CORRECTIONS,
    FLAGS,
    Family,
    correct,
    decisions,
    false_discoveries,
)
from rlgen_stats.toolkit.statistics.kernels.flips.flip_table import flip_count

__all__ = ["CALLS", "DEFAULT_MARGIN", "FLAGS", "drift_test"]

DEFAULT_MARGIN: Final = 0.2
"""Equivalence margin in standard deviations of the reference over units: the smallest effect called small."""

WILD_CLUSTERS: Final = range(6, 12)
"""Numbers of clusters for which the wild bootstrap is meant: with more the sign flip is fine-grained, and exact."""

NULLS: Final = {
    "exchangeable": "labels exchangeable given the prompt (D symmetric about 0)",
    "mean": "the mean of D is 0",
}


def drift_test(
    features: xr.Dataset,
    *,
    models: Sequence[str],
    reference: str = BASE_MODEL,
    variable: str = "mean",
    clusters: str | None = None,
    family: Sequence[str] = (MODEL, FEATURE),
    correction: str = "bh",
    null: str = "exchangeable",
    alpha: float = 0.05,
    margin: float = DEFAULT_MARGIN,
    n_resamples: int = 999,
    n_bootstrap: int = 999,
    n_min: int = DEFAULT_MIN_FIRING,
    histograms: bool = False,
    seed: int = 0,
    unit: str = "prompt",
    allow_token_unit: bool = False,
) -> xr.Dataset:
    """Test every feature of every model against the reference, prompt by prompt, with errors controlled over a family.

    Parameters
    ----------
    features
        Layout ``features``. Lazy in, lazy out: nothing is read before the result is computed.
    models, reference
        Model ids.
    variable
        Summary compared: mean, firing or max.
    clusters
        Label of dependent prompts; the prompts of a cluster are averaged into one unit.
    family, correction
        Dimensions one correction spans: ``("model", "feature")``, or ``("feature",)`` for one family a model; bh, by,
        storey or bky.
    null
        ``"exchangeable"``: sign flips, exact. ``"mean"``: wild bootstrap over 6 to 11 clusters, where flips have a high
        floor (``p_floor``); not exact.
    alpha
        Level of the tests and 1 - coverage of the intervals.
    margin
        Equivalence margin for NO_DRIFT, in standard deviations of the reference over units.
    n_resamples, n_bootstrap
        Joint sign flips, rounded up to 2^m - 1; draws of the bootstrap-t.
    n_min
        Prompts, pooled over model and reference, on which a testable feature fires.
    histograms
        Whether to compare the token histograms too (``token_distance``, ``p_wasserstein``, ``q_wasserstein``); the
        features must hold them. These p-values are at least 1 / (n_resamples + 1): a large family needs more flips.
    seed
        Seed of flips and draws; results depend neither on chunks nor on the order of prompts.
    unit, allow_token_unit
        ``"prompt"``; ``"token"`` only if explicitly allowed, and then recorded as a warning.

    Returns
    -------
    xr.Dataset
        Layout ``drift`` [model, feature]: ``statistic`` (sum D / sqrt(sum D^2)), ``effect`` (mean D) with bootstrap-t
        bounds (NaN below ten differences), ``p_value``, ``p_max_t`` (family-wise, single step), ``q_value``, ``n``
        (units), ``d_z``, ``firing_change`` (points), ``from_firing`` and ``from_magnitude`` (they add up to ``effect``;
        only of ``variable="mean"``), ``magnitude_change`` (where it fires), ``wasserstein`` (between the prompts'
        values), ``call``, ``flag``. [model, threshold]: ``n_beyond``, features beyond a statistic, and ``fdp_upper``,
        the largest false share among them (confidence 1 - alpha, a model, all thresholds at once). Also
        ``p_equivalence``, ``q_equivalence``, ``n_nonzero``, ``fired`` [model, feature] and ``n_tested`` [model].

    Raises
    ------
    RefusedError
        For ``unit="token"``, fewer than six clusters, or a family that leaves the features uncorrected.
    InputError
        If a model, variable or label is unknown or a setting is out of range.

    Notes
    -----
    Null: given the prompt, the two labels are exchangeable, so D is symmetric about 0. Exact for any number of prompts;
    not a test of E[D] = 0 for skewed D. Features below ``n_min`` are NaN and in no family; the filter looks at the
    pooled count only. max-T flips all features of a model together and takes Bonferroni over models when the family
    includes them: one common flip of several models against one reference is not exact. Calls: DRIFT if
    ``q_value`` <= alpha; else NO_DRIFT if two one-sided t tests, corrected over the same family, place the mean within
    the margin, or if the model is identical on every prompt; else UNDETERMINED. ``family_size`` counts the family's
    cells, ``n_tested`` those with a p-value.

    References
    ----------
    Westfall and Young 1993; Benjamini and Hochberg 1995, doi:10.1111/j.2517-6161.1995.tb02031.x; Schuirmann 1987,
    doi:10.1007/BF01068419; false shares: Hemerik and Goeman 2018, doi:10.1111/rssb.12238; wild bootstrap: Webb 2023,
    doi:10.1111/caje.12661.

    Examples
    --------
    >>> drift = drift_test(open_features(path), models=["sft@60", "rl@80"])  # doctest: +SKIP
    >>> (drift.call == "DRIFT").sum("feature").compute()  # doctest: +SKIP
    """
    check_unit(unit, allow_token_unit)
    _check(family, correction, null, alpha, margin, n_min, reference, models)
    features = in_prompt_order(features, repeated=unit == "token")
    codes = cluster_codes(features, clusters)
    check_clusters(codes)
    n_units = features.sizes[PROMPT] if codes is None else len(np.unique(codes))
    _check_null(null, n_units, codes is not None)
    if histograms and "histogram" not in features:
        raise InputError("the features hold no histograms; encode them with summaries: {histograms: true}.")
    settings = Settings(
        alpha, margin, n_min, n_resamples, n_bootstrap, codes, derive_seed(seed, "drift_test"), null == "mean",
        variable == "mean", histograms,
    )  # fmt: skip
    arrays, lazy = feature_arrays(features, [variable, "firing"], [reference, *models])
    if histograms:
        arrays.append(_histogram_array(features, [reference, *models], arrays[0]))
    n_models, n_flips = len(models), flip_count(n_units, n_resamples)
    mapped = map_features(
        drift_block,
        arrays,
        outputs=dict.fromkeys(settings.outputs, (n_models,)),
        states={
            "maxima": ((n_models, n_flips), da.max),
            "exceedances": ((n_models, len(THRESHOLDS), n_flips), da.sum),
        },
        settings=settings,
    )
    rule = Family(MODEL in family, correction, alpha, n_min)
    out = xr.Dataset(
        _variables(mapped, rule),
        coords=model_coords(features, models)
        | feature_coord(features)
        | {"threshold": ("threshold", np.array(THRESHOLDS))},
        attrs=_attrs(rule, (n_models, features.sizes[FEATURE]), reference, variable, null, n_units)
        | source_attrs(features)
        | unit_attrs(unit, clusters, codes)
        | {"alpha": alpha, "margin": margin, "n_min": n_min, "n_resamples": n_flips - 1, "n_bootstrap": n_bootstrap}
        | {"seed": seed},
    )
    return finish(out, lazy)


def _variables(mapped: Mapped, rule: Family) -> dict[str, tuple[tuple[str, ...], da.Array]]:
    """What the blocks found, and what is decided over the whole family."""
    own = mapped.features
    cells = {name: array.astype(np.int64) if name in COUNTS else array for name, array in own.items()}
    cells |= decisions(own, mapped.states["maxima"], rule)
    if "p_wasserstein" in own:
        cells["q_wasserstein"] = correct(own["p_wasserstein"], rule)
    bounds = false_discoveries(mapped.states["exceedances"], rule.alpha)
    return (
        {name: ((MODEL, FEATURE), array) for name, array in cells.items()}
        | {name: ((MODEL, "threshold"), array) for name, array in bounds.items()}
        | {"n_tested": ((MODEL,), da.isfinite(own["p_value"]).sum(axis=1))}
    )


def _histogram_array(features: xr.Dataset, models: Sequence[str], like: da.Array) -> da.Array:
    """Histograms [model, prompt, feature, bin], chunked over features as ``like``; the bins ride on the last axis."""
    values = features["histogram"].sel({MODEL: list(models)}).transpose(MODEL, PROMPT, FEATURE, ...).data
    return da.asarray(values).rechunk((-1, -1, like.chunks[-1], -1))


def _check(
    family: Sequence[str],
    correction: str,
    null: str,
    alpha: float,
    margin: float,
    n_min: int,
    reference: str,
    models: Sequence[str],
) -> None:
    if isinstance(family, str) or not set(family) <= {MODEL, FEATURE}:
        raise InputError(f"family names the dimensions {MODEL!r} and {FEATURE!r} in a tuple, got {family!r}.")
    if FEATURE not in family:
        raise RefusedError(
            f"family={tuple(family)!r} would leave the features uncorrected; "
            f"use ({MODEL!r}, {FEATURE!r}), or ({FEATURE!r},) for one family a model."
        )
    if correction not in CORRECTIONS or null not in NULLS:
        raise InputError(
            f"expected a correction of {list(CORRECTIONS)} and a null of {list(NULLS)}; got {correction!r}, {null!r}."
        )
    if not 0 < alpha < 1 or margin <= 0 or n_min < 1:
        raise InputError(
            f"expected 0 < alpha < 1, margin > 0 and n_min >= 1; got alpha={alpha}, margin={margin}, n_min={n_min}."
        )
    if reference in models:
        raise InputError(f"models include the reference {reference!r}; name only the models to compare with it.")


def _check_null(null: str, n_units: int, clustered: bool) -> None:
    if null == "mean" and not (clustered and n_units in WILD_CLUSTERS):
        raise InputError(
            f"null='mean' is for {WILD_CLUSTERS[0]} to {WILD_CLUSTERS[-1]} clusters, where sign flips are few; got "
            f"{n_units} {'clusters' if clustered else 'prompts without clusters'}; use null='exchangeable'."
        )


def _attrs(
    family: Family, shape: tuple[int, ...], reference: str, variable: str, null: str, n_units: int
) -> dict[str, Any]:
    n_models, n_features = shape
    test = "sign flip" if null == "exchangeable" else f"wild cluster bootstrap ({WILD_RESAMPLES} draws)"
    floor = 2.0 ** (1 - n_units) if null == "exchangeable" else 1 / (WILD_RESAMPLES + 1)
    return {
        "test": f"{test} of per-unit differences; joint max-T; {family.correction.upper()}",
        "null": NULLS[null],
        "p_floor": floor,
        "family": f"{MODEL} x {FEATURE}" if family.by_model else FEATURE,
        "family_size": n_models * n_features if family.by_model else n_features,
        "reference": reference,
        "variable": variable,
        "margin_unit": f"standard deviations of {reference} over units",
        "max_t": "single step, joint over features" + (", Bonferroni over models" if family.by_model else ""),
    }
