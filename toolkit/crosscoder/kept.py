"""For every feature the few entries that stand first in some order, whatever the order in which they come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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


class Kept:
    """The ``n`` entries of smallest key of every feature; ties go to the earlier token.

    New entries wait until there are enough to make a merge worth its sort; :meth:`settle` merges those still waiting.

    Parameters
    ----------
    n_features, n, n_models
        Shape.

    Attributes
    ----------
    key
        Ascending, infinite where there is none: [feature, n].
    token
        -1 where there is none: [feature, n].
    values
        [feature, n, model].
    """

    def __init__(self, n_features: int, n: int, n_models: int) -> None:
        self.key = np.full((n_features, n), np.inf)
        self.token = np.full((n_features, n), -1, dtype=np.int64)
        self.values = np.zeros((n_features, n, n_models), dtype=np.float32)
        self._waiting: list[tuple[Entries, NDArray[np.float64]]] = []

    def wants(self, feature: NDArray[np.int64], key: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which entries could be kept. Later tokens never displace equal keys, so a tie is not wanted."""
        wanted: NDArray[np.bool_] = key < self.key[feature, -1]
        return wanted

    def update(self, entries: Entries, key: NDArray[np.float64]) -> None:
        """Take in entries whose tokens come after all earlier ones."""
        near = self.wants(entries.feature, key)
        self._waiting.append((entries[near], key[near]))
        if sum(len(waiting) for _, waiting in self._waiting) > self.key.size // 4:
            self.settle()

    def settle(self) -> None:
        """Merge the entries that wait."""
        if not self._waiting:
            return
        feature = np.concatenate([entries.feature for entries, _ in self._waiting])
        touched, row = np.unique(feature, return_inverse=True)
        n = self.key.shape[1]
        rows = np.concatenate([np.repeat(np.arange(len(touched)), n), row])
        keys = np.concatenate([self.key[touched].ravel(), *(key for _, key in self._waiting)])
        tokens = np.concatenate([self.token[touched].ravel(), *(entries.token for entries, _ in self._waiting)])
        before = self.values[touched].reshape(-1, self.values.shape[2])
        values = np.concatenate([before, *(entries.values for entries, _ in self._waiting)])
        self._waiting = []
        order = np.lexsort((tokens, keys, rows))
        start = np.searchsorted(rows[order], np.arange(len(touched)))
        first = order[start[:, None] + np.arange(n)]  # every touched feature has at least the n it had
        self.key[touched], self.token[touched], self.values[touched] = keys[first], tokens[first], values[first]


def text_peaks(entries: Entries, text: NDArray[np.int64], value: NDArray[np.float32]) -> NDArray[np.int64]:
    """The entry with the largest ``value`` of every feature in every text, the earliest of several: indices."""
    order = np.lexsort((entries.token, -value, text, entries.feature))
    feature, text = entries.feature[order], text[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (feature[1:] != feature[:-1]) | (text[1:] != text[:-1])
    return order[new]


def random_keys(entries: Entries, seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) of each feature and token, the same whatever the order: [entry].

    The n smallest are a simple random sample without replacement (splitmix64 of the pair and the seed).
    """
    with np.errstate(over="ignore"):
        mixed = entries.token.astype(np.uint64) + np.uint64(seed % (1 << 63)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = _splitmix64(mixed) ^ (entries.feature.astype(np.uint64) + np.uint64(1))
        return (_splitmix64(mixed) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
