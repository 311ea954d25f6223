"""What an edit costs while a model writes, and what arms cost beside one another."""

from __future__ import annotations

import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks.common import Case, interleaved, options_with_device, spread
from benchmarks.crosscoder.data import synchronised
from benchmarks.reports import Goal, report
from rlgen_stats.toolkit.crosscoder import Crosscoder
from rlgen_stats.toolkit.extraction import read_residual
from rlgen_stats.toolkit.intervention import EditSite, FeatureEdit, editing

FEATURES: Final = 50
BATCH: Final = 32
PROMPT_TOKENS: Final = 64
NEW_TOKENS: Final = 64
LAYER: Final = 3
VIEW: Final = "rl@1"
UNEDITED: Final = "no edit"
GOAL: Final = 0.85


def model_of(*, quick: bool, device: torch.device) -> Any:
    """A Qwen3 of random weights that never stops by itself."""
    width = 64 if quick else 512
    config = Qwen3Config(
        vocab_size=8192,
        hidden_size=width,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=width // 8,
        intermediate_size=3 * width,
        max_position_embeddings=512,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model.to(device, kind).eval().requires_grad_(False)


def crosscoder_of(model: Any, ids: torch.Tensor, n_features: int) -> Crosscoder:
    """Random directions on which about one feature in a hundred fires, for this model's activations."""
    width = int(model.config.hidden_size)
    crosscoder = Crosscoder(("base@0", VIEW), width=width, n_features=n_features, sparsity="batchtopk", k=32, seed=1)
    raw = read_residual(model, LAYER, ids, torch.ones_like(ids), None).float().flatten(0, 1).cpu()
    crosscoder.scale.fill_(float(width**0.5 / raw.norm(dim=1).mean()))
    with torch.no_grad():
        x = crosscoder.normalise(crosscoder.join([raw, raw]))
        contribution = crosscoder.pre_activation(x) * crosscoder.selection_norm()
    crosscoder.threshold.fill_(float(contribution.flatten()[:1_000_000].quantile(0.99)))
    return crosscoder.requires_grad_(False)


def main() -> None:
    """Measure and report."""
    options, device = options_with_device(__doc__)
    model = model_of(quick=options.quick, device=device)
    ids = torch.randint(8, 8192, (BATCH, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1)).to(device)
    crosscoder = crosscoder_of(model, ids, 1024 if options.quick else 8192)
    site = EditSite(crosscoder, VIEW, LAYER)
    chosen = tuple(range(0, 8 * FEATURES, 8))
    edits = {
        UNEDITED: None,
        f"disable {FEATURES} features": FeatureEdit(chosen, "disable"),
        f"amplify {FEATURES} features": FeatureEdit(chosen, "amplify", 2.0),
        "add a vector": FeatureEdit((), "add_vector", vector=(0.1,) * int(model.config.hidden_size)),
        "whole dictionary through the code": FeatureEdit((), "passthrough"),
    }

    def writing(edit: FeatureEdit | None) -> Any:
        def run() -> None:
            with torch.inference_mode(), nullcontext() if edit is None else editing(model, edit, site):
                written = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
                )
            if written.shape[1] != PROMPT_TOKENS + NEW_TOKENS:
                raise SystemExit("the model stopped by itself; nothing is comparable.")

        return synchronised(run, device)

    measured = interleaved([Case(name, writing(edit)) for name, edit in edits.items()], options.repetitions)
    seconds = {name: spread(values) for name, values in measured.items()}
    tokens = BATCH * NEW_TOKENS
    rows = [
        {
            "what": name,
            "tokens/s": tokens / times["median"],
            "low": tokens / times["high"],
            "high": tokens / times["low"],
            "of unedited": seconds[UNEDITED]["median"] / times["median"],
        }
        for name, times in seconds.items()
    ]
    edited = [row for row in rows if str(row["what"]).endswith("features")]
    goals = [Goal(f"tokens/s of {row['what']}, of unedited", row["of unedited"], GOAL) for row in edited]
    with tempfile.TemporaryDirectory() as folder:
        report(
            options,
            Path(folder),
            "Writing under an edit",
            settings={
                "batch": BATCH,
                "prompt": PROMPT_TOKENS,
                "new tokens": NEW_TOKENS,
                "blocks": 8,
                "width": model.config.hidden_size,
                "features": crosscoder.n_features,
                "on": str(device),
            },
            rows=rows,
            goals=goals,
        )


if __name__ == "__main__":
    main()
