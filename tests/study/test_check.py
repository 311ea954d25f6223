"""What is wrong with a study is said all at once, without weights, and what it costs is counted."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from click.testing import CliRunner

from rlgen_stats.cli import main
from rlgen_stats.schemas.errors import SpecError
from rlgen_stats.schemas.study import ExtractionSpec
from rlgen_stats.toolkit.extraction import checkpoints
from rlgen_stats.toolkit.study import check_study as check_module
from rlgen_stats.toolkit.study import claim_power, parse_spec
from rlgen_stats.toolkit.study.check_study import Problem, check_study
from rlgen_stats.toolkit.study.costs import Sizes, estimate
from rlgen_stats.toolkit.study.stage_graph import with_needs
from tests.extraction.conftest import WORDS, prompt_table, save_model, word_tokenizer
from tests.study.conftest import Hub, spec_dict

SPEC = {
    "name": "tiny",
    "device": "cpu",
    "base": {"path": "models/base"},
    "runs": [
        {"name": "sft", "arm": "sft", "checkpoints": {3: "models/sft-3", 6: "models/sft-6"}},
        {"name": "rl", "arm": "rl", "checkpoints": {4: "models/rl-4", 8: "models/rl-8"}},
    ],
    "data": {"prompts": "data/prompts.csv", "train": None},
    "generation": {"max_new_tokens": 6, "n_samples": 2},
    "extraction": {"layer": 1, "dtype": "bfloat16"},
    "crosscoders": [
        {"name": "main", "views": ["base@0", "sft@final", "rl@final"], "n_features": 64},
        {"name": "pair", "views": ["base@0", "rl@final"], "n_features": 32},
    ],
    "intervention": {"accept_undecidable": True},
}


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("check") / "study"
    for seed, name in enumerate(("base", "sft-3", "sft-6", "rl-4", "rl-8")):
        save_model(root / "models" / name, seed)
    (root / "data").mkdir()
    prompt_table().to_csv(root / "data/prompts.csv", index=False)
    (root / "study.yaml").write_text(yaml.safe_dump(SPEC))
    return root


@pytest.fixture
def study(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "study"))


def change(root: Path, **changes: Any) -> None:
    (root / "study.yaml").write_text(yaml.safe_dump(SPEC | changes))


def problems(root: Path) -> dict[str, str]:
    return {problem.where: problem.message for problem in check_study(root).problems}


def test_a_sound_study_has_no_problem_and_loads_no_weights(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "load_model", lambda *a, **k: pytest.fail("weights are loaded"))
    before = sorted(sound.rglob("*"))
    found = check_study(sound)
    assert found.problems == ()
    assert found.models == ("base@0", "sft@3", "sft@6", "rl@4", "rl@8")
    assert (found.n_blocks, found.width) == (3, 32)
    assert found.n_prompts == {"other": 6, "sum": 6}
    assert [one.text for one in found.examples if one.task == "sum"] == [prompt_table().text[1]]
    assert found.costs is not None
    assert found.costs.completions == 5 * 12 * 3
    assert found.costs.tokens == 5 * 12 * 3 * 6
    assert sorted(sound.rglob("*")) == before


def test_shorthands_are_not_called_wrong_where_their_folders_are(study: Path) -> None:
    runs = [SPEC["runs"][0] | {"checkpoints": "models/sft-*"}, SPEC["runs"][1] | {"checkpoints": "models/rl_*"}]  # type: ignore[index]
    change(study, runs=runs, extraction={"layer": "middle", "batch_size": 0})
    told = [problem.message for problem in check_study(study).problems]
    assert len(told) == 2
    assert "'models/rl_*' matches no folder" in told[0]
    assert told[1].startswith("'extraction.batch_size'")
    for relative in ({"layer": 0.5}, {"layers": [1, "middle"]}):
        change(study, base={"path": "models/gone"}, extraction=relative)
        (only,) = check_study(study).problems
        assert "models/gone, which does not exist" in only.message


def test_letters_stand_for_choices_that_the_prompt_shows(study: Path) -> None:
    table = prompt_table().assign(choices=[["blue sky", "red sea"]] * len(prompt_table()), answer="B")
    table.to_json(study / "data/prompts.jsonl", orient="records", lines=True)
    data = {"prompts": "data/prompts.jsonl", "train": None}
    tasks = {name: {"grader": {"name": "choice_loglik", "options": "letters"}} for name in ("other", "sum")}
    change(study, data=data, tasks=tasks)
    assert "no prompt shows the choices that they stand for; put {choices} into" in problems(study)["task other"]
    for task in tasks.values():
        task["template"] = "{text} {choices}"  # type: ignore[assignment]
    change(study, data=data, tasks=tasks)
    assert not {where for where in problems(study) if where.startswith("task")}


def test_views_of_runs_to_be_trained_are_checkpoints_that_they_will_get(study: Path) -> None:
    trained = {"name": "rl", "arm": "rl", "method": "grpo", "n_checkpoints": 2, "trainer": {"max_steps": 8}}
    pair = SPEC["crosscoders"][1]  # type: ignore[index]

    def told(*views: str, **trainer: Any) -> str | None:
        runs = [SPEC["runs"][0], trained | ({"trainer": trainer} if trainer else {})]  # type: ignore[index]
        change(study, runs=runs, crosscoders=[SPEC["crosscoders"][0], pair | {"views": list(views)}])  # type: ignore[index]
        return problems(study).get(f"crosscoders.{pair['name']}.views")

    assert told("base@0", "rl@5") == "'rl@5' will not be there: 'rl' gets steps 4, 8."
    assert told("rl@8", "rl@final") == "'rl@8' is 'rl@final'; name each model once."
    assert told("rl@4", "rl@final") is None
    assert told("base@0", "rl@5", num_train_epochs=1) is None, "how many steps that makes is not known yet"


def test_everything_that_is_wrong_is_said_at_once(study: Path) -> None:
    shutil.rmtree(study / "models/sft-3")
    save_model(study / "models/sft-6", 2, tokenizer=word_tokenizer((*WORDS[:3], *reversed(WORDS[3:]))))
    weights = study / "models/rl-4/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    (study / "models/rl-8/config.json").write_text("{}")
    crosscoders = [SPEC["crosscoders"][0] | {"readout": "joint"}, SPEC["crosscoders"][1] | {"corpus": "gone.jsonl"}]  # type: ignore[index]
    change(
        study,
        extraction={"layer": 3},
        generation={"max_new_tokens": 200, "n_samples": 2},
        crosscoders=crosscoders,
        intervention={"accept_undecidable": False},
    )
    found = problems(study)
    assert set(found) == {
        "runs.sft.checkpoints.3",
        "crosscoders.pair.corpus",
        "study.yaml",
        "base@0",
        "sft@6",
        "rl@4",
        "rl@8",
        "intervention",
    }
    assert "models/sft-3, which does not exist; correct the path" in found["runs.sft.checkpoints.3"]
    assert "the select stage compares different features" in found["study.yaml"]
    assert "layer 3 asked for, but Qwen3ForCausalLM has 3 layers, blocks 0 to 2" in found["base@0"]
    assert "sft@6 has another tokenizer than base@0" in found["sft@6"]
    assert "model.safetensors is cut off or broken" in found["rl@4"]
    assert "describes no causal language model" in found["rl@8"]
    assert all("\n" not in message for message in found.values())


def test_answers_that_no_grader_can_read_are_named_for_every_task(study: Path) -> None:
    table = prompt_table().assign(answer="neither", options='["yes", "no"]')
    table.to_csv(study / "data/prompts.csv", index=False)
    change(study, tasks={task: {"grader": {"name": "choice"}, "choices": "options"} for task in ("sum", "other")})
    found = problems(study)
    assert set(found) == {"task sum", "task other"}
    assert "the grader cannot read 6 of 6 expected answer(s): p1 ('neither')" in found["task sum"]


def test_all_faults_of_the_study_file_come_together(study: Path) -> None:
    (study / "study.yaml").write_text(yaml.safe_dump(SPEC | {"sed": 1, "generation": {"temprature": 1, "top_p": 2}}))
    messages = [problem.message for problem in check_study(study).problems]
    assert len(messages) == 3
    assert {"did you mean 'seed'", "did you mean 'temperature'", "less than or equal to 1, got 2"} == {
        hint for hint in ("did you mean 'seed'", "did you mean 'temperature'", "less than or equal to 1, got 2")
        for message in messages if hint in message
    }  # fmt: skip
    with pytest.raises(SpecError, match="no study file at"):
        check_study(study / "nothing")


def test_prompts_must_fit_the_context_and_shards_be_there(study: Path) -> None:
    longest = max(len(text.split()) for text in prompt_table().text)
    change(study, generation={"max_new_tokens": 128 - longest, "n_samples": 2})
    assert problems(study) == {}
    change(study, generation={"max_new_tokens": 129 - longest, "n_samples": 2})
    assert problems(study) == {
        "prompts": f"a prompt has {longest} tokens and {129 - longest} may follow, but the model's context is 128; "
        "lower generation.max_new_tokens or shorten the prompts."
    }
    change(study)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (study / "models/rl-4/model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks 1 of 2 files of weights, e.g. model-2.safetensors" in problems(study)["rl@4"]


def test_single_models_of_several_widths_have_no_encoder_in_common(study: Path) -> None:
    """The crosscoder that is encoded is trained on both kinds of rows unless told otherwise; the pair is joint."""
    for step in (4, 8):
        config = study / f"models/rl-{step}/config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 48}))
    found = problems(study)
    assert set(found) == {"crosscoders.main"}
    assert found["crosscoders.main"] == (
        "objective 'both' puts one view's activation into every slot and needs views of one width, got 32 of base, 32 "
        "of sft, 48 of rl; write objective: joint, and readout: own where its features are read."
    )
    main, pair = SPEC["crosscoders"]  # type: ignore[misc]
    change(study, crosscoders=[main | {"objective": "joint", "readout": "own"}, pair])
    assert problems(study) == {}
    change(study, crosscoders=[main | {"objective": "joint"}, pair | {"objective": "paired"}])
    assert set(problems(study)) == {"crosscoders.pair"}


@pytest.mark.parametrize(
    ("key", "value", "got"),
    [("hidden_size", 48, "3 blocks of width 48"), ("num_hidden_layers", 2, "2 blocks of width 32")],
)
def test_a_checkpoint_that_is_another_model_than_the_rest_of_its_run_is_named(
    study: Path, key: str, value: int, got: str
) -> None:
    change(study, extraction={"layer": 1})
    assert problems(study) == {}
    config = study / "models/rl-8/config.json"
    known = json.loads(config.read_text())
    known.pop("layer_types", None)
    config.write_text(json.dumps(known | {key: value}))
    found = problems(study)["rl@8"]
    assert found.startswith(f"checkpoints of one run are expected to be one model, got {got} in ")
    assert f"rl-8 and 3 of width 32 in {study / 'models/rl-4'}; correct the run's checkpoints." in found


def test_of_models_on_the_hub_only_configs_and_tokenizers_are_asked_for(study: Path, hub: Hub) -> None:
    """The one found has no weights here, which is no problem; the one that is not found is."""
    rl = {4: "hf://org/model/step-0010", 8: "models/rl-8", 9: "hf://org/model/gone"}
    change(study, runs=[SPEC["runs"][0], {"name": "rl", "arm": "rl", "checkpoints": rl}])  # type: ignore[index]
    (hub.files / "step-0010/config.json").write_text((study / "models/base/config.json").read_text())
    found = check_study(study)
    assert [problem.where for problem in found.problems] == ["runs.rl.checkpoints.9"]
    assert "hf://org/model has no checkpoint in 'gone'" in found.problems[0].message
    assert found.models == ("base@0", "sft@3", "sft@6", "rl@4", "rl@8")
    assert "step-0010/config.json" in " ".join(hub.calls)
    assert "safetensors" not in " ".join(hub.calls)


def test_a_full_disk_is_a_problem_before_it_is_one(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    needed = check_study(sound).bytes_left
    assert needed is not None
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed))
    assert problems(sound) == {}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed - 1))
    assert "GB are free; use another disk" in problems(sound)["disk"]


def test_costs_are_counts_times_limits() -> None:
    """Every number by hand: 3 models, 10 prompts of which 4 are scored by log-likelihood and 2 have a limit of 3."""
    crosscoder = {"name": "main", "views": ["base@0", "sft@final", "rl@final"], "n_features": 100, "replicates": 2}
    spec = parse_spec(
        spec_dict(
            generation={"max_new_tokens": 5, "n_samples": 2},
            extraction={"dtype": "float16"},
            crosscoders=[crosscoder],
            tasks={"b": {"grader": "choice_loglik"}, "c": {"max_new_tokens": 3}},
            intervention={"n_controls": 19, "doses": [0.5], "curve": [1, 2], "curve_controls": 1, "max_prompts": 400},
        )
    )
    tasks = ["a"] * 4 + ["b"] * 4 + ["c"] * 2
    splits = ["trial", *["selection"] * 8, "trial"]
    prompts = pd.DataFrame({"prompt": [f"p{i}" for i in range(10)], "task": tasks, "split": splits})
    sizes = Sizes(
        models={"base@0": 3, "sft@5": 1, "rl@10": 3},
        to_sample=["base@0"],
        width=8,
        prompt_tokens=100,
        checkpoint_bytes=7,
    )
    costs = estimate(spec, prompts, sizes)
    n_tokens = 4 * 5 + 2 * 3
    assert costs.completions == 1 * 3 * 6
    assert costs.tokens == 1 * 3 * n_tokens
    arms = 2 * (19 + 1 + (2 + 2) * (1 + 1) + 6)
    assert costs.trial_completions == arms * 2 * 2
    assert costs.trial_tokens == arms * 2 * (5 + 3)
    assert costs.stores["activations.zarr"] == 3 * (100 + n_tokens) * (4 * 8 * 2 + 15)
    assert costs.stores["features.zarr"] == 2 * 3 * 10 * 100 * 3 * 4
    assert costs.stores["crosscoder"] == 3 * 2 * (2 * 3 * 8 * 100 * 4)
    assert "models" not in costs.stores
    assert (costs.prompt_tokens, costs.trial_prompt_tokens) == (10 * costs.completions, 10 * costs.trial_completions)
    assert costs.hours(2.0) == (
        (costs.tokens + costs.prompt_tokens) / 7200,
        (costs.trial_tokens + costs.trial_prompt_tokens) / 7200,
    )
    twice = estimate(
        spec.model_copy(update={"extraction": ExtractionSpec(dtype="float16", layers=(1, 2))}), prompts, sizes
    )
    assert (twice.tokens, twice.trial_tokens) == (costs.tokens, 2 * costs.trial_tokens)
    grown = {name for name, size in twice.stores.items() if size == 2 * costs.stores[name]}
    assert costs.stores.keys() - grown == {"completions", "outcomes.zarr"}


def test_what_the_machine_lacks_is_a_problem(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(check_module, "is_flash_attn_2_available", lambda: False)
    change(study, device="cuda", models={"attn_implementation": "flash_attention_2"})
    found = problems(study)
    assert set(found) == {"device", "models.attn_implementation"}
    assert "torch sees no CUDA device; use 'auto' or 'cpu'" in found["device"]
    assert "needs a CUDA device and the package flash-attn" in found["models.attn_implementation"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check_module, "is_flash_attn_2_available", lambda: True)
    assert problems(study) == {}


def test_every_layer_must_be_one_of_the_models(study: Path) -> None:
    change(study, extraction={"layers": [1, 2]})
    assert problems(study) == {}
    change(study, extraction={"layers": [1, 3]})
    assert "layer 3 asked for, but Qwen3ForCausalLM has 3 layers" in problems(study)["base@0"]


def test_the_command_prints_costs_and_problems(study: Path) -> None:
    good = CliRunner().invoke(main, ["check", str(study), "--tokens-per-second", "10"])
    assert good.exit_code == 0, good.output
    assert "5 models; 3 decoder blocks of width 32." in good.output
    assert "No problems." in good.output
    assert "| what is 1 plus 0 so" in good.output
    shutil.rmtree(study / "models/sft-3")
    shutil.rmtree(study / "models/rl-4")
    bad = CliRunner().invoke(main, ["check", str(study), "--json"])
    assert bad.exit_code == 2
    found = json.loads(bad.stdout)
    assert [problem["where"] for problem in found["problems"]] == ["runs.sft.checkpoints.3", "runs.rl.checkpoints.4"]
    assert found["hours"] is None
    for command in (["run", str(study)], ["drift", str(study)]):
        stopped = CliRunner().invoke(main, command)
        assert stopped.exit_code == 2
        first, *rest = stopped.stderr.splitlines()
        assert first == "Error: 2 problems"
        assert len(rest) == 2
    assert not (study / "outcomes.zarr").exists()


def test_only_stages_that_are_to_run_are_checked(study: Path) -> None:
    change(study, crosscoders=[SPEC["crosscoders"][0] | {"readout": "joint"}, SPEC["crosscoders"][1]])  # type: ignore[index]
    assert check_study(study, stages=with_needs(["drift"])).problems == ()
    (problem,) = check_study(study, stages=with_needs(["select"])).problems
    assert problem == Problem("study.yaml", problem.message)
    assert torch.get_default_device() == torch.device("cpu")


def test_what_a_study_can_answer_is_simulated_and_kept(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def truths(size: Any, spec: Any) -> list[Any]:
        asked.append(size.n_clusters)
        return [("C1", "nothing differs", "SUPPORTED", lambda seed: "SUPPORTED" if seed % 2 else "UNDETERMINED")]

    monkeypatch.setattr(claim_power, "_truths", truths)
    command = ["check", str(study), "--simulate", "40"]
    said = CliRunner().invoke(main, command)
    assert said.exit_code == 0, said.output
    told = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    (row,) = told["claim_power"]
    assert 0 < row["power"] < 1
    assert f"C1 nothing differs SUPPORTED {row['power']:.2f}" in " ".join(said.output.split())
    assert len(asked) == 1  # the second time what is stored is shown
    assert json.loads(CliRunner().invoke(main, [*command[:2], "--json"]).stdout)["claim_power"] is None
    change(study, data={"prompts": "nowhere.csv", "train": None})
    assert CliRunner().invoke(main, command).exit_code == 2
