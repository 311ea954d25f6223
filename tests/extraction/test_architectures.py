"""Families of transformers, tiny: read in left-padded batches and completed in refilled ones as alone, or refused."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlgen_stats.schemas.errors import ModelError
from rlgen_stats.toolkit.extraction import generate
from rlgen_stats.toolkit.extraction.batch_check import check_batches
from rlgen_stats.toolkit.extraction.batching import left_pad
from rlgen_stats.toolkit.extraction.next_token import logits_at
from rlgen_stats.toolkit.extraction.residual_stream import (
    block_output,
    capture_residual,
    locate_layers,
    read_residual,
    read_residuals,
    record_block,
    resume_after,
)
from tests.extraction.conftest import WORDS, word_tokenizer
from tests.oracles.slow_generation import completed

TEXTS = [[5, 9, 12, 4, 7, 8, 3], [6, 5], [9, 9, 10, 11]]
PROMPTS = ["what is 3 plus 4 so ans", "what", "7 plus 2", "what is 5", "is 3 plus 4 plus 9 so so"]
N_LAYERS = 3
_COMMON: Final[dict[str, Any]] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_WINDOW: Final = {"sliding_window": 4}  # shorter than the texts
_EXPERTS: Final = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
_MAMBA: Final = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
_DELTA: Final = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
FAMILIES: Final[dict[str, dict[str, Any]]] = {
    # attention
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": _WINDOW,
    "gemma": {},
    "gemma2": _WINDOW,
    "gemma3_text": _WINDOW,
    "phi": {},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": _WINDOW,
    "cohere": {},
    "cohere2": _WINDOW,
    "granite": {},
    "glm": {},
    "glm4": {},
    "exaone4": _WINDOW,
    "nemotron": {},
    "starcoder2": {},
    "stablelm": {},
    "smollm3": {},
    "seed_oss": {},
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "window_size": 4},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {},
    "mpt": {},
    # mixtures of experts
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "olmoe": _EXPERTS,
    "gpt_oss": _EXPERTS | _WINDOW,
    "llama4_text": _EXPERTS | {"intermediate_size_mlp": 32},
    "glm4_moe": _EXPERTS | {"first_k_dense_replace": 1},
    "ernie4_5_moe": _EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    # state space models, linear attention and convolutions beside attention
    "qwen3_next": _DELTA | _EXPERTS,
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": _DELTA | _EXPERTS,
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "granitemoehybrid": _MAMBA
    | {"num_local_experts": 0, "shared_intermediate_size": 16, "layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "num_experts": 4,
        "use_mamba_kernels": False,
    },
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "hybrid_override_pattern": "M*-",
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
}
REFUSED: Final[dict[str, dict[str, Any]]] = {
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8, "state_size": 8},
    "recurrent_gemma": {},
    "rwkv": {},
    "openai-gpt": {},
}


def tiny(family: str) -> Any:
    changes = FAMILIES.get(family) or REFUSED.get(family) or {}
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **_COMMON | changes))
    assert sum(values.numel() for values in model.parameters()) < 200_000
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batches_are_read_and_completed_as_texts_alone(family: str) -> None:
    model = tiny(family)
    check_batches(model, "rl@1")
    assert len(locate_layers(model)) == N_LAYERS
    ids, mask, positions = left_pad(TEXTS, 0, "cpu")
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    hidden = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    together = read_residuals(model, range(N_LAYERS), **inputs)
    for layer in range(N_LAYERS):
        read = read_residual(model, layer, **inputs)
        assert torch.equal(read, together[layer])  # no later block writes into an earlier one's output
        if layer < N_LAYERS - 1:  # the final norm is applied to the last entry
            assert torch.equal(read[mask.bool()], hidden[layer + 1][mask.bool()])
        for row, text in enumerate(TEXTS):
            alone = read_residual(model, layer, *left_pad([text], 0, "cpu"))[0]
            error = (read[row, -len(text) :] - alone).abs().max() / alone.abs().max()
            assert error < 2e-5, f"layer {layer}"
    chosen = mask.bool() & (ids % 3 == 0)
    logits = model(**inputs, use_cache=False).logits[chosen]
    torch.testing.assert_close(logits_at(model, chosen, **inputs), logits, rtol=1e-4, atol=1e-5)
    tokenizer, limits = word_tokenizer(), [2, 7, 3, 6, 5]
    rows = generate(model, tokenizer, PROMPTS, max_new_tokens=limits, greedy=True, batch_size=2)
    assert [row.token_ids for row in rows] == [
        completed(model, tokenizer(prompt)["input_ids"], limit, ends={1})
        for prompt, limit in zip(PROMPTS, limits, strict=True)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_go_on_after_a_block_as_if_it_had_run(family: str) -> None:
    model = tiny(family)
    ids, mask, positions = left_pad(TEXTS, 0, "cpu")
    batches = [{"input_ids": ids[i:], "attention_mask": mask[i:], "position_ids": positions[i:]} for i in (0, 1)]
    with record_block(model, 1) as recorded:
        whole = [model(**batch, use_cache=False).logits for batch in batches]
    computed, blocks = Counter[int](), locate_layers(model)
    for number, block in enumerate(blocks):
        for part in block.children():
            part.register_forward_pre_hook(lambda *_, number=number: computed.update([number]))
    with resume_after(model, recorded), capture_residual(model, 1) as seen:
        resumed = [model(**batch, use_cache=False).logits for batch in batches]
    assert all(map(torch.equal, resumed, whole))
    assert set(computed) == {2}
    assert torch.equal(seen.value, block_output(recorded.outputs[1])), "hooks on the block see what it returned"
    assert torch.equal(model(**batches[0], use_cache=False).logits, whole[0])
    assert set(computed) == {0, 1, 2}


@pytest.mark.parametrize("family", REFUSED)
def test_models_without_a_cache_are_refused_in_a_sentence(family: str) -> None:
    with pytest.raises(ModelError, match=r"rl@1: \w+ returns no key-value cache .*leave this one out"):
        check_batches(tiny(family), "rl@1")


def test_a_model_that_takes_pads_for_text_is_refused() -> None:
    model = tiny("llama")
    forward = model.forward
    model.forward = lambda attention_mask, **inputs: forward(attention_mask=torch.ones_like(attention_mask), **inputs)
    with pytest.raises(ModelError, match=r"rl@1: LlamaForCausalLM reads a text behind pads otherwise .*differ by \d+%"):
        check_batches(model, "rl@1")


def test_logits_that_are_nan_are_refused_with_the_type() -> None:
    model = tiny("llama").to(torch.float16)
    model.model.layers[1].mlp.down_proj.weight.fill_(6e4)  # finite, but sums of such are not
    with pytest.raises(ModelError, match=r"rl@1: its logits are NaN in torch\.float16; .*bfloat16 or float32"):
        check_batches(model, "rl@1")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma2", "falcon_h1"])
def test_rounding_in_half_types_is_not_taken_for_pads(family: str) -> None:
    check_batches(tiny(family).to(torch.bfloat16), "rl@1")
