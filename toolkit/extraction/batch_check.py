"""Whether a model reads and continues texts in left-padded batches as it does alone."""

from __future__ import annotations

from typing import Any, Final

import torch

from rlgen_stats.schemas.errors import ModelError
from rlgen_stats.toolkit.extraction.batching import left_pad

MAX_DIFFERENCE: Final = 0.1
"""Relative difference of a padded text's logits from those alone. Rounding in half types leaves a hundredth, pads that
are read as text leave about 1."""


@torch.inference_mode()
def check_batches(model: Any, name: str) -> None:
    """Refuse a model that cannot be read in left-padded batches or continued token by token.

    Two forward passes of a few tokens tell by what the model returns, whatever it is called: state space models that
    carry a state of their own instead of a cache, and models or attention kernels that take pads for text.

    Parameters
    ----------
    model
        Causal language model.
    name
        What messages call it.

    Raises
    ------
    ModelError
        If its forward pass returns no cache, logits are NaN, or a text's logits depend on the pads before it.
    """
    ids = [1 + i % (int(model.config.get_text_config().vocab_size) - 1) for i in range(8)]
    short = ids[:3]
    both, alone = (
        model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True)
        for tokens, mask, positions in (left_pad([ids, short], 0, model.device), left_pad([short], 0, model.device))
    )
    if getattr(both, "past_key_values", None) is None:
        raise ModelError(
            f"{name}: {type(model).__name__} returns no key-value cache (past_key_values), without which completions "
            "are not continued token by token in padded batches; expected a causal model with attention, hybrids "
            "included: leave this one out."
        )
    padded, reference = both.logits[1, -len(short) :].double(), alone.logits[0].double()
    if reference.isnan().any():
        raise ModelError(
            f"{name}: its logits are NaN in {model.dtype}; expected numbers: set models.dtype to bfloat16 or float32, "
            "which hold larger values than float16, or leave the model out if its training diverged."
        )
    difference = float(((padded - reference).norm(dim=-1) / reference.norm(dim=-1)).median())
    if difference > MAX_DIFFERENCE:
        raise ModelError(
            f"{name}: {type(model).__name__} reads a text behind pads otherwise than alone (its logits differ by "
            f"{difference:.0%}); expected a model whose attention and state leave out masked tokens: try "
            "models.attn_implementation: eager, or leave this one out."
        )
