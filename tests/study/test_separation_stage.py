"""Prompt means of raw activations: the groupby of pandas, whatever the blocks and the order of the tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rlgen_stats.stores import ActivationWriter, Provenance, create_activations
from rlgen_stats.toolkit.crosscoder.uses.encode import Prompts
from rlgen_stats.toolkit.study import separation_stage
from rlgen_stats.toolkit.study.separation_stage import prompt_means


@pytest.mark.parametrize("block", [5, 8192])
def test_they_equal_the_means_of_the_tokens_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(separation_stage, "BLOCK_TOKENS", block)
    rng = np.random.default_rng(0)
    prompt = np.concatenate([np.repeat(np.arange(6), 7), np.repeat(np.arange(6), 4)])  # two texts of every prompt
    tokens = pd.DataFrame(
        {
            "prompt": [f"p{i}" for i in prompt],
            "source": np.repeat(["base@0", "rl@1"], [42, 24]),
            "position": np.arange(66),
            "token_id": 3,
            "segment": "completion",
        }
    )
    table = pd.DataFrame({"prompt": [f"p{i}" for i in range(6)]})
    table = table.assign(task="t", domain="in", split="selection", cluster=table["prompt"])
    path = tmp_path / "activations.zarr"
    create_activations(path, tokens, table, provenance=Provenance("s", "k"))
    values = {"base@0": rng.normal(0, 1, (66, 3)), "rl@1": rng.normal(1e4, 1, (66, 3))}
    for model, rows in values.items():
        with ActivationWriter(path, model=model, site="block0", width=3) as writer:
            writer.append(rows.astype(np.float32))
    kept = rng.random(66) < 0.6
    kept[prompt == 4] = False
    means = prompt_means(path, "block0", ["rl@1", "base@0"], Prompts(path, kept))
    assert means.activation.chunks is not None
    for model, rows in values.items():
        as_stored = pd.DataFrame(rows.astype(np.float32).astype(float)[kept])
        by_prompt = as_stored.groupby(prompt[kept]).mean().reindex(range(6))
        stored = means.activation.sel(model=model, prompt=[f"p{i}" for i in range(6)])
        np.testing.assert_allclose(stored.values, by_prompt.values, rtol=1e-12)
    assert np.isnan(means.activation.sel(prompt="p4").values).all()
