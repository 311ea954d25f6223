"""Studies that ask several contrasts: what is shared, what is answered apart, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlgen_stats.schemas.errors import InputError, SpecError
from rlgen_stats.toolkit.study import further_contrasts, open_for_run, parse_spec, run_study
from rlgen_stats.toolkit.study.spec_checks import check_stages
from rlgen_stats.toolkit.study.stage_graph import stage_named
from tests.study.conftest import spec_dict
from tests.study.fake_stages import CALLS, recorded  # noqa: F401 - a fixture

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
    assert {name: CALLS.count(name) for name in OF_PAIR} == dict.fromkeys(OF_PAIR, 3)
    assert {name: CALLS.count(name) for name in OF_TARGET} == dict.fromkeys(OF_TARGET, 2)  # [dpo, rl] has sft's target
    second, third = further_contrasts(open_for_run(study_folder))
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
    assert {s.state for one in further_contrasts(open_for_run(moved)) for s in one.status()} == {"done"}
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
    assert {s.state for one in further_contrasts(open_for_run(moved)) for s in one.status()} == {"done"}


def test_error_rates_are_divided_by_the_number_of_contrasts(study_folder: Path) -> None:
    assert open_for_run(study_folder).spec.statistics.alpha == 0.05
    change(study_folder)
    study = open_for_run(study_folder)
    assert [one.spec.statistics.alpha for one in (study, *further_contrasts(study))] == [0.05 / 3] * 3


def test_one_contrast_can_be_read_but_is_run_with_its_study(study_folder: Path) -> None:
    change(study_folder)
    run_study(study_folder)
    one = study_folder / "contrasts" / "dpo+rl"
    assert {s.state for s in open_for_run(one).status()} == {"done"}
    with pytest.raises(InputError, match=r"is one contrast of the study in .*; run that"):
        run_study(one)
    with pytest.raises(
        InputError, match=r"does not ask the contrast 'rl\+dpo'; its further contrasts are dpo\+rl, sft\+dpo"
    ):
        open_for_run(study_folder / "contrasts" / "rl+dpo")


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
