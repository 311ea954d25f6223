"""The stage graph: what runs, what is skipped, what is refused, what an interruption leaves."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
import yaml
from click.testing import CliRunner

from rlgen_stats.cli import main
from rlgen_stats.schemas import study as study_schema
from rlgen_stats.schemas.errors import InputError, SpecError, StageError, StoreError, StoreLockedError
from rlgen_stats.stores import Provenance, read_json, write_json
from rlgen_stats.stores.locks import exclusive
from rlgen_stats.toolkit.study import STAGES, Study, model_stages, open_for_run, run_study, stage_graph
from rlgen_stats.toolkit.study import run as run_module
from rlgen_stats.toolkit.study.stage_graph import with_needs
from rlgen_stats.toolkit.study.trials_of_other_sets import verify_set
from tests.study.conftest import MAIN, PAIR, spec_dict
from tests.study.fake_stages import CALLS, recorded, write_output  # noqa: F401 - a fixture


def change(folder: Path, **changes: Any) -> None:
    (folder / "study.yaml").write_text(yaml.safe_dump(spec_dict(**changes)))


def test_every_stage_runs_once_after_its_needs(study_folder: Path) -> None:
    run_study(study_folder)
    assert [stage.name for stage in STAGES] == CALLS
    for stage in STAGES:
        assert all(CALLS.index(need) < CALLS.index(stage.name) for need in stage.needs)
    run_study(study_folder)
    assert len(CALLS) == len(STAGES)
    assert {s.state for s in open_for_run(study_folder).status()} == {"done"}


def test_workers_have_devices_of_their_own(study_folder: Path) -> None:
    change(study_folder, device="cuda:1")
    with pytest.raises(InputError, match=r"'device' is 'cuda:1', .*; use 'auto' or 'cuda'"):
        run_study(study_folder, workers=object())
    assert CALLS == []


def test_accepting_a_readout_brings_the_trial_and_the_report_up_to_date(study_folder: Path) -> None:
    run_study(study_folder)
    folder = open_for_run(study_folder).folder.crosscoder("main")
    record = {"weights_sha256": "w", "readout": "swap", "readout_models": {"reasons": "dFVE too low"}}
    write_json(folder / "health.json", record)
    write_json(folder / "accepted.json", {"weights_sha256": "w", "by": "align"})  # says nothing about a readout
    assert {s.state for s in open_for_run(study_folder).status()} == {"done"}
    write_json(folder / "accepted.json", {"weights_sha256": "w", "by": "encode", "readout": "swap"})
    assert {s.name for s in open_for_run(study_folder).status() if s.state == "stale"} == {
        "stabilize",
        "intervene",
        "report",
    }


def test_a_trial_says_which_stages_it_waits_for(study_folder: Path) -> None:
    with pytest.raises(
        StageError, match=f"run: rlgen-stats align {study_folder} and rlgen-stats select {study_folder}"
    ):
        verify_set(study_folder, features=[1])
    run_study(study_folder)
    shutil.rmtree(study_folder / "results.zarr" / "attribution")
    with pytest.raises(StageError, match=rf"needs the stage\(s\) align done; run: rlgen-stats align {study_folder}$"):
        verify_set(study_folder, features=[1])


@pytest.mark.parametrize(
    ("changes", "reruns"),
    [
        ({"intervention": {"n_controls": 19}}, {"intervene", "report"}),
        (
            {"selection": {"score_fraction": 0.3}},
            {"significance", "select", "separation", "tokens", "replicability", "intervene", "report"},
        ),
        (
            {"crosscoders": [MAIN | {"k": 7}, PAIR]},
            {stage.name for stage in STAGES} - {"posttrain", "outcomes", "extract", "movement"},
        ),
        ({"tasks": {"math": {"template": "Q: {text}"}}}, {stage.name for stage in STAGES} - {"posttrain"}),
        ({"tasks": {"math": {"grader": "math"}}}, {stage.name for stage in STAGES} - {"posttrain"}),
        (
            {"tasks": {"math": {"role": "control"}}},
            {"significance", "select", "separation", "tokens", "replicability", "intervene", "report"},
        ),
        ({"tasks": {"math": {"role": "selection"}}}, set()),
    ],
)
def test_a_change_reruns_what_depends_on_it_and_nothing_else(
    study_folder: Path, changes: dict[str, Any], reruns: set[str]
) -> None:
    run_study(study_folder)
    CALLS.clear()
    change(study_folder, **changes)
    states = {s.name: s.state for s in open_for_run(study_folder).status()}
    assert {name for name, state in states.items() if state == "stale"} == reruns
    run_study(study_folder)
    assert set(CALLS) == reruns


def test_tasks_graders_are_the_reward_only_where_a_run_is_trained_with_one(study_folder: Path) -> None:
    keys = set()
    for method in ("grpo", "sft"):
        for tasks in ({}, {"math": {"grader": "math"}}, {"math": {"template": "Q: {text}"}}):
            runs = [{"name": "sft", "arm": "sft", "method": method}, spec_dict()["runs"][1]]
            change(
                study_folder, runs=runs, tasks=tasks, data={"train": "data/prompts.csv", "prompts": "data/prompts.csv"}
            )
            keys.add(open_for_run(study_folder).key("posttrain"))
    assert len(keys) == 3


def test_stages_pull_in_their_needs_only(study_folder: Path) -> None:
    run_study(study_folder, stages=["drift"])
    assert CALLS == ["posttrain", "outcomes", "extract", "crosscoder", "encode", "drift"]
    assert [s.name for s in with_needs(["outcomes"])] == ["posttrain", "outcomes"]
    run_study(study_folder, stages=["drift"], force=["drift"])
    assert CALLS[-1] == "drift"
    assert len(CALLS) == 7
    with pytest.raises(InputError, match="no stage is called 'dirft'; the stages are posttrain"):
        run_study(study_folder, stages=["dirft"])


def test_what_is_kept_of_each_dictionary_comes_and_goes_with_it(study_folder: Path) -> None:
    change(study_folder, crosscoders=[MAIN | {"replicates": 2}, PAIR])
    run_study(study_folder, stages=["drift"])
    second = [study_folder / "features.2.zarr", study_folder / "results.zarr" / "drift.2"]
    assert all(path.exists() for path in second)
    shutil.rmtree(second[1])
    assert open_for_run(study_folder).state("drift") == "interrupted"
    change(study_folder, crosscoders=[MAIN | {"replicates": 1}, PAIR])
    run_study(study_folder, stages=["drift"])
    assert not any(path.exists() for path in second)
    assert (study_folder / "features.zarr").exists()


def test_a_store_of_another_study_is_refused_and_untouched(study_folder: Path) -> None:
    run_study(study_folder, stages=["outcomes"])
    change(study_folder, seed=5)
    with pytest.raises(StoreError, match=r"outcomes\.zarr was written by another study.*left untouched"):
        run_study(study_folder, stages=["outcomes"])
    assert (study_folder / "outcomes.zarr/zarr.json").exists()
    change(study_folder)
    assert open_for_run(study_folder).state("outcomes") != "waiting"


@pytest.mark.parametrize("origin", [("another study", None), (None, "another key")])
def test_a_store_put_in_place_of_the_stages_own_is_not_done(
    study_folder: Path, origin: tuple[str | None, str | None]
) -> None:
    study = run_study(study_folder, stages=["drift"])
    assert study.state("outcomes") == "done"
    provenance = Provenance(origin[0] or study.study_id, origin[1] or study.key("outcomes"))
    xr.Dataset(attrs=provenance.attrs()).to_zarr(study.folder.outcomes, consolidated=False, mode="w")
    assert open_for_run(study_folder).state("outcomes") == "foreign"
    assert "outcomes      foreign" in CliRunner().invoke(main, ["status", str(study_folder)]).output
    with pytest.raises(StoreError, match=r"outcomes\.zarr was written by another study or by other settings"):
        run_study(study_folder, stages=["select"])


def test_unknown_completions_are_refused(study_folder: Path) -> None:
    (study_folder / "completions").mkdir()
    (study_folder / "completions/x.parquet").write_text("precious")
    with pytest.raises(StoreError, match="no stage of this study made it"):
        run_study(study_folder, stages=["outcomes"])
    assert (study_folder / "completions/x.parquet").read_text() == "precious"


def test_an_interrupted_stage_is_resumed_with_what_it_committed(
    study_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_study(study_folder, stages=["posttrain"])

    def dies(study: Study, key: str, progress: object) -> None:
        write_output(study, key, "outcomes.zarr")
        (study.folder.outcomes / "committed").write_text("half")
        raise KeyboardInterrupt

    working = run_module.pkgutil.resolve_name
    monkeypatch.setattr(run_module.pkgutil, "resolve_name", lambda _: dies)
    with pytest.raises(KeyboardInterrupt):
        run_study(study_folder, stages=["outcomes"])
    study = open_for_run(study_folder)
    assert [stage.state for stage in study.status()][:3] == ["done", "interrupted", "waiting"]
    monkeypatch.setattr(stage_graph, "writer_of", lambda _: 7)
    assert [stage.state for stage in study.status()][:3] == ["done", "running", "waiting"]
    (other := study.file("extract")).write_text(study.file("outcomes").read_text())
    for later, states in ((-1, ["running", "interrupted"]), (1, ["interrupted", "running"])):
        begun = study.file("outcomes").stat().st_mtime + later
        os.utime(other, (begun, begun))
        assert [stage.state for stage in study.status()][1:3] == states
    other.unlink()
    monkeypatch.setattr(run_module.pkgutil, "resolve_name", working)
    seen: list[bool] = []
    monkeypatch.setattr(
        run_module.pkgutil,
        "resolve_name",
        lambda _: lambda study, key, progress: seen.append((study.folder.outcomes / "committed").exists()),
    )
    run_study(study_folder, stages=["outcomes"])
    assert seen == [True]


def test_missing_inputs_are_named_by_their_key(study_folder: Path) -> None:
    change(study_folder, base={"path": "models/nowhere"})
    with pytest.raises(SpecError, match=r"'base\.path' names .*nowhere, which does not exist"):
        run_study(study_folder)
    sft, rl = spec_dict()["runs"]
    change(study_folder, runs=[sft | {"checkpoints": sft["checkpoints"] | {10: "gone"}}, rl])
    with pytest.raises(SpecError, match=r"'runs\.sft\.checkpoints\.10' names"):
        run_study(study_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"crosscoders": [MAIN | {"readout": "joint"}, PAIR]},
            "the stabilize stage compares different features and expects readout 'swap', 'fit' or 'own', got 'joint', "
            "whose scale differs from model to model; change the readout of crosscoder 'main'.",
        ),
        (
            {"runs": [spec_dict()["runs"][0], {"name": "rl", "arm": "rl", "checkpoints": {20: "models/rl-20"}}]},
            "the stabilize stage follows runs over their checkpoints and expects at least two, got 1 of run 'rl'; list "
            "more of its checkpoints.",
        ),
        (
            {"runs": [spec_dict()["runs"][0], {"name": "rl", "arm": "rl", "method": "grpo", "n_checkpoints": 1}]},
            "the stabilize stage follows runs over their checkpoints and expects at least two, got 1 of run 'rl'; "
            "raise its n_checkpoints.",
        ),
        (
            {"crosscoders": [MAIN]},
            "the align stage attributes features by the decoder norms of two models and expects a crosscoder with "
            "exactly two views, got main with 3; add crosscoders with views [base@0, RUN@final] and "
            "[base@0, base@halves].",
        ),
        ({"intervention": {"neutral_text": "gone.csv"}}, r"'intervention.neutral_text' names .*gone.csv, which"),
        ({"crosscoders": [MAIN, PAIR | {"weights": "gone"}]}, r"'crosscoders.pair-rl.weights' names .*gone, which"),
        (
            {"crosscoders": [MAIN, PAIR | {"corpus": "gone.csv"}]},
            r"'crosscoders.pair-rl.corpus' names .*gone.csv, which",
        ),
    ],
)
def test_what_a_later_stage_must_refuse_is_refused_before_the_first_one_runs(
    study_folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    change(study_folder, **changes)
    monkeypatch.setattr("rlgen_stats.cli.checking.check_before_run", lambda *_: None)  # these models are no models
    result = CliRunner().invoke(main, ["run", str(study_folder)])
    assert result.exit_code == 2
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith("Error: ")
    assert message in sentence or re.search(message, sentence)
    assert CALLS == []


@pytest.mark.parametrize("crosscoders", [[MAIN | {"readout": "joint"}], [MAIN]])
def test_stages_before_the_one_that_must_refuse_still_run(study_folder: Path, crosscoders: list[Any]) -> None:
    runs = [run | {"checkpoints": dict([max(run["checkpoints"].items())])} for run in spec_dict()["runs"]]
    change(study_folder, crosscoders=crosscoders, runs=runs)
    run_study(study_folder, stages=["drift"])
    assert CALLS[-1] == "drift"


def test_changed_prompts_are_another_study(study_folder: Path) -> None:
    before = open_for_run(study_folder).study_id
    with (study_folder / "data/prompts.csv").open("a") as handle:
        handle.write("b,2 + 2,4,math,in\n")
    assert open_for_run(study_folder).study_id != before


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("README.md", False),
        ("optimizer.pt", False),
        ("trainer_state.json", False),
        ("training_args.bin", False),
        ("config.json", True),
        ("generation_config.json", True),
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("pytorch_model.bin", True),
        ("adapter_config.json", True),
        ("adapter_model.safetensors", True),
        ("tokenizer.json", True),
        ("tokenizer_config.json", True),
        ("chat_template.jinja", True),
        ("spiece.model", True),
    ],
)
def test_only_what_a_model_is_made_of_makes_another_study(study_folder: Path, name: str, counts: bool) -> None:
    before = run_study(study_folder, stages=["outcomes"])
    for model in ("base", "rl-10"):
        (study_folder / "models" / model / name).write_text("another")
    after = open_for_run(study_folder)
    assert (after.study_id != before.study_id) is counts
    assert (after.state("outcomes") != "done") is counts


def test_how_models_are_loaded_is_in_the_keys_and_its_default_is_not(study_folder: Path) -> None:
    """Studies finished before the section existed read models in float32 and stay up to date."""
    before = run_study(study_folder, stages=["outcomes"])
    change(study_folder, models={"dtype": "float32", "device_map": None, "attn_implementation": None})
    assert open_for_run(study_folder).state("outcomes") == "done"
    for changed in ({"dtype": "auto"}, {"attn_implementation": "eager"}, {"device_map": "auto"}):
        change(study_folder, models=changed)
        after = open_for_run(study_folder)
        assert after.state("posttrain") == "done"  # checkpoints made elsewhere
        assert after.state("outcomes") == "stale"
        for stage in ("extract", "crosscoder", "movement", "encode", "tokens", "intervene"):
            assert after.key(stage) != before.key(stage)


def test_only_what_graders_do_is_in_the_keys(study_folder: Path) -> None:
    def key(grader: Any) -> str:
        change(study_folder, tasks={"math": {"grader": grader}})
        return open_for_run(study_folder).key("outcomes")

    short = key("choice_loglik")
    assert key({"name": "choice_loglik", "options": "texts", "normalize": "none"}) == short
    assert key({"name": "choice_loglik", "normalize": "characters"}) != short
    assert key({"name": "choice_loglik", "options": "letters"}) != short


def test_a_new_version_of_a_grader_concerns_who_uses_it(study_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keys() -> list[str]:
        found = []
        for grader in ("exact", "math"):
            change(study_folder, tasks={"math": {"grader": grader}})
            found.append(open_for_run(study_folder).key("outcomes"))
        return found

    before = keys()
    monkeypatch.setattr(study_schema, "GRADER_VERSIONS", {"math": 99})
    after = keys()
    assert (before[0] == after[0], before[1] == after[1]) == (True, False)


def test_how_prompts_are_read_counts_where_it_is_read(study_folder: Path) -> None:
    """Of base in outcomes, of runs in training too; a field at its default in no key."""
    runs = spec_dict()["runs"]
    before = run_study(study_folder, stages=["outcomes"])
    change(study_folder, base={"path": "models/base", "chat_template": "none", "system": None})
    assert open_for_run(study_folder).key("outcomes") == before.key("outcomes")
    change(study_folder, base={"path": "models/base", "chat_template": "chat.jinja"})
    with pytest.raises(SpecError, match=r"'base\.chat_template' names .*chat\.jinja, which does not exist"):
        open_for_run(study_folder).key("outcomes")
    keys = []
    for text in ("one", "two"):
        (study_folder / "chat.jinja").write_text(text)
        changed = open_for_run(study_folder)
        assert changed.key("posttrain") == before.key("posttrain")
        keys.append(changed.key("outcomes"))
    assert len({before.key("outcomes"), *keys}) == 3
    change(study_folder, runs=[runs[0] | {"chat_template": "chat.jinja"}, *runs[1:]])
    keys = [open_for_run(study_folder).key("posttrain")]
    (study_folder / "chat.jinja").write_text("three")
    keys.append(open_for_run(study_folder).key("posttrain"))
    assert len({before.key("posttrain"), *keys}) == 3


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("seconds", "asked"), [(600.0, False), (601.0, True)])
def test_what_took_long_is_not_deleted_without_a_yes(
    study_folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, asked: bool, finished: bool
) -> None:
    monkeypatch.setattr("rlgen_stats.cli.checking.check_before_run", lambda *_: None)
    study = run_study(study_folder, stages=["outcomes"])
    study.write_record("outcomes", **read_json(study.file("outcomes")) | {"seconds": seconds, "finished": finished})
    change(study_folder, generation={"n_samples": 3})
    answers: list[str] = []
    if asked:
        with pytest.raises(InputError, match=r"outcomes \(10 minutes of work\) would be deleted and made anew.*--yes"):
            run_study(study_folder, replace=lambda costs: bool(answers.append(costs)))
        assert open_for_run(study_folder).state("outcomes") == ("stale" if finished else "interrupted")
        assert CliRunner().invoke(main, ["run", str(study_folder), "--stage", "outcomes"]).exit_code == 2
        assert CliRunner().invoke(main, ["run", str(study_folder), "--stage", "outcomes", "--yes"]).exit_code == 0
    else:
        run_study(study_folder, stages=["outcomes"], replace=lambda costs: bool(answers.append(costs)))
    assert len(answers) == asked
    assert open_for_run(study_folder).state("outcomes") == "done"


def test_the_time_of_an_interrupted_run_counts(study_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: float(next(clock)))
    resolve = run_module.pkgutil.resolve_name

    def dying(function: str) -> Any:
        def call(study: Study, key: str, progress: object) -> None:
            raise KeyboardInterrupt

        return call

    monkeypatch.setattr(run_module.pkgutil, "resolve_name", dying)
    with pytest.raises(KeyboardInterrupt):
        run_study(study_folder, stages=["posttrain"])
    assert read_json(study_folder / "stages/posttrain.json")["seconds"] == 100
    monkeypatch.setattr(run_module.pkgutil, "resolve_name", resolve)
    run_study(study_folder, stages=["posttrain"])
    assert read_json(study_folder / "stages/posttrain.json")["seconds"] == 200


def test_two_runs_at_once_are_refused(study_folder: Path) -> None:
    (study_folder / "stages").mkdir()
    with exclusive(study_folder / "stages/run"), pytest.raises(StoreLockedError, match="one writer at a time"):
        run_study(study_folder)


def test_record_keeps_time_and_key(study_folder: Path) -> None:
    study = run_study(study_folder, stages=["posttrain"])
    record = read_json(study_folder / "stages/posttrain.json")
    assert record["finished"]
    assert record["key"] == study.key("posttrain")
    assert record["seconds"] >= 0


def test_a_run_folder_that_a_killed_process_left_half_claimed_or_half_deleted_is_no_obstacle(
    study_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_for_run(study_folder)
    run = study.spec.runs[0]
    folder = study.folder.run(run.name)
    folder.mkdir()
    (folder / ".key.json.0123abcd.partial").write_text("{")
    with study.being_written():
        model_stages._claim_run(study, run)
    key = read_json(folder / "key.json")
    (folder / "step-5").mkdir()
    (folder / "step-5/weights").write_text("")
    write_json(folder / "key.json", key | {"key": "another"})

    def dies(path: Path, **how: Any) -> None:
        if path.exists():
            next(path.rglob("key.json")).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            model_stages._claim_run(study, run)
    with study.being_written():
        model_stages._claim_run(study, run)
    assert read_json(folder / "key.json") == key
    assert not (folder / "step-5").exists()
    assert not list(folder.parent.glob(".*"))
    (folder / "key.json").unlink()
    (folder / "step-5").mkdir()
    with pytest.raises(StageError, match="holds checkpoints that this study did not train"):
        model_stages._claim_run(study, run)
