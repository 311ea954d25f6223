"""Patterns of checkpoints and relative layers in study.yaml, in folders and on the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from rlgen_stats.schemas.errors import ModelError, SpecError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, read_json
from rlgen_stats.stores.hub import hub_folder, locate_checkpoint, locate_table
from rlgen_stats.stores.prompts import load_prompts
from rlgen_stats.stores.study_models import list_models
from rlgen_stats.toolkit.extraction.checkpoints import check_weights, load_model
from rlgen_stats.toolkit.study import read_spec
from rlgen_stats.toolkit.study.check_study import check_study
from rlgen_stats.toolkit.study.run import open_for_run
from tests.study.conftest import COMMIT, Hub, spec_dict


def with_runs(folder: Path, checkpoints: Any, **changes: Any) -> StudySpec:
    runs = spec_dict()["runs"]
    content = spec_dict(runs=[runs[0], runs[1] | {"checkpoints": checkpoints}]) | changes
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    return read_spec(folder)


def make(root: Path, *folders: str) -> None:
    for folder in folders:
        (root / folder).mkdir(parents=True)
        (root / folder / "config.json").write_text("{}")


def test_a_pattern_of_folders_is_a_list_of_checkpoints(study_folder: Path) -> None:
    make(study_folder, *(f"runs/rl/global_step_{step}/hf" for step in (0, 5, 10, 100)))
    (study_folder / "runs/rl/global_step_7").mkdir()  # without hf
    (study_folder / "runs/rl/global_step_8").write_text("no folder")
    written = {step: f"runs/rl/global_step_{step}/hf" for step in (5, 10, 100)}
    for pattern in ("runs/rl/global_step_*/hf", "runs/rl/*/hf", "runs/rl/*/hf/", "runs/*/global_step_*/h*"):
        assert with_runs(study_folder, pattern).runs[1].checkpoints == written  # by step, not by name; 0 is base
    absolute = with_runs(study_folder, str(study_folder / "runs/rl/global_step_*/hf"))
    assert absolute.runs[1].checkpoints == {step: str(study_folder / path) for step, path in written.items()}
    key = open_for_run(study_folder).key("outcomes")
    with_runs(study_folder, {step: str(study_folder / path) for step, path in written.items()})
    assert open_for_run(study_folder).key("outcomes") == key
    assert [ref.step for ref in list_models(read_spec(study_folder), StudyFolder(study_folder))][3:] == [5, 10, 100]


@pytest.mark.parametrize(
    ("folders", "pattern", "message"),
    [
        (["rl/step-1"], "rl/step-1", r"'rl/step-1' has no '\*'; expected a pattern such as .*or a mapping"),
        (["rl/step-1"], "rl/other-*", r"'rl/other-\*' matches no folder of .*study; correct the pattern"),
        (["rl/step-0"], "rl/step-*", "matches no folder"),
        (["rl/best"], "rl/*", r"matches rl/best, where '\*' stands for 'best' and not for one number"),
        (["rl/4b-step-10"], "rl/*", r"stands for '4b-step-10' and not for one number, the step; write more"),
        (["a/1/step-2"], "a/*/step-*", r"stands for '1', '2' and not for one number"),
        (["rl/step-10", "rl/step-010"], "rl/step-*", r"matches rl/step-010 and rl/step-10 for step 10; write more"),
    ],
)
def test_patterns_that_do_not_tell_the_step_are_refused(
    study_folder: Path, folders: list[str], pattern: str, message: str
) -> None:
    make(study_folder, *folders)
    with pytest.raises(SpecError, match=message):
        with_runs(study_folder, pattern)


@pytest.mark.parametrize(
    ("layer", "config", "block"),
    [
        ("middle", {"num_hidden_layers": 36}, 18),
        (0.5, {"num_hidden_layers": 36}, 18),
        (0.5, {"num_hidden_layers": 7}, 3),
        ("middle", {"n_layer": 12}, 6),
        (0.99, {"text_config": {"num_hidden_layers": 10}, "num_hidden_layers": 3}, 9),
        (0.01, {"num_hidden_layers": 10}, 0),
        (4, {"num_hidden_layers": 10}, 4),
    ],
)
def test_a_layer_may_be_relative_to_bases_depth(study_folder: Path, layer: Any, config: Any, block: int) -> None:
    (study_folder / "models/base/config.json").write_text(json.dumps(config))
    spec = with_runs(study_folder, spec_dict()["runs"][1]["checkpoints"], extraction={"layer": layer})
    assert spec.extraction.layer == block


def test_several_layers_may_be_relative_and_must_differ(study_folder: Path) -> None:
    (study_folder / "models/base/config.json").write_text('{"num_hidden_layers": 36}')
    checkpoints = spec_dict()["runs"][1]["checkpoints"]
    spec = with_runs(study_folder, checkpoints, extraction={"layers": [0.25, 4, "middle"]})
    assert (spec.extraction.layer, spec.extraction.layers) == (9, (9, 4, 18))
    with pytest.raises(SpecError, match=r"got block 18 more than once in \[18, 4, 18\]"):
        with_runs(study_folder, checkpoints, extraction={"layers": [0.5, 4, "middle"]})
    with pytest.raises(SpecError, match="not both"):
        with_runs(study_folder, checkpoints, extraction={"layers": [0.5], "layer": "middle"})
    with pytest.raises(SpecError, match=r"'extraction\.layers\.1': .*integer.*got 'last'"):
        with_runs(study_folder, checkpoints, extraction={"layers": [0.5, "last"]})


@pytest.mark.parametrize(
    ("layer", "config", "message"),
    [
        (
            "middle",
            "{}",
            r"relative to base's depth, but .*config\.json has none of num_hidden_layers.*write the",
        ),
        ("middle", "half", r"relative to base's depth, but .*config\.json cannot be read"),
        (1.5, "{}", r"'extraction\.layer': .*integer.*got 1\.5"),
        ("last", "{}", r"'extraction\.layer': .*integer.*got 'last'"),
    ],
)
def test_layers_that_mean_no_block_are_refused(study_folder: Path, layer: Any, config: str, message: str) -> None:
    (study_folder / "models/base/config.json").write_text(config)
    with pytest.raises(SpecError, match=message):
        with_runs(study_folder, spec_dict()["runs"][1]["checkpoints"], extraction={"layer": layer})


# -- the Hub ----------------------------------------------------------------------------------------------------------


def test_a_trajectory_on_the_hub_is_pinned_downloaded_and_loaded(study_folder: Path, hub: Hub) -> None:
    spec = with_runs(study_folder, "hf://org/model@dev/step-*", base={"path": "hf://org/model"})
    assert spec.runs[1].checkpoints == {10: "hf://org/model@dev/step-0010", 200: "hf://org/model@dev/step-0200"}
    assert hub.calls == ["info org/model@dev"]  # nothing is downloaded to read a study
    study = open_for_run(study_folder)
    key = study.key("outcomes")
    assert hub.calls == ["info org/model@dev", "info org/model@main"]
    refs = {ref.model: ref for ref in list_models(spec, study.folder)}
    assert (refs["rl@200"].path / "tokenizer.json").exists()
    assert "safetensors" not in " ".join(hub.calls)  # weights when they are loaded
    check_weights(refs["rl@200"], download=False)
    assert "safetensors" not in " ".join(hub.calls)
    assert load_model(refs["rl@200"]).num_parameters()
    downloaded = " ".join(hub.calls[2:])
    assert "step-0200/model.safetensors" in downloaded
    assert "step-0010/model.safetensors" not in downloaded
    assert "README" not in downloaded
    assert "pytorch_model.bin" not in downloaded

    n_calls, hub.commit, hub.online = len(hub.calls), COMMIT[::-1], False  # the branch moves; the study stays
    again = open_for_run(study_folder)
    assert again.key("outcomes") == key
    assert [ref.path for ref in list_models(again.spec, again.folder)] == [ref.path for ref in refs.values()]
    assert len(hub.calls) == n_calls
    record = study.folder.stages / "hub.json"
    assert read_json(record)["org/model@dev"]["commit"] == COMMIT
    record.unlink()
    hub.online = True
    assert open_for_run(study_folder).key("outcomes") != key


def test_without_a_network_the_cache_answers_or_a_sentence(study_folder: Path, hub: Hub) -> None:
    folder, hub.online = StudyFolder(study_folder), False
    with pytest.raises(ModelError, match=r"hf://org/model@main is neither given by the Hub \(no route to host\) nor"):
        locate_checkpoint("hf://org/model", folder)
    hub.online = True
    place = Path(hub.snapshot_download("org/model", revision=COMMIT, allow_patterns=["config.json", "tokenizer.json"]))
    (place.parents[1] / "refs" / "main").write_text(COMMIT)
    hub.online = False
    assert hub_folder("hf://org/model", folder).commit == COMMIT
    assert locate_checkpoint("hf://org/model", folder) == place
    with pytest.raises(ModelError, match=r"no checkpoint in 'step-0010' at commit 0123456789ab; expected config"):
        locate_checkpoint("hf://org/model/step-0010", folder)


def test_a_download_that_fails_is_a_sentence(study_folder: Path, hub: Hub) -> None:
    folder = StudyFolder(study_folder)
    hub_folder("hf://org/model", folder)
    hub.online = False
    with pytest.raises(ModelError, match=r"hf://org/model cannot be downloaded \(no route to host\); check access"):
        locate_checkpoint("hf://org/model", folder)
    for path in ("hf://model", "hf://org/model@", "hf:///model"):
        with pytest.raises(ModelError, match="is no model of the Hub; expected hf://OWNER/NAME"):
            locate_checkpoint(path, folder)
    slashed = "hf://org/model@refs%2Fpr%2F3/step-0010"
    hub.online = True
    assert hub_folder(slashed, folder).subfolder == "step-0010"
    assert hub.calls[-1] == "info org/model@refs/pr/3"


def test_prompts_of_the_hub_are_pinned_and_decide_the_keys(study_folder: Path, hub: Hub) -> None:
    rows = pd.DataFrame({"prompt_id": list("abcd"), "text": "1 + 1", "answer": "2", "task": "math", "domain": "in"})
    for number in range(2):
        rows[2 * number : 2 * number + 2].to_parquet(hub.files / f"test-0000{number}-of-00002.parquet")
    (hub.files / "data").mkdir()
    rows.to_csv(hub.files / "data" / "train.tsv", sep="\t", index=False)
    local = open_for_run(study_folder).key("outcomes")
    keys = {}
    for path, n in (("test", 4), ("test-00000-of-00002.parquet", 2), ("data/train.tsv", 4), ("data", 4)):
        named = {"prompts": f"hf://datasets/org/rows@dev/{path}", "train": None}
        (study_folder / "study.yaml").write_text(yaml.safe_dump(spec_dict(data=named)))
        study = open_for_run(study_folder)
        keys[path] = study.key("outcomes")
        assert len(load_prompts(study.spec, study.folder)) == n
        assert not [one for one in check_study(study_folder).problems if one.where.startswith("data")]
    assert len({local, *keys.values()}) == 5
    assert [call for call in hub.calls if "info" in call] == ["info datasets/org/rows@dev"]
    assert "safetensors" not in " ".join(hub.calls)
    hub.commit = COMMIT[::-1]  # the branch moves; the study stays
    assert open_for_run(study_folder).key("outcomes") == keys["data"]
    (study_folder / "stages" / "hub.json").unlink()
    assert open_for_run(study_folder).key("outcomes") != keys["data"]


def test_tables_that_the_hub_has_not_are_named(hub: Hub) -> None:
    (hub.files / "train.jsonl").write_text('{"text": "a"}')
    for path in ("hf://datasets/org/rows", "hf://datasets/org/rows/tr", "hf://datasets/org/rows/train.parquet"):
        with pytest.raises(ModelError, match=r"hf://datasets/org/rows has no table .*; it has train.jsonl, "):
            locate_table(path)
    assert locate_table("hf://datasets/org/rows/train.jsonl").read_text() == '{"text": "a"}'
    with pytest.raises(ModelError, match="is no model of the Hub"):
        locate_table("hf://datasets/org/rows/../../x.csv")
    assert locate_table("rows.csv") == Path("rows.csv")


def test_a_name_of_the_hub_without_its_scheme_is_recognised(study_folder: Path) -> None:
    with_runs(study_folder, spec_dict()["runs"][1]["checkpoints"], base={"path": "Qwen/Qwen3-4B"})
    with pytest.raises(SpecError, match=r"does not exist; .*or write hf://Qwen/Qwen3-4B for the model of the Hub"):
        open_for_run(study_folder)
