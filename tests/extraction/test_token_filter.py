"""Attention sinks are left out everywhere, by one rule on base."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import ActivationWriter, Provenance, StudyFolder, create_activations, open_tokens
from rlgen_stats.toolkit.extraction import site_name, token_mask, usable_tokens
from tests.crosscoder.planted import study_spec

PROVENANCE = Provenance("s", "k")
LENGTH = 20


def study(
    root: Path, values: dict[str, np.ndarray], *, dtype: str = "float32", **extraction: object
) -> tuple[StudySpec, StudyFolder]:
    """Texts of 20 tokens, half of them prompt, with these activations."""
    folder, n = StudyFolder(root), len(values["base@0"])
    position = np.arange(n) % LENGTH
    tokens = pd.DataFrame(
        {
            "prompt": [f"p{i // LENGTH}" for i in range(n)],
            "source": "base@0",
            "position": position,
            "token_id": 3,
            "segment": np.where(position < LENGTH // 2, "prompt", "completion"),
        }
    )
    prompts = pd.DataFrame({"prompt": [f"p{i}" for i in range(n // LENGTH)]})
    prompts = prompts.assign(task="t", domain="in", split="selection", cluster=prompts["prompt"])
    create_activations(folder.activations, tokens, prompts, provenance=PROVENANCE)
    for model, rows in values.items():
        with ActivationWriter(
            folder.activations, model=model, site=site_name(0), width=rows.shape[1], dtype=dtype
        ) as writer:
            writer.append(rows.astype(np.float32))
    return study_spec(extraction={"layer": 0} | extraction), folder


def sinking(*, seed: int) -> np.ndarray:
    """Every first token and two others are huge; so are all the tokens' scales (raw units mean nothing)."""
    rows = np.random.default_rng(seed).normal(size=(20_000, 8)) * 300
    rows[::LENGTH] *= 500
    rows[[47, 333, 15_001]] *= 40
    return rows


def test_sinks_of_base_are_left_out_for_all(tmp_path: Path) -> None:
    other = np.random.default_rng(5).normal(size=(20_000, 8))
    other[100:200] *= 1000  # what another model finds large does not count
    spec, folder = study(tmp_path, {"base@0": sinking(seed=0), "rl@1": other})
    tokens = open_tokens(folder.activations)
    for purpose in ("train", "summary"):
        labelled = token_mask(tokens, spec.extraction, purpose)
        left_out = np.flatnonzero(labelled & ~usable_tokens(spec, folder, purpose))
        assert left_out.tolist() == [at for at in (47, 333, 15_001) if labelled[at]]
    assert not usable_tokens(spec, folder)[::LENGTH].any()  # by skip_first; the median is not of these


def test_the_rule_can_be_changed_and_switched_off(tmp_path: Path) -> None:
    spec, folder = study(tmp_path, {"base@0": sinking(seed=0)}, skip_first=0, max_norm_ratio=100)
    assert np.flatnonzero(~usable_tokens(spec, folder)).tolist() == list(range(0, 20_000, LENGTH))
    spec = study_spec(extraction={"skip_first": 0, "max_norm_ratio": None})
    assert usable_tokens(spec, folder).all()
    how = {"max_norm_ratio": 1.000001, "summary_segments": ["last_prompt"]}
    one = np.ones((LENGTH, 4))
    one[LENGTH // 2 - 1] = 2  # the one token that would be summarised
    with pytest.raises(InputError, match=r"no token is left whose base activation is at most 1.000001 times"):
        usable_tokens(*study(tmp_path / "one", {"base@0": one}, **how), "summary")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_sinks_are_the_same_at_every_scale_the_stored_type_holds(tmp_path: Path, dtype: str) -> None:
    """Squares of float16 overflow from 256 on: in it, ordinary tokens were dropped and sinks of one kind kept."""
    rows = np.random.default_rng(1).normal(size=(400, 64))
    rows[[47, 333]] *= 40
    largest = {"float16": 65_504.0, "bfloat16": 3.3e38, "float32": 3.4e38}[dtype]
    for number, scale in enumerate((1.0, 1e-3 * largest, 0.99 * largest)):
        values = {"base@0": rows / np.abs(rows).max() * scale}
        spec, folder = study(tmp_path / str(number), values, dtype=dtype, skip_first=0)
        assert np.flatnonzero(~usable_tokens(spec, folder)).tolist() == [47, 333]
