"""Feature drift: which features differ between models on the same prompts.

In reading order: the public test, checks of its settings, the tests of one block of features (everything that needs no
other feature), and the decisions that need the whole family (corrected p-values, calls, bounds of false discoveries).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from rlgen_stats.schemas.dims import BASE_MODEL, FEATURE, MODEL, PROMPT
from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.core.comparability import source_attrs
from rlgen_stats.toolkit.statistics.core.coordinates import compared_models, feature_coord, model_coords
from rlgen_stats.toolkit.statistics.core.feature_blocks import (
    DEFAULT_MIN_FIRING,
    Block,
    Mapped,
    feature_arrays,
    finish,
    in_prompt_order,
    map_features,
)
from rlgen_stats.toolkit.statistics.core.units import check_clusters, check_unit, cluster_codes, unit_attrs, unit_means
from rlgen_stats.toolkit.statistics.kernels import (
    adjust,
    bootstrap_t,
    max_t,
    max_t_p_value,
    minimum_effect_test,
    sign_flip_test,
)
from rlgen_stats.toolkit.statistics.kernels.effects import hurdle, paired_wasserstein
from rlgen_stats.toolkit.statistics.kernels.flips.flip_table import flip_count
from rlgen_stats.toolkit.statistics.kernels.flips.histogram import histogram_flip_test
from rlgen_stats.toolkit.statistics.kernels.flips.wild import wild_cluster_bootstrap
from rlgen_stats.toolkit.statistics.kernels.multiplicity.fdp import fdp_bound
from rlgen_stats.toolkit.statistics.kernels.numerics import ROUNDING, FloatArray, IntArray
from rlgen_stats.toolkit.statistics.kernels.unit_tables import feature_blocks

__all__ = ["CALLS", "DEFAULT_MARGIN", "FLAGS", "drift_test"]

DEFAULT_MARGIN: Final = 0.2
"""Least effect that counts as drift, in standard deviations over units: the smallest that is called small (Cohen). The
codes of a dictionary leak: features that did not change move by .03 to .07 of these (median; benchmarks/README.md)."""

WILD_CLUSTERS: Final = range(6, 12)
"""Numbers of clusters for which the wild bootstrap is meant: with more the sign flip is fine-grained, and exact."""

WILD_RESAMPLES: Final = 9999
"""Draws of the wild bootstrap: cheap, since clusters are few, and the smallest p-value is 1 / (draws + 1)."""

THRESHOLDS: Final = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0)
"""Statistics beyond which false discoveries are bounded; fixed beforehand, about normal quantiles (p = .05 to 1e-9)."""

CALLS: Final = ("DRIFT", "NO_DRIFT", "UNDETERMINED", "UNTESTABLE")

FLAGS: Final = ("ok", "untestable", "identical", "below_margin")
"""In order: nothing to note; fires on too few prompts; equal in both models on every prompt; shown to differ, but not
by more than the margin."""

CORRECTIONS: Final = ("bh", "by", "storey", "bky")

NULLS: Final = {
    "exchangeable": "labels exchangeable given the prompt (D symmetric about 0)",
    "mean": "the mean of D is 0",
}

COUNT_RESULTS: Final = ("n", "n_nonzero", "fired")
HURDLE_RESULTS: Final = ("from_firing", "from_magnitude", "magnitude_change")
HISTOGRAM_RESULTS: Final = ("token_distance", "p_wasserstein")
FAMILY_RESULTS: Final = ("p_max_t", "q_value", "q_minimum", "q_equivalence", "call", "flag")


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
        Dimensions one correction spans: ``("model", "feature")``, or ``("feature",)`` for one family per model; bh, by,
        storey or bky.
    null
        ``"exchangeable"``: sign flips, exact. ``"mean"``: wild bootstrap over 6 to 11 clusters, where flips have a high
        floor (``p_floor``); not exact.
    alpha
        Level of the tests and 1 - coverage of the intervals.
    margin
        Smallest effect that counts as DRIFT, in spreads (``effect_sd``), and largest that counts as NO_DRIFT, in
        standard deviations of the reference over units.
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
        bounds (NaN below ten differences), ``effect_sd`` (in spreads: standard deviations over units of the reference,
        or of both models pooled where that is larger), ``p_value``, ``p_max_t`` (family-wise, single step),
        ``q_value``, ``p_minimum`` and ``q_minimum`` (of an effect within the margin), ``n`` (units), ``d_z``,
        ``firing_change`` (points), ``from_firing`` and ``from_magnitude`` (they add up to ``effect``; only of
        ``variable="mean"``), ``magnitude_change`` (where it fires), ``wasserstein`` (between the prompts' values),
        ``call``, ``flag``. [model, threshold]: ``n_beyond``, features beyond a statistic, and ``fdp_upper``, upper
        bound of the false discovery proportion among them (confidence 1 - alpha for each model, simultaneous over
        thresholds). Also ``p_equivalence``, ``q_equivalence``, ``n_nonzero``, ``fired`` [model, feature],
        ``n_tested`` and ``typical_effect`` [model] (median |effect_sd|).

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
    ``q_value`` and ``q_minimum`` <= alpha: it differs, and by more than the margin. Else NO_DRIFT if two one-sided t
    tests, corrected over the same family, place the mean within the margin, or if the model is identical on every
    prompt; else UNDETERMINED. ``p_minimum`` is the larger of ``p_value`` and of the p-value of
    :func:`~rlgen_stats.toolkit.statistics.kernels.minimum_effect_test`, so that ``q_minimum`` controls the false
    discoveries of both claims together. With enough prompts, features that did not change differ too, by what the
    dictionary's codes leak; flag ``below_margin`` says so. Where ``typical_effect`` exceeds a third of the margin, most
    features moved, or the codes leak too much for it: where the truth was known, 2 to 80% of the features that did not
    change then exceeded the margin (benchmarks/README.md). ``family_size`` counts the family's cells, ``n_tested``
    those with a p-value.

    References
    ----------
    Westfall and Young 1993; Benjamini and Hochberg 1995, doi:10.1111/j.2517-6161.1995.tb02031.x; Schuirmann 1987,
    doi:10.1007/BF01068419; minimum effects: Murphy and Myors 1999, doi:10.1037/0021-9010.84.2.234; false discovery
    proportions: Hemerik and Goeman 2018, doi:10.1111/rssb.12238; wild bootstrap: Webb 2023, doi:10.1111/caje.12661.

    Examples
    --------
    >>> drift = drift_test(open_features(path), models=["sft@60", "rl@80"])  # doctest: +SKIP
    >>> (drift.call == "DRIFT").sum("feature").compute()  # doctest: +SKIP
    """
    check_unit(unit, allow_token_unit)
    reference, models = compared_models(features, reference, models)
    _check_settings(family, correction, null, alpha, margin, n_min)
    features = in_prompt_order(features, repeated=unit == "token")
    codes = cluster_codes(features, clusters)
    check_clusters(codes)
    n_units = features.sizes[PROMPT] if codes is None else len(np.unique(codes))
    _check_null(null, n_units, codes is not None)
    if histograms and "histogram" not in features:
        raise InputError("the features hold no histograms; encode them with summaries: {histograms: true}.")
    settings = DriftSettings(
        alpha=alpha,
        margin=margin,
        n_min=n_min,
        n_resamples=n_resamples,
        n_bootstrap=n_bootstrap,
        codes=codes,
        seed=derive_seed(seed, "drift_test"),
        wild=null == "mean",
        split_change=variable == "mean",
        histograms=histograms,
    )
    n_flips = flip_count(n_units, n_resamples)
    mapped, lazy = _map_blocks(features, [reference, *models], variable, n_flips, settings)
    rule = FamilyRule(MODEL in family, correction, alpha, n_min)
    out = xr.Dataset(
        _variables(mapped, rule),
        coords=model_coords(features, models)
        | feature_coord(features)
        | {"threshold": ("threshold", np.array(THRESHOLDS))},
        attrs=_attrs(rule, (len(models), features.sizes[FEATURE]), reference, variable, null, n_units)
        | source_attrs(features)
        | unit_attrs(unit, clusters, codes)
        | {"alpha": alpha, "margin": margin, "n_min": n_min, "n_resamples": n_flips - 1, "n_bootstrap": n_bootstrap}
        | {"seed": seed},
    )
    return finish(out, lazy)


def _check_settings(
    family: Sequence[str],
    correction: str,
    null: str,
    alpha: float,
    margin: float,
    n_min: int,
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


def _check_null(null: str, n_units: int, clustered: bool) -> None:
    if null == "mean" and not (clustered and n_units in WILD_CLUSTERS):
        raise InputError(
            f"null='mean' is for {WILD_CLUSTERS[0]} to {WILD_CLUSTERS[-1]} clusters, where sign flips are few; got "
            f"{n_units} {'clusters' if clustered else 'prompts without clusters'}; use null='exchangeable'."
        )


def _attrs(
    rule: FamilyRule, shape: tuple[int, ...], reference: str, variable: str, null: str, n_units: int
) -> dict[str, Any]:
    n_models, n_features = shape
    test = "sign flip" if null == "exchangeable" else f"wild cluster bootstrap ({WILD_RESAMPLES} draws)"
    floor = 2.0 ** (1 - n_units) if null == "exchangeable" else 1 / (WILD_RESAMPLES + 1)
    return {
        "test": f"{test} of per-unit differences; joint max-T; {rule.correction.upper()}",
        "null": NULLS[null],
        "p_floor": floor,
        "family": f"{MODEL} x {FEATURE}" if rule.by_model else FEATURE,
        "family_size": n_models * n_features if rule.by_model else n_features,
        "reference": reference,
        "variable": variable,
        "margin_unit": f"standard deviations over units of {reference} (DRIFT: or of both models, if larger)",
        "max_t": "single step, joint over features" + (", Bonferroni over models" if rule.by_model else ""),
    }


def _map_blocks(
    features: xr.Dataset, models: list[str], variable: str, n_flips: int, settings: DriftSettings
) -> tuple[Mapped, bool]:
    """Results of all blocks, lazily, and whether ``features`` were lazy; the first model is the reference."""
    arrays, lazy = feature_arrays(features, [variable, "firing"], models)
    if settings.histograms:
        arrays.append(_histogram_array(features, models, arrays[0]))
    n_compared = len(models) - 1
    mapped = map_features(
        drift_block,
        arrays,
        outputs=dict.fromkeys(settings.outputs, (n_compared,)),
        states={
            "maxima": ((n_compared, n_flips), da.max),
            "exceedances": ((n_compared, len(THRESHOLDS), n_flips), da.sum),
        },
        settings=settings,
    )
    return mapped, lazy


def _variables(mapped: Mapped, rule: FamilyRule) -> dict[str, tuple[tuple[str, ...], da.Array]]:
    """Results of the blocks, and what is decided over the whole family."""
    results = mapped.features
    by_feature = {name: array.astype(np.int64) if name in COUNT_RESULTS else array for name, array in results.items()}
    by_feature |= decisions(results, mapped.states["maxima"], rule)
    if "p_wasserstein" in results:
        by_feature["q_wasserstein"] = correct(results["p_wasserstein"], rule)
    by_threshold = false_discoveries(mapped.states["exceedances"], rule.alpha)
    return (
        {name: ((MODEL, FEATURE), array) for name, array in by_feature.items()}
        | {name: ((MODEL, "threshold"), array) for name, array in by_threshold.items()}
        | {"n_tested": ((MODEL,), da.isfinite(results["p_value"]).sum(axis=1))}
        | {"typical_effect": ((MODEL,), da.map_blocks(_typical, results["effect_sd"].rechunk(-1), drop_axis=1))}
    )


def _histogram_array(features: xr.Dataset, models: Sequence[str], like: da.Array) -> da.Array:
    """Histograms [model, prompt, feature, bin], chunked over features as ``like``, the bins whole."""
    values = features["histogram"].sel({MODEL: list(models)}).transpose(MODEL, PROMPT, FEATURE, ...).data
    return da.asarray(values).rechunk((-1, -1, like.chunks[-1], -1))


@dataclass(frozen=True, kw_only=True)
class DriftSettings:
    """Settings of one drift test, as every block needs them."""

    alpha: float
    margin: float
    n_min: int
    n_resamples: int
    n_bootstrap: int
    codes: IntArray | None
    """[prompt]: cluster of each prompt; None if prompts are the units."""
    seed: int
    wild: bool
    """Whether the p-value is that of the wild bootstrap over clusters."""
    split_change: bool
    """Whether changes are split into firing and magnitude."""
    histograms: bool

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the results per model and feature."""
        return (
            *("statistic", "effect", "effect_low", "effect_high", "p_value", "p_equivalence", "d_z"),
            *("effect_sd", "p_minimum"),
            *("firing_change", "wasserstein", *COUNT_RESULTS),
            *(HURDLE_RESULTS if self.split_change else ()),
            *(HISTOGRAM_RESULTS if self.histograms else ()),
        )


def drift_block(
    values: NDArray[Any], firing: NDArray[Any], histogram: NDArray[Any] | None = None, *, settings: DriftSettings
) -> Block:
    """All results of one block; ``values`` [reference + models, prompt, feature], ``histogram`` with bins last.

    A few features at a time, so that memory is that of the block as stored and no multiple of it.
    """
    parts = [
        _few_features(
            values[..., few], firing[..., few], None if histogram is None else histogram[..., few, :], settings
        )
        for few in feature_blocks(*values.shape[1:])
    ]
    joined = {name: np.concatenate([part[name] for part in parts], axis=-1) for name in settings.outputs}
    return joined | {
        "maxima": np.max([part["maxima"] for part in parts], axis=0),
        "exceedances": np.sum([part["exceedances"] for part in parts], axis=0),
    }


def _few_features(
    values: NDArray[Any], firing: NDArray[Any], histogram: NDArray[Any] | None, settings: DriftSettings
) -> Block:
    """Results of ``drift_block`` for features few enough to be worked on at once."""
    summarised = np.isfinite(values).all(axis=(0, 2))
    unit_of = np.arange(len(summarised)) if settings.codes is None else settings.codes
    # Units without a summary take no part, but keep their place so that flips do not depend on them.
    present = np.isin(np.arange(unit_of.max() + 1), unit_of[summarised])
    codes = None if settings.codes is None else settings.codes[summarised]

    def means(summary: NDArray[Any]) -> FloatArray:
        return unit_means(summary[summarised].astype(np.float64), codes)

    reference = means(values[0])
    reference_rate = means(firing[0]).mean(axis=0)
    reference_fired = (firing[0, summarised] > 0).sum(axis=0)
    rows: dict[str, list[Any]] = {name: [] for name in (*settings.outputs, "maxima", "exceedances")}
    for model in range(1, len(values)):
        x = means(values[model])
        fired = reference_fired + (firing[model, summarised] > 0).sum(axis=0)
        testable = fired >= settings.n_min
        row = _tests(_difference(x, reference), testable, present, settings)
        row |= _against_margin(x, reference, row, testable, settings)
        rate = means(firing[model]).mean(axis=0)
        row |= {
            "firing_change": 100.0 * (rate - reference_rate),
            "fired": fired,
            "n": np.full(len(testable), len(x)),
            "wasserstein": np.where(testable, paired_wasserstein(reference, x), np.nan),
        }
        if settings.split_change:
            split = hurdle(reference.mean(axis=0), x.mean(axis=0), reference_rate, rate)
            row |= {name: getattr(split, name) for name in HURDLE_RESULTS}
        if histogram is not None:
            row |= _histogram_tests(histogram[[0, model]][:, summarised], codes, testable, settings)
        for name, results in rows.items():
            results.append(row[name])
    return {name: np.array(results, dtype=np.float64) for name, results in rows.items()}


def _difference(values: FloatArray, reference: FloatArray) -> FloatArray:
    """Differences of unit means; what only rounding of the means left is zero, not a tiny difference of one sign."""
    d = values - reference
    scale = np.maximum(np.abs(values).max(axis=0, initial=0.0), np.abs(reference).max(axis=0, initial=0.0))
    d[np.abs(d) <= ROUNDING * scale] = 0.0
    return d


def _tests(
    d: FloatArray,
    testable: NDArray[np.bool_],
    present: NDArray[np.bool_],
    settings: DriftSettings,
) -> dict[str, NDArray[Any]]:
    """Tests and intervals of one model; ``d`` [present unit, feature], ``present`` [unit]."""
    # A feature without differences has statistic 0: it can lead no joint maximum and exceeds no threshold.
    d[:, ~testable] = 0.0
    placed = d
    if not present.all():
        placed = np.zeros((len(present), d.shape[1]))
        placed[present] = d
    nonzero = np.count_nonzero(d, axis=0)
    identical = testable & (nonzero == 0)
    if settings.wild:
        p = wild_cluster_bootstrap(d, n_resamples=WILD_RESAMPLES, seed=settings.seed).p_value
    else:
        p = sign_flip_test(placed, seed=settings.seed).p_value
    joint = max_t(
        placed,
        n_resamples=settings.n_resamples,
        seed=settings.seed,
        step_down=False,
        thresholds=THRESHOLDS,
        unadjusted=False,
    )
    interval = bootstrap_t(d, alpha=settings.alpha, n_resamples=settings.n_bootstrap, seed=settings.seed)
    mean, sd = d.mean(axis=0), d.std(axis=0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        results = {
            "statistic": np.where(nonzero > 0, joint.statistic * np.sign(mean), 0.0),
            "effect": mean,
            "effect_low": interval.low,
            "effect_high": interval.high,
            "p_value": np.where(identical, 1.0, np.asarray(p)),
            "d_z": np.where(nonzero > 0, mean / sd, 0.0),
        }
    tested = {name: np.where(testable, value, np.nan) for name, value in results.items()}
    return tested | {"n_nonzero": nonzero, "maxima": joint.maxima, "exceedances": joint.exceedances}


def _against_margin(
    x: FloatArray,
    reference: FloatArray,
    tests: dict[str, NDArray[Any]],
    testable: NDArray[np.bool_],
    settings: DriftSettings,
) -> dict[str, NDArray[Any]]:
    """Whether the mean difference lies beyond the margin, or within it; ``x`` and ``reference`` [unit, feature]."""
    identical = testable & (tests["n_nonzero"] == 0)
    beyond = minimum_effect_test(x, reference, margin=settings.margin)
    mean, error = tests["effect"], (x - reference).std(axis=0, ddof=1) / np.sqrt(len(x))
    with np.errstate(divide="ignore", invalid="ignore"):
        # The larger of the two one-sided p-values belongs to the nearer bound of the margin.
        to_bound = settings.margin * reference.std(axis=0, ddof=1) - np.abs(mean)
        p_equivalence = stats.t.sf(to_bound / error, len(x) - 1)
    results = {
        "effect_sd": np.where(identical, 0.0, beyond.effect),
        "p_minimum": np.where(identical, 1.0, np.maximum(tests["p_value"], beyond.p_value)),
        "p_equivalence": np.where(identical, np.nan, p_equivalence),
    }
    return {name: np.where(testable, value, np.nan) for name, value in results.items()}


def _histogram_tests(
    pair: NDArray[Any], codes: IntArray | None, testable: NDArray[np.bool_], settings: DriftSettings
) -> dict[str, NDArray[Any]]:
    """Distance of token histograms [2, prompt, feature, bin] and its sign-flip p-value."""
    counts = pair.astype(np.float64)
    shares = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1.0)
    before, after = (unit_means(share, codes) for share in shares)
    test = histogram_flip_test(
        before, after, statistic="wasserstein", n_resamples=settings.n_resamples, seed=settings.seed
    )
    results = {"token_distance": test.statistic, "p_wasserstein": test.p_value}
    return {name: np.where(testable, value, np.nan) for name, value in results.items()}


@dataclass(frozen=True)
class FamilyRule:
    """Which cells form a family, and how its p-values are corrected."""

    by_model: bool
    """Whether the family spans the models; else each model is a family of its own."""
    correction: str
    alpha: float
    n_min: int

    def adjust(self, p: FloatArray) -> FloatArray:
        """P-values [model, feature] corrected over the family."""
        if self.by_model:
            return np.asarray(adjust(p, method=self.correction, alpha=self.alpha))
        return np.stack([adjust(row, method=self.correction, alpha=self.alpha) for row in p])


def correct(p: da.Array, rule: FamilyRule) -> da.Array:
    """``p`` [model, feature] corrected over the family, lazily."""
    return da.map_blocks(rule.adjust, p.rechunk(-1), dtype=np.float64)


def decisions(results: dict[str, da.Array], maxima: da.Array, rule: FamilyRule) -> dict[str, da.Array]:
    """Corrected p-values and calls, lazily; ``results`` [model, feature], ``maxima`` [model, flip].

    Written as array operations, not delayed calls: those would read and test every block once per argument.
    """
    names = ("p_value", "p_minimum", "p_equivalence", "statistic", "fired", "n_nonzero")
    arguments = [item for name in names for item in (results[name].rechunk(-1), "mf")]
    decided = da.blockwise(
        _decide,
        "kmf",
        *arguments,
        maxima.rechunk(-1),
        "mp",
        new_axes={"k": len(FAMILY_RESULTS)},
        concatenate=True,
        dtype=np.float64,
        rule=rule,
    )
    out = dict(zip(FAMILY_RESULTS, decided, strict=True))
    for name, table in (("call", np.array(CALLS)), ("flag", np.array(FLAGS))):
        out[name] = da.map_blocks(_look_up, out[name].astype(np.int64), table=table, dtype=table.dtype)
    return out


def _decide(
    p: FloatArray,
    p_minimum: FloatArray,
    p_equivalence: FloatArray,
    statistic: FloatArray,
    fired: FloatArray,
    nonzero: FloatArray,
    maxima: FloatArray,
    *,
    rule: FamilyRule,
) -> FloatArray:
    """The ``FAMILY_RESULTS`` in their order, [result, model, feature]; calls and flags as places in their lists."""
    p_max_t = np.stack([max_t_p_value(np.abs(row), top) for row, top in zip(statistic, maxima, strict=True)])
    q, q_minimum, q_equivalence = (rule.adjust(each) for each in (p, p_minimum, p_equivalence))
    untestable = fired < rule.n_min
    identical = ~untestable & (nonzero == 0)
    differs = np.nan_to_num(q, nan=1.0) <= rule.alpha
    drifts = differs & (np.nan_to_num(q_minimum, nan=1.0) <= rule.alpha)
    within_margin = identical | (np.nan_to_num(q_equivalence, nan=1.0) <= rule.alpha)
    results = {
        "p_max_t": np.minimum(1.0, p_max_t * len(p)) if rule.by_model else p_max_t,
        "q_value": q,
        "q_minimum": q_minimum,
        "q_equivalence": q_equivalence,
        "call": np.select([untestable, drifts, within_margin], [3, 0, 1], 2),
        "flag": np.select([untestable, identical, differs & ~drifts], [1, 2, 3], 0),
    }
    return np.stack([np.asarray(results[name], dtype=np.float64) for name in FAMILY_RESULTS])


def _typical(effect_sd: FloatArray) -> FloatArray:
    """[model] median size of the effect over testable features; NaN without any."""
    return np.array(
        [np.median(row[np.isfinite(row)]) if np.isfinite(row).any() else np.nan for row in np.abs(effect_sd)]
    )


def _look_up(codes: IntArray, *, table: NDArray[np.str_]) -> NDArray[np.str_]:
    return table[codes]


def false_discoveries(exceedances: da.Array, alpha: float) -> dict[str, da.Array]:
    """Features beyond each threshold and the bound of the false share among them, [model, threshold], lazily."""
    bounds = da.map_blocks(
        _fdp_bounds,
        exceedances.rechunk(-1),
        dtype=np.float64,
        alpha=alpha,
        chunks=((2,), (exceedances.shape[0],), (len(THRESHOLDS),)),
    )
    return {"n_beyond": bounds[0].astype(np.int64), "fdp_upper": bounds[1]}


def _fdp_bounds(exceedances: FloatArray, *, alpha: float) -> FloatArray:
    bounds = [fdp_bound(model, THRESHOLDS, alpha=alpha) for model in exceedances]
    return np.stack([[bound.n_beyond for bound in bounds], [bound.fdp_upper for bound in bounds]])
