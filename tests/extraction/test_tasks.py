"""Tasks of a study file: which rows they take, how prompts are rendered, what is refused."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.stores import StudyFolder
from rlgen_stats.stores.prompts import choices_of, load_prompts
from tests.extraction.conftest import prompt_table, study_spec

GASES = [["oxygen", "carbon dioxide"], ["iron", "helium"], ["neon", "lead"], ["tin", "argon"]]


def science(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame(
        {"question": [f"Which {i}?" for i in range(4)], "key": list("BBAB"), "options": GASES} | columns
    )


SCIENCE = {
    "file": "science.parquet",
    "domain": "out",
    "grader": "choice",
    "template": "Q: {text}\n{choices}\nA, as \\boxed{} or {{letter}}:",
    "choices": "options",
    "n_choices": 2,
    "columns": {"text": "question", "answer": "key"},
}


def load(folder: Path, table: pd.DataFrame | None = None, own: pd.DataFrame | None = None, **spec: Any) -> pd.DataFrame:
    if table is not None:
        table.to_parquet(folder / "prompts.parquet")
        spec = {"data": {"prompts": "prompts.parquet"}} | spec
    if own is not None:
        own.to_parquet(folder / "science.parquet")
    return load_prompts(study_spec(**spec), StudyFolder(folder))


def test_a_task_with_a_file_is_rendered_and_comes_after_the_shared_table(tmp_path: Path) -> None:
    prompts = load(tmp_path, prompt_table(), science(), tasks={"science": SCIENCE})
    assert list(prompts.task.unique()) == ["other", "sum", "science"]
    assert prompts.text[:12].tolist() == prompt_table().text.tolist()
    assert prompts.choices[:12].tolist() == [""] * 12
    first = prompts[prompts.task == "science"].iloc[0]
    assert first.text == "Q: Which 0?\nA. oxygen\nB. carbon dioxide\nA, as \\boxed{} or {letter}:"
    assert (first.prompt, first.answer, first.domain, first.cluster) == ("science-1", "B", "out", "science-1")
    assert choices_of(first.choices) == ("oxygen", "carbon dioxide")
    assert choices_of("") == ()
    assert prompts.split.notna().all()


def test_a_template_may_name_any_column_also_one_called_prompt(tmp_path: Path) -> None:
    own = science(prompt=["p"] * 4, task=["t"] * 4)
    prompts = load(tmp_path, own=own, tasks={"science": SCIENCE | {"template": "{prompt} {task} {question}"}})
    assert prompts.text[0] == "p science Which 0?"
    assert prompts.prompt[0] == "science-1"


def test_without_a_shared_table_the_tasks_files_are_enough(tmp_path: Path) -> None:
    spec = study_spec(tasks={"science": SCIENCE})
    assert spec.data.prompts is None
    assert len(load(tmp_path, own=science(), tasks={"science": SCIENCE})) == 4
    with pytest.raises(ValidationError, match="a study needs prompts; name a table under"):
        study_spec(data={"prompts": None})


def test_a_task_of_the_shared_table_has_its_template_columns_and_domain(tmp_path: Path) -> None:
    table = prompt_table().assign(hint="two", options=[json.dumps(["1", "2"])] * 12)
    sums = {"template": "{hint} {text}", "choices": "options", "domain": "out"}
    prompts = load(tmp_path, table, tasks={"sum": sums})
    assert list(prompts.prompt) == list(table.prompt_id)
    summed = prompts.task == "sum"
    assert prompts.text[summed].tolist() == [f"two {text}" for text in table.text[table.task == "sum"]]
    assert prompts.text[~summed].tolist() == table.text[table.task == "other"].tolist()
    assert set(prompts.domain) == {"out"}
    assert set(prompts.choices[summed]) == {'["1", "2"]'}


def test_an_own_split_is_kept_beside_files_that_have_none(tmp_path: Path) -> None:
    own = science(split=["selection", "verification", "trial", "trial"], cluster=["a", "b", "c", "c"])
    prompts = load(tmp_path, prompt_table(), own, tasks={"science": SCIENCE})
    assert prompts.split[12:].tolist() == ["selection", "verification", "trial", "trial"]
    assert prompts.cluster[11:].tolist() == ["p11", "a", "b", "c", "c"]
    alone = load(tmp_path, prompt_table())
    assert prompts.split[:12].tolist() == alone.split.tolist()


@pytest.mark.parametrize(
    ("changes", "columns", "message"),
    [
        ({"n_choices": 4}, {}, r"prompt 'science-1' has 2 choices, expected 4; correct n_choices or the table"),
        ({"choices": "answers"}, {}, r"lacks the column\(s\) \['answers'\]"),
        ({"choices": None}, {}, r"lacks the column\(s\) \['choices'\]"),
        ({"template": "{text} {hint}"}, {}, r"lacks the column\(s\) \['hint'\]"),
        ({"columns": {"text": "query", "answer": "key"}}, {}, r"lacks the column\(s\) \['query'\]"),
        ({"domain": None}, {}, r"lacks the column\(s\) \['domain'\]"),
        ({}, {"options": ["a or b"] * 4}, "options of row 1 must be a list of texts, or its JSON, none of them empty"),
        ({}, {"options": [*GASES[:2], ["a", ""], GASES[3]]}, "options of row 3 must be a list of texts"),
        ({}, {"question": ["a", "b", " ", "c"]}, r"1 row\(s\) have an empty text, the first is row 3"),
        ({}, {"key": ["", "A", "A", "A"]}, r"1 prompt\(s\) have no answer, e\.g\. 'science-1'"),
    ],
)
def test_unusable_rows_of_a_task_are_refused(
    tmp_path: Path, changes: dict[str, Any], columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load(tmp_path, own=science(**columns), tasks={"science": SCIENCE | changes})


def test_tasks_are_refused_that_have_no_rows_or_rows_in_two_places(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"'tasks' .* names \['chemistry'\], but the tasks of .* are \['other', 'sum'\]"
    ):
        load(tmp_path, prompt_table(), tasks={"chemistry": {}})
    with pytest.raises(InputError, match="has rows of task 'sum', which names a file of its own; keep one of the two"):
        load(tmp_path, prompt_table(), science(), tasks={"sum": SCIENCE})
    with pytest.raises(InputError, match="prompt ids must be unique, 'p1' comes more than once"):
        load(tmp_path, prompt_table(), science(prompt_id=["p1", "s2", "s3", "s4"]), tasks={"science": SCIENCE})


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"template": "Answer:"}, "the template must name a column of the prompt's text"),
        ({"template": "{choices}"}, "the template must name a column of the prompt's text"),
        ({"template": "{text} \\boxed{answer}"}, "the template would show the models the expected answer"),
        ({"template": "{text} {key}", "columns": {"answer": "key"}}, "would show the models the expected answer"),
        ({"n_choices": 1}, "greater than or equal to 2"),
        ({"stop": [""]}, "at least 1 character"),
        ({"role": "heldout"}, "'selection', 'held_out' or 'control'"),
        ({"grader": {"name": "regex"}}, "grader 'regex', and it alone, takes 'pattern'; got grader 'regex'"),
        (
            {"grader": {"name": "math", "pattern": "a"}},
            "grader 'regex', and it alone, takes 'pattern'; got grader 'math'",
        ),
        ({"grader": {"name": "regex", "pattern": "("}}, r"pattern '\(' is no regular expression"),
        ({"grader": {"python": "mygrader"}}, "is named package.module:function, got 'mygrader'"),
    ],
)
def test_bad_tasks_are_explained(task: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        study_spec(tasks={"sum": task})


def test_older_files_with_one_grader_and_lists_of_tasks_still_read() -> None:
    lists = {"held_out_tasks": ["sum"], "control_tasks": ["riddle"]}
    older = study_spec(grader={"name": "math"}, selection=lists)
    newer = study_spec(
        tasks={"sum": {"role": "held_out", "grader": "math"}, "riddle": {"role": "control", "grader": {"name": "math"}}}
    )
    for spec in (older, newer):
        assert spec.selection.held_out_tasks == ("sum",)
        assert spec.selection.control_tasks == ("riddle",)
        assert spec.grader_of("sum").name == spec.grader_of("riddle").name == "math"
    assert older.grader_of("other").name == "math"
    assert newer.grader_of("other").name == "final_answer"
    both = study_spec(tasks={"sum": {}, "more": {"role": "held_out"}}, selection=lists)
    assert both.tasks["sum"].role == "held_out"
    assert both.selection.held_out_tasks == ("sum", "more")
    with pytest.raises(ValidationError, match="task 'sum' has role 'control', but selection"):
        study_spec(tasks={"sum": {"role": "control"}}, selection=lists)
    assert study_spec(**json.loads(newer.model_dump_json())) == newer


def test_a_grader_is_dumped_as_before_settings_of_other_graders_existed() -> None:
    assert study_spec().model_dump()["grader"] == {"name": "final_answer", "marker": "ans", "require_termination": True}
