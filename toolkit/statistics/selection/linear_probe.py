"""A regularised logistic probe in nested folds, and random sets of features to compare it with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

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
        splits = [(train[fitted], train[held_out]) for fitted, held_out in inner]
        losses = [np.mean([_log_loss(correct[b], _fit(x, correct, a, c)[0][b]) for a, b in splits]) for c in STRENGTHS]
        probability, coefficient = _fit(x, correct, train, STRENGTHS[int(np.argmin(losses))])
        predicted[score], chance[score] = probability[score], correct[train].mean()
        auc.append(roc_auc(correct[score], predicted[score]))
        coefficients.append(coefficient)
    return FittedProbe(
        auc=float(np.mean(auc)),
        log_loss=_log_loss(correct, predicted),
        chance=_log_loss(correct, chance),
        coefficient=np.mean(coefficients, axis=0),
        predicted=predicted,
    )


def roc_auc(label: IntArray, score: FloatArray) -> float:
    """How often a row labelled one scores above one labelled zero, ties counted half: from the sum of the ones' ranks.

    The number of scikit-learn's ``roc_auc_score``, whose checks take twenty times as long on a fold of 240 rows.
    """
    ones = np.count_nonzero(label)
    above = rankdata(score)[label == 1].sum() - ones * (ones + 1) / 2
    return float(above / (ones * (len(label) - ones)))


def _fit(x: FloatArray, correct: IntArray, rows: IntArray, strength: float) -> tuple[FloatArray, FloatArray]:
    """Probability of a one in every row, and coefficients, of the probe fitted to ``rows``.

    Without scikit-learn's pipeline and grid search, whose bookkeeping takes longer than such small fits.
    """
    scale = x[rows].std(axis=0)
    standardised = (x - x[rows].mean(axis=0)) / np.where(scale == 0, 1.0, scale)
    model = LogisticRegression(C=strength, max_iter=1000).fit(standardised[rows], correct[rows])
    return model.predict_proba(standardised)[:, 1], model.coef_[0]


def _log_loss(correct: IntArray, probability: FloatArray) -> float:
    """Nats per row."""
    given = np.where(correct == 1, probability, 1 - probability)
    return float(-np.log(np.maximum(given, np.finfo(np.float64).eps)).mean())
