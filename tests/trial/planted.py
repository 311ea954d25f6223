"""A study whose causes are known: models in which one residual direction decides whether a question is answered.

Blocks are the identity, so a completion depends on the last token alone. Channels of a question's embedding: which
answer (10), which answer of the control task (10), the gate (1 in base, 2 in the RL model), a brake on the end token,
a large constant that keeps the final norm's scale, and spare ones that nothing reads. The model answers "=7" when the
gate is high and says "um" when it is low; without the brake it ends at once. Control questions ignore the gate.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import ActivationWriter, Provenance, StudyFolder, append_model, create_activations
from rlgen_stats.toolkit.crosscoder import Crosscoder

WIDTH, LAYER = 36, 0
ANSWER, OTHER = slice(0, 10), slice(10, 20)
GATE, BRAKE, CONSTANT, ENDING, QUESTION = 20, 21, 22, 23, 24
N_SPARE = 8
SPARE = slice(25, 25 + N_SPARE)
WORD = 33
FAINT = 0.05  # of a question's level, in the words before it
CONSTANT_VALUE = 20.0

F_GATE, F_BRAKE = 0, 1
GROUPS = [group for size in (2, 3) for group in itertools.combinations(range(N_SPARE), size)]
N_DECOYS = len(GROUPS)
F_DECOY = 2
N_FEATURES = 2 + N_DECOYS
VIEWS = ("base@0", "sft@1", "rl@1")
LEVEL = {"base@0": 1.0, "sft@1": 1.0, "rl@1": 2.0}

WORDS = [
    *("<pad>", "<eos>", "um"),
    *(f"w{i}" for i in range(10)),
    *(f"q{i}" for i in range(10)),
    *(f"c{i}" for i in range(10)),
    *(f"={i}" for i in range(10)),
]
ID = {word: i for i, word in enumerate(WORDS)}
N_PROMPTS = {"math": 30, "algebra": 60, "logic": 60, "weather": 80}


def planted_model(gate: float, *, spare_weight: float = 0.0) -> Any:
    """``spare_weight``: how much an answer needs each spare channel of a question to be as large as it is."""
    config = Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        eos_token_id=ID["<eos>"],
        pad_token_id=ID["<pad>"],
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).float().eval().requires_grad_(False)
    for block in model.model.layers:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    table = model.model.embed_tokens.weight
    table.zero_()
    table[:, CONSTANT] = CONSTANT_VALUE
    spare = torch.linspace(0.6, 2.0, N_SPARE).repeat(10, 1)
    for i in range(10):
        for kind, where in (("q", ANSWER), ("c", OTHER)):
            row = table[ID[f"{kind}{i}"]]
            row[where.start + i] = 1.0
            row[GATE], row[BRAKE], row[SPARE] = gate, 1.5, spare[i]
        word = table[ID[f"w{i}"]]
        word[GATE], word[BRAKE], word[SPARE], word[WORD] = FAINT * gate, FAINT * 1.5, FAINT * spare[i], 1.0
        table[ID[f"q{i}"], QUESTION] = 1.0
        table[ID[f"c{i}"], OTHER.start + (i + 1) % 10] = 0.9  # so that control answers are right 7 times in 10
        table[ID[f"={i}"], ENDING] = 1.0
    table[ID["um"], ENDING] = 1.0
    head = model.lm_head.weight
    head.zero_()
    for i in range(10):
        head[ID[f"={i}"], ANSWER.start + i] = head[ID[f"={i}"], OTHER.start + i] = 10.0
        head[ID[f"={i}"], GATE] = 4.0
        head[ID[f"={i}"], SPARE] = spare_weight
        head[ID[f"={i}"], CONSTANT] = -spare_weight * float(spare[0].sum()) / CONSTANT_VALUE
    head[ID["um"], QUESTION] = 16.0
    head[ID["<eos>"], ENDING], head[ID["<eos>"], BRAKE] = 20.0, -40.0 / 1.5
    head[ID["<eos>"], CONSTANT], head[ID["<eos>"], WORD] = 30.0 / CONSTANT_VALUE, -40.0
    head *= float(torch.tensor(CONSTANT_VALUE**2 / WIDTH).sqrt())  # undo the final norm
    return model


def planted_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel(ID, unk_token="um"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def planted_crosscoder() -> Crosscoder:
    """One feature for the gate, one for the brake, decoys along groups of spare channels; unequal scales."""
    directions = torch.zeros(N_FEATURES, WIDTH)
    directions[F_GATE, GATE] = directions[F_BRAKE, BRAKE] = 1.0
    for k, group in enumerate(GROUPS):
        for channel in group:
            directions[F_DECOY + k, SPARE.start + channel] = len(group) ** -0.5
    crosscoder = Crosscoder(VIEWS, width=WIDTH, n_features=N_FEATURES, sparsity="l1", k=4, name="main")
    with torch.no_grad():
        crosscoder.scale.copy_(torch.tensor([0.5, 1.0, 2.0]))
        feature_scale = torch.cat([torch.ones(2), torch.linspace(0.8, 1.25, N_DECOYS)])
        for v, scale in enumerate(crosscoder.scale):
            crosscoder.encoder[v] = directions.T / (3 * scale) / feature_scale
            crosscoder.decoder[v] = directions * scale * feature_scale[:, None]
        crosscoder.decoder[0, F_BRAKE] /= 2  # a view of its own, so that editing through another view shows
        crosscoder.encoder_bias.zero_()
        crosscoder.decoder_bias.zero_()
    return crosscoder.requires_grad_(False).eval()


def prompt_table() -> pd.DataFrame:
    """Trial prompts of every task, and as many again of one task for measuring levels."""
    draw = np.random.default_rng(5)
    rows = []
    for task, split, n in (*((task, "trial", n) for task, n in N_PROMPTS.items()), ("math", "selection", 30)):
        for i in range(n):
            digit = int(draw.integers(10))
            filler = " ".join(f"w{j}" for j in draw.integers(0, 10, draw.integers(2, 5)))
            rows.append(
                {
                    "prompt_id": f"{task}-{split}-{i}",
                    "text": f"{filler} {'c' if task == 'weather' else 'q'}{digit}",
                    "answer": str(digit),
                    "task": task,
                    "domain": "in" if task == "math" else "out",
                    "split": split,
                    "cluster": f"{task}-{split}-{i}",
                }
            )
    return pd.DataFrame(rows)


def planted_study(root: Path, **intervention: Any) -> tuple[StudySpec, StudyFolder]:
    folder = StudyFolder(root)
    for name in ("base", "sft", "rl"):
        planted_model(2.0 if name == "rl" else 1.0).save_pretrained(root / "hf" / name)
        planted_tokenizer().save_pretrained(root / "hf" / name)
    (root / "data").mkdir()
    prompt_table().to_parquet(root / "data" / "prompts.parquet")
    spec = StudySpec.model_validate(
        {
            "name": "planted",
            "device": "cpu",
            "base": {"path": "hf/base"},
            "runs": [
                {"name": "sft", "arm": "sft", "checkpoints": {1: "hf/sft"}},
                {"name": "rl", "arm": "rl", "checkpoints": {1: "hf/rl"}},
            ],
            "generation": {"max_new_tokens": 4, "batch_size": 256},
            "grader": {"marker": "="},
            "extraction": {"layer": LAYER},
            "crosscoders": [
                {
                    "name": "main",
                    "views": ["base@0", "sft@final", "rl@final"],
                    "n_features": N_FEATURES,
                    "k": 4,
                    "replicates": 1,
                }
            ],
            "selection": {"control_tasks": ["weather"]},
            "intervention": {"n_controls": 19, "max_prompts": 230, "accept_undecidable": True, **intervention},
        }
    )
    crosscoder = planted_crosscoder()
    crosscoder.save(folder.crosscoder("main"))
    store_activations(folder)
    for view in ("base@0", "rl@1"):
        append_model(folder.features, "features", planted_summaries(crosscoder, view), provenance=PROVENANCE)
    return spec, folder


def store_activations(folder: StudyFolder) -> None:
    """The prompts' own tokens as read by base and by the RL model: blocks are the identity."""
    table = prompt_table()
    words = [text.split() for text in table["text"]]
    tokens = pd.DataFrame(
        {
            "prompt": np.repeat(table["prompt_id"].to_numpy(object), [len(text) for text in words]),
            "source": "base@0",
            "position": np.concatenate([np.arange(len(text)) for text in words]),
            "token_id": [ID[word] for text in words for word in text],
            "segment": "prompt",
        }
    )
    prompts = table.rename(columns={"prompt_id": "prompt"})[["prompt", "task", "domain", "split", "cluster"]]
    create_activations(folder.activations, tokens, prompts, provenance=PROVENANCE)
    for view in ("base@0", "rl@1"):
        residuals = planted_model(LEVEL[view]).model.embed_tokens.weight[tokens["token_id"].to_numpy(copy=True)]
        with ActivationWriter(folder.activations, model=view, site=f"block{LAYER}", width=WIDTH) as writer:
            writer.append(residuals.numpy())


PROVENANCE = Provenance("planted", "key-one")


def planted_summaries(crosscoder: Crosscoder, view: str) -> xr.Dataset:
    """What encoding would store for the prompts' own tokens."""
    table, embeddings = prompt_table(), planted_model(LEVEL[view]).model.embed_tokens.weight
    levels = [
        crosscoder.readout(embeddings[[ID[word] for word in text.split()]]) * crosscoder.contribution_norm()
        for text in table["text"]
    ]
    dims = ("model", "prompt", "feature")
    labels = {name: ("prompt", table[name].to_numpy(dtype=np.str_)) for name in ("task", "domain", "split", "cluster")}
    return xr.Dataset(
        {
            "mean": (dims, np.stack([f.mean(dim=0).numpy() for f in levels])[None]),
            "firing": (dims, np.stack([(f > 0).float().mean(dim=0).numpy() for f in levels])[None]),
            "max": (dims, np.stack([f.amax(dim=0).numpy() for f in levels])[None]),
            "n_tokens": (("model", "prompt"), np.array([[len(f) for f in levels]])),
            "fve": ("model", np.ones(1)),
            "decoder_norm": (("view", "feature"), crosscoder.decoder_norm().numpy()),
        },
        coords={
            "model": ("model", [view]),
            "run": ("model", [view.split("@")[0]]),
            "step": ("model", [int(view.split("@")[1])]),
            "arm": ("model", [view.split("@")[0]]),
            "prompt": ("prompt", table["prompt_id"].to_numpy(dtype=np.str_)),
            "view": ("view", list(VIEWS)),
            **labels,
        },
        attrs={"readout": "swap", "text_mode": "forced", "crosscoder": "main", "scale": "contribution"},
    )
