"""Writing activations: whole shards, in background threads; a shard counts once it is durable."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rlgen_stats.schemas.dims import CHANNEL, POSITION, PROMPT, SEGMENT, SOURCE, TOKEN, TOKEN_ID
from rlgen_stats.schemas.errors import InputError, StoreError
from rlgen_stats.stores.activation_store import ARRAY, COMMITTED, activation_group
from rlgen_stats.stores.atomic import ZARR_JSON, explain_full_disk
from rlgen_stats.stores.digests import read_document, write_digest
from rlgen_stats.stores.labels import LabelBlocks, TokenLabels
from rlgen_stats.stores.locations import explain_access_errors, place
from rlgen_stats.stores.locks import exclusive
from rlgen_stats.stores.seals import commit
from rlgen_stats.stores.shards import (
    BFLOAT16,
    FILL,
    FLOATS,
    array_document,
    chunk_name,
    nonfinite_rows,
    stored_dtype,
    to_bfloat16,
    write_chunk,
    written_chunks,
)
from rlgen_stats.stores.tables import check_is_store, check_store_version

QUEUE: Final = 2
"""Shards being written at once, so that one is copied while another is synced; one more is being filled."""
CONVERTED_BYTES: Final = 1 << 24
"""Values checked or converted at once (16 MB of float32), which takes a few times their memory."""
METADATA_LOCK_SECONDS: Final = 60.0
"""How long to wait for another writer's metadata; it takes milliseconds, on an object store a second."""


class ActivationWriter:
    """Writes one model's activations in store order; resumes where the last one stopped.

    Parameters
    ----------
    path
        Store made by :func:`create_activations`; a folder or a URL.
    model, site
        ``run@step`` and the site's name, e.g. ``block2``.
    width
        Channels d.
    dtype
        ``float32``, ``float16`` or ``bfloat16``. bfloat16 is kept as its 16 bits in a uint16 array marked
        ``bits_of: bfloat16``: give bits (``tensor.view(torch.uint16).numpy()``) or float32, which is rounded to the
        nearest; :func:`open_activations` returns float32, and ``torch.from_numpy(bits).view(torch.bfloat16)`` the rest.
    shards
        Range of shards to write; default all. Several processes may write disjoint ranges at once.
    allow_nonfinite
        Keep NaN and infinite values instead of refusing them.

    Raises
    ------
    StoreError
        If the store is missing or the array there has another width or type.
    StoreLockedError
        If another living process writes these shards.
    InputError
        On append: wrong shape or type, labels that are not the store's, too many tokens, or NaN/inf (with their number
        and the first token).
    OutOfSpaceError
        On append or exit, if the disk is full; everything committed stays.

    Notes
    -----
    ``n_committed`` tokens of the range are durable; feed the rest. Shards are written by background threads, so an
    error of the disk is raised by the next append or at the end. An unfinished shard is thrown away after an error,
    and a resumed run writes the bytes an uninterrupted one would have written.

    Examples
    --------
    >>> with ActivationWriter(path, model="rl@80", site="block2", width=64) as writer:  # doctest: +SKIP
    ...     for batch in batches[writer.n_committed :]:
    ...         writer.append(batch)
    """

    def __init__(
        self,
        path: Path | str,
        *,
        model: str,
        site: str,
        width: int,
        dtype: str = "float32",
        shards: range | None = None,
        allow_nonfinite: bool = False,
    ) -> None:
        self._path = place(path)
        check_is_store(self._path)
        attrs = read_document(self._path)["attributes"]
        check_store_version(self._path, attrs)
        if str(dtype) not in FLOATS:
            raise InputError(f"activations are stored as {', '.join(FLOATS)}, got {dtype!r}; choose one of them.")
        self._group = self._path / activation_group(model, site)
        self._model, self._site, self._width, self._dtype = model, site, int(width), str(dtype)
        self._allow_nonfinite = allow_nonfinite
        self._at_once = max(1, CONVERTED_BYTES // (4 * self._width))
        self._n_tokens = int(attrs["n_tokens"])
        self._shard = min(int(attrs["shard_tokens"]), self._n_tokens)
        self._shards = _checked_range(shards, -(-self._n_tokens // self._shard))
        self._stop = min(self._shards.stop * self._shard, self._n_tokens)
        self._labels = _LabelComparison(TokenLabels(self._path))

    def __enter__(self) -> ActivationWriter:
        with ExitStack() as stack:
            name = f"{self._path.name}.{self._model}.{self._site}"
            stack.enter_context(exclusive(self._path.with_name(name), (self._shards.start, self._shards.stop)))
            self._create()
            committed = written_chunks(self._group / COMMITTED)
            # Go on at the first gap: shards are committed by several threads, so that later ones may be there already.
            # They are written again, with the same bytes.
            next_shard = next((i for i in self._shards if i not in committed), self._shards.stop)
            self._next = min(next_shard * self._shard, self._n_tokens)  # first token not given yet
            self._done = set(range(next_shard))
            self._checksums: dict[str, str] = {}
            self._buffer = np.empty((self._shard, self._width), stored_dtype(self._dtype))
            self._free: list[NDArray[Any]] = []
            self._waiting: list[Future[int]] = []
            self._threads = stack.enter_context(ThreadPoolExecutor(QUEUE))
            self._stack = stack.pop_all()
        return self

    @property
    def n_committed(self) -> int:
        """Durable tokens, counted from the first token of the range."""
        first = next((i for i in self._shards if i not in self._done), self._shards.stop)
        return max(0, min(first * self._shard, self._n_tokens) - self._shards.start * self._shard)

    def _create(self) -> None:
        n_shards = -(-self._n_tokens // self._shard)
        shape, chunk = (self._n_tokens, self._width), (self._shard, self._width)
        expected = array_document(shape, chunk, self._dtype, (TOKEN, CHANNEL), {})
        if (self._group / ZARR_JSON).exists():
            stored = read_document(self._group / ARRAY)
            if stored != json.loads(expected):
                stored_type = stored["attributes"].get("bits_of", stored["data_type"])
                raise StoreError(
                    f"{self._model}/{self._site} holds shape {tuple(stored['shape'])} {stored_type}, expected "
                    f"{(self._n_tokens, self._width)} {self._dtype}; use another site name or delete the group."
                )
            return
        record = array_document((n_shards, 2), (1, 2), "int64", ("shard", "record"), {})
        with self._metadata_lock():
            for name, text in ((ARRAY, expected), (COMMITTED, record)):
                (self._group / name).mkdir(parents=True, exist_ok=True)
                (self._group / name / ZARR_JSON).write_text(text, encoding="utf-8")
            write_digest(self._group.parent)
            write_digest(self._group, {"model": self._model, "site": self._site, "complete": False})

    @contextmanager
    def _metadata_lock(self) -> Iterator[None]:
        """Hold the lock of the store's metadata, which writers of other shards change too."""
        with (
            exclusive(self._path.with_name(f"{self._path.name}.seal"), patience=METADATA_LOCK_SECONDS),
            explain_access_errors(self._path),
            explain_full_disk(self._path),
        ):
            yield

    def append(self, activation: NDArray[Any], labels: Mapping[str, Any] | pd.DataFrame | None = None) -> None:
        """Add the next tokens.

        Parameters
        ----------
        activation
            [n, channel].
        labels
            Optionally any of prompt, source, position, token_id, segment of these tokens [n]; compared with the
            store's.
        """
        activation = np.asarray(activation)
        if activation.ndim != 2 or activation.shape[1] != self._width:
            raise InputError(f"activations of {self._model} must be [n, {self._width}], got {activation.shape}.")
        if self._next + len(activation) > self._stop:
            raise InputError(
                f"{self._model}: {self._next + len(activation)} tokens given, but the store's texts have {self._stop}"
                f"{'' if self._stop == self._n_tokens else ' up to the end of this range of shards'}."
            )
        self._check_type(activation.dtype)
        if not self._allow_nonfinite:
            self._check_finite(activation)
        if labels is not None:
            self._labels.compare(labels, self._next, len(activation), self._model)
        self._raise_failed()
        while len(activation):
            row = self._next % self._shard
            n = min(self._shard - row, self._at_once)
            part, activation = self._converted(activation[:n]), activation[n:]
            self._buffer[row : row + len(part)] = part
            self._next += len(part)
            if self._next % self._shard == 0 or self._next == self._n_tokens:
                self._submit()

    def _check_type(self, dtype: np.dtype[Any]) -> None:
        if dtype.kind != "f" and not self._are_bits(dtype):
            raise InputError(
                f"activations of {self._model} must be floating point"
                f"{' or the bits of bfloat16 in uint16' if self._dtype == BFLOAT16 else ''}, got {dtype}."
            )

    def _are_bits(self, dtype: np.dtype[Any]) -> bool:
        return self._dtype == BFLOAT16 and dtype.itemsize == 2 and dtype != np.float16

    def _check_finite(self, activation: NDArray[Any]) -> None:
        """Refuse NaN, infinity, and what becomes infinite in the stored type, before anything is taken."""
        bad = np.zeros(len(activation), dtype=bool)
        for start in range(0, len(activation), self._at_once):
            block = slice(start, start + self._at_once)
            of_block = nonfinite_rows(self._converted(activation[block]), self._dtype)
            if of_block is not None:
                bad[block] = of_block
        if bad.any():
            raise InputError(
                f"{self._model}: {int(bad.sum())} of {len(bad)} tokens have NaN or infinite activations in "
                f"{self._dtype}, the first is token {self._next + int(bad.argmax())}; check the checkpoint, store "
                "float32, or keep them with allow_nonfinite (--allow-nonfinite)."
            )

    def _converted(self, activation: NDArray[Any]) -> NDArray[Any]:
        """Values in their stored type; a number too large for it becomes infinite."""
        if self._are_bits(activation.dtype):
            return np.ascontiguousarray(activation).view(np.uint16)
        if self._dtype == BFLOAT16:
            return to_bfloat16(activation.astype(np.float32, copy=False))
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(activation, dtype=self._dtype)

    def _submit(self) -> None:
        """Give the full buffer to a background thread; wait if ``QUEUE`` shards are being written already."""
        index = (self._next - 1) // self._shard
        size = self._next - index * self._shard
        if size < self._shard:
            self._buffer[size:] = FILL[self._dtype]  # the last chunk is as long as the others
        self._waiting.append(self._threads.submit(self._commit, index, self._buffer, size))
        while len(self._waiting) > QUEUE:
            self._waiting.pop(0).result()
        self._buffer = self._free.pop() if self._free else np.empty_like(self._buffer)

    def _commit(self, index: int, block: NDArray[Any], size: int) -> int:
        # The record is written after the data are durable: a shard with a record is whole whatever happens in between.
        with explain_full_disk(self._path):
            checksum = write_chunk(self._group / ARRAY, index, block, ndim=2)
            record = np.array([[size, checksum]], dtype="<i8")
            of_record = write_chunk(self._group / COMMITTED, index, record, ndim=2)
        self._checksums[f"{ARRAY}/{chunk_name(index, 2)}"] = f"{checksum:08x}"
        self._checksums[f"{COMMITTED}/{chunk_name(index, 2)}"] = f"{of_record:08x}"
        self._done.add(index)
        self._free.append(block)
        return size

    def _raise_failed(self) -> None:
        for future in self._waiting:
            if future.done():
                future.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            for future in self._waiting:
                if error is None:
                    future.result()
            if error is None:
                self._complete()

    def _complete(self) -> None:
        """Mark the array complete once all its shards are committed, those of other writers included."""
        n_shards = -(-self._n_tokens // self._shard)
        if not self._done.issuperset(self._shards) or len(written_chunks(self._group / COMMITTED)) < n_shards:
            return
        with self._metadata_lock():
            if not read_document(self._group)["attributes"].get("complete"):
                commit(self._group, {"complete": True}, known=self._checksums, root=self._path)


def _checked_range(shards: range | None, n_shards: int) -> range:
    if shards is None:
        return range(n_shards)
    if shards.step != 1 or not 0 <= shards.start < shards.stop <= n_shards:
        raise InputError(f"shards must be a range within 0 to {n_shards}, got {shards}.")
    return shards


class _LabelComparison:
    """Compares given labels with the store's."""

    def __init__(self, labels: TokenLabels) -> None:
        self._labels, self._blocks = labels, LabelBlocks(labels)

    def compare(self, given: Mapping[str, Any] | pd.DataFrame, start: int, n: int, model: str) -> None:
        known = (PROMPT, SOURCE, POSITION, TOKEN_ID, SEGMENT)
        unknown = [str(name) for name in given if name not in known]
        if unknown:
            raise InputError(f"labels of tokens are {', '.join(known)}, got {unknown[0]!r}.")
        for name in map(str, given):
            values = np.asarray(given[name])
            if values.shape != (n,):
                raise InputError(f"the label {name!r} must have one value for each of {n} tokens, got {values.shape}.")
            legend, stored = self._labels.legend(name), self._blocks.read(name, start, start + n)
            stored = stored if legend is None else legend[stored]
            wrong = values.astype(stored.dtype if stored.dtype.kind != "U" else np.str_) != stored
            if wrong.any():
                row = int(wrong.argmax())
                raise InputError(
                    f"{model} was given other tokens than the store's: token {start + row} has {name} "
                    f"{values[row]!s}, expected {stored[row]!s}; a model is added with the store's texts, in their "
                    "order."
                )
