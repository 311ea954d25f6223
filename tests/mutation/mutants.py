"""Change one decision at a time and see whether a test notices.

From the root of the repository::

    python -m tests.mutation.mutants [--only health] [--workers 2]

Mutants are of the numbers in a module's named constants, and of comparisons, arithmetic and the numbers in them inside
the functions that ``decisions.py`` names. Each runs the tests that ``decisions.py`` maps to its module, in a fork of a
process that has imported the libraries they use, so that a mutant costs its tests and not seconds of imports. A mutant
survives if every test passes. ``score.md`` is rewritten for the modules that ran.

Why no library: mutmut 3.8 changes only what stands in functions, so that no named constant is ever changed; cosmic-ray
8.7 changes numbers by 1 (.05 becomes 1.05, which any test notices), makes 1,100 mutants of ``pooling.py`` alone and
starts a process with six seconds of imports for each.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import importlib.machinery
import math
import os
import re
import resource
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

from tests.mutation.decisions import DECISIONS, Decision

ROOT = Path(__file__).parents[2]
OURS = ("rlgen_stats", "tests")
SCORE = Path(__file__).with_name("score.md")
LEAST_SECONDS, SLOWDOWN = 10, 5
"""Processor time after which a mutant has been noticed, because it does not end: so many times its module's tests."""

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
KINDS = ("constants", "comparisons", "arithmetic")


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    decision: Decision
    kind: str
    where: str
    """Name of the constant or function."""
    before: str
    after: str
    code: CodeType

    def __str__(self) -> str:
        return _name(self.where, self.before, self.after)


def mutants(decision: Decision, text: str, file: str = "module.py") -> Iterator[Mutant]:
    """All changes of a module's source."""
    tree = ast.parse(text)
    for change in _changes(tree, decision):
        code = compile(ast.fix_missing_locations(copy.deepcopy(tree)), file, "exec")
        yield Mutant(decision, *change, code)


def names(decision: Decision, text: str) -> set[str]:
    """What mutants are called; no code is made of them."""
    return {_name(*change[1:]) for change in _changes(ast.parse(text), decision)}


def _name(where: str, before: str, after: str) -> str:
    return f"{where}: {before}  ->  {after}"


def _changes(tree: ast.Module, decision: Decision) -> Iterator[tuple[str, str, str, str]]:
    """Kind, where, before and after of every change; the tree has it until the next one is asked for."""
    for kind, where, whole, node, field, values in _sites(tree, decision):
        before, kept = ast.unparse(whole), getattr(node, field)
        for value in values:
            setattr(node, field, value)
            yield kind, where, before, ast.unparse(whole)
            setattr(node, field, kept)


Site = tuple[str, str, ast.AST, ast.AST, str, list[object]]
"""Kind, where, the expression that is shown, the node that is changed, its field, and the field's new values."""


def _sites(tree: ast.Module, decision: Decision) -> Iterator[Site]:
    for statement in tree.body:
        if isinstance(statement, ast.AnnAssign | ast.Assign) and statement.value is not None:
            name = ast.unparse(statement.targets[0] if isinstance(statement, ast.Assign) else statement.target)
            if name not in decision.technical:
                for number in filter(_is_number, ast.walk(statement.value)):
                    yield "constants", name, statement.value, number, "value", _near(number.value)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and _named(function.name, decision):
            for statement in function.body:
                yield from _computed(statement, function.name)


def _named(name: str, decision: Decision) -> bool:
    return decision.functions is None or name in decision.functions


def _computed(node: ast.AST, where: str) -> Iterator[Site]:
    """Of what is computed: no messages, positions, annotations or functions inside."""
    if isinstance(node, ast.JoinedStr | ast.Raise | ast.FunctionDef):
        return
    if isinstance(node, ast.Compare):
        if len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
            yield "comparisons", where, node, node, "ops", [[op()] for op in COMPARISONS[type(node.ops[0])]]
        for number in filter(_is_number, [node.left, *node.comparators]):
            yield "comparisons", where, node, number, "value", _near(number.value)
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield "arithmetic", where, node, node, "op", [ARITHMETIC[type(node.op)]()]
        for number in filter(_is_number, [node.left, node.right]):
            yield "arithmetic", where, node, number, "value", _near(number.value)
    for name, child in ast.iter_fields(node):
        if name not in ("slice", "annotation", "returns", "decorator_list"):
            for one in child if isinstance(child, list) else [child]:
                if isinstance(one, ast.AST):
                    yield from _computed(one, where)


def _is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _near(value: float) -> list[object]:
    """A little more and a little less: whole numbers by one, others by a tenth, shares so that they stay shares."""
    if isinstance(value, int):
        return [value + 1, value - 1]
    step = 0.1 * (min(value, 1 - value) if 0 < value < 1 else abs(value) or 0.5)
    return [value + step, value - step]


def start(decision: Decision, mutant: Mutant | None, seconds: int, imported: Path | None = None) -> int:
    """In a fork: the module's tests with this change (None: none); the process's id.

    What the tests imported beside our own modules is written to ``imported``, one name a line.
    """
    child = os.fork()
    if child:
        return child
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    code = 3
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        if mutant is not None:
            _replace(ROOT / decision.source, mutant.code)
        import pytest

        with tempfile.TemporaryDirectory() as folder:
            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={folder}/t"]
            code = int(pytest.main([*options, "--hypothesis-seed=0", *(str(ROOT / test) for test in decision.tests)]))
        if imported is not None:
            imported.write_text("\n".join(name for name in sys.modules if name.split(".")[0] not in OURS))
    finally:
        os._exit(code)


def _replace(source: Path, code: CodeType) -> None:
    """Give the import system this code for the module, whatever path it is found by."""
    original = importlib.machinery.SourceFileLoader.get_code
    target = source.resolve()

    def get_code(self: importlib.machinery.SourceFileLoader, name: str) -> CodeType | None:
        return code if Path(self.path).resolve() == target else original(self, name)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign, assignment]


def prepare(decision: Decision) -> int:
    """Seconds of processor time for each mutant of a module; imports the libraries that its tests use.

    The tests must pass unchanged. Forks then start with the libraries, which takes most of the time of a short test.
    """
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder) / "imported"
        _, status, used = os.wait4(start(decision, None, 3600, names), 0)
        if status:
            sys.exit(f"{' '.join(decision.tests)} fail without any change; mend them first.")
        for name in names.read_text().splitlines():
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    return math.ceil(LEAST_SECONDS + SLOWDOWN * (used.ru_utime + used.ru_stime))


def survivors(jobs: list[Mutant], seconds: int, workers: int) -> set[int]:
    """Positions of the mutants whose tests all passed."""
    running: dict[int, int] = {}
    passed = set()
    for place in [*range(len(jobs)), *[None] * workers]:
        if len(running) >= workers or (place is None and running):
            child, status = os.wait()
            ended = running.pop(child)
            if status == 0:
                passed.add(ended)
                sys.stderr.write(f"survived  {jobs[ended].decision.source}  {jobs[ended]}\n")
        if place is not None:
            running[start(jobs[place].decision, jobs[place], seconds)] = place
    return passed


def report(decision: Decision, made: list[Mutant], survived: list[Mutant]) -> tuple[str, list[str]]:
    """A module's row, and its survivors, each with the reason why no test can notice it, where there is one."""
    cells = []
    for kind in KINDS:
        n = sum(one.kind == kind for one in made)
        cells.append(f"{n - sum(one.kind == kind for one in survived)} of {n}" if n else "")
    reasons = [decision.unnoticed.get(str(one), "") for one in survived]
    cells += [f"{len(made) - len(survived)} of {len(made)}", str(sum(not reason for reason in reasons))]
    lines = [
        f"- `{decision.source}` `{one}`: {reason or 'OPEN'}" for one, reason in zip(survived, reasons, strict=True)
    ]
    return f"| {decision.source} | {' | '.join(cells)} |", lines


def write_score(source: str, row: str, lines: list[str], file: Path = SCORE) -> None:
    """Replace the row and survivors of a module; drop those of modules that are no longer listed."""
    text = file.read_text() if file.is_file() else ""
    rows = {line.split(" | ")[0][2:]: line for line in text.splitlines() if line.startswith("| toolkit")}
    kept: dict[str, list[str]] = {}
    for line in re.findall(r"^- `toolkit.*", text, flags=re.MULTILINE):
        kept.setdefault(line.split("`")[1], []).append(line)
    rows[source], kept[source] = row, lines
    sources = [decision.source for decision in DECISIONS if decision.source in rows]
    head = [
        "# Mutants of decisions",
        "",
        "Written by `make mutants`: killed of made. Open survivors are gaps in the tests; the others change nothing",
        "that can be observed, for the reason given.",
        "",
        f"| module | {' | '.join(KINDS)} | all | open survivors |",
        "|---|" + "--:|" * (len(KINDS) + 2),
    ]
    body = [*head, *(rows[source] for source in sources), "", "## Survivors", ""]
    file.write_text("\n".join([*body, *(line for source in sources for line in kept.get(source, []))]) + "\n")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="Modules whose path holds this.")
    options.add_argument("--workers", type=int, default=2)
    given = options.parse_args()
    for decision in (decision for decision in DECISIONS if given.only in decision.source):
        seconds = prepare(decision)
        made = list(mutants(decision, (ROOT / decision.source).read_text(), decision.source))
        survived = [made[place] for place in sorted(survivors(made, seconds, given.workers))]
        row, lines = report(decision, made, survived)
        sys.stdout.write(f"{row}\n")
        write_score(decision.source, row, lines)


if __name__ == "__main__":
    main()
