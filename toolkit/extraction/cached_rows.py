"""Key-value caches whose rows leave and join while a batch is being completed.

A cache is as many columns wide as its batch has read tokens, pads included; the last column is every row's newest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

JOINABLE: Final = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    DummyLayer,
)
"""Kinds of layer, not their subclasses, that are nothing but keys and values by column, or a state by row."""


class PairedCache(DynamicCache):  # type: ignore[misc]
    """A cache that takes the cache of a source model along when rows of the batch leave, join or change places."""

    def __init__(self, config: Any, source_config: Any) -> None:
        super().__init__(config=config)
        self.source = DynamicCache(config=source_config)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take these rows in this order, in both caches."""
        super().reorder_cache(beam_idx)
        self.source.reorder_cache(beam_idx)


def can_join(cache: Any) -> bool:
    """Whether rows can be added to a cache of this kind."""
    return all(
        type(one) in (DynamicCache, PairedCache) and all(type(layer) in JOINABLE for layer in one.layers)
        for one in _with_source(cache)
    )


def join_rows(cache: Any, other: Any, n_columns: int) -> None:
    """Add the rows of another cache below; both are brought to ``n_columns``, on the left.

    Parameters
    ----------
    cache, other
        Caches of one model that :func:`can_join`. The first is changed.
    n_columns
        Columns that any row needs: columns to the left of them are dropped, missing ones are filled with zeros. The
        attention mask must leave both out.
    """
    for one, more in zip(_with_source(cache), _with_source(other), strict=True):
        for layer, added in zip(one.layers, more.layers, strict=True):
            _join_columns(layer, added, n_columns)
            for kind in ("conv_states", "recurrent_states"):
                states, new = getattr(layer, kind, {}), getattr(added, kind, {})
                states |= {i: torch.cat([state, new[i]]) for i, state in states.items() if state is not None}


def drop_columns(cache: Any, n_columns: int) -> None:
    """Keep the last columns, where :func:`can_join`; what is dropped must be pads of every row."""
    for one in _with_source(cache):
        for layer in one.layers:
            _join_columns(layer, None, n_columns)


def _with_source(cache: Any) -> Iterator[Any]:
    yield cache
    if isinstance(cache, PairedCache):
        yield cache.source


def _join_columns(layer: Any, added: Any, n_columns: int) -> None:
    if getattr(layer, "keys", None) is None:  # no attention, or another layer's keys
        return
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = n_columns
        n_columns = min(n_columns, layer.sliding_window - 1)
    for name in ("keys", "values"):
        parts = [getattr(one, name)[:, :, -n_columns:] for one in (layer, added) if one is not None]
        shape = (sum(len(part) for part in parts), parts[0].shape[1], n_columns, parts[0].shape[3])
        together = parts[0].new_zeros(shape)
        first = 0
        for part in parts:
            together[first : first + len(part), :, n_columns - part.shape[2] :] = part
            first += len(part)
        setattr(layer, name, together)
