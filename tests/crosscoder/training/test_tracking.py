"""Curves go where they are asked to go, and nowhere else; weights, keys and files are the same."""

from __future__ import annotations

import importlib.machinery
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest
from click.testing import CliRunner

from rlgen_stats.cli import main
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, read_json
from rlgen_stats.toolkit import tracking
from rlgen_stats.toolkit.crosscoder import train_crosscoders
from rlgen_stats.toolkit.tracking import TRACKERS, check_trackers
from tests.crosscoder.planted import PROVENANCE


class Recorder(accelerate.tracking.GeneralTracker):
    """A tracker as accelerate has them, which keeps what it gets."""

    name, requires_logging_directory, main_process_only = "recorder", False, False
    tracker = None
    made: list[Recorder] = []  # noqa: RUF012
    broken = ""

    def __init__(self, run_name: str, *place: Any, **settings: Any) -> None:
        super().__init__()
        self.run_name, self.place, self.settings = run_name, place, settings
        self.points: list[tuple[int, dict[str, float]]] = []
        self.finished = False
        self.made.append(self)

    def start(self) -> None:
        if self.broken:
            raise RuntimeError(self.broken)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.configuration = values

    def log(self, values: dict[str, float], step: int | None = None, **more: Any) -> None:
        assert step is not None
        self.points.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorder]]:
    """The trackers that were made in place of the real ones, whose packages count as installed."""
    for name in TRACKERS:
        monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, name, Recorder)
    monkeypatch.setattr(tracking, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None, origin=name))
    yield Recorder.made
    Recorder.made.clear()


def trained(spec: StudySpec, folder: StudyFolder, *report_to: str) -> dict[str, bytes]:
    """Files of the crosscoder."""
    train_crosscoders(spec, folder, provenance=PROVENANCE, report_to=report_to)
    place = folder.crosscoder("main")
    return {file.name: file.read_bytes() for file in sorted(place.iterdir()) if file.is_file()}


def test_curves_arrive_and_nothing_else_changes(
    copied: tuple[StudySpec, StudyFolder], tmp_path: Path, recorded: list[Recorder]
) -> None:
    spec, folder = copied
    content = spec.model_dump(mode="json")
    content["crosscoders"] = [content["crosscoders"][0] | {"steps": 60, "replicates": 2}]
    spec = StudySpec.model_validate(content)
    other = StudyFolder(tmp_path / "other")
    shutil.copytree(folder.root, other.root)
    quiet = trained(spec, folder)
    assert recorded == []
    assert trained(spec, other, "wandb", "tensorboard") == quiet
    wandb, tensorboard = recorded
    assert (wandb.run_name, wandb.place, wandb.settings) == (spec.name, (), {"name": "main"})
    assert (tensorboard.run_name, tensorboard.place) == ("main", (other.root / "logs",))
    assert wandb.configuration["steps"] == 60
    assert all(isinstance(value, str | int | float) for value in wandb.configuration.values())
    assert wandb.points == tensorboard.points
    assert [step for step, _ in wandb.points] == [50, 60]
    for name in ("main", "main.2"):
        curve = read_json(other.crosscoder(name) / "curve.json")
        for (_, values), point in zip(wandb.points, curve, strict=True):
            assert values[f"{name}/loss"] == point["loss"]
            assert {key: values[f"{name}/fve/{key}"] for key in point["fve"]} == point["fve"]
            assert f"{name}/step" not in values
    assert wandb.finished
    assert tensorboard.finished


def test_tensorboard_itself_reads_the_curves_back(copied: tuple[StudySpec, StudyFolder]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    spec, folder = copied
    content = spec.model_dump(mode="json")
    content["crosscoders"] = [content["crosscoders"][0] | {"steps": 60}]
    trained(StudySpec.model_validate(content), folder, "tensorboard")
    written = accumulator.EventAccumulator(str(folder.root / "logs" / "main")).Reload()
    curve = read_json(folder.crosscoder("main") / "curve.json")
    losses = [(point.step, point.value) for point in written.Scalars("main/loss")]
    assert losses == [(point["step"], pytest.approx(point["loss"], rel=1e-6)) for point in curve]  # kept as float32


def test_a_tracker_that_does_not_start_is_a_sentence_before_training(
    copied: tuple[StudySpec, StudyFolder], recorded: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recorder, "broken", "no API key\nconfigured")
    with pytest.raises(InputError, match=r"wandb does not start \(no API key configured\); correct that, or do not"):
        trained(*copied, "wandb")
    assert not (copied[1].crosscoder("main") / "weights.safetensors").exists()


def test_missing_packages_and_unknown_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the package wandb, which is missing: pip install wandb\."):
        check_trackers(["wandb"])
    with pytest.raises(InputError, match="reported to wandb, tensorboard, trackio, got 'mlflow'"):
        check_trackers(["mlflow"])
    monkeypatch.undo()
    (tmp_path / "trackio").mkdir()  # as a tracker leaves it in the working directory
    monkeypatch.setattr(
        tracking, "find_spec", lambda name: importlib.machinery.PathFinder.find_spec(name, [str(tmp_path)])
    )
    with pytest.raises(InputError, match="needs the package trackio, which is missing"):
        check_trackers(["trackio"])


def test_command_refuses_before_it_looks_at_the_study(tmp_path: Path) -> None:
    wrong = CliRunner().invoke(main, ["crosscoder", str(tmp_path), "--report-to", "mlflow"])
    assert (wrong.exit_code, "'wandb', 'tensorboard', 'trackio'" in wrong.stderr) == (2, True)
    for command in ("crosscoder", "run"):
        assert "--report-to" in CliRunner().invoke(main, [command, "--help"]).stdout
    assert "--report-to" not in CliRunner().invoke(main, ["drift", "--help"]).stdout
