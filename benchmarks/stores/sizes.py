"""Sizes of the stores that memory.py compares, and how one task runs in a process of its own."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from common import Memory, Texts

MODELS: Final = ("base@0", "rl@100")
SCALES: Final = (1, 4, 16)
N_FEATURES: Final = 64


@dataclass(frozen=True)
class Size:
    """Size of the smallest store; the others have 4 and 16 times the sources."""

    prompts: int
    width: int
    shard: int
    buffer: int
    """Bytes of the shuffle buffer: less than the smallest store."""

    def texts(self, scale: int) -> Texts:
        return Texts(self.prompts, scale)


SIZES: Final = {
    False: Size(prompts=4096, width=64, shard=65536, buffer=1 << 26),
    True: Size(prompts=256, width=64, shard=4096, buffer=1 << 22),
}
"""2^20 tokens (a whole block of labels), 268 MB in two views, and 4.3 GB at 16 times; with ``--quick`` a sixteenth."""

Task = Callable[[Path, int, Size], None]


def run_child(tasks: Mapping[str, Task]) -> None:
    """Run the task that the command line names here, and print what it took."""
    options = argparse.ArgumentParser()
    options.add_argument("--child", required=True)
    given = json.loads(options.parse_args().child)
    with Memory() as memory:
        tasks[given["task"]](Path(given["path"]), given["scale"], Size(**given["size"]))
    print(json.dumps(memory.found))
