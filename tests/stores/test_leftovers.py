"""What killed processes leave is in nobody's way, and goes with the next writer; what living ones write is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import zarr

from rlgen_stats.stores.atomic import ZARR_JSON, remove_folder, replacing, sweep


@pytest.fixture(scope="module")
def dead() -> int:
    """Number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def name(of: str, process: int, kind: str = "partial") -> str:
    return f".{of}.{process}-0123abcd.{kind}"


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "file").write_text(path.name)
    return path


def test_a_sweep_leaves_what_was_finished_and_what_living_processes_write(tmp_path: Path, dead: int) -> None:
    kept = [
        folder(tmp_path / "report"),
        folder(tmp_path / "results.zarr" / name("drift", os.getppid())),
        tmp_path / "stages" / ".run.lock",
        tmp_path / "data" / ".report.partial",  # not a name of ours
    ]
    for file in kept[2:]:
        file.parent.mkdir()
        file.write_text("")
    swept = [
        folder(tmp_path / name("report", dead)),
        folder(tmp_path / name("report", dead, "old")),
        folder(tmp_path / "models" / ".sft.removed"),
        folder(tmp_path / "models" / "sft" / ".step-6.0123abcd.partial"),  # as earlier releases called it
        folder(tmp_path / "intervention" / name("disable", os.getpid())),  # in containers all are process 1
    ]
    file = tmp_path / "models" / "sft" / name("key.json", dead)
    file.write_text("{")
    sweep(tmp_path)
    assert [path.name for path in kept if not path.exists()] == []
    assert [path.name for path in (*swept, file) if path.exists()] == []


def test_an_old_folder_whose_replacement_never_came_is_moved_back(tmp_path: Path, dead: int) -> None:
    folder(tmp_path / "results.zarr" / name("drift", dead, "old"))
    sweep(tmp_path)
    assert (tmp_path / "results.zarr/drift/file").exists()


@pytest.mark.parametrize(("older", "kept"), [(-60.0, True), (60.0, False)])
def test_a_number_that_another_process_has_now_keeps_nothing(tmp_path: Path, older: float, kept: bool) -> None:
    """As after a restart of a container, where numbers begin anew."""
    left = tmp_path / name("key.json", os.getppid())
    left.write_text("")
    began = psutil.Process(os.getppid()).create_time()
    os.utime(left, (began - older, began - older))
    sweep(tmp_path)
    assert left.exists() is kept


def test_a_sweep_does_not_look_through_chunks(tmp_path: Path, dead: int) -> None:
    zarr.create_array(tmp_path / "array", shape=(2,), chunks=(1,), dtype="f4")[:] = 1.0
    inside, beside = (tmp_path / "array" / place / name(ZARR_JSON, dead) for place in ("c", "."))
    for file in (inside, beside):
        file.write_text("")
    sweep(tmp_path)
    assert inside.exists()
    assert not beside.exists()


def test_the_next_writer_of_a_path_removes_what_a_dead_one_left_of_it(tmp_path: Path, dead: int) -> None:
    left, living = folder(tmp_path / name("report", dead)), folder(tmp_path / name("report", os.getppid()))
    others, own = folder(tmp_path / name("reports", dead)), folder(tmp_path / name("report", os.getpid()))
    with replacing(tmp_path / "report") as temporary:
        folder(temporary)
    assert not left.exists()
    assert living.exists()
    assert others.exists()
    assert own.exists(), "another thread may be writing it"


def test_a_deletion_that_is_killed_leaves_nothing_under_the_folders_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder(tmp_path / "run")

    def dies(*arguments: object, **how: object) -> None:
        if not run.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.removed"]
    monkeypatch.undo()
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
