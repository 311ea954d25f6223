"""How long-running work reports its progress: a protocol, and a silent default.

Toolkit functions take ``progress: Progress = SILENT``; the command line passes one that draws bars.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Final, Protocol

TELL_SECONDS: Final = 1.0
"""Between two events about how far a task of another process is."""


class Task(Protocol):
    """One running piece of work."""

    def advance(self, amount: float = 1.0, **facts: object) -> None:
        """Report ``amount`` more units done, with facts worth showing (loss, reward, share...)."""

    def skip(self, amount: float, **facts: object) -> None:
        """Report ``amount`` units that an earlier run did: done, but no measure of speed."""


class Progress(Protocol):
    """Receiver of progress."""

    def task(self, description: str, total: float | None = None, unit: str = "it") -> AbstractContextManager[Task]:
        """Open a task; ``total`` in ``unit``, None if unknown."""

    def log(self, message: str) -> None:
        """Show one line."""


class _SilentTask:
    def advance(self, amount: float = 1.0, **facts: object) -> None:
        """Do nothing."""

    def skip(self, amount: float, **facts: object) -> None:
        """Do nothing."""


class _Silent:
    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "it") -> Iterator[Task]:
        """A task that shows nothing."""
        yield _SilentTask()

    def log(self, message: str) -> None:
        """Do nothing."""


SILENT: Final[Progress] = _Silent()
"""Progress that shows nothing."""


class Within:
    """Progress whose tasks advance one task that is already running.

    Attributes
    ----------
    done : float
        Units reported so far.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self.done = 0.0

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "it") -> Iterator[Task]:
        """The running task; the description is not shown."""
        yield self

    def advance(self, amount: float = 1.0, **facts: object) -> None:
        """Advance the running task."""
        self.done += amount
        self._task.advance(amount, **facts)

    def skip(self, amount: float, **facts: object) -> None:
        """Advance the running task by units that an earlier run did."""
        self.done += amount
        self._task.skip(amount, **facts)

    def reach(self, done: float, **facts: object) -> None:
        """Advance the running task until ``done`` units have been reported, if they have not."""
        self.advance(max(0.0, done - self.done), **facts)

    def log(self, message: str) -> None:
        """Do nothing: lines belong to whoever opened the task."""


class Told:
    """Progress of work in another process: lines of JSON, of which :class:`Heard` makes progress here.

    Parameters
    ----------
    tell
        Hands a line over.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._n_tasks = 0

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "it") -> Iterator[Task]:
        """A task, told of when it begins and ends, and every ``TELL_SECONDS`` between."""
        number, self._n_tasks = self._n_tasks, self._n_tasks + 1
        self._tell(json.dumps({"task": number, "opened": [description, total, unit]}))
        task = _ToldTask(self._tell, number)
        yield task
        task.tell(ended=True)

    def log(self, message: str) -> None:
        """Tell a line."""
        self._tell(json.dumps({"log": message}))


class _ToldTask:
    """Sums are told and not steps, so that work which begins again in another process is not counted twice."""

    def __init__(self, tell: Callable[[str], None], number: int) -> None:
        self._tell, self._number = tell, number
        self._done = self._skipped = 0.0
        self._facts: dict[str, object] = {}
        self._told = -math.inf

    def advance(self, amount: float = 1.0, **facts: object) -> None:
        """Count; tell of it when the last event is old."""
        self._done, self._facts = self._done + amount, facts
        if time.monotonic() - self._told >= TELL_SECONDS:
            self.tell()

    def skip(self, amount: float, **facts: object) -> None:
        """Count units that an earlier run did."""
        self._skipped += amount
        self.advance(0, **facts)

    def tell(self, *, ended: bool = False) -> None:
        """How far it is."""
        self._told = time.monotonic()
        event = {"task": self._number, "done": self._done, "skipped": self._skipped, "facts": self._facts}
        self._tell(json.dumps(event | {"ended": ended}, default=str))


class Heard:
    """Shows what :class:`Told` tells from another process.

    Parameters
    ----------
    progress
        Receiver.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[int, Task] = {}
        self._known: dict[int, tuple[float, float]] = {}
        self._open: dict[int, ExitStack] = {}

    def hear(self, line: str) -> None:
        """What one line tells."""
        event = json.loads(line)
        if "log" in event:
            self._progress.log(event["log"])
            return
        number = event["task"]
        if "opened" in event and number not in self._tasks:
            self._open[number] = ExitStack()
            self._tasks[number] = self._open[number].enter_context(self._progress.task(*event["opened"]))
            self._known[number] = (0.0, 0.0)
        elif "done" in event and number in self._tasks:
            told = (event["done"], event["skipped"])
            done, skipped = (max(0.0, new - old) for new, old in zip(told, self._known[number], strict=True))
            self._known[number] = (self._known[number][0] + done, self._known[number][1] + skipped)
            if skipped:
                self._tasks[number].skip(skipped, **event["facts"])
            self._tasks[number].advance(done, **event["facts"])
            if event["ended"]:
                self._open[number].close()

    def close(self) -> None:
        """End what has not ended."""
        for task in self._open.values():
            task.close()
