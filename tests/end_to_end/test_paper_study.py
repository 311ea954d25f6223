"""The paper's study file: accepted for models of three families, and run at toy size through every stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from click.testing import Result
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from rlgen_stats.schemas.dims import GREEDY
from rlgen_stats.stores import open_results, open_study, read_json
from rlgen_stats.stores.prompts import load_prompts
from rlgen_stats.toolkit.study import open_for_run, read_spec
from tests.end_to_end.conftest import run_command
from tests.exchange.published_rows import LAYOUTS
from tests.extraction.bpe import chatml_tokenizer, llama_tokenizer

STUDY = Path(__file__).parents[2] / "docs" / "paper-study.yaml"
TASKS = (
    "math500",
    "aime24",
    "aime25",
    "openbookqa",
    "commonsenseqa",
    "headqa",
    "sciq",
    "arc_challenge",
    "logiqa",
    "piqa",
)
STEPS = (73, 147, 220, 294, 367)
"""Every fifth of an epoch of 47,000 problems in batches of 128."""
FAMILIES = {
    "qwen3": (Qwen3Config, chatml_tokenizer),
    "qwen2": (Qwen2Config, chatml_tokenizer),
    "llama": (LlamaConfig, llama_tokenizer),
}
COPIES = 6
"""Of every published row, so that each task has prompts for selection, confirmation and trial."""


def tiny(family: str, seed: int) -> tuple[Any, Any]:
    config, tokenizer = FAMILIES[family][0], FAMILIES[family][1]()
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(
        config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32768, initializer_range=0.2, pad_token_id=None,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        ),
        dtype=torch.bfloat16,
    )  # fmt: skip
    return model, tokenizer


def save(folder: Path, model: PreTrainedModel, tokenizer: Any) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def paper_folder(root: Path, family: str, *, adapters: bool) -> Path:
    """The study with the paper's own file beside models and tables of our own making."""
    base, tokenizer = tiny(family, 0)
    save(root / "models/Qwen3-4B-Base", base, tokenizer)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    for number, step in enumerate(STEPS, start=1):
        generator = torch.Generator().manual_seed(number)
        moved = {
            name: value + 0.02 * number * torch.randn(value.shape, generator=generator)
            for name, value in weights.items()
        }
        base.load_state_dict(moved)
        save(root / f"runs/sft/checkpoint-{step}", base, tokenizer)
        base.load_state_dict(weights)
        target = root / f"runs/rl/global_step_{step}/actor/huggingface"
        if adapters:
            whole = tiny(family, 0)[0]
            torch.manual_seed(number)
            lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
            model: Any = get_peft_model(whole, lora)
            model.save_pretrained(target)
        else:
            save(target, tiny(family, 100 + number)[0], tokenizer)
    (root / "study.yaml").write_text(STUDY.read_text())
    spec = yaml.safe_load(STUDY.read_text())
    downloads = root / "downloads"
    downloads.mkdir()
    for (name, _), rows in reversed(LAYOUTS.items()):  # the first layout of each
        (downloads / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "data").mkdir()
    without = {key: value for key, value in spec.items() if key not in ("tasks", "data")}
    (root / "study.yaml").write_text(yaml.safe_dump(without, sort_keys=False))
    added = run_command("tasks", "add", str(root), *TASKS, "--from", str(downloads))
    assert added.exit_code == 0, added.output
    written = yaml.safe_load((root / "study.yaml").read_text())["tasks"]
    assert {name: _settings(task) for name, task in written.items()} == {
        name: _settings(task) for name, task in spec["tasks"].items()
    }
    (root / "study.yaml").write_text(STUDY.read_text())
    for name in TASKS:
        file = root / f"data/tasks/{name}.parquet"
        table = pd.read_parquet(file)
        copies = [
            table.assign(
                **{
                    column: table[column].astype(str) + f" {k}"
                    for column in ("prompt_id", "cluster")
                    if column in table
                }
            ).assign(text=f"Case {k}: " + table["text"])
            for k in range(COPIES)
        ]
        pd.concat(copies).to_parquet(file)
    texts = [f"{word} is {n} or {n + 1} so the answer is {n}." for n in range(24) for word in ("Ann", "water")]
    for name in ("corpus", "neutral"):
        pd.DataFrame({"text": texts}).to_parquet(root / f"data/{name}.parquet")
    return root


def _settings(task: dict[str, Any]) -> dict[str, Any]:
    """What decides how a task is asked and graded, defaults aside."""
    defaults = {"template": "{text}"}
    grader = {"normalize": "none"} | task["grader"] if isinstance(task["grader"], dict) else task["grader"]
    return {key: value for key, value in task.items() if defaults.get(key) != value} | {"grader": grader}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_check_accepts_the_papers_study(family: str, tmp_path: Path) -> None:
    root = paper_folder(tmp_path, family, adapters=family == "llama")
    found = run_command("check", str(root), "--json")
    told = json.loads(found.stdout)
    serious = [problem for problem in told["problems"] if problem["where"] not in ("disk", "intervention")]
    assert serious == []
    assert {problem["where"] for problem in told["problems"]} <= {"disk", "intervention"}  # 120 prompts, and this disk
    assert told["n_prompts"] == {name: len(pd.read_parquet(root / f"data/tasks/{name}.parquet")) for name in TASKS}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The same file with small numbers: an RL run of LoRA adapters, one checkpoint sampled elsewhere.

    In float32: processors without bfloat16 take forty times as long for its products.
    """
    root = paper_folder(tmp_path_factory.mktemp("toy") / "study", "qwen3", adapters=True)
    spec = yaml.safe_load(STUDY.read_text())
    for one in spec["crosscoders"]:
        one |= {"n_features": 48, "k": 4, "steps": 40, "batch_size": 64, "accept_unhealthy": True, "replicates": 1}
    spec["crosscoders"] = [one for one in spec["crosscoders"] if one["name"] != "noise"]
    spec["models"] = {"dtype": "float32"}
    spec["generation"] |= {"max_new_tokens": 6, "n_samples": 2}
    spec["intervention"] |= {
        "n_controls": 19,
        "max_prompts": 12,
        "doses": [0.0, 0.5, 2.0],
        "curve": [2],
        "curve_controls": 1,
    }
    spec["intervention"]["accept_undecidable"] = True
    spec["statistics"] |= {"n_resamples": 99, "n_bootstrap": 99, "n_halvings": 10, "top_k": 5, "n_min": 2}
    spec["selection"] |= {"min_discordant": 2}
    for run in ("sft", "rl"):  # every fifth of an epoch is checked above; two are enough to run
        for folder in sorted((root / "runs" / run).iterdir()):
            if not folder.name.endswith(("147", "367")):
                shutil.rmtree(folder)
    (root / "study.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    study = read_spec(root)
    prompts = load_prompts(study, open_for_run(root).folder)
    rows = [
        {"prompt_id": prompt, "sample": sample, "correct": sample % 2 == 0, "text": "" if choices else f" so {answer}"}
        for prompt, answer, choices in zip(prompts["prompt"], prompts["answer"], prompts["choices"], strict=True)
        for sample in (GREEDY, 0, 1)
    ]
    (root / "sampled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ("--temperature", "1", "--top-p", "1", "--max-new-tokens", "6", "--engine", "here")
    imported = run_command("import-outcomes", str(root), "--model", "sft@147", str(root / "sampled.jsonl"), *settings)
    assert imported.exit_code == 0, imported.output
    return root, run_command("run", str(root), "--quiet")


@pytest.mark.slow
def test_it_runs_end_to_end_at_toy_size(toy: tuple[Path, Result]) -> None:
    root, result = toy
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    states = {stage.name: stage.state for stage in open_for_run(root).status()}
    assert set(states.values()) == {"done"}
    assert [claim["id"] for claim in read_json(root / "report/report.json")["claims"]] == ["C1", "C2", "C3", "C4", "C5"]


@pytest.mark.slow
def test_every_task_is_graded_by_its_own_grader(toy: tuple[Path, Result]) -> None:
    outcomes = open_study(toy[0])["outcomes"].to_dataset().load()
    assert set(outcomes.task.values.tolist()) == set(TASKS)
    scored = ~outcomes.task.isin(TASKS[:3])
    drawn = outcomes.correct.sel(model="base@0")
    assert (drawn.isel(sample=0) == drawn.isel(sample=1)).where(scored, True).all()  # a choice is not drawn
    completions = pd.read_parquet(toy[0] / "completions/base@0.parquet")
    chosen = completions[completions["choice_log_likelihoods"].notna()]
    assert set(chosen["prompt"]) == set(outcomes.prompt.values[scored.values])


@pytest.mark.slow
def test_one_model_was_sampled_elsewhere_and_its_verdicts_were_kept(toy: tuple[Path, Result]) -> None:
    outcomes = open_study(toy[0])["outcomes"].to_dataset().load()
    assert dict(zip(outcomes.model.values.tolist(), outcomes.graded_by.values.tolist(), strict=True)) == {
        model: "correct" if model == "sft@147" else "here" for model in outcomes.model.values.tolist()
    }
    elsewhere = outcomes.sel(model="sft@147")
    assert (elsewhere.correct == (elsewhere.sample % 2 == 0)).all()


@pytest.mark.slow
def test_adapters_are_read_as_models_of_their_own(toy: tuple[Path, Result]) -> None:
    movement = open_results(toy[0] / "results.zarr", "movement").load()
    shift = movement.activation_shift.sel(model=["rl@147", "rl@367"]).values
    assert (shift > 0.01).all()
    assert shift[0] != shift[1]
    assert read_json(toy[0] / "models/Qwen3-4B-Base/config.json")["dtype"] == "bfloat16"  # what dtype: auto follows
