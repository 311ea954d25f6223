"""Tokenising, padding and batching of texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rlgen_stats.schemas.errors import InputError


def pad_id(tokenizer: Any) -> int:
    """Id put into pad positions: the end token, else the pad token, else 0; it is masked out.

    The end token first: a pad token may have been added to a tokenizer whose model has no row for it.
    """
    for candidate in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def encode(tokenizer: Any, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """Token ids of texts, with the tokenizer's own leading special tokens unless ``special`` is false.

    A text that begins with the BOS token, as one that a chat template has rendered, is given no second one.
    """
    bos = tokenizer.bos_token
    bare = [not special or (bool(bos) and text.startswith(bos)) for text in texts]
    encoded: list[list[int]] = [[] for _ in texts]
    for chosen in (False, True):
        rows = [row for row, one in enumerate(bare) if one == chosen]
        if rows:
            batch = tokenizer([texts[row] for row in rows], add_special_tokens=not chosen)["input_ids"]
            for row, ids in zip(rows, batch, strict=True):
                encoded[row] = list(ids)
    return encoded


def encode_prompts(tokenizer: Any, prompts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """Token ids of texts that are to be continued, see :func:`encode`.

    Raises
    ------
    InputError
        If a prompt has no tokens, or the tokenizer closes prompts with its end token.
    """
    encoded = encode(tokenizer, prompts, special=special)
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise InputError(f"prompt {prompt[:60]!r} has no tokens; give it a text.")
        if ids[-1] == tokenizer.eos_token_id:
            raise InputError(
                f"the tokenizer ends prompt {prompt[:60]!r} with its end token, after which nothing follows; "
                "switch that off in the tokenizer (add_eos_token: false) or remove it from the text."
            )
    return encoded


def left_pad(
    sequences: Sequence[Sequence[int]], pad: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and position ids [batch, length], padded on the left; real tokens count from 0."""
    length = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), length), pad, dtype=torch.long)
    mask = torch.zeros((len(sequences), length), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, length - len(sequence) :] = torch.as_tensor(sequence, dtype=torch.long)
        mask[row, length - len(sequence) :] = 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return ids.to(device), mask.to(device), positions.to(device)


def by_length(lengths: Sequence[int], batch_size: int, most_tokens: float = math.inf) -> Iterator[list[int]]:
    """Indices in batches of similar length, so that little is padded; ties keep their order. See :func:`cut`."""
    return cut(sorted(range(len(lengths)), key=lambda index: lengths[index]), lengths, batch_size, most_tokens)


def cut(
    order: Sequence[int], lengths: Sequence[int], batch_size: int, most_tokens: float = math.inf
) -> Iterator[list[int]]:
    """Indices, in this order, in batches of at most ``batch_size`` texts and ``most_tokens`` tokens, padding included.

    A longer text is a batch of its own.
    """
    batch: list[int] = []
    longest = 0
    for index in order:
        longest = max(longest, lengths[index])
        if batch and (len(batch) == batch_size or longest * (len(batch) + 1) > most_tokens):
            yield batch
            batch, longest = [], lengths[index]
        batch.append(index)
    if batch:
        yield batch
