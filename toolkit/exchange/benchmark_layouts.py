"""Ready-made tasks: how the rows of published benchmarks are laid out, and how each is asked and graded.

Where a benchmark is published in several layouts, the reader takes each of them. Prompts and scoring follow
lm-evaluation-harness, so that accuracies can be compared with its ``acc`` (normalize: none) and ``acc_norm``
(normalize: characters).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Final, Literal

from rlgen_stats.schemas.errors import InputError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """One row of a benchmark, whatever its layout."""

    text: str
    answer: str
    """The letter of the right choice, or the answer itself."""
    choices: tuple[str, ...] = ()
    about: str = ""
    """Text that several questions may share (a passage, a goal); those depend on one another. Default: the text."""
    id: str = ""
    """As published; empty where the layout has none."""


@dataclass(frozen=True)
class Benchmark:
    """A published set of questions and how it is asked."""

    name: str
    title: str
    dataset: str
    """Hub id, with ``@revision`` where the default one needs code of its own to be read."""
    split: str
    domain: Literal["in", "out"]
    read: Callable[[Row], Question]
    template: str
    config: str | None = None
    options: Literal["letters", "texts"] | None = None
    """What is scored of each choice; None for a benchmark that is answered in free text."""
    normalize: Literal["none", "characters"] = "none"
    n_choices: int | None = None
    """Number of choices, where all questions have as many."""
    role: Literal["selection", "held_out"] = "selection"

    @property
    def scoring(self) -> str:
        """How answers are graded, in a few words."""
        if self.options is None:
            return "math"
        return f"choice_loglik: {self.options}" + ("" if self.normalize == "none" else f" per {self.normalize[:-1]}")

    def settings(self, file: str, *, generated: bool = False) -> dict[str, Any]:
        """Entry of this task under ``tasks:`` of a study.

        Parameters
        ----------
        file
            Its table, relative to the study folder.
        generated
            Let models write the letter of a choice, instead of scoring every choice by its log-likelihood.
        """
        entry: dict[str, Any] = {"file": file, "domain": self.domain}
        if self.role != "selection":
            entry["role"] = self.role
        if self.options is None:
            entry |= {"grader": "math", "template": self.template}
        elif generated:
            entry |= {"grader": "choice", "template": _ASKED_FOR_A_LETTER, "stop": ["\nQuestion:"]}
        else:
            grader = {"name": "choice_loglik", "options": self.options, "normalize": self.normalize}
            entry |= {"grader": grader, "template": self.template}
        return entry if self.n_choices is None else entry | {"n_choices": self.n_choices}


def questions(benchmark: Benchmark, rows: Sequence[Row], columns: Mapping[str, str]) -> list[Question]:
    """The questions in published rows.

    Parameters
    ----------
    benchmark
        Whose layouts are tried.
    rows
        Column -> cell; lists and structs as Python's.
    columns
        Published name -> name in these rows, where they differ.

    Raises
    ------
    InputError
        If a row lacks a column, has no right answer, or other choices than the benchmark.
    """
    read = []
    for number, row in enumerate(rows, start=1):
        missing = sorted(set(columns.values()) - set(row))
        try:
            if missing:
                raise _UnreadableError(f"lacks {', '.join(missing)}")
            question = benchmark.read({**row, **{ours: row[theirs] for ours, theirs in columns.items()}})
            if benchmark.n_choices not in (None, len(question.choices)):
                raise _UnreadableError(f"has {len(question.choices)} choices, expected {benchmark.n_choices}")
            if not all(question.choices):
                raise _UnreadableError("has an empty choice")
        except _UnreadableError as error:
            raise InputError(
                f"row {number} of {benchmark.name} {error}; it has the columns {', '.join(map(str, row))}. Name a "
                "column of your own with --column PUBLISHED=YOURS."
            ) from error
        except (LookupError, TypeError, ValueError) as error:  # cells of other types than in any layout
            raise InputError(
                f"row {number} of {benchmark.name} has other cells than the published table ({error!r}); a csv cannot "
                "hold lists or structs: give jsonl or parquet."
            ) from error
        read.append(question)
    return read


def shuffled(key: str, choices: Sequence[str]) -> list[str]:
    """Choices in an order that depends on a key and their texts, not on the order in which they come."""
    return sorted(choices, key=lambda choice: hashlib.sha256(f"{key}\x1f{choice}".encode()).digest())


# -- cells


class _UnreadableError(ValueError):
    """What a row lacks, said without the row."""


def _cell(row: Row, *names: str) -> Any:
    """The first of these columns that the row has and that is not empty."""
    for name in names:
        cell = row.get(name)
        if cell is not None and not (isinstance(cell, str) and not cell.strip()):
            return cell
    raise _UnreadableError(f"lacks {' or '.join(names)}")


def _text(row: Row, *names: str) -> str:
    return str(_cell(row, *names)).strip()


def _structs(cell: Any) -> list[dict[str, Any]]:
    """A list of structs; ``datasets`` also publishes it as a struct of lists."""
    if isinstance(cell, str):
        raise TypeError("a text instead of a list of choices")
    if isinstance(cell, Mapping):
        return [dict(zip(cell, values, strict=True)) for values in zip(*cell.values(), strict=True)]
    return list(cell)


def _letter(key: Any, labels: Sequence[Any]) -> str:
    """The letter of the choice with this label."""
    known = [str(label).strip() for label in labels]
    if str(key).strip() not in known:
        raise _UnreadableError(f"gives {key!r} as the right choice, expected one of {', '.join(known)}")
    return ascii_uppercase[known.index(str(key).strip())]


def _by_position(key: Any, n: int) -> str:
    """The letter of a choice given by a letter, or by its number from 0."""
    letters = ascii_uppercase[:n]
    name = str(key).strip().upper()
    return name if len(name) == 1 and name in letters else _letter(name, range(n))


def _list(row: Row, *names: str) -> tuple[str, ...]:
    cell = _cell(row, *names)
    if isinstance(cell, str):
        raise _UnreadableError(f"has text where {' or '.join(names)} is a list of choices")
    return tuple(str(choice).strip() for choice in cell)


# -- layouts


def _math(row: Row) -> Question:
    """Columns problem (or question), answer; AIME tables without answers have them boxed in their solutions."""
    try:
        answer = _text(row, "answer", "Answer")
    except _UnreadableError:
        boxed = re.findall(r"\\boxed\{(\d+)\}", str(row.get("solution", "")))
        if not boxed:
            raise
        answer = boxed[-1]
    published = next((str(row[name]) for name in ("unique_id", "id", "ID") if row.get(name) not in (None, "")), "")
    return Question(_text(row, "problem", "Problem", "question"), answer, id=published)


def _gsm8k(row: Row) -> Question:
    """Columns question, answer: a solution that ends in ``#### 1,234``."""
    _, marker, answer = _text(row, "answer").rpartition("####")
    if not marker and len(answer.split()) > 1:
        raise _UnreadableError("has no #### before its final answer")
    return Question(_text(row, "question"), answer.strip().replace(",", ""))


def _labelled(row: Row) -> Question:
    """Columns id, question or question_stem, choices {text, label}, answerKey; or question {stem, choices}, too."""
    inner = row.get("question")
    flat: Row = {**row, **inner, "question": inner.get("stem")} if isinstance(inner, Mapping) else row
    choices = _structs(_cell(flat, "choices"))
    return Question(
        text=_text(flat, "question_stem", "question"),
        answer=_letter(_cell(flat, "answerKey"), [choice["label"] for choice in choices]),
        choices=tuple(str(choice["text"]).strip() for choice in choices),
        id=str(flat.get("id", "")),
    )


def _headqa(row: Row) -> Question:
    """Columns name (the exam), qid, qtext, answers {aid, atext}, ra (the right aid)."""
    answers = _structs(_cell(row, "answers"))
    exam = [str(row[name]) for name in ("name", "qid") if row.get(name) not in (None, "")]
    return Question(
        text=_text(row, "qtext"),
        answer=_letter(_cell(row, "ra"), [answer["aid"] for answer in answers]),
        choices=tuple(str(answer["atext"]).strip() for answer in answers),
        id="-".join(exam),
    )


def _sciq(row: Row) -> Question:
    """Columns question, distractor1 to distractor3, correct_answer, support; choices are ordered by a hash."""
    question, right = _text(row, "question"), _text(row, "correct_answer")
    support = str(row.get("support") or "").strip()
    choices = shuffled(question, [*(_text(row, f"distractor{i}") for i in (1, 2, 3)), right])
    text = f"{support}\nQuestion: {question}" if support else f"Question: {question}"
    return Question(text, ascii_uppercase[choices.index(right)], tuple(choices), about=support)


def _logiqa(row: Row) -> Question:
    """Columns context, question (or query), options, label (or correct_option, answer): a letter, or 0 and up."""
    passage, choices = _text(row, "context", "text"), _list(row, "options", "answers")
    return Question(
        text=f"Passage: {passage}\nQuestion: {_text(row, 'question', 'query')}",
        answer=_by_position(_cell(row, "label", "correct_option", "answer"), len(choices)),
        choices=choices,
        about=passage,
    )


def _piqa(row: Row) -> Question:
    """Columns goal, sol1, sol2, label: 0 or 1."""
    return Question(_text(row, "goal"), _by_position(_cell(row, "label"), 2), (_text(row, "sol1"), _text(row, "sol2")))


def _mmlu(row: Row) -> Question:
    """Columns question, choices, answer: a letter, or a number from 0."""
    choices = _list(row, "choices")
    return Question(_text(row, "question"), _by_position(_cell(row, "answer"), len(choices)), choices)


_BOXED: Final = "{text}\nPlease reason step by step, and put your final answer within \\boxed{}."
_PLAIN: Final = "Question: {text}\nAnswer:"
_ASKED_FOR_A_LETTER: Final = "Question: {text}\n{choices}\nAnswer:"
_PARQUET: Final = "@refs/convert/parquet"
"""Branch in which the Hub keeps a copy of data sets whose own reader is a script."""

BENCHMARKS: Final = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("math500", "MATH-500", "HuggingFaceH4/MATH-500", "test", "in", _math, _BOXED),
        Benchmark("aime24", "AIME 2024", "Maxwell-Jia/AIME_2024", "train", "in", _math, _BOXED),
        Benchmark("aime25", "AIME 2025", "math-ai/aime25", "test", "in", _math, _BOXED),
        Benchmark("gsm8k", "GSM8K", "openai/gsm8k", "test", "in", _gsm8k, _BOXED, "main"),
        Benchmark(
            "openbookqa", "OpenBookQA", "allenai/openbookqa", "test", "out", _labelled, "{text}", "main",
            options="texts", normalize="characters", n_choices=4,
        ),
        Benchmark(
            "commonsenseqa", "CommonsenseQA", "tau/commonsense_qa", "validation", "out", _labelled, _ASKED_FOR_A_LETTER,
            options="letters", n_choices=5,
        ),
        Benchmark(
            "headqa", "HEAD-QA", f"EleutherAI/headqa{_PARQUET}", "test", "out", _headqa, _PLAIN, "en",
            options="texts", normalize="characters",
        ),
        Benchmark(
            "sciq", "SciQ", "allenai/sciq", "test", "out", _sciq, "{text}\nAnswer:", options="texts", n_choices=4
        ),
        Benchmark(
            "arc_challenge", "ARC-Challenge", "allenai/ai2_arc", "test", "out", _labelled, _PLAIN, "ARC-Challenge",
            options="texts", normalize="characters",
        ),
        Benchmark(
            "mmlu", "MMLU", "cais/mmlu", "test", "out", _mmlu, "{text}\n{choices}\nAnswer:", "all",
            options="letters", n_choices=4,
        ),
        Benchmark(
            "logiqa", "LogiQA", f"lucasmccabe/logiqa{_PARQUET}", "test", "out", _logiqa,
            "{text}\nChoices:\n{choices}\nAnswer:",
            options="texts", normalize="characters", n_choices=4, role="held_out",
        ),
        Benchmark(
            "piqa", "PIQA", f"ybisk/piqa{_PARQUET}", "validation", "out", _piqa, _PLAIN,
            options="texts", normalize="characters", n_choices=2, role="held_out",
        ),
    )
}  # fmt: skip
"""Name -> task, those of arXiv 2604.25011 and two more."""
