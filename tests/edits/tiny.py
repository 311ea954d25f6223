"""Tiny models of the common architectures and a random crosscoder that fits them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.gemma import GemmaConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

from rlgen_stats.toolkit.crosscoder import Crosscoder

WIDTH, LAYERS, VOCABULARY, N_FEATURES = 16, 3, 31, 24
BASE, RL = "base@0", "rl@4"

_COMMON = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "vocab_size": VOCABULARY}
_WIDE = {"intermediate_size": 24, "max_position_embeddings": 128, "initializer_range": 0.2}
_HEADS = {"num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, Any] = {
    "qwen3": Qwen3Config(**_COMMON, **_WIDE, **_HEADS),
    "qwen2": Qwen2Config(**_COMMON, **_WIDE, num_key_value_heads=2),
    "llama": LlamaConfig(**_COMMON, **_WIDE, **_HEADS),
    "mistral": MistralConfig(**_COMMON, **_WIDE, **_HEADS, sliding_window=None),
    "gemma": GemmaConfig(**_COMMON, **_WIDE, **_HEADS),
    "gpt_neox": GPTNeoXConfig(**_COMMON, **_WIDE),
    "gpt2": GPT2Config(
        n_embd=WIDTH, n_layer=LAYERS, n_head=2, vocab_size=VOCABULARY, n_positions=128, initializer_range=0.2
    ),
}


def tiny_model(kind: str = "qwen3", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    return model.float().eval().requires_grad_(False)


def tiny_crosscoder(seed: int = 0, *, sparsity: Any = "batchtopk", width: int = WIDTH) -> Crosscoder:
    """Random weights with unequal scales, means and biases, so that a mistaken unit shows."""
    draw = torch.Generator().manual_seed(seed)
    crosscoder = Crosscoder((BASE, "sft@4", RL), width=width, n_features=N_FEATURES, sparsity=sparsity, k=4)
    with torch.no_grad():
        crosscoder.scale.copy_(torch.tensor([0.5, 1.7, 3.1]))
        crosscoder.mean.copy_(torch.randn(3, width, generator=draw))
        crosscoder.encoder.copy_(torch.randn(3, width, N_FEATURES, generator=draw) * 0.3)
        crosscoder.decoder.copy_(torch.randn(3, N_FEATURES, width, generator=draw) * 0.3)
        crosscoder.encoder_bias.copy_(torch.randn(N_FEATURES, generator=draw) * 0.1)
        crosscoder.decoder_bias.copy_(torch.randn(3, width, generator=draw) * 0.1)
        crosscoder.threshold.fill_(0.4)
    return crosscoder.requires_grad_(False).eval()


def batch_of(*lengths: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left-padded random tokens: ids, mask, position ids."""
    draw = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = torch.randint(1, VOCABULARY, (length,), generator=draw)
        mask[row, longest - length :] = 1
    return ids, mask, (mask.cumsum(-1) - 1).clamp_min(0)


def n_hooks(model: Any) -> int:
    return sum(
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._forward_hooks_with_kwargs)
    )
