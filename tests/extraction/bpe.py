"""Real BPE tokenizers with chat templates, trained on a few lines, and tiny models of their vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CORPUS = (
    "What is 2 + 3? The answer is 5.",
    "Which gas do plants take in? Carbon dioxide.",
    "user assistant system You are a helpful assistant.",
    "so the sum of 12 and 30 is 42, ans 42",
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
"""Like Qwen3's."""
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + "
    "m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
"""Like Llama 3's."""


def bpe(special: tuple[str, ...], *, bos: str | None = None, **how: Any) -> Any:
    """Byte-level BPE; with ``bos`` it puts that token before every text, as Llama's."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=list(special))
    raw.train_from_iterator(CORPUS * 4, trainer)
    if bos is not None:
        pair = (bos, raw.token_to_id(bos))
        raw.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[pair])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, padding_side="left", **how)


def chatml_tokenizer(eos: str = "<|endoftext|>") -> Any:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return bpe(special, eos_token=eos, pad_token="<|endoftext|>", chat_template=CHATML)


def llama_tokenizer(eos: str = "<|end_of_text|>") -> Any:
    special = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return bpe(special, bos="<|begin_of_text|>", eos_token=eos, chat_template=HEADERS)


def bpe_model(tokenizer: Any, seed: int = 0, n_rows: int | None = None) -> Any:
    common = {"vocab_size": n_rows or len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
    common |= {"max_position_embeddings": 256, "initializer_range": 0.4, "pad_token_id": None}
    common |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(seed)
    llama = tokenizer.bos_token is not None
    model: Any = LlamaForCausalLM(LlamaConfig(**common)) if llama else Qwen3ForCausalLM(Qwen3Config(**common))
    return model.eval().requires_grad_(False)


def save_bpe(path: Path, tokenizer: Any, seed: int = 0, n_rows: int | None = None) -> Path:
    bpe_model(tokenizer, seed, n_rows).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
