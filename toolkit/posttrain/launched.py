"""What a launcher runs in each of its processes: one training run, whose description is the only argument."""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
from pathlib import Path

from rlgen_stats.schemas.errors import RlgenStatsError
from rlgen_stats.schemas.study import StudySpec
from rlgen_stats.stores import StudyFolder, read_json
from rlgen_stats.toolkit.posttrain.launcher import MARK
from rlgen_stats.toolkit.posttrain.train_run import train_run
from rlgen_stats.toolkit.progress import Told


def _tell(line: str) -> None:
    sys.stdout.write(f"{MARK}{line}\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    """End this process when the one that started the launcher ends: then the pipe that it holds closes."""

    def wait() -> None:
        os.read(0, 1)  # nobody writes; sys.stdin would be locked when Python ends
        os._exit(1)

    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=wait, daemon=True).start()


def main(file: str) -> None:
    """Train the run that a file describes, together with the launcher's other processes."""
    _end_with_parent()
    note = read_json(Path(file))
    spec, folder = StudySpec.model_validate(note["spec"]), StudyFolder(Path(note["folder"]))
    run = next(run for run in spec.runs if run.name == note["run"])
    try:
        train_run(spec, run, folder, progress=Told(_tell))
    except RlgenStatsError as error:
        _tell(json.dumps({"refusal": str(error)}))
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1])
