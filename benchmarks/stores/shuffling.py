"""Shuffled batches of paired activations against reading the same store row by row and in sequence.

Three views of width 2,304 in bfloat16, 1,024 rows a batch. A row is all views of one token. The page cache is warm.
One row at a time and a batch at a time through zarr-python stand for code without a shuffle buffer; they are timed on
a sample, the epochs on every row. Rows of the memory-mapped shard files, unchecked, show what one row costs at best:
with a warm cache, without checksums, without a general reader.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import zarr
from numpy.typing import NDArray

from rlgen_stats.stores import ActivationWriter, PairedReader, create_activations

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from common import PROVENANCE, SITE, Case, Texts, interleaved, read_options, scratch, spread
from reports import Goal, report

WIDTH: Final = 2304
MODELS: Final = ("base@0", "sft@100", "rl@100")
BATCH: Final = 1024
SHARD: Final = {False: 8192, True: 1024}
SHARDS: Final = {False: 19, True: 8}
"""Shards of a view: 717 MB; 38 MB with ``--quick``."""
BUFFER_BYTES: Final = {False: 1 << 30, True: 1 << 26}
"""Of the shuffle buffer: its default; half the store, as in the full size, with ``--quick``."""
SAMPLE: Final = {False: 300, True: 30}
"""Rows read one by one."""
FASTER_THAN_ROWS: Final = 5.0
OF_SEQUENTIAL: Final = 0.5
SHUFFLED: Final = "epoch, as stored"
SHUFFLED_FLOAT32: Final = "epoch, float32"
SEQUENTIAL: Final = "sequential, as stored"
SEQUENTIAL_FLOAT32: Final = "sequential, float32"
ROWS: Final = "zarr-python, one row at a time"
MAPPED: Final = "shards mapped by numpy.memmap, one row at a time"
BATCHES: Final = "zarr-python, one batch at a time (oindex)"


def write_store(path: Path, n_shards: int, shard: int) -> int:
    """Three views of random values; returns the number of tokens."""
    texts = Texts(prompts=shard // 64, sources=n_shards, tokens=64)
    create_activations(path, texts.token_tables(), texts.prompt_table(), provenance=PROVENANCE, shard_tokens=shard)
    for view, model in enumerate(MODELS):
        generator = np.random.default_rng(view)
        with ActivationWriter(path, model=model, site=SITE, width=WIDTH, dtype="bfloat16") as writer:
            for _ in range(n_shards):
                values = generator.standard_normal((shard, WIDTH), dtype=np.float32)
                writer.append((values.view(np.uint32) >> 16).astype(np.uint16))
    return texts.n_tokens


def reader(path: Path, dtype: str, quick: bool) -> PairedReader:
    """A reader whose buffer holds less than the store, so that every epoch reads it again."""
    return PairedReader(
        path, MODELS, SITE, batch_size=BATCH, seed=0, dtype=dtype, buffer_bytes=BUFFER_BYTES[quick], drop_last=False
    )


def rows_at_a_time(path: Path, rows: NDArray[np.int64]) -> None:
    """Every row by itself, as a naive data loader reads them."""
    views = [zarr.open_array(path / model / SITE / "activation", mode="r") for model in MODELS]
    for row in rows:
        np.stack([view[int(row)] for view in views])


def batch_at_once(path: Path, rows: NDArray[np.int64]) -> None:
    """The rows of one shuffled batch in one call a view."""
    views = [zarr.open_array(path / model / SITE / "activation", mode="r") for model in MODELS]
    np.stack([view.oindex[np.sort(rows)] for view in views])


def mapped_rows(path: Path, rows: NDArray[np.int64], shard: int) -> None:
    """Every row by itself, out of the mapped files of its shard."""
    folders = [path / model / SITE / "activation" for model in MODELS]
    n_shards = len(list(folders[0].glob("c.*.0")))
    files = [
        [np.memmap(folder / f"c.{i}.0", np.uint16, mode="r", shape=(shard, WIDTH)) for i in range(n_shards)]
        for folder in folders
    ]
    for row in rows:
        np.stack([view[row // shard][row % shard] for view in files])


def check(path: Path, n_tokens: int, quick: bool) -> None:
    """An epoch has every row once."""
    first = zarr.open_array(path / MODELS[0] / SITE / "activation", mode="r")
    wanted = np.concatenate([first[i : i + SHARD[quick]][:, :4] for i in range(0, n_tokens, SHARD[quick])])
    found = np.concatenate([batch[:, 0, :4] for batch in reader(path, "stored", quick).epoch(0)])
    if not np.array_equal(np.sort(wanted.view("u8").ravel()), np.sort(found.copy().view("u8").ravel())):
        raise SystemExit("an epoch does not have every row once.")


def cases(path: Path, n_tokens: int, quick: bool) -> tuple[list[Case], dict[str, int]]:
    """What to time, and how many rows each reads."""
    generator = np.random.default_rng(0)

    def drained(batches: Callable[[PairedReader], Any], dtype: str) -> Callable[[Any], None]:
        once = reader(path, dtype, quick)

        def run(_: Any) -> None:
            for _batch in batches(once):
                pass

        return run

    found = [
        Case(SHUFFLED, drained(lambda r: r.epoch(0), "stored")),
        Case(SHUFFLED_FLOAT32, drained(lambda r: r.epoch(0), "float32")),
        Case(SEQUENTIAL, drained(lambda r: r.sequential(SHARD[quick]), "stored")),
        Case(SEQUENTIAL_FLOAT32, drained(lambda r: r.sequential(SHARD[quick]), "float32")),
        Case(ROWS, lambda rows: rows_at_a_time(path, rows), lambda: generator.integers(0, n_tokens, SAMPLE[quick])),
        Case(MAPPED, lambda rows: mapped_rows(path, rows, SHARD[quick]), lambda: generator.permutation(n_tokens)),
        Case(BATCHES, lambda rows: batch_at_once(path, rows), lambda: generator.choice(n_tokens, BATCH, replace=False)),
    ]
    return found, {case.name: n_tokens for case in found} | {ROWS: SAMPLE[quick], BATCHES: BATCH}


def main() -> None:
    options = read_options(__doc__ or "")
    with scratch(options) as folder:
        path = folder / "activations.zarr"
        n_tokens = write_store(path, SHARDS[options.quick], SHARD[options.quick])
        check(path, n_tokens, options.quick)
        timed, n_rows = cases(path, n_tokens, options.quick)
        seconds = interleaved(timed, options.repetitions)
        speed = {name: spread([n_rows[name] / s for s in values]) for name, values in seconds.items()}
        row_bytes = len(MODELS) * WIDTH * 2
        rows = [
            {"reading": name, "rows": n_rows[name], "rows/s": found["median"], "low": found["low"]}
            | {"high": found["high"], "MB/s as stored": found["median"] * row_bytes / 1e6}
            | {"of one row at a time": found["median"] / speed[ROWS]["median"]}
            | {"of sequential": found["median"] / speed[SEQUENTIAL]["median"]}
            for name, found in speed.items()
        ]
        shuffled = speed[SHUFFLED]["median"]
        goals = [
            Goal("epoch, of rows one at a time", shuffled / speed[ROWS]["median"], FASTER_THAN_ROWS),
            Goal("epoch, of sequential bandwidth", shuffled / speed[SEQUENTIAL]["median"], OF_SEQUENTIAL),
        ]
        settings = {"views": len(MODELS), "width": WIDTH, "type": "bfloat16", "batch": BATCH, "tokens": n_tokens}
        settings |= {
            "bytes": f"{n_tokens * row_bytes / 1e6:,.0f} MB",
            "buffer": f"{BUFFER_BYTES[options.quick] >> 20} MB",
        }
        report(options, folder, "shuffling", settings=settings, rows=rows, goals=goals)


if __name__ == "__main__":
    main()
