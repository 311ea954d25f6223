"""Stability of the set of most changed features during training (claim C2, as the paper measures it).

Plain overlap of top-k sets falls when effects shrink although nothing moves; here the overlap across checkpoints is
compared with the overlap of two halves of the prompts at one checkpoint.

In reading order: the public function, one run, its table and verdict, and the top sets of one checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from rlgen_stats.schemas.dims import BASE_MODEL, MODEL, RUN, STEP, TRAINED_RUN, split_model_id
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed
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
from rlgen_stats.toolkit.statistics.core.top_features import fold_leading, leading_features, merge_leading
from rlgen_stats.toolkit.statistics.core.units import check_unit, cluster_codes, unit_attrs
from rlgen_stats.toolkit.statistics.kernels import (
    delete_group_jackknife,
    dictionaries_needed,
    nogueira,
    pooled_intervals,
    rbo,
    set_overlap_pvalue,
)
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray

DELTA_TOLERANCE: Final = 0.10
"""Share of a top set that may still change while the set is called stable (docs/method.md 4b)."""

MIN_CEILING: Final = 0.5
"""Half-to-half overlap of the final set below which prompts are too few to speak of sets (docs/method.md 4b)."""

RBO_PERSISTENCE: Final = 0.9
"""Rank-biased overlap puts 86% of its weight on the first ten ranks."""

DEFAULT_GROUPS: Final = 20
"""Groups of the delete-group jackknife."""

MIN_UNITS: Final = 8
"""Fewer units leave halves of three or less: no standard deviation worth ranking by."""

MIN_UNITS_PER_GROUP: Final = 2
"""Below two units a group the number of groups is reduced."""

CHANCE_LEVEL: Final = 0.95
"""Quantile of the overlap of random sets: what chance alone reaches one time in twenty."""

SCORE_DIGITS: Final = 9
"""Decimals of a score that count: what differs less is a tie, else rounding would decide between features."""

SCORED_AT_ONCE: Final = 512
"""Features scored at a time: the sums of 20 groups and 100 halvings take 33 MB."""

COLUMNS: Final = (
    *("overlap", "cross", "noise_ceiling", "final_ceiling"),
    *("delta", "delta_low", "delta_high", "delta_lower", "delta_upper"),
    *("chance", "chance_high", "overlap_p", "rbo"),
)


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
    """Compare the top-k set of every checkpoint with the final one, relative to how well prompts determine a set.

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
    progress
        Receiver of progress, in runs.

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
        If a run has fewer than two checkpoints, a prompt lacks a checkpoint, or a setting is out of range.
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
    verdicts: list[SetVerdict] = []
    all_models: list[str] = []
    with progress.task("set stability", total=len(runs), unit="run") as task:
        for run in runs:
            models = [model for model in run_models(features, run) if model != reference]
            if len(models) < 2:
                raise InputError(f"run {run!r} has {len(models)} checkpoint; set stability needs at least two.")
            table, verdict = _one_run(features, variable, reference, models, design, n_min, alpha)
            for name, values in table.items():
                rows[name].extend(values)
            verdicts.append(verdict)
            all_models += models
            task.advance(1, run=run, verdict=verdict.verdict)
    labels = {field.name: [getattr(verdict, field.name) for verdict in verdicts] for field in fields(SetVerdict)}
    return xr.Dataset(
        {name: (MODEL, np.array(values, dtype=np.float64)) for name, values in rows.items()}
        | {name: (TRAINED_RUN, np.array(values)) for name, values in labels.items()},
        coords=model_coords(features, all_models) | {TRAINED_RUN: (TRAINED_RUN, np.array(list(runs), dtype=np.str_))},
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


@dataclass(frozen=True)
class SetVerdict:
    """What is said about one run's set; the fields are the layout's variables over ``trained_run``, in their order."""

    verdict: str
    """SET_STABLE, EVOLVING or UNDETERMINED."""
    stable_from: float = float("nan")
    """Step from which the set is stable; NaN if it is not."""
    nogueira: float = float("nan")
    reason: str = ""
    n_testable: int = 0


def _one_run(
    features: xr.Dataset,
    variable: str,
    reference: str,
    models: list[str],
    design: HalvingDesign,
    n_min: int,
    alpha: float,
) -> tuple[dict[str, list[float]], SetVerdict]:
    """Columns over the checkpoints, and the verdict."""
    arrays, _ = feature_arrays(features, [variable, "firing"], [reference, *models])
    spread, fired = da.compute(
        *map_features(_moments, arrays, outputs={"sd": (len(models),), "fired": ()}).features.values()
    )
    testable = np.asarray(fired) >= n_min
    n_testable = int(testable.sum())
    if n_testable <= design.k or design.n_units < MIN_UNITS:
        reason = (
            f"{n_testable} testable features and {design.n_units} units; "
            f"needs more than k={design.k} features and at least {MIN_UNITS} units"
        )
        blank = {name: [float("nan")] * len(models) for name in COLUMNS}
        return blank, SetVerdict("UNDETERMINED", reason=reason, n_testable=n_testable)
    s0 = float(np.median(np.asarray(spread)[:, testable]))
    if not np.isfinite(s0):
        raise InputError(
            f"some prompts have no {variable!r} in {reference!r} or in a checkpoint of run "
            f"{split_model_id(models[0])[0]!r}; set stability needs every prompt in every checkpoint, so select the "
            "complete prompts first."
        )
    ranks = feature_ranks(features)
    tops = [top_sets(arrays[0], c + 1, testable, ranks, s0, design) for c in range(len(models))]
    table = _table(tops, n_testable, alpha)
    in_set = np.stack([np.isin(ranks[testable], top.full) for top in tops])
    verdict, stable_from, reason = _verdict(table, models)
    return table, SetVerdict(verdict, stable_from, float(nogueira(in_set)), reason, n_testable)


def _moments(values: NDArray[Any], firing: NDArray[Any]) -> Block:
    d = values[1:].astype(np.float64) - values[0]
    return {"sd": d.std(axis=1, ddof=1), "fired": (firing > 0).sum(axis=(0, 1)).astype(np.float64)}


def _table(tops: list[TopSets], n_testable: int, alpha: float) -> dict[str, list[float]]:
    """The ``COLUMNS`` over the checkpoints of one run.

    Half-to-half overlaps are arrays [jackknife replicate], with all units in row 0.
    """
    final, k = tops[-1], len(tops[-1].full)
    final_ceiling = _ceiling(final)
    table: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for top in tops:
        ceiling = _ceiling(top)
        # One half of this checkpoint with the other half of the final one: the two share no prompt.
        pairs = [overlaps(top.halves[:, :, half], final.halves[:, :, 1 - half]) for half in (0, 1)]
        cross = (pairs[0] + pairs[1]).mean(axis=1) / (2 * k)
        delta = (ceiling + final_ceiling) / 2 - cross
        bounds = delete_group_jackknife(delta[1:], delta[0], alpha=alpha)
        n_shared = int(overlaps(top.full, final.full))
        sizes = int((top.full >= 0).sum()), int((final.full >= 0).sum())
        chance = stats.hypergeom(n_testable, *sizes)
        row = {
            "delta": float(delta[0]),
            "delta_low": float(bounds.low),
            "delta_high": float(bounds.high),
            "delta_lower": float(bounds.lower),
            "delta_upper": float(bounds.upper),
            "overlap": n_shared / k,
            "cross": float(cross[0]),
            "noise_ceiling": float(ceiling[0]),
            "final_ceiling": float(final_ceiling[0]),
            "chance": float(chance.mean()) / k,
            "chance_high": float(chance.ppf(CHANCE_LEVEL)) / k,
            "overlap_p": float(set_overlap_pvalue(n_shared, n_testable, *sizes)),
            "rbo": _rbo(top.full, final.full),
        }
        for name in COLUMNS:
            table[name].append(row[name])
    return table


def _ceiling(top: TopSets) -> FloatArray:
    """Mean overlap of the sets of two halves at one checkpoint, as a share of k: [replicate]."""
    return np.asarray(overlaps(top.halves[:, :, 0], top.halves[:, :, 1]).mean(axis=1) / len(top.full))


def _rbo(a: IntArray, b: IntArray) -> float:
    return float(rbo(a[a >= 0].tolist(), b[b >= 0].tolist(), RBO_PERSISTENCE).extrapolated)


def _verdict(table: dict[str, list[float]], models: list[str]) -> tuple[str, float, str]:
    """Verdict, step from which the set is stable (NaN if it is not), and the reason in words."""
    ceiling = table["final_ceiling"][-1]
    nan = float("nan")
    if ceiling < MIN_CEILING:
        return (
            "UNDETERMINED",
            nan,
            f"two halves of the prompts agree on {ceiling:.2f} of the final set; {MIN_CEILING} needed",
        )
    upper, lower = table["delta_upper"][:-1], table["delta_lower"][:-1]
    first = len(upper)
    while first > 0 and upper[first - 1] < DELTA_TOLERANCE:
        first -= 1
    if first < len(upper):
        step = float(split_model_id(models[first])[1])
        return "SET_STABLE", step, f"upper bound of delta below {DELTA_TOLERANCE} from step {step:.0f} on"
    if lower[-1] > 0:
        return (
            "EVOLVING",
            nan,
            f"delta {table['delta'][-2]:.2f} (at least {lower[-1]:.2f}) at the last checkpoint but one",
        )
    return "UNDETERMINED", nan, f"delta at the last checkpoint but one is between {lower[-1]:.2f} and {upper[-1]:.2f}"


def pool_set_stability(sets: Sequence[xr.Dataset], *, alpha: float = 0.05) -> xr.Dataset:
    """The set test over several dictionaries: deltas and ceilings pooled, and the verdict that follows from these.

    Parameters
    ----------
    sets
        Layout ``set_stability`` of each dictionary, with equal checkpoints.
    alpha
        As in the set tests.

    Returns
    -------
    Dataset
        The first one's layout. Bounds of ``delta`` hold the variance between dictionaries
        (:func:`~rlgen_stats.toolkit.statistics.kernels.pooled_intervals`); everything else by checkpoint is the mean;
        ``verdict``, ``stable_from`` and ``reason`` by the rule of :func:`set_stability`; UNDETERMINED where a
        dictionary shows the opposite (one of five or more may).
    """
    if len(sets) == 1:
        return sets[0]
    columns = [name for name in COLUMNS if name in sets[0]]
    pooled = sets[0].assign({name: (MODEL, np.mean([one[name].values for one in sets], axis=0)) for name in columns})
    each = [one["delta"].values for one in sets]
    for low, high, level in (("delta_low", "delta_high", alpha), ("delta_lower", "delta_upper", 2 * alpha)):
        bounds = pooled_intervals(each, *([one[name].values for one in sets] for name in (low, high)), alpha=level)
        pooled[low], pooled[high] = (MODEL, bounds[1]), (MODEL, bounds[2])
    runs = pooled[TRAINED_RUN].values
    found = []
    for position, run in enumerate(runs):
        of_run = pooled.isel({MODEL: np.flatnonzero(pooled[RUN].values == run)})
        of_run = of_run.isel({MODEL: np.argsort(of_run[STEP].values, kind="stable")})
        table = {name: of_run[name].values.tolist() for name in columns}
        verdict = _verdict(table, [str(model) for model in of_run[MODEL].values])
        each_verdict = [str(one["verdict"].values[position]) for one in sets]
        found.append(_unless_contradicted(verdict, each_verdict))
    verdicts, stable_from, reasons = zip(*found, strict=True)
    return pooled.assign(
        verdict=(TRAINED_RUN, np.array(verdicts)),
        stable_from=(TRAINED_RUN, np.array(stable_from)),
        reason=(TRAINED_RUN, np.array(reasons)),
    )


def _unless_contradicted(pooled: tuple[str, float, str], each: Sequence[str]) -> tuple[str, float, str]:
    """The pooled verdict, open where too many dictionaries show the opposite; one that is open contradicts nothing."""
    n_against = sum(verdict not in (pooled[0], "UNDETERMINED") for verdict in each)
    if pooled[0] == "UNDETERMINED" or len(each) - n_against >= dictionaries_needed(len(each)):
        return pooled
    return "UNDETERMINED", float("nan"), f"the dictionaries contradict each other ({', '.join(each)})"


@dataclass(frozen=True)
class HalvingDesign:
    """Random halvings and jackknife groups of units, the same for every checkpoint."""

    halves: FloatArray
    """[halving, prompt]: 1 in the first half."""
    groups: IntArray
    """[prompt]: jackknife group."""
    n_groups: int
    n_units: int
    k: int


def make_design(n: int, codes: IntArray | None, k: int, n_halvings: int, n_groups: int, seed: int) -> HalvingDesign:
    """Draw ``n_halvings`` halvings and at most ``n_groups`` jackknife groups of ``n`` prompts, clusters kept whole."""
    units = np.arange(n) if codes is None else codes
    n_units = int(units.max()) + 1
    rng = np.random.default_rng(derive_seed(seed, "set_stability"))
    n_groups = max(2, min(n_groups, n_units // MIN_UNITS_PER_GROUP))
    groups = rng.permutation(n_units) % n_groups
    first = np.zeros((n_halvings, n_units))
    for row in first:
        row[rng.permutation(n_units)[: n_units // 2]] = 1.0
    return HalvingDesign(first[:, units], groups[units].astype(np.int64), n_groups, n_units, k)


@dataclass(frozen=True)
class TopSets:
    """Feature ids of top-k sets (-1: none): from all prompts in order of rank, and from every half and replicate."""

    full: IntArray
    """[k]"""
    halves: IntArray
    """[replicate, halving, half, k]; replicate 0 has all units, replicate j lacks group j-1."""


def top_sets(
    values: da.Array, c: int, testable: NDArray[np.bool_], ranks: IntArray, s0: float, design: HalvingDesign
) -> TopSets:
    """Top-k sets of checkpoint ``c`` from one pass over feature blocks; only the leading k of a block are kept.

    Features are named by ``ranks``, the order of their labels, which also breaks ties: sets do not depend on where
    features stand.
    """
    pair = values[[0, c]]
    ids = da.from_array(ranks, chunks=(values.chunks[-1],))
    usable = da.from_array(testable, chunks=(values.chunks[-1],))
    n_rows = 1 + (1 + design.n_groups) * len(design.halves) * 2
    mapped = map_features(
        _block_tops,
        [pair, ids, usable],
        outputs={},
        states={"top": ((2, n_rows, design.k), fold_leading)},
        s0=s0,
        design=design,
    )
    rows = np.asarray(mapped.states["top"].compute()[1], dtype=np.int64)
    shape = (1 + design.n_groups, len(design.halves), 2, design.k)
    return TopSets(rows[0], rows[1:].reshape(shape))


def _block_tops(
    values: NDArray[Any], ids: IntArray, usable: NDArray[np.bool_], *, s0: float, design: HalvingDesign
) -> Block:
    """Leading k features of one block in every ranking, as columns of ``leading_features``: minus score, and id."""
    tops = []
    order = np.argsort(ids)
    for start in range(0, len(order), SCORED_AT_ONCE):
        few = order[start : start + SCORED_AT_ONCE]
        scores = half_scores(values[1, :, few].T.astype(np.float64) - values[0, :, few].T, s0, design)
        scores = np.round(scores, SCORE_DIGITS)
        keys = np.where(usable[few] & (scores > 0), -scores, np.inf)
        tops.append(leading_features(np.stack([keys, np.broadcast_to(ids[few], keys.shape)]), design.k))
    return {"top": merge_leading(np.stack(tops))}


def half_scores(d: FloatArray, s0: float, design: HalvingDesign) -> FloatArray:
    """|mean| / (sd + s0) of a feature block: row 0 over all prompts, then [replicate, halving, half] flattened.

    Every replicate's sums are the full sums minus those of the deleted group, so halvings cost one product in all.
    Values are centred first: sums of squares then do not cancel.
    """
    centre = d.mean(axis=0)
    d, squares = d - centre, np.square(d - centre)
    n_halvings = len(design.halves)
    sums = np.empty((design.n_groups, n_halvings, 2, 2, d.shape[1]))  # [group, halving, half, power, feature]
    counts = np.empty((design.n_groups, n_halvings, 2))
    for g in range(design.n_groups):
        rows = design.groups == g
        first = design.halves[:, rows]
        for power, values in enumerate((d[rows], squares[rows])):
            sums[g, :, 0, power] = first @ values
            sums[g, :, 1, power] = values.sum(axis=0) - sums[g, :, 0, power]
        counts[g, :, 0] = first.sum(axis=1)
        counts[g, :, 1] = rows.sum() - counts[g, :, 0]
    total, n = sums.sum(axis=0), counts.sum(axis=0)
    scores = np.empty((1 + design.n_groups, n_halvings, 2, d.shape[1]))
    for replicate in range(1 + design.n_groups):
        kept_sums = total if replicate == 0 else total - sums[replicate - 1]
        kept_n = n if replicate == 0 else n - counts[replicate - 1]
        scores[replicate] = _moderated(kept_sums[:, :, 0], kept_sums[:, :, 1], kept_n[..., None], centre, s0)
    full = _moderated(d.sum(axis=0), squares.sum(axis=0), np.array(float(len(d))), centre, s0)
    return np.concatenate([full[None], scores.reshape(-1, d.shape[1])])


def _moderated(sums: FloatArray, squares: FloatArray, n: FloatArray, centre: FloatArray, s0: float) -> FloatArray:
    """|mean| / (sd + s0) from sums over n units of values less ``centre`` and of their squares; 0 where both are 0."""
    mean = sums / n
    sd = np.sqrt(np.maximum(squares - n * np.square(mean), 0.0) / np.maximum(n - 1, 1))
    scale = sd + s0
    score: FloatArray = np.abs(mean + centre) / np.where(scale > 0, scale, np.inf)
    return score


def overlaps(a: IntArray, b: IntArray) -> FloatArray:
    """Size of the intersection of id sets along the last axis; ids are unique within a set, -1 is no id."""
    both = np.sort(np.concatenate([a, b], axis=-1), axis=-1)
    same = (both[..., 1:] == both[..., :-1]) & (both[..., 1:] >= 0)
    return np.asarray(same.sum(axis=-1), dtype=np.float64)
