"""Whether findings replicate over dictionaries of other seeds: what is decoded, matched features, sets, counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import BASE_MODEL, CHANNEL, FEATURE, MODEL, PROMPT, TASK
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.statistics.core.coordinates import feature_coord, feature_ranks, in_split
from rlgen_stats.toolkit.statistics.core.feature_blocks import DEFAULT_MIN_FIRING, feature_arrays, in_prompt_order
from rlgen_stats.toolkit.statistics.core.nearest_draws import matched_on_rate
from rlgen_stats.toolkit.statistics.core.units import present_prompts
from rlgen_stats.toolkit.statistics.kernels import pooled_intervals
from rlgen_stats.toolkit.statistics.kernels.draws import stream
from rlgen_stats.toolkit.statistics.kernels.numerics import ROUNDING, FloatArray, IntArray

DICTIONARY: Final = "dictionary"
OTHER: Final = "other"
"""The second of two dictionaries that are compared; both are numbered from 1."""
REPLICATE: Final = "replicate"
HIGH: Final = 0.95
"""Quantile of the random levels that stands beside their mean or median."""
N_RANDOM_SETS: Final = 99
CLOSE: Final = 0.7
"""Cosine of decoders from which two features count as the same: a match beyond chance may be much weaker."""
CRITERION: Final = "criterion"
CRITERIA: Final = ("matched", "close")
"""Matched: more alike than decoys are. Close: matched, and with a cosine of at least ``CLOSE``."""


# -- what is decoded ---------------------------------------------------------------------------------------------------
def decoded_agreement(sums: xr.Dataset) -> xr.Dataset:
    """Correlate the changes that dictionaries decode with the true change, with each other, and their errors.

    Parameters
    ----------
    sums
        ``products[model, part, other_part]``, ``totals[model, part, channel]`` and ``n_tokens``, the parts being the
        true change, then the change decoded by each dictionary, then each one's error
        (``toolkit/crosscoder/uses/agreement.py``).

    Returns
    -------
    xr.Dataset
        ``true_cosine``, ``true_correlation`` [dictionary, model]; ``decoded_cosine``, ``decoded_correlation``,
        ``error_cosine``, ``error_correlation`` [dictionary, other, model]. Cosines are about zero, correlations about
        the mean of every channel; both over tokens and channels, in raw units. NaN where nothing varies.

    Raises
    ------
    InputError
        If the parts are not one change and as many errors as decoded changes.

    Notes
    -----
    Two dictionaries can agree because both are right or because both make the same mistake: errors that correlate say
    the second. Decoded changes of dictionaries without any common error correlate as the product of their correlations
    with the true change, if these errors are uncorrelated with it.
    """
    n_parts = sums.sizes["part"]
    n = (n_parts - 1) // 2
    if n_parts % 2 == 0 or n < 1 or sums.sizes["other_part"] != n_parts:
        raise InputError(f"expected one true change, decoded changes and as many errors, got {n_parts} parts.")
    about_zero = np.asarray(sums["products"].transpose(MODEL, "part", "other_part").values, dtype=np.float64)
    totals = np.asarray(sums["totals"].transpose(MODEL, "part", CHANNEL).values, dtype=np.float64)
    about_mean = about_zero - totals @ totals.transpose(0, 2, 1) / max(int(sums["n_tokens"]), 1)
    decoded, error = slice(1, n + 1), slice(n + 1, n_parts)
    pair = (DICTIONARY, OTHER, MODEL)
    values: dict[str, Any] = {}
    for name, products in (("cosine", about_zero), ("correlation", about_mean)):
        table = np.moveaxis(_normalised(products, about_zero), 0, -1)  # [part, other part, model]
        values[f"true_{name}"] = ((DICTIONARY, MODEL), table[decoded, 0])
        values[f"decoded_{name}"] = (pair, table[decoded, decoded])
        values[f"error_{name}"] = (pair, table[error, error])
    numbers = np.arange(1, n + 1)
    return xr.Dataset(values, coords={DICTIONARY: numbers, OTHER: numbers, MODEL: sums[MODEL].values})


def _normalised(products: FloatArray, scale: FloatArray) -> FloatArray:
    """Products over the roots of their diagonal; NaN where a part is nothing but rounding, next to ``scale``."""
    own = np.diagonal(products, axis1=1, axis2=2)
    largest = np.diagonal(scale, axis1=1, axis2=2).max(axis=1, keepdims=True)
    root = np.sqrt(np.where(own > ROUNDING * largest, own, np.nan))
    return np.asarray(np.clip(products / (root[:, :, None] * root[:, None, :]), -1.0, 1.0))


# -- matched features --------------------------------------------------------------------------------------------------
def matched_drift(
    matching: xr.Dataset, effects: Mapping[int, xr.DataArray], *, top_k: int, n_permutations: int = 999, seed: int = 0
) -> xr.Dataset:
    """How much of the first dictionary's drift sits in features that other dictionaries have too, beside chance.

    Parameters
    ----------
    matching
        ``match`` (label of the other's feature), ``matched``, ``similarity`` [replicate, feature] and ``reappearance``
        [feature] (NaN: never fires) of one dictionary, as :func:`~rlgen_stats.toolkit.statistics.reappearance` gives
        them.
    effects
        Number of the dictionary, from 1, -> effect [model, feature] of its drift test, contribution scale; the others
        in the order of ``replicate``. Untested features (NaN) carry no drift and are in no top.
    top_k
        Features of each dictionary, by size of effect, that are compared.
    n_permutations, seed
        Draws of the null and their seed.

    Returns
    -------
    xr.Dataset
        By ``criterion`` (``CRITERIA``): ``n_matched``, ``matched_share`` [criterion, replicate], of the first
        dictionary's features that fire. [criterion, replicate, model]: ``matched_energy``, share of sum effect^2 that
        matched features carry, ``matched_energy_random`` and ``matched_energy_random_high``, mean and 95% quantile of
        it when as many features at random are matched; ``top_shared``, how many of the first dictionary's top k have
        their match in the other's top k, and ``top_expected``, the mean number when the same matches are assigned to
        features at random. Attributes ``n_features`` (that fire), ``top_k``, ``close_cosine``.

    Raises
    ------
    InputError
        If the dictionaries are not as many as there are replicates and one.
    """
    names = [str(name) for name in matching[REPLICATE].values]
    if sorted(effects) != list(range(1, len(names) + 2)):
        raise InputError(f"expected effects of {len(names) + 1} dictionaries, numbered from 1, got {sorted(effects)}.")
    alive = np.flatnonzero(np.isfinite(np.asarray(matching["reappearance"].values, dtype=np.float64)))
    table = matching.isel({FEATURE: alive}).transpose(REPLICATE, FEATURE, ...)
    first = effects[1].reindex({FEATURE: table[FEATURE].values}).transpose(MODEL, FEATURE)
    matched = np.asarray(table["matched"].values, dtype=bool)
    matched = np.stack([matched, matched & (np.asarray(table["similarity"].values) >= CLOSE)])  # [criterion, ...]
    n_matched, n = matched.sum(axis=2), len(alive)
    energy = np.square(np.nan_to_num(np.asarray(first.values, dtype=np.float64)))
    energy /= np.where(energy.any(axis=1), energy.sum(axis=1), np.nan)[:, None]
    by_chance = _energy_by_chance(energy, n_matched, n_permutations, seed)
    own = _is_leading(first, table[FEATURE].values, top_k)
    others = [effects[number].sel({MODEL: first[MODEL].values}).transpose(MODEL, FEATURE) for number in sorted(effects)]
    partner_leads = np.stack(
        [_is_leading(one, match, top_k) for one, match in zip(others[1:], table["match"].values, strict=True)]
    )
    leads = partner_leads & matched[:, :, None]  # [criterion, replicate, model, feature]
    per_model = (CRITERION, REPLICATE, MODEL)
    return xr.Dataset(
        {
            "n_matched": (per_model[:2], n_matched),
            "matched_share": (per_model[:2], n_matched / n if n else np.full(n_matched.shape, np.nan)),
            "matched_energy": (per_model, np.where(matched[:, :, None], energy, 0.0 * energy).sum(axis=3)),
            "matched_energy_random": (per_model, by_chance.mean(axis=3)),
            "matched_energy_random_high": (per_model, np.quantile(by_chance, HIGH, axis=3)),
            "top_shared": (per_model, (own & leads).sum(axis=3)),
            "top_expected": (per_model, own.sum(axis=1) * leads.sum(axis=3) / max(n, 1)),
        },
        coords={CRITERION: list(CRITERIA), REPLICATE: names, MODEL: first[MODEL].values},
        attrs={"n_features": n, "top_k": top_k, "close_cosine": CLOSE},
    )


def _energy_by_chance(energy: FloatArray, n_matched: IntArray, n_permutations: int, seed: int) -> FloatArray:
    """Share [..., model, permutation] of ``energy`` [model, feature] in ``n_matched`` [...] features at random."""
    shares = np.empty((*n_matched.shape, len(energy), n_permutations))
    for b in range(n_permutations):
        order = stream(seed, b).permutation(energy.shape[1])
        upto = np.pad(np.cumsum(energy[:, order], axis=1), ((0, 0), (1, 0)))
        shares[..., b] = np.moveaxis(upto[:, n_matched], 0, -1)
    return shares


def _is_leading(effects: xr.DataArray, labels: NDArray[Any], k: int) -> NDArray[np.bool_]:
    """Whether each of ``labels`` is among the k features of largest absolute effect: [model, label].

    Ties go to the earlier feature.
    """
    size = np.abs(np.asarray(effects.values, dtype=np.float64))
    order = np.argsort(np.nan_to_num(-size, nan=np.inf), axis=1, kind="stable")[:, :k]
    tested = np.isfinite(np.take_along_axis(size, order, axis=1))
    tops = [effects[FEATURE].values[row[kept]] for row, kept in zip(order, tested, strict=True)]
    return np.stack([np.isin(labels, top) for top in tops])


# -- sets --------------------------------------------------------------------------------------------------------------
def set_agreement(
    features: Mapping[int, xr.Dataset],
    sets: Mapping[int, Sequence[int]],
    *,
    models: Sequence[str],
    reference: str = BASE_MODEL,
    variable: str = "mean",
    split: str = "verification",
    n_random: int = N_RANDOM_SETS,
    n_min: int = DEFAULT_MIN_FIRING,
    seed: int = 0,
) -> xr.Dataset:
    """Correlate, over prompts, how much the sets that dictionaries selected drift, beside random sets of their size.

    Parameters
    ----------
    features
        Number of the dictionary -> its features, layout ``features``, of the same prompts. Lazy in, computed at once.
    sets
        Number of the dictionary -> labels of its selected features; may be empty.
    models, reference
        Model ids.
    variable
        Summary that is summed over the set: mean, firing or max.
    split
        Prompts used.
    n_random
        Random sets of each dictionary: every member is replaced by one of the features nearest in firing rate, over
        these prompts and models; no selected feature, and none that fires on fewer than ``n_min`` of the prompts.
    n_min
        Pooled over models and reference.
    seed
        Seed of the random sets.

    Returns
    -------
    xr.Dataset
        [dictionary, other, model]: ``set_correlation`` over prompts of sum over the set of (x^M - x^reference),
        ``set_within`` with task means removed, and for each ``_random`` and ``_random_high``, median and 95% quantile
        over random sets. ``n_set`` [dictionary]. NaN where a set is empty or does not vary; the random levels also
        where there are not twice as many other features as members. Attributes ``n_prompts``, ``n_random``.

    Raises
    ------
    InputError
        If the dictionaries' features are not of the same prompts, or fewer than three prompts can be used.
    """
    if sorted(features) != sorted(sets) or not features:
        raise InputError(f"give features and sets of the same dictionaries, got {sorted(features)} and {sorted(sets)}.")
    numbers, compared = sorted(features), [reference, *models]
    ordered = {number: in_prompt_order(features[number]) for number in numbers}
    prompts = _common_prompts(list(ordered.values()), compared, split)
    _, task = np.unique(ordered[numbers[0]][TASK].values.astype(np.str_)[prompts], return_inverse=True)
    drift = np.stack(
        [
            _set_drift(ordered[number], sets[number], prompts, compared, variable, n_random, n_min, seed + number)
            for number in numbers
        ],
        axis=2,
    )  # [set, model, dictionary, prompt]
    triple = (DICTIONARY, OTHER, MODEL)
    values: dict[str, Any] = {}
    for name, rows in (("set_correlation", drift), ("set_within", drift - _task_means(drift, task))):
        scale = np.abs(drift).max(axis=-1)
        table = np.moveaxis(_correlations(rows, scale), 1, -1)  # [set, dictionary, other, model]
        median, high = _levels(table[1:])
        values |= {name: (triple, table[0]), f"{name}_random": (triple, median), f"{name}_random_high": (triple, high)}
    values["n_set"] = (DICTIONARY, np.array([len(sets[number]) for number in numbers]))
    return xr.Dataset(
        values,
        coords={DICTIONARY: numbers, OTHER: numbers, MODEL: list(models)},
        attrs={"n_prompts": len(prompts), "n_random": n_random, "split": split},
    )


def _common_prompts(features: Sequence[xr.Dataset], compared: Sequence[str], split: str) -> IntArray:
    """Positions of the prompts of a split that have tokens in every model, the same in every dictionary."""
    ids = [one[PROMPT].values.astype(np.str_) for one in features]
    if any(not np.array_equal(others, ids[0]) for others in ids):
        raise InputError("the dictionaries' features must be of the same prompts; encode them from the same store.")
    used = np.all([in_split(one, split) & present_prompts(one, compared) for one in features], axis=0)
    prompts = np.flatnonzero(used)
    if len(prompts) < 3:
        raise InputError(f"a correlation needs at least 3 prompts, got {len(prompts)} of split {split!r}.")
    return prompts


def _set_drift(
    features: xr.Dataset,
    members: Sequence[int],
    prompts: IntArray,
    compared: Sequence[str],
    variable: str,
    n_random: int,
    n_min: int,
    seed: int,
) -> FloatArray:
    """Drift [set, model, prompt] of the selected set (first) and of random ones; NaN where there is none."""
    drift = np.full((1 + n_random, len(compared) - 1, len(prompts)), np.nan)
    (values, firing), _ = feature_arrays(features, [variable, "firing"], compared)
    labels = feature_coord(features)[FEATURE][1]
    unknown = np.setdiff1d(members, labels)
    if len(unknown):
        raise InputError(f"feature {unknown[0]} of the set is not in the features; give all features.")
    if not len(members):
        return drift
    fires = firing[:, prompts]
    rate, n_fired = fires.mean(axis=(0, 1)).compute(), (fires > 0).sum(axis=(0, 1)).compute()
    sets = [np.flatnonzero(np.isin(labels, members))]
    sets[0] = sets[0][np.argsort(labels[sets[0]], kind="stable")]
    ranks = feature_ranks(features)
    pool = np.flatnonzero((n_fired >= n_min) & ~np.isin(labels, members))
    pool = pool[np.lexsort((ranks[pool], rate[pool]))]
    if len(pool) >= 2 * len(sets[0]) and n_random:
        drawn, _ = matched_on_rate(rate[pool], rate[sets[0]], n_random, seed=derive_seed(seed, "set_agreement"))
        sets += list(pool[drawn])
    needed = np.unique(np.concatenate(sets))
    x = values[:, prompts][:, :, needed].compute().astype(np.float64)
    change = x[1:] - x[0]
    for row, positions in zip(drift, sets, strict=False):
        row[:] = change[:, :, np.searchsorted(needed, positions)].sum(axis=2)
    return drift


def _task_means(rows: FloatArray, task: IntArray) -> FloatArray:
    """Mean over the prompts of each prompt's task: [..., prompt]."""
    membership = np.eye(int(task.max()) + 1)[task]
    return np.asarray((rows @ membership / membership.sum(axis=0)) @ membership.T)


def _correlations(rows: FloatArray, scale: FloatArray) -> FloatArray:
    """Correlations [..., row, row] over the last axis of ``rows`` [..., row, prompt]; NaN where one is constant."""
    centred = rows - rows.mean(axis=-1, keepdims=True)
    norm = np.linalg.norm(centred, axis=-1)
    norm = np.where(norm > ROUNDING * scale * math.sqrt(rows.shape[-1]), norm, np.nan)
    unit = centred / norm[..., None]
    return np.asarray(np.clip(unit @ np.swapaxes(unit, -1, -2), -1.0, 1.0))


def _levels(table: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Median and 95% quantile over the first axis, of the values that are there."""
    columns = table.reshape(len(table), -1)
    median, high = np.full((2, columns.shape[1]), np.nan)
    for place, column in enumerate(columns.T):
        known = column[np.isfinite(column)]
        if len(known):
            median[place], high[place] = np.median(known), np.quantile(known, HIGH)
    return median.reshape(table.shape[1:]), high.reshape(table.shape[1:])


# -- counts ------------------------------------------------------------------------------------------------------------
def drift_counts(calls: Mapping[int, xr.DataArray], *, alpha: float = 0.05) -> xr.Dataset:
    """Count the features called DRIFT in every dictionary, with their mean over dictionaries.

    Parameters
    ----------
    calls
        Number of the dictionary -> ``call`` [model, feature] of its drift test.
    alpha
        1 - coverage.

    Returns
    -------
    xr.Dataset
        ``n_drift`` [dictionary, model]; ``n_drift_mean`` [model] with ``n_drift_low`` and ``n_drift_high``, a
        t-interval over dictionaries (NaN with one), cut off at 0: what dictionaries of other seeds find on average.

    Raises
    ------
    InputError
        If no dictionary is given or alpha is out of range.
    """
    if not calls or not 0 < alpha < 1:
        raise InputError(f"expected calls of a dictionary and 0 < alpha < 1, got {len(calls)} and {alpha}.")
    numbers = sorted(calls)
    tables = [calls[number].transpose(MODEL, FEATURE) for number in numbers]
    counts = np.stack([(table.values.astype(np.str_) == "DRIFT").sum(axis=1) for table in tables])
    mean, low, high = pooled_intervals(counts, counts, counts, alpha=alpha)
    unknown = np.nan if len(numbers) == 1 else 0.0
    return xr.Dataset(
        {
            "n_drift": ((DICTIONARY, MODEL), counts),
            "n_drift_mean": (MODEL, mean),
            "n_drift_low": (MODEL, np.maximum(low, 0.0) + unknown),
            "n_drift_high": (MODEL, high + unknown),
        },
        coords={DICTIONARY: numbers, MODEL: tables[0][MODEL].values.astype(np.str_)},
    )
