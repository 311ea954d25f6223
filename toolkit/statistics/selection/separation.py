"""Sanity beside the selected features: how well raw activations tell the two models apart.

That some features separate the target from base says nothing about features where the raw difference does it better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import BASE_MODEL, CHANNEL, MODEL, PROMPT, TASK
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.statistics.core.comparability import source_attrs
from rlgen_stats.toolkit.statistics.core.coordinates import feature_ranks, find_models, in_split
from rlgen_stats.toolkit.statistics.core.feature_blocks import feature_arrays, in_prompt_order
from rlgen_stats.toolkit.statistics.core.units import cluster_codes, jackknife_groups, present_prompts, unit_attrs
from rlgen_stats.toolkit.statistics.kernels import delete_group_jackknife
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray
from rlgen_stats.toolkit.statistics.selection.discordance import n_units
from rlgen_stats.toolkit.statistics.selection.linear_probe import (
    NestedFolds,
    fit_probe,
    matched_sets,
    nested_folds,
    roc_auc,
)
from rlgen_stats.toolkit.statistics.selection.members import selected_members, selection_unit
from rlgen_stats.toolkit.statistics.selection.task_prompts import greedy_correctness

COMPARISONS: Final = ("models", "models on gains", "gain or loss")
"""Target from base on every prompt; on prompts base got wrong and the target right; gains from losses by difference."""
PREDICTORS: Final = ("raw", "mean shift", "selected", "random")
"""Raw activations; their projection on the mean shift; the selected features; random features (mean over sets)."""
N_GROUPS: Final = 20
"""Groups of units that the jackknife leaves out in turn."""


def model_separation(
    activations: xr.Dataset,
    features: xr.Dataset,
    outcomes: xr.Dataset,
    selection: xr.Dataset,
    *,
    n_random: int = 19,
    n_outer: int = 5,
    n_inner: int = 3,
    min_discordant: int = 20,
    alpha: float = 0.05,
    seed: int = 0,
    progress: Progress = SILENT,
) -> xr.Dataset:
    """Compare how well raw activations, their mean shift, and selected and random features tell target from base.

    Parameters
    ----------
    activations
        ``activation[model, prompt, channel]``: raw means over the tokens that the features are averaged over, of at
        least base and the target. May be lazy.
    features, outcomes
        Layouts ``features`` and ``outcomes`` of one study.
    selection
        Result of ``select_features``; without a selected feature only raw activations are probed.
    n_random
        Random sets of as many features, matched one by one on firing (of both models), none of them selected.
    n_outer, n_inner
        Outer folds, each predicted by the others, and inner folds that choose the penalty.
    min_discordant
        Units of gains and of losses that ``gain or loss`` needs, each.
    alpha, seed
        1 - coverage of the intervals; seed of folds, sets and groups.
    progress
        Receiver of progress, in probes.

    Returns
    -------
    xr.Dataset
        [comparison, predictor]: ``auc`` (mean over outer folds) with ``auc_low``, ``auc_high``, and ``pairs_right``
        (share of prompts whose target activation scores above base's). [comparison]: ``advantage`` (selected less the
        better of raw and mean shift) with ``advantage_low``, ``advantage_high``; ``beats_raw`` (the lower end exceeds
        0); ``p_random`` (rank of the selected among the random sets); ``n_prompts``, ``n_units`` (of gains and losses
        the fewer); ``estimable``. ``random_auc`` [comparison, random_set]. Computed at once.

    Raises
    ------
    RefusedError
        If the selection is of another split, study or crosscoder.
    InputError
        If a model or a prompt is missing, or a number of folds is below two.

    Notes
    -----
    On verification prompts of the tasks selected on. A prompt gives one row for base (0) and one for the target (1),
    always in the same fold, with the other prompts of its cluster; in ``gain or loss`` it gives its difference.
    Probes: logistic regression with L2 penalty on columns standardised on the training rows; the projection is on the
    mean difference of the training prompts, neither standardised nor fitted further. A linear probe sees differences of
    means only. Intervals: delete-group jackknife over whole units, with the fitted probes held fixed.

    References
    ----------
    Controls for probes: Hewitt and Liang 2019, doi:10.18653/v1/D19-1275; linear baselines beside sparse dictionaries:
    Kantamneni et al. 2025, arXiv:2502.16681; nested folds: Varma and Simon 2006, doi:10.1186/1471-2105-7-91.

    Examples
    --------
    >>> model_separation(prompt_means, features, outcomes, selection)  # doctest: +SKIP
    """
    if min(n_outer, n_inner) < 2 or n_random < 1:
        raise InputError(f"expected n_outer >= 2, n_inner >= 2, n_random >= 1; got {n_outer}, {n_inner}, {n_random}.")
    unit, clusters = selection_unit(selection)
    features = in_prompt_order(features)
    pair = [str(selection.attrs.get("base", BASE_MODEL)), str(selection.attrs.get("target"))]
    data = _read(activations, features, selection, pair, n_random, derive_seed(seed, "separation", "sets"))
    codes = cluster_codes(features, clusters)
    plans = _plans(features, outcomes, selection, data.present, pair, codes, 2 * n_outer, min_discordant)
    columns = []
    with progress.task("separation of the models", total=len(plans) * (1 + len(data.sets)), unit="probes") as task:
        for plan in plans:
            folds_seed = derive_seed(seed, "separation", "folds") % 2**32
            folds = nested_folds(plan.label, plan.group, n_outer, n_inner, folds_seed) if plan.reason == "yes" else None
            columns.append(_compare(plan, data, folds, alpha, derive_seed(seed, "separation", "groups")))
            task.advance(1 + len(data.sets))
    arrays = {name: np.array([column[name] for column in columns]) for name in columns[0]}
    attrs = source_attrs(features) | unit_attrs(unit, clusters, codes)
    attrs |= {"test": "linear probes of raw activations, of their mean shift and of features", "role": "descriptive"}
    attrs |= {"null": "the selected features tell the models apart no better than raw activations do"}
    attrs |= {
        "base": pair[0],
        "target": pair[1],
        "split_hash": selection.attrs["split_hash"],
        "variable": data.variable,
    }
    attrs |= {"n_features": data.n_selected, "random_sets": data.random_sets, "worst_match": data.worst_match}
    attrs |= {"interval": f"delete-group jackknife, {N_GROUPS} groups, probes held fixed"}
    attrs |= {"n_random": n_random, "n_outer": n_outer, "n_inner": n_inner, "alpha": alpha, "seed": seed}
    dims = {2: ("comparison", "predictor"), 1: ("comparison",)}
    return xr.Dataset(
        {
            name: (("comparison", "random_set") if name == "random_auc" else dims[array.ndim], array)
            for name, array in arrays.items()
        },
        coords={"comparison": list(COMPARISONS), "predictor": list(PREDICTORS)},
        attrs=attrs,
    )


# -- what is compared --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class _Data:
    """Activations of base and target on every prompt, and the sets of features: the selected one first."""

    raw: FloatArray
    """[2, prompt, channel]; NaN for prompts without tokens."""
    features: FloatArray
    """[2, prompt, needed feature]."""
    sets: list[IntArray]
    """Columns of ``features``; empty if no feature is selected."""
    present: NDArray[np.bool_]
    """[prompt]: verification prompts with summaries of both models, of a task selected on."""
    n_selected: int
    n_random: int
    variable: str
    random_sets: str
    """``yes``, or why there are no random sets."""
    worst_match: float


def _read(
    activations: xr.Dataset, features: xr.Dataset, selection: xr.Dataset, pair: Sequence[str], n_random: int, seed: int
) -> _Data:
    find_models(activations, pair)
    missing = set(map(str, features[PROMPT].values)) - set(map(str, activations[PROMPT].values))
    if missing:
        raise InputError(f"{len(missing)} prompt(s) of the features have no activation, e.g. {min(missing)!r}.")
    ordered = activations["activation"].sel({MODEL: list(pair), PROMPT: features[PROMPT].values})
    raw = np.asarray(ordered.transpose(MODEL, PROMPT, CHANNEL).values, dtype=np.float64)
    used = selection[TASK].values.astype(np.str_)[np.asarray(selection["used"].values, dtype=bool)]
    of_used = np.isin(np.asarray(features[TASK].values).astype(np.str_), used)
    present = in_split(features, "verification") & present_prompts(features, pair) & of_used
    present &= np.isfinite(raw).all(axis=(0, 2))
    variable = str(selection.attrs.get("variable", "mean"))
    (values, firing), _ = feature_arrays(features, [variable, "firing"], pair)
    selected: IntArray = np.empty(0, dtype=np.int64)
    sets: list[IntArray] = []
    worst, why = float("nan"), "no: no feature is selected"
    if np.asarray(selection["selected"].values, dtype=bool).any():
        selected = selected_members(features, selection, "verification", "selected").features
        counts = (firing[:, np.flatnonzero(present)] > 0).sum(axis=(0, 1)).compute()
        try:
            sets, worst = matched_sets(counts, selected, feature_ranks(features), n_random, seed)
            why = "yes"
        except InputError as error:  # the selected set can be described without random ones
            sets, why = [selected], f"no: {error}"
    needed = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *sets]))
    return _Data(
        raw=raw,
        features=np.asarray(values[:, :, needed].compute(), dtype=np.float64),
        sets=[np.searchsorted(needed, members) for members in sets],
        present=present,
        n_selected=len(selected),
        n_random=n_random,
        variable=variable,
        random_sets=why,
        worst_match=worst,
    )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Rows of one comparison."""

    prompts: IntArray
    """Positions of its prompts."""
    paired: bool
    """Whether a prompt gives a row for base and one for the target (base's rows come first), or its difference."""
    label: IntArray
    """[row]."""
    group: IntArray
    """[row]: what stays in one fold."""
    n_units: int
    reason: str

    def rows(self, values: FloatArray) -> FloatArray:
        """[row, column] of ``values`` [2, prompt, column]."""
        v = values[:, self.prompts]
        return np.concatenate([v[0], v[1]]) if self.paired else v[1] - v[0]

    def pairs_right(self, score: FloatArray) -> float:
        """Share of prompts whose target row scores above base's, ties as halves; NaN where rows are differences."""
        if not self.paired:
            return float("nan")
        base, target = np.split(score, 2)
        return float(np.mean((target > base) + 0.5 * (target == base)))


def _plans(
    features: xr.Dataset,
    outcomes: xr.Dataset,
    selection: xr.Dataset,
    present: NDArray[np.bool_],
    pair: list[str],
    codes: IntArray | None,
    min_units: int,
    min_discordant: int,
) -> list[_Plan]:
    correct = greedy_correctness(features, outcomes, pair)
    gain = present & (correct[0] == 0) & (correct[1] == 1)
    loss = present & (correct[0] == 1) & (correct[1] == 0)
    plans = []
    for prompts in (np.flatnonzero(present), np.flatnonzero(gain)):
        n, unit = n_units(prompts, codes), prompts if codes is None else codes[prompts]
        plans.append(
            _Plan(
                prompts=prompts,
                paired=True,
                label=np.repeat([0, 1], len(prompts)),
                group=np.tile(unit, 2),
                n_units=n,
                reason="yes" if n >= min_units else f"no: {n} units, {min_units} needed",
            )
        )
    discordant = np.flatnonzero(gain | loss)
    gains, losses = (n_units(np.flatnonzero(kind), codes) for kind in (gain, loss))
    needed = max(min_discordant, min_units)
    few = f"no: {gains} units with gains and {losses} with losses, {needed} of each needed"
    plans.append(
        _Plan(
            prompts=discordant,
            paired=False,
            label=gain[discordant].astype(np.int64),
            group=discordant if codes is None else codes[discordant],
            n_units=min(gains, losses),
            reason="yes" if min(gains, losses) >= needed else few,
        )
    )
    return plans


# -- the comparison ----------------------------------------------------------------------------------------------------
def _compare(plan: _Plan, data: _Data, folds: NestedFolds | None, alpha: float, seed: int) -> dict[str, Any]:
    """Values of one comparison; ``folds`` None: not estimable."""
    out: dict[str, Any] = {name: np.full(len(PREDICTORS), np.nan) for name in ("auc", "auc_low", "auc_high")}
    out |= {"pairs_right": np.full(len(PREDICTORS), np.nan), "random_auc": np.full(data.n_random, np.nan)}
    out |= dict.fromkeys(("advantage", "advantage_low", "advantage_high", "p_random"), np.nan)
    out |= {"beats_raw": False, "n_prompts": len(plan.prompts), "n_units": plan.n_units, "estimable": plan.reason}
    if folds is None:
        return out
    scores = [fit_probe(plan.rows(data.raw), plan.label, folds).predicted, _projection(plan, data.raw, folds)]
    of_features = plan.rows(data.features)
    scores += [fit_probe(of_features[:, columns], plan.label, folds).predicted for columns in data.sets]
    groups = jackknife_groups(plan.group, N_GROUPS, seed)
    everything = np.ones(len(groups), dtype=bool)
    keeps = [everything, *(groups != g for g in range(int(groups.max()) + 1))]
    table = np.array([_measures([_fold_auc(plan.label, score, folds, keep) for score in scores]) for keep in keeps])
    interval = delete_group_jackknife(table[1:], table[0], alpha=alpha)
    out["auc"], out["auc_low"], out["auc_high"] = table[0][:4], interval.low[:4], interval.high[:4]
    out["advantage"], out["advantage_low"], out["advantage_high"] = table[0][4], interval.low[4], interval.high[4]
    out["beats_raw"] = bool(interval.low[4] > 0)
    pairs = [plan.pairs_right(score) for score in scores]
    out["pairs_right"][: len(pairs[:3])] = pairs[:3]
    if len(scores) > 3:
        random = np.array([_fold_auc(plan.label, score, folds, everything) for score in scores[3:]])
        out["random_auc"], out["pairs_right"][3] = random, np.mean(pairs[3:])
        out["p_random"] = (1 + np.count_nonzero(random >= table[0][2])) / (1 + len(random))
    return out


def _measures(auc: list[float]) -> list[float]:
    """AUC of raw, mean shift, selected and random (mean), and selected less the better of raw and mean shift."""
    raw, shift = auc[:2]
    selected = auc[2] if len(auc) > 2 else float("nan")
    random = float(np.mean(auc[3:])) if len(auc) > 3 else float("nan")
    return [raw, shift, selected, random, selected - max(raw, shift)]


def _projection(plan: _Plan, raw: FloatArray, folds: NestedFolds) -> FloatArray:
    """Score of every row: its projection on the mean difference of the prompts it is not among."""
    rows, place = plan.rows(raw), np.tile(np.arange(len(plan.prompts)), 2 if plan.paired else 1)
    d = raw[1, plan.prompts] - raw[0, plan.prompts]
    score = np.empty(len(rows))
    for train, scored, _ in folds:
        score[scored] = rows[scored] @ d[np.unique(place[train])].mean(axis=0)
    return score


def _fold_auc(label: IntArray, score: FloatArray, folds: NestedFolds, keep: NDArray[np.bool_]) -> float:
    """Mean AUC over the outer folds of the rows kept; folds with one label are left out."""
    kept = [scored[keep[scored]] for _, scored, _ in folds]
    return float(np.mean([roc_auc(label[i], score[i]) for i in kept if len(np.unique(label[i])) == 2]))
