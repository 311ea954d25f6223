"""Opening a store with the labels of a billion tokens: time and peak memory in a fresh process.

The store is simulated. A small one is written; then its arrays are declared a billion tokens long, the spans are
written anew (4 million of them), and the digests are renewed. The chunks of tokens and activations are absent, which
opening never notices, because it reads none. Imports are not counted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import xarray as xr

from rlgen_stats.stores import ActivationWriter, create_activations, open_activations, open_tokens, select_tokens
from rlgen_stats.stores.atomic import read_json, write_json
from rlgen_stats.stores.creation import write_table
from rlgen_stats.stores.digests import write_digest
from rlgen_stats.stores.labels import SPANS_GROUP, TOKENS_GROUP

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from common import PROVENANCE, SITE, Memory, Texts, in_fresh_process, read_options, scratch, spread
from reports import Goal, report

MODELS: Final = ("base@0", "rl@100")
WIDTH: Final = 4096
SHARD: Final = 8192
N_PROMPTS: Final = 20_000
TEXT_TOKENS: Final = 500
SOURCES: Final = {False: 100, True: 1}
"""Models that continue every prompt: 2 million texts, 10^9 tokens and 4 million spans; a hundredth with ``--quick``."""
SECONDS: Final = 1.0
MEGABYTES: Final = 300.0
SELECTED: Final = {"segment": "completion", "task": "math", "split": "verification", "source": "rl@0"}


# -- the simulated store ---------------------------------------------------------------------------------------------
def simulate(path: Path, n_sources: int) -> int:
    """A store whose metadata and small tables are those of a large one; returns its number of tokens."""
    small = Texts(prompts=N_PROMPTS, sources=1, tokens=4)
    create_activations(path, small.token_tables(), small.prompt_table(), provenance=PROVENANCE, shard_tokens=SHARD)
    n_small = small.n_tokens
    for model in MODELS:
        with ActivationWriter(path, model=model, site=SITE, width=8, dtype="float16") as writer:
            writer.append(np.zeros((n_small, 8), np.float16))
    n_tokens = Texts(prompts=N_PROMPTS, sources=n_sources, tokens=TEXT_TOKENS).n_tokens
    n_shards = -(-n_tokens // SHARD)
    for array in (path / TOKENS_GROUP).iterdir():
        if array.is_dir():
            _declare(array, [n_tokens])
    for model in MODELS:
        _declare(path / model / SITE / "activation", [n_tokens, WIDTH], [SHARD, WIDTH])
        _declare(path / model / SITE / "committed", [n_shards, 2])
    write_table(path / SPANS_GROUP, SPANS_GROUP, spans(n_sources))
    for group in (SPANS_GROUP, TOKENS_GROUP, *(f"{model}/{SITE}" for model in MODELS)):
        write_digest(path / group)
    write_digest(path, {"n_tokens": n_tokens, "groups": {}})
    return n_tokens


def _declare(array: Path, shape: list[int], chunk: list[int] | None = None) -> None:
    """Rewrite the shape in an array's metadata and remove its chunks."""
    document = read_json(array / "zarr.json")
    document["shape"] = shape
    if chunk:
        document["chunk_grid"]["configuration"]["chunk_shape"] = chunk
    for file in [file for file in array.rglob("*") if file.is_file() and file.name != "zarr.json"]:
        file.unlink()
    write_json(array / "zarr.json", document)


def spans(n_sources: int) -> xr.Dataset:
    """Every source continues every prompt: a span of prompt tokens, then one of completion tokens."""
    n_texts = N_PROMPTS * n_sources
    start = np.arange(n_texts)[:, None] * TEXT_TOKENS + np.array([0, TEXT_TOKENS // 4])
    columns = {
        "start": start.ravel(),
        "prompt": np.repeat(np.tile(np.arange(N_PROMPTS, dtype=np.int32), n_sources), 2),
        "source": np.repeat(np.arange(n_sources, dtype=np.int16), 2 * N_PROMPTS),
        "segment": np.tile(np.array([0, 1], dtype=np.int8), n_texts),
    }
    attrs = {"sources": [f"rl@{i}" for i in range(n_sources)], "segments": ["prompt", "completion", "pad"]}
    return xr.Dataset({name: ("span", values) for name, values in columns.items()}, attrs=attrs)


# -- what is measured, each in a process of its own ------------------------------------------------------------------
def both(path: Path) -> None:
    """The labels, then the activations with them."""
    open_tokens(path)
    open_activations(path, site=SITE)


def select_ranges(path: Path) -> None:
    """One choice by labels, as ranges."""
    select_tokens(path, **SELECTED)


def select(path: Path) -> None:
    """One choice by labels, through xarray."""
    open_tokens(path).sel(**SELECTED)


TASKS: Final[dict[str, Callable[[Path], object]]] = {
    "open_tokens": open_tokens,
    "open_tokens, open_activations": both,
    "select_tokens by four labels": select_ranges,
    "open_tokens, sel by four labels": select,
}
OPENING: Final = "open_tokens, open_activations"


def child(task: str, path: str) -> None:
    """Run one task here and print what it took."""
    with Memory() as memory:
        TASKS[task](Path(path))
    print(json.dumps(memory.found))


# -- the whole benchmark ---------------------------------------------------------------------------------------------
def main() -> None:
    options = read_options(__doc__ or "")
    if options.child:
        child(**json.loads(options.child))
        return
    with scratch(options) as folder:
        path = folder / "activations.zarr"
        n_tokens = simulate(path, SOURCES[options.quick])
        taken: dict[str, list[dict[str, float]]] = {task: [] for task in TASKS}
        for repetition in range(options.repetitions + 1):
            for task in TASKS:
                found = in_fresh_process(__file__, task=task, path=path)
                taken[task] += [found] if repetition else []
        rows = [_row(task, found) for task, found in taken.items()]
        opening = next(row for row in rows if row["task"] == OPENING)
        goals = [
            Goal("opening, s", opening["s"], SECONDS, at_least=False),
            Goal("opening, peak RSS MB", opening["peak RSS MB"], MEGABYTES, at_least=False),
        ]
        settings = {"tokens": f"{n_tokens:,}", "spans": f"{2 * n_tokens // TEXT_TOKENS:,}", "prompts": N_PROMPTS}
        settings |= {"models": len(MODELS), "width": WIDTH}
        report(options, folder, "opening", settings=settings, rows=rows, goals=goals)


def _row(task: str, found: list[dict[str, float]]) -> dict[str, Any]:
    seconds = spread([taken["seconds"] for taken in found])
    rss = spread([taken["rss"] for taken in found])
    above = spread([taken["rss_above_imports"] for taken in found])
    row: dict[str, Any] = {"task": task, "s": seconds["median"], "low": seconds["low"], "high": seconds["high"]}
    return row | {"peak RSS MB": rss["median"], "above imports": above["median"]}


if __name__ == "__main__":
    main()
