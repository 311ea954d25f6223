"""Planted dictionaries and a tiny study with stored activations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rlgen_stats.schemas.study import CrosscoderSpec, StudySpec
from rlgen_stats.stores import ActivationWriter, Provenance, StudyFolder, create_activations
from rlgen_stats.toolkit.crosscoder import Crosscoder
from rlgen_stats.toolkit.extraction import REPEAT_MODEL, list_models, load_model, site_name
from rlgen_stats.toolkit.extraction.activations import read_texts

PAIR = ("base@0", "sft@9")
SHARED, BASE_ONLY, SFT_ONLY = range(12), range(12, 18), range(18, 24)


@dataclass(frozen=True)
class Planted:
    """Activations whose features are known."""

    data: NDArray[np.float32]
    """[token, view, channel]."""
    code: NDArray[np.float32]
    """[token, feature]."""
    decoder: NDArray[np.float64]
    """[view, feature, channel]; zero rows where a view lacks the feature."""


def planted(n_tokens: int = 8192, *, seed: int = 0, width: int = 24, soft: bool = False) -> Planted:
    random = np.random.default_rng(seed)
    world = np.random.default_rng(99)
    shared = np.linalg.qr(world.normal(size=(width, width)))[0]
    turned = shared + 0.1 * world.normal(size=shared.shape)
    decoder = np.stack([shared, turned / np.linalg.norm(turned, axis=1, keepdims=True)])[:, :24]
    decoder[1, list(BASE_ONLY)] = 0
    decoder[0, list(SFT_ONLY)] = 0
    fires = random.random((n_tokens, 24)) < (0.25 if soft else 0.08)
    size = random.exponential(size=fires.shape) if soft else random.uniform(1.0, 2.0, fires.shape)
    code = np.where(fires, size, 0.0)
    noise = 0.02 * random.normal(size=(n_tokens, 2, width))
    offset = world.normal(size=(2, width))
    gain = np.array([1.0, 3.0])[:, None]  # the second model lives on another scale
    data = gain * (np.einsum("tk,vkc->tvc", code, decoder) + 0.3 * offset + noise)
    return Planted(data.astype(np.float32), code.astype(np.float32), decoder)


def crosscoder_spec(**changes: Any) -> CrosscoderSpec:
    content: dict[str, Any] = {
        "name": "pair",
        "views": PAIR,
        "sparsity": "batchtopk",
        "n_features": 48,
        "k": 2,
        "steps": 600,
        "batch_size": 512,
        "learning_rate": 5e-3,
        "l1_coefficient": 0.3,
    }
    return CrosscoderSpec.model_validate(content | changes)


# -- a study on disk --------------------------------------------------------------------------------------------------

WORDS = ("<pad>", "<eos>", "<unk>", "ans", "plus", "what", "is", "so", *(str(i) for i in range(12)))
PROVENANCE = Provenance("tiny-study", "tiny-key")
LAYER = 0


def save_model(path: Path, seed: int, shift: float = 0.0, *, width: int = 16) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=24,
        max_position_embeddings=64,
        initializer_range=0.4,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += shift * torch.randn(parameter.shape, generator=random)
    model.save_pretrained(path)


def save_tokenizer(path: Path) -> None:
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(path)


def study_spec(**changes: Any) -> StudySpec:
    main = {
        "name": "main",
        "views": ["base@0", "sft@final", "rl@final"],
        "n_features": 48,
        "k": 6,
        "steps": 300,
        "batch_size": 128,
        "learning_rate": 5e-3,
    }
    null = main | {"name": "null", "views": ["base@0", "base@repeat"], "sparsity": "l1", "l1_coefficient": 0.2}
    content: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "device": "cpu",
        "base": {"path": "own/base"},
        "runs": [
            {"name": run, "arm": run, "method": "checkpoints", "checkpoints": {s: f"own/{run}-{s}" for s in (2, 4)}}
            for run in ("sft", "rl")
        ],
        "extraction": {"layer": LAYER},
        "crosscoders": [main, null],
    }
    return StudySpec.model_validate(content | changes)


def token_tables(n_prompts: int = 30, *, seed: int = 5) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Texts of three sources over the same prompts, lengths varying."""
    random = np.random.default_rng(seed)
    names = [f"p{i}" for i in range(n_prompts)]
    rows = []
    for source in ("base@0", "sft@4", "rl@4"):
        for name in names:
            n_prompt, n_completion = int(random.integers(3, 7)), int(random.integers(2, 9))
            for position in range(n_prompt + n_completion):
                segment = "prompt" if position < n_prompt else "completion"
                rows.append((name, source, position, int(random.integers(2, len(WORDS))), segment))
    tokens = pd.DataFrame(rows, columns=["prompt", "source", "position", "token_id", "segment"])
    prompts = pd.DataFrame({"prompt": names})
    prompts["task"] = ["sum" if i % 2 else "other" for i in range(n_prompts)]
    prompts["domain"] = ["in" if i % 2 else "out" for i in range(n_prompts)]
    prompts["split"] = ["selection" if i % 3 else "verification" for i in range(n_prompts)]
    prompts["cluster"] = [f"c{i // 2}" for i in range(n_prompts)]
    return tokens, prompts


def build_study(root: Path) -> tuple[StudySpec, StudyFolder]:
    """Five tiny models and their activations of the same texts; no crosscoder yet."""
    spec, folder = study_spec(), StudyFolder(root)
    save_model(root / "own/base", 0)
    for seed, name in enumerate(("sft-2", "sft-4", "rl-2", "rl-4"), start=1):
        save_model(root / "own" / name, seed, shift=0.02 * int(name[-1]))
    save_tokenizer(root / "own/base")
    tokens, prompts = token_tables()
    create_activations(folder.activations, tokens, prompts, provenance=PROVENANCE)
    texts = [group["token_id"].tolist() for _, group in tokens.groupby(["source", "prompt"], sort=False)]
    for ref in list_models(spec, folder):
        model = load_model(ref)
        labels = [ref.model, REPEAT_MODEL] if ref.model == "base@0" else [ref.model]
        values = np.concatenate([read_texts(model, [text], LAYER, 0)[0] for text in texts])
        for label in labels:
            with ActivationWriter(folder.activations, model=label, site=site_name(LAYER), width=16) as writer:
                writer.append(values)
    return spec, folder


def slow_contribution(crosscoder: Crosscoder, raw: np.ndarray) -> np.ndarray:
    """x_k = f_k ||d_k|| of one token under the swap readout, in float64."""
    encoder, decoder = crosscoder.encoder.double().numpy(), crosscoder.decoder.double().numpy()
    scale = crosscoder.scale.double().numpy()
    pre = crosscoder.encoder_bias.double().numpy() + sum((raw * s) @ w for s, w in zip(scale, encoder, strict=True))
    norms = np.sqrt((decoder**2).sum(axis=-1))
    kept = np.where(pre * norms.sum(axis=0) > float(crosscoder.threshold), pre, 0.0)
    return np.asarray(kept * np.sqrt((norms**2).sum(axis=0)))
