import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlgen_stats.schemas.errors import SpecError, StageError
from rlgen_stats.schemas.tasks import GraderSpec
from rlgen_stats.toolkit.extraction import FORMAT_CLASSES, Completion, Grade, make_grader
from rlgen_stats.toolkit.extraction.graders import formulas, formulas_apart
from rlgen_stats.toolkit.extraction.graders.formulas_apart import FormulaProcess
from rlgen_stats.toolkit.extraction.graders.texts import final_answer
from rlgen_stats.toolkit.extraction.grading import is_degenerate
from rlgen_stats.toolkit.study.spec_file import parse_spec


def complete(text: str, terminated: bool = True) -> Completion:
    return Completion((3, 4), text, terminated)


@pytest.mark.parametrize(
    ("text", "terminated", "expected"),
    [
        ("3 plus 4 so ans 7", True, Grade(True, "answer", True)),
        ("ans 8 no wait ans   7 ", True, Grade(True, "answer", True)),
        ("ans 7 no wait ans 8", True, Grade(False, "answer", True)),
        ("ans 7 or 8", True, Grade(False, "answer", True)),
        ("ans 07", True, Grade(False, "answer", True)),
        ("so **ans 7**.", True, Grade(True, "answer", True)),
        ("ans 7 .. 8.", True, Grade(False, "answer", True)),
        ("ans 7", False, Grade(False, "truncated", True)),
        ("ans 8", False, Grade(False, "truncated", True)),
        ("7", True, Grade(False, "no_answer", False)),
        ("it depends on many things", True, Grade(False, "no_answer", False)),
        ("it is 7 ans", True, Grade(False, "no_answer", False)),
        ("answers 7", True, Grade(False, "no_answer", False)),
        ("3 plus 4 is", False, Grade(False, "truncated", False)),
        ("  ", True, Grade(False, "empty", False)),
        ("", False, Grade(False, "empty", False)),
        ("so so so so so so", False, Grade(False, "degenerate", False)),
        ("well 1 plus 1 plus 1 plus 1 plus 1 plus 1 plus", False, Grade(False, "degenerate", False)),
        ("ans 3 3 3 3 3 3", False, Grade(False, "degenerate", True)),
    ],
)
def test_final_answers_are_graded_and_classed(text: str, terminated: bool, expected: Grade) -> None:
    grade = make_grader(GraderSpec(marker="ans")).grade(complete(text, terminated), "7")
    assert grade == expected
    assert grade.format_class in FORMAT_CLASSES


def test_termination_is_required_only_where_the_study_says_so() -> None:
    lenient = make_grader(GraderSpec(marker="ans", require_termination=False))
    assert lenient.grade(complete("ans 7", terminated=False), "7") == Grade(True, "answer", True)


def test_markers_may_be_signs_or_phrases() -> None:
    assert final_answer("work #### 42", "####") == "42"
    assert final_answer("work ####42", "####") == "42"
    assert final_answer("The answer is: (b)\n", "The answer is:") == "(b)"
    assert final_answer("the trans 5", "ans") is None
    assert final_answer("ans: 5", "ans") == ": 5"
    assert make_grader(GraderSpec(marker="####")).grade(complete("#### a  b"), " a b ").correct


def test_an_answer_of_repeated_words_is_right_if_it_is_the_answer() -> None:
    grader = make_grader(GraderSpec(marker="ans"))
    assert grader.grade(complete("ans 3 3 3 3 3"), "3 3 3 3 3") == Grade(True, "answer", True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a a a", False),
        ("a a a a", True),
        ("a b a b a b a b", True),
        ("a b a b a b a", False),
        ("x y z w v a a a a", False),
        ("x y z w a a a a", True),
        ("a a a a b", False),
        ("one two three four five six seven eight nine ten", False),
    ],
)
def test_degenerate_means_a_loop_at_the_end_that_fills_half(text: str, expected: bool) -> None:
    assert is_degenerate(text) is expected


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", Grade(True, "answer", True)),
        (r"so \boxed{\frac{1}{2}}", r"\frac{2}{4}", Grade(True, "answer", True)),
        ("The answer is 42.", "42", Grade(True, "answer", True)),
        ("The answer is 42.", "41", Grade(False, "answer", True)),
        (r"therefore $x = 3$", "3", Grade(True, "answer", True)),
        (r"the interval is \boxed{[1, 2)}", "$[1,2)$", Grade(True, "answer", True)),
        ("I do not know", "42", Grade(False, "no_answer", False)),
        ("", "42", Grade(False, "empty", False)),
        (r"\boxed{", "42", Grade(False, "no_answer", False)),
    ],
)
def test_formulas_are_compared_by_value(text: str, answer: str, expected: Grade) -> None:
    assert make_grader(GraderSpec(name="math")).grade(complete(text), answer) == expected


def test_formulas_cut_off_are_wrong_and_truncated_whatever_can_be_read() -> None:
    grader = make_grader(GraderSpec(name="math"))
    assert grader.grade(complete("the answer is 42", terminated=False), "42") == Grade(False, "truncated", True)
    assert grader.grade(complete("first 6 times 7", terminated=False), "42") == Grade(False, "truncated", True)
    assert grader.grade(complete("let us see", terminated=False), "42") == Grade(False, "truncated", False)


def test_formulas_are_graded_in_threads_too_and_none_holds_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    grader = make_grader(GraderSpec(name="math"))
    tower = "$9^{9^{9}}$"  # minutes in one call of C, in which no other thread of its process runs

    def graded(texts: list[str]) -> list[Grade]:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda text: grader.grade(complete(text), "3"), texts))

    grades = graded([*(f"the answer is {n}" for n in range(5)), "none"])
    assert [grade.correct for grade in grades] == [False, False, False, True, False, False]
    assert [grade.answered for grade in grades] == [*[True] * 5, False]
    with monkeypatch.context() as patched:
        patched.setattr(formulas_apart, "PATIENCE", 1.0)
        assert graded([tower]) == [Grade(False, "answer", True)]
    assert f"a formula took too long to compare, or too much memory: {tower}" in caplog.text
    assert [grade.correct for grade in graded(["the answer is 3"])] == [True], "the next process"


def test_a_process_that_dies_between_two_formulas_marks_none_wrong(caplog: pytest.LogCaptureFixture) -> None:
    apart = FormulaProcess(formulas.__name__)
    assert apart.judge("the answer is 3", "3") is True
    assert apart._process is not None
    apart._process.kill()
    assert apart.judge("the answer is 3", "3") is True
    apart._process.kill()
    apart._process.wait()
    assert apart.judge("the answer is 4", "3") is False
    assert not caplog.text
    apart._close()


@pytest.mark.timeout(10)
def test_a_completion_that_opens_box_after_box_is_judged_at_once() -> None:
    assert formulas.last_box("\\boxed{" * 10_000) is None
    assert formulas.last_box("\\boxed{" * 10_000 + "3}") == "3"


def test_what_it_says_after_ctrl_c_is_no_answer_to_the_next_question(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = FormulaProcess(formulas.__name__)
    assert apart.judge("the answer is 3", "3") is True

    def interrupted(process: subprocess.Popen[str], patience: float, question: str) -> tuple[str, bool]:
        print(question, file=process.stdin, flush=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(formulas_apart, "_next_line", interrupted)
        with pytest.raises(KeyboardInterrupt):
            apart.judge("the answer is 3", "3")
    assert apart.judge("the answer is 4", "3") is False
    apart._close()


@pytest.mark.parametrize("does", ["exit 1", "exec sleep 600"])
def test_a_process_that_does_not_start_is_an_error_and_not_a_verdict(
    does: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (interpreter := tmp_path / "python").write_text(f"#!/bin/sh\n{does}\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    monkeypatch.setattr(formulas_apart, "START", 1.0)
    with pytest.raises(StageError, match="the process that compares formulas does not start"):
        FormulaProcess(formulas_apart.__name__).judge("3", "3")


def test_every_registered_grader_grades_and_another_name_is_refused() -> None:
    for name in ("final_answer", "math"):
        assert make_grader(GraderSpec(name=name, marker="ans")).grade(complete("so ans 7"), "7").correct
    with pytest.raises(
        SpecError, match=r"'grader.name': the graders are 'final_answer', 'math', .*, got 'maths'; name one"
    ):
        parse_spec({"name": "s", "base": {"path": "b"}, "runs": [], "grader": {"name": "maths"}})
