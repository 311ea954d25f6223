"""Whether an edited model's completions become the other model's, prompt by prompt (V6 of docs/method.md 4d)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.feature_extraction.text import HashingVectorizer

from rlgen_stats.toolkit.statistics.causal.outcome_table import OUTCOME_CLASSES, Floats, OutcomeTable

NOVELTY_QUANTILE: Final = 0.05
"""A completion without an answer is no longer the other model's kind if it is less like every one of that model's than
all but this share of those are like the rest of them."""
UNLIKE: Final = len(OUTCOME_CLASSES)
"""Class of completions without an answer that are not of the other model's kind."""
N_HASHES: Final = 2**16
"""Columns that words are hashed to: a completion has tens of words."""
ASPECTS: Final = ("outcome", "ending", "text")


@dataclass(frozen=True)
class Agreement:
    """Agreement with the other model on the completions that changed, one entry a prompt that has some."""

    prompts: NDArray[np.int64]
    """Index of each in the table."""
    beyond_chance: dict[str, Floats]
    """``outcome``, ``ending`` and, where texts are known, ``text``: agreement gained over the unedited model, beyond
    what completions of other prompts of the task would give, in [-1, 1]."""
    attainable: Floats
    """What the other model itself would reach, mean over the aspects."""

    @property
    def mean(self) -> Floats:
        """Mean over the aspects."""
        return np.asarray(np.mean(list(self.beyond_chance.values()), axis=0), dtype=np.float64)


def words_of(texts: NDArray[Any]) -> sparse.csr_matrix:
    """Unit vectors of words and pairs of words, one row a text; their products are cosine similarities."""
    vectorizer = HashingVectorizer(
        n_features=N_HASHES, ngram_range=(1, 2), token_pattern=r"\S+", lowercase=False, alternate_sign=False
    )
    return vectorizer.transform([str(text) for text in texts.ravel()])


def kinds_of_endings(table: OutcomeTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[prompt, sample] endings of the unedited model and of the set's arm.

    Completions without an answer are :data:`UNLIKE` where they are not of the other model's kind: its own ramble,
    hedge or echo, whichever is nearest.
    """
    endings = [table.ending[arm].copy() for arm in (table.unedited, table.chosen)]
    silent = OUTCOME_CLASSES.index("no_answer")
    known = (table.other_ending == silent) & table.target[:, None]
    if table.texts is None or known.sum() < 2:
        return endings[0], endings[1]
    others = words_of(table.texts.other[known])
    among = (others @ others.T).toarray()
    np.fill_diagonal(among, -1.0)
    threshold = float(np.quantile(among.max(axis=1), NOVELTY_QUANTILE))
    for ending, texts in zip(endings, (table.texts.unedited, table.texts.edited), strict=True):
        mask = (ending == silent) & table.target[:, None]
        if mask.any():
            nearest = (words_of(texts[mask]) @ others.T).max(axis=1).toarray().ravel()
            ending[mask] = np.where(nearest < threshold - 1e-9, UNLIKE, silent)
    return endings[0], endings[1]


def agreement_of(table: OutcomeTable, endings: tuple[NDArray[np.int64], NDArray[np.int64]]) -> Agreement:
    """Agreement of the set's arm with the other model on target prompts where it changed what the model writes.

    Parameters
    ----------
    table
        Outcomes.
    endings
        As :func:`kinds_of_endings` gives them.

    Notes
    -----
    With A(i, j) how far the completion of prompt i agrees with the other model's of prompt j (1 or 0 for outcome and
    ending, the cosine of words and pairs of words for texts), the entry of prompt i is half of [A(i, i) - mean over
    j of A(i, j)] of the edited minus the same of the unedited model. The mean over all other target prompts j of the
    same task and sample, changed or not, is what permuting prompts within tasks gives on average: an edit that fails
    where the other model does is told from one that fails as often elsewhere. What both models write about a prompt
    anyway, such as its own words, cancels. Sample s is compared with sample s, which has the same seed.
    """
    changed = (endings[0] != endings[1]) | (table.correct[table.unedited] != table.correct[table.chosen])
    if table.texts is not None:
        changed |= table.texts.unedited != table.texts.edited
    changed &= table.target[:, None]
    aspects = ASPECTS if table.texts is not None else ASPECTS[:2]
    shape = table.other_ending.shape
    gained = {name: np.full(shape, np.nan) for name in aspects}
    attainable = {name: np.full(shape, np.nan) for name in aspects}
    for sample in range(shape[1]):
        columns = _columns(table, endings, sample)
        for task in np.unique(table.task[changed[:, sample]]):
            pool = np.flatnonzero(table.target & (table.task == task))
            if len(pool) < 2:
                continue
            own = np.flatnonzero(changed[pool, sample])
            for name, models in columns.items():
                before, after, other = (_beyond_chance(model[pool[own]], models[-1][pool], own) for model in models)
                gained[name][pool[own], sample] = (after - before) / 2
                attainable[name][pool[own], sample] = (other - before) / 2
    prompts = np.flatnonzero(np.isfinite(gained["outcome"]).any(axis=1))
    return Agreement(
        prompts,
        {name: np.nanmean(values[prompts], axis=1) for name, values in gained.items()},
        np.nanmean(np.stack(list(attainable.values()))[:, prompts], axis=(0, 2)),
    )


def _columns(
    table: OutcomeTable, endings: tuple[NDArray[np.int64], NDArray[np.int64]], sample: int
) -> dict[str, tuple[Any, ...]]:
    """What is compared of one sample: [prompt] of the unedited, the edited and the other model."""
    columns: dict[str, tuple[Any, ...]] = {
        "outcome": tuple(
            correct[:, sample]
            for correct in (table.correct[table.unedited], table.correct[table.chosen], table.other_correct)
        ),
        "ending": tuple(ending[:, sample] for ending in (*endings, table.other_ending)),
    }
    if table.texts is not None:
        sides = (table.texts.unedited, table.texts.edited, table.texts.other)
        columns["text"] = tuple(words_of(side[:, sample]) for side in sides)
    return columns


def _beyond_chance(rows: Any, others: Any, own: NDArray[np.int64]) -> Floats:
    """[row] agreement with the counterpart ``others[own[row]]`` minus the mean of that with all others."""
    alike = (rows @ others.T).toarray() if sparse.issparse(rows) else np.equal.outer(rows, others).astype(np.float64)
    with_own = alike[np.arange(len(own)), own]
    by_chance = (alike.sum(axis=1) - with_own) / (alike.shape[1] - 1)
    return np.asarray(with_own - by_chance, dtype=np.float64)
