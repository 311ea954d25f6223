from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from rlgen_stats.schemas.errors import InputError, SpecError
from rlgen_stats.stores import StudyFolder
from rlgen_stats.stores.prompts import load_prompts
from rlgen_stats.toolkit.exchange.benchmark_layouts import BENCHMARKS
from rlgen_stats.toolkit.extraction.grading import check_answers, graders_of
from rlgen_stats.toolkit.study.add_tasks import add_tasks, with_tasks
from rlgen_stats.toolkit.study.spec_file import read_spec
from rlgen_stats.toolkit.study.template import write_template
from tests.exchange.published_rows import LAYOUTS

ENTRY = {"own": {"file": "own.parquet", "domain": "in", "grader": "math", "template": "{text}\nGo: \\boxed{}"}}
HEAD = (
    "name: s  # a comment\nruns:\n- {name: a, arm: sft, method: sft}\n- {name: b, arm: rl, method: grpo}\n"
    "base: {path: models/base}\n"
    "crosscoders: [{name: main, views: [base@0, a@final, b@final], n_features: 64}]\n"
)


@pytest.fixture
def study(tmp_path: Path) -> StudyFolder:
    folder = StudyFolder(tmp_path / "study")
    folder.root.mkdir()
    folder.spec.write_text(HEAD)
    return folder


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    """One file a task, in its published layout."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    for (name, _), rows in reversed(LAYOUTS.items()):  # the first layout of each
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_every_task_is_added_and_read(study: StudyFolder, downloads: Path) -> None:
    before = study.spec.read_text()
    added = add_tasks(study, list(BENCHMARKS), source=str(downloads))
    assert study.spec.read_text().startswith(before)
    spec = read_spec(study.root)
    assert list(spec.tasks) == [task.name for task in added] == list(BENCHMARKS)
    assert set(spec.selection.held_out_tasks) == {"logiqa", "piqa"}
    prompts = load_prompts(spec, study).groupby("task", sort=False)
    for task in added:
        rows = prompts.get_group(task.name)
        assert len(rows) == task.n_prompts == len(pd.read_parquet(study.root / task.file))
        assert set(rows["domain"]) == {BENCHMARKS[task.name].domain}
        assert (rows["choices"] == "").all() == (BENCHMARKS[task.name].options is None)
    table = load_prompts(spec, study)
    check_answers(graders_of(spec, table["task"]), table)  # every answer can be read by its task's grader
    texts = {task: list(rows["text"]) for task, rows in prompts}
    assert texts["aime25"] == [
        "Find $6\\cdot 7$.\nPlease reason step by step, and put your final answer within \\boxed{}."
    ]
    assert texts["openbookqa"][0] == "When water boils in a kettle"
    assert texts["arc_challenge"][1] == "Question: Which planet do we live on?\nAnswer:"
    assert texts["commonsenseqa"] == [
        "Question: Where does one hang a wet coat?\nA. oven\nB. river\nC. pillow\nD. soup\nE. hook\nAnswer:"
    ]
    assert texts["logiqa"][0] == (
        "Passage: Every red train is late. No late train is full.\nQuestion: What follows?\nChoices:\n"
        "A. Red trains are full.\nB. No red train is full.\nC. Full trains are red.\nD. Late trains are red.\nAnswer:"
    )


def test_letters_to_be_generated(study: StudyFolder, downloads: Path) -> None:
    add_tasks(study, ["piqa", "math500"], source=str(downloads), generated=True)
    spec = read_spec(study.root)
    assert (spec.grader_of("piqa").name, spec.grader_of("math500").name) == ("choice", "math")
    prompts = load_prompts(spec, study)
    check_answers(graders_of(spec, prompts["task"]), prompts)
    assert prompts["text"][0] == "Question: To dry a wet boot\nA. stuff it with paper\nB. stuff it with snow\nAnswer:"


def test_a_file_alone_and_columns_of_ones_own(study: StudyFolder, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"frage": "Find 6*7.", "answer": "42"}))
    (task,) = add_tasks(study, ["aime25"], source=str(file), columns={"problem": "frage"})
    assert list(pd.read_parquet(study.root / task.file)["text"]) == ["Find 6*7."]


def test_nothing_is_written_where_one_task_cannot_be_read(study: StudyFolder, downloads: Path) -> None:
    before = study.spec.read_text()
    (downloads / "piqa.jsonl").write_text('{"goal": "g"}\n')
    with pytest.raises(InputError, match=r"row 1 of piqa lacks label"):
        add_tasks(study, ["sciq", "piqa"], source=str(downloads))
    (downloads / "piqa.jsonl").unlink()
    with pytest.raises(InputError, match=r"has no file or folder 'piqa'"):
        add_tasks(study, ["sciq", "piqa"], source=str(downloads))
    with pytest.raises(InputError, match=r"no ready-made task is called 'openbook'; did you mean 'openbookqa'\?"):
        add_tasks(study, ["sciq", "openbook"], source=str(downloads))
    assert study.spec.read_text() == before
    assert not (study.root / "data/tasks").exists()


def test_a_missing_folder_is_said_to_be_missing(study: StudyFolder) -> None:
    for names in (("math500",), ("math500", "piqa")):
        with pytest.raises(InputError, match=r"no (file or )?folder at /.*/gone; correct the path"):
            add_tasks(study, names, source="gone")


def test_a_task_is_added_once(study: StudyFolder, downloads: Path) -> None:
    add_tasks(study, ["sciq"], source=str(downloads))
    before = study.spec.read_text()
    with pytest.raises(SpecError, match=r"has task 'sciq' already; remove that entry first"):
        add_tasks(study, ["piqa", "sciq"], source=str(downloads))
    assert study.spec.read_text() == before
    assert not (study.root / "data/tasks/piqa.parquet").exists()


def test_a_study_is_needed(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no study file at .*rlgen-stats init"):
        add_tasks(StudyFolder(tmp_path), ["sciq"])


def listed(text: str) -> Any:
    return yaml.safe_load(text).get("tasks")


@pytest.mark.parametrize("end", ["", "\n", "seed: 3  # last\n", "# a comment\n\nseed: 3"])
@pytest.mark.parametrize(
    ("section", "before"),
    [
        ("", None),
        ("tasks:\n", None),
        ("tasks:  # none yet\n", None),
        ("tasks: {}  # none yet\n", {}),
        ("tasks: null\n", None),
        ("tasks:\n  one: {domain: in}  # first\n", {"one": {"domain": "in"}}),
        (
            "tasks:\n    one:\n        domain: in\n        stop:\n        - x\n        - y\n    # two more lines\n\n",
            {"one": {"domain": "in", "stop": ["x", "y"]}},
        ),
        ("tasks:\n  one:\n    template: |\n      {text}\n      Answer:\n", {"one": {"template": "{text}\nAnswer:\n"}}),
    ],
)
def test_all_else_in_the_file_stays_letter_for_letter(section: str, before: Any, end: str) -> None:
    text = HEAD + section + end
    edited = with_tasks(text, ENTRY, where="study.yaml")
    assert listed(edited) == (before or {}) | ENTRY
    kept = [line for line in text.splitlines() if not line.startswith("tasks:")]
    remaining = iter(edited.splitlines())
    assert all(line in remaining for line in kept)  # in this order
    assert edited.count("#") == text.count("#")


def initialised(tmp_path: Path) -> StudyFolder:
    """What ``rlgen-stats init`` writes, with as much of its base as reading study.yaml needs."""
    study = StudyFolder(tmp_path / "mine")
    write_template(study.root, "mine")
    (study.root / "models/base").mkdir(parents=True)
    (study.root / "models/base/config.json").write_text('{"num_hidden_layers": 28}')
    return study


def test_example_prompts_of_init_give_way(tmp_path: Path, downloads: Path) -> None:
    study = initialised(tmp_path)
    text = study.spec.read_text()
    add_tasks(study, ["sciq", "math500"], source=str(downloads))
    spec = read_spec(study.root)
    assert list(spec.tasks) == ["sciq", "math500"]
    assert spec.data.prompts is None
    assert set(load_prompts(spec, study)["task"]) == {"sciq", "math500"}
    assert not (study.root / "data/prompts.csv").exists()
    remaining = iter(text.splitlines())
    entries = list(_lines_of_entries(study))
    assert all(line in remaining for line in study.spec.read_text().splitlines() if line not in entries)
    assert len(text.splitlines()) - 4 + len(entries) == len(study.spec.read_text().splitlines())


def _lines_of_entries(study: StudyFolder) -> Iterator[str]:
    lines = study.spec.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("tasks:"))
    for line in lines[start + 1 :]:
        if not line.startswith("  "):
            return
        yield line


@pytest.mark.parametrize("changed", ["study.yaml", "data/prompts.csv"])
def test_prompts_of_ones_own_stay(changed: str, tmp_path: Path, downloads: Path) -> None:
    study = initialised(tmp_path)
    file = study.root / changed
    file.write_text(
        file.read_text().replace("  math: {grader: math}", "  math: {grader: exact}").replace("7 + 5", "8 + 4")
    )
    add_tasks(study, ["math500"], source=str(downloads))
    assert list(read_spec(study.root).tasks) == ["math", "sciq", "math500"]
    assert set(load_prompts(read_spec(study.root), study)["task"]) == {"math", "sciq", "math500"}


def test_texts_of_several_lines_are_written_as_one() -> None:
    edited = with_tasks(HEAD, ENTRY, where="study.yaml")
    assert edited.endswith('    template: "{text}\\nGo: \\\\boxed{}"\n')


def test_tasks_on_one_line_are_not_rewritten() -> None:
    with pytest.raises(SpecError, match=r"(?s)not listed one a line.*by hand:\ntasks:\n  own:\n    file: own.parquet"):
        with_tasks(HEAD + "tasks: {one: {domain: in}}\n", ENTRY, where="study.yaml")


@pytest.mark.parametrize(
    ("text", "message"), [("name: [", r"study.yaml is not valid YAML"), ("- a", r"must be a mapping .*, got list")]
)
def test_files_that_are_no_study_are_refused(study: StudyFolder, text: str, message: str) -> None:
    study.spec.write_text(text)
    with pytest.raises(SpecError, match=message):
        add_tasks(study, ["sciq"])
