from __future__ import annotations

import json
from string import ascii_uppercase
from typing import Any

import pandas as pd
import pytest

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.toolkit.exchange.benchmark_layouts import BENCHMARKS, questions, shuffled
from tests.exchange.published_rows import ANSWERS, LAYOUTS


def read(name: str, rows: Any, **columns: str) -> Any:
    return questions(BENCHMARKS[name], rows, columns)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_right_answers_of_every_published_layout(name: str, layout: str) -> None:
    found = read(name, LAYOUTS[name, layout])
    given = [q.choices[ascii_uppercase.index(q.answer)] if q.choices else q.answer for q in found]
    assert given == ANSWERS[name]
    assert bool(found[0].choices) == (BENCHMARKS[name].options is not None)


def test_layouts_of_one_task_hold_the_same_questions() -> None:
    for name in BENCHMARKS:
        read_alike = [
            [(q.text, q.answer, q.choices, q.about) for q in read(name, rows)]
            for (task, _), rows in LAYOUTS.items()
            if task == name
        ]
        assert read_alike, name
        assert all(one == read_alike[0] for one in read_alike)


def test_every_task_of_the_paper_has_its_domain_and_role() -> None:
    roles = {name: (one.domain, one.role) for name, one in BENCHMARKS.items()}
    inside, outside = ("in", "selection"), ("out", "selection")
    assert {name for name, role in roles.items() if role == inside} == {"math500", "aime24", "aime25", "gsm8k"}
    assert {name for name, role in roles.items() if role == ("out", "held_out")} == {"logiqa", "piqa"}
    assert {"openbookqa", "commonsenseqa", "headqa", "sciq", "arc_challenge"} < {
        name for name, role in roles.items() if role == outside
    }


def test_the_right_choice_of_sciq_stands_anywhere_and_always_there() -> None:
    rows = [
        {"question": f"What is thing {i}?", "correct_answer": "this", "support": ""}
        | {f"distractor{k}": f"that {k}" for k in (1, 2, 3)}
        for i in range(200)
    ]
    letters = pd.Series([q.answer for q in read("sciq", rows)])
    counts = letters.value_counts()
    assert set(counts.index) == set("ABCD")
    assert counts.min() > 25  # of 50 expected, sd 6
    assert [q.answer for q in read("sciq", rows[::-1])] == list(letters)[::-1]
    moved = [row | {"distractor1": row["distractor3"], "distractor3": row["distractor1"]} for row in rows]
    assert [q.choices for q in read("sciq", moved)] == [q.choices for q in read("sciq", rows)]
    assert shuffled("a", ["x", "y", "z"]) == shuffled("a", ["z", "x", "y"])


def test_columns_of_ones_own() -> None:
    rows = [{"frage": "Find 6*7.", "antwort": "42"}]
    (question,) = read("aime25", rows, problem="frage", answer="antwort")
    assert (question.text, question.answer) == ("Find 6*7.", "42")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "openbookqa",
            {"frage": "q"},
            r"row 1 of openbookqa lacks choices; it has the columns frage\. Name .* --column",
        ),
        ("math500", {"problem": "p", "solution": "none"}, r"row 1 of math500 lacks answer or Answer"),
        ("math500", {"problem": " ", "answer": "1"}, r"lacks problem or Problem or question"),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": -1}, r"gives '-1' as the right .*one of 0, 1"),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b"}, r"lacks label"),
        ("mmlu", {"question": "q", "choices": ["a", "b", "c"], "answer": 0}, r"has 3 choices, expected 4"),
        ("mmlu", {"question": "q", "choices": ["a", "b", " ", "d"], "answer": 0}, r"has an empty choice"),
        ("mmlu", {"question": "q", "choices": list("abcd"), "answer": "E"}, r"gives 'E' as the right choice"),
        ("mmlu", {"question": "q", "choices": "a b c d", "answer": 0}, r"has text where choices is a list"),
        ("arc_challenge", {"question": "q", "choices": "{'text': ['a']}", "answerKey": "A"}, r"row 1 .* a csv cannot"),
        ("arc_challenge", {"question": "q", "choices": {"text": ["a"]}, "answerKey": "A"}, r"KeyError\('label'\)"),
        ("gsm8k", {"question": "q", "answer": "6 and 1 make 7"}, r"row 1 of gsm8k has no #### before"),
    ],
)
def test_rows_of_another_layout_are_refused(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(name, [row])


def test_a_column_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"row 1 of aime25 lacks loesung; it has the columns problem"):
        read("aime25", [{"problem": "p"}], answer="loesung")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_settings_are_plain_data(name: str) -> None:
    for generated in (False, True):
        settings = BENCHMARKS[name].settings("data/tasks/x.parquet", generated=generated)
        assert json.loads(json.dumps(settings)) == settings
        assert "{text}" in settings["template"]
