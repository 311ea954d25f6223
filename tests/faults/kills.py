"""Kill -9 at chosen moments: a child process dies before its n-th change of a folder, or a little after it.

Moments are counted by Python's own audit events (files opened for writing, renamed, removed, folders made), so nothing
in the code under test knows of them. Children are forked: what takes seconds to import is imported once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import site
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

FORK: Final = multiprocessing.get_context("fork")
SECONDS: Final = 600
"""After which a child counts as hung."""
CHANGES: Final = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


@dataclass(frozen=True)
class Moment:
    """Before the n-th change of a folder within a stage (elsewhere than in studies all is one), or seconds later."""

    stage: str
    number: int
    """The first change is 1."""
    delay: float = 0.0


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    code: int | None
    """0, 1 for an error, -9 if it was killed, None if it hung."""
    said: str
    """Its traceback."""
    changes: Mapping[str, int]
    """Changes by stage, of children that were not killed."""
    moment: tuple[str, int] | None
    """Stage and change at which it was killed."""


@dataclass
class _Clock:
    """Counts the changes of a folder, stage by stage, and ends the process at a moment."""

    folder: str
    at: Moment | None
    note: int
    """File descriptor on which the moment is told."""
    order: tuple[str, ...]
    """Stages."""
    stage: str = ""
    changes: Counter[str] = field(default_factory=Counter)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or not self._concerns(event, arguments):
            return
        if event == "os.rename" and os.path.basename(os.path.dirname(os.fspath(arguments[1]))) == "stages":
            stage = os.path.basename(os.fspath(arguments[1])).removesuffix(".json")
            self.stage = stage if stage in self.order else self.stage
        self.changes[self.stage] += 1
        at = self.at  # other threads change files too, and one of them may be the first here
        if at is not None and self._is_now(at):
            os.write(self.note, f"{json.dumps([self.stage, self.changes[self.stage]])}\n".encode())
            self._die(at.delay)

    def _concerns(self, event: str, arguments: tuple[Any, ...]) -> bool:
        path = arguments[0]
        if isinstance(path, int) or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return False
        within = os.fsdecode(path).startswith(self.folder)
        return within or (event != "open" and arguments[-1] != -1)  # shutil.rmtree names files below an open folder

    def _is_now(self, at: Moment) -> bool:
        if self.stage == at.stage:
            return self.changes[self.stage] >= at.number
        return self.stage in self.order and self.order.index(self.stage) > self.order.index(at.stage)

    def _die(self, delay: float) -> None:
        self.at = None
        if delay:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        else:
            os.kill(os.getpid(), signal.SIGKILL)


def run(work: Callable[[], object], folder: Path, at: Moment | None = None, *, order: tuple[str, ...] = ("",)) -> Ended:
    """Do work that changes ``folder`` in a child, to its end or to a moment; of a study, give its stages in order.

    A stage that ends before the moment, because it had less left to do, ends the child with the next stage's start.
    """
    read, write = os.pipe()
    clock = _Clock(str(folder), at, write, order)
    child = FORK.Process(target=_child, args=(work, clock), daemon=True)
    child.start()
    os.close(write)
    with os.fdopen(read) as pipe:
        child.join(SECONDS)
        if child.exitcode is None:
            child.kill()
            child.join()
            return Ended(None, f"no end after {SECONDS} s", {}, None)
        told = [json.loads(line) for line in pipe.read().splitlines()]
    moment = next((tuple(one) for one in told if isinstance(one, list)), None)
    end = next((one for one in told if isinstance(one, dict)), {"said": "", "changes": {}})
    return Ended(child.exitcode, end["said"], end["changes"], moment if child.exitcode == -signal.SIGKILL else None)


def _child(work: Callable[[], object], clock: _Clock) -> None:
    sys.addaudithook(clock)
    said = ""
    try:
        work()
    except BaseException:
        said = traceback.format_exc()
    clock.at = None
    os.write(clock.note, (json.dumps({"said": said, "changes": clock.changes}) + "\n").encode())
    os._exit(1 if said else 0)


def elsewhere(function: Callable[..., Any], *arguments: Any, start: Literal["fork", "spawn"] = "fork") -> Any:
    """What a function returns in a child: a process that has had threads may not fork, and its children could hang."""
    context = multiprocessing.get_context(start)
    with ProcessPoolExecutor(1, context, site.addsitedir, (str(Path(__file__).parents[2]),)) as pool:  # to find tests
        return pool.submit(function, *arguments).result()


def drawn(draw: random.Random, changes: Mapping[str, int], stage: str, longest_delay: float) -> Moment:
    """A moment of a stage: half of them just before a change, half a while after it."""
    delay = draw.choice((0.0, draw.uniform(0, longest_delay)))
    return Moment(stage, draw.randint(1, changes[stage]), delay)
