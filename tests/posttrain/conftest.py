"""A one-layer base that answers each of four questions right half of the time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rlgen_stats.schemas.study import BaseSpec, CrosscoderSpec, RunSpec, StudySpec
from rlgen_stats.stores import StudyFolder

WORDS = ("<pad>", "<eos>", "<unk>", "q", ":", "ans", "so", "0", "1", "2", "3")
QUESTIONS = tuple(f"q {number} :" for number in range(4))
SFT = {"max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "gradient_checkpointing": False}
GRPO = {
    "max_steps": 6,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 4,
    "beta": 0.0,
    "gradient_checkpointing": False,
    "logging_steps": 1,
}


def tokenizer() -> Any:
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base that answers ``q N :`` with ``ans N`` or ``ans 0``, a coin flip each."""
    words = tokenizer()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=32,
            initializer_range=0.2,
            max_position_embeddings=32,
            eos_token_id=1,
            bos_token_id=None,
            pad_token_id=0,
        )
    )
    texts = [f"{text} ans {word}<eos>" for number, text in enumerate(QUESTIONS) for word in (str(number), "0")]
    ids = torch.tensor(words(texts)["input_ids"])
    labels = ids.clone()
    labels[:, :3] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(60):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("models") / "base"
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def train_table() -> pd.DataFrame:
    rows = [(text, str(number), f" so ans {number}") for number, text in enumerate(QUESTIONS)]
    return pd.DataFrame(rows * 4, columns=["text", "answer", "completion"])


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    (tmp_path / "data").mkdir()
    train_table().to_parquet(tmp_path / "data" / "train.parquet")
    return StudyFolder(tmp_path)


@pytest.fixture
def make_spec(base_folder: Path) -> Callable[..., StudySpec]:
    """Spec with one SFT and one GRPO run; keyword arguments change single runs' fields."""

    def make(*, n_checkpoints: int = 3, seed: int = 0, **trainers: dict[str, Any]) -> StudySpec:
        runs = (
            RunSpec(
                name="sft",
                arm="sft",
                method="sft",
                n_checkpoints=n_checkpoints,
                trainer={**SFT, **trainers.get("sft", {})},
            ),
            RunSpec(
                name="rl",
                arm="rl",
                method="grpo",
                n_checkpoints=n_checkpoints,
                trainer={**GRPO, **trainers.get("rl", {})},
            ),
        )
        return StudySpec(
            name="test",
            seed=seed,
            device="cpu",
            base=BaseSpec(path=str(base_folder)),
            runs=runs,
            crosscoders=(CrosscoderSpec(name="main", views=("base@0", "sft@final", "rl@final")),),
        )

    return make
