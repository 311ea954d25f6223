"""Stages that are forced to run anew: what was computed from their old output is out of date, whatever happens next."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.stores import read_json
from rlgen_stats.toolkit.study import STAGES, Study, open_for_run, run_study
from rlgen_stats.toolkit.study import run as run_module
from rlgen_stats.toolkit.study.stage_graph import BY_NAME, with_needs
from tests.study.conftest import spec_dict
from tests.study.fake_stages import CALLS, recorded, write_output  # noqa: F401 - a fixture
from tests.study.test_linked_studies import DPO, OF_PAIR, OF_TARGET, THREE

BEFORE_CROSSCODER = {"posttrain", "outcomes", "extract", "movement"}
AFTER_CROSSCODER = {stage.name for stage in STAGES} - BEFORE_CROSSCODER - {"crosscoder"}


def stale(study: Study) -> set[str]:
    return {stage.name for stage in study.status() if stage.state == "stale"}


def run_until_killed_in(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[frozenset[str]]:
    """A run that is killed after a stage wrote its output; what was forced at the call of each stage until then."""
    working, seen = run_module.pkgutil.resolve_name, []

    def resolve(function: str) -> Any:
        def call(study: Study, key: str, progress: object) -> None:
            seen.append(study.forced)
            working(function)(study, key, progress)
            if function == BY_NAME[name].function:
                raise KeyboardInterrupt

        return call

    with monkeypatch.context() as patch:
        patch.setattr(run_module.pkgutil, "resolve_name", resolve)
        with pytest.raises(KeyboardInterrupt):
            run_study(folder, **options)
    return seen


def test_what_read_a_forced_stage_runs_again_in_the_same_run(study_folder: Path) -> None:
    run_study(study_folder)
    CALLS.clear()
    run_study(study_folder, force=["crosscoder"])
    assert set(CALLS) == {"crosscoder"} | AFTER_CROSSCODER
    run_study(study_folder)
    assert len(CALLS) == 1 + len(AFTER_CROSSCODER)


@pytest.mark.parametrize("killed", [False, True])
def test_what_read_a_forced_stage_runs_again_in_a_later_run(
    study_folder: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    run_study(study_folder)
    old = open_for_run(study_folder).record("drift")["key"]
    if killed:
        run_until_killed_in("encode", study_folder, monkeypatch, force=["crosscoder"])
    else:
        run_study(study_folder, stages=["crosscoder"], force=["crosscoder"])
    study = open_for_run(study_folder)
    assert stale(study) == AFTER_CROSSCODER - ({"encode"} if killed else set())
    assert study.state("encode") == ("interrupted" if killed else "stale")
    assert study.state("crosscoder") == "done"
    assert study.key("drift") != old
    CALLS.clear()
    run_study(study_folder)
    assert set(CALLS) == AFTER_CROSSCODER
    assert {s.state for s in open_for_run(study_folder).status()} == {"done"}


def test_a_forced_stage_that_was_killed_goes_on_where_it_was(
    study_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_study(study_folder)
    run_until_killed_in("outcomes", study_folder, monkeypatch, force=["outcomes"])
    (study_folder / "outcomes.zarr" / "committed").write_text("half")
    assert open_for_run(study_folder).state("outcomes") == "interrupted"
    assert stale(open_for_run(study_folder)) == {stage.name for stage in STAGES} - {"posttrain", "outcomes"}
    seen: list[bool] = []

    def resolve(function: str) -> Any:
        return lambda study, key, progress: seen.append((study.folder.outcomes / "committed").exists())

    monkeypatch.setattr(run_module.pkgutil, "resolve_name", resolve)
    run_study(study_folder, stages=["outcomes"])
    run_study(study_folder, stages=["outcomes"], force=["outcomes"])
    assert seen == [True, False]


def test_a_force_that_was_not_carried_out_is_carried_out_by_the_next_run(
    study_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_study(study_folder)
    run_until_killed_in("extract", study_folder, monkeypatch, force=["extract", "crosscoder"])
    seen = run_until_killed_in("encode", study_folder, monkeypatch)
    assert seen == [{"crosscoder"}] * 3  # extract, begun before, goes on; crosscoder starts anew; encode
    assert run_until_killed_in("encode", study_folder, monkeypatch) == [frozenset()]


def test_a_forced_stage_makes_every_contrast_run_again(study_folder: Path) -> None:
    text = yaml.safe_dump(spec_dict(runs=[*spec_dict()["runs"], DPO]) | THREE)
    (study_folder / "study.yaml").write_text(text)
    run_study(study_folder)
    run_study(study_folder, stages=["crosscoder"], force=["crosscoder"])
    study = open_for_run(study_folder)
    for one in (study, *study.linked):
        assert stale(one) == AFTER_CROSSCODER
    CALLS.clear()
    run_study(study_folder)
    assert {name: CALLS.count(name) for name in OF_PAIR} == dict.fromkeys(OF_PAIR, 3)
    assert {name: CALLS.count(name) for name in OF_TARGET} == dict.fromkeys(OF_TARGET, 2)
    assert CALLS.count("crosscoder") == 0
    for one in (study, *study.linked):
        assert {s.state for s in one.status()} == {"done"}
        assert one.record("report")["key"] == one.key("report")
    CALLS.clear()
    run_study(study_folder, force=["select"])  # of the first contrast and of those with another second run
    assert CALLS.count("select") == 2
    assert CALLS.count("drift") == 0


def test_only_what_has_run_and_is_asked_for_can_be_forced(study_folder: Path) -> None:
    fresh = open_for_run(study_folder)
    run_study(study_folder, stages=["extract"], force=["extract", "drift"])
    study = open_for_run(study_folder)
    assert study.key("extract") == fresh.key("extract")  # nothing was there to be replaced
    assert not study.folder.forced.exists()
    with pytest.raises(InputError, match="no stage is called 'dirft'"):
        run_study(study_folder, force=["dirft"])
    run_study(study_folder, stages=["extract"], force=["extract", "outcomes"])
    assert read_json(study.folder.forced) == {"extract": 1, "outcomes": 1}


def test_a_forced_posttrain_trains_again(study_folder: Path) -> None:
    runs = [run | {"method": "sft", "checkpoints": {}} for run in spec_dict()["runs"]]
    (study_folder / "data/train.csv").write_text("prompt_id,text,answer\n")
    spec = spec_dict(runs=runs, data={"prompts": "data/prompts.csv", "train": "data/train.csv"})
    (study_folder / "study.yaml").write_text(yaml.safe_dump(spec))
    run_study(study_folder, stages=["posttrain"])
    before = open_for_run(study_folder)
    run_study(study_folder, stages=["posttrain"], force=["posttrain"])
    after = open_for_run(study_folder)
    run = after.spec.runs[0]
    assert after.training_key(run) != before.training_key(run)
    assert after.study_id == before.study_id


@pytest.mark.parametrize(("answer", "calls"), [(False, set()), (True, {"crosscoder"} | AFTER_CROSSCODER)])
def test_forcing_a_stage_asks_for_what_took_long_after_it(study_folder: Path, answer: bool, calls: set[str]) -> None:
    study = run_study(study_folder)
    for name in ("crosscoder", "intervene"):
        study.write_record(name, **{**study.record(name), "seconds": 601.0})
    CALLS.clear()
    asked: list[str] = []

    def replace(costs: str) -> bool:
        asked.append(costs)
        return answer

    if answer:
        run_study(study_folder, force=["crosscoder"], replace=replace)
    else:
        with pytest.raises(InputError, match=r"nothing was deleted\. Take the change back or leave --force out"):
            run_study(study_folder, force=["crosscoder"], replace=replace)
        assert {s.state for s in open_for_run(study_folder).status()} == {"done"}
    assert set(CALLS) == calls
    assert "intervene (10 minutes of work)" in asked[0]
    assert "crosscoder (" not in asked[0]


def test_stages_downstream_are_those_that_need_it() -> None:
    assert {s.name for s in STAGES if "crosscoder" in {n.name for n in with_needs([s.name])}} == AFTER_CROSSCODER | {
        "crosscoder"
    }
