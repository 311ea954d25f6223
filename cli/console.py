"""What all commands share: options, errors, progress, JSON."""

from __future__ import annotations

import errno
import functools
import gc
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, NoReturn, ParamSpec, TypeAlias, TypeVar

import click

from rlgen_stats.schemas.errors import RlgenStatsError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rlgen_stats.toolkit.progress import Progress, Task

P = ParamSpec("P")
R = TypeVar("R")

Workers: TypeAlias = "Callable[[], AbstractContextManager[Any]]"
"""What enters the dask client of a command, or None."""
EXIT_BAD_INPUT: Final = 2
EXIT_INTERRUPTED: Final = 130
EXIT_READER_GONE: Final = 141
"""128 and the number of SIGPIPE, as shells report it of any command whose output is cut by ``head``."""
PLAIN_LINE_SECONDS: Final = 10.0
"""Seconds between progress lines where no terminal can redraw a bar."""

study_argument = click.argument("study", type=click.Path(file_okay=False))
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
quiet_option = click.option("--quiet", is_flag=True, help="No progress.")
yes_option = click.option(
    "--yes", is_flag=True, help="Replace what a change of the study made stale without asking, however long it took."
)


def workers_options(command: Callable[P, R]) -> Callable[..., R]:
    """``--scheduler`` and ``--devices``, as the argument ``workers`` of a command: a context manager's function.

    It enters a dask client on whose workers the stages that load models run, or None.
    """

    @click.option(
        "--scheduler",
        metavar="ADDRESS",
        help="A dask scheduler, e.g. tcp://host:8786, whose workers run models and statistics; default: this process.",
    )
    @click.option(
        "--devices",
        metavar="LIST",
        help="GPUs of this machine, e.g. 0,1,2,3, with a worker process for models on each; cpu stands for no GPU.",
    )
    @functools.wraps(command)
    def wrapped(*args: Any, scheduler: str | None, devices: str | None, **options: Any) -> R:
        return command(*args, workers=functools.partial(connect, scheduler, devices), **options)  # type: ignore[arg-type]

    return wrapped


launcher_option = click.option(
    "--launcher",
    metavar="COMMAND",
    help="What starts the processes that train a run together, e.g. 'accelerate launch --num_processes 4'; default: "
    "this process trains.",
)


def handle_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn the toolkit's errors into one sentence and exit code 2; Ctrl-C into 130."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            echo("\nInterrupted. What was finished is kept; run the same command again to continue.", err=True)
            sys.exit(EXIT_INTERRUPTED)
        except RlgenStatsError as error:
            fail(error.args[-1] if isinstance(error, OSError) else str(error))
        except OSError as error:
            sentence = explain_os_error(error)
            if sentence is None:
                raise
            fail(sentence)
        except MemoryError as error:
            fail(f"there is not enough memory for this ({str(error)[:200] or 'out of memory'}); ask for less at once.")
        except RuntimeError as error:  # what pathlib makes of ELOOP
            if not str(error).startswith("Symlink loop"):
                raise
            fail(f"{str(error).removeprefix('Symlink loop from ')} cannot be used; {_WHAT_TO_DO[errno.ELOOP]}.")
        except Exception as error:  # of the libraries of object stores, which share no base
            if "credential" not in type(error).__name__.lower():
                raise
            fail(f"credentials of an object store are missing or refused ({error}); set them in the environment.")

    return wrapped


_WHAT_TO_DO: Final = {
    errno.EACCES: "you may not read or write it: use a folder you own",
    errno.EPERM: "the system does not allow it: use a folder you own",
    errno.EROFS: "it is on a read-only file system: name a folder elsewhere",
    errno.ENOENT: "there is no such file or folder: correct the path",
    errno.EEXIST: "it exists already: name another",
    errno.EISDIR: "it is a folder, expected a file: correct the path",
    errno.ENOTDIR: "a file stands where a folder is expected: correct the path",
    errno.ENAMETOOLONG: "the name is longer than the file system takes: shorten it",
    errno.ELOOP: "its symbolic links lead in a circle: correct them",
    errno.EFBIG: "the file would be larger than the file system or a limit allows (ulimit -f): write elsewhere",
    errno.ENOLCK: "its file system offers no locks: work on a local disk",
    errno.EMFILE: "too many files are open (ulimit -n): raise the limit",
    errno.EIO: "the device reports a read or write error: check the disk",
    errno.ESTALE: "its network file system has lost it: mount it again",
}


def explain_os_error(error: OSError) -> str | None:
    """One sentence on what the system refused; None where neither a file nor a reason is known, which is a bug."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk or quota is full; what was committed is kept: free some space and run the same command again."
    if error.errno is None and error.filename is None:
        return None
    file = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else error.filename
    what = f"{file} cannot be used" if file is not None else "a file cannot be used"
    reason = _WHAT_TO_DO.get(error.errno or 0) or (error.strerror or type(error).__name__).lower()
    return f"{what}; {reason}."


_CONTROL: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Characters by which a text could act on the terminal or show itself as another; newline and tab stay."""


def plain(text: object) -> str:
    """A text with control characters written out, so that a task's name or an answer cannot steer the terminal."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1].replace("\\\\", "\\"), str(text))


def echo(message: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Print a text that may come from files; every command prints through this, a table or JSON.

    A reader that has seen enough (``head``, a pager) ends the command without a word.
    """
    try:
        click.echo(plain(message), err=err, nl=nl)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stderr if err else sys.stdout).fileno())
        sys.exit(EXIT_READER_GONE)


def heading(text: object) -> None:
    """Print a bold line."""
    click.secho(plain(text), bold=True)


def fail(message: object) -> NoReturn:
    """Print one sentence and leave with exit code 2."""
    with suppress(OSError):  # nobody reads it
        echo(f"Error: {message}", err=True)
    sys.exit(EXIT_BAD_INPUT)


def print_json(value: Any) -> None:
    """JSON to standard output, with NaN and infinity as null so that every parser takes it."""
    from pydantic_core import to_jsonable_python

    def from_numpy(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else str(value)

    echo(json.dumps(to_jsonable_python(value, inf_nan_mode="null", fallback=from_numpy), indent=1))


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Indented columns of text under a header; columns of numbers are aligned right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for i, name in enumerate(header):
        numeric = bool(rows) and all(row[i].replace(",", "").replace(".", "").isdigit() for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(plain, row))
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    with console.capture() as captured:
        console.print(table, markup=False)
    echo("".join(f"  {line.rstrip()}\n" for line in captured.get().splitlines()), nl=False)


SCHEDULER_SECONDS: Final = 30.0
"""Within which a dask scheduler must have answered, whatever listens at its address."""


@contextmanager
def connect(scheduler: str | None, devices: str | None) -> Iterator[Any]:
    """A dask client for the block, or None; that of a scheduler serves statistics too, in the block alone."""
    if scheduler is not None and devices is not None:
        from rlgen_stats.schemas.errors import InputError

        raise InputError("--devices starts workers of its own and --scheduler has others; name one of the two.")
    if devices is not None:
        from rlgen_stats.toolkit.workers import local_workers

        with local_workers(devices) as client:
            yield client
    elif scheduler is not None:
        import dask

        with _client(scheduler) as client, dask.config.set(scheduler=client):
            yield client
    else:
        yield None


def _client(scheduler: str) -> Any:
    """A client of the scheduler at an address, whatever listens there."""
    found: list[Any] = []
    reason = ["it stays silent"]

    def ask() -> None:
        from distributed import Client

        try:
            # set_as_default would leave a client that could not connect where every later computation waits for it
            found.append(Client(scheduler, timeout=SCHEDULER_SECONDS / 2, set_as_default=False))
        except Exception as error:  # of the address, the network, or whatever answered there
            reason[0] = (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        if not found:  # a client that could not connect, collected while another starts, would wait for itself
            gc.collect()

    # a daemon: something that accepts a connection and stays silent would hold the client, and with it the command
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SCHEDULER_SECONDS)
    if found:
        return found[0]
    from rlgen_stats.schemas.errors import InputError

    raise InputError(
        f"no dask scheduler answers at {scheduler!r} ({reason[0]}); start one with 'dask scheduler' or leave "
        "--scheduler out."
    )


@contextmanager
def progress_for(*, quiet: bool = False) -> Iterator[Progress]:
    """Progress on standard error: bars on a terminal, plain lines elsewhere, nothing when quiet."""
    if quiet:
        from rlgen_stats.toolkit.progress import SILENT

        yield SILENT
    elif sys.stderr.isatty():
        with _bars() as progress:
            yield progress
    else:
        yield _Lines()


class _LineTask:
    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done, self._skipped, self._began, self._facts = 0.0, 0.0, time.monotonic(), ""
        self._printed = self._began

    def advance(self, amount: float = 1.0, **facts: object) -> None:
        """Count, and print a line when the last one is old."""
        self._done += amount
        self._facts = " ".join(f"{name}={_short(value)}" for name, value in facts.items())
        if time.monotonic() - self._printed >= PLAIN_LINE_SECONDS:
            self.print_line()

    def skip(self, amount: float, **facts: object) -> None:
        """Count units that an earlier run did; they do not enter the speed."""
        self._skipped += amount
        self.advance(amount, **facts)

    def print_line(self, *, end: bool = False) -> None:
        """One line: units done, speed, time left or taken."""
        self._printed = time.monotonic()
        seconds = max(self._printed - self._began, 1e-9)
        rate = (self._done - self._skipped) / seconds
        speed = f", {_short(rate)}/s" if rate else ""
        of = f"/{self._total:.0f}" if self._total else ""
        left = f", {(self._total - self._done) / rate:.0f} s left" if self._total and rate and not end else ""
        done = f", {seconds:.1f} s" if end else ""
        echo(
            f"  {self._description}: {self._done:.0f}{of} {self._unit}{speed}{left}{done} {self._facts}".rstrip(),
            err=True,
        )


class _Lines:
    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "it") -> Iterator[Task]:
        """A task that prints a line every ``PLAIN_LINE_SECONDS`` and one at its end."""
        task = _LineTask(description, total, unit)
        yield task
        task.print_line(end=True)

    def log(self, message: str) -> None:
        """One line."""
        echo(message, err=True)


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.progress import Progress as RichProgress
    from rich.table import Column
    from rich.text import Text

    class Rate(ProgressColumn):
        """Units per second."""

        def render(self, task: Any) -> Text:
            speed = _speed(task)
            return Text("" if speed is None else f"{speed:,.0f}/s" if speed >= 100 else f"{speed:.2g}/s", style="dim")

    class Left(ProgressColumn):
        """Time left at the speed so far."""

        max_refresh = 0.5

        def render(self, task: Any) -> Text:
            speed = _speed(task)
            known = task.finished or (speed and task.total is not None)
            seconds = 0 if task.finished else math.ceil(task.remaining / speed) if known else None
            return Text("-:--:--" if seconds is None else str(timedelta(seconds=seconds)), style="cyan")

    console = Console(stderr=True)
    columns = (
        TextColumn("  {task.description}", markup=False),
        BarColumn(bar_width=12),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[unit]}", table_column=Column(overflow="ellipsis")),  # cut first on a narrow screen
        Rate(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("eta"),
        Left(table_column=Column(no_wrap=True)),
        TextColumn(
            "{task.fields[facts]}",
            style="dim",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
    )
    with RichProgress(*columns, console=console, transient=False, expand=True) as rich_progress:
        yield _Bars(rich_progress, console)


def _speed(task: Any) -> float | None:
    """Units per second of a bar's task in this run; None before the first."""
    seconds = task.finished_time if task.finished else task.elapsed
    done = task.completed - task.fields["skipped"]
    return done / seconds if seconds and done else None


class _Bars:
    def __init__(self, bars: Any, console: Any) -> None:
        self._bars, self._console = bars, console

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "it") -> Iterator[Task]:
        """A bar."""
        handle = self._bars.add_task(plain(description), total=total, unit=unit, facts="", skipped=0.0)
        yield _BarTask(self._bars, handle)
        if total is None:
            self._bars.update(handle, total=self._bars.tasks[self._bars.task_ids.index(handle)].completed)

    def log(self, message: str) -> None:
        """One line above the bars."""
        self._console.print(plain(message), highlight=False, markup=False)


class _BarTask:
    def __init__(self, bars: Any, handle: Any) -> None:
        self._bars, self._handle, self._skipped = bars, handle, 0.0

    def advance(self, amount: float = 1.0, **facts: object) -> None:
        """Move the bar."""
        text = " ".join(f"{name} {_short(value)}" for name, value in facts.items())
        self._bars.update(self._handle, advance=amount, facts=plain(text))

    def skip(self, amount: float, **facts: object) -> None:
        """Move the bar by units that an earlier run did; they do not enter the speed."""
        self._skipped += amount
        self._bars.update(self._handle, skipped=self._skipped)
        self.advance(amount, **facts)
