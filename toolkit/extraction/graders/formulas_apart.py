"""Formulas judged by a process of its own, for threads and systems where an alarm signal cannot end a comparison."""

from __future__ import annotations

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
        with self._lock:
            process = self._running()
            killer = threading.Timer(PATIENCE, process.kill)
            killer.start()
            try:
                print(json.dumps([text, answer]), file=process.stdin, flush=True)
                said = _line_from(process)
            except BrokenPipeError:
                said = ""
            finally:
                killer.cancel()
            if not said:
                self._process = None
                process.wait()
                logging.getLogger(__name__).warning("a formula took too long to compare: %.120s", text)
                return False
        verdict: bool | None = json.loads(said)
        return verdict

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-P", "-m", self._module]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            if _line_from(self._process).strip() != _READY:
                raise StageError("the process that compares formulas does not start; see what it printed.")
        return self._process


def _line_from(process: subprocess.Popen[str]) -> str:
    return cast("TextIO", process.stdout).readline()


def alarms_reach_this_thread() -> bool:
    """Whether math-verify's own time limit works here: on the main thread, and not on Windows."""
    return hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()


def serve(judge: Callable[[str, str], bool | None]) -> None:
    """What the process does: judge a line of standard input after the other, until it ends."""
    print(_READY, flush=True)  # noqa: T201 - its standard output is a pipe
    for line in sys.stdin:
        text, answer = json.loads(line)
        print(json.dumps(judge(text, answer)), flush=True)  # noqa: T201
