"""Training tables and the reward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from rlgen_stats.schemas.errors import InputError, SpecError
from rlgen_stats.schemas.study import ChatSpec, DataSpec, ModelsSpec, StudySpec
from rlgen_stats.schemas.tasks import GraderSpec, TaskSpec
from rlgen_stats.stores import StudyFolder
from rlgen_stats.toolkit.extraction import PromptReader
from rlgen_stats.toolkit.extraction.grading import make_grader
from rlgen_stats.toolkit.posttrain import GradedReward, load_training_table, train_run
from rlgen_stats.toolkit.posttrain.arguments import trainer_arguments
from rlgen_stats.toolkit.posttrain.training_prompts import check_lengths, encode_training, table_hash
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
    with pytest.raises(InputError, match=r"tables are .* files, got '\.xlsx'"):
        load("data/train.xlsx")


def test_completions_that_change_the_prompts_tokens_are_refused() -> None:
    table, reader = conftest.train_table(), PromptReader(conftest.tokenizer(), ChatSpec(), "sft")
    encoded = encode_training(table, reader)
    assert encoded["input_ids"][3] == [3, 10, 4, 6, 5, 10, 1]  # q 3 : so ans 3 <eos>
    assert encoded["completion_mask"][3] == [0, 0, 0, 1, 1, 1, 1]
    assert encode_training(table.assign(completion=table["completion"] + "<eos>"), reader) == encoded
    glued = table.assign(completion=table["completion"].where(table.index != 9, "so ans 1"))
    with pytest.raises(
        InputError, match=r"training row 9: the completion 'so ans 1'.*start completions with the space"
    ):
        encode_training(glued, reader)


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


def lengths_of(spec: StudySpec, index: int, n_words: int) -> str:
    """What is said of a table whose longest text has 3 + ``n_words`` tokens, the end token not counted."""
    run = spec.runs[index]
    table = pd.DataFrame({"text": ["q 1 :"] * 3, "completion": [" so", " so" * n_words, " so so"]})
    arguments = trainer_arguments(
        run,
        output=Path("x"),
        seed=0,
        device=torch.device("cpu"),
        max_new_tokens=spec.generation.max_new_tokens,
    )
    return check_lengths(spec, run, table, PromptReader(conftest.tokenizer(), ChatSpec(), "sft"), arguments)


def test_training_texts_are_not_cut_by_a_default(make_spec: Make) -> None:
    spec = make_spec()
    assert lengths_of(spec, 0, 1020) == ""  # with the end token 1,024, which is TRL's limit
    with pytest.raises(
        SpecError,
        match=r"run 'sft': 1 of 3 training texts are longer than 1024 tokens and would be cut there, by TRL's default; "
        r"write trainer\.max_length: 1025 to keep them whole, or 1024",
    ):
        lengths_of(spec, 0, 1021)
    assert lengths_of(make_spec(sft={"max_length": 1025}), 0, 1021) == ""
    assert lengths_of(make_spec(sft={"max_length": None}), 0, 5000) == ""
    said = lengths_of(make_spec(sft={"max_length": 5}), 0, 1021)
    assert "2 of 3 training texts are longer than 5 tokens and cut there, by trainer.max_length (the longest" in said


def test_completions_cut_shorter_in_training_than_elsewhere_are_said(make_spec: Make) -> None:
    spec = make_spec(rl={"max_completion_length": 511})  # generation.max_new_tokens is 512
    assert "cuts completions in training at 511 tokens, generation.max_new_tokens elsewhere at 512" in lengths_of(
        spec, 1, 1
    )
    assert lengths_of(make_spec(rl={"max_completion_length": 512}), 1, 1) == ""


def test_what_training_depends_on_besides_the_run(make_spec: Make) -> None:
    low = {"models": ModelsSpec(dtype="bfloat16", device_map="auto", attn_implementation="eager")}
    spec = make_spec().model_copy(update=low)
    lora = make_spec(sft={"peft": {"r": 2}}, rl={"max_completion_length": 4}).model_copy(update=low)
    assert spec.training_models(spec.runs[0]) == ModelsSpec(attn_implementation="eager")  # float32, on one device
    assert lora.training_models(lora.runs[0]) == ModelsSpec(dtype="bfloat16", attn_implementation="eager")
    plain = make_spec()
    assert [plain.training_settings(run) for run in plain.runs] == [[], []]  # keys as before these settings existed
    open_ = plain.runs[1].model_copy(update={"trainer": {}})
    assert plain.training_settings(open_) == [512]
    assert len(lora.training_settings(lora.runs[0])) == 1
