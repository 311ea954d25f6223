"""Studies at several layers or of several contrasts: what is shared, what is answered apart, what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlgen_stats.schemas.errors import InputError, SpecError
from rlgen_stats.toolkit.reporting.other_answers import answered_note
from rlgen_stats.toolkit.study import STAGES, Study, open_for_run, parse_spec, run_study
from rlgen_stats.toolkit.study import run as run_module
from rlgen_stats.toolkit.study.spec_checks import check_stages
from rlgen_stats.toolkit.study.stage_graph import BY_NAME, _section, stage_named
from tests.study.conftest import spec_dict
from tests.study.fake_stages import CALLS, recorded, write_output  # noqa: F401 - a fixture

OF_PAIR = {"stabilize", "significance", "replicability", "report"}
OF_TARGET = {"select", "separation", "tokens", "intervene"}
DPO = {"name": "dpo", "arm": "dpo", "checkpoints": {10: "models/rl-10", 20: "models/rl-20"}}
ALL_FOUR = {"name": "main", "views": ["base@0", "sft@final", "rl@final", "dpo@final"]}
PAIR = {"name": "pair-rl", "views": ["base@0", "rl@final"]}
THREE = {"contrasts": [["sft", "rl"], ["dpo", "rl"], ["sft", "dpo"]], "crosscoders": [ALL_FOUR, PAIR]}


def change(folder: Path, **changes: Any) -> None:
    (folder / "study.yaml").write_text(yaml.safe_dump(spec_dict(runs=[*spec_dict()["runs"], DPO]) | THREE | changes))


def test_every_contrast_is_answered_and_what_does_not_depend_on_it_runs_once(study_folder: Path) -> None:
    change(study_folder)
    run_study(study_folder)
    assert [CALLS.count(name) for name in ("extract", "crosscoder", "encode", "drift")] == [1, 1, 1, 1]
    once_each = dict.fromkeys(OF_PAIR, 3) | {"report": 4}  # the study's again, when it can show the others' verdicts
    assert {name: CALLS.count(name) for name in OF_PAIR} == once_each
    assert {name: CALLS.count(name) for name in OF_TARGET} == dict.fromkeys(OF_TARGET, 2)  # [dpo, rl] has sft's target
    second, third = open_for_run(study_folder).linked
    assert [one.folder.root.name for one in (second, third)] == ["dpo+rl", "sft+dpo"]
    for one in (second, third):
        assert {s.state for s in one.status()} == {"done"}
        assert [run.name for run in one.spec.contrasted] == one.folder.root.name.split("+")
        assert (one.folder.root / "features.zarr").resolve() == (study_folder / "features.zarr").resolve()
    assert (second.folder.results / "selection").is_symlink()
    assert not (third.folder.results / "selection").is_symlink()
    n_calls = len(CALLS)
    run_study(study_folder)
    assert len(CALLS) == n_calls


def test_a_moved_study_and_one_in_another_order_stay_whole(study_folder: Path, tmp_path: Path) -> None:
    change(study_folder)
    run_study(study_folder)
    moved = tmp_path / "elsewhere"
    shutil.move(study_folder, moved)
    assert {s.state for one in open_for_run(moved).linked for s in one.status()} == {"done"}
    CALLS.clear()
    change(moved, contrasts=[["dpo", "rl"], ["sft", "rl"], ["sft", "dpo"]])
    run_study(moved)
    assert set(CALLS) == OF_PAIR  # models, dictionaries and the trial of rl's set are the same
    assert (moved / "contrasts" / "sft+rl" / "results.zarr" / "selection").is_symlink()
    CALLS.clear()
    change(moved, contrasts=[["sft", "dpo"], ["sft", "rl"]])
    run_study(moved)
    assert CALLS.count("select") == 2
    assert CALLS.count("encode") == 0
    assert {s.state for one in open_for_run(moved).linked for s in one.status()} == {"done"}


def test_error_rates_are_divided_by_the_number_of_contrasts(study_folder: Path) -> None:
    assert open_for_run(study_folder).spec.statistics.alpha == 0.05
    change(study_folder)
    study = open_for_run(study_folder)
    assert [one.spec.statistics.alpha for one in (study, *study.linked)] == [0.05 / 3] * 3


def test_one_contrast_can_be_read_but_is_run_with_its_study(study_folder: Path) -> None:
    change(study_folder)
    run_study(study_folder)
    one = study_folder / "contrasts" / "dpo+rl"
    assert {s.state for s in open_for_run(one).status()} == {"done"}
    with pytest.raises(InputError, match=r"is part of the study in .*; run that"):
        run_study(one)
    with pytest.raises(
        InputError, match=r"does not ask contrasts/rl\+dpo; further answers are contrasts/dpo\+rl, contrasts/sft\+dpo"
    ):
        open_for_run(study_folder / "contrasts" / "rl+dpo")


# -- layers ------------------------------------------------------------------------------------------------------------


def at(folder: Path, **extraction: Any) -> Study:
    (folder / "study.yaml").write_text(yaml.safe_dump(spec_dict(extraction=extraction)))
    return open_for_run(folder)


def keys(study: Study) -> dict[str, str]:
    return {stage.name: study.key(stage.name) for stage in STAGES}


def test_every_layer_is_answered_and_texts_are_read_once(study_folder: Path) -> None:
    at(study_folder, layers=[4, 8, 2])
    run_study(study_folder)
    n_calls = {stage.name: CALLS.count(stage.name) for stage in STAGES}
    of_each = dict.fromkeys(n_calls, 3) | {"posttrain": 1, "outcomes": 1, "extract": 1, "report": 4}
    assert n_calls == of_each
    study = open_for_run(study_folder)
    assert [one.folder.linked_as for one in study.linked] == ["layers/8", "layers/2"]
    assert [one.spec.extraction.layer for one in (study, *study.linked)] == [4, 8, 2]
    for one in (study, *study.linked):
        assert {s.state for s in one.status()} == {"done"}
        assert open_for_run(one.folder.root).key("report") == one.key("report")
        assert one.spec.statistics.alpha == 0.05 / 3
    for one in study.linked:
        links = {name for name in ("models", "outcomes.zarr", "completions") if (one.folder.root / name).is_symlink()}
        assert links == {"models", "outcomes.zarr", "completions"}
        assert not one.folder.activations.is_symlink()
    CALLS.clear()
    run_study(study_folder)
    assert CALLS == []


def test_a_layers_keys_are_those_of_a_study_at_that_layer(study_folder: Path) -> None:
    alone = {layer: keys(at(study_folder, layer=layer)) for layer in (4, 8)}
    assert keys(at(study_folder, layers=[4])) == alone[4]
    study = at(study_folder, layers=[4, 8])
    for layer, one in ((4, study), (8, study.linked[0])):
        same = {name for name, key in keys(one).items() if key == alone[layer][name]}
        assert same == {"posttrain", "outcomes", "extract", "crosscoder", "encode"}  # the rest has its share of alpha


def test_keys_of_a_study_at_one_layer_are_as_before_there_were_several(study_folder: Path) -> None:
    """Else every finished study would be computed anew: the sections of its keys are those of 0.3."""
    spec = at(study_folder, layer=4).spec
    assert sorted(_section(spec, "extraction")) == [
        "batch_size", "blocks", "dtype", "layer", "max_norm_ratio", "segments", "skip_first", "summary_segments",
    ]  # fmt: skip
    assert _section(spec, "statistics")["alpha"] == 0.05


def test_a_layer_that_is_added_leaves_activations_and_dictionaries(study_folder: Path) -> None:
    at(study_folder, layers=[4, 8])
    run_study(study_folder)
    CALLS.clear()
    at(study_folder, layers=[4, 8, 2, 6])
    run_study(study_folder)
    counts = {name: CALLS.count(name) for name in ("posttrain", "outcomes", "extract", "crosscoder", "encode")}
    assert counts == {"posttrain": 0, "outcomes": 0, "extract": 1, "crosscoder": 2, "encode": 2}
    assert CALLS.count("drift") == 4  # at another alpha
    assert {s.state for one in open_for_run(study_folder).linked for s in one.status()} == {"done"}


def test_an_extraction_that_was_killed_is_each_layers_own(study_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it read for all layers: each layer's record knows its half-written store."""
    at(study_folder, layers=[4, 8])
    run_study(study_folder)
    working = run_module.pkgutil.resolve_name

    def resolve(function: str) -> Any:
        def call(study: Study, key: str, progress: object) -> None:
            working(function)(study, key, progress)
            assert [one.folder.linked_as for one in study.beside] == ["layers/8"]
            for one in study.beside:
                write_output(one, one.key("extract"), "activations.zarr")
            raise KeyboardInterrupt

        return call if function == BY_NAME["extract"].function else working(function)

    at(study_folder, layers=[4, 8], batch_size=7)
    with monkeypatch.context() as patch:
        patch.setattr(run_module.pkgutil, "resolve_name", resolve)
        with pytest.raises(KeyboardInterrupt):
            run_study(study_folder)
    study = open_for_run(study_folder)
    assert [one.state("extract") for one in (study, *study.linked)] == ["interrupted"] * 2
    at(study_folder, layers=[4, 8], batch_size=9)  # before it could go on
    run_study(study_folder)
    study = open_for_run(study_folder)
    assert {s.state for one in (study, *study.linked) for s in one.status()} == {"done"}


def test_layers_and_contrasts_are_asked_together(study_folder: Path) -> None:
    change(study_folder, extraction={"layers": [4, 8]}, contrasts=[["sft", "rl"], ["dpo", "rl"]])
    run_study(study_folder)
    study = open_for_run(study_folder)
    below = [one.folder.linked_as for one in study.linked]
    assert below == ["contrasts/dpo+rl", "layers/8", "layers/8/contrasts/dpo+rl"]
    assert [CALLS.count(name) for name in ("outcomes", "extract", "crosscoder", "select", "stabilize")] == [
        1, 1, 2, 2, 4,
    ]  # fmt: skip
    last = open_for_run(study_folder / below[-1])
    assert (last.spec.extraction.layer, [run.name for run in last.spec.contrasted]) == (8, ["dpo", "rl"])
    assert last.spec.statistics.alpha == 0.05 / 4
    assert {s.state for s in last.status()} == {"done"}
    assert (last.folder.root / "features.zarr").resolve() == (study_folder / "layers/8/features.zarr").resolve()
    assert answered_note(last.spec) == (
        "layer 8, dpo against rl; 2 layers and 2 contrasts asked, each at level 0.0125 (0.05 in all), the others "
        "layer 4 and sft against rl"
    )
    with pytest.raises(InputError, match=r"does not ask layers/2; further answers are contrasts/dpo\+rl, layers/8, "):
        open_for_run(study_folder / "layers" / "2")


def test_a_forced_stage_is_forced_at_every_layer_also_after_a_kill(
    study_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(study_folder, layers=[4, 8])
    run_study(study_folder)
    working, forced = run_module.pkgutil.resolve_name, []

    def resolve(function: str) -> Any:
        def call(study: Study, key: str, progress: object) -> None:
            forced.append((study.folder.linked_as, "crosscoder" in study.forced))
            if len(forced) == 1:
                raise KeyboardInterrupt
            working(function)(study, key, progress)

        return call if function == BY_NAME["crosscoder"].function else working(function)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.pkgutil, "resolve_name", resolve)
        with pytest.raises(KeyboardInterrupt):
            run_study(study_folder, force=["crosscoder"])
        run_study(study_folder)
    assert forced == [("", True), ("", False), ("layers/8", True)]


def test_several_processes_train_the_dictionaries_of_every_layer(
    study_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(study_folder, layers=[4, 8])
    run_study(study_folder, stages=["extract"])
    CALLS.clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    run_study(study_folder, stages=["crosscoder"])
    assert CALLS == ["crosscoder", "crosscoder"]
    at(study_folder, layers=[4, 8, 2])
    with pytest.raises(InputError, match="run the crosscoder stage only, and extract is asked for or not done yet"):
        run_study(study_folder, stages=["crosscoder"])


# -- what is refused ---------------------------------------------------------------------------------------------------
FLOOR = {"name": "aside", "arm": "floor", "method": "pretrain", "n_checkpoints": 1}


def test_a_floor_run_is_not_compared() -> None:
    runs = spec_dict()["runs"]
    spec = parse_spec(spec_dict(runs=[FLOOR, *runs], contrast=None))
    assert [run.name for run in spec.contrasted] == ["sft", "rl"], "by default, too"
    assert [run.is_floor for run in spec.runs] == [True, False, False]
    with pytest.raises(SpecError, match="contrast names run 'aside' of arm 'floor', which is not compared"):
        parse_spec(spec_dict(runs=[FLOOR, *runs], contrast=["aside", "rl"]))
    with pytest.raises(SpecError, match="a study compares two arms"):
        parse_spec(spec_dict(runs=[FLOOR, runs[0]], contrast=None))
    check_stages(spec, [stage_named("stabilize")])  # which one checkpoint of a floor run is enough for


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contrasts": [["sft", "rl"]]}, "'contrasts' takes two or more different pairs of runs"),
        ({"contrasts": [["sft", "rl"], ["sft", "rl"]]}, "'contrasts' takes two or more different pairs of runs"),
        ({"contrasts": [["sft", "rl"], ["sft", "ppo"]]}, "contrast names run 'ppo'"),
        ({"contrasts": [["sft", "rl"], ["rl", "rl"]]}, "a contrast compares two runs, got 'rl' with itself"),
        ({"contrast": ["sft", "rl"]}, "give one pair of runs as 'contrast' or several as 'contrasts', not both"),
        ({"crosscoders": [{"name": "main", "views": ["base@0", "sft@final", "rl@final"]}]}, "dpo@final"),
    ],
)
def test_what_cannot_be_asked_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(spec_dict(runs=[*spec_dict()["runs"], DPO]) | THREE | changes)
