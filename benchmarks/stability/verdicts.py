"""Whether a study says the same with other dictionaries: analyses of the same models, each with its own dictionaries.

Models, answers and activations are the study's; each further analysis trains dictionaries of its own from other
initial weights, those of two models too, and runs everything after them. One more repeats the first of these with
another number of threads, which adds sums in another order.
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
from rlgen_stats.stores import StudyFolder, open_results, read_json, result_groups
from rlgen_stats.toolkit.reporting import assess_claims, load_results
from rlgen_stats.toolkit.reporting.formatting import jsonable
from rlgen_stats.toolkit.study import STAGES, read_spec

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
        intervention={
            **{"n_controls": 19, "max_prompts": 160},
            "accept_undecidable": True,  # all tasks are shifted alike: none is unrelated
        },
        crosscoders=[
            {"name": "main", "views": ["base@0", "sft@final", "rl@final"], "accept_unhealthy": True, **sizes},
            {"name": "pair-sft", "views": ["base@0", "sft@final"], "accept_unhealthy": True, **sizes},
            {"name": "pair-rl", "views": ["base@0", "rl@final"], "accept_unhealthy": True, **sizes},
        ],
    )
    run_study(study)


def prepare(study: Path, folder: Path, seed: int) -> None:
    """The study with another seed of every crosscoder; what does not depend on them stays done."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    for path in study.iterdir():
        if path.name in KEPT:
            (folder / path.name).symlink_to(path.resolve())
        elif path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("*.lock"))
    spec = yaml.safe_load((study / "study.yaml").read_text())
    for crosscoder in spec["crosscoders"]:
        crosscoder["seed"] = seed
    (folder / "study.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))


def run(folder: Path, threads: int, *, trial: bool) -> None:
    """Run an analysis, with or without its trial."""
    command = [sys.executable, "-P", "-m", "rlgen_stats.cli", "run", str(folder), "--quiet"]
    if not trial:
        command += [
            word for stage in STAGES if stage.name not in ("intervene", "report") for word in ("--stage", stage.name)
        ]
    with (folder / "log.txt").open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)


def answers(folder: Path, *, trial: bool) -> dict[str, Any]:
    """What a finished analysis says; without its trial, of C1 to C3."""
    if trial:
        claims = {one["id"]: one for one in read_json(folder / "report/report.json")["claims"]}
    else:
        found = assess_claims(load_results(StudyFolder(folder)), read_spec(folder))
        claims = {one.id: jsonable(one.as_dict()) for one in found}
    names = ("verdict", "estimate", "low", "high")
    return {
        "claims": {
            name: {key: claims[name][key] for key in names} for name in CLAIMS if trial or name not in DIRECTION
        },
        "single": {name: single(folder, direction) for name, direction in DIRECTION.items()} if trial else {},
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
    for name in analyses[0]["claims"]:
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
    parser.add_argument("--analyses", type=int, default=10, help="beside the study's own")
    parser.add_argument("--folder", type=Path, required=True, help="where the analyses go; finished ones are kept")
    parser.add_argument("--jobs", type=int, default=2, help="analyses at once, each on one thread")
    parser.add_argument("--without-trial", action="store_true", help="C1 to C3 alone, where a trial takes hours")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    if options.planted and not (options.study / "report").exists():
        plant(options.study)

    trial = not options.without_trial

    def analyse(seed: int, threads: int = 1) -> dict[str, Any]:
        folder = options.folder / (f"seed-{seed}" if threads == 1 else f"seed-{seed}-threads-{threads}")
        prepare(options.study, folder, seed)
        run(folder, threads, trial=trial)
        return answers(folder, trial=trial)

    with ThreadPoolExecutor(options.jobs) as pool:
        others = list(pool.map(analyse, range(1, options.analyses + 1)))
    analyses = [answers(options.study, trial=trial), *others]
    rows = summary(analyses)
    goals = [Goal(f"{row['claim']}: share of analyses with the same verdict", row.pop("same"), SAME) for row in rows]
    goals += [
        Goal(f"{row['claim']}: share of pooled intervals that overlap", overlap, OVERLAPPING)
        for row in rows
        if (overlap := row.pop("overlap")) is not None
    ]
    if trial:
        same = same_claims(others[0], analyse(1, threads=2))
        goals.append(Goal("claims with the same verdict on one and two threads", same, len(CLAIMS)))
    options.quick, options.repetitions = False, options.analyses
    settings = {
        "analyses": len(analyses),
        "dictionaries each": len(read_spec(options.study).primary_crosscoder.names),
    }
    report(options, options.folder, "Stability of verdicts", settings=settings, rows=rows, goals=goals)


def same_claims(one: dict[str, Any], other: dict[str, Any]) -> int:
    """Claims with equal verdicts."""
    return sum(one["claims"][name]["verdict"] == other["claims"][name]["verdict"] for name in CLAIMS)


if __name__ == "__main__":
    main()
