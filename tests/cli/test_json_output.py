"""Every command's ``--json`` is of its declared type; stages begin with their result and end with the plan."""

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from pydantic import TypeAdapter, ValidationError

from rlgen_stats.cli import main
from rlgen_stats.schemas.command_output import OUTPUTS, output_document
from rlgen_stats.stores import write_json
from rlgen_stats.toolkit.crosscoder import Crosscoder
from rlgen_stats.toolkit.study import STAGES, run_study
from tests.cli.json_output import commands, printed
from tests.crosscoder.interop.hub_stand_in import Repositories, hub  # noqa: F401 - a fixture
from tests.exchange.published_rows import LAYOUTS
from tests.study.conftest import study_folder  # noqa: F401 - a fixture
from tests.study.fake_stages import CALLS, recorded  # noqa: F401 - a fixture

OF_STAGES = [stage.name for stage in STAGES]
ROOT = Path(__file__).parents[1]


def test_every_command_with_json_is_declared_and_no_other() -> None:
    with_json = {name for name, one in commands().items() if any(p.name == "as_json" for p in one.params)}
    assert with_json == set(OUTPUTS)
    assert set(commands()) - with_json == {"schema", "view"}, "one prints JSON already, one serves pages"


def test_every_command_is_checked_here_or_in_the_mini_study() -> None:
    tests = [Path(__file__), ROOT / "end_to_end/test_mini.py"]
    named = {name for file in tests for name in re.findall(r'printed\("([\w -]+)"', file.read_text(encoding="utf-8"))}
    assert named | set(OF_STAGES) == set(OUTPUTS)


def test_a_stage_prints_its_result_first_and_the_plan_last(study_folder: Path) -> None:  # noqa: F811
    run_study(study_folder)
    for name in OF_STAGES:
        record = study_folder / "stages" / f"{name}.json"
        write_json(record, json.loads(record.read_text()) | {"facts": {"drifting": {"1": {"rl@10": 3}}}})
        document = printed(name, study_folder, "--quiet")
        assert list(document) == ["result", "linked", "study", "study_id", "plan"]
        assert (document["result"]["stage"], document["result"]["state"]) == (name, "done")
        assert document["result"]["facts"] == {"drifting": {"1": {"rl@10": 3}}}
        assert [stage["name"] for stage in document["plan"]] == OF_STAGES
    assert len(CALLS) == len(STAGES), "up to date: nothing ran again"


def test_run_prints_the_last_stage_asked_for(study_folder: Path) -> None:  # noqa: F811
    run_study(study_folder)
    assert printed("run", study_folder, "--quiet")["result"]["stage"] == "report"
    asked = ("--stage", "drift", "--stage", "movement")
    assert printed("run", study_folder, "--quiet", *asked)["result"]["stage"] == "movement"
    assert [stage["name"] for stage in printed("status", study_folder)["stages"]] == OF_STAGES
    write_json(
        study_folder / "report/report.json",
        {"claims": [dict.fromkeys(("id", "statement", "verdict", "answer", "more"), "x")]},
    )
    (verdict,) = printed("report", study_folder, "--quiet")["result"]["verdicts"]
    assert "more" not in verdict


def test_a_dry_run_answers_before_any_stage_has_run(study_folder: Path) -> None:  # noqa: F811
    prompts = pd.DataFrame({"prompt_id": [f"p{i}" for i in range(40)], "text": "1 + 1", "answer": "2"})
    prompts.assign(task="math", domain="in").to_csv(study_folder / "data/prompts.csv", index=False)
    document = printed("intervene", study_folder, "--dry-run", "--direction", "disable")
    assert document["waiting_for"] == ["posttrain", "outcomes", "extract", "encode", "align", "select"]
    assert (document["features"], document["seconds"], set(document["arms"])) == (None, None, {"disable"})
    both = printed("intervene", study_folder, "--dry-run")
    assert both["completions"] == 3 * 2 * document["completions"] > 0, "three dictionaries, two directions"
    assert CALLS == []


def test_commands_before_a_study_runs(study_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    assert printed("init", tmp_path / "mine")["file"] == str(tmp_path / "mine/study.yaml")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in LAYOUTS["piqa", "ybisk/piqa"]))
    assert printed("tasks add", tmp_path / "mine", "piqa", "--from", rows)[0]["n_prompts"] == 2
    assert "piqa" in printed("tasks")
    assert printed("check", study_folder, code=2)["problems"]


def test_commands_about_numbers(tmp_path: Path) -> None:
    for name, right in (("a", [0, 1, 0, 0]), ("b", [1, 1, 0, 1])):
        pd.DataFrame({"prompt": list("wxyz"), "correct": right}).to_csv(tmp_path / f"{name}.csv", index=False)
    compared = printed("compare-outcomes", tmp_path / "a.csv", tmp_path / "b.csv")
    assert compared["difference"]["data"][0] == pytest.approx(0.5)
    assert printed("power", "--runs", "1")["arms"][0]["power_moderated"] is None, "NaN is null"
    small = ("--prompts", "20", "--features", "4", "--checkpoints", "1", "--runs", "1")
    assert printed("simulate", tmp_path / "planted", *small)["planted"]["null"] >= 0
    assert printed("verify", tmp_path / "planted")["ok"]
    (analysis,) = printed("inspect", tmp_path / "planted", "truth").values()
    assert sum(analysis["summary"]["kind"].values()) == 4


def test_commands_about_stores_and_weights(tmp_path: Path) -> None:
    with tarfile.open(ROOT / "stores/data/v1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    assert printed("migrate", tmp_path / "v1")["features.zarr"] == {"before": 1, "now": 2}
    assert printed("inspect", tmp_path / "v1")["activations.zarr"]["tokens"] == 150
    labels = pd.DataFrame(
        {"prompt": ["p"] * 4, "position": range(4), "token_id": 0, "segment": "completion", "task": "t"}
    )
    labels.assign(domain="in", split="selection", cluster="c").to_csv(tmp_path / "labels.csv", index=False)
    np.save(tmp_path / "cache.npy", np.ones((4, 3), np.float32))
    place = ("--into", tmp_path / "a.zarr", "--model", "rl@4", "--site", "block1", "--quiet")
    assert printed("import", tmp_path / "cache.npy", "--labels", tmp_path / "labels.csv", *place)["n_tokens"] == 4
    assert printed("export", tmp_path / "a.zarr", "--to", tmp_path / "out")["n_tokens"] == 4
    views = ("base@0", "rl@4")
    crosscoder = Crosscoder(views, width=4, n_features=8, sparsity="batchtopk", k=2)
    crosscoder.threshold.fill_(0.1)
    crosscoder.save(tmp_path / "main")
    assert printed("export-crosscoder", tmp_path / "main", "--to", tmp_path / "theirs")
    named = [part for view in views for part in ("--view", view)]
    assert printed("import-crosscoder", tmp_path / "theirs", *named, "--to", tmp_path / "ours")["n_features"] == 8


def test_commands_about_the_hub(tmp_path: Path, hub: Repositories) -> None:  # noqa: F811
    Crosscoder(("base@0", "rl@4"), width=4, n_features=8, sparsity="l1", k=2).save(tmp_path / "main")
    assert printed("push-crosscoder", tmp_path / "main", "me/main")["commit"].startswith(f"{hub.address}/me/main/")
    assert printed("pull-crosscoder", "me/main", "--to", tmp_path / "pulled")["folder"] == str(tmp_path / "pulled")


def test_a_document_with_another_key_is_refused() -> None:
    wrong: dict[str, Any] = {"path": "x", "n_arrays": 1, "n_chunks": 1, "problems": [], "notes": [], "ok": True}
    TypeAdapter(OUTPUTS["verify"]).validate_python(wrong)
    with pytest.raises(ValidationError, match="Extra inputs"):
        TypeAdapter(OUTPUTS["verify"]).validate_python(wrong | {"new": 1})


def test_the_schema_names_every_command() -> None:
    document = output_document()
    assert set(document["commands"]) == set(OUTPUTS)
    assert document["commands"]["drift"] == {"$ref": "#/$defs/StageOutput"}
    assert next(iter(document["$defs"]["StageOutput"]["properties"])) == "result"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--set", "best"), "the sets are selected, rising, confirmed, candidate, paper, got 'best'"),
        (("--set", ""), "the sets are selected, rising, confirmed, candidate, paper, got ''"),
        (("--features", "-1"), "feature ids run from 0 to"),
        (("--features", "99999999999999999999"), "feature ids run from 0 to"),
        (("--set", "paper", "--features", "1"), "name a set or features, one of the two"),
        (("--dictionary", "0"), "dictionaries are numbered 1 to"),
        (("--dictionary", "4"), "dictionaries are numbered 1 to 3, got 4"),
        (("--dose", "-0.1"), "a dose multiplies activations by 0 to 1000, got -0.1"),
        (("--dose", "1000.1"), "a dose multiplies activations by 0 to 1000, got 1000.1"),
    ],
)
def test_a_dry_run_before_any_stage_refuses_what_the_run_would(
    study_folder: Path,  # noqa: F811
    asked: tuple[str, ...],
    said: str,
) -> None:
    prompts = pd.DataFrame({"prompt_id": [f"p{i}" for i in range(40)], "text": "1 + 1", "answer": "2"})
    prompts.assign(task="math", domain="in").to_csv(study_folder / "data/prompts.csv", index=False)
    refused = CliRunner().invoke(main, ["intervene", str(study_folder), "--dry-run", *asked])
    assert refused.exit_code == 2
    assert said in refused.stderr
    for sound in (
        ("--set", "paper"),
        ("--set", "rising"),
        ("--features", "0"),
        ("--dictionary", "3"),
        ("--dose", "0", "--dose", "1000"),
    ):
        assert CliRunner().invoke(main, ["intervene", str(study_folder), "--dry-run", *sound]).exit_code == 0
