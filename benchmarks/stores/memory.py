"""Peak memory and time of writing, verifying, reducing and shuffling stores of 1, 4 and 16 times the tokens.

Prompts stay the same and more models continue them, so that what grows is tokens. Every measurement runs in a fresh
process. Peak resident memory counts the pages of mapped files while they are mapped; anonymous memory does not.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from common import in_fresh_process, read_options, scratch, spread
from reports import Goal, report
from sizes import N_FEATURES, SCALES, SIZES, Size

FLAT: Final = 1.15
"""Largest peak over the smallest, at most."""
EXPONENT: Final = 1.05
"""Slope of log time over log tokens, at most."""
MEMORY: Final = {
    "rss": "peak RSS MB",
    "rss_above_imports": "above imports",
    "anonymous": "peak anonymous MB",
    "anonymous_above_imports": "above imports (anonymous)",
}
SETUP: Final = "setup"
STORES: Final = str(Path(__file__).with_name("memory_stores.py"))
REDUCE: Final = str(Path(__file__).with_name("memory_reduce.py"))
SCRIPTS: Final = {
    SETUP: STORES,
    "write": STORES,
    "verify": STORES,
    "reduce to prompts": REDUCE,
    "encode stage": REDUCE,
    "shuffle": STORES,
}
"""Where each task is; only reducing imports torch."""


def measure(folder: Path, size: Size, rounds: range) -> dict[tuple[str, int], list[dict[str, float]]]:
    """Every task at every scale, scales interleaved; the first round warms the page cache and is dropped."""
    stores = {scale: folder / f"{scale}.zarr" for scale in SCALES}
    for scale, path in stores.items():
        in_fresh_process(SCRIPTS[SETUP], task=SETUP, path=path, scale=scale, size=asdict(size))
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for repetition in rounds:
        for task in [name for name in SCRIPTS if name != SETUP]:
            for scale in SCALES:
                path = folder / "new.zarr" if task == "write" else stores[scale]
                taken = in_fresh_process(SCRIPTS[task], task=task, path=path, scale=scale, size=asdict(size))
                shutil.rmtree(folder / "new.zarr", ignore_errors=True)
                if repetition:
                    found.setdefault((task, scale), []).append(taken)
    return found


def main() -> None:
    options = read_options(__doc__ or "")
    size = SIZES[options.quick]
    with scratch(options) as folder:
        found = measure(folder, size, range(1 if options.quick else 0, options.repetitions + 1))
        rows, goals = [], []
        for task in dict.fromkeys(task for task, _ in found):
            ours = [_row(task, scale, size, found[task, scale]) for scale in SCALES]
            rows += ours
            goals += _goals(task, ours)
        settings = {"width": size.width, "type": "float16", "buffer": f"{size.buffer >> 20} MB", "features": N_FEATURES}
        report(options, folder, "memory", settings=settings, rows=rows, goals=goals)


def _row(task: str, scale: int, size: Size, found: list[dict[str, float]]) -> dict[str, Any]:
    seconds = spread([taken["seconds"] for taken in found])
    row: dict[str, Any] = {"task": task, "tokens": size.texts(scale).n_tokens, "s": seconds["median"]}
    row |= {"low": seconds["low"], "high": seconds["high"], "tokens/s": row["tokens"] / row["s"]}
    return row | {title: statistics.median(taken[name] for taken in found) for name, title in MEMORY.items()}


def _goals(task: str, rows: list[dict[str, Any]]) -> list[Goal]:
    """Flat memory and time in proportion to the tokens, over the scales of one task."""
    slope = float(np.polyfit(np.log([row["tokens"] for row in rows]), np.log([row["s"] for row in rows]), 1)[0])
    goals = [Goal(f"{task}, exponent of time", slope, EXPONENT, at_least=False)]
    for title in MEMORY.values():
        peaks = [row[title] for row in rows]
        goals.append(Goal(f"{task}, {title}, largest of smallest", max(peaks) / min(peaks), FLAT, at_least=False))
    return goals


if __name__ == "__main__":
    main()
