"""Graders on completions with known labels, and what each refuses."""

import logging
import sys
from pathlib import Path

import pandas as pd
import pytest

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.tasks import GRADERS, GraderSpec
from rlgen_stats.toolkit.extraction import Completion, make_grader
from rlgen_stats.toolkit.extraction.graders.choices import expected_choice
from rlgen_stats.toolkit.extraction.graders.normal_forms import words
from rlgen_stats.toolkit.extraction.grading import check_answers
from tests.extraction.graders.labelled import GASES, SETS, Labelled

ROWS = [(name, *row) for name, labelled in SETS.items() for row in labelled.rows]


@pytest.mark.parametrize(("name", "text", "answer", "label"), ROWS)
def test_completions_are_graded_as_a_person_grades_them(name: str, text: str, answer: str, label: bool | None) -> None:
    labelled: Labelled = SETS[name]
    grader = make_grader(GraderSpec.model_validate(labelled.grader))
    grade = grader.grade(Completion((3, 4), text, True), answer, labelled.choices)
    verdict = grade.correct if grade.answered else None
    assert verdict is labelled.known_misses.get(text, label)


def test_no_set_has_a_completion_that_is_wrongly_called_right() -> None:
    for labelled in SETS.values():
        assert all(verdict is not True for verdict in labelled.known_misses.values())
        assert labelled.known_misses.keys() <= {text for text, _, _ in labelled.rows}


def test_every_grader_of_the_schema_is_there() -> None:
    settings = {"regex": {"pattern": "a"}, "python": {"python": "math:isclose"}}
    for name in GRADERS:
        assert callable(make_grader(GraderSpec(name=name, **settings.get(name, {}))).grade)
    assert [make_grader(GraderSpec(name=name)).needs_generation for name in ("choice", "choice_loglik")] == [
        True,
        False,
    ]


def test_an_expected_choice_is_a_letter_or_a_text() -> None:
    answers = {"B": 1, "(b)": 1, "b.": 1, "Carbon dioxide": 1, "a mixture of carbon dioxide and water": 3}
    assert {answer: expected_choice(answer, GASES) for answer in answers} == answers
    assert all(expected_choice(answer, GASES) is None for answer in ("E", "carbon", "2", ""))
    assert expected_choice("E", ()) == 4
    assert expected_choice("oxygen", ("Oxygen", "oxygen.")) is None


def test_words_keep_what_tells_answers_apart() -> None:
    assert words("a") == ("a",)
    assert words("\u00bd") == words("1/2")
    assert words("3-5") != words("3 -5")
    assert len({words(text) for text in ("5", "-5", "5%", "0.5", "5 >", "x5")}) == 6


def table(task: str, answers: list[str], choices: str = "") -> pd.DataFrame:
    ids = [f"{task}-{number}" for number in range(len(answers))]
    return pd.DataFrame({"prompt": ids, "answer": answers, "task": task, "choices": choices})


def test_expected_answers_that_no_completion_can_match_are_refused_with_their_ids() -> None:
    """Golds such as these parsed to nothing, and every model was wrong."""
    math, choice = make_grader(GraderSpec(name="math")), make_grader(GraderSpec(name="choice"))
    answers = [
        r"\$18.90",
        r"\$32,\!348",
        "$18.90",
        "9/7",
        r"\text{east}",
        "(1,234)",
        "2516_8",
        "\u22125",
        "10\\%",
        "7.",
    ]
    check_answers({"m": math}, table("m", answers))
    with pytest.raises(
        InputError,
        match=r"task 'm': the grader cannot read 2 of 3 expected answer\(s\): m-1 \('\\\\frac\{'\), m-2 \('.*'\); "
        r"correct the answers, drop the rows or name another grader under tasks\.m\.grader",
    ):
        check_answers({"m": math}, table("m", ["7", "\\frac{", "\\text{}"]))
    texts = '["oxygen", "carbon dioxide"]'
    check_answers({"c": choice}, table("c", ["A", "b", "carbon dioxide"], texts))
    with pytest.raises(
        InputError, match=r"read 3 of 3 expected answer\(s\): c-0 \('C'\), c-1 \('2'\), c-2 \('carbon'\)"
    ):
        check_answers({"c": choice}, table("c", ["C", "2", "carbon"], texts))
    with pytest.raises(InputError, match=r"read 12 of 12 .* c-9 \('z'\) and 2 more; correct"):
        check_answers({"c": choice}, table("c", ["z"] * 12, texts))
    check_answers({"r": make_grader(GraderSpec(name="regex", pattern="so (.*)"))}, table("r", ["7"]))
    check_answers({"f": make_grader(GraderSpec(marker="####"))}, table("f", ["7.", "5,600", "**x**"]))
    check_answers({"e": make_grader(GraderSpec(name="exact"))}, table("e", ["the A", "\u22125"]))
    with pytest.raises(InputError, match=r"e-0 \('\.\.\.'\)"):
        check_answers({"e": make_grader(GraderSpec(name="exact"))}, table("e", ["..."]))


def test_a_function_of_ones_own_sees_text_answer_and_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_tests.py").write_text(
        "def grade(text, answer, choices):\n    return None if not choices else (text + answer in choices)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    grader = make_grader(GraderSpec.model_validate({"python": "mine_for_tests:grade"}))
    verdicts = [grader.grade(Completion((), text, True), "b", ("ab", "c")) for text in ("a", "b")]
    assert [verdict.correct for verdict in verdicts] == [True, False]
    assert not grader.grade(Completion((), "a", True), "b").answered
    check_answers({"p": grader}, table("p", ["b"]))
    sys.modules.pop("mine_for_tests")
    for name in ("mine_for_tests:other", "no_such_module_here:grade"):
        with pytest.raises(InputError, match=r"no grader .* install its package or put its folder on PYTHONPATH"):
            make_grader(GraderSpec(name="python", python=name))


def test_a_time_out_logs_a_line_and_not_the_completion(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """math-verify logs the whole text of which the time ran out."""
    text = "so x " * 2000
    with caplog.at_level("WARNING", logger="math_verify.parser"):
        logging.getLogger("math_verify.parser").warning(f"Timeout during parsing: {text}")
        logging.getLogger("math_verify.parser").warning("short %s", "one")
    assert [len(record.getMessage()) <= 121 for record in caplog.records] == [True, True]
    assert caplog.records[0].getMessage().startswith("Timeout during parsing: so x")
    assert caplog.records[1].getMessage() == "short one"
