"""How often graders say what a person says, and how long they take.

On the completions of ``tests/extraction/graders/labelled.py`` and, where it is given, on the published solutions of
grade-school-math (``grade_school_math/data/example_model_solutions.jsonl``: 1,319 problems, four models, verdicts).

    python -P benchmarks/grading/agreement.py [example_model_solutions.jsonl]
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlgen_stats.schemas.tasks import GraderSpec
from rlgen_stats.toolkit.extraction import Completion, make_grader
from tests.extraction.graders.labelled import SETS

PUBLISHED = ({"name": "math"}, {"name": "final_answer", "marker": "A:"}, {"name": "regex", "pattern": "A:(.*)"})


def row(name: str, grader: Any, rows: Iterable[tuple[str, str, bool | None]], choices: Sequence[str] = ()) -> str:
    """One line of the table: completions, agreement, kinds of error, seconds."""
    grade = make_grader(GraderSpec.model_validate(grader)).grade
    counts: Counter[str] = Counter()
    start = time.perf_counter()
    for text, answer, label in rows:
        correct = grade(Completion((), text, True), answer, choices).correct
        counts[("right" if label else "wrong") + (" called right" if correct else " called wrong")] += 1
    seconds = time.perf_counter() - start
    n = counts.total()
    missed, false = counts["right called wrong"], counts["wrong called right"]
    return f"| {name} | {n:,} | {(n - missed - false) / n:.1%} | {missed} | {false} | {1000 * seconds / n:.2f} s |"


def published(file: Path) -> list[tuple[str, str, bool]]:
    """Solution, expected answer and verdict."""
    problems = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    models = [name for name in problems[0] if name not in ("question", "ground_truth")]
    return [
        (problem[model]["solution"], problem["ground_truth"].rpartition("A:")[2].strip(), problem[model]["is_correct"])
        for problem in problems
        for model in models
    ]


def main() -> None:
    """Print the table."""
    print("| grader | completions | agreement | right called wrong | wrong called right | per 1,000 |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, labelled in SETS.items():
        print(row(name, labelled.grader, labelled.rows, labelled.choices))
    if len(sys.argv) > 1:
        solutions = published(Path(sys.argv[1]))
        for grader in PUBLISHED:
            print(row(f"{grader['name']}, published solutions", grader, solutions))


if __name__ == "__main__":
    main()
