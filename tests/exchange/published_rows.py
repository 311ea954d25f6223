"""A few rows of our own in the layouts in which benchmarks are published: the questions are invented."""

from __future__ import annotations

from typing import Any, Final

Rows = list[dict[str, Any]]


def _choices(*texts: str, labels: str = "ABCDE") -> dict[str, list[str]]:
    return {"text": list(texts), "label": list(labels[: len(texts)])}


def _structs(cell: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(cell, values, strict=True)) for values in zip(*cell.values(), strict=True)]


_KETTLE = _choices("it rusts", "it whistles", "it floats", "it glows")
_ANTS = _choices("by smell", "by song", "by maps", "by the moon")
_HEAD: Final = {"name": "Exam_2031_X", "year": "2031", "category": "biology"}
_NURSE = {"aid": [1, 2, 3, 4], "atext": ["a cold hand", "a warm hand", "no hand", "two hands"]}
_CELLS = {"aid": [1, 2, 3, 4, 5], "atext": ["wood", "water", "stone", "steam", "salt"]}
_TRAINS = "Every red train is late. No late train is full."

LAYOUTS: Final[dict[tuple[str, str], Rows]] = {
    ("math500", "MATH-500"): [
        {"problem": "What is $2+3$?", "solution": "It is $\\boxed{5}$.", "answer": "5", "subject": "Algebra",
         "level": 1, "unique_id": "test/own/1.json"},
        {"problem": "Halve $3$.", "solution": "$\\boxed{\\frac{3}{2}}$", "answer": "\\frac{3}{2}", "subject": "Algebra",
         "level": 2, "unique_id": "test/own/2.json"},
    ],
    ("aime24", "Maxwell-Jia/AIME_2024"): [
        {"ID": "2031-I-1", "Problem": "Find $n$ with $n-1=24$.", "Solution": "Add one.", "Answer": 25},
        {"ID": "2031-I-2", "Problem": "Find $7^2$.", "Solution": "Square.", "Answer": 49},
    ],
    ("aime24", "HuggingFaceH4/aime_2024"): [
        {"id": 60, "problem": "Find $n$ with $n-1=24$.", "solution": "Add one.", "answer": "25", "year": "2031"},
        {"id": 61, "problem": "Find $7^2$.", "solution": "Square.", "answer": "49", "year": "2031"},
    ],
    ("aime24", "math-ai/aime24"): [
        {"id": 60, "problem": "Find $n$ with $n-1=24$.", "solution": "Not \\boxed{24}. \\boxed{25}"},
        {"id": 61, "problem": "Find $7^2$.", "solution": "\\boxed{49}"},
    ],
    ("aime25", "math-ai/aime25"): [{"problem": "Find $6\\cdot 7$.", "answer": "42", "id": "0"}],
    ("aime25", "opencompass/AIME2025"): [{"question": "Find $6\\cdot 7$.", "answer": "42"}],
    ("gsm8k", "openai/gsm8k"): [
        {"question": "Ann has 3 bags of 4 nuts. How many nuts?", "answer": "3*4 = <<3*4=12>>12 nuts.\n#### 12"},
        {"question": "A town of 1,000 gains 234. How many now?", "answer": "1000+234 = 1234.\n#### 1,234"},
    ],
    ("openbookqa", "allenai/openbookqa"): [
        {"id": "7-1", "question_stem": "When water boils in a kettle", "choices": _KETTLE, "answerKey": "B"},
        {"id": "7-2", "question_stem": "Ants find their way", "choices": _ANTS, "answerKey": "A"},
    ],
    ("openbookqa", "first published"): [
        {"id": "7-1", "question": {"stem": "When water boils in a kettle", "choices": _structs(_KETTLE)},
         "answerKey": "B"},
        {"id": "7-2", "question": {"stem": "Ants find their way", "choices": _structs(_ANTS)}, "answerKey": "A"},
    ],
    ("commonsenseqa", "tau/commonsense_qa"): [
        {"id": "f1", "question": "Where does one hang a wet coat?", "question_concept": "coat", "answerKey": "E",
         "choices": {"label": list("ABCDE"), "text": ["oven", "river", "pillow", "soup", "hook"]}},
    ],
    ("commonsenseqa", "first published"): [
        {"id": "f1", "answerKey": "E", "question": {
            "question_concept": "coat", "stem": "Where does one hang a wet coat?",
            "choices": _structs(_choices("oven", "river", "pillow", "soup", "hook")),
        }},
    ],
    ("arc_challenge", "allenai/ai2_arc"): [
        {"id": "Own_1", "question": "Which of these melts first in the sun?", "answerKey": "D",
         "choices": _choices("a brick", "a coin", "a spoon", "an ice cube")},
        {"id": "Own_2", "question": "Which planet do we live on?", "answerKey": "3",
         "choices": _choices("Mars", "Venus", "Earth", labels="123")},
    ],
    ("headqa", "EleutherAI/headqa"): [
        {**_HEAD, "qid": 1, "qtext": "A patient is cold. What helps?", "ra": 2, "answers": _structs(_NURSE)},
        {**_HEAD, "qid": 2, "qtext": "What are cells full of?", "ra": 2, "image": "", "answers": _structs(_CELLS)},
    ],
    ("headqa", "as a struct of lists"): [
        {**_HEAD, "qid": "1", "qtext": "A patient is cold. What helps?", "ra": "2", "answers": _NURSE},
        {**_HEAD, "qid": "2", "qtext": "What are cells full of?", "ra": "2", "answers": _CELLS},
    ],
    ("sciq", "allenai/sciq"): [
        {"question": "What do magnets attract?", "distractor1": "wool", "distractor2": "glass", "distractor3": "milk",
         "correct_answer": "iron", "support": "Iron is drawn to magnets."},
        {"question": "What do bees make?", "distractor1": "silk", "distractor2": "ink", "distractor3": "tar",
         "correct_answer": "honey", "support": ""},
    ],
    ("logiqa", "EleutherAI/logiqa"): [
        {"label": "b", "context": _TRAINS, "question": "What follows?",
         "options": ["Red trains are full.", "No red train is full.", "Full trains are red.", "Late trains are red."]},
        {"label": "d", "context": _TRAINS, "question": "What does not follow?",
         "options": ["Red is late.", "Late is not full.", "Red is not full.", "All trains are late."]},
    ],
    ("logiqa", "lucasmccabe/logiqa"): [
        {"context": _TRAINS, "query": "What follows?", "correct_option": 1,
         "options": ["Red trains are full.", "No red train is full.", "Full trains are red.", "Late trains are red."]},
        {"context": _TRAINS, "query": "What does not follow?", "correct_option": 3,
         "options": ["Red is late.", "Late is not full.", "Red is not full.", "All trains are late."]},
    ],
    ("logiqa", "LogiQA 2.0"): [
        {"id": 1, "answer": 1, "text": _TRAINS, "question": "What follows?",
         "options": ["Red trains are full.", "No red train is full.", "Full trains are red.", "Late trains are red."]},
        {"id": 2, "answer": 3, "text": _TRAINS, "question": "What does not follow?",
         "options": ["Red is late.", "Late is not full.", "Red is not full.", "All trains are late."]},
    ],
    ("piqa", "ybisk/piqa"): [
        {"goal": "To dry a wet boot", "sol1": "stuff it with paper", "sol2": "stuff it with snow", "label": 0},
        {"goal": "to dry a  wet boot", "sol1": "put it into a pond", "sol2": "put it near a stove", "label": 1},
    ],
    ("mmlu", "cais/mmlu"): [
        {"question": "Which gas do we breathe in to live?", "subject": "own", "answer": 2,
         "choices": ["helium", "neon", "oxygen", "argon"]},
    ],
    ("mmlu", "with letters"): [
        {"question": "Which gas do we breathe in to live?", "subject": "own", "answer": "C",
         "choices": ["helium", "neon", "oxygen", "argon"]},
    ],
}  # fmt: skip
"""(task, layout) -> rows; the layouts of a task hold the same questions."""

ANSWERS: Final[dict[str, list[str]]] = {
    "math500": ["5", "\\frac{3}{2}"],
    "aime24": ["25", "49"],
    "aime25": ["42"],
    "gsm8k": ["12", "1234"],
    "openbookqa": ["it whistles", "by smell"],
    "commonsenseqa": ["hook"],
    "arc_challenge": ["an ice cube", "Earth"],
    "headqa": ["a warm hand", "water"],
    "sciq": ["iron", "honey"],
    "logiqa": ["No red train is full.", "All trains are late."],
    "piqa": ["stuff it with paper", "put it near a stove"],
    "mmlu": ["oxygen"],
}
"""Task -> right answers, multiple choice by its text."""
