"""A study on two worker processes, from training to the report, through the command line: the bytes of one process."""

from pathlib import Path

import pytest
from click.testing import Result

from rlgen_stats.stores import read_json
from tests.end_to_end.conftest import run_command
from tests.end_to_end.test_mini import digest

pytestmark = pytest.mark.slow


def test_two_workers_leave_the_bytes_of_one_process(mini: tuple[Path, Result], tmp_path: Path) -> None:
    folder = tmp_path / "study"
    result = run_command("demo", "--size", "mini", "--folder", str(folder), "--devices", "cpu,cpu")
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    here, there = digest(mini[0]), digest(folder)
    assert set(here) == set(there)
    changed = {name for name in here if here[name] != there[name]}
    records = {f"models/{run}/posttrain.json" for run in ("sft", "rl")}
    assert {name.partition("/")[0] for name in changed - records} <= {"stages"}, changed  # how long they took
    for record in records:
        before, after = read_json(mini[0] / record), read_json(folder / record)
        for one in (before, after):
            one.pop("log")  # how long training took
        assert before == after
