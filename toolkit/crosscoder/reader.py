"""What training and health read from, and the statistics that normalise it."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.crosscoder.moments import Moments

MOMENT_TOKENS: Final = 1 << 20
"""Tokens behind the normalisation: the standard error of a mean norm is then below .1% of its spread."""


class PairedActivations(Protocol):
    """Batches [batch, view, channel] float32 of the same tokens in every view (``stores.PairedReader`` is one)."""

    @property
    def n_tokens(self) -> int:
        """Tokens in one epoch."""

    def epoch(self, epoch: int) -> Iterator[NDArray[np.float32]]:
        """Shuffled batches, a function of (seed, epoch) alone; a last short batch is dropped."""

    def sequential(self, batch_size: int) -> Iterator[NDArray[np.float32]]:
        """Batches in store order; the last may be short."""


class ArrayReader:
    """Paired activations held in memory.

    Parameters
    ----------
    data
        [token, view, channel].
    batch_size
        Tokens per shuffled batch.
    seed
        Order of an epoch is a function of (seed, epoch) alone.

    Raises
    ------
    InputError
        If ``data`` is not three-dimensional or holds fewer tokens than one batch.
    """

    def __init__(self, data: NDArray[np.floating], *, batch_size: int, seed: int) -> None:
        if data.ndim != 3:
            raise InputError(f"paired activations are [token, view, channel], got shape {data.shape}.")
        if len(data) < batch_size:
            raise InputError(f"{len(data)} tokens are fewer than one batch of {batch_size}; lower the batch size.")
        self._data = np.ascontiguousarray(data, dtype=np.float32)
        self.batch_size, self._seed = batch_size, seed

    @property
    def n_tokens(self) -> int:
        """Tokens in one epoch."""
        return len(self._data)

    def epoch(self, epoch: int) -> Iterator[NDArray[np.float32]]:
        """Shuffled whole batches."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._data))
        for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
            yield self._data[order[start : start + self.batch_size]]

    def sequential(self, batch_size: int) -> Iterator[NDArray[np.float32]]:
        """Batches in order."""
        for start in range(0, len(self._data), batch_size):
            yield self._data[start : start + batch_size]


@dataclass(frozen=True)
class ViewMoments:
    """What normalisation needs to know of each view, raw units, float64."""

    mean: NDArray[np.float64]
    """[view, channel]."""
    mean_norm: NDArray[np.float64]
    """[view]: mean Euclidean norm of a token."""
    variance: NDArray[np.float64]
    """[view]: variance about the mean, summed over channels."""
    n_tokens: int
    """Tokens behind these numbers."""


def measure_views(reader: PairedActivations, *, max_tokens: int = MOMENT_TOKENS) -> ViewMoments:
    """Mean, mean norm and total variance of every view in float64.

    All tokens are read if there are at most ``max_tokens``; else the first shuffled batches that hold as many.

    Raises
    ------
    InputError
        If a view is zero on every token, so that no scalar can normalise it, or has values that are not finite.
    """
    source = reader.sequential(1 << 14) if reader.n_tokens <= max_tokens else reader.epoch(0)
    channels: Moments | None = None
    norms: Moments | None = None
    for block in source:
        if channels is None or norms is None:
            channels, norms = Moments(block.shape[1:]), Moments((block.shape[1],))
        channels.update(block)
        norms.update(np.linalg.norm(block.astype(np.float64), axis=-1))
        if channels.n >= max_tokens:
            break
    if channels is None or norms is None:
        raise InputError("there are no tokens to train on; extract activations first or widen the token mask.")
    usable = (norms.mean > 0) & np.isfinite(norms.mean)
    if not usable.all():
        bad = [int(view) for view in np.flatnonzero(~usable)]
        raise InputError(
            f"view(s) number {bad} are zero or not finite over {norms.n} tokens; check the extracted site."
        )
    return ViewMoments(channels.mean, norms.mean, channels.m2.sum(axis=-1) / channels.n, channels.n)


def endless(reader: PairedActivations, *, start: int = 0) -> Generator[NDArray[np.float32], None, None]:
    """Batches of epoch after epoch, read one ahead in a thread; the first ``start`` are skipped, the rest unchanged."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="activations") as pool:
        batches = _epochs(reader, start)
        ahead = pool.submit(next, batches)
        while True:
            batch = ahead.result()
            ahead = pool.submit(next, batches)
            yield batch


def _epochs(reader: PairedActivations, start: int) -> Iterator[NDArray[np.float32]]:
    epoch = seen = 0
    while True:
        before = seen
        for batch in reader.epoch(epoch):
            seen += 1
            if seen > start:
                yield batch
        if seen == before:
            raise InputError(f"the {reader.n_tokens} tokens do not fill one batch; lower the batch size.")
        epoch += 1


def batches_of(reader: PairedActivations, *, max_tokens: int) -> Iterator[NDArray[np.float32]]:
    """All tokens in order, or a shuffled sample of whole batches when there are more than ``max_tokens``."""
    if reader.n_tokens <= max_tokens:
        yield from reader.sequential(1 << 12)
        return
    seen = 0
    for batch in reader.epoch(0):
        yield batch
        seen += len(batch)
        if seen >= max_tokens:
            return
