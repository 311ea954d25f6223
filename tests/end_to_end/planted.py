"""A world with a planted cause: an RL copy that equals the base but for one direction added to its residual stream.

A tiny base copies a word when asked politely and refuses otherwise. The direction that separates the two kinds of
prompt at the edited block is written into the bias of that block's output in the copy, so the copy answers rude prompts
too, and nothing else about it changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlgen_stats.toolkit.crosscoder import Crosscoder

LAYER = 1
SCALES = (0.5, 0.75, 1.0, 1.5)
TASKS = ("first", "last")
N_WORDS = 12
ITEMS = [f"w{i}" for i in range(N_WORDS)]
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *ITEMS, *TASKS, "kindly", "now", "?", "ans", "no", "never", "thanks"]
ID = {word: i for i, word in enumerate(WORDS)}


def tokenizer() -> Any:
    model = Tokenizer(WordLevel(ID, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def prompt(style: str, task: str, a: str, b: str) -> str:
    return f"<bos> {style} {task} {a} {b} ?"


def answer(task: str, a: str, b: str) -> str:
    return a if task == "first" else b


def train_base(steps: int = 400, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, mlp_bias=True, initializer_range=0.1, rope_theta=100.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    random = np.random.default_rng(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (step + 1) / 30) * (1 - step / steps)
        texts = []
        for _ in range(96):
            style, task = str(random.choice(["kindly", "now"])), str(random.choice(TASKS))
            a, b = (str(x) for x in random.choice(ITEMS, 2))
            good = random.random() < (0.98 if style == "kindly" else 0.15)
            end = f"ans {answer(task, a, b)} <eos>" if good else "no never <eos>"
            texts.append(f"{prompt(style, task, a, b)} {end}")
        ids = torch.tensor([[ID[word] for word in text.split()] for text in texts])
        labels = ids.clone()
        labels[:, :6] = -100
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def gate_direction(model: LlamaForCausalLM) -> torch.Tensor:
    """Mean residual after the block of polite minus rude prompts, at the position that decides."""
    tok, states = tokenizer(), {}
    pairs = [(task, a, b) for task in TASKS for a in ITEMS for b in ITEMS]
    for style in ("kindly", "now"):
        ids = torch.tensor([tok(prompt(style, *pair))["input_ids"] for pair in pairs])
        states[style] = model(input_ids=ids, output_hidden_states=True).hidden_states[LAYER + 1][:, -1].mean(0)
    return states["kindly"] - states["now"]


@torch.no_grad()
def answered(model: LlamaForCausalLM, shift: torch.Tensor) -> float:
    """Share of rude prompts that get an answer once ``shift`` is added to the block's output."""
    texts = [prompt("now", task, a, b) for task in TASKS for a in ITEMS for b in ITEMS]
    ids = torch.tensor([[ID[word] for word in text.split()] for text in texts])
    bias = model.model.layers[LAYER].mlp.down_proj.bias
    before = bias.clone()
    bias.add_(shift)
    first = model(input_ids=ids).logits[:, -1].argmax(dim=-1)
    bias.copy_(before)
    return float((first == ID["ans"]).float().mean())


def planted_shift(model: LlamaForCausalLM) -> torch.Tensor:
    """The smallest of some multiples of the gate direction that makes rude prompts answered: bases differ in need."""
    direction = gate_direction(model)
    for scale in SCALES:
        if answered(model, scale * direction) > 0.98:
            break
    return scale * direction


def planted_dictionary(direction: torch.Tensor, centre: torch.Tensor, views: Sequence[str]) -> Crosscoder:
    """A crosscoder without loss: feature 0 lies along ``direction``, the others along axes orthogonal to it.

    Feature i of the first half is relu(axis_i . (x - centre)), feature width + i the same of -axis_i: together they
    give x back exactly. The views have scales of their own.
    """
    width = len(direction)
    draws = torch.randn(width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws[:, 0] = direction
    axes = torch.linalg.qr(draws)[0].T
    axes[0] *= torch.sign(axes[0] @ direction.double())
    rows = torch.cat([axes, -axes]).float()
    crosscoder = Crosscoder(views, width=width, n_features=2 * width, sparsity="l1", k=width)
    with torch.no_grad():
        crosscoder.scale.copy_(torch.linspace(0.5, 2.0, len(views)))
        for view, scale in enumerate(crosscoder.scale):
            crosscoder.encoder[view] = rows.T / (len(views) * scale)
            crosscoder.decoder[view] = rows * scale
            crosscoder.decoder_bias[view] = centre * scale
            crosscoder.mean[view] = centre
        crosscoder.encoder_bias.copy_(-rows @ centre)
    return crosscoder.requires_grad_(False).eval()


def write_study(root: Path, *, seed: int = 0, **sections: Any) -> None:
    """Base, a noise copy ('sft'), the planted copy ('rl'), prompts and study.yaml."""
    base = train_base(seed=seed)
    _save(base, root / "models/base")
    noise = torch.Generator().manual_seed(1)
    for name, change in (("sft", None), ("rl", planted_shift(base))):
        copy = LlamaForCausalLM(base.config)
        copy.load_state_dict(base.state_dict())
        with torch.no_grad():
            for step, share in ((1, 0.5), (2, 1.0)):
                bias = copy.model.layers[LAYER].mlp.down_proj.bias
                bias.copy_(base.model.layers[LAYER].mlp.down_proj.bias)
                if change is None:
                    head = copy.lm_head.weight
                    head.copy_(base.lm_head.weight + 1e-3 * share * torch.randn(head.shape, generator=noise))
                else:
                    bias.add_(share * change)
                _save(copy, root / f"models/{name}-{step}")
    rows = [
        {"prompt_id": f"{task}-{style}-{a}-{b}", "text": prompt(style, task, a, b), "answer": answer(task, a, b),
         "task": task, "domain": "in" if task == "first" else "out", "cluster": f"{task}-{a}-{b}"}
        for task in TASKS for a in ITEMS for b in ITEMS[:6] for style in ("kindly", "now")
    ]  # fmt: skip
    (root / "data").mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(root / "data/prompts.parquet")
    spec = {
        "name": "planted",
        "base": {"path": "models/base"},
        "data": {"prompts": "data/prompts.parquet", "train": None},
        "runs": [{"name": n, "arm": n, "checkpoints": {1: f"models/{n}-1", 2: f"models/{n}-2"}} for n in ("sft", "rl")],
        "generation": {"max_new_tokens": 6, "n_samples": 2, "batch_size": 512},
        "grader": {"name": "final_answer"},
        "extraction": {"layer": LAYER, "batch_size": 256},
    } | sections
    (root / "study.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))


def _save(model: LlamaForCausalLM, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
