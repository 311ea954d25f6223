"""Streaming top-n of every feature: the result does not depend on the order in which entries arrive."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.toolkit.counter_random import GOLDEN_GAMMA, splitmix64, unit_interval


@dataclass(frozen=True)
class Entries:
    """Tokens on which features fire.

    Parameters
    ----------
    feature, token
        [entry].
    values
        Activation of the feature at that token in every model: [entry, model].
    """

    feature: NDArray[np.int64]
    token: NDArray[np.int64]
    values: NDArray[np.float32]

    def __getitem__(self, which: NDArray[np.bool_] | NDArray[np.int64]) -> Entries:
        return Entries(self.feature[which], self.token[which], self.values[which])


class TopEntries:
    """The ``n`` entries with the smallest key of every feature, at most one per group; ties go to the earlier token.

    New entries are buffered until there are enough for a merge to be worth its sort; :meth:`flush` merges the rest.

    Parameters
    ----------
    n_features, n, n_models
        Shape.

    Attributes
    ----------
    key
        Ascending, infinite in empty places: [feature, n].
    token
        -1 in empty places: [feature, n].
    values
        [feature, n, model].
    """

    def __init__(self, n_features: int, n: int, n_models: int) -> None:
        self.key = np.full((n_features, n), np.inf)
        self.token = np.full((n_features, n), -1, dtype=np.int64)
        self.values = np.zeros((n_features, n, n_models), dtype=np.float32)
        self._group = np.tile(-1 - np.arange(n), (n_features, 1))  # each empty place has a group of its own
        self._buffer: list[tuple[Entries, NDArray[np.float64], NDArray[np.int64]]] = []

    def update(self, entries: Entries, key: NDArray[np.float64], group: NDArray[np.int64]) -> None:
        """Take in entries whose tokens come after all earlier ones'; groups are numbers from 0 on."""
        # "<", not "<=": among equal keys the earlier token stays, so a later one with the n-th key cannot enter
        enters = key < self.key[entries.feature, -1]
        if enters.any():
            self._buffer.append((entries[enters], key[enters], group[enters]))
        if sum(len(buffered) for _, buffered, _ in self._buffer) > self.key.size // 4:
            self.flush()

    def flush(self) -> None:
        """Merge the buffered entries; call it after the last block."""
        if not self._buffer:
            return
        new, new_key, new_group = zip(*self._buffer, strict=True)
        self._buffer = []
        touched, row = np.unique(np.concatenate([entries.feature for entries in new]), return_inverse=True)
        n = self.key.shape[1]
        rows = np.concatenate([np.repeat(np.arange(len(touched)), n), row])
        key = np.concatenate([self.key[touched].ravel(), *new_key])
        token = np.concatenate([self.token[touched].ravel(), *(entries.token for entries in new)])
        group = np.concatenate([self._group[touched].ravel(), *new_group])
        # first sort: the best entry of each group of each feature; second: the n best of these, feature by feature
        order = np.lexsort((token, key, group, rows))
        first = np.append(True, (np.diff(group[order]) != 0) | (np.diff(rows[order]) != 0))
        order = order[first]
        order = order[np.lexsort((token[order], key[order], rows[order]))]
        start = np.searchsorted(rows[order], np.arange(len(touched)))
        best = order[start[:, None] + np.arange(n)]  # a row keeps at least the n groups it had, empty places included
        before = self.values[touched].reshape(-1, self.values.shape[2])
        values = np.concatenate([before, *(entries.values for entries in new)])
        self.key[touched], self.token[touched], self._group[touched] = key[best], token[best], group[best]
        self.values[touched] = values[best]


def random_keys(entries: Entries, seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) of each feature and token, the same whatever the order: [entry].

    The n smallest are a simple random sample without replacement (SplitMix64 of the pair and the seed).
    """
    with np.errstate(over="ignore"):
        token = entries.token.astype(np.uint64) + np.uint64(seed % (1 << 63)) * GOLDEN_GAMMA
    feature = entries.feature.astype(np.uint64) + np.uint64(1)
    return unit_interval(splitmix64(splitmix64(token) ^ feature))
