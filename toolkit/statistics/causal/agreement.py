"""Whether an edited model's completions become the other model's, prompt by prompt (V6 of docs/method.md 4d)."""

from __future__ import annotations

from collections.abc import Callable
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
ASPECTS: Final = ("outcome", "ending", "text")

_Similarity = Callable[[Any, Any], Floats]


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
    vectorizer = HashingVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", lowercase=False, alternate_sign=False)
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


def agreement_of(table: OutcomeTable) -> Agreement:
    """Agreement of the set's arm with the other model on target prompts where it changed what the model writes.

    Notes
    -----
    With A(i, j) how far the completion of prompt i agrees with the other model's of prompt j (1 or 0 for outcome and
    ending, the cosine of words and pairs of words for texts), the entry of prompt i is half of [A(i, i) - mean over
    j of A(i, j)] of the edited minus the same of the unedited model. The mean over the other changed prompts j of the
    same task and sample is what permuting prompts within tasks gives on average. What both models write about a prompt
    anyway, such as its own words, cancels. Sample s is compared with sample s, which has the same seed.
    """
    endings = kinds_of_endings(table)
    changed = (endings[0] != endings[1]) | (table.correct[table.unedited] != table.correct[table.chosen])
    if table.texts is not None:
        changed |= table.texts.unedited != table.texts.edited
    changed &= table.target[:, None]
    triples: dict[str, tuple[_Similarity, tuple[Any, Any, Any]]] = {
        "outcome": (_same, (table.correct[table.unedited], table.correct[table.chosen], table.other_correct)),
        "ending": (_same, (*endings, table.other_ending)),
    }
    if table.texts is not None:
        triples["text"] = (_cosine, (table.texts.unedited, table.texts.edited, table.texts.other))
    shape = table.other_ending.shape
    gained = {name: np.full(shape, np.nan) for name in triples}
    attainable = {name: np.full(shape, np.nan) for name in triples}
    for sample in range(shape[1]):
        for task in np.unique(table.task[changed[:, sample]]):
            rows = np.flatnonzero(changed[:, sample] & (table.task == task))
            if len(rows) < 2:
                continue
            for name, (similarity, columns) in triples.items():
                before, after, other = (column[rows, sample] for column in columns)
                start = _beyond_chance(similarity(before, other))
                gained[name][rows, sample] = (_beyond_chance(similarity(after, other)) - start) / 2
                attainable[name][rows, sample] = (_beyond_chance(similarity(other, other)) - start) / 2
    prompts = np.flatnonzero(np.isfinite(gained["outcome"]).any(axis=1))
    return Agreement(
        prompts,
        {name: np.nanmean(values[prompts], axis=1) for name, values in gained.items()},
        np.nanmean(np.stack(list(attainable.values()))[:, prompts], axis=(0, 2)),
    )


def _beyond_chance(agreement: Floats) -> Floats:
    """[prompt] agreement with the own counterpart minus the mean of that with the others'."""
    n = len(agreement)
    own = np.diagonal(agreement)
    return np.asarray(own - (agreement.sum(axis=1) - own) / (n - 1), dtype=np.float64)


def _same(first: Any, second: Any) -> Floats:
    return np.asarray(first[:, None] == second[None, :], dtype=np.float64)


def _cosine(first: Any, second: Any) -> Floats:
    return np.asarray((words_of(first) @ words_of(second).T).toarray(), dtype=np.float64)
