"""Mutants are made where a module decides, and what ``decisions.py`` names exists."""

from __future__ import annotations

import ast

import pytest

from tests.mutation.decisions import DECISIONS, Decision
from tests.mutation.mutants import ROOT, mutants, names, report

MODULE = """
LIMIT: Final = 0.25
SIZES = (2, 1.0)
TINY: Final = 1e-9

def judge(x, n):
    if x[0] > LIMIT and n:
        raise ValueError(f"{n - 1} is too few")
    return x.sum(axis=0) / (n - 1)

def other(x):
    return x <= 0.5
"""


def test_a_toy_module_has_these_mutants() -> None:
    decision = Decision("toy.py", (), functions=("judge",), technical=("TINY",))
    made = list(mutants(decision, MODULE))
    assert [str(one) for one in made] == [
        "LIMIT: 0.25  ->  0.275",
        "LIMIT: 0.25  ->  0.225",
        "SIZES: (2, 1.0)  ->  (3, 1.0)",
        "SIZES: (2, 1.0)  ->  (1, 1.0)",
        "SIZES: (2, 1.0)  ->  (2, 1.1)",
        "SIZES: (2, 1.0)  ->  (2, 0.9)",
        "judge: x[0] > LIMIT  ->  x[0] >= LIMIT",
        "judge: x[0] > LIMIT  ->  x[0] <= LIMIT",
        "judge: x.sum(axis=0) / (n - 1)  ->  x.sum(axis=0) * (n - 1)",
        "judge: n - 1  ->  n + 1",
        "judge: n - 1  ->  n - 2",
        "judge: n - 1  ->  n - 0",
    ]
    assert names(decision, MODULE) == {str(one) for one in made}
    namespace: dict[str, object] = {"Final": object}
    exec(made[0].code, namespace)
    assert namespace["LIMIT"] == 0.275
    row, lines = report(decision, made, made[6:8])
    assert row == "| toy.py | 6 of 6 | 0 of 2 | 4 of 4 | 10 of 12 | 2 |"
    assert lines[0] == "- `toy.py` `judge: x[0] > LIMIT  ->  x[0] >= LIMIT`: OPEN"


@pytest.mark.parametrize("decision", DECISIONS, ids=lambda decision: decision.source)
def test_what_decides_exists(decision: Decision) -> None:
    text = (ROOT / decision.source).read_text()
    tree = ast.parse(text)
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    constants = {ast.unparse(node.target) for node in tree.body if isinstance(node, ast.AnnAssign)}
    assert set(decision.functions or ()) <= functions
    assert set(decision.technical) <= constants
    assert all((ROOT / test.split("::")[0]).exists() for test in decision.tests)
    assert set(decision.unnoticed) <= names(decision, text)
