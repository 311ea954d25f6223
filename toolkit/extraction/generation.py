"""Completions in which every draw depends on the row's seed, not on its batch.

Each sampled token is an inverse-CDF draw with a uniform number that is a hash of (row seed, step). Batch size, order
and batch composition change nothing but the last bits of the logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from rlgen_stats.schemas.errors import InputError, ModelError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.toolkit.counter_random import counter_uniforms
from rlgen_stats.toolkit.extraction.batching import by_length, encode_prompts, left_pad, pad_id
from rlgen_stats.toolkit.progress import SILENT, Progress

SHRINK_BELOW: Final = 0.75
"""Finished rows leave the batch once fewer than this share is unfinished: copying the cache must pay for itself."""


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


def draw_tokens(logits: torch.Tensor, uniforms: torch.Tensor, *, temperature: float, top_p: float) -> torch.Tensor:
    """Inverse-CDF draws from softmax(logits / temperature), cut to its nucleus.

    Parameters
    ----------
    logits
        [row, vocabulary].
    uniforms
        [row] float64 in [0, 1).
    temperature
        Positive; 1 leaves the model's distribution.
    top_p
        Keep the fewest most likely tokens whose mass reaches this (arXiv 1904.09751, section 3.1); 1 keeps all.

    Returns
    -------
    Tensor [row] int64
        Token ids; a token of probability zero is never drawn.
    """
    # float64: a float32 cumulative sum over 150,000 tokens is off by more than the probability of a rare one
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    if top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        keep = ordered.cumsum(dim=-1) - ordered < top_p
        probabilities = torch.where(torch.zeros_like(keep).scatter(-1, order, keep), probabilities, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1]
    # strictly below the total, or a uniform number near 1 would fall behind the last token of positive probability
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target.unsqueeze(-1), right=True).squeeze(-1)


@dataclass(frozen=True)
class _Sampling:
    temperature: float
    greedy: bool
    top_p: float
    pad: int


class _StopStrings:
    """Texts that end completions, looked for in the decoded text, since tokens may begin or end inside them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def text(self, ids: Sequence[int]) -> str:
        """Decoded text without special tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def found(self, ids: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether one is in the text by now; decodes its end first, where a character is at most four tokens."""
        if not stop:
            return False
        tail = 4 * max(map(len, stop)) + 4
        return _first(self.text(ids[-tail:]), stop) is not None and _first(self.text(ids), stop) is not None

    def cut(self, ids: list[int], stop: Sequence[str]) -> tuple[list[int], str, bool]:
        """Tokens and text before the first stop string, and whether there is one; a token that it begins in is kept."""
        text = self.text(ids)
        end = _first(text, stop)
        if end is None:
            return ids, text, False
        kept = len(ids)
        while kept > 1 and len(self.text(ids[: kept - 1])) >= end and self.text(ids[: kept - 1]).startswith(text[:end]):
            kept -= 1
        return ids[:kept], text[:end], True


def cut_at_stop(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> tuple[list[int], str, bool]:
    """Tokens and text before the first stop string, as completions end here, and whether there is one."""
    return _StopStrings(tokenizer).cut(list(ids), stop)


def _first(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of some strings begins."""
    return min((at for string in stop if (at := text.find(string)) >= 0), default=None)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    stop: Sequence[Sequence[str]] | None = None,
    temperature: float = 1.0,
    greedy: bool = False,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    end_of_turn: int | None = None,
    batch_size: int = 64,
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
        comes K times with K seeds.
    max_new_tokens
        Length limit, one for all rows or one each.
    stop
        Stop strings of each row: generation ends once the decoded text has one, and the text is cut before it. One
        that is a special token, which no decoded text has, ends it as an end token does.
    temperature, top_p
        Of sampling; without effect on greedy completions.
    greedy
        Take the most likely token at each step.
    seeds
        One per row, 0 to 2**64 - 1; required unless greedy.
    end_of_turn
        A token that ends a completion beside those of the tokenizer and of the model's generation config.
    batch_size
        Rows per forward pass.
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
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    strings: list[Sequence[str]] = [()] * len(prompts) if stop is None else list(stop)
    _check(prompts, seeds, limits, strings, temperature, greedy, top_p, batch_size)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = encode_prompts(tokenizer, texts) if texts else [[*ids] for ids in prompts]
    _check_context(model, encoded, limits)
    special = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    always = frozenset(stop_ids(model, tokenizer, end_of_turn))
    ends = [always.union(special[string] for string in row if string in special) for row in strings]
    sampling = _Sampling(temperature, greedy, top_p, pad_id(tokenizer))
    stopping = _StopStrings(tokenizer)
    numbers = np.zeros(len(prompts), np.uint64) if seeds is None else np.array([int(s) for s in seeds], np.uint64)
    written: list[list[int]] = [[] for _ in prompts]
    with progress.task(description, total=len(prompts), unit="completions") as task:
        for rows in by_length([len(ids) for ids in encoded], batch_size):
            try:
                asked = _Rows(
                    [encoded[r] for r in rows],
                    numbers[rows],
                    [limits[r] for r in rows],
                    [strings[r] for r in rows],
                    [ends[r] for r in rows],
                )
                completed = _write(model, asked, sampling, stopping)
            except FloatingPointError as error:
                raise ModelError(f"{description}: {error}.") from error
            for row, ids in zip(rows, completed, strict=True):
                written[row] = ids
            task.advance(len(rows))
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
    temperature: float,
    greedy: bool,
    top_p: float,
    batch_size: int,
) -> None:
    for name, values in (("max_new_tokens", limits), ("stop", strings)):
        if len(values) != len(prompts):
            raise InputError(f"one {name} per row is needed: {len(prompts)} prompts, {len(values)} given.")
    if any(isinstance(row, str) or not all(row) for row in strings):
        raise InputError("stop strings are one list a row, none of them empty.")
    if not greedy and seeds is None:
        raise InputError("sampling needs one seed per row; pass seeds= or greedy=True.")
    if seeds is not None and len(seeds) != len(prompts):
        raise InputError(f"one seed per row is needed: {len(prompts)} prompts, {len(seeds)} seeds.")
    if seeds is not None and any(not 0 <= int(seed) < 2**64 for seed in seeds):
        raise InputError("seeds must be between 0 and 2**64 - 1.")
    if min(limits, default=1) < 1 or batch_size < 1:
        raise InputError(f"max_new_tokens and batch_size must be 1 or more, got {min(limits)} and {batch_size}.")
    if not greedy and (temperature <= 0 or not 0 < top_p <= 1):
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


@dataclass(frozen=True)
class _Rows:
    """What each row of a batch asks for."""

    encoded: Sequence[Sequence[int]]
    seeds: NDArray[np.uint64]
    limits: Sequence[int]
    strings: Sequence[Sequence[str]]
    ends: Sequence[frozenset[int]]


@torch.inference_mode()
def _write(model: Any, asked: _Rows, sampling: _Sampling, stopping: _StopStrings) -> list[list[int]]:
    """Complete one batch; finished rows are dropped from it where that saves time."""
    ids, mask, positions = left_pad(asked.encoded, sampling.pad, model.device)
    rows = np.arange(len(asked.encoded))  # prompt of each row of the shrinking batch
    live = np.ones(len(rows), dtype=bool)  # rows that are not finished
    written: list[list[int]] = [[] for _ in rows]
    extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cache = None
    for step in range(max(asked.limits)):
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **extra
        )
        tokens = _choose(output.logits[:, -1], asked.seeds[rows], step, sampling)
        for index in np.flatnonzero(live):
            row = rows[index]
            written[row].append(int(tokens[index]))
            ended = tokens[index] in asked.ends[row] or len(written[row]) == asked.limits[row]
            live[index] = not ended and not stopping.found(written[row], asked.strings[row])
        if not live.any():
            break
        cache, positions = output.past_key_values, positions[:, -1:] + 1
        if live.mean() < SHRINK_BELOW:
            unfinished = torch.as_tensor(np.flatnonzero(live), device=mask.device)
            cache.reorder_cache(unfinished)  # not batch_select_indices, which layers with a state do not have
            mask, positions = mask[unfinished], positions[unfinished]
            # only unfinished rows stay, so that all of them are live
            rows, tokens, live = rows[live], tokens[live], live[live]
        ids = torch.as_tensor(np.where(live, tokens, sampling.pad), device=mask.device).unsqueeze(-1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
    return written


def _choose(logits: torch.Tensor, seeds: NDArray[np.uint64], step: int, sampling: _Sampling) -> NDArray[np.int64]:
    if logits.isnan().any():  # argmax would take token 0
        raise FloatingPointError("the model's logits are NaN; load it in a type that holds its values, or leave it out")
    if sampling.greedy:
        return np.asarray(logits.argmax(dim=-1).cpu().numpy())
    if logits.device.type == "mps":  # no float64 there
        logits = logits.cpu()
    uniforms = torch.from_numpy(counter_uniforms(seeds, step)).to(logits.device)
    tokens = draw_tokens(logits, uniforms, temperature=sampling.temperature, top_p=sampling.top_p)
    return np.asarray(tokens.cpu().numpy())
