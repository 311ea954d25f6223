"""A regularised logistic probe in nested folds, and random sets of features to compare it with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.statistics.core.feature_blocks import DEFAULT_MIN_FIRING
from rlgen_stats.toolkit.statistics.core.nearest_draws import matched_on_rate
from rlgen_stats.toolkit.statistics.kernels.numerics import FloatArray, IntArray

STRENGTHS: Final = (0.01, 0.1, 1.0)
"""Inverse penalties C of standardised features, from strong to scikit-learn's default; inner folds choose one."""

Split = tuple[IntArray, IntArray]
"""Training and scored rows."""
NestedFolds = list[tuple[IntArray, IntArray, list[Split]]]
"""Training and scored rows of each outer fold, and the inner folds of the training ones (positions in them)."""


@dataclass(frozen=True)
class FittedProbe:
    """A probe, scored out of fold."""

    auc: float
    """Mean over the outer folds."""
    log_loss: float
    """Nats per row."""
    chance: float
    """Log loss of the training folds' share of ones."""
    coefficient: FloatArray
    """[column]: log-odds per standard deviation, mean over the outer folds."""
    predicted: FloatArray
    """[row]: probability of a one."""


def matched_sets(
    counts: IntArray, selected: IntArray, ranks: IntArray, n_random: int, seed: int
) -> tuple[list[IntArray], float]:
    """The selected features and ``n_random`` sets matched to them on firing counts, as positions; the worst match.

    Members are drawn in order of their labels, so that draws do not depend on the order of the features. The match is
    on one covariate, in ranks; the trial's controls (``causal.controls``) are matched on four and then balanced, by
    the same draw.
    """
    alive = np.flatnonzero(counts >= DEFAULT_MIN_FIRING)
    alive = alive[np.lexsort((ranks[alive], counts[alive]))]
    free = alive[~np.isin(alive, selected)]
    n, m = len(free), len(selected)
    if n < 2 * m:
        raise InputError(
            f"random sets of {m} need at least {2 * m} other features that fire on "
            f"{DEFAULT_MIN_FIRING} verification prompts, got {n}; choose fewer features (max_features)."
        )
    members = selected[np.argsort(ranks[selected], kind="stable")]
    drawn, worst = matched_on_rate(counts[free], counts[members], n_random, seed=seed)
    return [selected, *free[drawn]], worst / n


def nested_folds(correct: IntArray, groups: IntArray, n_outer: int, n_inner: int, seed: int) -> NestedFolds:
    """Outer folds of rows labelled 0 or 1, each with inner folds; the rows of a group are all in one fold."""
    fewest = min(len(np.unique(groups[correct == answer])) for answer in (0, 1))
    if fewest < n_outer * 2:
        raise RefusedError(
            f"{n_outer} outer folds need at least {2 * n_outer} units with right and with wrong answers each, got "
            f"{fewest}; use fewer folds, more prompts or more tasks."
        )
    folds = []
    outer = StratifiedGroupKFold(n_outer, shuffle=True, random_state=seed)
    for train, score in outer.split(groups, correct, groups):
        inner = StratifiedGroupKFold(n_inner, shuffle=True, random_state=seed)
        folds.append((train, score, list(inner.split(train, correct[train], groups[train]))))
    return folds


def fit_probe(x: FloatArray, correct: IntArray, folds: NestedFolds) -> FittedProbe:
    """Predict labels [row] from standardised columns of ``x`` [row, column]; inner folds choose the penalty."""
    predicted, chance = np.empty(len(correct)), np.empty(len(correct))
    auc, coefficients = [], []
    for train, score, inner in folds:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        search = GridSearchCV(model, {"logisticregression__C": STRENGTHS}, cv=inner, scoring="neg_log_loss")
        search.fit(x[train], correct[train])
        predicted[score], chance[score] = search.predict_proba(x[score])[:, 1], correct[train].mean()
        auc.append(roc_auc_score(correct[score], predicted[score]))
        coefficients.append(search.best_estimator_[-1].coef_[0])
    return FittedProbe(
        auc=float(np.mean(auc)),
        log_loss=float(log_loss(correct, predicted)),
        chance=float(log_loss(correct, chance)),
        coefficient=np.mean(coefficients, axis=0),
        predicted=predicted,
    )
