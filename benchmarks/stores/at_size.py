"""Stores of a million prompts in 50,000 shards, of 200 models, and a study of 60 checkpoints: opening and asking.

Every task runs in a process of its own; imports are not counted. With ``--baseline FOLDER`` (a checkout of another
commit) the same tasks run with that code too, in turns (A B A B ...), and the table has their ratio.

Files are written without waiting for the disk, and the weights of all checkpoints are one file under many names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import xarray as xr

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import PROVENANCE, SITE, Memory, Texts, read_options, scratch, spread
from reports import Goal, report

from rlgen_stats.stores import ActivationWriter, append_model, create_activations

N_PROMPTS: Final = {False: 1_000_000, True: 10_000}
SHARDS: Final = {False: 50_000, True: 500}
N_MODELS: Final = {False: 200, True: 10}
N_CHECKPOINTS: Final = {False: 60, True: 6}
TEXT_TOKENS: Final = 4
N_FEATURES: Final = 2048
TABLE_PROMPTS: Final = 200
SELECTED: Final = {"segment": "completion", "task": "math", "split": "verification"}


# -- what is asked ---------------------------------------------------------------------------------------------------
def make_activations(path: Path, n_prompts: int, n_shards: int) -> None:
    """Labels of ``n_prompts`` texts and one model's activations, two channels wide."""
    texts = Texts(n_prompts, sources=1, tokens=TEXT_TOKENS)
    tables, size = texts.token_tables(texts_per_table=50_000), max(1, texts.n_tokens // n_shards)
    create_activations(path, tables, texts.prompt_table(), provenance=PROVENANCE, shard_tokens=size)
    with ActivationWriter(path, model="base@0", site=SITE, width=2, dtype="float16") as writer:
        writer.append(np.zeros((texts.n_tokens, 2), np.float16))


def feature_table(model: str) -> xr.Dataset:
    """Features of one model."""
    n, run, step = TABLE_PROMPTS, *model.split("@")
    three = {
        name: (("model", "prompt", "feature"), np.ones((1, n, N_FEATURES), "f4")) for name in ("mean", "firing", "max")
    }
    two = {"n_tokens": (("model", "prompt"), np.ones((1, n), int)), "fve": ("model", [0.5])}
    norms = {"decoder_norm": (("view", "feature"), np.ones((2, N_FEATURES)))}
    labels: dict[str, Any] = {name: ("prompt", [f"{name}{i}" for i in range(n)]) for name in ("domain", "split")}
    labels |= {name: ("prompt", [f"{name}{i}" for i in range(n)]) for name in ("task", "cluster")}
    labels |= {"model": [model], "run": ("model", [run]), "step": ("model", [int(step)]), "arm": ("model", [run])}
    labels |= {"prompt": [f"p{i}" for i in range(n)], "view": ["base@0", "rl@80"]}
    attrs = {"readout": "swap", "text_mode": "forced", "crosscoder": "main", "scale": "contribution"}
    return xr.Dataset(three | two | norms, coords=labels, attrs=attrs)


def make_features(path: Path, n_models: int) -> None:
    """A store of this many models."""
    for number in range(n_models):
        append_model(path, "features", feature_table(f"rl@{number}"), provenance=PROVENANCE)


def make_study(folder: Path, n_checkpoints: int) -> None:
    """A study whose runs are checkpoints; none of its stages has run."""
    (folder / "models").mkdir(parents=True)
    source = folder / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    for name, size in (("model.safetensors", 1 << 26), ("tokenizer.json", 8_000_000)):
        (source / name).write_bytes(np.random.default_rng(0).bytes(size))
    for number in range(n_checkpoints + 1):
        shutil.copytree(source, folder / f"models/{number}", copy_function=os.link)
    (folder / "prompts.csv").write_text("prompt_id,text,answer,task,domain\na,1 + 1,2,math,in\n")
    steps = "".join(f"      {number}: models/{number}\n" for number in range(1, n_checkpoints + 1))
    (folder / "study.yaml").write_text(
        "name: many\nbase: {path: models/0}\ndata: {prompts: prompts.csv, train: null}\nruns:\n"
        "  - {name: sft, arm: sft, checkpoints: {1: models/0}}\n"
        f"  - name: rl\n    arm: rl\n    checkpoints:\n{steps}"
        "crosscoders:\n  - {name: main, views: [base@0, sft@final, rl@final]}\n"
    )


# -- what is measured, each in a process of its own ------------------------------------------------------------------
def open_all(path: Path) -> None:
    """Labels and activations."""
    from rlgen_stats.stores import open_activations

    open_activations(path / "activations.zarr")


def select(path: Path) -> None:
    """One choice by three labels."""
    from rlgen_stats.stores import select_tokens

    select_tokens(path / "activations.zarr", **SELECTED)


def inspect(path: Path) -> None:
    """What ``rlgen-stats inspect`` gathers."""
    from rlgen_stats.stores import describe

    describe(path / "activations.zarr")


def status(path: Path) -> None:
    """What ``rlgen-stats status`` gathers."""
    from rlgen_stats.toolkit.study import open_for_run

    open_for_run(path / "study").status()


def append(store: str) -> Callable[[Path], None]:
    """One model more in a copy of a store."""

    def run(path: Path) -> None:
        append_model(path / store, "features", feature_table("sft@1"), provenance=PROVENANCE)

    return run


TASKS: Final[dict[str, Callable[[Path], None]]] = {
    "open_activations": open_all,
    "select_tokens by three labels": select,
    "inspect": inspect,
    "append_model, first after 1 model": append("one.zarr"),
    "append_model, after all models": append("many.zarr"),
    "status, nothing changed": status,
}
GOALS: Final = {
    "open_activations": 1.0,
    "select_tokens by three labels": 2.0,
    "inspect": 3.0,
    "status, nothing changed": 1.0,
}
"""Seconds."""


def child(task: str, path: str) -> None:
    """Run one task here and print what it took."""
    import rlgen_stats.stores

    if task.startswith("status"):
        import rlgen_stats.toolkit.study  # noqa: F401 - imports are not on the clock
    with Memory() as memory:
        TASKS[task](Path(path))
    print(json.dumps(memory.found))


def measured(task: str, path: Path, code: Path | None) -> Mapping[str, float]:
    """What a child found that runs this script with the code of this checkout, or of another."""
    for store in ("one", "many"):
        if task.startswith("append"):
            shutil.rmtree(path / f"{store}.zarr", ignore_errors=True)
            shutil.copytree(path / f"{store}-before.zarr", path / f"{store}.zarr")
    os.sync()
    environment = os.environ | ({"PYTHONPATH": str(code / ".namespace")} if code else {})
    command = [sys.executable, "-P", __file__, "--child", json.dumps({"task": task, "path": str(path)})]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))


# -- the whole benchmark ---------------------------------------------------------------------------------------------
def main() -> None:
    options = read_options(__doc__ or "", baseline="a checkout of another commit to compare with")
    if options.child:
        child(**json.loads(options.child))
        return
    codes: dict[str, Path | None] = {"now": None} | ({"before": options.baseline} if options.baseline else {})
    with scratch(options) as folder:
        os.fsync = lambda descriptor: None  # type: ignore[assignment]
        start = time.perf_counter()
        make_activations(folder / "activations.zarr", N_PROMPTS[options.quick], SHARDS[options.quick])
        make_features(folder / "one-before.zarr", 1)
        make_features(folder / "many-before.zarr", N_MODELS[options.quick])
        print(f"written in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        for name in codes:
            make_study(folder / name / "study", N_CHECKPOINTS[options.quick])
            for other in ("activations.zarr", "one-before.zarr", "many-before.zarr"):
                (folder / name / other).symlink_to(folder / other)
        taken: dict[tuple[str, str], list[Mapping[str, float]]] = {(t, name): [] for t in TASKS for name in codes}
        for repetition in range(options.repetitions + 1):
            for task in TASKS:
                for name, code in codes.items():
                    found = measured(task, folder / name, code)
                    taken[task, name] += [found] if repetition else []
        rows = [_row(task, {name: taken[task, name] for name in codes}) for task in TASKS]
        seconds = {str(row["task"]): float(row["s"]) for row in rows}
        goals = [Goal(f"{task}, s", seconds[task], bound, at_least=False) for task, bound in GOALS.items()]
        first, last = (seconds[task] for task in TASKS if task.startswith("append"))
        goals.append(Goal("append after all models, of the first", last / first, 1.5, at_least=False))
        settings = {"prompts": N_PROMPTS[options.quick], "shards": SHARDS[options.quick]}
        settings |= {"models": N_MODELS[options.quick], "checkpoints": N_CHECKPOINTS[options.quick]}
        report(options, folder, "at_size", settings=settings, rows=rows, goals=goals)


def _row(task: str, found: dict[str, list[Mapping[str, float]]]) -> dict[str, Any]:
    seconds = {name: spread([taken["seconds"] for taken in runs]) for name, runs in found.items()}
    memory = {name: spread([taken["rss_above_imports"] for taken in runs])["median"] for name, runs in found.items()}
    row: dict[str, Any] = {"task": task, "s": seconds["now"]["median"]}
    row |= {"low": seconds["now"]["low"], "high": seconds["now"]["high"], "MB above imports": memory["now"]}
    if "before" in found:
        row |= {"before, s": seconds["before"]["median"], "before, MB": memory["before"]}
        row["times faster"] = row["before, s"] / row["s"]
    return row


if __name__ == "__main__":
    main()
