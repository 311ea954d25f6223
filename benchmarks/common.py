"""What the benchmarks share: options, made-up labels, interleaved timing, peak memory."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from rlgen_stats.stores import Provenance

REPETITIONS: Final = 5
SAMPLE_SECONDS: Final = 0.005
"""Between two looks at the memory in use."""
SITE: Final = "resid_1"
PROVENANCE: Final = Provenance(study_id="benchmark", spec_hash="0" * 64)


# -- options and scratch space ---------------------------------------------------------------------------------------
def _parser(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--quick", action="store_true", help="at most 128 MB: checks the script, measures nothing")
    found.add_argument("--repetitions", type=int, help="after one to warm up; default 5, with --quick 1")
    found.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    found.add_argument("--json", type=Path, help="write the results here too")
    found.add_argument(
        "--processor-time", dest="clock", action="store_const", const=time.process_time, default=time.perf_counter,
        help="seconds of the processor instead of the clock, for tools on one thread of a machine that others use too",
    )  # fmt: skip
    found.add_argument("--child", help=argparse.SUPPRESS)
    return found


def read_options(description: str, **paths: str) -> argparse.Namespace:
    """The options given to a benchmark; ``paths`` are further ones that take a path (name -> help)."""
    parser = _parser(description)
    for name, text in paths.items():
        parser.add_argument(f"--{name}", type=Path, help=text)
    options = parser.parse_args()
    options.repetitions = options.repetitions or (1 if options.quick else REPETITIONS)
    return options


def options_with_device(
    description: str, add: Callable[[argparse.ArgumentParser], object] = lambda _: None
) -> tuple[argparse.Namespace, Any]:
    """The options given to a benchmark that can run on a GPU, and the torch device asked for; ``add`` adds its own."""
    import torch

    parser = _parser(description)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    add(parser)
    options = parser.parse_args()
    options.repetitions = options.repetitions or (1 if options.quick else REPETITIONS)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; leave out --device")
    return options, torch.device(options.device)


@contextmanager
def scratch(options: argparse.Namespace) -> Iterator[Path]:
    """An empty folder that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="rlgen-stats-benchmark-", dir=options.folder) as folder:
        yield Path(folder)


# -- made-up labels --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Texts:
    """Labels of ``prompts`` prompts continued by ``sources`` models: one text of ``tokens`` tokens each."""

    prompts: int
    sources: int
    tokens: int = 256

    @property
    def n_tokens(self) -> int:
        return self.prompts * self.sources * self.tokens

    def prompt_table(self) -> pd.DataFrame:
        index = np.arange(self.prompts)
        return pd.DataFrame(
            {
                "prompt": [f"p{i}" for i in index],
                "task": np.where(index % 2, "math", "sciq"),
                "domain": np.where(index % 2, "in", "out"),
                "split": np.where(index % 4 < 2, "selection", "verification"),
                "cluster": [f"p{i}" for i in index],
            }
        )

    def token_tables(self, texts_per_table: int = 256) -> Iterator[pd.DataFrame]:
        """The token labels in store order, a few texts at a time; a quarter of a text is its prompt."""
        position = np.arange(self.tokens)
        segment = np.where(position < self.tokens // 4, "prompt", "completion")
        for first in range(0, self.prompts * self.sources, texts_per_table):
            text = np.arange(first, min(first + texts_per_table, self.prompts * self.sources))
            yield pd.DataFrame(
                {
                    "prompt": np.repeat([f"p{i}" for i in text % self.prompts], self.tokens),
                    "source": np.repeat([f"rl@{i}" for i in text // self.prompts], self.tokens),
                    "position": np.tile(position, len(text)),
                    "token_id": np.tile(position % 1000, len(text)),
                    "segment": np.tile(segment, len(text)),
                }
            )


# -- timing ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """Something to time: ``run(prepare())``; only ``run`` is on the clock."""

    name: str
    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


def interleaved(
    cases: Sequence[Case], repetitions: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every case, A B C A B C ..., so that a slow minute of the machine hits all of them.

    The first round warms up and is dropped. Dirty pages are written out before each start, so that no case pays for
    the one before.
    """
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for repetition in range(repetitions + 1):
        for case in cases:
            given = case.prepare()
            os.sync()
            start = clock()
            case.run(given)
            if repetition:
                seconds[case.name].append(clock() - start)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


# -- memory ----------------------------------------------------------------------------------------------------------
def _status(name: str) -> float | None:
    """A line of this process's memory account, in MB; None where the system keeps none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), None)


def peak_rss() -> float:
    """Largest resident memory of this process so far, MB; pages of mapped files count.

    ``VmHWM``, which starts anew in a fresh process; ``ru_maxrss`` (the fallback) starts at what the parent had.
    """
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Memory:
    """Peak memory and time of a block, in MB and seconds, over what the process held before it."""

    def __enter__(self) -> Memory:
        self._rss, self._anonymous = peak_rss(), _status("RssAnon") or float("nan")
        self._peak, self._stop = self._anonymous, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._start = time.perf_counter()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, _status("RssAnon") or float("nan"))

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self._start
        self._stop.set()
        self._thread.join()
        self.found = {
            "seconds": seconds,
            "rss": peak_rss(),
            "rss_above_imports": peak_rss() - self._rss,
            "anonymous": self._peak,
            "anonymous_above_imports": self._peak - self._anonymous,
        }


def in_fresh_process(script: str, **task: Any) -> dict[str, float]:
    """What ``script`` prints last when run with ``--child`` and this task."""
    command = [sys.executable, "-P", script, "--child", json.dumps(task, default=str)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))
