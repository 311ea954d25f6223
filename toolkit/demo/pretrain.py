"""Pretraining of the embedded study's base: a tiny Qwen3 on questions about the synthetic world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from rlgen_stats.schemas.errors import StoreError
from rlgen_stats.schemas.seeds import content_hash, derive_seed
from rlgen_stats.stores import replacing, write_json
from rlgen_stats.stores.atomic import read_object
from rlgen_stats.toolkit.demo.world import World, pretraining_documents, vocabulary
from rlgen_stats.toolkit.memory import keep_freed_memory
from rlgen_stats.toolkit.progress import SILENT, Progress

PAD, END, UNKNOWN = "<pad>", "<eos>", "<unk>"
IGNORED: Final = -100
"""Label that the loss skips."""
RECORD: Final = "pretraining.json"
"""File beside the weights: the settings and the seed of the world that made them."""
_VERSION: Final = 4
"""Raised when a change here or in the world changes the weights."""


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """Size and training of the base."""

    hidden_size: int = 64
    n_layers: int = 4
    n_heads: int = 4
    feed_forward: int = 256
    steps: int = 420
    batch_size: int = 256
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    n_eval_pairs: int = 210


def make_tokenizer() -> Any:
    """Word-level tokenizer of the world: one token a word, split at white space, nothing added to a text.

    Returns
    -------
    transformers.PreTrainedTokenizerFast
    """
    words = (PAD, END, UNKNOWN, *vocabulary())
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: Any, settings: BaseSettings, seed: int) -> Any:
    """A Qwen3 language model with random weights drawn from ``seed``; the global generator is left as it was."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.n_layers,
        num_attention_heads=settings.n_heads,
        num_key_value_heads=settings.n_heads,
        head_dim=settings.hidden_size // settings.n_heads,
        intermediate_size=settings.feed_forward,
        tie_word_embeddings=False,
        initializer_range=0.08,  # the default .02 leaves so narrow a model without signal for its first hundred steps
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # texts have some twenty tokens
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def pretrain_base(path: Path, world: World, settings: BaseSettings, *, progress: Progress = SILENT) -> None:
    """Pretrain the base into ``path`` unless it is there already.

    The folder appears whole or not at all; an interrupted pretraining leaves nothing and starts again. On a CPU the
    same seed, settings and number of threads give the same bytes.

    Parameters
    ----------
    path
        Folder of the checkpoint.
    world
        Facts, splits and seed.
    settings
        Size and training.
    progress
        Receiver of progress.

    Raises
    ------
    StoreError
        If the folder holds another model; it is left untouched.
    """
    if check_base(path, world, settings):
        return
    keep_freed_memory()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, settings, derive_seed(world.seed, "demo", "initial weights"))
    _fit(model, tokenizer, world, settings, progress)
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # one shard of one megabyte needs none
    try:
        with replacing(path) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            write_json(temporary / RECORD, _made_by(world, settings))
    finally:
        if bar:
            transformers_logging.enable_progress_bar()


def check_base(path: Path, world: World, settings: BaseSettings) -> bool:
    """Whether ``path`` already holds this base.

    Raises
    ------
    StoreError
        If it holds another model.
    """
    if not path.exists():
        return False
    record = read_object(path / RECORD) if (path / RECORD).exists() else None
    if record != _made_by(world, settings):
        other = "a model the demo did not make"
        if record is not None:
            other = f"the base of another demo (seed {record.get('seed')})"
        raise StoreError(
            f"{path} holds {other}, expected that of seed {world.seed} at this size; it is left untouched: "
            "use another folder, or remove that one to start again."
        )
    return True


def _made_by(world: World, settings: BaseSettings) -> dict[str, Any]:
    return {"version": _VERSION, "seed": world.seed, "settings": asdict(settings)}


def _fit(model: Any, tokenizer: Any, world: World, settings: BaseSettings, progress: Progress) -> None:
    rng = np.random.default_rng(derive_seed(world.seed, "demo", "pretraining", content_hash(asdict(settings))))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=0.01, betas=(0.9, 0.98), fused=True
    )
    warmup = max(1, min(settings.warmup_steps, settings.steps // 4))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (settings.steps - step) / (settings.steps - warmup))
    )
    model.train()
    with progress.task("pretrain base", total=settings.steps, unit="steps") as task:
        for _ in range(settings.steps):
            documents = pretraining_documents(world, settings.batch_size, rng)
            ids, labels = encode_documents(tokenizer, documents)
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            task.advance(1, loss=round(float(loss.detach()), 3))
    model.eval()


def encode_documents(tokenizer: Any, documents: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of (question, completion) documents, padded on the right.

    Right padding needs no attention mask in a causal model: no token looks at what comes after it.

    Returns
    -------
    tuple of Tensor
        Ids and labels [document, position]; labels are IGNORED on the question and the padding.
    """
    vocabulary_ids = tokenizer.get_vocab()
    rows = [
        ([vocabulary_ids[w] for w in text.split()], [vocabulary_ids[w] for w in completion.split()])
        for text, completion in documents
    ]
    width = max(len(text) + len(completion) + 1 for text, completion in rows)
    ids = np.full((len(rows), width), tokenizer.pad_token_id)
    labels = np.full((len(rows), width), IGNORED)
    for row, (text, completion) in enumerate(rows):
        written = [*completion, tokenizer.eos_token_id]
        ids[row, : len(text) + len(written)] = [*text, *written]
        labels[row, len(text) : len(text) + len(written)] = written
    return torch.from_numpy(ids), torch.from_numpy(labels)
