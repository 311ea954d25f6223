"""Requests for another engine: what it is asked is what is asked here, and what it answers comes back the same."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner

from rlgen_stats.cli import main
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.stores import StudyFolder, open_activations, open_outcomes
from rlgen_stats.toolkit.extraction import read_completions
from rlgen_stats.toolkit.extraction.block_check import check_block
from rlgen_stats.toolkit.study import run_study
from rlgen_stats.toolkit.study.outcome_requests import export_requests
from tests.extraction.bpe import llama_tokenizer, save_bpe
from tests.study.vllm_stand_in import VERSION, modules

MODELS = ("base@0", "sft@3", "rl@4")
DOCS = Path(__file__).parents[2] / "docs/outcomes-from-elsewhere.md"
SPEC: dict[str, Any] = {
    "name": "asked",
    "seed": 5,
    "device": "cpu",
    "base": {"path": "models/base"},
    "runs": [
        {"name": "sft", "arm": "sft", "chat_template": "checkpoint", "checkpoints": {3: "models/sft"}},
        {"name": "rl", "arm": "rl", "chat_template": "checkpoint", "checkpoints": {4: "models/rl"}},
    ],
    "data": {"prompts": "data/prompts.parquet", "train": None},
    "tasks": {"sum": {"stop": ["s", "<|eot_id|>"], "max_new_tokens": 9}},
    "generation": {"max_new_tokens": 7, "n_samples": 2, "top_p": 0.9, "batch_size": 12},
    "extraction": {"layer": 0},
    "crosscoders": [{"name": "main", "views": ["base@0", "sft@final", "rl@final"], "n_features": 64}],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of a base that reads plain text and two runs that read a chat template, sampled here."""
    root = tmp_path_factory.mktemp("asked") / "study"
    for seed, name in enumerate(("base", "sft", "rl")):
        save_bpe(root / "models" / name, llama_tokenizer(), seed)
    (root / "data").mkdir()
    n = 6
    prompts = {"prompt_id": [f"p{i}" for i in range(n)], "text": [f"What is {i} + {i % 4}?" for i in range(n)]}
    tasks = {"task": ["sum", "gas"] * 3, "domain": ["in", "out"] * 3, "answer": [str(i + i % 4) for i in range(n)]}
    pd.DataFrame(prompts | tasks).to_parquet(root / "data/prompts.parquet")
    (root / "study.yaml").write_text(yaml.safe_dump(SPEC))
    run_study(root, stages=["outcomes", "extract"])
    return root


@pytest.fixture
def study(world: Path, tmp_path: Path) -> Path:
    """The same study, nothing sampled."""
    root = tmp_path / "study"
    shutil.copytree(world, root, ignore=shutil.ignore_patterns("*.zarr", "completions", "stages"))
    return root


def run(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def run_script(
    monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object, change: tuple[str, str] = ("", "")
) -> None:
    """A script of the documentation, where vLLM is."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    script = next(block for block in blocks if block.startswith(f"# {name}"))
    for module, stand_in in modules().items():
        monkeypatch.setitem(sys.modules, module, stand_in)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    exec(compile(script.replace(*change) if change[0] else script, name, "exec"), {})


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_request_asks_for_what_is_sampled_here(study: Path) -> None:
    written = export_requests(study, ["base@0", "rl@4"])
    assert [(one.model, one.n_requests, Path(one.file).name) for one in written] == [
        ("base@0", 18, "base@0.jsonl"),
        ("rl@4", 18, "rl@4.jsonl"),
    ]
    tokenizer = llama_tokenizer()
    base, rl = (lines_of(study / f"requests/{model}.jsonl") for model in ("base@0", "rl@4"))
    assert [(row["prompt_id"], row["sample"]) for row in rl] == [(f"p{i}", s) for s in (-1, 0, 1) for i in range(6)]
    for row in base:
        assert row["prompt_token_ids"] == tokenizer(row["prompt"])["input_ids"]  # one BOS, the tokenizer's
        assert row["prompt"] == f"What is {row['prompt_id'][1:]} + {int(row['prompt_id'][1:]) % 4}?"
    for plain, row in zip(base, rl, strict=True):
        messages = [{"role": "user", "content": plain["prompt"]}]
        chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
        assert row["prompt_token_ids"] == chat
        assert chat.count(tokenizer.bos_token_id) == 1
        assert row["prompt"] == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert row["checkpoint"] == str(study / "models/rl")
        assert row["dtype"] == "float32"
    end, turn = (tokenizer.convert_tokens_to_ids(token) for token in ("<|end_of_text|>", "<|eot_id|>"))
    of_sum, of_gas = rl[0]["sampling"], rl[1]["sampling"]
    assert of_sum == {"temperature": 0.0, "max_tokens": 9, "stop": ["s"], "stop_token_ids": [end, turn]}
    assert of_gas == {"temperature": 0.0, "max_tokens": 7, "stop": [], "stop_token_ids": [end, turn]}
    assert base[1]["sampling"]["stop_token_ids"] == [end]
    assert base[0]["sampling"]["stop_token_ids"] == [end, turn]  # named by a stop string of the task
    drawn = [row["sampling"] for row in rl[6:]]
    assert all((one["temperature"], one["top_p"]) == (1.0, 0.9) for one in drawn)
    assert len({one["seed"] for one in drawn}) == 12
    assert [one["sampling"].get("seed") for one in base] == [one["sampling"].get("seed") for one in rl]


def test_end_tokens_are_the_checkpoints_own(study: Path) -> None:
    config = study / "models/rl/generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [1, 9]}))
    export_requests(study, ["rl@4"])
    assert 9 in lines_of(study / "requests/rl@4.jsonl")[0]["sampling"]["stop_token_ids"]
    config.unlink()  # transformers then takes those of config.json
    export_requests(study, ["rl@4"], to=study / "elsewhere")
    assert 9 not in lines_of(study / "elsewhere/rl@4.jsonl")[0]["sampling"]["stop_token_ids"]


def test_choices_scored_by_log_likelihood_are_not_asked_for(study: Path) -> None:
    task = {"sum": {"grader": {"name": "choice_loglik"}, "choices": "choices"}}
    (study / "study.yaml").write_text(yaml.safe_dump(SPEC | {"tasks": task}))
    table = pd.read_parquet(study / "data/prompts.parquet")
    table.assign(choices=[[answer, "x"] for answer in table.answer]).to_parquet(study / "data/prompts.parquet")
    with pytest.raises(InputError, match="task 'sum' is graded by the log-likelihood of its choices, which no compl"):
        export_requests(study)
    assert not (study / "requests").exists()


def test_a_study_sampled_by_another_engine_is_the_study_sampled_here(
    world: Path, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exported, run by the documented script, imported: the stand-in draws as this toolkit does."""
    output = run("export-requests", study, "--to", tmp_path / "requests")
    assert f"{tmp_path / 'requests/rl@4.jsonl'}: 18 completions of rl@4 ({study / 'models/rl'})." in output
    for model in MODELS:
        sampled = tmp_path / f"{model}.jsonl"
        run_script(monkeypatch, "sample.py", tmp_path / f"requests/{model}.jsonl", sampled)
        said = run("import-outcomes", study, "--model", model, sampled)
        assert f"from vllm {VERSION}, to be graded by the study's graders" in said
    run_study(study, stages=["outcomes"])
    got, expected = (open_outcomes(root / "outcomes.zarr").load() for root in (study, world))
    assert set(got.engine.values) == {f"vllm {VERSION}"}
    for name in expected.data_vars:
        np.testing.assert_array_equal(got[name].values, expected[name].values)
    for model in MODELS:
        mine, theirs = (read_completions(StudyFolder(root), model) for root in (world, study))
        assert list(mine.text) == list(theirs.text)
        assert [ids.tolist() for ids in mine.token_ids] == [ids.tolist() for ids in theirs.token_ids]
    assert expected.terminated.any()
    assert not expected.terminated.all()


@pytest.mark.parametrize("block", [0, 1])
def test_hidden_states_of_another_engine_are_those_that_are_extracted_here(
    world: Path, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Every token of every text, the completions' last ones too, at the layer that the recipe asks for."""
    root = world
    if block == 1:
        shutil.copytree(world, study, dirs_exist_ok=True)
        (study / "study.yaml").write_text(yaml.safe_dump(SPEC | {"extraction": {"layer": 1}}))
        run_study(study, stages=["extract"], replace=lambda question: True)
        root = study
    requests, checkpoint = tmp_path / "requests", root / "models/rl"
    assert "18 texts; their labels: labels.parquet" in run("export-requests", root, "--texts", "--to", requests)
    run_script(monkeypatch, "hidden_states.py", requests / "texts.jsonl", checkpoint, block, tmp_path / "cache")
    labels = ("--labels", requests / "labels.parquet", "--model", "rl@4", "--site", f"block{block}")
    store = tmp_path / "elsewhere.zarr"
    run("import", tmp_path / "cache", *labels, "--into", store, "--checkpoint", checkpoint, "--quiet")
    mine, theirs = (open_activations(one, models=["rl@4"]).load() for one in (root / "activations.zarr", store))
    for name in ("prompt", "source", "position", "token_id", "segment", "task", "split"):
        np.testing.assert_array_equal(mine[name].values, theirs[name].values)
    np.testing.assert_allclose(theirs.activation.values, mine.activation.values, rtol=1e-4, atol=1e-4)
    run_script(
        monkeypatch,
        "hidden_states.py",
        *(requests / "texts.jsonl", checkpoint, block, tmp_path / "shifted"),
        change=("int(sys.argv[3]) + 1", "int(sys.argv[3])"),
    )
    wrong = CliRunner().invoke(
        main, [str(a) for a in ("import", tmp_path / "shifted", *labels, "--into", store, "--checkpoint", checkpoint)]
    )
    assert wrong.exit_code == 2
    found = (
        r"the output of block 0 of .*, not of block 1, .* read block 1 \(vLLM's layer id 2\)"
        if block
        else "of no block"
    )
    assert re.search(found, wrong.output)


def test_activations_of_a_block_may_differ_by_a_tenth(world: Path, tmp_path: Path) -> None:
    run("export-requests", world, "--texts", "--to", tmp_path)
    labels, checkpoint = tmp_path / "labels.parquet", world / "models/rl"
    values = open_activations(world / "activations.zarr", models=["rl@4"]).activation.values
    for share, fits in ((0.099, True), (0.101, False)):
        np.save(tmp_path / "one.npy", (values * (1 + share)).astype(np.float32))
        if fits:
            assert check_block(tmp_path / "one.npy", labels, "block0", checkpoint) == pytest.approx(share, rel=1e-3)
        else:
            with pytest.raises(
                InputError, match=r"is the output of no block of .*: the nearest, block 0, differs by 10%"
            ):
                check_block(tmp_path / "one.npy", labels, "block0", checkpoint)


@pytest.mark.parametrize(
    ("site", "width", "value", "message"),
    [
        ("middle", 32, 0.0, "a checkpoint is compared at a site like 'block12', got 'middle'"),
        ("block2", 32, 0.0, "site 'block2' is none of the model's blocks 0 to 1"),
        ("block0", 8, 0.0, "the cache has width 8, .* 32; expected activations of this model"),
        ("block0", 32, np.nan, "is the output of no block"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    world: Path, tmp_path: Path, site: str, width: int, value: float, message: str
) -> None:
    run("export-requests", world, "--texts", "--to", tmp_path)
    n = len(pd.read_parquet(tmp_path / "labels.parquet"))
    np.save(tmp_path / "one.npy", np.full((n, width), value, dtype=np.float32))
    with pytest.raises(InputError, match=message):
        check_block(tmp_path / "one.npy", tmp_path / "labels.parquet", site, world / "models/rl")
