"""Paired activations: the same tokens in every view, read in batches, and the moments that normalise them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.crosscoder.data.moments import Moments

MOMENT_TOKENS: Final = 1 << 20
"""Tokens behind the normalisation: the standard error of a mean norm is then below .1% of its spread."""

BLOCK_BYTES: Final = 1 << 28
"""Memory for tokens that replicates read in orders of their own, unless ``BLOCK_BATCHES`` need more."""
BLOCK_BATCHES: Final = 8
"""Fewest batches of such tokens: two orders then have an eighth of a batch in common."""

Batch = NDArray[np.float32] | tuple[NDArray[np.float32], ...]
"""The same tokens in every view: [batch, view, channel], or one [batch, channel] per view where widths differ."""


class PairedActivations(Protocol):
    """Batches of the same tokens in every view (``stores.PairedReader`` is one)."""

    @property
    def n_tokens(self) -> int:
        """Tokens in one epoch."""

    @property
    def n_batches(self) -> int:
        """Shuffled batches in one epoch."""

    def epoch(self, epoch: int, *, start_batch: int = 0) -> Iterator[Batch]:
        """Shuffled batches from one on, a function of (seed, epoch) alone; a last short batch is dropped."""

    def sequential(self, batch_size: int) -> Iterator[Batch]:
        """Batches in store order; the last may be short."""


def views_of(batch: Batch) -> Sequence[NDArray[np.float32]]:
    """One [batch, channel] array per view."""
    return batch if isinstance(batch, tuple) else [batch[:, view] for view in range(batch.shape[1])]


def joined(batch: Batch) -> NDArray[np.float32]:
    """The views side by side: [batch, sum of channels]."""
    return np.concatenate(batch, axis=1) if isinstance(batch, tuple) else batch.reshape(len(batch), -1)


class ArrayReader:
    """Paired activations held in memory.

    Parameters
    ----------
    data
        [token, view, channel], or one [token, channel] per view.
    batch_size
        Tokens per shuffled batch.
    seed
        Order of an epoch is a function of (seed, epoch) alone.

    Raises
    ------
    InputError
        If ``data`` has another shape, the views differ in length, or there are fewer tokens than one batch.
    """

    def __init__(
        self, data: NDArray[np.floating] | Sequence[NDArray[np.floating]], *, batch_size: int, seed: int
    ) -> None:
        parts = [np.asarray(part, dtype=np.float32) for part in (data if not isinstance(data, np.ndarray) else [])]
        if isinstance(data, np.ndarray) and data.ndim != 3:
            raise InputError(f"paired activations are [token, view, channel], got shape {data.shape}.")
        if any(part.ndim != 2 or len(part) != len(parts[0]) for part in parts):
            raise InputError(
                f"give one [token, channel] array per view, equally long, got {[part.shape for part in parts]}."
            )
        self._stacked = isinstance(data, np.ndarray)
        self._data = [np.ascontiguousarray(data, dtype=np.float32)] if isinstance(data, np.ndarray) else parts
        if self.n_tokens < batch_size:
            raise InputError(f"{self.n_tokens} tokens are fewer than one batch of {batch_size}; lower the batch size.")
        self.batch_size, self._seed = batch_size, seed

    @property
    def n_tokens(self) -> int:
        """Tokens in one epoch."""
        return len(self._data[0])

    @property
    def n_batches(self) -> int:
        """Whole batches in one epoch."""
        return self.n_tokens // self.batch_size

    def epoch(self, epoch: int, *, start_batch: int = 0) -> Iterator[Batch]:
        """Shuffled whole batches."""
        order = np.random.default_rng([self._seed, epoch]).permutation(self.n_tokens)
        for batch in range(start_batch, self.n_batches):
            yield self._take(order[batch * self.batch_size : (batch + 1) * self.batch_size])

    def sequential(self, batch_size: int) -> Iterator[Batch]:
        """Batches in order."""
        for start in range(0, self.n_tokens, batch_size):
            yield self._take(slice(start, start + batch_size))

    def _take(self, rows: NDArray[np.int64] | slice) -> Batch:
        taken = tuple(part[rows] for part in self._data)
        return taken[0] if self._stacked else taken


@dataclass(frozen=True)
class ViewMoments:
    """The moments of each view that normalisation uses, raw units, float64."""

    mean: NDArray[np.float64]
    """[sum of channels], the views side by side."""
    mean_norm: NDArray[np.float64]
    """[view]: mean Euclidean norm of a token."""
    variance: NDArray[np.float64]
    """[view]: variance about the mean, summed over channels."""
    change: NDArray[np.float64]
    """[view]: mean squared length of the difference from the reference view; NaN where their widths differ."""
    widths: tuple[int, ...]
    """[view]: channels."""
    n_tokens: int
    """Tokens behind these numbers."""


def measure_views(reader: PairedActivations, *, reference: int = 0, max_tokens: int = MOMENT_TOKENS) -> ViewMoments:
    """Mean, mean norm and total variance of every view, and its distance from the reference view, in float64.

    All tokens are read if there are at most ``max_tokens``; else the first shuffled batches that hold as many.

    Raises
    ------
    InputError
        If a view is zero on every token, so that no scalar can normalise it, or has values that are not finite.
    """
    source = reader.sequential(1 << 14) if reader.n_tokens <= max_tokens else reader.epoch(0)
    channels: list[Moments] = []
    norms, changes = Moments((0,)), Moments((0,))
    for block in source:
        parts = views_of(block)
        if not channels:
            channels = [Moments(part.shape[1:]) for part in parts]
            norms, changes = Moments((len(parts),)), Moments((len(parts),))
        for moments, part in zip(channels, parts, strict=True):
            moments.update(part)
        norms.update(np.stack([np.linalg.norm(part.astype(np.float64), axis=-1) for part in parts], axis=-1))
        changes.update(np.stack([_squared_distance(part, parts[reference]) for part in parts], axis=-1))
        if norms.n >= max_tokens:
            break
    if not channels:
        raise InputError("there are no tokens to train on; extract activations first or widen the token mask.")
    usable = (norms.mean > 0) & np.isfinite(norms.mean)
    if not usable.all():
        bad = [int(view) for view in np.flatnonzero(~usable)]
        raise InputError(
            f"view(s) number {bad} are zero or not finite over {norms.n} tokens; check the extracted site."
        )
    return ViewMoments(
        mean=np.concatenate([moments.mean for moments in channels]),
        mean_norm=norms.mean,
        variance=np.array([moments.m2.sum() / moments.n for moments in channels]),
        change=changes.mean,
        widths=tuple(len(moments.mean) for moments in channels),
        n_tokens=norms.n,
    )


def _squared_distance(part: NDArray[np.floating], reference: NDArray[np.floating]) -> NDArray[np.float64]:
    """Of each token from the reference view: [token]; NaN where their widths differ."""
    if part.shape != reference.shape:
        return np.full(len(part), np.nan)
    return np.asarray(np.square(part.astype(np.float64) - reference).sum(axis=-1))


def endless(reader: PairedActivations, *, start: int = 0) -> Generator[Batch, None, None]:
    """Batches of epoch after epoch from number ``start`` on, read one ahead in a thread."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="activations") as pool:
        batches = _epochs(reader, start)
        ahead = pool.submit(next, batches)
        while True:
            batch = ahead.result()
            ahead = pool.submit(next, batches)
            yield batch


def in_orders(
    reader: PairedActivations, orders: Sequence[int | None], *, batch_bytes: int, start: int = 0
) -> Generator[list[NDArray[np.float32]], None, None]:
    """Batches from number ``start`` on, one for each order, with the views side by side: [batch, sum of channels].

    ``None`` is the reader's order; a number is the seed of another one, in which the tokens of one block of batches
    after the other are dealt out anew. A block is an epoch, or as many batches as fit into ``BLOCK_BYTES``, but
    ``BLOCK_BATCHES`` at least.
    """
    if not any(order is not None for order in orders):
        with closing(endless(reader, start=start)) as batches:
            for batch in batches:
                yield [joined(batch)] * len(orders)
    size = max(1, min(reader.n_batches, max(BLOCK_BYTES // batch_bytes, BLOCK_BATCHES)))
    block, skipped = divmod(start, size)
    with closing(endless(reader, start=block * size)) as batches:
        while True:
            rows = np.concatenate([joined(next(batches)) for _ in range(size)])
            dealt = [
                np.arange(len(rows)) if order is None else np.random.default_rng([order, block]).permutation(len(rows))
                for order in orders
            ]
            for parts in zip(*(np.split(order, size)[skipped:] for order in dealt), strict=True):
                yield [rows[part] for part in parts]
            block, skipped = block + 1, 0


def _epochs(reader: PairedActivations, start: int) -> Iterator[Batch]:
    if reader.n_batches < 1:
        raise InputError(f"the {reader.n_tokens} tokens do not fill one batch; lower the batch size.")
    epoch, first = divmod(start, reader.n_batches)
    while True:
        yield from reader.epoch(epoch, start_batch=first)
        epoch, first = epoch + 1, 0


def batches_of(reader: PairedActivations, *, max_tokens: int) -> Iterator[Batch]:
    """All tokens in order, or a shuffled sample of whole batches when there are more than ``max_tokens``."""
    if reader.n_tokens <= max_tokens:
        yield from reader.sequential(1 << 12)
        return
    seen = 0
    for batch in reader.epoch(0):
        yield batch
        seen += len(views_of(batch)[0])
        if seen >= max_tokens:
            return
