"""Run every experiment at full size and write the table of docs/calibration.md.

From the root of the repository::

    OMP_NUM_THREADS=1 python -m tests.calibration.table [--quick] [--out docs/calibration.md]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from tests.calibration.experiments import EXPERIMENTS, SEED, Experiment
from tests.calibration.rows import Row

BEGIN, END = "<!-- calibration table: begin -->", "<!-- calibration table: end -->"
HEADER = "| experiment | nominal | observed | band | naive | naive estimator | size | |"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="The sizes of the tests.")
    options.add_argument("--jobs", type=int, default=os.cpu_count(), help="Processes, an experiment each.")
    options.add_argument("--seed", type=int, default=SEED)
    options.add_argument("--out", type=Path, help="Markdown file whose table between the two marks is replaced.")
    given = options.parse_args()
    lines, off = [], []
    title = ""
    with ProcessPoolExecutor(given.jobs) as pool:
        done = [pool.submit(_timed, experiment, given.quick, given.seed) for experiment in EXPERIMENTS]
        results = [one.result() for one in done]
    for experiment, (rows, _) in zip(EXPERIMENTS, results, strict=True):
        if experiment.title != title:
            title = experiment.title
            lines += ["", f"**{title}**", "", HEADER, "|---|--:|--:|--:|--:|---|---|---|"]
        lines += [_line(row) for row in rows]
        off += [row for row in rows if not (row.passed or row.known) or not row.bites]
    seconds = sum(seconds for _, seconds in results)
    summary = f"Seed {given.seed}, {'quick' if given.quick else 'full'} sizes, {seconds / 60:.0f} minutes of one core."
    table = "\n".join([summary, *lines, ""])
    sys.stdout.write(table)
    if given.out is not None:
        text = given.out.read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        given.out.write_text(f"{before}{BEGIN}\n{table}{END}{after}")
    if off:
        sys.exit("outside their band, or not needed: " + "; ".join(row.name for row in off))


def _timed(experiment: Experiment, quick: bool, seed: int) -> tuple[list[Row], float]:
    """Rows of one experiment, and the seconds it took."""
    start = time.monotonic()
    rows = experiment.run(1 if quick else experiment.full, seed)
    seconds = time.monotonic() - start
    sys.stderr.write(f"{experiment.name}: {seconds:.0f} s\n")
    return rows, seconds


def _line(row: Row) -> str:
    verdict = "ok" if row.passed else f"**outside** ({row.known})" if row.known else "**outside**"
    one_sided = np.isneginf(row.low) or (row.low == 0 and row.nominal > 0)
    low = "" if one_sided else _number(row.low, row.nominal)
    band = f"{low} to {_number(row.high, row.nominal)}" if low else f"at most {_number(row.high, row.nominal)}"
    naive = "" if np.isnan(row.naive) else _number(row.naive, row.nominal)
    cells = (
        row.name,
        f"{row.nominal:g}" if row.nominal in (0.05, 0.002, 0.1, 0.95, 0) else f"{row.nominal:.3f}",
        _number(row.observed, row.nominal),
        band,
        naive,
        row.naive_name,
        row.size,
        verdict,
    )
    return f"| {' | '.join(cells)} |"


def _number(value: float, nominal: float) -> str:
    return f"{value:.0f}" if value == round(value) and nominal == 0 else f"{value:.4f}"


if __name__ == "__main__":
    main()
