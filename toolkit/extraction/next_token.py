"""Next-token distributions: logits at chosen positions, and their divergence, in little memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

LOGIT_BYTES: Final = 1 << 27
"""Memory of one model's float32 logits (128 MB): 223 positions at a time for a vocabulary of 150,000."""
BLOCK_BYTES: Final = 1 << 26
"""Memory of one block of distributions in float64 (64 MB), of which a divergence holds some six."""


def common_vocabulary(models: Iterable[Any]) -> int:
    """Tokens, those with the smallest ids, that all models predict: others were added to some of them."""
    return min(int(model.config.get_text_config().vocab_size) for model in models)


def positions_at_once(model: Any) -> int:
    """Positions whose logits fit into ``LOGIT_BYTES``, at least one."""
    return max(1, LOGIT_BYTES // (4 * int(model.config.get_text_config().vocab_size)))


@torch.inference_mode()
def logits_at(model: Any, chosen: Tensor, **inputs: Tensor) -> Tensor:
    """Logits at some positions of a batch; the output head is not run at the others.

    Parameters
    ----------
    model
        Causal language model.
    chosen
        [row, token] bool.
    inputs
        Arguments of its forward pass.

    Returns
    -------
    Tensor [position, vocabulary]
        Row after row.
    """
    head = model.get_output_embeddings()
    shortened = False

    def keep(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal shortened
        if not args or args[0].shape[:2] != chosen.shape:
            return None
        shortened = True
        return (args[0][chosen.to(args[0].device)][None], *args[1:])

    handle = None if head is None else head.register_forward_pre_hook(keep)
    try:
        logits: Tensor = model(use_cache=False, **inputs).logits
    finally:
        if handle is not None:
            handle.remove()
    return logits[0] if shortened else logits[chosen.to(logits.device)]


def log_probability_blocks(*logits: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Float64 log-probabilities of the same positions of several [position, vocabulary] logits, some at a time.

    Of vocabularies that differ in size, the common tokens are compared: others were added to some models. Small
    divergences are lost in float32, and half types hold three digits.
    """
    vocabulary = min(one.shape[-1] for one in logits)
    size = max(1, BLOCK_BYTES // (8 * vocabulary))
    for parts in zip(*(torch.split(one, size) for one in logits), strict=True):
        yield tuple(part[:, :vocabulary].double().log_softmax(dim=-1) for part in parts)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last axis, in nats and in the type of the log-probabilities.

    Parameters
    ----------
    log_p, log_q
        [..., vocabulary] log-probabilities.

    Returns
    -------
    Tensor [...]
        Exact over the vocabulary. Rounding may leave a value slightly below 0 where the distributions are nearly equal.
    """
    p = log_p.exp()
    # 0 log 0 = 0: without the case, a token that p rules out (log p = -inf) would make the sum NaN
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=-1)
