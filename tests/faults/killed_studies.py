"""Studies killed in every stage: run again, they end with the arrays of a study that was never interrupted."""

from __future__ import annotations

import pkgutil
import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import pandas as pd
import yaml

from rlgen_stats.cli import main
from rlgen_stats.stores import verify
from rlgen_stats.stores.digests import file_sha256
from rlgen_stats.toolkit.study import STAGES, read_spec
from tests.end_to_end import planted
from tests.end_to_end.same_numbers import differences
from tests.faults.damaged_stores import Log
from tests.faults.kills import drawn, elsewhere, run

ORDER: Final = ("", *(stage.name for stage in STAGES))
LONGEST_DELAY: Final = 0.4
"""Seconds after a change."""
_TRAINER: Final = {"max_steps": 4, "gradient_checkpointing": False, "logging_steps": 1}
_GRPO: Final = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 4, "beta": 0.0}


def write_study(root: Path) -> None:
    """A study whose every stage has something to do: two runs are trained, and the third changed by a planted cause."""
    planted.write_study(
        root,
        runs=[
            {"name": "sft", "arm": "sft", "method": "sft", "n_checkpoints": 2, "trainer": {**_TRAINER}},
            {"name": "rl", "arm": "rl", "checkpoints": {1: "models/rl-1", 2: "models/rl-2"}},
            {"name": "grpo", "arm": "other", "method": "grpo", "n_checkpoints": 2, "trainer": {**_TRAINER, **_GRPO}},
        ],
        data={"prompts": "data/prompts.parquet", "train": "data/train.parquet"},
        contrast=["sft", "rl"],
        crosscoders=[
            {"name": name, "views": ["base@0", *views], "k": 6, "accept_unhealthy": True}
            | {"n_features": 64, "steps": 120, "batch_size": 256, "learning_rate": 3e-3, "replicates": replicates}
            for name, views, replicates in (
                ("main", ["sft@final", "rl@final"], 2),
                ("pair-sft", ["sft@final"], 1),
                ("pair-rl", ["rl@final"], 1),
            )
        ],
        generation={"max_new_tokens": 6, "n_samples": 1, "batch_size": 512},
        statistics={"n_resamples": 99, "n_bootstrap": 99, "n_halvings": 5, "top_k": 5, "n_min": 5},
        selection={"max_features": 3, "min_discordant": 5},
        intervention={"n_controls": 19, "max_prompts": 24, "doses": [0.0, 2.0], "accept_undecidable": True},
    )
    prompts = pd.read_parquet(root / "data/prompts.parquet")
    prompts[prompts["cluster"].str.contains("w[0-5]-")].to_parquet(root / "data/prompts.parquet")  # half of them
    rows = [
        {"text": planted.prompt("kindly", task, a, b), "answer": planted.answer(task, a, b), "task": task}
        for task in planted.TASKS
        for a, b in zip(planted.ITEMS, planted.ITEMS[3:], strict=False)
    ]
    table = pd.DataFrame(rows)
    table.assign(completion=" ans " + table["answer"]).to_parquet(root / "data/train.parquet")


def change(root: Path) -> None:
    """Another learning rate of SFT: all that any stage made is out of date, but for the other run that is trained."""
    file = root / "study.yaml"
    spec = yaml.safe_load(file.read_text())
    sft = next(one for one in spec["runs"] if one["name"] == "sft")
    sft["trainer"]["learning_rate"] = 1e-4 if sft["trainer"].get("learning_rate") != 1e-4 else 2e-4
    file.write_text(yaml.safe_dump(spec))


def copy_inputs(study: Path, to: Path) -> Path:
    """What a study is made from, without what its stages made."""
    trained = [study / "models" / run.name for run in read_spec(study).runs if run.method != "checkpoints"]
    for model in (study / "models").iterdir():
        if model.is_dir() and model not in trained:
            shutil.copytree(model, to / "models" / model.name)
    shutil.copytree(study / "data", to / "data")
    shutil.copy(study / "study.yaml", to / "study.yaml")
    return to


def go_on(study: Path, until: str | None = None) -> Callable[[], object]:
    """The command line's ``run``, of one stage and what it needs or of all."""
    stages = [] if until is None else ["--stage", until]
    return lambda: main(["run", str(study), "--quiet", *stages], standalone_mode=False)


def other_files(reference: Path, study: Path, part: str = "") -> list[str]:
    """One sentence for every file that only one of two studies has, or whose weights or rows differ."""
    ours, theirs = (
        {
            file.relative_to(folder).as_posix()
            for file in (folder / part).rglob("*")
            if file.is_file() and not file.name.endswith(".lock")
        }
        for folder in (reference, study)
    )
    found = [f"{name} is in one of them only" for name in sorted(ours ^ theirs)]
    for name in sorted(ours & theirs):
        one, two = reference / name, study / name
        if name.endswith(".safetensors") and file_sha256(one) != file_sha256(two):
            found.append(f"{name}: other weights")
        if name.endswith(".parquet") and not pd.read_parquet(one).equals(pd.read_parquet(two)):
            found.append(f"{name}: other rows")
    return found


def all_differences(reference: Path, study: Path) -> list[str]:
    return [*other_files(reference, study), *differences(reference, study), *verify(study).problems]


def kill_round(
    reference: Path,
    study: Path,
    changes: Mapping[str, int],
    draw: random.Random,
    *,
    stages: Sequence[str] = ORDER[1:],
    until: str | None = None,
    compare: Callable[[Path, Path], list[str]] = all_differences,
    log: Log,
) -> Counter[str]:
    """Kill a study in each stage, let it end (or a stage of it), and compare it with the reference.

    Returns the number of kills that were ``harmless``, ``named`` (``verify`` says of what is left that it is not
    sound), ``lost`` (the study does not go on) or ``silently wrong`` (it ends with other arrays).
    """
    for one in STAGES:  # imported once, and not by every child
        pkgutil.resolve_name(one.function)
    tally = Counter[str]()
    for stage in stages:
        at = drawn(draw, changes, stage, LONGEST_DELAY)
        ended = run(go_on(study, until), study, at, order=ORDER)
        if ended.moment is None:
            log(f"{at}: not reached, {ended.code} {ended.said}")
            if ended.code != 0:
                return tally + Counter(lost=1)
            continue
        problems = elsewhere(verify, study).problems if list(study.glob("*.zarr/zarr.json")) else ()
        log(f"killed at {ended.moment}, {at.delay:.2f} s after it {list(problems)[:1] or ''}")
        tally["named" if problems else "harmless"] += 1
    ended = run(go_on(study, until), study, order=ORDER)
    if ended.code != 0:
        log(f"does not go on: {ended.code} {ended.said}")
        return tally + Counter(lost=1)
    wrong = elsewhere(compare, reference, study)
    for line in wrong:
        log(line)
    return tally + Counter({"silently wrong": bool(wrong)})


def count(root: Path, *, n: int, seed: int, log: Log) -> Counter[str]:
    """Rounds of kills, one in every stage: from nothing, then over what a changed study left, back and forth."""
    references, changes = [], []
    inputs = root / "inputs"
    run(lambda: write_study(inputs), inputs)
    for number in range(2):
        references.append(copy_inputs(inputs, root / f"reference-{number}"))
        whole = run(go_on(references[-1]), references[-1], order=ORDER)
        if whole.code != 0:
            raise RuntimeError(whole.said)
        changes.append(whole.changes)
        change(inputs)
    study, draw, tally = copy_inputs(references[0], root / "killed"), random.Random(seed), Counter[str]()
    number = 0
    while tally.total() < n and not tally["lost"]:
        shutil.copy(references[number] / "study.yaml", study / "study.yaml")
        tally += kill_round(references[number], study, changes[number], draw, log=log)
        number = 1 - number
    return tally
