"""How long-running work reports its progress: a protocol, and a silent default.

Toolkit functions take ``progress: Progress = SILENT``; the command line passes one that draws bars.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final, Protocol


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

    def log(self, message: str) -> None:
        """Do nothing: lines belong to whoever opened the task."""
