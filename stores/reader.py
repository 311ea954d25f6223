"""Shuffled and sequential batches of the same tokens in several views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import zarr
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import CHANNEL
from rlgen_stats.schemas.errors import InputError, StoreError
from rlgen_stats.stores.activations import ARRAY, activation_group, complete_models

BUFFER_BYTES: Final = 1 << 30
"""Memory for the shuffle buffer: shards are drawn at random into it, rows at random out of it."""


class PairedReader:
    """Batches [batch, view, channel] float32 of the same tokens in every view.

    Parameters
    ----------
    path, models, site
        Store, views in order, and site.
    batch_size
        Tokens per batch.
    seed
        Order of an epoch is a function of (seed, epoch) alone.
    mask
        Optional [token] bool: only these tokens are read.
    buffer_bytes
        Bound of the shuffle buffer.

    Raises
    ------
    StoreError
        If a view is not complete in the store or widths differ.
    InputError
        If the mask has another length or leaves fewer tokens than one batch.

    Notes
    -----
    Each epoch visits every token once, except a last short batch. If all shards fit the buffer the order is a uniform
    random permutation; otherwise shards are drawn at random in groups that fill the buffer and rows are shuffled
    within a group.
    """

    def __init__(
        self,
        path: Path | str,
        models: Sequence[str],
        site: str,
        *,
        batch_size: int,
        seed: int,
        mask: NDArray[np.bool_] | None = None,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        absent = [model for model in models if model not in complete_models(path, site)]
        if absent:
            raise StoreError(
                f"{path} has no complete activations of {absent} at {site!r}; run the extract stage first."
            )
        root = zarr.open_group(path, mode="r")
        self._arrays: list[Any] = [root[f"{activation_group(model, site)}/{ARRAY}"] for model in models]
        widths = {array.shape[1] for array in self._arrays}
        if len(widths) > 1:
            raise StoreError(f"views must have one {CHANNEL} width to be stacked, got {sorted(widths)}.")
        total = self._arrays[0].shape[0]
        mask = np.ones(total, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
        if mask.shape != (total,):
            raise InputError(f"the mask must have one entry a token, {total}, got shape {mask.shape}.")
        self._mask, self._seed, self.batch_size = mask, int(seed), int(batch_size)
        self.models, self.width, self.n_tokens = tuple(models), widths.pop(), int(mask.sum())
        if self.n_tokens < self.batch_size:
            raise InputError(f"the mask leaves {self.n_tokens} tokens, fewer than one batch of {self.batch_size}.")
        self._shard = self._arrays[0].chunks[0]
        row_bytes = 4 * len(self._arrays) * self.width
        self._shards_per_buffer = max(1, int(buffer_bytes // (row_bytes * self._shard)))
        self._kept: NDArray[np.float32] | None = None

    def _shard_rows(self, index: int) -> NDArray[np.float32]:
        start = index * self._shard
        keep = self._mask[start : start + self._shard]
        if not keep.any():
            return np.empty((0, len(self._arrays), self.width), dtype=np.float32)
        stop = start + len(keep)
        return np.stack([np.asarray(a[start:stop], dtype=np.float32)[keep] for a in self._arrays], axis=1)

    def _group(self, shards: NDArray[np.int64]) -> NDArray[np.float32]:
        if len(shards) < -(-len(self._mask) // self._shard):
            return np.concatenate([self._shard_rows(int(i)) for i in shards])
        if self._kept is None:  # everything fits: read once, keep for later epochs
            self._kept = np.concatenate([self._shard_rows(i) for i in range(len(shards))])
        return self._kept

    def epoch(self, epoch: int) -> Iterator[NDArray[np.float32]]:
        """Shuffled batches of one epoch."""
        random = np.random.default_rng([self._seed, int(epoch)])
        shards = random.permutation(-(-len(self._mask) // self._shard))
        rest = np.empty((0, len(self._arrays), self.width), dtype=np.float32)
        for first in range(0, len(shards), self._shards_per_buffer):
            block = self._group(shards[first : first + self._shards_per_buffer])
            order = random.permutation(len(block) + len(rest))
            if len(rest):
                block = np.concatenate([rest, block])
            whole = len(order) - len(order) % self.batch_size
            for start in range(0, whole, self.batch_size):
                yield block[order[start : start + self.batch_size]]
            rest = block[order[whole:]]

    def sequential(self, batch_size: int | None = None) -> Iterator[NDArray[np.float32]]:
        """Batches in store order; the last may be short."""
        size = batch_size or self.batch_size
        rest = np.empty((0, len(self._arrays), self.width), dtype=np.float32)
        for index in range(-(-len(self._mask) // self._shard)):
            block = np.concatenate([rest, self._shard_rows(index)])
            whole = len(block) - len(block) % size
            for start in range(0, whole, size):
                yield block[start : start + size]
            rest = block[whole:]
        if len(rest):
            yield rest
