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
    """Decoded text without special tokens."""
    terminated: bool
    """Whether the model ended by itself, within the length limit."""


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
    max_new_tokens: int
    temperature: float
    greedy: bool
    top_p: float
    stops: tuple[int, ...]
    pad: int


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    greedy: bool = False,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
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
        Texts, one per row; a prompt sampled K times comes K times with K seeds.
    max_new_tokens
        Length limit.
    temperature, top_p
        Of sampling; without effect on greedy completions.
    greedy
        Take the most likely token at each step.
    seeds
        One per row, 0 to 2**64 - 1; required unless greedy.
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
    _check(prompts, seeds, max_new_tokens, temperature, greedy, top_p, batch_size)
    encoded = encode_prompts(tokenizer, prompts)
    _check_context(model, encoded, max_new_tokens)
    sampling = _Sampling(max_new_tokens, temperature, greedy, top_p, stop_ids(model, tokenizer), pad_id(tokenizer))
    numbers = np.zeros(len(prompts), np.uint64) if seeds is None else np.array([int(s) for s in seeds], np.uint64)
    written: list[list[int]] = [[] for _ in prompts]
    with progress.task(description, total=len(prompts), unit="completions") as task:
        for rows in by_length([len(ids) for ids in encoded], batch_size):
            try:
                completed = _write(model, [encoded[r] for r in rows], numbers[rows], sampling)
            except FloatingPointError as error:
                raise ModelError(f"{description}: {error}.") from error
            for row, ids in zip(rows, completed, strict=True):
                written[row] = ids
            task.advance(len(rows))
    texts = tokenizer.batch_decode(written, skip_special_tokens=True) if written else []
    ended = [bool(ids) and ids[-1] in sampling.stops for ids in written]
    return [Completion(tuple(ids), text, end) for ids, text, end in zip(written, texts, ended, strict=True)]


def _check(
    prompts: Sequence[str],
    seeds: Sequence[int] | None,
    max_new_tokens: int,
    temperature: float,
    greedy: bool,
    top_p: float,
    batch_size: int,
) -> None:
    if not greedy and seeds is None:
        raise InputError("sampling needs one seed per row; pass seeds= or greedy=True.")
    if seeds is not None and len(seeds) != len(prompts):
        raise InputError(f"one seed per row is needed: {len(prompts)} prompts, {len(seeds)} seeds.")
    if seeds is not None and any(not 0 <= int(seed) < 2**64 for seed in seeds):
        raise InputError("seeds must be between 0 and 2**64 - 1.")
    if max_new_tokens < 1 or batch_size < 1:
        raise InputError(f"max_new_tokens and batch_size must be 1 or more, got {max_new_tokens} and {batch_size}.")
    if not greedy and (temperature <= 0 or not 0 < top_p <= 1):
        raise InputError(f"temperature must be positive and top_p in (0, 1], got {temperature} and {top_p}.")


def _check_context(model: Any, encoded: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(ids) for ids in encoded), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise InputError(
            f"the longest prompt has {longest} tokens and {max_new_tokens} may follow, but the model's context is "
            f"{limit}; lower generation.max_new_tokens or shorten the prompts."
        )


def stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a completion: the tokenizer's end token and those of the model's generation config."""
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    return tuple(sorted({int(token) for token in (tokenizer.eos_token_id, *listed) if token is not None}))


@torch.inference_mode()
def _write(
    model: Any, encoded: Sequence[Sequence[int]], seeds: NDArray[np.uint64], sampling: _Sampling
) -> list[list[int]]:
    """Complete one batch; finished rows are dropped from it where that saves time."""
    ids, mask, positions = left_pad(encoded, sampling.pad, model.device)
    rows = np.arange(len(encoded))  # prompt of each row of the shrinking batch
    live = np.ones(len(encoded), dtype=bool)  # rows that are not finished
    written: list[list[int]] = [[] for _ in encoded]
    extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cache = None
    for step in range(sampling.max_new_tokens):
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **extra
        )
        tokens = _choose(output.logits[:, -1], seeds[rows], step, sampling)
        for index in np.flatnonzero(live):
            written[rows[index]].append(int(tokens[index]))
        live &= ~np.isin(tokens, sampling.stops)
        if not live.any() or step + 1 == sampling.max_new_tokens:
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
