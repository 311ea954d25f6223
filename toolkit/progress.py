"""How long work reports itself: a protocol, and a silent default.

Toolkit functions take ``progress: Progress = SILENT``; the command line passes one that draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final, Protocol


class Task(Protocol):
    """One running piece of work."""

    def advance(self, amount: float = 1.0, **facts: object) -> None:
        """Report ``amount`` more units done, with facts worth showing (loss, reward, share...)."""


class Progress(Protocol):
    """Receiver of progress."""

    def task(self, description: str, total: float | None = None, unit: str = "it") -> AbstractContextManager[Task]:
        """Open a task; ``total`` in ``unit``, None if unknown."""

    def log(self, message: str) -> None:
        """Say one line."""


class _SilentTask:
    def advance(self, amount: float = 1.0, **facts: object) -> None:
        """Say nothing."""


class _Silent:
    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "it") -> Iterator[Task]:
        """A task that says nothing."""
        yield _SilentTask()

    def log(self, message: str) -> None:
        """Say nothing."""


SILENT: Final[Progress] = _Silent()
"""Progress that says nothing."""
