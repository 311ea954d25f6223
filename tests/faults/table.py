"""Counts faults of every kind at length and writes the table of docs/reliability.md.

From the root of the repository::

    OMP_NUM_THREADS=1 python -m tests.faults.table [--only studies] [--out docs/reliability.md]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from tests.faults import damaged_stores, killed_studies, malformed_inputs
from tests.faults.damaged_stores import Log

VERDICTS: Final = ("named", "harmless", "lost", "silently wrong")
HEADER: Final = f"| faults | counted | {' | '.join(VERDICTS)} |\n|---|{'---|' * 5}\n"
BEGIN, END = "<!-- counted faults: begin -->", "<!-- counted faults: end -->"
SIZES: Final = {"writers": 160, "studies": 48, "flips": 1000, "misplaced": 200, "malformed": 400}
TITLES: Final = {
    "writers": "writers of stores killed",
    "studies": "studies killed",
    "flips": "bits flipped",
    "misplaced": "chunks swapped, duplicated, put back; metadata and groups put back",
    "malformed": "malformed inputs",
}


def count(section: str, n: int, *, seed: int, log: Log) -> Mapping[str, Counter[str]]:
    """Title of a row -> verdicts, of one kind of faults."""
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        if section == "malformed":
            return _malformed(root, n, seed, log)
        if section in ("flips", "misplaced"):
            damaged_stores.prepare(root)
        counted: dict[str, Callable[..., Counter[str]]] = {
            "writers": damaged_stores.count_kills,
            "studies": killed_studies.count,
            "flips": damaged_stores.count_flips,
            "misplaced": damaged_stores.count_misplaced,
        }
        return {TITLES[section]: counted[section](root, n=n, seed=seed, log=log)}


def _malformed(root: Path, n: int, seed: int, log: Log) -> dict[str, Counter[str]]:
    """A traceback or a hang loses the answer."""
    (root / "here").mkdir()
    os.chdir(root / "here")
    found = malformed_inputs.count(root, seed=seed, n_settings=n, log=log)
    rows: dict[str, Counter[str]] = {}
    for verdict, cases in found.items():
        for case, _ in cases:
            row = rows.setdefault(f"{TITLES['malformed']}: {case.kind}", Counter())
            row[verdict if verdict in VERDICTS else "lost"] += 1
    os.chdir("/")
    return rows


def written(title: str, tally: Mapping[str, int]) -> str:
    """A row of the table."""
    numbers = [sum(tally.values()), *(tally.get(verdict, 0) for verdict in VERDICTS)]
    return f"| {title} | {' | '.join(f'{number:,}' for number in numbers)} |\n"


def updated(text: str, rows: Mapping[str, str]) -> str:
    """A document with rows of its table put in place of those of the same title, or added."""
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    kept = {line.split("|")[1].strip(): f"{line}\n" for line in table.splitlines()[3:] if line}
    return f"{before}{BEGIN}\n{HEADER}{''.join((kept | rows).values())}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SIZES, action="append", help="Kinds of faults; default all.")
    parser.add_argument("--size", type=int, help="Faults of each kind; of malformed inputs, settings of study.yaml.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--out", type=lambda file: Path(file).resolve(), help="Markdown file of whose table these rows are replaced."
    )
    options = parser.parse_args()

    def log(line: object) -> None:
        sys.stdout.write(f"{str(line).rstrip()}\n")
        sys.stdout.flush()

    rows: dict[str, str] = {}
    bad = 0
    for kind in options.only or SIZES:  # those that fork come first: by then this process has no threads
        counted = count(kind, options.size or SIZES[kind], seed=options.seed, log=log)
        rows |= {title: written(title, tally) for title, tally in counted.items()}
        bad += sum(tally["lost"] + tally["silently wrong"] for tally in counted.values())
    sys.stdout.write(HEADER + "".join(rows.values()))
    if options.out is not None:
        options.out.write_text(updated(options.out.read_text(), rows))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
