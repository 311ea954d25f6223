"""Writing, verifying and shuffling one store; memory.py runs each task in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import numpy as np

from rlgen_stats.stores import ActivationWriter, PairedReader, create_activations, verify

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from common import PROVENANCE, SITE
from sizes import MODELS, Size, Task, run_child


def write(path: Path, scale: int, size: Size, models: tuple[str, ...] = MODELS[:1]) -> None:
    """Labels and one model."""
    texts = size.texts(scale)
    create_activations(path, texts.token_tables(), texts.prompt_table(), provenance=PROVENANCE, shard_tokens=size.shard)
    block = np.random.default_rng(0).standard_normal((size.shard, size.width), dtype=np.float32).astype(np.float16)
    for model in models:
        with ActivationWriter(path, model=model, site=SITE, width=size.width, dtype="float16") as writer:
            for _ in range(texts.n_tokens // size.shard):
                writer.append(block)


def write_pair(path: Path, scale: int, size: Size) -> None:
    """The store that the other tasks read."""
    write(path, scale, size, MODELS)


def check_store(path: Path, scale: int, size: Size) -> None:
    """Every chunk, label and digest."""
    found = verify(path)
    if not found.ok:
        raise SystemExit(f"the store is not sound: {found.problems[0]}")


def shuffle(path: Path, scale: int, size: Size) -> None:
    """One epoch of both views."""
    reader = PairedReader(path, MODELS, SITE, batch_size=1024, seed=0, dtype="stored", buffer_bytes=size.buffer)
    if sum(len(batch) for batch in reader.epoch(0)) != size.texts(scale).n_tokens:
        raise SystemExit("an epoch does not have every token.")


TASKS: Final[dict[str, Task]] = {"setup": write_pair, "write": write, "verify": check_store, "shuffle": shuffle}

if __name__ == "__main__":
    run_child(TASKS)
