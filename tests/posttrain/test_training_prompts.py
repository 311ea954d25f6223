"""Training tables and the reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from rlgen_stats.schemas.errors import InputError, SpecError
from rlgen_stats.schemas.study import DataSpec, StudySpec
from rlgen_stats.schemas.tasks import GraderSpec, TaskSpec
from rlgen_stats.stores import StudyFolder
from rlgen_stats.toolkit.extraction.grading import make_grader
from rlgen_stats.toolkit.posttrain import GradedReward, load_training_table, train_run
from rlgen_stats.toolkit.posttrain.training_prompts import check_boundary, table_hash
from tests.posttrain import conftest

Make = Callable[..., StudySpec]


def write(folder: StudyFolder, table: pd.DataFrame) -> None:
    table.to_parquet(folder.root / "data" / "train.parquet")


def test_formats_give_the_same_strings(folder: StudyFolder, make_spec: Make) -> None:
    spec = make_spec()
    table = conftest.train_table()
    table.to_csv(folder.root / "data" / "train.csv", index=False)
    table.assign(answer=table["answer"].astype(int)).to_json(
        folder.root / "data" / "train.jsonl", orient="records", lines=True
    )
    tables = [
        load_training_table(
            spec.model_copy(update={"data": DataSpec(train=f"data/train.{kind}")}), spec.runs[0], folder
        )
        for kind in ("parquet", "csv", "jsonl")
    ]
    assert len({table_hash(one) for one in tables}) == 1
    assert tables[0]["completion"][1] == " so ans 1"


def test_sft_needs_completions_and_rl_does_not(folder: StudyFolder, make_spec: Make) -> None:
    spec = make_spec()
    write(folder, conftest.train_table().drop(columns="completion"))
    assert list(load_training_table(spec, spec.runs[1], folder).columns) == ["text", "answer"]
    with pytest.raises(InputError, match=r"lacks 'completion': SFT imitates .*run 'sft'"):
        load_training_table(spec, spec.runs[0], folder)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pd.DataFrame({"prompt": ["q"]}), r"lacks 'text', 'answer'.*got prompt"),
        (pd.DataFrame({"text": [], "answer": []}), "has no rows"),
        (pd.DataFrame({"text": ["q", "q"], "answer": ["1", None]}), r"1 of 2 rows have an empty 'answer'.*row 1"),
        (pd.DataFrame({"text": ["q", "  "], "answer": ["1", "2"]}), r"empty 'text'.*row 1"),
    ],
)
def test_unusable_tables(table: pd.DataFrame, message: str, folder: StudyFolder, make_spec: Make) -> None:
    spec = make_spec()
    write(folder, table)
    with pytest.raises(InputError, match=message):
        load_training_table(spec, spec.runs[1], folder)


def test_missing_and_broken_files(folder: StudyFolder, make_spec: Make) -> None:
    spec = make_spec()

    def load(name: str | None) -> pd.DataFrame:
        return load_training_table(spec.model_copy(update={"data": DataSpec(train=name)}), spec.runs[1], folder)

    with pytest.raises(SpecError, match="names no table"):
        load(None)
    with pytest.raises(SpecError, match="does not exist"):
        load("data/none.parquet")
    (folder.root / "data" / "broken.parquet").write_bytes(b"not a table")
    with pytest.raises(InputError, match="is not a readable parquet table"):
        load("data/broken.parquet")
    (folder.root / "data" / "train.xlsx").write_bytes(b"")
    with pytest.raises(InputError, match=r"tables are \.parquet, \.csv, \.jsonl files, got '\.xlsx'"):
        load("data/train.xlsx")


def test_completions_that_change_the_prompts_tokens_are_refused() -> None:
    table = conftest.train_table()
    check_boundary(table, conftest.tokenizer())
    glued = table.assign(completion=table["completion"].str.lstrip())
    with pytest.raises(InputError, match=r"training row 0.*start completions with the space"):
        check_boundary(glued, conftest.tokenizer())


@pytest.mark.parametrize(
    ("text", "ids", "expected"),
    [
        ("ans 3", (5, 10, 1), 1.0),
        ("ans 3", (5, 10), 0.0),  # cut off: looks the same as text, is not the same as tokens
        ("ans 2", (5, 9, 1), 0.0),
        ("so so", (6, 6, 1), 0.0),
        ("", (), 0.0),
    ],
)
def test_reward_is_the_grader_and_sees_termination(text: str, ids: tuple[int, ...], expected: float) -> None:
    reward = GradedReward(make_grader(GraderSpec()), {}, stops=(1,))
    columns: dict[str, Any] = {"prompts": ["q"], "trainer_state": None}
    assert reward(completions=[text], completion_ids=[ids], answer=["3"], **columns) == [expected]
    lenient = GradedReward(make_grader(GraderSpec(require_termination=False)), {}, stops=(1,))
    assert lenient(completions=[text], completion_ids=[ids], answer=["3"]) == [float(text == "ans 3")]


def test_rewards_are_each_tasks_own_grader(folder: StudyFolder, make_spec: Make) -> None:
    graders = {"quiz": make_grader(GraderSpec(name="choice"))}
    reward = GradedReward(make_grader(GraderSpec()), graders, stops=(1,))
    rows: dict[str, Any] = {
        "completions": ["ans 1", "ans 1", "It is tin.", "It is tin."],
        "completion_ids": [(5, 1)] * 4,
        "answer": ["1", "B", "B", "tin"],
        "task": ["sum", "quiz", "quiz", "sum"],
        "choices": ["", '["iron", "tin"]', '["iron", "tin"]', ""],
    }
    assert reward(**rows) == [1.0, 0.0, 1.0, 0.0]
    table = conftest.train_table().head(4)
    write(folder, table.assign(task=rows["task"], choices=[None, ["iron", "tin"], ["iron", "tin"], []]))
    spec = make_spec()
    assert list(load_training_table(spec, spec.runs[1], folder).columns) == ["text", "answer"]
    spec = spec.model_copy(update={"tasks": {"quiz": TaskSpec(grader=GraderSpec(name="choice"))}})
    loaded = load_training_table(spec, spec.runs[1], folder)
    assert loaded["task"].tolist() == rows["task"]
    assert loaded["choices"].tolist() == rows["choices"]


def test_training_answers_that_no_grader_can_read_are_refused_before_training(
    folder: StudyFolder, make_spec: Make
) -> None:
    spec = make_spec()
    spec = spec.model_copy(update={"tasks": {"quiz": TaskSpec(grader=GraderSpec(name="choice"))}})
    write(folder, conftest.train_table().assign(task="quiz", choices=[["iron", "tin"]] * len(conftest.train_table())))
    with pytest.raises(
        InputError, match=r"data\.train: the grader cannot read .* row 1 \('.*name another grader under tasks"
    ):
        train_run(spec, spec.runs[1], folder)


def test_rewards_keep_the_order_of_completions() -> None:
    reward = GradedReward(make_grader(GraderSpec()), {}, stops=(1,))
    ids = [(5, 8, 1)] * 3
    assert reward(completions=["ans 1", "ans 2", "ans 3"], completion_ids=ids, answer=["1", "1", "3"]) == [
        1.0,
        0.0,
        1.0,
    ]
