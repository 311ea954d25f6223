"""Completions in which every draw depends on the row's seed, not on its batch; rows join the batch as others leave.

The noise of a sampled token is a hash of (row seed, step, token id), see :mod:`token_draws`. What stands beside a row
changes its logits by rounding alone, and its completion only where two tokens are that close.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlgen_stats.schemas.errors import InputError, ModelError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.extraction.batching import encode_prompts, pad_id
from rlgen_stats.toolkit.extraction.refilled_batch import Asked, RowEdits, Sampling, write_rows
from rlgen_stats.toolkit.extraction.stop_strings import StopStrings
from rlgen_stats.toolkit.progress import SILENT, Progress


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt."""

    token_ids: tuple[int, ...]
    """Tokens as generated, the end token included."""
    text: str
    """Decoded text without special tokens and the token that ended it, cut before a stop string."""
    terminated: bool
    """Whether the model ended by itself, by an end token or a stop string, within the length limit."""
    choice: int | None = None
    """Number of the choice that this is, where choices were scored and nothing was generated."""
    choice_log_likelihoods: tuple[float, ...] = ()
    """Of all choices then, in nats; sums over tokens, not normalised."""


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    stop: Sequence[Sequence[str]] | None = None,
    temperature: float = 1.0,
    greedy: bool | Sequence[bool] = False,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    end_of_turn: int | None = None,
    batch_size: int = 64,
    edits: Sequence[int] | None = None,
    active: RowEdits | None = None,
    progress: Progress = SILENT,
    description: str = "generate",
) -> list[Completion]:
    """Complete prompts, greedily or by sampling with one seed per row.

    Parameters
    ----------
    model, tokenizer
        Causal language model and its tokenizer. The model may carry hooks: only its ordinary forward pass is used.
    prompts
        Plain texts, or the token ids that a :class:`PromptReader` makes of them, one per row; a prompt sampled K times
        comes K times with K seeds, and is read once.
    max_new_tokens
        Length limit, one for all rows or one each.
    stop
        Stop strings of each row: generation ends once the decoded text has one, and the text is cut before it. One
        that is a special token, which no decoded text has, ends it as an end token does.
    temperature, top_p
        Of sampling; without effect on greedy completions.
    greedy
        Take the most likely token at each step; for all rows or one answer each.
    seeds
        One per row, 0 to 2**64 - 1; required unless all are greedy, without effect on those that are.
    end_of_turn
        A token that ends a completion beside those of the tokenizer and of the model's generation config.
    batch_size
        Rows per forward pass. Prompts that wait are read as soon as others are finished.
    edits, active
        Of several edits in force, the number of each row's, and their handle (``toolkit.edits.editing_rows``).
    progress, description
        Receiver and title of progress.

    Returns
    -------
    list of Completion
        In the order of ``prompts``.

    Raises
    ------
    InputError
        If seeds are missing or not one per row, a setting is out of range, a prompt is empty, or prompt and completion
        do not fit the model's context.
    ModelError
        If the model's logits are NaN.
    """
    n = len(prompts)
    limits = [max_new_tokens] * n if isinstance(max_new_tokens, int) else list(max_new_tokens)
    strings: list[Sequence[str]] = [()] * n if stop is None else list(stop)
    greedily = [greedy] * n if isinstance(greedy, bool) else list(greedy)
    _check(prompts, seeds, limits, strings, greedily, temperature, top_p, batch_size)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = encode_prompts(tokenizer, texts) if texts else [[*ids] for ids in prompts]
    _check_context(model, encoded, limits)
    special = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    always = frozenset(stop_ids(model, tokenizer, end_of_turn))
    ends = [always.union(special[string] for string in row if string in special) for row in strings]
    numbers = np.zeros(n, np.uint64) if seeds is None else np.array([int(s) for s in seeds], np.uint64)
    of_row = np.zeros(n, np.int64) if edits is None else np.array(edits, np.int64)
    asked = Asked(encoded, numbers, limits, strings, ends, np.array(greedily, dtype=bool), of_row)
    sampling, stopping = Sampling(temperature, top_p, pad_id(tokenizer)), StopStrings(tokenizer)
    with progress.task(description, total=n, unit="completions") as task:
        try:
            written = write_rows(
                model, asked, sampling, stopping, batch_size=batch_size, finished=task.advance, active=active
            )
        except FloatingPointError as error:
            raise ModelError(f"{description}: {error}.") from error
    completions = []
    for ids, row_strings, row_ends in zip(written, strings, ends, strict=True):
        ended = bool(ids) and ids[-1] in row_ends
        kept, text, stopped = stopping.cut(ids[:-1] if ended else ids, row_strings)
        completions.append(Completion(tuple(kept if stopped else ids), text, stopped or ended))
    return completions


def asked_of(spec: StudySpec, tasks: Sequence[str]) -> dict[str, Any]:
    """Arguments of :func:`generate` that rows have by their task: length limits and stop strings."""
    return {
        "max_new_tokens": [spec.max_new_tokens_of(task) for task in tasks],
        "stop": [spec.task(task).stop for task in tasks],
    }


def _check(
    prompts: Sequence[object],
    seeds: Sequence[int] | None,
    limits: Sequence[int],
    strings: Sequence[Sequence[str]],
    greedy: Sequence[bool],
    temperature: float,
    top_p: float,
    batch_size: int,
) -> None:
    for name, values in (("max_new_tokens", limits), ("stop", strings), ("greedy", greedy)):
        if len(values) != len(prompts):
            raise InputError(f"one {name} per row is needed: {len(prompts)} prompts, {len(values)} given.")
    if any(isinstance(row, str) or not all(row) for row in strings):
        raise InputError("stop strings are one list a row, none of them empty.")
    sampled = not all(greedy)
    if sampled and seeds is None:
        raise InputError("sampling needs one seed per row; pass seeds= or greedy=True.")
    if seeds is not None and len(seeds) != len(prompts):
        raise InputError(f"one seed per row is needed: {len(prompts)} prompts, {len(seeds)} seeds.")
    if seeds is not None and any(not 0 <= int(seed) < 2**64 for seed in seeds):
        raise InputError("seeds must be between 0 and 2**64 - 1.")
    if min(limits, default=1) < 1 or batch_size < 1:
        raise InputError(f"max_new_tokens and batch_size must be 1 or more, got {min(limits)} and {batch_size}.")
    if sampled and (temperature <= 0 or not 0 < top_p <= 1):
        raise InputError(f"temperature must be positive and top_p in (0, 1], got {temperature} and {top_p}.")


def _check_context(model: Any, encoded: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    sizes = zip((len(ids) for ids in encoded), limits, strict=True)
    longest, max_new_tokens = max(sizes, key=sum, default=(0, 0))
    if limit is not None and longest + max_new_tokens > limit:
        raise InputError(
            f"the longest prompt has {longest} tokens and {max_new_tokens} may follow, but the model's context is "
            f"{limit}; lower generation.max_new_tokens or shorten the prompts."
        )


def stop_ids(model: Any, tokenizer: Any, end_of_turn: int | None = None) -> tuple[int, ...]:
    """Tokens that end a completion: of the tokenizer, of the model's generation config, and of its chat template."""
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    return tuple(sorted({int(token) for token in (tokenizer.eos_token_id, end_of_turn, *listed) if token is not None}))
