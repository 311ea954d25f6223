"""What was made with one dictionary is not read as another's: stores moved by hand, weights trained again."""

import hashlib
from pathlib import Path

import pytest
import xarray as xr
import yaml
from click.testing import CliRunner

from rlgen_stats.cli import main
from rlgen_stats.schemas.errors import StageError, StoreError
from rlgen_stats.stores import Provenance, read_json, write_json
from rlgen_stats.stores.verify import verify
from rlgen_stats.toolkit.study import Study, open_for_run, run_study
from rlgen_stats.toolkit.study.stage_graph import BY_NAME
from rlgen_stats.toolkit.study.trials_of_other_sets import verify_set
from tests.study.conftest import MAIN, PAIR, spec_dict
from tests.study.fake_stages import CALLS, recorded, write_output  # noqa: F401 - a fixture

NAMES = ("main", "main.2", "main.3")


def train(study: Study, name: str, weights: str) -> None:
    """Weights of a dictionary, as far as their hash goes."""
    folder = study.folder.crosscoder(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.safetensors").write_text(weights)
    described = {"name": name, "views": [], "n_features": 1, "weights_sha256": sha(weights)}
    write_json(folder / "spec.json", described)


def sha(weights: str) -> str:
    return hashlib.sha256(weights.encode()).hexdigest()


def name_weights(study: Study, stage: str) -> None:
    """Let each of a stage's stores say which weights it was made with."""
    for store, folder in study.dictionaries(BY_NAME[stage]).items():
        attrs = Provenance(study.study_id, study.key(stage)).attrs()
        weights = sha((study.folder.root / folder / "weights.safetensors").read_text())
        path = study.folder.root / store
        xr.Dataset(attrs=attrs | {"crosscoder": weights}).to_zarr(path, consolidated=False, mode="w")


@pytest.fixture
def finished(study_folder: Path) -> Path:
    """A study whose stages encode and select have run with three dictionaries."""
    spec = spec_dict(crosscoders=[MAIN | {"replicates": 3}, PAIR])
    (study_folder / "study.yaml").write_text(yaml.safe_dump(spec))
    run_study(study_folder)
    study = open_for_run(study_folder)
    for name in NAMES:
        train(study, name, f"weights of {name}")
    name_weights(study, "encode")
    name_weights(study, "select")
    assert {s.state for s in open_for_run(study_folder).status()} == {"done"}
    CALLS.clear()
    return study_folder


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@pytest.mark.parametrize(
    ("pair", "stage", "named"),
    [
        (("features.2.zarr", "features.3.zarr"), "encode", ["features.2.zarr", "features.3.zarr"]),
        (("features.zarr", "features.3.zarr"), "encode", ["features.zarr", "features.3.zarr"]),
        (("results.zarr/selection", "results.zarr/selection.2"), "select", ["selection", "selection.2"]),
        (("crosscoder/main.2", "crosscoder/main.3"), "encode", ["features.2.zarr", "features.3.zarr"]),
    ],
)
def test_swapped_dictionaries_are_noticed_and_nothing_runs_on_them(
    finished: Path, pair: tuple[str, str], stage: str, named: list[str]
) -> None:
    swap(finished / pair[0], finished / pair[1])
    assert open_for_run(finished).state(stage) == "foreign"
    status = CliRunner().invoke(main, ["status", str(finished)]).output
    assert f"{stage:<13} foreign" in status
    (problem,) = (one for one in verify(finished).problems if one.startswith(f"stages/{stage}.json"))
    assert all(f"{name}: made with the crosscoder weights" in problem for name in named)
    with pytest.raises(StoreError, match=f"run stage {stage} again with --force. Nothing was changed"):
        run_study(finished, stages=["tokens"])
    with pytest.raises(StageError, match=f"needs the stage.* {stage}"):
        verify_set(finished, features=[1])
    assert CALLS == []
    swap(finished / pair[0], finished / pair[1])
    assert open_for_run(finished).state(stage) == "done"
    assert not any("crosscoder weights" in one for one in verify(finished).problems)


def test_features_of_weights_that_were_trained_again_are_noticed(finished: Path) -> None:
    train(open_for_run(finished), "main.2", "others")
    assert open_for_run(finished).state("encode") == "foreign"
    with pytest.raises(StoreError, match=r"features\.2\.zarr: made with .*, but crosscoder/main\.2 holds"):
        run_study(finished, stages=["drift"])
    run_study(finished, stages=["drift"], force=["encode"])
    assert CALLS == ["encode", "drift"]
    assert open_for_run(finished).state("select") == "stale"


def test_results_of_the_dictionary_before_are_no_fault_once_it_is_being_trained_anew(finished: Path) -> None:
    def faults() -> list[str]:
        return [one for one in verify(finished).problems if "crosscoder weights" in one]

    file = finished / "stages/crosscoder.json"
    trained = read_json(file)
    train(open_for_run(finished), "main.2", "others")
    assert [fault.split(":")[0] for fault in faults()] == ["stages/encode.json", "stages/select.json"]
    write_json(file, trained | {"key": "another", "finished": False})
    assert faults() == []
    write_json(file, trained)
    assert len(faults()) == 2


def test_dictionaries_that_are_gone_say_nothing(finished: Path) -> None:
    (finished / "crosscoder/main.2/weights.safetensors").unlink()
    (finished / "crosscoder/main.3/spec.json").unlink()
    assert open_for_run(finished).state("encode") == "done"
