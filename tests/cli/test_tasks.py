from __future__ import annotations

import json
from pathlib import Path

import yaml
from click.testing import CliRunner

from rlgen_stats.cli.main import main
from rlgen_stats.toolkit.exchange.benchmark_layouts import BENCHMARKS
from tests.exchange.published_rows import LAYOUTS


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_ready_made_tasks_are_listed() -> None:
    code, out, _ = run("tasks")
    assert code == 0
    assert all(any(line.split()[:1] == [name] for line in out.splitlines()) for name in BENCHMARKS)
    assert list(json.loads(run("tasks", "--json")[1])) == list(BENCHMARKS)


def test_a_task_is_added_from_a_file(tmp_path: Path) -> None:
    study, file = tmp_path / "study", tmp_path / "mine.jsonl"
    rows = [
        {"ziel" if key == "goal" else key: cell for key, cell in row.items()} for row in LAYOUTS["piqa", "ybisk/piqa"]
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("init", study)[0] == 0
    code, _, error = run("tasks", "add", study, "piqa", "--from", file)
    assert code == 2
    assert error.startswith("Error: row 1 of piqa lacks goal; it has the columns ziel, sol1")
    assert run("tasks", "add", study, "piqa", "--from", file, "--column", "goal")[0] == 2
    code, out, _ = run("tasks", "add", study, "piqa", "--from", file, "--column", "goal=ziel", "--generate")
    assert (code, out) == (0, "piqa: 2 prompt(s) in data/tasks/piqa.parquet, an entry under 'tasks:' of study.yaml.\n")
    assert yaml.safe_load((study / "study.yaml").read_text())["tasks"]["piqa"]["grader"] == "choice"
    code, _, error = run("tasks", "add", study, "piqa", "--from", file)
    assert code == 2
    assert "has task 'piqa' already" in error
