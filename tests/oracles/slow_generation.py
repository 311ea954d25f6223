"""Completions the slow way: a whole forward pass for every token, one row at a time, and hashes in Python integers.

Shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

GAMMA = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    """Output function of SplitMix64."""
    z %= 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def key(seed: int, step: int) -> int:
    """Bits of a row at a step: number ``step`` of the stream that begins at the hashed seed."""
    return mix(mix(seed + GAMMA) + (step + 1) * GAMMA)


def gumbel(row_key: int, token: int) -> float:
    """The token's Gumbel number at a step whose key this is."""
    v = (mix(row_key + (token + 1) * GAMMA) % 2**63 + 0.5) / 2**63
    return -float(np.log(-np.log1p(-v)))


def drawn(
    logits: Any, row_key: int, *, temperature: float = 1.0, top_p: float = 1.0, kept: Collection[int] | None = None
) -> int:
    """The token with the highest noisy logit among the most likely ones whose mass reaches ``top_p``."""
    scores = np.asarray(logits, dtype=np.float64) / temperature
    if kept is None:
        probabilities = np.exp(scores - scores.max())
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        n = 1 + int(np.searchsorted(probabilities[order].cumsum(), top_p)) if top_p < 1 else len(order)
        last = probabilities[order[min(n, len(order)) - 1]]
        kept = np.flatnonzero(probabilities >= last).tolist()
    return max(kept, key=lambda token: scores[token] + gumbel(row_key, token))


def completed(
    model: Any, ids: Sequence[int], limit: int, *, ends: Collection[int], seed: int | None = None, **how: float
) -> tuple[int, ...]:
    """Tokens after a prompt, greedily or with a seed."""
    written: list[int] = []
    while len(written) < limit and not (written and written[-1] in ends):
        logits = model(input_ids=torch.tensor([[*ids, *written]]), use_cache=False).logits[0, -1]
        written.append(int(logits.argmax()) if seed is None else drawn(logits, key(seed, len(written)), **how))
    return tuple(written)
