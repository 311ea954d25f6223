"""Does each verdict of a written study follow from the study's own tables?

From the root of the repository::

    python -m tests.end_to_end.verdict_consistency runs/demo
"""

from __future__ import annotations

import sys
from pathlib import Path

from rlgen_stats.stores import open_results, read_json, result_groups
from rlgen_stats.toolkit.reporting.report_agreement import against_tables


def contradictions(folder: Path) -> list[str]:
    """What the five verdicts of a study's report say that its results do not, a sentence each; empty if nothing."""
    results = folder / "results.zarr"
    groups = {group: open_results(results, group).load() for group in result_groups(results)}
    return against_tables(read_json(folder / "report/report.json")["claims"], groups)


if __name__ == "__main__":
    faults = contradictions(Path(sys.argv[1]))
    sys.exit("\n".join(faults) if faults else None)
