"""Shuffled and sequential batches of the same tokens in several views."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError, StoreError
from rlgen_stats.stores.activation_store import shard_arrays
from rlgen_stats.stores.folder import StudyFolder, store_of
from rlgen_stats.stores.labels import TokenLabels, positions_in
from rlgen_stats.stores.shards import ShardArray, to_float32

BUFFER_BYTES: Final = 1 << 30
"""Memory for the shuffle buffer: shards are drawn at random into it, rows at random out of it."""
READERS: Final = min(4, os.cpu_count() or 1)
"""Threads that read shards into the buffer."""


class PairedReader:
    """Batches of the same tokens in every view.

    Parameters
    ----------
    path, models, site
        Study folder or activation store, views in order (``rl@final`` is a run's last checkpoint), and site.
    batch_size
        Tokens per batch.
    seed
        Order of an epoch is a function of (seed, epoch) alone.
    mask
        Optional [token] bool: only these tokens are read.
    where
        Optional labels, e.g. ``{"segment": "completion", "domain": "out"}``: only tokens with one of the values of
        each. They are found without reading token labels, and shards without such a token are never read.
    dtype
        ``"float32"``, or ``"stored"``: as kept, bfloat16 as its bits in uint16.
    buffer_bytes
        Bound of the shuffle buffer.
    drop_last
        Whether an epoch leaves out a last short batch.

    Raises
    ------
    StoreError
        If a view is not complete in the store, or the views have several types and dtype is "stored".
    InputError
        If a label is unknown, the mask has another length, or fewer tokens are left than one batch.

    Notes
    -----
    Batches are [batch, view, channel] if all views have one width, else a tuple with one [batch, channel] a view.
    Each epoch visits every token once, except a last short batch. If everything fits the buffer the order is a uniform
    random permutation and is read once; otherwise shards are drawn at random in groups that fill half the buffer, and
    rows are drawn at random within a group while the next group is read. Only whole shards are read from the disk.
    """

    def __init__(
        self,
        path: StudyFolder | Path | str,
        models: Sequence[str],
        site: str,
        *,
        batch_size: int,
        seed: int,
        mask: NDArray[np.bool_] | None = None,
        where: Mapping[str, object] | None = None,
        dtype: str = "float32",
        buffer_bytes: int = BUFFER_BYTES,
        drop_last: bool = True,
    ) -> None:
        store = store_of(path, "activations")
        _, named = shard_arrays(store, models, site, decoded=False)
        self._arrays: list[ShardArray] = [array for _, array in named]
        if dtype not in ("float32", "stored"):
            raise InputError(f"batches come as 'float32' or 'stored', got {dtype!r}.")
        kinds = {array.stored_type for array in self._arrays}
        if dtype == "stored" and len(kinds) > 1:
            raise StoreError(f"the views are kept as {sorted(kinds)}; read them as float32.")
        self._convert = dtype == "float32"
        self._kind = self._arrays[0].dtype if len(kinds) == 1 else np.dtype(np.float32)
        self.models = tuple(model for model, _ in named)
        self.batch_size, self._seed, self._drop_last = int(batch_size), int(seed), drop_last
        self.widths = tuple(array.shape[1] for array in self._arrays)
        self._shard, total = self._arrays[0].rows, self._arrays[0].shape[0]
        self._rows = _rows_of_shards(_selected(store, total, mask, where), self._shard, total)
        self.n_tokens = sum(_count(rows) for rows in self._rows.values())
        if self.n_tokens < self.batch_size:
            raise InputError(f"the mask leaves {self.n_tokens} tokens, fewer than one batch of {self.batch_size}.")
        self._capacity = max(1, int(buffer_bytes // (sum(self.widths) * self._kind.itemsize)))
        self._cached: NDArray[Any] | None = None
        self._spare_buffers: list[list[NDArray[Any]]] = []

    @property
    def width(self) -> int:
        """Channels of every view.

        Raises
        ------
        StoreError
            If the views differ.
        """
        if len(set(self.widths)) > 1:
            raise StoreError(f"the views have the widths {self.widths}; use widths.")
        return self.widths[0]

    @property
    def _batch_format(self) -> tuple[object, ...]:
        """What must agree for rows of two readers to share a batch."""
        return self.widths, self.batch_size, self._kind, self._convert

    @property
    def n_batches(self) -> int:
        """Batches of one epoch."""
        return self.n_tokens // self.batch_size if self._drop_last else -(-self.n_tokens // self.batch_size)

    def epoch(self, epoch: int, *, start_batch: int = 0) -> Iterator[Any]:
        """Shuffled batches of one epoch, from ``start_batch`` on; what comes before it is not read."""
        parts: list[NDArray[Any]] = []
        for rows in self._stream(int(epoch), int(start_batch) * self.batch_size):
            while len(rows):
                room = self.batch_size - sum(map(len, parts))
                parts.append(rows[:room])
                rows = rows[room:]
                if sum(map(len, parts)) == self.batch_size:
                    yield self._batch(parts[0] if len(parts) == 1 else np.concatenate(parts))
                    parts = []
        if parts and not self._drop_last:
            yield self._batch(np.concatenate(parts))

    def stream(self, epoch: int, start: int) -> Iterator[NDArray[Any]]:
        """Rows of one epoch in its order from row ``start`` on: flat [n, sum of widths] as kept, any n."""
        return self._stream(epoch, start)

    def _stream(self, epoch: int, start: int) -> Iterator[NDArray[Any]]:
        for group, (first, size) in self._groups(epoch, start):
            order = np.random.default_rng([self._seed, epoch, first]).permutation(size)
            for begin in range(max(0, start - first), size, self.batch_size):
                drawn = order[begin : begin + self.batch_size]
                rows = np.empty((len(drawn), group.shape[1]), group.dtype)
                np.take(group, drawn, axis=0, out=rows, mode="clip")  # "raise", the default, would copy once more
                yield rows

    def _groups(self, epoch: int, start: int) -> Iterator[tuple[NDArray[Any], tuple[int, int]]]:
        """Buffers of rows and where they lie in the epoch; the next is read while one is used."""
        if self.n_tokens <= self._capacity:
            if self._cached is None:  # everything fits: read once, keep for later epochs
                self._cached = np.empty((self.n_tokens, sum(self.widths)), self._kind)
                self._load(list(self._rows), self._cached)
            yield self._cached, (0, self.n_tokens)
            return
        plan = [(shards, span) for shards, span in self._plan(epoch) if sum(span) > start]
        if not plan:
            return
        # Fresh memory costs as much as reading into it, so buffers are kept for the next epoch. Two epochs may be open
        # at once and must not share a pair.
        largest = max(self._capacity // 2, *(_count(rows) for rows in self._rows.values()))
        if not self._spare_buffers:
            self._spare_buffers.append([np.empty((largest, sum(self.widths)), self._kind) for _ in range(2)])
        buffers = self._spare_buffers.pop()
        try:
            with ThreadPoolExecutor(1) as ahead:
                waiting = ahead.submit(self._load, plan[0][0], buffers[0])
                for i, (_, span) in enumerate(plan):
                    waiting.result()
                    if i + 1 < len(plan):
                        waiting = ahead.submit(self._load, plan[i + 1][0], buffers[(i + 1) % 2])
                    yield buffers[i % 2][: span[1]], span
        finally:
            self._spare_buffers.append(buffers)

    def _plan(self, epoch: int) -> list[tuple[list[int], tuple[int, int]]]:
        """Shards in random order, in groups of up to half the buffer, and the rows of the epoch each group fills."""
        shards = np.random.default_rng([self._seed, epoch]).permutation(np.fromiter(self._rows, np.int64))
        plan: list[tuple[list[int], tuple[int, int]]] = []
        first = size = 0
        group: list[int] = []
        for shard in shards.tolist():
            n = _count(self._rows[shard])
            if group and size + n > self._capacity // 2:
                plan.append((group, (first, size)))
                first, size, group = first + size, 0, []
            group.append(shard)
            size += n
        return [*plan, (group, (first, size))]

    def _load(self, shards: list[int], out: NDArray[Any]) -> None:
        """Rows of ``shards``, in their order, into the top of ``out``."""
        starts = np.cumsum([0, *(_count(self._rows[shard]) for shard in shards)]).tolist()
        columns = np.cumsum([0, *self.widths]).tolist()

        def copy(task: tuple[int, int]) -> None:
            i, view = task
            array = self._arrays[view]
            rows = array.shard(shards[i])[self._rows[shards[i]]]
            target = out[starts[i] : starts[i + 1], columns[view] : columns[view + 1]]
            target[:] = rows if array.dtype == out.dtype else to_float32(rows, array.stored_type)

        tasks = [(i, view) for i in range(len(shards)) for view in range(len(self._arrays))]
        if len(tasks) == 1:
            copy(tasks[0])
            return
        with ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(copy, tasks):
                pass

    def _batch(self, rows: NDArray[Any]) -> Any:
        if self._convert:
            rows = to_float32(rows, self._arrays[0].stored_type if rows.dtype == self._arrays[0].dtype else "float32")
        if len(set(self.widths)) == 1:
            return rows.reshape(len(rows), len(self.widths), self.widths[0])
        return tuple(np.split(rows, np.cumsum(self.widths)[:-1], axis=1))

    def sequential(self, batch_size: int | None = None) -> Iterator[Any]:
        """Batches in store order; the last may be short. Batches as stored may be read-only views of the file."""
        size = batch_size or self.batch_size
        rest: NDArray[Any] | None = None
        for shard in self._rows:
            block = self._shard_rows(shard)
            if rest is not None and len(rest):
                block = np.concatenate([rest, block])
            whole = len(block) - len(block) % size
            for start in range(0, whole, size):
                yield self._batch(block[start : start + size])
            rest = block[whole:]
        if rest is not None and len(rest):
            yield self._batch(rest)

    def _shard_rows(self, shard: int) -> NDArray[Any]:
        rows = self._rows[shard]
        if len(self._arrays) == 1:
            return self._arrays[0].shard(shard)[rows]
        out = np.empty((_count(rows), sum(self.widths)), self._kind)
        self._load([shard], out)
        return out


def _count(rows: slice | NDArray[np.int64]) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _selected(
    path: Path, total: int, mask: NDArray[np.bool_] | None, where: Mapping[str, object] | None
) -> NDArray[np.int64]:
    """Sorted token ranges [k, 2] selected by labels and mask."""
    ranges = TokenLabels(path).ranges(where) if where else np.array([[0, total]], dtype=np.int64)
    if mask is None:
        return ranges
    mask = np.asarray(mask, dtype=bool)
    if mask.shape != (total,):
        raise InputError(f"the mask must have one entry a token, {total}, got shape {mask.shape}.")
    if where:
        chosen = np.zeros(total, dtype=bool)
        chosen[positions_in(ranges)] = True
        mask = mask & chosen
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.view(np.int8), [0]])))
    return edges.reshape(-1, 2).astype(np.int64)


def _rows_of_shards(ranges: NDArray[np.int64], shard: int, total: int) -> dict[int, slice | NDArray[np.int64]]:
    """Shard -> its selected rows, in store order; shards without one are absent."""
    rows: dict[int, slice | NDArray[np.int64]] = {}
    touched = positions_in(np.stack([ranges[:, 0] // shard, -(-ranges[:, 1] // shard)], axis=1))
    for index in np.unique(touched).tolist():
        start, stop = index * shard, min((index + 1) * shard, total)
        first = int(np.searchsorted(ranges[:, 1], start, side="right"))
        last = int(np.searchsorted(ranges[:, 0], stop, side="left"))
        inside = np.clip(ranges[first:last], start, stop) - start
        if len(inside) == 1:
            rows[index] = slice(int(inside[0, 0]), int(inside[0, 1]))
        else:
            rows[index] = positions_in(inside)
    return rows


class MixedReader:
    """Batches that mix several sources by weight.

    Parameters
    ----------
    sources
        Name -> reader; all with the same views, widths, type and batch size. A source may be another store, or other
        tokens of one store (``where``).
    weights
        Name -> share of every batch in expectation; scaled to sum to one.
    seed
        Draws how many rows of a batch come from which source.

    Raises
    ------
    InputError
        If names or weights do not fit, or the readers differ in widths or batch size.

    Notes
    -----
    Each source runs through its own epochs, every one in another order, so none of its tokens comes a second time
    before all have come once. One epoch of the mixture has as many tokens as all sources together.
    """

    def __init__(self, sources: Mapping[str, PairedReader], weights: Mapping[str, float], *, seed: int) -> None:
        if not sources or set(sources) != set(weights) or min(weights.values()) <= 0:
            raise InputError(
                f"every source needs a positive weight, got weights {dict(weights)} for the sources {list(sources)}."
            )
        self._sources, self._seed = dict(sources), int(seed)
        first = next(iter(self._sources.values()))
        for name, reader in self._sources.items():
            if reader._batch_format != first._batch_format:
                raise InputError(f"source {name!r} differs from the first in widths, type or batch size.")
        total = sum(weights.values())
        self._shares = np.array([weights[name] / total for name in self._sources])
        self.batch_size, self.widths = first.batch_size, first.widths
        self.models = first.models
        self.n_tokens = sum(reader.n_tokens for reader in self._sources.values())

    @property
    def n_batches(self) -> int:
        """Batches of one epoch of the mixture."""
        return self.n_tokens // self.batch_size

    def counts(self, epoch: int) -> NDArray[np.int64]:
        """Rows [batch, source] of one epoch of the mixture."""
        random = np.random.default_rng([self._seed, int(epoch)])
        return random.multinomial(self.batch_size, self._shares, size=self.n_batches)

    def epoch(self, epoch: int, *, start_batch: int = 0) -> Iterator[Any]:
        """Shuffled batches of one epoch of the mixture, from ``start_batch`` on."""
        counts = self.counts(epoch)
        # Rows each source gave in earlier epochs and batches: where its stream goes on.
        used = sum((self.counts(e).sum(axis=0) for e in range(epoch)), np.zeros(len(self._sources), np.int64))
        used = used + counts[:start_batch].sum(axis=0)
        readers = list(self._sources.values())
        streams = [_EndlessRows(reader, int(start)) for reader, start in zip(readers, used, strict=True)]
        for batch, row in enumerate(counts[start_batch:], start=start_batch):
            parts = [stream.take(int(n)) for stream, n in zip(streams, row, strict=True) if n]
            order = np.random.default_rng([self._seed, int(epoch), batch]).permutation(self.batch_size)
            yield readers[0]._batch(np.concatenate(parts)[order])


class _EndlessRows:
    """Rows of one source, epoch after epoch, from a given row on."""

    def __init__(self, reader: PairedReader, start: int) -> None:
        self._reader = reader
        self._epoch, begin = divmod(start, reader.n_tokens)
        self._rows = reader.stream(self._epoch, begin)
        self._held: NDArray[Any] | None = None

    def take(self, n: int) -> NDArray[Any]:
        """The next ``n`` rows."""
        parts: list[NDArray[Any]] = []
        while n:
            if self._held is None or not len(self._held):
                self._held = next(self._rows, None)
                if self._held is None:
                    self._epoch += 1
                    self._rows = self._reader.stream(self._epoch, 0)
                    continue
            parts.append(self._held[:n])
            self._held, n = self._held[n:], n - len(parts[-1])
        return np.concatenate(parts)
