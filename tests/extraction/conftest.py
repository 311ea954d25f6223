"""Tiny random models with a word-level tokenizer, and a study on them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import Provenance, StudyFolder, write_json
from rlgen_stats.toolkit.extraction import sample_outcomes

PROVENANCE = Provenance("tiny-study", "tiny-key")
WORDS = ("<pad>", "<eos>", "<unk>", "ans", "plus", "what", "is", "so", *(str(i) for i in range(12)))
ARCHITECTURES = ("qwen3", "qwen2", "llama", "mistral", "gemma2", "gpt2", "gpt_neox")


def word_tokenizer(words: tuple[str, ...] = WORDS, eos: str = "<eos>") -> Any:
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token=eos, unk_token="<unk>")


def tiny_model(architecture: str = "qwen3", seed: int = 0, n_layers: int = 3, tied: bool = False) -> Any:
    """A random model with large enough weights that its completions vary."""
    common = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": n_layers, "num_attention_heads": 4}
    common |= {"intermediate_size": 48, "max_position_embeddings": 128, "initializer_range": 0.4}
    common |= {"tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    grouped = common | {"num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(seed)
    model: Any
    match architecture:
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**grouped))
        case "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**grouped))
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**grouped))
        case "mistral":  # window shorter than the texts: the mask is not the usual one
            model = MistralForCausalLM(MistralConfig(**grouped, sliding_window=4))
        case "gemma2":
            model = Gemma2ForCausalLM(Gemma2Config(**grouped, sliding_window=4))
        case "gpt2":
            model = GPT2LMHeadModel(GPT2Config(**common, n_inner=48))
        case "gpt_neox":
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**common))
    return model.eval().requires_grad_(False)


def save_model(path: Path, seed: int = 0, *, tokenizer: Any = None, **how: Any) -> Path:
    tiny_model(seed=seed, **how).save_pretrained(path)
    if tokenizer is not False:
        (tokenizer or word_tokenizer()).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return word_tokenizer()


@pytest.fixture(scope="session")
def model() -> Any:
    return tiny_model()


PROMPTS = tuple(f"what is {i % 10} plus {i // 3 % 10}" + " so" * (i % 4) for i in range(12))


def prompt_table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "prompt_id": [f"p{i}" for i in range(len(PROMPTS))],
            "text": PROMPTS,
            "answer": [str(i % 10) for i in range(len(PROMPTS))],
            "task": ["sum" if i % 2 else "other" for i in range(len(PROMPTS))],
            "domain": ["in" if i % 2 else "out" for i in range(len(PROMPTS))],
        }
    )


def study_spec(**changes: Any) -> StudySpec:
    content: dict[str, Any] = {
        "name": "tiny",
        "seed": 7,
        "device": "cpu",
        "base": {"path": "models/base"},
        "runs": [
            {"name": "sft", "arm": "sft", "method": "sft"},
            {"name": "rl", "arm": "rl", "method": "checkpoints", "checkpoints": {8: "own/rl-8", 4: "own/rl-4"}},
        ],
        "generation": {"max_new_tokens": 6, "n_samples": 2, "batch_size": 5},
        "extraction": {"layer": 1, "batch_size": 4},
        "crosscoders": [{"name": "main", "views": ["base@0", "sft@final", "rl@final"], "n_features": 64}],
    }
    return StudySpec.model_validate(content | changes)


@pytest.fixture
def provenance() -> Provenance:
    return PROVENANCE


@pytest.fixture(scope="session")
def fresh_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, one SFT run with checkpoints 3 and 6 'trained here', one RL run made elsewhere with 4 and 8."""
    root = tmp_path_factory.mktemp("fresh")
    folder = StudyFolder(root)
    save_model(root / "models/base", 0)
    for step, seed in ((3, 1), (6, 2)):
        save_model(folder.run("sft") / f"step-{step}", seed)
    write_json(folder.run("sft") / "posttrain.json", {"steps": [3, 6]})
    for step, seed in ((4, 3), (8, 4)):
        save_model(root / f"own/rl-{step}", seed)
    (root / "data").mkdir()
    prompt_table().to_parquet(root / "data/prompts.parquet")
    return root


@pytest.fixture(scope="session")
def sampled_study(fresh_study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sampled") / "study"
    shutil.copytree(fresh_study, root)
    sample_outcomes(study_spec(), StudyFolder(root), provenance=PROVENANCE)
    return root


@pytest.fixture
def study(fresh_study: Path, tmp_path: Path) -> tuple[StudySpec, StudyFolder]:
    """A study of its own for one test, nothing sampled yet."""
    return study_spec(), StudyFolder(Path(shutil.copytree(fresh_study, tmp_path / "study")))


@pytest.fixture
def sampled(sampled_study: Path, tmp_path: Path) -> tuple[StudySpec, StudyFolder]:
    """A study of its own for one test, outcomes sampled."""
    return study_spec(), StudyFolder(Path(shutil.copytree(sampled_study, tmp_path / "study")))
