"""Paired activations computed by the models while a crosscoder trains, and never stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import ChatSpec, StudySpec
from rlgen_stats.stores import StudyFolder
from rlgen_stats.toolkit.crosscoder.data.paired import Batch
from rlgen_stats.toolkit.extraction import (
    REPEAT_MODEL,
    check_tokenizers,
    find_model,
    load_model,
    load_texts,
    load_tokenizer,
    resolve_device,
)
from rlgen_stats.toolkit.extraction.activations import read_texts
from rlgen_stats.toolkit.extraction.batching import by_length, encode_prompts, pad_id

BUFFER_TOKENS: Final = 1 << 16
"""Tokens of all views in memory at once, from which batches are drawn at random."""
TEXT_TOKENS: Final = 512
"""Longer texts of a corpus are cut into pieces of this many tokens."""


class LiveActivations:
    """Paired activations that the models compute while they are read: nothing is stored, memory is bounded.

    Parameters
    ----------
    models
        One Hugging Face causal language model per view; the same model may stand for several.
    texts
        Token ids of each text, the same for all models.
    layer
        Decoder block after which the residual stream is read.
    pad
        Token id for padding.
    batch_size
        Tokens per batch.
    seed
        Order of an epoch is a function of (seed, epoch) alone.
    skip_first
        Leading tokens of each text that are not used.
    text_batch
        Texts per forward pass of each view, one number or one per view. Two views of one model with different numbers
        differ by numerical noise alone.
    buffer_tokens
        Tokens in memory at once.

    Raises
    ------
    InputError
        If the texts leave fewer tokens than one batch, or there is not one ``text_batch`` per view.

    Notes
    -----
    An epoch reads every text once: texts in random order, in groups that fill the buffer; the tokens of a group in
    random order. Groups that end before ``start_batch`` are not computed. Texts that fit into the buffer together are
    read by the models once, not once an epoch.
    """

    def __init__(
        self,
        models: Sequence[Any],
        texts: Sequence[Sequence[int]],
        *,
        layer: int,
        pad: int,
        batch_size: int,
        seed: int,
        skip_first: int = 0,
        text_batch: int | Sequence[int] = 16,
        buffer_tokens: int = BUFFER_TOKENS,
    ) -> None:
        sizes = [text_batch] * len(models) if isinstance(text_batch, int) else list(text_batch)
        if len(sizes) != len(models):
            raise InputError(f"text_batch needs one number per view, {len(models)}, got {len(sizes)}.")
        self._views = list(zip(models, sizes, strict=True))
        self._texts = [tuple(text) for text in texts if len(text) > skip_first]
        self._lengths = np.array([len(text) - skip_first for text in self._texts], dtype=np.int64)
        self._layer, self._pad, self._skip, self._seed = layer, pad, skip_first, seed
        self.batch_size, self._buffer_tokens = batch_size, max(buffer_tokens, batch_size)
        self._kept: tuple[NDArray[np.float32], ...] | None = None  # of all texts, where the buffer holds them
        if self.n_tokens < batch_size:
            raise InputError(
                f"the texts leave {self.n_tokens} tokens, fewer than one batch of {batch_size}; give more texts."
            )

    @property
    def n_tokens(self) -> int:
        """Tokens in one epoch."""
        return int(self._lengths.sum())

    @property
    def n_batches(self) -> int:
        """Whole batches in one epoch."""
        return self.n_tokens // self.batch_size

    def epoch(self, epoch: int, *, start_batch: int = 0) -> Iterator[Batch]:
        """Shuffled whole batches from ``start_batch`` on."""
        rng = np.random.default_rng([self._seed, epoch])
        groups = self._groups(rng.permutation(len(self._texts)))
        # All orders are drawn before any group is skipped: an epoch restarted in its middle goes on in the same order.
        orders = [rng.permutation(int(self._lengths[group].sum())) for group in groups]
        skip = start_batch * self.batch_size  # tokens of the groups ahead that earlier batches used
        rest: tuple[NDArray[np.float32], ...] | None = None  # less than a batch, left over from the last group
        for group, order in zip(groups, orders, strict=True):
            if skip >= len(order):
                skip -= len(order)
                continue
            rows = tuple(part[order[skip:]] for part in self._read(group))
            skip = 0
            if rest is not None:
                rows = tuple(np.concatenate(pair) for pair in zip(rest, rows, strict=True))
            whole = len(rows[0]) // self.batch_size * self.batch_size
            for start in range(0, whole, self.batch_size):
                yield self._batch(tuple(part[start : start + self.batch_size] for part in rows))
            rest = tuple(part[whole:].copy() for part in rows)

    def sequential(self, batch_size: int) -> Iterator[Batch]:
        """Batches in the order of the texts; the last of a buffer may be short."""
        for group in self._groups(np.arange(len(self._texts))):
            rows = self._read(group)
            for start in range(0, len(rows[0]), batch_size):
                yield self._batch(tuple(part[start : start + batch_size] for part in rows))

    def _groups(self, order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Texts in this order, split where the buffer is full."""
        ends = np.cumsum(self._lengths[order])
        cuts = np.flatnonzero(np.diff((ends - 1) // self._buffer_tokens)) + 1
        return np.split(order, cuts)

    def _read(self, group: NDArray[np.int64]) -> tuple[NDArray[np.float32], ...]:
        """Activations of some texts one after the other: [token, channel] of each view."""
        if self.n_tokens > self._buffer_tokens:
            return self._compute(group)
        if self._kept is None:
            self._kept = self._compute(np.arange(len(self._texts)))
        starts = np.cumsum(self._lengths) - self._lengths
        rows = np.concatenate([np.arange(starts[i], starts[i] + self._lengths[i]) for i in group])
        return tuple(part[rows] for part in self._kept)

    def _compute(self, group: NDArray[np.int64]) -> tuple[NDArray[np.float32], ...]:
        """The same, by the models."""
        offsets = np.cumsum(self._lengths[group]) - self._lengths[group]

        def read(view: tuple[Any, int]) -> NDArray[np.float32]:
            model, size = view
            width = int(model.config.get_text_config().hidden_size)
            values = np.empty((int(self._lengths[group].sum()), width), dtype=np.float32)
            for rows in by_length([len(self._texts[i]) for i in group], size):
                texts = [self._texts[group[row]] for row in rows]
                for row, residual in zip(rows, read_texts(model, texts, self._layer, self._pad), strict=True):
                    values[offsets[row] : offsets[row] + self._lengths[group[row]]] = residual[self._skip :]
            return values

        return tuple(read(view) for view in self._views)

    def _batch(self, parts: tuple[NDArray[np.float32], ...]) -> Batch:
        if len({part.shape[1] for part in parts}) > 1:
            return parts
        return np.stack(parts, axis=1)


def live_corpus(
    spec: StudySpec, folder: StudyFolder, views: Sequence[str], corpus: Path, *, batch_size: int, seed: int
) -> LiveActivations:
    """The views' models reading a corpus.

    Parameters
    ----------
    spec, folder
        The study.
    views
        Model ids.
    corpus
        Table with a column ``text``.
    batch_size, seed
        See :class:`LiveActivations`.

    Raises
    ------
    InputError
        If the corpus cannot be read, has no such column, or is too small.
    ModelError
        If the models do not share one tokenizer.
    """
    texts = load_texts(corpus)
    refs = [find_model(view, spec, folder) for view in views]
    check_tokenizers([replace(ref, chat=ChatSpec()) for ref in refs], texts)  # a corpus is no prompt: none renders it
    tokenizer = load_tokenizer(refs[0])
    device = resolve_device(spec.device)
    loaded = {ref.path: load_model(ref, device=device) for ref in {ref.path: ref for ref in refs}.values()}
    size = spec.extraction.batch_size
    pieces = [
        ids[start : start + TEXT_TOKENS]
        for ids in encode_prompts(tokenizer, texts)
        for start in range(0, len(ids), TEXT_TOKENS)
    ]
    return LiveActivations(
        [loaded[ref.path] for ref in refs],
        pieces,
        layer=spec.extraction.layer,
        pad=pad_id(tokenizer),
        batch_size=batch_size,
        seed=seed,
        skip_first=spec.extraction.skip_first,
        text_batch=[max(1, size // 2) if view == REPEAT_MODEL and size > 1 else size for view in views],
    )
