"""Handing a training run to processes that a launcher starts, such as ``accelerate launch`` or ``torchrun``.

The launcher runs :mod:`rlgen_stats.toolkit.posttrain.launched` in each of its processes, which train together; what
they print, and how far they are, comes back through their standard output.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import Any, Final

from rlgen_stats.schemas.errors import InputError, StageError
from rlgen_stats.schemas.study import RunSpec, StudySpec
from rlgen_stats.stores import StudyFolder, write_json
from rlgen_stats.stores.study_models import POSTTRAIN_RECORD
from rlgen_stats.toolkit.progress import Heard, Progress

MODULE: Final = "rlgen_stats.toolkit.posttrain.launched"
MARK: Final = "rlgen-stats: "
"""Before what a line says to the process that reads it, in JSON."""
N_LINES: Final = 12
"""Last lines that are shown of processes that failed."""


def train_elsewhere(launcher: str, spec: StudySpec, run: RunSpec, folder: StudyFolder, *, progress: Progress) -> None:
    """Train a run in the processes that a command starts, to its end.

    Parameters
    ----------
    launcher
        Command line that takes ``-m MODULE ARGUMENT`` at its end and runs that in one or more processes.
    spec, run, folder
        As in :func:`train_run`.
    progress
        Receiver of the training's progress and of every line that the processes print.

    Raises
    ------
    InputError
        If the command cannot be run.
    StageError
        If the training failed: with its reason where the training gave one, else with its last lines.

    Notes
    -----
    The processes end when this one does, whatever ends it: each reads from a pipe that closes then.
    """
    note = folder.run(run.name) / ".launched.json"
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, {"spec": spec.model_dump(mode="json"), "folder": str(folder.root.resolve()), "run": run.name})
    try:
        with _started([*_words(launcher), "-m", MODULE, str(note)]) as process:
            said = _Said(progress)
            said.read(process)
            code = process.wait()
    finally:
        note.unlink()
    if said.refusal:
        raise StageError(f"run {run.name!r}, trained by {launcher!r}: {said.refusal}")
    if code or not (folder.run(run.name) / POSTTRAIN_RECORD).exists():
        how = f"ended with exit code {code}" if code else "ended without finishing the run"
        lines = "\n".join(said.last)
        raise StageError(f"run {run.name!r}, trained by {launcher!r}: {how}; its last lines:\n{lines}")


def _words(launcher: str) -> list[str]:
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise InputError(f"the launcher {launcher!r} is no command line ({error}); correct its quotes.") from error
    if not words or shutil.which(words[0], path=_search_path()) is None:
        raise InputError(
            f"there is no program {words[0] if words else ''!r} to launch training with; expected a command line such "
            "as 'accelerate launch --num_processes 4'."
        )
    return words


def _search_path() -> str:
    """Programs of this environment are found although it was not activated."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])


@contextmanager
def _started(command: list[str]) -> Iterator[Popen[str]]:
    """The command's process, which leads a group of its own; an exception kills the group."""
    environment = {**os.environ, "PATH": _search_path()}
    command[0] = str(shutil.which(command[0], path=environment["PATH"]))
    with Popen(
        command,
        stdin=PIPE,
        stdout=PIPE,
        stderr=STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            yield process
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # checkpoints are whole or not there at any moment
            raise


class _Said:
    """What the processes say: progress, a reason for giving up, and lines meant for people."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.last: deque[str] = deque(maxlen=N_LINES)
        self.refusal = ""

    def read(self, process: Popen[str]) -> None:
        """Until the processes end."""
        with closing(Heard(self._progress)) as heard:
            for line in process.stdout or ():
                text, mark, message = line.rstrip().partition(MARK)
                if text:
                    self.last.append(text)
                    self._progress.log(text)
                event: Mapping[str, Any] = json.loads(message) if mark else {}
                if "refusal" in event:
                    self.refusal = event["refusal"]
                elif "task" in event:  # lines for people were said here before
                    heard.hear(message)
