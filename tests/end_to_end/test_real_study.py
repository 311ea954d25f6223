"""The study of docs/real-study.md, in small: its own tables and file, a tiny base, through every stage."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from transformers import LlamaConfig
from transformers.models.auto import AutoModelForCausalLM

from rlgen_stats.stores import read_json
from rlgen_stats.toolkit.study import open_for_run, read_spec
from tests.end_to_end.conftest import run_command
from tests.extraction.bpe import chatml_tokenizer

DOCS = Path(__file__).parents[2] / "docs"
SCRIPT = runpy.run_path(str(DOCS / "real_study.py"))


def written(folder: Path, scale: float = 1.0) -> dict[str, pd.DataFrame]:
    SCRIPT["write_tables"](folder, seed=0, markup=SCRIPT["MARKUP"], scale=scale)
    return {file.stem: pd.read_parquet(file) for file in (folder / "data").iterdir()}


def test_tables_are_what_the_page_says(tmp_path: Path) -> None:
    tables, spec = written(tmp_path), yaml.safe_load((DOCS / "real-study.yaml").read_text())
    prompts = tables["prompts"]
    assert set(prompts["task"]) == set(spec["tasks"])
    asked = prompts[~prompts["task"].isin(SCRIPT["CHOICES"])]
    assert not asked["text"].duplicated().any()
    assert dict(asked.groupby("task").size()) == SCRIPT["SIZES"]
    choices = prompts[prompts["task"].isin(SCRIPT["CHOICES"])]
    assert choices["text"].isin(asked["text"]).all()  # the same questions, in the same clusters
    assert all(row.answer in row.choices and len(set(row.choices)) == 4 for row in choices.itertuples())
    for name in ("train", "corpus"):  # nothing that is asked is taught or read
        assert not any(text.startswith(tuple(asked["text"])) for text in tables[name]["text"])
    assert (tables["train"]["completion"] == " " + tables["train"]["answer"] + ".").all()
    assert not tables["neutral"]["text"].isin(tables["corpus"]["text"]).any()
    again = written(tmp_path / "again")
    for name, table in tables.items():
        pd.testing.assert_frame_equal(table, again[name])


@pytest.fixture(scope="module")
def slice_(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("real") / "study"
    tokenizer: Any = chatml_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            initializer_range=0.2, pad_token_id=None, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    written(root, scale=0.1)
    spec = yaml.safe_load((DOCS / "real-study.yaml").read_text())
    for run in spec["runs"]:
        run |= {"n_checkpoints": 2, "trainer": run["trainer"] | {"max_steps": 2, "per_device_train_batch_size": 8}}
    for one in spec["crosscoders"]:
        one |= {"n_features": 32, "k": 4, "steps": 20, "batch_size": 64, "accept_unhealthy": True, "replicates": 1}
    spec["intervention"] |= {"n_controls": 19, "doses": [0.0], "curve": [2], "max_prompts": 24}
    spec["intervention"]["accept_undecidable"] = True
    spec["statistics"] = {"n_resamples": 99, "n_bootstrap": 99, "n_halvings": 10, "top_k": 5, "n_min": 2}
    (root / "study.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    return root


def test_a_slice_runs_to_its_report(slice_: Path) -> None:
    result = run_command("run", str(slice_), "--quiet")
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert {stage.state for stage in open_for_run(slice_).status()} == {"done"}
    assert [claim["id"] for claim in read_json(slice_ / "report/report.json")["claims"]] == [
        "C1",
        "C2",
        "C3",
        "C4",
        "C5",
    ]
    assert {run.arm for run in read_spec(slice_).runs} == {"sft", "rl"}
