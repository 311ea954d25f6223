"""Runs trained by processes that a launcher starts: the same numbers, progress, refusals, and what a kill leaves."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from rlgen_stats.cli import main
from rlgen_stats.schemas.errors import InputError, SpecError, StageError
from rlgen_stats.stores import StudyFolder, read_json
from rlgen_stats.toolkit import study as study_package
from rlgen_stats.toolkit.posttrain import train_run
from rlgen_stats.toolkit.posttrain.launcher import MARK, MODULE
from rlgen_stats.toolkit.posttrain.train_run import POSTTRAIN_RECORD
from tests.posttrain.test_train_run import KillAt, Make, Stopped, same, study_at, weights

ACCELERATE = "accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
LONGER = {"max_steps": 120}
"""Long enough that a kill half way finds it training."""


class Heard:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, float | None, str]] = []
        self.lines: list[str] = []
        self.done = self.skipped = 0.0

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "it") -> Iterator[Heard]:
        self.tasks.append((description, total, unit))
        yield self

    def advance(self, amount: float = 1.0, **facts: object) -> None:
        self.done += amount

    def skip(self, amount: float, **facts: object) -> None:
        self.skipped += amount

    def log(self, message: str) -> None:
        self.lines.append(message)


def saying(*lines: str, code: int = 0) -> str:
    """A launcher whose process prints lines and ends."""
    body = "; ".join([*(f"print({line!r})" for line in lines), f"raise SystemExit({code})"])
    return shlex.join([sys.executable, "-c", body])


@pytest.mark.slow
@pytest.mark.skipif("RLGEN_STATS_WEIGHTS" in os.environ, reason="these processes would begin with the usual weights")
def test_accelerate_gives_the_weights_of_this_process_also_after_a_kill(tmp_path: Path, make_spec: Make) -> None:
    spec = make_spec(sft=LONGER)
    run, here, there = spec.runs[0], study_at(tmp_path / "here"), study_at(tmp_path / "there")
    assert train_run(spec, run, here) == (40, 80, 120)
    with pytest.raises(Stopped):
        train_run(spec, run, there, launcher=ACCELERATE, progress=KillAt(50))
    first = there.run("sft") / "step-40/model.safetensors"
    stamp = first.stat().st_mtime_ns
    assert not (there.run("sft") / POSTTRAIN_RECORD).exists()
    heard = Heard()
    assert train_run(spec, run, there, launcher=ACCELERATE, progress=heard) == (40, 80, 120)
    assert first.stat().st_mtime_ns == stamp, "trained again from the start"
    assert heard.tasks == [("train sft (sft)", 120, "steps")]
    assert heard.skipped in (40, 80)
    assert heard.skipped + heard.done == 120
    for step in (40, 80, 120):
        pairs = zip(weights(here, "sft", step).values(), weights(there, "sft", step).values(), strict=True)
        # another process divides sums among several threads in its own way
        tolerance = 0.0 if torch.get_num_threads() == 1 else 1e-3
        assert all(torch.allclose(one, other, rtol=0.0, atol=tolerance) for one, other in pairs)
    records = [read_json(folder.run("sft") / POSTTRAIN_RECORD) for folder in (here, there)]
    assert records[0]["identity"] == records[1]["identity"]
    assert records[1]["n_processes"] == 1
    assert sorted(path.name for path in there.run("sft").iterdir()) == sorted(
        path.name for path in here.run("sft").iterdir()
    )
    train_run(spec, run, there, launcher=saying(code=1))  # finished: nothing is launched


@pytest.mark.slow
@pytest.mark.parametrize(("index", "name"), [(0, "sft"), (1, "rl")])
def test_two_processes_train_together_and_the_first_one_writes(
    index: int, name: str, folder: StudyFolder, make_spec: Make
) -> None:
    spec = make_spec()
    launcher = f"{sys.executable} -P -m torch.distributed.run --nproc-per-node 2 --standalone"
    heard = Heard()
    assert train_run(spec, spec.runs[index], folder, launcher=launcher, progress=heard) == (2, 4, 6)
    assert read_json(folder.run(name) / POSTTRAIN_RECORD)["n_processes"] == 2
    assert heard.done == 6, "one of them tells"
    assert sorted(path.name for path in folder.run(name).iterdir()) == ["posttrain.json", "step-2", "step-4", "step-6"]
    assert not same(weights(folder, name, 2), weights(folder, name, 6))


def test_processes_that_fail_are_named_with_their_last_lines(folder: StudyFolder, make_spec: Make) -> None:
    spec = make_spec()
    lines = [f"line {number}" for number in range(30)]
    heard = Heard()
    with pytest.raises(
        StageError, match=r"(?s)run 'sft', trained by '.*': ended with exit code 3; its last lines:"
    ) as failed:
        train_run(spec, spec.runs[0], folder, launcher=saying(*lines, code=3), progress=heard)
    assert str(failed.value).endswith("\n".join(lines[-12:]))
    assert heard.lines == lines, "all are shown as they come"
    told = MARK + '{"refusal": "the loss is NaN."}'
    with pytest.raises(StageError, match=r"run 'sft', trained by '.*': the loss is NaN\.$"):
        train_run(spec, spec.runs[0], folder, launcher=saying(told, "Traceback", code=1))
    with pytest.raises(StageError, match="ended without finishing"):
        train_run(spec, spec.runs[0], folder, launcher=saying("done"))
    assert list(folder.run("sft").iterdir()) == []


def test_what_is_no_launcher_is_refused(folder: StudyFolder, make_spec: Make) -> None:
    spec = make_spec()
    for launcher, reason in (("nosuch launch", "no program 'nosuch'"), ("a 'b", "quotes"), (" ", "no program ''")):
        with pytest.raises(InputError, match=reason):
            train_run(spec, spec.runs[0], folder, launcher=launcher)
    wrong = make_spec(sft={"learning_rte": 1.0})
    with pytest.raises(SpecError, match="learning_rate"):  # before anything is launched
        train_run(wrong, wrong.runs[0], folder, launcher=saying(code=1))


@pytest.mark.slow
def test_processes_end_with_the_one_that_launched_them() -> None:
    code = f"import time, {MODULE} as m; m._end_with_parent(); print('ready', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-P", "-c", code], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=30) == 1


def test_the_command_hands_its_launcher_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def run_study(path: str, *, launcher: str | None, **how: object) -> None:
        given.append(str(launcher))
        raise InputError("enough")

    monkeypatch.setattr(study_package, "run_study", run_study)
    monkeypatch.setattr("rlgen_stats.cli.checking.check_before_run", lambda *args: None)
    for command in ("posttrain", "run"):
        assert CliRunner().invoke(main, [command, str(tmp_path), "--launcher", ACCELERATE]).exit_code == 2
    assert given == [ACCELERATE, ACCELERATE]
