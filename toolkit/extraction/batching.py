"""Tokenising, padding and batching of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rlgen_stats.schemas.errors import InputError


def pad_id(tokenizer: Any) -> int:
    """Id put into pad positions: the pad token, else the end token, else 0; it is masked out."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts with the tokenizer's own leading special tokens.

    Raises
    ------
    InputError
        If a prompt has no tokens, or the tokenizer closes prompts with its end token.
    """
    if not prompts:
        return []
    encoded = [list(ids) for ids in tokenizer(list(prompts))["input_ids"]]
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


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, so that little is padded; ties keep their order."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
