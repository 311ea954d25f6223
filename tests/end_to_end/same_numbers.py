"""Whether two folders of one study hold the same numbers: every array of every store, and every number of the report.

Words may differ: texts are compared by the numbers that stand in them.
``python -m tests.end_to_end.same_numbers ONE TWO`` lists what differs and exits with 1 if anything does;
``make same-numbers BASE=<revision>`` runs the mini study before and after a change and compares.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rlgen_stats.stores import open_study, read_json

NUMBER = re.compile(r"(?<![\w.])[-+−]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
COMMIT = re.compile(r"\b[0-9a-f]{40}\b")
ORIGINS = ("provenance", "digest", "created", "seconds", "host")
"""Attributes and entries that say where and when something was made, not what it is."""


def differences(first: Path, second: Path) -> Iterator[str]:
    """One sentence for everything that is not the same."""
    one, two = open_study(first), open_study(second)
    if set(one.groups) != set(two.groups):
        yield f"groups: {sorted(set(one.groups) ^ set(two.groups))} stand in one of the studies only"
    for group in sorted(set(one.groups) & set(two.groups)):
        ours, theirs = one[group].to_dataset().load(), two[group].to_dataset().load()
        if set(ours.variables) != set(theirs.variables):
            yield f"{group}: variables {sorted(map(str, set(ours.variables) ^ set(theirs.variables)))}"
        for name in sorted(map(str, set(ours.variables) & set(theirs.variables))):
            if not _same_array(ours[name].values, theirs[name].values):
                yield f"{group}/{name}"
        yield from _of_values(ours.attrs, theirs.attrs, f"{group} attributes")
    reports = [folder / "report/report.json" for folder in (first, second)]
    yield from _of_values(*(read_json(report) for report in reports), "report.json")


def _same_array(ours: np.ndarray, theirs: np.ndarray) -> bool:
    if ours.dtype.kind in "fiub":
        return bool(np.array_equal(ours, theirs, equal_nan=ours.dtype.kind == "f"))
    if ours.shape != theirs.shape:
        return False
    return all(_numbers(a) == _numbers(b) for a, b in zip(ours.ravel(), theirs.ravel(), strict=True))


def _numbers(text: object) -> list[str]:
    return NUMBER.findall(COMMIT.sub("", str(text)).replace(",", ""))


def _of_values(ours: Any, theirs: Any, place: str) -> Iterator[str]:
    if any(word in place for word in ORIGINS):
        return
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if set(ours) != set(theirs):
            yield f"{place}: keys {sorted(set(ours) ^ set(theirs))}"
        for key in sorted(set(ours) & set(theirs)):
            yield from _of_values(ours[key], theirs[key], f"{place} > {key}")
    elif isinstance(ours, list) and isinstance(theirs, list):
        if len(ours) != len(theirs):
            yield f"{place}: {len(ours)} and {len(theirs)} entries"
        for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            yield from _of_values(a, b, f"{place} > {i}")
    elif _numbers(ours) != _numbers(theirs):
        yield f"{place}: {ours!r} and {theirs!r}"


def main() -> None:
    """Compare the two folders named on the command line."""
    found = list(differences(Path(sys.argv[1]), Path(sys.argv[2])))
    sys.stdout.write("".join(f"{line}\n" for line in found) or "the same numbers everywhere\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
