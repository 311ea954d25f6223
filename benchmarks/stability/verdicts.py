"""Whether a study says the same with other dictionaries: analyses of the same models, each with its own dictionaries.

Models, answers and activations are the study's; each analysis trains its own triple of dictionaries from other initial
weights and runs everything after it. One more analysis repeats the first with another number of threads, which adds
sums in another order.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import yaml

from benchmarks.reports import Goal, report
from rlgen_stats.stores import open_results, read_json, result_groups

KEPT: Final = ("models", "data", "activations.zarr", "outcomes.zarr", "completions")
"""Inputs of every analysis: linked, not copied."""
CLAIMS: Final = ("C1", "C2", "C3", "C4", "C5")
DIRECTION: Final = {"C4": "disable", "C5": "amplify"}
SAME: Final = 0.9
OVERLAPPING: Final = 43 / 45


def plant(study: Path) -> None:
    """A study whose RL model is the base and one vector, finished."""
    from rlgen_stats.toolkit.study import run_study
    from tests.end_to_end.planted import write_study

    study.mkdir(parents=True, exist_ok=True)
    sizes = {"n_features": 96, "k": 6, "steps": 700, "batch_size": 512, "learning_rate": 3e-3}
    write_study(
        study,
        intervention={"accept_undecidable": True},  # all tasks are shifted alike: none is unrelated
        crosscoders=[
            {"name": "main", "views": ["base@0", "sft@final", "rl@final"], "accept_unhealthy": True, **sizes},
            {"name": "pair-sft", "views": ["base@0", "sft@final"], "accept_unhealthy": True, **sizes},
            {"name": "pair-rl", "views": ["base@0", "rl@final"], "accept_unhealthy": True, **sizes},
        ],
    )
    run_study(study)


def prepare(study: Path, folder: Path, seed: int) -> None:
    """The study with another seed of its encoded crosscoder; what does not depend on that stays done."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    for path in study.iterdir():
        if path.name in KEPT:
            (folder / path.name).symlink_to(path.resolve())
        elif path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("*.lock"))
    spec = yaml.safe_load((study / "study.yaml").read_text())
    runs = spec.get("contrast") or [run["name"] for run in spec["runs"]][:2]
    views = {"base@0", *(f"{run}@final" for run in runs)}
    encoded = next(one for one in spec["crosscoders"] if set(one["views"]) == views)
    encoded["seed"] = seed
    (folder / "study.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))


def run(folder: Path, threads: int) -> dict[str, Any]:
    """Run an analysis and read what it says."""
    command = [sys.executable, "-P", "-m", "rlgen_stats.cli", "run", str(folder), "--quiet"]
    with (folder / "log.txt").open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)
    claims = {one["id"]: one for one in read_json(folder / "report/report.json")["claims"]}
    names = ("verdict", "estimate", "low", "high")
    return {
        "claims": {name: {key: claims[name][key] for key in names} for name in CLAIMS},
        "single": {name: single(folder, direction) for name, direction in DIRECTION.items()},
    }


def single(folder: Path, direction: str) -> list[list[float]]:
    """Effect, low and high of each dictionary's own trial, points."""
    results = folder / "results.zarr"
    groups = [name for name in sorted(result_groups(results)) if name.partition(".")[0] == "trial-dictionary"]
    trials = [open_results(results, group).sel(direction=direction).load() for group in groups]
    held = [one.sel(condition="set") for one in trials if "set" in one["condition"].values]
    return [[100 * float(one[name]) for name in ("effect", "effect_low", "effect_high")] for one in held]


def overlapping(intervals: list[tuple[float, float]]) -> tuple[int, int]:
    """Pairs of intervals that overlap, and all pairs; an interval that is not known is left out."""
    known = [one for one in intervals if None not in one and np.isfinite(one).all()]
    pairs = list(itertools.combinations(known, 2))
    return sum(a[0] <= b[1] and b[0] <= a[1] for a, b in pairs), len(pairs)


def summary(analyses: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a claim: verdicts, spread of estimates, overlap of intervals, pooled and of single dictionaries."""
    rows = []
    for name in CLAIMS:
        answers = [one["claims"][name] for one in analyses]
        verdict, n_same = Counter(answer["verdict"] for answer in answers).most_common(1)[0]
        estimates = [answer["estimate"] for answer in answers if answer["estimate"] is not None]
        widths = [a["high"] - a["low"] for a in answers if None not in (a["low"], a["high"])]
        pooled = overlapping([(answer["low"], answer["high"]) for answer in answers])
        alone = overlapping([(low, high) for one in analyses for _, low, high in one["single"].get(name, [])])
        rows.append(
            {
                "claim": name,
                "verdict": f"{verdict} {n_same} of {len(answers)}",
                "estimates": f"{min(estimates):.1f} to {max(estimates):.1f}" if estimates else "none",
                "mean width": float(np.mean(widths)) if widths else None,
                "pooled intervals that overlap": f"{pooled[0]} of {pooled[1]}",
                "single-dictionary ones": f"{alone[0]} of {alone[1]}" if alone[1] else "",
                "same": n_same / len(answers),
                "overlap": pooled[0] / pooled[1] if pooled[1] else None,
            }
        )
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path, help="a finished study; with --planted, where to put the planted one")
    parser.add_argument("--planted", action="store_true", help="of a study whose cause is known (tests/end_to_end)")
    parser.add_argument("--analyses", type=int, default=10)
    parser.add_argument("--folder", type=Path, required=True, help="where the analyses go; finished ones are kept")
    parser.add_argument("--jobs", type=int, default=2, help="analyses at once, each on one thread")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    if options.planted and not (options.study / "report").exists():
        plant(options.study)

    def analyse(seed: int, threads: int = 1) -> dict[str, Any]:
        folder = options.folder / (f"seed-{seed}" if threads == 1 else f"seed-{seed}-threads-{threads}")
        prepare(options.study, folder, seed)
        return run(folder, threads)

    with ThreadPoolExecutor(options.jobs) as pool:
        analyses = list(pool.map(analyse, range(1, options.analyses + 1)))
    threads = [analyses[0], analyse(1, threads=2)]
    rows = summary(analyses)
    verdicts = [{name: one["claims"][name]["verdict"] for name in CLAIMS} for one in threads]
    goals = [Goal(f"{row['claim']}: share of analyses with the same verdict", row.pop("same"), SAME) for row in rows]
    goals += [
        Goal(f"{row['claim']}: share of pooled intervals that overlap", overlap, OVERLAPPING)
        for row in rows
        if (overlap := row.pop("overlap")) is not None
    ]
    goals.append(Goal("claims with the same verdict on one and two threads", same_claims(*verdicts), len(CLAIMS)))
    options.quick, options.repetitions = False, options.analyses
    settings = {"analyses": options.analyses, "dictionaries each": len(analyses[0]["single"]["C4"])}
    report(options, options.folder, "Stability of verdicts", settings=settings, rows=rows, goals=goals)


def same_claims(one: dict[str, str], other: dict[str, str]) -> int:
    """Claims with equal verdicts."""
    return sum(one[name] == other[name] for name in CLAIMS)


if __name__ == "__main__":
    main()
