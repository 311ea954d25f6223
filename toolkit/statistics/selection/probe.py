"""A linear probe beside the tests: how well selected features predict correct answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from sklearn.utils.parallel import Parallel, delayed

from rlgen_stats.schemas.dims import FEATURE, TASK
from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.statistics.core.comparability import source_attrs
from rlgen_stats.toolkit.statistics.core.coordinates import feature_ranks, find_models
from rlgen_stats.toolkit.statistics.core.feature_blocks import feature_arrays, in_prompt_order
from rlgen_stats.toolkit.statistics.core.units import cluster_codes, present_prompts, unit_attrs
from rlgen_stats.toolkit.statistics.kernels.numerics import IntArray
from rlgen_stats.toolkit.statistics.selection.linear_probe import FittedProbe, fit_probe, matched_sets, nested_folds
from rlgen_stats.toolkit.statistics.selection.members import (
    Members,
    SelectedMembers,
    selected_members,
    selection_unit,
)
from rlgen_stats.toolkit.statistics.selection.task_prompts import greedy_correctness


def correctness_probe(
    features: xr.Dataset,
    outcomes: xr.Dataset,
    selection: xr.Dataset,
    *,
    model: str | None = None,
    tasks: Sequence[str] | None = None,
    members: Members = "selected",
    variable: str = "mean",
    n_random: int = 99,
    n_outer: int = 5,
    n_inner: int = 3,
    seed: int = 0,
    n_jobs: int = 1,
    progress: Progress = SILENT,
) -> xr.Dataset:
    """Describe how well selected features predict a model's correctness, beside random features matched on firing rate.

    Parameters
    ----------
    features, outcomes
        Layouts ``features`` and ``outcomes`` of one study.
    selection
        Result of ``select_features``.
    model
        Model whose activations and greedy answers are used; default the selection's target.
    tasks
        Tasks whose verification prompts are used; default those selected on.
    members
        ``selected``, ``candidate`` (CONFIRMED and CANDIDATE), ``paper`` (the paper's set) or ``stable``.
    variable
        Summary that predicts: mean, firing or max.
    n_random
        Random sets of the same size, matched feature by feature on firing rate, none of them selected.
    n_outer, n_inner
        Outer folds, each predicted by the others, and inner folds that choose the penalty; a cluster is in one fold.
    seed
        Seed of folds and sets; results depend neither on chunks nor on the order of prompts or features.
    n_jobs
        Processes that fit sets in parallel (joblib).
    progress
        Where progress is reported.

    Returns
    -------
    xr.Dataset
        ``auc`` (mean over the outer folds), ``log_loss`` (nats per prompt, out of fold), ``log_loss_chance`` (of the
        training folds' share of correct answers), ``random_auc``, ``random_log_loss`` [random_set], ``p_auc``,
        ``p_log_loss`` (rank among the random sets), ``coefficient`` [feature] (log-odds per standard deviation, mean
        over outer folds). Computed at once.

    Raises
    ------
    RefusedError
        If the selection is of another split, study or crosscoder, is empty, or there are too few prompts for the folds.
    InputError
        If a name is unknown, a number of folds is below two, or too few features are left to draw random sets from.

    Notes
    -----
    Descriptive: a probe finds what correlates with correct answers (task, topic, length), not what causes them;
    ``p_auc`` asks whether these features predict better than random ones as frequent, not whether they cause anything.
    The set was chosen by tests, not by the probe, on other prompts, so nothing here is fitted to the prompts it is
    scored on. Firing rates are those of ``model`` on the same verification prompts; answers play no part in the
    matching. Random sets are drawn without replacement from features that fire on at least ten of these prompts; where
    the nearest in firing rate are taken, the next nearest are drawn (``worst_match``: largest gap, in ranks of the
    firing rate over the features that may be drawn, as a share of their number).

    References
    ----------
    Alain and Bengio 2016, arXiv:1610.01644 (linear probes); against control sets: Hewitt and Liang 2019,
    doi:10.18653/v1/D19-1275; nested folds: Varma and Simon 2006, doi:10.1186/1471-2105-7-91; rank p-value: Phipson and
    Smyth 2010, doi:10.2202/1544-6115.1585.

    Examples
    --------
    >>> correctness_probe(open_features(f), open_outcomes(o), selection, model="rl@80")  # doctest: +SKIP
    """
    if min(n_outer, n_inner) < 2 or n_random < 1:
        raise InputError(f"expected n_outer >= 2, n_inner >= 2, n_random >= 1; got {n_outer}, {n_inner}, {n_random}.")
    unit, clusters = selection_unit(selection)
    features = in_prompt_order(features, repeated=unit == "token")
    chosen = selected_members(features, selection, "verification", members)
    (name,) = find_models(features, [model if model is not None else str(selection.attrs.get("target"))])
    prompts, correct = _answers(features, outcomes, selection, name, tasks, chosen)
    codes = cluster_codes(features, clusters)
    groups = prompts if codes is None else codes[prompts]
    (values, firing), _ = feature_arrays(features, [variable, "firing"], [name])
    counts = (firing[0, prompts] > 0).sum(axis=0).compute()
    sets_seed = derive_seed(seed, "probe", "sets")
    sets, worst_match = matched_sets(counts, chosen.features, feature_ranks(features), n_random, sets_seed)
    needed = np.unique(sets)
    x = values[0, prompts][:, needed].compute().astype(np.float64)
    folds = nested_folds(correct, groups, n_outer, n_inner, derive_seed(seed, "probe", "folds") % 2**32)
    with progress.task("probes", total=len(sets), unit="set") as task:
        probes = []
        work = (delayed(fit_probe)(x[:, np.searchsorted(needed, index)], correct, folds) for index in sets)
        for probe in Parallel(n_jobs=n_jobs, return_as="generator")(work):
            probes.append(probe)
            task.advance()
    attrs = source_attrs(features) | unit_attrs(unit, clusters, codes)
    attrs |= {"test": "linear probe against random sets of the same size and firing rates", "role": "descriptive"}
    attrs |= {"null": "the set predicts correct answers no better than random sets matched on firing rate"}
    attrs |= {"model": name, "variable": variable, "members": members, "split_hash": selection.attrs["split_hash"]}
    attrs |= {"n": len(correct), "n_right": int(correct.sum()), "n_features": len(chosen.features)}
    attrs |= {"worst_match": worst_match, "n_outer": n_outer, "n_inner": n_inner, "n_random": n_random, "seed": seed}
    return _labelled(probes, chosen).assign_attrs(attrs | {"conditioned": chosen.conditioned})


def _labelled(probes: list[FittedProbe], chosen: SelectedMembers) -> xr.Dataset:
    """Results of the selected set (the first) beside those of the random sets."""
    selected, random = probes[0], probes[1:]
    auc, loss = (np.array([getattr(probe, name) for probe in random]) for name in ("auc", "log_loss"))
    n_as_good = [np.count_nonzero(auc >= selected.auc), np.count_nonzero(loss <= selected.log_loss)]
    p_auc, p_loss = ((1 + count) / (len(random) + 1) for count in n_as_good)
    return xr.Dataset(
        {
            "auc": selected.auc,
            "log_loss": selected.log_loss,
            "log_loss_chance": selected.chance,
            "p_auc": p_auc,
            "p_log_loss": p_loss,
            "random_auc": ("random_set", auc),
            "random_log_loss": ("random_set", loss),
            "coefficient": (FEATURE, selected.coefficient),
        },
        coords={FEATURE: (FEATURE, chosen.labels)},
    )


def _answers(
    features: xr.Dataset,
    outcomes: xr.Dataset,
    selection: xr.Dataset,
    model: str,
    tasks: Sequence[str] | None,
    chosen: SelectedMembers,
) -> tuple[IntArray, IntArray]:
    """Verification prompts with a graded answer and a summary, and whether the answer is correct."""
    known = selection[TASK].values.astype(np.str_)
    used = known[np.asarray(selection["used"].values, dtype=bool)] if tasks is None else np.array(list(tasks), str)
    unknown = np.setdiff1d(used, known)
    if len(unknown):
        raise InputError(f"task {str(unknown[0])!r} is not in the selection; expected some of {known.tolist()}.")
    correct = greedy_correctness(features, outcomes, [model])[0]
    of_prompt = np.asarray(features[TASK].values).astype(np.str_)
    usable = chosen.prompts & present_prompts(features, [model]) & np.isin(of_prompt, used) & (correct >= 0)
    prompts = np.flatnonzero(usable)
    if len(np.unique(correct[prompts])) < 2:
        raise RefusedError(
            f"{model} answers all of the {len(prompts)} verification prompts alike, so there is nothing to predict; "
            "choose another model or other tasks."
        )
    return prompts, correct[prompts]
