"""Words of prompts that tell where two models differ, and how many other texts hold them (V4 of docs/method.md 4d)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from scipy import stats
from sklearn.feature_extraction.text import CountVectorizer

from rlgen_stats.toolkit.statistics.causal.outcome_table import Floats
from rlgen_stats.toolkit.statistics.kernels import adjust

MIN_TEXTS: Final = 5
"""Prompts that must hold a word before it is looked at."""


def telling_words(prompts: Any, differs: Floats, *, alpha: float) -> list[str]:
    """Words whose prompts differ more often than those without them.

    Parameters
    ----------
    prompts
        [prompt] texts.
    differs
        [prompt] share of samples on which two models do; above one half counts.
    alpha
        Family-wise level over all words (Holm).

    Returns
    -------
    list of str
        In alphabetical order.

    Notes
    -----
    One-sided Fisher tests with prompts as units: how many of a word's prompts differ, given how many do.

    Examples
    --------
    >>> prompts = ["hmm 2 3", "please 2 3"] * 20
    >>> telling_words(prompts, np.array([1.0, 0.0] * 20), alpha=0.05)
    ['hmm']
    """
    vectorizer = CountVectorizer(token_pattern=r"\S+", lowercase=False, binary=True)
    try:
        holds = vectorizer.fit_transform([str(prompt) for prompt in prompts]).tocsc()
    except ValueError:  # no words at all
        return []
    n_with = np.asarray(holds.sum(axis=0)).ravel()
    frequent = np.flatnonzero(n_with >= MIN_TEXTS)
    if not len(frequent):
        return []
    different = (differs > 0.5).astype(np.int64)
    n_both = holds[:, frequent].T @ different
    p_values = stats.hypergeom.sf(n_both - 1, len(different), different.sum(), n_with[frequent])
    told = frequent[np.atleast_1d(np.asarray(adjust(p_values, method="holm"))) <= alpha]
    return [str(word) for word in vectorizer.get_feature_names_out()[told]]


def with_any_of(texts: Sequence[str], words: Sequence[str]) -> float:
    """Share of texts that hold one of the words; NaN without texts.

    Examples
    --------
    >>> with_any_of(["hmm 2", "please 2"], ["hmm"])
    0.5
    """
    return float(np.mean([bool(set(words) & set(text.split())) for text in texts])) if texts else float("nan")
