"""Stages with models on two worker processes, through the command line: the bytes that one process left."""

import os
import shutil
from pathlib import Path

import pytest
from click.testing import Result

from tests.end_to_end.conftest import run_command
from tests.end_to_end.test_mini import digest

pytestmark = pytest.mark.skipif("RLGEN_STATS_KILLS" not in os.environ, reason="a minute of two workers (make faults)")
REMADE = (
    *("outcomes.zarr", "completions", "activations.zarr", "features.zarr", "results.zarr/movement"),
    *("results.zarr/intervention", "results.zarr/health"),
)


def test_two_workers_leave_the_bytes_of_one_process(mini: tuple[Path, Result], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mini[0], tmp_path / "study"))
    before = digest(folder)
    for place in REMADE:
        shutil.rmtree(folder / place)
    for file in folder.glob("crosscoder/*/health.json"):
        file.unlink()  # they are measured again, not trained
    result = run_command("run", str(folder), "--devices", "cpu,cpu", "--stage", "movement", "--stage", "intervene")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("up to date") == 3  # posttrain, align and select
    after = digest(folder)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert {name.partition("/")[0] for name in changed} <= {"stages"}  # how long they took
