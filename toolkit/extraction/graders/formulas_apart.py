"""Formulas judged by a process of its own, for threads and systems where an alarm signal cannot end a comparison."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Final, TextIO, cast

from rlgen_stats.schemas.errors import StageError

PATIENCE: Final = 30.0
"""Seconds for one completion, after which the process is killed; its own alarms end what they can within five each."""
START: Final = 300.0
"""Seconds for its imports, on a disk that is busy."""
_READY: Final = "ready"


class FormulaProcess:
    """One process for all threads, started with the first completion, and anew after one that it did not survive."""

    def __init__(self, module: str) -> None:
        self._module = module
        """Calls ``serve`` where it is run by name."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def judge(self, text: str, answer: str) -> bool | None:
        """As MathGrader does; False where the comparison takes too long, or all memory.

        Raises
        ------
        StageError
            If the process does not start.
        """
        question = json.dumps([text, answer])
        with self._lock:
            for _ in range(2):  # a process that died since the formula before says nothing about this one
                running = self._running()
                try:
                    said, late = _next_line(running, PATIENCE, question)
                except BaseException:  # Ctrl-C: what it still says would be taken for its answer to the next question
                    self._close()
                    raise
                if said:
                    verdict: bool | None = json.loads(said)
                    return verdict
                self._close()
                if late:
                    break
        logging.getLogger(__name__).warning("a formula took too long to compare, or too much memory: %.120s", text)
        return False

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            command = [sys.executable, "-P", "-m", self._module]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            said, _ = _next_line(self._process, START)
            if said.strip() != _READY:
                self._close()
                raise StageError("the process that compares formulas does not start; see what it printed.")
        return self._process

    def _close(self) -> None:
        process, self._process = cast("subprocess.Popen[str]", self._process), None
        process.kill()
        process.wait()
        cast("TextIO", process.stdout).close()
        with contextlib.suppress(BrokenPipeError):
            cast("TextIO", process.stdin).close()


def _next_line(process: subprocess.Popen[str], patience: float, question: str | None = None) -> tuple[str, bool]:
    """What it says, to ``question`` if there is one; nothing if it ends first, and whether ``patience`` ended it."""
    late = threading.Event()

    def give_up() -> None:
        late.set()
        process.kill()

    killer = threading.Timer(patience, give_up)
    killer.start()
    try:
        if question is not None:
            print(question, file=process.stdin, flush=True)
        said = cast("TextIO", process.stdout).readline()
    except BrokenPipeError:
        said = ""
    finally:
        killer.cancel()
    return (said if said.endswith("\n") else ""), late.is_set()


def alarms_reach_this_thread() -> bool:
    """Whether math-verify's own time limit works here: on the main thread, and not on Windows."""
    return hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()


def serve(judge: Callable[[str, str], bool | None]) -> None:
    """What the process does: judge a line of standard input after the other, until it ends."""
    print(_READY, flush=True)  # noqa: T201 - its standard output is a pipe
    for line in sys.stdin:
        text, answer = json.loads(line)
        print(json.dumps(judge(text, answer)), flush=True)  # noqa: T201
