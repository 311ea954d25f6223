"""Change one decision at a time and see whether a test notices.

From the root of the repository::

    python -P -m tests.mutation.mutants [--only health] [--workers 2] [--out tests/README.md]

Mutants are of named constants (a tenth up and down, whole numbers by one), comparisons (with and without equality, and
the opposite), numbers and arithmetic in the deciding functions, and ``and`` for ``or``. Each runs the tests that
``decisions.py`` maps to its module, in a fork of a process that has imported the libraries, so that a mutant costs
its tests and not six seconds of imports. A mutant survives if every test passes.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.machinery
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

from tests.mutation.decisions import DECISIONS, Decision

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- mutants: begin -->", "<!-- mutants: end -->"
LIBRARIES = (
    *("numpy", "scipy.stats", "scipy.special", "pandas", "xarray", "dask.array", "zarr", "pyarrow.parquet"),
    *("sklearn.linear_model", "sklearn.isotonic", "statsmodels.api", "torch", "transformers", "pytest", "hypothesis"),
    *("pydantic", "jinja2", "click", "rich.console", "matplotlib.pyplot"),
)
"""Imported before the forks; none of our own modules."""
LEAST_SECONDS, SLOWDOWN = 20.0, 5.0
"""A mutant that runs longer than this many times its module's tests has been noticed: it does not end."""

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}
KINDS = ("constant", "comparison", "arithmetic", "logic")


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    decision: Decision
    kind: str
    line: int
    before: str
    after: str
    code: CodeType

    def __str__(self) -> str:
        return f"{self.decision.source}:{self.line}: {self.before}  ->  {self.after}"


def mutants(decision: Decision, text: str, file: str = "module.py") -> Iterator[Mutant]:
    """All changes of a module's source."""
    tree = ast.parse(text)
    for kind, node, changes in _sites(tree, decision):
        before = ast.unparse(node)
        for field, value in changes:
            kept = getattr(node, field)
            setattr(node, field, value)
            after = ast.unparse(node)
            code = compile(ast.fix_missing_locations(copy.deepcopy(tree)), file, "exec")
            setattr(node, field, kept)
            yield Mutant(decision, kind, node.lineno, before, after, code)


def _sites(tree: ast.Module, decision: Decision) -> Iterator[tuple[str, ast.expr, list[tuple[str, object]]]]:
    """Nodes that are changed, with every new value of one of their fields."""
    for statement in tree.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            if statement.target.id not in decision.technical:
                for node in _numbers(statement.value):
                    yield "constant", node, [("value", value) for value in _near(node.value)]
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and (
            decision.functions is None or function.name in decision.functions
        ):
            for statement in function.body:
                yield from _in_function(statement)


def _in_function(node: ast.AST) -> Iterator[tuple[str, ast.expr, list[tuple[str, object]]]]:
    """Of expressions that are computed: no subscripts, no axes, no text, no annotations, no functions inside."""
    if isinstance(node, ast.JoinedStr | ast.Raise | ast.FunctionDef):
        return
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        yield "comparison", node, [("ops", [op()]) for op in COMPARISONS[type(node.ops[0])]]
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield "arithmetic", node, [("op", ARITHMETIC[type(node.op)]())]
    if isinstance(node, ast.BoolOp):
        yield "logic", node, [("op", ast.And() if isinstance(node.op, ast.Or) else ast.Or())]
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield "constant", node, [("value", value) for value in _near(node.value)]
    for name, child in ast.iter_fields(node):
        if name in ("slice", "annotation", "returns", "decorator_list"):
            continue
        for one in child if isinstance(child, list) else [child]:
            if isinstance(one, ast.keyword) and one.arg in ("axis", "ndmin", "keepdims"):
                continue
            if isinstance(one, ast.AST):
                yield from _in_function(one)


def _numbers(value: ast.expr) -> list[ast.Constant]:
    return [node for node in ast.walk(value) if isinstance(node, ast.Constant) and type(node.value) in (int, float)]


def _near(value: int | float) -> tuple[int | float, ...]:
    """A little more and a little less: whole numbers by one, shares within (0, 1), others by a tenth."""
    if isinstance(value, int):
        return (value + 1, value - 1)
    step = 0.05 if value == 0 else 0.1 * (min(value, 1 - value) if 0 < value < 1 else abs(value))
    return (value + step, value - step)


def run_tests(decision: Decision, mutant: Mutant | None) -> int:
    """In a fork: the module's tests with this change (None: none); returns the process's id."""
    child = os.fork()
    if child:
        return child
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    code = 3
    try:
        if mutant is not None:
            _replace(ROOT / decision.source, mutant.code)
        import pytest

        with tempfile.TemporaryDirectory() as folder:
            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0"]
            code = int(
                pytest.main([*options, f"--basetemp={folder}/t", *(str(ROOT / test) for test in decision.tests)])
            )
    finally:
        os._exit(code)


def _replace(source: Path, code: CodeType) -> None:
    """Give the import system this code for the module, whatever path it is found by."""
    original = importlib.machinery.SourceFileLoader.get_code
    target = source.resolve()

    def get_code(self: importlib.machinery.SourceFileLoader, name: str) -> CodeType | None:
        return code if Path(self.path).resolve() == target else original(self, name)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign, assignment]


def judge(jobs: list[tuple[Decision, Mutant | None]], limits: dict[str, float], workers: int) -> list[bool]:
    """Whether each job's tests all passed, in order; a job over its limit has not passed."""
    passed, running, waiting = [False] * len(jobs), dict[int, tuple[int, float]](), list(enumerate(jobs))[::-1]
    done = 0
    while waiting or running:
        while waiting and len(running) < workers:
            place, (decision, mutant) = waiting.pop()
            limit = limits.get(decision.source, float("inf"))
            running[run_tests(decision, mutant)] = (place, time.monotonic() + limit)
        for child, (place, deadline) in list(running.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended and time.monotonic() > deadline:
                os.kill(child, 9)
                ended, status = os.waitpid(child, 0)
            if ended:
                del running[child]
                passed[place] = status == 0
                done += 1
                if done % 50 == 0:
                    sys.stderr.write(f"{done} of {len(jobs)}\n")
        time.sleep(0.02)
    return passed


def baseline(decisions: list[Decision], workers: int) -> dict[str, float]:
    """Seconds that each module's tests take unchanged; they must pass."""
    limits = {}
    for decision in decisions:
        began = time.monotonic()
        if judge([(decision, None)], {}, workers) != [True]:
            sys.exit(f"{' '.join(decision.tests)} fail without any change; mend them first.")
        limits[decision.source] = LEAST_SECONDS + SLOWDOWN * (time.monotonic() - began)
    return limits


def table(results: list[tuple[Mutant, bool]], minutes: float) -> str:
    """Killed of all, by module and kind of change, and the survivors."""
    made = Counter((m.decision.source, m.kind) for m, _ in results)
    killed = Counter((m.decision.source, m.kind) for m, survived in results if not survived)
    lines = [f"| module | {' | '.join(KINDS)} | all |", "|---|" + "--:|" * (len(KINDS) + 1)]
    for source in [*dict.fromkeys(m.decision.source for m, _ in results), "all"]:
        cells = []
        for kind in (*KINDS, "all"):
            keys = [key for key in made if source in (key[0], "all") and kind in (key[1], "all")]
            n = sum(made[key] for key in keys)
            cells.append(f"{sum(killed[key] for key in keys)} / {n}" if n else "")
        lines.append(f"| {source} | {' | '.join(cells)} |")
    survivors = [f"- `{m}`" for m, survived in results if survived]
    noticed = f"Killed of all mutants, by module; {minutes:.0f} minutes. Survivors: {len(survivors)}."
    return "\n".join([noticed, "", *lines, ""]), "\n".join(survivors)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="Modules whose path holds this.")
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--out", type=Path, help="Markdown file whose table between the two marks is replaced.")
    given = options.parse_args()
    chosen = [decision for decision in DECISIONS if given.only in decision.source]
    for library in LIBRARIES:
        importlib.import_module(library)
    began = time.monotonic()
    limits = baseline(chosen, given.workers)
    found = [
        mutant
        for decision in chosen
        for mutant in mutants(decision, (ROOT / decision.source).read_text(), decision.source)
    ]
    passed = judge([(mutant.decision, mutant) for mutant in found], limits, given.workers)
    report, survivors = table(list(zip(found, passed, strict=True)), (time.monotonic() - began) / 60)
    sys.stdout.write(f"{report}\n{survivors}\n")
    if given.out is not None:
        text = given.out.read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        given.out.write_text(f"{before}{BEGIN}\n{report}{END}{after}")


if __name__ == "__main__":
    main()
