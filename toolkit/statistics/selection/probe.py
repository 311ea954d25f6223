"""A linear probe beside the tests: how well selected features tell right answers from wrong ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.parallel import Parallel, delayed

from rlgen_stats.schemas.dims import FEATURE, MODEL, TASK
from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.schemas.seeds import derive_seed
from rlgen_stats.toolkit.progress import SILENT, Progress
from rlgen_stats.toolkit.statistics.core.comparability import source_attrs
from rlgen_stats.toolkit.statistics.core.coordinates import feature_ranks
from rlgen_stats.toolkit.statistics.core.feature_blocks import DEFAULT_MIN_FIRING, feature_arrays, in_prompt_order
from rlgen_stats.toolkit.statistics.core.units import cluster_codes, present_prompts, unit_attrs
from rlgen_stats.toolkit.statistics.kernels.draws import stream
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray
from rlgen_stats.toolkit.statistics.selection.tasks import Chosen, Members, chosen_by, greedy_right, selection_unit

STRENGTHS: Final = (0.01, 0.1, 1.0)
"""Inverse penalties C the inner folds choose from, of standardised features: from almost none to scikit-learn's own."""

WINDOW: Final = 0.1
"""Share of the features free to be drawn among which a selected feature's match is: those nearest in firing rate."""
FEWEST_NEAR: Final = 10
"""Features among which a match is drawn at least: fewer would make the random sets much the same."""

Folds = list[tuple[IntArray, IntArray]]


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
    """Describe how well selected features predict whether a model answers right, beside random features as frequent.

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
        Random sets of the same size, matched feature by feature on how often they fire, none of them selected.
    n_outer, n_inner
        Folds that are predicted, and folds within the others that choose the penalty; whole clusters stay in one fold.
    seed
        Seed of folds and sets; results depend neither on chunks nor on the order of prompts or features.
    n_jobs
        Processes that fit sets side by side (joblib).
    progress
        Where progress is reported.

    Returns
    -------
    xr.Dataset
        ``auc`` (mean over the outer folds), ``log_loss`` (nats per prompt, out of fold), ``log_loss_chance`` (of the
        training folds' share of right answers), ``random_auc``, ``random_log_loss`` [random_set], ``p_auc``,
        ``p_log_loss`` (rank among the random sets), ``coefficient`` [feature] (log-odds per standard deviation, mean
        over outer folds). Computed at once.

    Raises
    ------
    RefusedError
        If the selection is of another split, study or crosscoder, chose nothing, or the prompts cannot carry the folds.
    InputError
        If a name is unknown, a number of folds is below two, or too few features are left to draw random sets from.

    Notes
    -----
    Descriptive: a probe finds what goes along with right answers (task, topic, length), not what brings them about;
    ``p_auc`` asks whether these features tell more than random ones as frequent, not whether they cause anything. The
    set was chosen by tests, not by the probe, on other prompts, so nothing here is fitted to the prompts it is scored
    on. Firing rates are those of ``model`` on the same verification prompts; answers play no part in the matching.
    Random sets are drawn from features that fire on at least ten of these prompts; where the features as frequent run
    out, the next frequent ones are taken (``worst_match``: largest gap, in ranks of the firing rate over all features
    alive).

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
    chosen = chosen_by(features, selection, "verification", members)
    name = model if model is not None else str(selection.attrs.get("target"))
    here, right = _answers(features, outcomes, selection, name, tasks, chosen)
    codes = cluster_codes(features, clusters)
    groups = here if codes is None else codes[here]
    (values, firing), _ = feature_arrays(features, [variable, "firing"], [name])
    rates = (firing[0, here] > 0).sum(axis=0).compute()
    sets, gap = _sets(rates, chosen.features, feature_ranks(features), n_random, derive_seed(seed, "probe", "sets"))
    needed = np.unique(sets)
    x = values[0, here][:, needed].compute().astype(np.float64)
    folds = _nested(right, groups, n_outer, n_inner, derive_seed(seed, "probe", "folds") % 2**32)
    with progress.task("probes", total=len(sets), unit="set") as task:
        found = []
        work = (delayed(_probe)(x[:, np.searchsorted(needed, index)], right, folds) for index in sets)
        for one in Parallel(n_jobs=n_jobs, return_as="generator")(work):
            found.append(one)
            task.advance()
    attrs = source_attrs(features) | unit_attrs(unit, clusters, codes)
    attrs |= {"test": "linear probe against random sets of the same size and firing rates", "role": "descriptive"}
    attrs |= {"null": "the set tells right from wrong answers no better than random sets matched on firing rate"}
    attrs |= {"model": name, "variable": variable, "members": members, "split_hash": selection.attrs["split_hash"]}
    attrs |= {"n": len(right), "n_right": int(right.sum()), "n_features": len(chosen.features), "worst_match": gap}
    attrs |= {
        "n_outer": n_outer,
        "n_inner": n_inner,
        "n_random": n_random,
        "seed": seed,
        "conditioned": chosen.conditioned,
    }
    return _labelled(found, chosen).assign_attrs(attrs)


@dataclass(frozen=True)
class _Fitted:
    """A set's probe, scored out of fold."""

    auc: float
    log_loss: float
    chance: float
    coefficient: FloatArray


def _labelled(found: list[_Fitted], chosen: Chosen) -> xr.Dataset:
    own, random = found[0], found[1:]
    auc, loss = (np.array([getattr(one, name) for one in random]) for name in ("auc", "log_loss"))
    better = [np.count_nonzero(auc >= own.auc), np.count_nonzero(loss <= own.log_loss)]
    p_auc, p_loss = ((1 + count) / (len(random) + 1) for count in better)
    return xr.Dataset(
        {
            "auc": own.auc, "log_loss": own.log_loss, "log_loss_chance": own.chance, "p_auc": p_auc,
            "p_log_loss": p_loss, "random_auc": ("random_set", auc), "random_log_loss": ("random_set", loss),
            "coefficient": (FEATURE, own.coefficient),
        },
        coords={FEATURE: (FEATURE, chosen.labels)},
    )  # fmt: skip


def _answers(
    features: xr.Dataset,
    outcomes: xr.Dataset,
    selection: xr.Dataset,
    model: str,
    tasks: Sequence[str] | None,
    chosen: Chosen,
) -> tuple[IntArray, IntArray]:
    """Verification prompts with a graded answer and a summary, and whether the answer is right."""
    known = selection[TASK].values.astype(np.str_)
    wanted = known[np.asarray(selection["used"].values, dtype=bool)] if tasks is None else np.array(list(tasks), str)
    unknown = np.setdiff1d(wanted, known)
    if len(unknown):
        raise InputError(f"task {str(unknown[0])!r} is not in the selection; expected some of {known.tolist()}.")
    if model not in features[MODEL].values:
        raise InputError(f"model {model!r} is not in the features; they have {features[MODEL].values.tolist()}.")
    right = greedy_right(features, outcomes, [model])[0]
    of_prompt = np.asarray(features[TASK].values).astype(np.str_)
    usable = chosen.prompts & present_prompts(features, [model]) & np.isin(of_prompt, wanted) & (right >= 0)
    here = np.flatnonzero(usable)
    if len(np.unique(right[here])) < 2:
        raise RefusedError(
            f"{model} answers all of the {len(here)} verification prompts alike, so there is nothing to predict; "
            "choose another model or other tasks."
        )
    return here, right[here]


def _sets(rates: IntArray, own: IntArray, ranks: IntArray, n_random: int, seed: int) -> tuple[list[IntArray], float]:
    """The selected features and ``n_random`` sets matched to them, as positions; and the worst match.

    Features are taken in order of their labels, so that draws do not depend on where they stand.
    """
    alive = np.flatnonzero(rates >= DEFAULT_MIN_FIRING)
    alive = alive[np.lexsort((ranks[alive], rates[alive]))]
    free = alive[~np.isin(alive, own)]
    if len(free) < 2 * len(own):
        raise InputError(
            f"random sets of {len(own)} need at least {2 * len(own)} other features that fire on "
            f"{DEFAULT_MIN_FIRING} verification prompts, got {len(free)}; choose fewer features (max_features)."
        )
    place = np.searchsorted(rates[free], rates[own])  # where each selected feature would stand among the free ones
    width = max(int(WINDOW * len(free)), FEWEST_NEAR)
    sets, worst = [own], 0
    for b in range(n_random):
        rng, left, drawn = stream(seed, b), np.ones(len(free), dtype=bool), []
        for at in place[np.argsort(ranks[own], kind="stable")]:
            near = np.flatnonzero(left)
            near = near[np.argsort(np.abs(near - at), kind="stable")[:width]]
            pick = near[rng.integers(len(near))]
            left[pick] = False
            drawn.append(free[pick])
            worst = max(worst, int(abs(pick - at)))
        sets.append(np.array(drawn, dtype=np.int64))
    return sets, worst / len(free)


def _nested(right: IntArray, groups: IntArray, n_outer: int, n_inner: int, seed: int) -> list[tuple[Any, Any, Folds]]:
    """Training and scored prompts of each outer fold, and the inner folds of the former (positions in it)."""
    fewest = min(len(np.unique(groups[right == answer])) for answer in (0, 1))
    if fewest < n_outer * 2:
        raise RefusedError(
            f"{n_outer} outer folds need at least {2 * n_outer} units with right and with wrong answers each, got "
            f"{fewest}; use fewer folds, more prompts or more tasks."
        )
    folds = []
    for train, score in StratifiedGroupKFold(n_outer, shuffle=True, random_state=seed).split(groups, right, groups):
        inner = StratifiedGroupKFold(n_inner, shuffle=True, random_state=seed)
        folds.append((train, score, list(inner.split(train, right[train], groups[train]))))
    return folds


def _probe(x: FloatArray, right: NDArray[Any], folds: list[tuple[Any, Any, Folds]]) -> _Fitted:
    guess, chance = np.empty(len(right)), np.empty(len(right))
    auc, coefficients = [], []
    for train, score, inner in folds:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        search = GridSearchCV(model, {"logisticregression__C": STRENGTHS}, cv=inner, scoring="neg_log_loss")
        search.fit(x[train], right[train])
        guess[score], chance[score] = search.predict_proba(x[score])[:, 1], right[train].mean()
        auc.append(roc_auc_score(right[score], guess[score]))
        coefficients.append(search.best_estimator_[-1].coef_[0])
    return _Fitted(
        float(np.mean(auc)),
        float(log_loss(right, guess)),
        float(log_loss(right, chance)),
        np.mean(coefficients, axis=0),
    )
