"""The loop that completes rows in one batch: as rows finish, prompts that wait are read and take their places."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlgen_stats.toolkit.counter_random import counter_bits
from rlgen_stats.toolkit.extraction.batching import left_pad
from rlgen_stats.toolkit.extraction.cached_rows import can_join, drop_columns, join_rows
from rlgen_stats.toolkit.extraction.stop_strings import StopStrings
from rlgen_stats.toolkit.extraction.token_draws import draw_tokens

REFILL_SHARE: Final = 1 / 8
"""Prompts are read once this share of the batch is free: a pass of their own and a copy of the cache must pay."""
SHRINK_BELOW: Final = 0.75
"""Where nothing waits, finished rows leave once fewer than this share is unfinished: copying the cache must pay."""

Rows = NDArray[np.int64]
"""Numbers of rows among all that are asked for."""
_Reading = tuple[tuple[int, ...], int]


class RowEdits(Protocol):
    """Edits in force of which each row has one: the handle of ``toolkit.edits.editing_rows``."""

    rows: int | NDArray[np.int64]

    def prompt_edits(self) -> list[int]:
        """Of each edit, the number of the one that reads a prompt alike; -1: none acts before its last token."""
        ...


@dataclass(frozen=True)
class Asked:
    """What each row asks for."""

    encoded: Sequence[Sequence[int]]
    seeds: NDArray[np.uint64]
    limits: Sequence[int]
    strings: Sequence[Sequence[str]]
    ends: Sequence[frozenset[int]]
    greedy: NDArray[np.bool_]
    edits: NDArray[np.int64]
    """Number of each row's edit, where several are in force."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and the id put into pad positions."""

    temperature: float
    top_p: float
    pad: int


@dataclass
class _Batch:
    """Rows, what the model has read of them, and the token of each that it reads next."""

    rows: Rows
    live: NDArray[np.bool_]
    """[row] whether it is not finished."""
    tokens: Tensor
    positions: Tensor
    """[row] the next token and its position."""
    mask: Tensor
    """[row, column of the cache] 1 where the model has read something."""
    cache: Any

    def keep_live(self) -> None:
        """Drop finished rows, and the columns that are pads in all others."""
        if not self.live.all():
            places = np.flatnonzero(self.live)
            chosen = torch.as_tensor(places, device=self.mask.device)
            self.rows, self.live = self.rows[places], self.live[places]
            self.tokens, self.positions, self.mask = self.tokens[chosen], self.positions[chosen], self.mask[chosen]
            self.cache.reorder_cache(chosen)  # not batch_select_indices, which layers with a state do not have
        pads = int(self.mask.any(dim=0).int().argmax())
        if pads and can_join(self.cache):
            self.mask = self.mask[:, pads:]
            drop_columns(self.cache, self.mask.shape[1])

    def join(self, other: _Batch) -> None:
        """Add the rows of another batch."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        masks = [torch.nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in (self.mask, other.mask)]
        join_rows(self.cache, other.cache, width)
        self.mask = torch.cat(masks)
        self.rows, self.live = np.concatenate([self.rows, other.rows]), np.concatenate([self.live, other.live])
        self.tokens = torch.cat([self.tokens, other.tokens])
        self.positions = torch.cat([self.positions, other.positions])


@dataclass
class _Read:
    """Prompts that have been read, and the rows of them that have no place in the batch yet."""

    rows: Rows
    tokens: Tensor
    prompt: Tensor
    """[row] the token that is read next, and which of the prompts is the row's."""
    positions: Tensor
    mask: Tensor
    cache: Any
    """[prompt, ...] as in a batch."""

    def take(self, n: int) -> _Batch:
        """The first rows; they no longer are among these."""
        prompt, cache = self.prompt[:n], self.cache if n >= len(self.rows) else copy.deepcopy(self.cache)
        cache.reorder_cache(prompt)
        live = np.ones(len(prompt), dtype=bool)
        batch = _Batch(self.rows[:n], live, self.tokens[:n], self.positions[prompt], self.mask[prompt], cache)
        self.rows, self.tokens, self.prompt = self.rows[n:], self.tokens[n:], self.prompt[n:]
        return batch


def write_rows(
    model: Any,
    asked: Asked,
    sampling: Sampling,
    stopping: StopStrings,
    *,
    batch_size: int,
    finished: Callable[[int], object],
    active: RowEdits | None = None,
) -> list[list[int]]:
    """Tokens written for every row.

    Parameters
    ----------
    model
        Causal language model, with or without hooks.
    asked, sampling, stopping
        What is asked for.
    batch_size
        Most rows in a forward pass.
    finished
        Called with the number of rows that have just been finished.
    active
        Handle of the edits in force, where rows have edits of their own.

    Raises
    ------
    FloatingPointError
        If logits are NaN.
    """
    try:
        return _Writing(model, asked, sampling, stopping, batch_size, finished, active).run()
    finally:
        if active is not None:
            active.rows = 0


class _Writing:
    """State of one call: which rows wait, which prompts have been read, and what has been written."""

    def __init__(
        self,
        model: Any,
        asked: Asked,
        sampling: Sampling,
        stopping: StopStrings,
        batch_size: int,
        finished: Callable[[int], object],
        active: RowEdits | None,
    ) -> None:
        self.model, self.asked, self.sampling, self.stopping = model, asked, sampling, stopping
        self.batch_size, self.finished, self.active = batch_size, finished, active
        self.written: list[list[int]] = [[] for _ in asked.encoded]
        self.readings = _readings(asked, [0] if active is None else active.prompt_edits())
        self.waiting = _in_order(self.readings)
        self.read: _Read | None = None
        self.joinable = True
        self.told = self.edits = np.zeros(0, dtype=np.int64)
        takes = inspect.signature(model.forward).parameters
        self.extra = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    @torch.inference_mode()
    def run(self) -> list[list[int]]:
        """Read, write and refill until nothing waits."""
        batch = self._started(self.batch_size)
        while batch is not None:
            self._step(batch)
            batch = self._refilled(batch)
        return self.written

    def _refilled(self, batch: _Batch) -> _Batch | None:
        """The batch without finished rows and with new ones, where that pays; None if nothing is left to do."""
        n_live = int(batch.live.sum())
        if n_live == 0:
            return self._started(self.batch_size)
        free, waits = self.batch_size - n_live, self.waiting or self.read is not None
        if self.joinable and waits and free >= REFILL_SHARE * self.batch_size:
            batch.keep_live()
            added = self._started(free)
            if added is not None:
                batch.join(added)
        elif n_live < SHRINK_BELOW * len(batch.rows):
            batch.keep_live()
        return batch

    def _started(self, n: int) -> _Batch | None:
        """Up to ``n`` rows whose prompts have been read and which go on; None if there are no more."""
        started: _Batch | None = None
        while n > 0 and (self.waiting or self.read is not None):
            read = self._read_prompts(n) if self.read is None else self.read
            self.read = None
            if len(read.rows):  # all may have ended with their first token
                added = read.take(n)
                n -= len(added.rows)
                self.read = read if len(read.rows) else None
                if started is None:
                    started = added
                else:
                    started.join(added)
            if started is not None and not self.joinable:
                break
        return started

    def _read_prompts(self, n: int) -> _Read:
        """Read the prompts of the next ``n`` rows, each once, and draw the first tokens of all their rows."""
        readings = self.readings
        if self.joinable:  # otherwise rows of the last prompt that have no place could not join later
            while n < len(self.waiting) and readings[self.waiting[n]] == readings[self.waiting[n - 1]]:
                n += 1
        rows, self.waiting = np.array(self.waiting[:n]), self.waiting[n:]
        places: dict[_Reading, int] = {}
        prompt = [places.setdefault(readings[row], len(places)) for row in rows]
        ids, mask, positions = left_pad([ids for ids, _ in places], self.sampling.pad, self.model.device)
        output = self._forward(ids, mask, positions, np.array([edit for _, edit in places]))
        self.joinable = can_join(output.past_key_values)
        of_row = torch.tensor(prompt, device=mask.device)
        tokens = torch.tensor([self.asked.encoded[row][-1] for row in rows], device=mask.device)
        live = np.ones(len(rows), dtype=bool)
        whole = np.array([len(readings[row][0]) == len(self.asked.encoded[row]) for row in rows])
        if whole.any():  # of the others the last token is read next, each row under its edit
            chosen = torch.as_tensor(np.flatnonzero(whole), device=mask.device)
            tokens[chosen] = self._choose(output.logits[:, -1][of_row[chosen]], rows[whole])
            live[whole] = self._record(rows[whole], tokens[chosen])
        kept = torch.as_tensor(np.flatnonzero(live), device=mask.device)
        return _Read(rows[live], tokens[kept], of_row[kept], positions[:, -1] + 1, mask, output.past_key_values)

    def _step(self, batch: _Batch) -> None:
        """Read one token of every row and write the next; finished rows stay as they are and are not seen."""
        going_on = torch.as_tensor(batch.live, device=batch.mask.device).to(batch.mask.dtype)
        batch.mask = torch.cat([batch.mask, going_on.unsqueeze(-1)], dim=-1)
        ids, positions = batch.tokens.unsqueeze(-1), batch.positions.unsqueeze(-1)
        if batch.rows is not self.told:  # the same array as long as the batch is the same
            self.told, self.edits = batch.rows, self.asked.edits[batch.rows]
        output = self._forward(ids, batch.mask, positions, self.edits, batch.cache)
        batch.cache = output.past_key_values
        batch.positions = batch.positions + going_on
        places = np.flatnonzero(batch.live)
        logits, chosen = output.logits[:, -1], torch.as_tensor(places, device=batch.mask.device)
        drawn = self._choose(logits if len(places) == len(logits) else logits[chosen], batch.rows[places])
        batch.tokens[chosen] = drawn
        batch.live[places] = self._record(batch.rows[places], drawn)

    def _forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, edits: NDArray[np.int64], cache: Any = None
    ) -> Any:
        if self.active is not None:
            self.active.rows = edits
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **self.extra,
        )

    def _choose(self, logits: Tensor, rows: Rows) -> Tensor:
        """[row] the next token of each, on the device of the batch."""
        if logits.isnan().any():  # argmax would take token 0
            raise FloatingPointError(
                "the model's logits are NaN; load it in a type that holds its values, or leave it out"
            )
        greedy = self.asked.greedy[rows]
        if greedy.all():
            return logits.argmax(dim=-1)
        steps = np.array([len(self.written[row]) for row in rows], dtype=np.uint64)
        keys = counter_bits(self.asked.seeds[rows], steps)
        logits = logits.cpu() if logits.device.type == "mps" else logits  # no 64-bit integers in all its versions
        how = self.sampling
        tokens = draw_tokens(logits, keys, temperature=how.temperature, top_p=how.top_p)
        if greedy.any():
            likely = torch.as_tensor(greedy, device=logits.device)
            tokens = torch.where(likely, logits.argmax(dim=-1), tokens)
        return tokens.to(self.model.device)

    def _record(self, rows: Rows, tokens: Tensor) -> NDArray[np.bool_]:
        """Write the tokens down; [row] whether it goes on."""
        asked = self.asked
        live = np.ones(len(rows), dtype=bool)
        for place, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            written = self.written[row]
            written.append(token)
            ended = token in asked.ends[row] or len(written) == asked.limits[row]
            live[place] = not ended and not self.stopping.found(written, asked.strings[row])
        if not live.all():
            self.finished(int((~live).sum()))
        return live


def _readings(asked: Asked, prompt_edits: Sequence[int]) -> list[_Reading]:
    """What is read of each row's prompt before tokens are written, and the number of the edit it is read under.

    Where edits begin at the last token of prompts, all before it is read once for all of them, unedited.
    """
    readings = []
    for ids, edit in zip(map(tuple, asked.encoded), asked.edits.tolist(), strict=True):
        same = prompt_edits[edit]
        if same < 0 and len(ids) > 1:
            readings.append((ids[:-1], same))
        else:
            readings.append((ids, edit if same < 0 else same))
    return readings


def _in_order(readings: Sequence[_Reading]) -> list[int]:
    """Rows in the order in which they begin: those that are read alike together.

    Few edits act in one pass then, each on many rows; and prompts are of similar length, so that little is padded.
    """
    first: dict[_Reading, int] = {}
    for row, reading in enumerate(readings):
        first.setdefault(reading, row)

    def place(row: int) -> tuple[int, int, int]:
        ids, edit = readings[row]
        return edit, len(ids), first[readings[row]]

    return sorted(range(len(readings)), key=place)
